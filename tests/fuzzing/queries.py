"""Questions: what the library is asked, and the same by loops, both in source."""

from __future__ import annotations

from dataclasses import dataclass

from .choices import Choices
from .problems import Problem


@dataclass(frozen=True)
class Query:
    """name: in a few words. got, want: lines that set these names. The former know ``net``, ``lc``, ``data``, ``v`` and
    ``loss``; the latter also ``run`` (a minibatch to outputs, of a fresh net), ``params``, the Jacobian ``J``, outputs
    ``f``, ``targets``, and the loss as ``whole`` and ``each``. tolerance: of the relative error; size: in units of what
    error is measured, if that is more than ``want``. hessian: whether the truth should be confirmed by differences.
    """

    name: str
    got: tuple[str, ...]
    want: tuple[str, ...]
    tolerance: float = 1e-8
    size: str = "0.0"
    hessian: bool = False


def query_of(numbers: tuple[int, ...], problem: Problem) -> Query | None:
    c = Choices(numbers)
    kind = c.of(["matrix"] * 5 + ["hessian"] * 3 + ["jacobian"] * 2 + ["kernel", "kernel", "influence"])
    return {"matrix": _matrix, "hessian": _hessian, "jacobian": _jacobian, "kernel": _kernel, "influence": _influence}[
        kind
    ](c, problem)


#: From a representation and the matrix M by loops to what is compared: name, representation, got from A, want from M.
_ENTRIES = (
    ("PMatDense", "PMatDense", "A.to_torch()", "M"),
    ("PMatDiag", "PMatDiag", "A.get_diag()", "M.diag()"),
    ("PMatBlockDiag", "PMatBlockDiag", "A.to_torch()", "blocks_of(M, slices)"),
    ("PMatLowRank", "PMatLowRank", "A.to_torch()", "M"),
    ("PMatQuasiDiag diagonal", "PMatQuasiDiag", "A.get_diag()", "M.diag()"),
    ("PMatQuasiDiag entries", "PMatQuasiDiag", "A.to_torch()", "torch.where(got != 0, M, 0.0)"),
    ("PMatEKFAC trace", "PMatEKFAC", "A.trace()", "M.trace()"),
    ("PMatEye trace", "PMatEye", "A.trace()", "M.trace()"),
    ("PMatImplicit mv", "PMatImplicit", "A.mv(v).to_torch()", "M @ v.to_torch()"),
    ("PMatImplicit mv, again", "PMatImplicit", "(A.mv(v), A.mv(v * 2))[1].to_torch() / 2", "M @ v.to_torch()"),
    ("PMatImplicit trace", "PMatImplicit", "A.trace()", "M.trace()"),
    ("PMatImplicit diagonal", "PMatImplicit", "A.get_diag()", "M.diag()"),
    ("PMatImplicit to_torch", "PMatImplicit", "A.to_torch()", "M"),
    ("PMatImplicit vTMv", "PMatImplicit", "A.vTMv(v)", "v.to_torch() @ M @ v.to_torch()"),
    (
        "PMatMixed",
        "PMatMixed.of(PMatBlockDiag, {lambda layer: layer.name == list(lc)[0]: PMatDiag})",
        "A.to_torch()",
        "(lambda B, s: (B[s, s].copy_(B[s, s].diag().diag()), B)[1])(blocks_of(M, slices), slices[0])",
    ),
    (
        "PMatEKFAC blocks",
        "PMatEKFAC",
        "torch.stack([A.block(k).trace() for k in lc])",
        "torch.stack([M[s, s].trace() for s in slices])",
    ),
    ("PMatKFAC", "PMatKFAC", "A.to_torch()", "kfac"),
    (
        "PMatDense solve",
        "PMatDense",
        "A.solve(v, regul=0.1).to_torch()",
        "torch.linalg.solve(M + 0.1 * torch.eye(len(M), dtype=M.dtype), v.to_torch())",
    ),
    (
        "PMatLowRank solve",
        "PMatLowRank",
        "A.solve(v, regul=0.1).to_torch()",
        "torch.linalg.solve(M + 0.1 * torch.eye(len(M), dtype=M.dtype), v.to_torch())",
    ),
)


def _matrix(c: Choices, problem: Problem) -> Query | None:
    matrix = c.of(["FIM"] * 4 + ["EmpiricalFisher", "GradientCovariance", "GGN"])
    name, representation, got, want = c.of(_ENTRIES)
    loss = problem.loss
    variant, nll = c.of(problem.variants)
    square = "M = g.T @ g / len(g)"
    gradients = "g = loss_gradients(J, f, each, targets)"
    size = "0.0"
    if matrix == "FIM":
        argument, value = variant, f"lambda f: {nll}"
        truth = [f"M = curvature(J, f, {value}) / len(f)"]
    elif matrix == "GGN":
        if not (loss.convex and loss.twice):
            return None
        argument, value = "loss", "lambda f: whole(f, *targets)"
        truth = [f"M = curvature(J, f, {value})"]
    else:
        argument, value = "loss", ""
        centred = matrix == "GradientCovariance"
        truth = [
            gradients,
            *(["size = float((g.T @ g).norm()) / len(g)", "g = g - g.mean(0)"] if centred else []),
            square,
        ]
        size = "size" if centred else size
    if name == "PMatKFAC":
        if matrix != "FIM":
            return None
        truth += [
            "saw = linear_inputs(other, run, batches())",
            "kfac = torch.zeros_like(M)",
            "for name, s in lc.slices().items():",
            "    whole_layer = [k for k, _ in lc[name].params] == ['weight', 'bias']",
            "    if not lc[name].kronecker:",
            "        kfac[s, s] = M[s, s]",
            "    elif name in saw and whole_layer:",
            f"        kfac[s, s] = kfac_block(J, f, {value}, s, saw[name])",
            "    else:",
            "        got[s, s] = 0",
        ]
    tolerance = 1e-7 if "solve" in name else 1e-8
    return Query(
        f"{matrix}{f' of {argument}' if matrix == 'FIM' else ''}, {name}",
        (f"A = {matrix}(net, data, {representation}, {argument}, layer_collection=lc{problem.call})", f"got = {got}"),
        (*truth, f"want = {want}"),
        tolerance,
        size,
    )


def _hessian(c: Choices, problem: Problem) -> Query | None:
    if not problem.loss.twice:
        return None
    call = f"layer_collection=lc{problem.call}"
    name, made, got, tolerance = c.of(
        [
            ("PMatImplicit mv", "PMatImplicit, loss, ", "A.mv(v).to_torch()", 1e-8),
            ("PMatImplicit mv, again", "PMatImplicit, loss, ", "(A.mv(v), A.mv(v * 2))[1].to_torch() / 2", 1e-8),
            ("PMatDense", "PMatDense, loss, ", "A.to_torch() @ v.to_torch()", 1e-8),
            ("PMatImplicit vTMv", "PMatImplicit, loss, ", "A.vTMv(v)", 1e-8),
            ("FiniteDifference", "PMatImplicit, loss, products=FiniteDifference(), ", "A.mv(v).to_torch()", 1e-4),
        ]
    )
    total = "total = lambda: whole(torch.cat([run(batches()[k]) for k in range(len(data))]), *targets)"
    product = "want = hessian_product(total, params, v.to_torch())"
    then = ["want = v.to_torch() @ want"] if "vTMv" in name else []
    return Query(
        f"Hessian, {name}",
        (f"A = Hessian(net, data, {made}{call})", f"got = {got}"),
        (total, product, *then),
        tolerance,
        hessian=True,
    )


def _jacobian(c: Choices, problem: Problem) -> Query | None:
    kind = c.of(["PFMapDense", "PFMapFactored", "PFMapImplicit"])
    centred = c.once_in(4)
    rows = "J = J - J.mean(0)" if centred else "J = J"
    call = f"layer_collection=lc{problem.call}, representation={kind}{', centering=True' if centred else ''}"
    k, n = _numel(problem), problem.examples
    u = f"torch.linspace(-1, 1, {k * n}, dtype=torch.float64).view({k}, {n})"
    name, got, want = c.of(
        [
            ("jvp", "(A @ v).to_torch()", "(J @ v.to_torch()).T"),
            ("vjp", f"(A.T @ FVector({u})).to_torch()", f"torch.einsum('kn,nkp->p', {u}, J)"),
            ("to_dense", "A.to_dense().to_torch()", "J.transpose(0, 1)"),
        ]
    )
    return Query(
        f"Jacobian, {kind}, {name}{', centred' if centred else ''}",
        (f"A = Jacobian(net, data, {call})", f"got = {got}"),
        ("size = float(J.norm())", rows, f"want = {want}"),
        size="size" if centred else "0.0",
    )


def _kernel(c: Choices, problem: Problem) -> Query | None:
    output, form = c.of(
        [
            ("full", "torch.einsum('nkp,mlp->knlm', J, J)"),
            ("diag", "torch.einsum('nkp,mkp->knm', J, J)"),
            ("trace", "torch.einsum('nkp,mkp->nm', J, J)"),
            ("mean_trace", "torch.einsum('nkp,mkp->nm', J, J) / J.shape[1]"),
            ("sum", "torch.einsum('np,mp->nm', J.sum(1), J.sum(1))"),
        ]
    )
    call = f"layer_collection=lc{problem.call}, output={output!r}"
    style = c.of(["plain", "plain", "per layer", "products", "second loader"])
    if style == "per layer":
        got = (f"A = GramMatrix(net, data, {call}, per_layer=True)", "got = sum(K.to_torch() for K in A.values())")
    elif style == "products":
        got = (f"A = GramMatrix(net, data, {call}, representation=FMatImplicit)", "got = A.to_torch()")
    elif style == "second loader":
        got = (f"A = GramMatrix(net, data, loader2=batches(), {call})", "got = A.to_torch()")
    else:
        got = (f"A = GramMatrix(net, data, {call})", "got = A.to_torch()")
    return Query(f"GramMatrix {output}, {style}", got, (f"want = {form}",))


def _influence(c: Choices, problem: Problem) -> Query | None:
    matrix = c.of(["PMatDense", "PMatLowRank"])
    score = c.of(["scores(data, data)", "self_scores(data)", "scores(data[0], data)"])
    entries = {
        "scores(data, data)": "S",
        "self_scores(data)": "S.diag()",
        "scores(data[0], data)": "S[: len(got)]",
    }[score]
    return Query(
        f"Influence by {matrix}, {score}",
        (
            f"A = EmpiricalFisher(net, data, {matrix}, loss, layer_collection=lc{problem.call})",
            f"got = Influence(net, A, loss, regul=0.1{problem.call}).{score}",
        ),
        (
            "g = loss_gradients(J, f, each, targets)",
            "M = g.T @ g / len(g) + 0.1 * torch.eye(g.shape[1], dtype=g.dtype)",
            "S = g @ torch.linalg.solve(M, g.T)",
            f"want = {entries}",
        ),
        tolerance=1e-7,
    )


def _numel(problem: Problem) -> int:
    k = 1
    for length in problem.output:
        k *= length
    return k
