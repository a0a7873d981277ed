"""Arguments that make no sense are refused in one sentence, by every matrix, map, kernel and vector."""

import copy
import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

from nngeometry import (
    FIM,
    EmpiricalFisher,
    FMatDense,
    FMatImplicit,
    FMatMemmap,
    FVector,
    GradientCovariance,
    GramMatrix,
    Hessian,
    Influence,
    Jacobian,
    LayerCollection,
    PFMapDense,
    PFMapFactored,
    PFMapImplicit,
    PMat,
    PMatBlockDiag,
    PMatDense,
    PMatDiag,
    PMatEKFAC,
    PMatImplicit,
    PMatKFAC,
    PMatLowRank,
    PMatQuasiDiag,
    PVector,
    Relative,
    linalg,
)
from nngeometry.object import kernel_storage

MATRICES = [PMatDense, PMatBlockDiag, PMatDiag, PMatQuasiDiag, PMatKFAC, PMatEKFAC, PMatLowRank, PMatImplicit]


def problem(n=5):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    return model, torch.randn(n, 3), torch.randint(2, (n,))


def one_sentence(error):
    text = str(error.value)
    assert "\n" not in text, text
    assert len(text) > 20, text


@pytest.fixture(params=MATRICES, ids=lambda r: r.__name__)
def F(request):
    model, x, _ = problem()
    return FIM(model, (x,), request.param)


@pytest.mark.parametrize("k", [-1, -5, 27, 1.5, "all", True, torch.ones(2)])
def test_numbers_of_eigenpairs(F, k):
    sums = [F, F + F, F - FIM(*_diag()), F.block("0")]
    for M in sums:
        with pytest.raises((ValueError, TypeError)) as error:
            M.eig(k)
        one_sentence(error)
    K = GramMatrix(problem()[0], (problem()[1],))
    for kernel in (K, 2 * K, K.submatrix([0, 1])):
        with pytest.raises((ValueError, TypeError)) as error:
            kernel.eig(k)
        one_sentence(error)


def _diag():
    model, x, _ = problem()
    return model, (x,), PMatDiag


REGULS = ["a lot", None, float("nan"), float("inf"), 1j, torch.ones(2), [1.0], Relative, Relative("x")]
REGULS += [Relative(float("nan")), {"0": 1.0}, {"0": 1.0, "2": "x"}, {0: 1.0}]


@pytest.mark.parametrize("bad", REGULS)
def test_regul(F, bad):
    v = PVector(F.layer_collection, torch.ones(26))
    for call in (lambda: F.solve(v, bad), lambda: F.inv(bad), lambda: F.logdet(bad)):
        with pytest.raises((ValueError, TypeError), match="regul") as error:
            call()
        one_sentence(error)
    if not isinstance(bad, dict):
        K = GramMatrix(problem()[0], (problem()[1],))
        with pytest.raises((ValueError, TypeError), match="regul"):
            K.solve(FVector(torch.ones(2, 5)), bad)


def test_a_negative_shift_of_an_indefinite_matrix_is_fine():
    model, x, y = problem()
    H = Hessian(model, (x, y), PMatDense)
    v = torch.ones(26)
    expected = torch.linalg.solve(H.to_torch() - 0.37 * torch.eye(26), v)
    torch.testing.assert_close(H.solve(PVector(H.layer_collection, v), -0.37).to_torch(), expected)


def test_other_arguments_of_matrices(F):
    lc = F.layer_collection
    v = PVector(lc, torch.ones(26))
    other = PVector(lc.select("0"), torch.ones(16))
    for call in (
        lambda: F.mv(torch.ones(26)),
        lambda: F.mv(None),
        lambda: F.mv(FVector(torch.ones(2, 13))),
        lambda: F.mv(other),
        lambda: F.mv(v.to(dtype=torch.float32)),
        lambda: F.vTMv(v, per_layer="0"),
        lambda: F.mapTMmap(PFMapDense(lc, torch.ones(1, 1, 26)), reduction="mean"),
        lambda: F.solve(torch.ones(26)),
        lambda: F.solve(v, 1.0, rtol="x"),
        lambda: F.solve(v, 1.0, rtol=-1.0),
        lambda: F.solve(v, 1.0, preconditioner=lambda v: v),
        lambda: F.solve(v, 1.0, preconditioner=F.block("0")),
        lambda: F.pinv("x"),
        lambda: F.pinv(-1.0),
        lambda: F.pow("x"),
        lambda: F.pow(None),
        lambda: F.pow(float("nan")),
        lambda: F.pow(float("inf")),
        lambda: F.pow(2j),
        lambda: F.pow(torch.ones(2)),
        lambda: F.norm(3),
        lambda: F.norm("max"),
        lambda: F.norm([2]),
        lambda: F.norm(float("inf")),
        lambda: F.trace(per_layer="0"),
        lambda: F.trace(estimator=7),
        lambda: F.trace(per_layer=True, estimator=linalg.hutchinson),
        lambda: F.get_diag(estimator="xdiag"),
        lambda: F.sample(generator=0),
        lambda: F.sample(generator="cpu"),
        lambda: F.block("1"),
        lambda: F.block(0),
        lambda: F + 1,
        lambda: F @ F.block("0"),
        lambda: F + F.block("0"),
        lambda: F * torch.ones(3),
        lambda: F * "x",
    ):
        with pytest.raises((ValueError, TypeError, KeyError)) as error:
            call()
        one_sentence(error)


@pytest.mark.parametrize("representation", [PFMapDense, PFMapFactored, PFMapImplicit])
def test_arguments_of_maps(representation):
    model, x, _ = problem()
    J = Jacobian(model, (x,), representation=representation)
    lc = J.layer_collection
    half = Jacobian(copy.deepcopy(model).float(), (x.float(),), representation=representation)
    for call in (
        lambda: J.jvp(torch.ones(26)),
        lambda: J.jvp(FVector(torch.ones(2, 13))),
        lambda: J @ PVector(lc.select("0"), torch.ones(16)),
        lambda: J @ PVector(lc, torch.ones(26, dtype=torch.float32)),
        lambda: J.vjp(torch.ones(2, 5)),
        lambda: J.vjp(PVector(lc, torch.ones(26))),
        lambda: J.T @ FVector(torch.ones(5, 2)),
        lambda: J.T @ FVector(torch.ones(2, 5, dtype=torch.float32)),
        lambda: J[7],
        lambda: J[[0, 9]],
        lambda: J["0"],
        lambda: J[torch.ones(3, dtype=torch.bool)],
        lambda: J.layer("1"),
        lambda: J.layer(0),
        lambda: J + J[:2],
        lambda: J - J[:1],
        lambda: J + half,
        lambda: J @ half.T,
        lambda: J @ FIM(copy.deepcopy(model).float(), (x.float(),), PMatDiag),
        lambda: FIM(model, (x,), PMatDiag) @ half,
    ):
        with pytest.raises((ValueError, TypeError, KeyError, IndexError)) as error:
            call()
        one_sentence(error)


@pytest.mark.parametrize("output", ["full", "diag", "trace"])
@pytest.mark.parametrize("representation", [FMatDense, FMatImplicit, "memmap"])
def test_arguments_of_kernels(representation, output, tmp_path):
    model, x, _ = problem()
    if representation == "memmap":
        representation = FMatMemmap.at(tmp_path / "k")
    K = GramMatrix(model, (x,), representation=representation, output=output)
    cross = GramMatrix(model, (torch.randn(3, 3),), (x,), output=output)
    u = FVector(torch.ones(2, 5))
    calls = [
        lambda u: K.mv(u),
        lambda u: K.vTMv(u),
        lambda u: K.solve(u, 1.0),
        lambda u: K.regress(u, regul=1.0),
        lambda u: K.regress(u, cross, regul=1.0),
        lambda u: K.regress(u, time=0.1),
        lambda u: K.align(u),
        lambda u: K.cka(u),
    ]
    wrong = [torch.ones(2, 5), None, PVector(LayerCollection.from_model(model), torch.ones(26))]
    wrong += [FVector(torch.ones(5, 2)), FVector(torch.ones(2, 4)), FVector(torch.ones(2, 5, dtype=torch.float32))]
    wrong += [] if output == "trace" else [FVector(torch.ones(4, 5)), FVector(torch.ones(1, 5))]
    for call in calls:
        for bad in wrong:
            with pytest.raises((ValueError, TypeError)) as error:
                call(bad)
            one_sentence(error)
    for call in calls[:6]:
        call(u)
    for call in (
        lambda: K.regress(u, cross.T, regul=1.0),
        lambda: K.regress(u, cross.to_torch(), regul=1.0),
        lambda: K.regress(u, GramMatrix(model, (x,), (x[:2],), output=output), regul=1.0),
        lambda: K.regress(u, regul=1.0, start=FVector(torch.ones(5, 2))),
        lambda: K.regress(u, regul=1.0, start=u, cross_start=u),
        lambda: K.regress(u, cross, regul=1.0, start=u, cross_start=u),
        lambda: K.regress(u, time=-1.0),
        lambda: K.regress(u, time="long"),
        lambda: K.solve(cross, 1.0),
        lambda: K.solve(u, 1.0, rtol=float("nan")),
        lambda: K.align(torch.zeros(4, dtype=torch.int64)),
        lambda: K.align(torch.zeros(5)),
        lambda: K.align(torch.full((5,), -1)),
        lambda: K.submatrix([0, 7]),
        lambda: K.submatrix("a"),
        lambda: K.norm("max"),
        lambda: cross.norm(["fro"]),
        lambda: K + cross,
        lambda: K @ cross,
    ):
        with pytest.raises((ValueError, TypeError, IndexError)) as error:
            call()
        one_sentence(error)
    if output != "trace":
        with pytest.raises(ValueError, match="outputs and examples"):
            K.align(torch.tensor([0, 1, 2, 3, 1]))  # four classes, two outputs


# Functions of singular matrices


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("make", ["fim", "covariance", "block", "sum", "centred hessian"])
@pytest.mark.parametrize("exponent", [-1, -0.5, -2, -1.5])
def test_powers_of_a_singular_matrix_by_products(exponent, make, dtype):
    model, x, y = problem(3)
    model, x = model.to(dtype), x.to(dtype)
    F = {
        "fim": lambda: FIM(model, (x,), PMatImplicit),
        "covariance": lambda: GradientCovariance(model, (x, y), PMatImplicit),
        "block": lambda: FIM(model, (x,), PMatImplicit).block("0"),
        "sum": lambda: FIM(model, (x,), PMatImplicit) + EmpiricalFisher(model, (x, y), PMatImplicit),
        "centred hessian": lambda: -1.0 * FIM(model, (x,), PMatImplicit),
    }[make]()
    v = PVector(F.layer_collection, torch.randn(F.size(0), dtype=dtype))
    with pytest.raises(ValueError, match="singular to working precision"):
        F.pow(exponent) @ v


@pytest.mark.parametrize("exponent", [-1, -0.5, -2, 0.5, 0, 1, 3])
def test_powers_of_a_regular_matrix_by_products(exponent):
    model, x, _ = problem(40)
    F = FIM(model, (x,), PMatImplicit, "regression") + 0.1 * FIM(model, (x,), PMatDense, "regression").pow(0)
    M = F.to_torch()
    v = torch.randn(26)
    l, Q = torch.linalg.eigh(M)
    expected = (Q * l**exponent) @ (Q.T @ v)
    torch.testing.assert_close(F.pow(exponent).mv(PVector(F.layer_collection, v)).to_torch(), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_roots_of_a_singular_matrix_and_of_an_indefinite_one(dtype):
    model, x, y = problem(3)
    model, x = model.to(dtype), x.to(dtype)
    F = FIM(model, (x,), PMatImplicit)
    v = PVector(F.layer_collection, torch.randn(26, dtype=dtype))
    twice = F.pow(0.5) @ (F.pow(0.5) @ v)
    torch.testing.assert_close(twice.to_torch(), (F @ v).to_torch(), rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="not positive"):
        Hessian(model, (x, y), PMatImplicit).pow(0.5) @ v


def test_logdet_of_a_singular_matrix_by_quadrature():
    M = torch.diag(torch.cat([torch.linspace(1, 2, 37), torch.zeros(3)]))
    for probes, steps in ((100, 5), (4, 40)):
        found = linalg.slq(lambda v: v @ M, 40, probes=probes, steps=steps, like=torch.empty(0))
        with pytest.raises(ValueError, match="not positive definite"):
            found.logdet()
        assert float(found.logdet(1.0).value) > 0


# What cannot be pickled, and files


def test_what_is_known_by_products_says_that_it_cannot_be_pickled():
    model, x, y = problem()
    F = FIM(model, (x,), PMatImplicit)
    v = PVector(F.layer_collection, torch.ones(26))
    for M in (F, GradientCovariance(model, (x, y), PMatImplicit), Hessian(model, (x, y), PMatImplicit), F.inv(1.0),
              F.pinv(), F.pow(2), F + FIM(model, (x,), PMatDiag), 2 * F, F.block("0"), F @ F):  # fmt: skip
        with pytest.raises(TypeError, match="cannot be pickled"):
            pickle.dumps(M)
        if M.size(0) == 26:
            before = M @ v
            torch.testing.assert_close((copy.deepcopy(M) @ v).to_torch(), before.to_torch())
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(GramMatrix(model, (x,), representation=FMatImplicit))
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(Jacobian(model, (x,), representation=PFMapImplicit))


def test_what_holds_its_entries_is_pickled(tmp_path):
    model, x, _ = problem()
    for J in (Jacobian(model, (x,)), Jacobian(model, (x,), representation=PFMapFactored)):
        torch.testing.assert_close(pickle.loads(pickle.dumps(J)).to_dense().to_torch(), J.to_dense().to_torch())
    for K in (GramMatrix(model, (x,)), GramMatrix(model, (x,), representation=FMatMemmap.at(tmp_path / "k"))):
        again = pickle.loads(pickle.dumps(K))
        assert torch.equal(again.to_torch(), K.to_torch())
        assert torch.equal(again.trace(), K.trace())


@pytest.fixture
def saved(tmp_path):
    model, x, _ = problem()
    F = FIM(model, (x,), PMatEKFAC)
    F.save(tmp_path / "F.pt")
    assert torch.equal(PMat.load(tmp_path / "F.pt").to_torch(), F.to_torch())
    return tmp_path / "F.pt"


def changed(saved, fn):
    held = torch.load(saved, weights_only=True)
    fn(held)
    torch.save(held, saved)


FOREIGN = {
    "half": lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]),
    "nearly": lambda p: p.write_bytes(p.read_bytes()[:-9]),
    "empty": lambda p: p.write_bytes(b""),
    "text": lambda p: p.write_text("a, b\n1, 2\n"),
    "state": lambda p: torch.save(nn.Linear(2, 2).state_dict(), p),
    "module": lambda p: torch.save(nn.Linear(2, 2), p),
    "pickle": lambda p: p.write_bytes(pickle.dumps({"a": 1}, protocol=2)),
    "tensor": lambda p: torch.save(torch.ones(2), p),
    "newer": lambda p: changed(p, lambda d: d.update(format=2)),
    "no class": lambda p: changed(p, lambda d: d.pop("class")),
    "no layers": lambda p: changed(p, lambda d: d.pop("layers")),
    "no root": lambda p: changed(p, lambda d: d.pop("root")),
    "no packing": lambda p: changed(p, lambda d: d["layers"][0].pop("packing")),
    "other packing": lambda p: changed(p, lambda d: d["layers"][0].update(packing=[[1, 2, 2], None, [0], True])),
    "no block": lambda p: changed(p, lambda d: d["root"]["parts"].pop()),
    "unknown block": lambda p: changed(p, lambda d: d["root"]["parts"][0]["block"].update(block="Tree")),
    "other shape": lambda p: changed(p, lambda d: d["root"]["parts"][0]["block"].update(l=torch.ones(2, 2))),
    "other dtype": lambda p: changed(p, lambda d: d["root"]["parts"][0]["block"].update(l=torch.ones(1, 4, 4).half())),
    "twice": lambda p: changed(p, lambda d: d["root"]["parts"][1].update(slices=[[0, 10]])),
    "no tensor": lambda p: changed(p, lambda d: d["root"]["parts"][0]["block"].update(l=[1.0])),
}


@pytest.mark.parametrize("how", FOREIGN)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_files_that_are_not_matrices(saved, how):
    FOREIGN[how](saved)
    with pytest.raises(ValueError, match=r"PMat\.load") as error:
        PMat.load(saved)
    one_sentence(error)
    assert str(saved) in str(error.value)


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        PMat.load(tmp_path / "nothing.pt")
    with pytest.raises(IsADirectoryError, match=tmp_path.name):
        PMat.load(tmp_path)


# Kernels on disk


class Scaled(nn.Module):
    """Of the same parameters as what it wraps, and of other outputs."""

    def __init__(self, model, factor):
        super().__init__()
        self.model, self.factor = model, factor

    def forward(self, x):
        return self.factor * self.model(x)


def kernels():
    """Pairs of kernels that differ, with what differs."""
    model, x, _ = problem()
    lc = LayerCollection.from_model(model)
    relu = nn.Sequential(model[0], nn.ReLU(), model[2])
    inverse = FIM(model, (x,), PMatImplicit)
    other = FIM(model, (torch.randn(5, 3),), PMatImplicit)
    held, late = FIM(model, (x,), PMatKFAC), x.clone()
    late[-1, -1] += 1e-3
    moved = copy.deepcopy(model)
    moved[0].bias.data[0] += 1e-6
    plain = {"model": model, "loader": (x,)}
    stopped = lambda x: model(x).detach()  # noqa: E731
    return {
        "layers": (plain, dict(plain, layer_collection=lc.select("0"))),
        "activation": (plain, dict(plain, model=relu)),
        "function": (plain, dict(plain, function=lambda x: model(x) ** 2)),
        "factor in a module": (dict(plain, model=Scaled(model, 1.0)), dict(plain, model=Scaled(model, 1.0 + 1e-6))),
        "gradient alone": (plain, dict(plain, function=lambda x: 2 * model(x) - stopped(x))),
        "parameters": (plain, dict(plain, model=moved)),
        "data": (plain, dict(plain, loader=(late,))),
        "output": (plain, dict(plain, output="diag")),
        "sum or trace": (dict(plain, output="sum"), dict(plain, output="trace")),
        "mean or trace": (dict(plain, output="mean_trace"), dict(plain, output="trace")),
        "per layer": (plain, dict(plain, per_layer=True)),
        "no metric": (dict(plain, metric=held), plain),
        "regul": (dict(plain, metric=held.inv(1.0)), dict(plain, metric=held.inv(1.0 + 1e-6))),
        "structure": (dict(plain, metric=held), dict(plain, metric=FIM(model, (x,), PMatDiag))),
        "regul of products": (dict(plain, metric=inverse.inv(1.0)), dict(plain, metric=inverse.inv(1.001))),
        "data of products": (dict(plain, metric=inverse), dict(plain, metric=other)),
        "exponent": (dict(plain, metric=inverse.pow(2)), dict(plain, metric=inverse.pow(3))),
        "sign": (dict(plain, metric=inverse), dict(plain, metric=-1.0 * inverse)),
        "other side": (dict(plain, loader2=(x[:3],)), dict(plain, loader2=(late[2:],))),
        "other function": (dict(plain, function2=lambda x: model(x)), dict(plain, function2=lambda x: model(2 * x))),
        "other model": (dict(plain, model2=moved), dict(plain, model2=copy.deepcopy(relu))),
    }  # fmt: skip


@pytest.mark.parametrize("what", kernels())
def test_a_folder_of_another_kernel_is_refused(what, tmp_path):
    one, two = kernels()[what]
    at = FMatMemmap.at(tmp_path / "k")
    first = GramMatrix(**one, representation=at)
    again = GramMatrix(**one, representation=at)  # the same is taken up again
    if isinstance(first, dict):
        first, again = first["0"], again["0"]
    assert torch.equal(first.to_torch(), again.to_torch())
    with pytest.raises(ValueError, match="holds the kernel of another model, data, output or metric") as error:
        GramMatrix(**two, representation=at)
    one_sentence(error)


@pytest.mark.parametrize("name", ["model", "metric"])
def test_rounding_does_not_make_it_another_kernel(name, tmp_path):
    model, x, _ = problem()
    noisy = lambda x: model(x) * (1 + 1e-13)  # noqa: E731
    F = FIM(model, (x,), PMatDense)
    near = F + 1e-13 * F
    at = FMatMemmap.at(tmp_path / "k")
    K = GramMatrix(model, (x,), metric=F, representation=at)
    options = {"function": noisy, "metric": F} if name == "model" else {"metric": near}
    assert torch.equal(GramMatrix(model, (x,), representation=at, **options).to_torch(), K.to_torch())


def test_damaged_folders(tmp_path):
    model, x, _ = problem()
    folder = tmp_path / "k"
    expected = GramMatrix(model, (x,)).to_torch()

    def make():
        return GramMatrix(model, [(x[:2],), (x[2:],)], representation=FMatMemmap.at(folder))

    def refused(match):
        with pytest.raises(ValueError, match=match) as error:
            make()
        one_sentence(error)
        assert str(tmp_path) in str(error.value)

    torch.testing.assert_close(make().to_torch(), expected)
    entries, log = (folder / "0.npy").read_bytes(), (folder / "tiles.json").read_text()
    (folder / "0.npy").unlink()
    refused("is missing")
    for content in (entries[:-8], entries[:60], b"", b"text", entries.replace(b"10, 10", b"5, 20 ")):
        (folder / "0.npy").write_bytes(content)
        refused("cut short|another array")
    (folder / "0.npy").write_bytes(entries)
    torch.testing.assert_close(make().to_torch(), expected)
    for content in ("x", "x\n", "{}\n[0, 2, 0, 2]\n", log + "[0, 9, 0, 2]\n", log + "[0]\n", log + "nonsense\n"):
        (folder / "tiles.json").write_text(content)
        refused("damaged|another model")
    (folder / "tiles.json").write_text(log[:-5])  # killed in the middle of a line: that tile is made again
    torch.testing.assert_close(make().to_torch(), expected)
    assert (folder / "tiles.json").read_text() == log
    (folder / "tiles.json").unlink()
    refused("no kernel was written to")
    refused("no kernel was written to")
    (folder / "0.npy").unlink()
    torch.testing.assert_close(make().to_torch(), expected)
    K = make()
    (folder / "0.npy").write_bytes(entries[:-8])
    with pytest.raises(ValueError, match="cut short"):
        K @ FVector(torch.ones(2, 5))
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file, not a folder"):
        GramMatrix(model, (x,), representation=FMatMemmap.at(tmp_path / "file"))


def test_a_full_disk(tmp_path, monkeypatch):
    model, x, _ = problem()
    at = FMatMemmap.at(tmp_path / "k")
    real = kernel_storage.shutil.disk_usage
    monkeypatch.setattr(kernel_storage.shutil, "disk_usage", lambda path: real(path)._replace(free=799))
    with pytest.raises(OSError, match=r"takes 800 bytes .* where 799 are free") as error:
        GramMatrix(model, (x,), representation=at)
    one_sentence(error)
    monkeypatch.undo()

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kernel_storage.os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        GramMatrix(model, (x,), representation=at)
    assert [p.name for p in (tmp_path / "k").iterdir()] == ["tiles.json"]
    monkeypatch.delattr(kernel_storage.os, "posix_fallocate")  # a system that has none
    K = GramMatrix(model, (x,), representation=at)
    torch.testing.assert_close(K.to_torch(), GramMatrix(model, (x,)).to_torch())
    assert (tmp_path / "k" / "0.npy").stat().st_blocks > 0
    assert json.loads((tmp_path / "k" / "tiles.json").read_text().splitlines()[1]) == [0, 5, 0, 5]


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="needs a limit that the system keeps")
def test_a_limit_on_files(tmp_path):
    program = f"""
import resource, torch
from nngeometry import FMatMemmap, GramMatrix
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
model = torch.nn.Linear(3, 2)
try:
    GramMatrix(model, (torch.randn(90, 3),), representation=FMatMemmap.at({str(tmp_path / "k")!r}))
except OSError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "FMatMemmap: the kernel takes" in done.stdout, done.stderr


# Influence


class Token(nn.Module):
    """Parameters beside children."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 3))
        self.scale = nn.Parameter(torch.randn(3))
        self.fc = nn.Linear(3, 3)
        self.norm = nn.LayerNorm(3)
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        return self.head(self.norm(self.scale * torch.tanh(self.fc(x)))).mean(1)


@pytest.mark.parametrize("representation", MATRICES)
def test_influence_of_parameters_beside_children(representation):
    torch.manual_seed(0)
    model, x, y = Token().eval(), torch.randn(6, 2, 3), torch.randint(2, (6,))
    F = EmpiricalFisher(model, (x, y), representation)
    g = []
    for a, b in zip(x, y, strict=True):
        loss = nn.functional.cross_entropy(model(a.unsqueeze(0)), b.unsqueeze(0))
        params = LayerCollection.from_model(model).parameters(model)
        g.append(torch.cat([t.flatten() for t in torch.autograd.grad(loss, params)]))
    g = torch.stack(g)
    M = torch.stack([(F @ PVector(F.layer_collection, row)).to_torch() for row in torch.eye(F.size(0))])
    expected = g @ torch.linalg.solve(M + torch.eye(len(M)), g.T)
    influence = Influence(model, F, regul=1.0)
    loader = [(x[:4], y[:4]), (x[4:], y[4:])]
    torch.testing.assert_close(influence.scores((x, y), loader), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(influence.self_scores(loader), expected.diagonal(), rtol=1e-4, atol=1e-6)
    assert torch.is_grad_enabled()


def test_an_error_in_the_middle_leaves_autograd_on():
    model, x, y = problem()
    influence = Influence(model, FIM(model, (x,), PMatKFAC))

    def loader():
        yield x, y
        raise KeyboardInterrupt

    for call in (lambda: influence.scores((x, y), loader()), lambda: influence.self_scores(loader()),
                 lambda: influence.top((x, y), loader(), 1), lambda: Jacobian(model, loader())):  # fmt: skip
        with pytest.raises(KeyboardInterrupt):
            call()
        assert torch.is_grad_enabled()
