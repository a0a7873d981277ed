"""From decisions to the source of data, targets, a loss and a meaning of the output, for a net that is there."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .choices import Choices
from .nets import Net


@dataclass(frozen=True)
class Loss:
    """A loss of the output, in source. given: what the library gets. whole: the loss of all data, of outputs and
    targets, which the library differentiates twice. each: the loss of a few examples, summed. convex: in the output.
    """

    given: str
    whole: str
    each: str
    convex: bool
    twice: bool = True


@dataclass(frozen=True)
class Problem:
    """data: the functions ``batches`` and ``function`` in source. call: how the library is told of the function.
    variants: what the output may mean, each with its negative log-likelihood. targets: where a minibatch has
    them. collection: the parameters.
    """

    data: str
    call: str
    loss: Loss
    variants: tuple[tuple[str, str], ...]
    output: tuple[int, ...]
    examples: int
    targets: tuple[str, ...]
    collection: str
    used: tuple[str, ...]


#: What is made of the net by a function, the first of which is the net alone. ``{net}`` is a call of it.
FUNCTIONS = (
    *["{net}"] * 24,
    "{net}.tanh()",
    "{net}.mul_(2)",
    "{net} + {net}",
    "{net}[:, :1]",
    "{net} * sum(p.sum() for p in net.parameters())",
    "{net} * next(iter(net.parameters())).mean()",
    "{net}.flatten(1)",
    "{other}",
    "{net} + {other}",
    "{kept}",
    "torch.func.functional_call(net, dict(net.named_parameters()), {args})",
)


#: Which parameters are looked at.
COLLECTIONS = (
    *["LayerCollection.from_model(net)"] * 6,
    "LayerCollection.from_model(net, frozen=True)",
    "LayerCollection.from_model(net, lambda layer: layer.name != 'm0')",
    "LayerCollection.from_model(net, lambda layer: layer.name[-1:] != '1')",
)


def problem_of(numbers: tuple[int, ...], net: Net, shape_of: object) -> Problem:
    """shape_of: from the source of ``function`` to the shape of its output for one example."""
    c = Choices(numbers)
    second = net.given.second
    batch_form = c.of(["tuple"] * 6 + ["list", "dict"])
    mapping = batch_form == "dict"
    z = ", z" if second else ""
    args = "b['x']" + (", b['z']" if second else "") if mapping else "x" + z
    head = "b" if mapping else f"x{z}, *rest"
    form = c.of(FUNCTIONS)
    plain = form == "{net}" and not second and not mapping and not c.once_in(4)
    setup = ""
    if "{other}" in form:
        setup = "    other = build()\n"
    if "{kept}" in form:
        setup = "    kept = [net]\n"
    made = (
        form.replace("{net}", f"net({args})")
        .replace("{other}", f"other({args})")
        .replace("{kept}", f"kept[0]({args})")
        .replace("{args}", f"({args},)")
    )
    function = f"def function(net):\n{setup}    return lambda {head}: {made}\n"
    output = shape_of(function)  # type: ignore[operator]
    if output is None:
        form, made = "{net}", f"net({args})"
        function = f"def function(net):\n    return lambda {head}: {made}\n"
        output = net.output
    sizes = c.of([(2,), (3,), (2, 1), (1,), (1, 1), (4,), (3, 2), (1, 2), (2, 2, 1), (1, 1, 1)])
    n = sum(sizes)
    layout = c.of([""] * 6 + list(_layouts(net)))
    target, loss = _loss(c, output)
    if mapping:
        loss = _wrapped(loss, "b", ", ".join(f"b[{name!r}]" for name, _ in target))
    elif second:
        loss = _wrapped(loss, "z, *t", "*t")
    names = ["x", *(["z"] if second else []), *[name for name, _ in target]]
    lines = [
        "g = torch.Generator().manual_seed(1)",
        f"x = {net.given.made(n)}{layout}",
        *([f"z = torch.randn({n}, 3, generator=g, dtype=torch.float64)"] if second else []),
        *(f"{name} = {made.replace('{n}', str(n))}" for name, made in target),
    ]
    rows, start = [], 0
    for size in sizes:
        cut = f"[{start}:{start + size}]" if len(sizes) > 1 else ""
        rows.append([f"{name}{cut}" for name in names])
        start += size
    brackets = {"tuple": "({},)", "list": "[{}]"}
    if mapping:
        made_rows = ["{" + ", ".join(f"'{k}': {v}" for k, v in zip(names, row, strict=True)) + "}" for row in rows]
    else:
        made_rows = [brackets[batch_form].format(", ".join(row)) for row in rows]
    lines.append(f"return [{', '.join(made_rows)}]")
    data = "def batches():\n" + "".join(f"    {line}\n" for line in lines)
    used = (*(() if form == "{net}" else (form,)), *((layout,) if layout else ()), batch_form, f"sizes {sizes}")
    return Problem(
        data + "\n\n" + function,
        "" if plain else ", function=call",
        loss,
        _variants(output),
        output,
        n,
        tuple(repr(name) for name, _ in target) if mapping else tuple(str(k + 1 + second) for k in range(len(target))),
        c.of(COLLECTIONS[:7] if "GroupNorm" in net.source else COLLECTIONS),
        used,
    )


def _layouts(net: Net) -> list[str]:
    found = []
    axes = len(net.given.shape)
    if axes >= 2:
        found += [".transpose(1, -1).contiguous().transpose(1, -1)", ".transpose(0, 1).contiguous().transpose(0, 1)"]
    if axes == 3:
        found.append(".contiguous(memory_format=torch.channels_last)")
    if axes >= 1:
        found += [".repeat_interleave(2, -1)[..., ::2]", "[..., :1].expand({shape})"]
    found += [".repeat_interleave(2, 0)[::2]"]
    return [f.replace("{shape}", f"-1, {', '.join(map(str, net.given.shape))}") for f in found]


def _loss(c: Choices, output: tuple[int, ...]) -> tuple[list[tuple[str, str]], Loss]:
    """Targets by name, and a loss of them."""
    shape = _shape(output)
    kinds = ["square", "square", "convex", "counts", "logits", "noise", "odd", "absolute"]
    if output and output[0] > 1:
        kinds = ["classes", "classes", "classes", "probabilities", *kinds]
    if len(output) > 1 and output[-1] > 1:
        kinds.append("tokens")
    kind = c.of(kinds)
    reduction = c.of(["", "reduction='sum'"])
    real = f"torch.randn({shape}, generator=g, dtype=torch.float64)"

    def torch_loss(name: str, *options: str, convex: bool = True) -> Loss:
        def made(*more: str) -> str:
            return f"nn.{name}({', '.join(o for o in (*options, *more) if o)})"

        return Loss(made(reduction), made(reduction), made("reduction='sum'"), convex)

    def own(values: str, convex: bool, twice: bool = True) -> Loss:
        return Loss(
            f"lambda f, *t: {values}",
            f"lambda f, *t: ({values}).sum() / len(f)",
            f"lambda f, *t: ({values}).sum()",
            convex,
            twice,
        )

    if kind in ("classes", "probabilities", "tokens"):
        k = output[-1] if kind == "tokens" else output[0]
        rest = output[:-1] if kind == "tokens" else output[1:]
        positions = _shape(rest)
        weight = f"weight=torch.linspace(0.5, 1.5, {k}, dtype=torch.float64)" if c.once_in(4) else ""
        smooth = "label_smoothing=0.1" if c.once_in(4) else ""
        if kind == "probabilities":
            target = f"torch.rand({shape}, generator=g, dtype=torch.float64)"
            return [("y", target)], torch_loss("CrossEntropyLoss", weight, smooth)
        target = f"torch.randint({k}, {positions}, generator=g)"
        if kind == "tokens":
            values = "F.cross_entropy(f.movedim(-1, 1), t[0], reduction='none')"
            return [("y", target)], own(values, True)
        ignored = c.of(["", "", "ignore_index=0"])
        if c.once_in(4):
            return [("y", target)], own("F.cross_entropy(f, t[0], reduction='none')", True)
        return [("y", target)], torch_loss("CrossEntropyLoss", weight, smooth, ignored)
    flat = output == (1,) and c.of([False, True])
    if kind == "square":
        return _flat(flat, real, torch_loss("MSELoss"))
    if kind == "absolute":
        return [("y", real)], own("(f - t[0]).abs()", True, twice=False)
    if kind == "convex":
        name = c.of(["SmoothL1Loss", "HuberLoss"])
        return _flat(flat, real, torch_loss(name, c.of(["", "beta=0.5" if name == "SmoothL1Loss" else "delta=0.5"])))
    if kind == "counts":
        counts = f"torch.randint(4, {shape}, generator=g).double()"
        return _flat(flat, counts, torch_loss("PoissonNLLLoss"))
    if kind == "logits":
        bits = f"torch.randint(2, {shape}, generator=g).double()"
        weight = "pos_weight=torch.tensor(2.0, dtype=torch.float64)" if c.once_in(3) else ""
        return _flat(flat, bits, torch_loss("BCEWithLogitsLoss", weight))
    if kind == "noise":
        variance = f"0.5 + torch.rand({shape}, generator=g, dtype=torch.float64)"
        return [("y", real), ("var", variance)], torch_loss("GaussianNLLLoss")
    return [("y", real)], own(
        *c.of(
            [
                ("(f - t[0]).square()", True),
                ("(f - t[0]).square().flatten(1).sum(1)", True),
                ("(f * t[0]).sin()", False),
                ("(f - t[0]).pow(4).flatten(1).mean(1)", True),
                ("f.flatten(1).logsumexp(1)", True),
                ("f.flatten(1).square().sum(1, keepdim=True).sqrt()", True),
            ]
        )
    )


def _shape(of_one: tuple[int, ...]) -> str:
    return f"({{n}}, {''.join(f'{length}, ' for length in of_one)})"


def _flat(flat: bool, target: str, loss: Loss) -> tuple[list[tuple[str, str]], Loss]:
    """With targets (n,) for outputs (n, 1) or not; what is meant is the same."""
    if not flat:
        return [("y", target)], loss
    whole, each = (f"lambda f, y: ({made})(f, y.view(f.shape))" for made in (loss.whole, loss.each))
    return [("y", f"({target})[:, 0]")], replace(loss, whole=whole, each=each)


def _wrapped(loss: Loss, arguments: str, targets: str) -> Loss:
    """As a function of the user's, where a loss of torch would not get what it expects. Its value is one number, or
    several, for each example.
    """
    made = loss.given
    if not made.startswith("lambda"):
        inside = made[: made.rindex(")")].replace(", reduction='sum'", "").replace("reduction='sum'", "")
        made = f"{inside}{'' if inside.endswith('(') else ', '}reduction='none')"
    given = f"lambda f, {arguments}: ({made})(f, {targets})"
    return replace(loss, given=given, whole=f"lambda f, *t: ({loss.each})(f, *t) / len(f)")


def _variants(output: tuple[int, ...]) -> tuple[tuple[str, str], ...]:
    found = [
        ("'regression'", "0.5 * f.square().sum()"),
        ("'classif_binary_logits'", "F.binary_cross_entropy_with_logits(f, torch.ones_like(f), reduction='sum')"),
        ("Gaussian(2.0)", "0.25 * f.square().sum()"),
        ("Bernoulli()", "F.softplus(f).sum()"),
        ("Poisson()", "f.exp().sum()"),
    ]
    if output and output[0] > 1:
        categorical = "f.logsumexp(1).sum()"
        if len(output) == 1:
            found = [("'classif_logits'", categorical), *found]
        found += [("'segmentation_logits'", categorical), ("Categorical()", categorical)]
    if output and output[-1] > 1:
        found.append(("Categorical(dim=-1)", "f.logsumexp(-1).sum()"))
    return tuple(found)
