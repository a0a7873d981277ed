"""Weights that are used without a call of their layer: every use is recorded, and adds to the layer's own form."""

import oracle
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nngeometry import (
    FIM,
    Accumulator,
    EmpiricalFisher,
    LayerCollection,
    PMatBlockDiag,
    PMatDense,
    PMatDiag,
    PMatEKFAC,
    PMatKFAC,
)

D, T = 3, 2


class Using(nn.Module):
    """A child that is never called, by a function of it."""

    def __init__(self, child, use):
        super().__init__()
        self.child, self.use = child, use

    def forward(self, x):
        return self.use(self.child, x)


def _parts(m, x):
    q, k, v = (F.linear(x, w, b) for w, b in zip(m.weight.chunk(3), m.bias.chunk(3), strict=True))
    return q * k.tanh() + v


def _some_columns(m, x):
    return F.linear(x[..., :1], m.weight[:, :1]) + F.linear(x[..., 1:], m.weight[:, 1:], m.bias)


def _two_layers(m, x):
    return F.linear(F.linear(x, m[0].weight, m[1].bias).tanh(), m[1].weight, m[0].bias)


def _views(m, x):
    w = m.weight[:4].view(2, 2, D)[1]
    return F.linear(x, w, m.bias[2:4]) * F.linear(x, m.weight[4:5])


def _without_some(m, x):
    bias = m.bias.clone()
    bias[1:3].zero_()
    return F.linear(x, m.weight, bias)


def _every_second(m, x):
    even, odd = (F.linear(x, m.weight[k::2], m.bias[k::2]) for k in range(2))
    return even * odd + x[..., ::2] @ m.weight[::2, ::2].T


USES = {
    "linear": (lambda: nn.Linear(D, 4), lambda m, x: F.linear(x, m.weight, m.bias)),
    "no bias": (lambda: nn.Linear(D, 4), lambda m, x: F.linear(x, m.weight)),
    "named": (lambda: nn.Linear(D, 4), lambda m, x: F.linear(input=x, weight=m.weight, bias=m.bias)),
    "matmul": (lambda: nn.Linear(D, 4), lambda m, x: x @ m.weight.T + m.bias),
    "bias first": (lambda: nn.Linear(D, 4), lambda m, x: m.bias + torch.matmul(x, m.weight.mT)),
    "from the left": (lambda: nn.Linear(D, 4), lambda m, x: (m.weight @ x.mT).mT),
    "from the left, bias": (lambda: nn.Linear(D, 4), lambda m, x: (m.weight @ x.mT + m.bias[:, None]).mT),
    "the other way": (lambda: nn.Linear(4, D), lambda m, x: x @ m.weight),
    "both ways": (lambda: nn.Linear(4, D, bias=False), lambda m, x: F.linear((x @ m.weight).tanh(), m.weight)),
    "addmm": (lambda: nn.Linear(D, 4), lambda m, x: torch.addmm(m.bias, x[:, 0], m.weight.t())),
    "addmm, scaled": (
        lambda: nn.Linear(D, 4),
        lambda m, x: torch.addmm(m.bias, x[:, 0], m.weight.t(), beta=0.3, alpha=2.0),
    ),
    "addmm, to others": (lambda: nn.Linear(D, D), lambda m, x: x[:, 0].addmm(x[:, 1], m.weight, alpha=2.0)),
    "every second": (lambda: nn.Linear(D, 6), _every_second),
    "times a number": (lambda: nn.Linear(D, 4), lambda m, x: F.linear(x, 0.3 * m.weight, 2 * m.bias)),
    "table, times a number": (lambda: nn.Embedding(5, 4), lambda m, x: F.embedding(_ids(x), 2 * m.weight)),
    "convolution, times a number": (lambda: nn.Conv1d(T, 4, 2), lambda m, x: F.conv1d(x, m.weight * 2, m.bias)),
    "of a function": (lambda: nn.Linear(D, 4), lambda m, x: F.linear(x, F.softplus(m.weight), m.bias).relu_()),
    "table, of a function": (lambda: nn.Embedding(5, 4), lambda m, x: F.embedding(_ids(x), m.weight.exp())),
    "norm": (lambda: nn.LayerNorm(D), lambda m, x: F.layer_norm(x, (D,)) * (1 + m.weight) + m.bias),
    "einsum": (lambda: nn.Linear(D, 4), lambda m, x: torch.einsum("bti,oi->bto", x, m.weight)),
    "einsum, moved": (
        lambda: nn.Linear(D, 4),
        lambda m, x: torch.einsum("oi,...ti->o...t", m.weight, x).movedim(0, -1),
    ),
    "parts": (lambda: nn.Linear(D, 6), _parts),
    "some columns": (lambda: nn.Linear(D, 4), _some_columns),
    "views": (lambda: nn.Linear(D, 6), _views),
    "called too": (lambda: nn.Linear(D, D), lambda m, x: F.linear(m(x).tanh(), m.weight, m.bias)),
    "two layers": (lambda: nn.Sequential(nn.Linear(D, D), nn.Linear(D, D)), _two_layers),
    "no axis of examples": (lambda: nn.Linear(D, D), lambda m, x: x * F.linear(torch.ones(T, D), m.weight, m.bias)),
    "convolution": (lambda: nn.Conv1d(T, 4, 2), lambda m, x: F.conv1d(x, m.weight, m.bias, padding=1)),
    "convolution, no bias": (lambda: nn.Conv1d(T, 4, 2), lambda m, x: F.conv1d(x, m.weight)),
    "some of a bias": (lambda: nn.Linear(D, 4), _without_some),
    "a bias times": (lambda: nn.Conv1d(T, 4, 2), lambda m, x: F.conv1d(x, m.weight, 2 * m.bias.exp())),
    "other groups": (lambda: nn.Conv1d(1, 4, 2), lambda m, x: F.conv1d(x, m.weight, m.bias, groups=T)),
    "same": (lambda: nn.Conv1d(T, 4, 2), lambda m, x: F.conv1d(x, m.weight, m.bias, padding="same", dilation=2)),
    "other views": (
        lambda: nn.Conv1d(T, T, 2, groups=T),
        lambda m, x: F.conv1d(x, m.weight.squeeze(1).unsqueeze(1), m.bias, padding=1, groups=T),
    ),
    "a matrix as a convolution": (lambda: nn.Linear(T, 4), lambda m, x: F.conv1d(x, m.weight[..., None], m.bias)),
    "a convolution as a matrix": (lambda: nn.Conv1d(D, 4, 1), lambda m, x: F.linear(x, m.weight.squeeze(-1), m.bias)),
    "table": (lambda: nn.Embedding(5, 4), lambda m, x: F.embedding(_ids(x), m.weight)),
    "table, padding": (lambda: nn.Embedding(5, 4), lambda m, x: F.embedding(_ids(x), m.weight, padding_idx=-4)),
    "indexed": (lambda: nn.Embedding(5, 4), lambda m, x: m.weight[_ids(x)] * m.weight[_ids(x) - 2]),
    "tied head": (lambda: nn.Embedding(5, D), lambda m, x: F.linear((m(_ids(x)) * x).tanh(), m.weight)),
    "tied table": (lambda: nn.Linear(D, 5), lambda m, x: m((F.embedding(_ids(x), m.weight) * x).tanh())),
}
#: Those with Kronecker factors.
KRONECKER = USES.keys() - {"the other way", "both ways", "other groups", "tied head", "tied table", "of a function"}
KRONECKER = sorted(KRONECKER - {"table, of a function", "addmm, to others"})


def _ids(x):
    return (x.detach().abs() * 10).long()[..., 0] % 5


def net(name):
    child, use = USES[name]
    model = nn.Sequential(nn.Linear(2, D), Using(child(), use), nn.Flatten(), nn.LazyLinear(2))
    torch.manual_seed(0)
    batch = (torch.randn(4, T, 2), torch.tensor([0, 1, 1, 0]))
    model(batch[0])
    return oracle.randomise(model), batch


@pytest.mark.parametrize("name", USES)
def test_exact_representations(name):
    model, batch = net(name)
    M = oracle.fim(model, [batch], "classif_logits")
    lc = LayerCollection.from_model(model)
    assert oracle.relative(FIM(model, batch, PMatDense).to_torch(), M) < 1e-10
    assert oracle.relative(FIM(model, batch, PMatDiag).get_diag(), M.diag()) < 1e-10
    assert oracle.relative(FIM(model, batch, PMatBlockDiag).to_torch(), oracle.blockdiag(M, lc)) < 1e-10


@pytest.mark.parametrize("name", KRONECKER)
def test_those_of_kronecker_products(name):
    model, batch = net(name)
    M = oracle.fim(model, [batch], "classif_logits")
    ekfac = FIM(model, batch, PMatEKFAC)
    assert abs(ekfac.trace() - M.trace()) < 1e-10 * M.trace()


@pytest.mark.parametrize("function", ["linear", "matmul", "einsum"])
def test_kfac_is_that_of_the_layer(function):
    """The same as that of a module that is called."""
    child, use = USES[function]
    if function != "linear":
        child = lambda: nn.Linear(D, 4, bias=False)  # noqa: E731
        use = {"matmul": lambda m, x: x @ m.weight.T, "einsum": use}[function]
    called, batch = net("linear")
    called = oracle.randomise(nn.Sequential(called[0], child(), *called[2:]))
    model = nn.Sequential(called[0], Using(called[1], use), *called[2:])
    for representation in (PMatKFAC, PMatEKFAC):
        K, L = (EmpiricalFisher(m, batch, representation, nn.CrossEntropyLoss()).to_torch() for m in (called, model))
        assert oracle.relative(L, K) < 1e-10


def test_kfac_of_parts():
    """Each part is a use, with the same inputs: a product for each in the rows of the layer."""
    model, batch = net("parts")
    K = EmpiricalFisher(model, batch, PMatKFAC, nn.CrossEntropyLoss())
    x = model[0](batch[0])
    q, k, v = (
        F.linear(x, w, b) for w, b in zip(model[1].child.weight.chunk(3), model[1].child.bias.chunk(3), strict=True)
    )
    loss = F.cross_entropy(model[2:](q * k.tanh() + v), batch[1], reduction="sum")
    grads = torch.autograd.grad(loss, (q, k, v))
    a = F.pad(x.detach().flatten(0, 1), (0, 1), value=1.0)
    G = torch.block_diag(*(g.flatten(0, 1).T @ g.flatten(0, 1) / len(x) for g in grads))
    expected = torch.einsum("og,ij->oigj", G, a.T @ a / len(a))
    W, own = 6 * D, K.layer_collection.slices()["1.child"]
    found = K.to_torch()[own, own]
    flat = expected[:, :D, :, :D].reshape(W, W)
    assert oracle.relative(found[:W, :W], flat) < 1e-10
    assert oracle.relative(found[W:, W:], expected[:, D, :, D]) < 1e-10


def test_weights_in_another_precision():
    """As models of half precision have those of which they compute in single."""
    model, batch = net("linear")
    model[1].use = lambda m, x: F.linear(x.double(), m.weight.double(), m.bias.to(torch.float64)).type_as(x)
    M = oracle.fim(model, [batch], "classif_logits")
    F32, x = FIM(model.float(), (batch[0].float(),), PMatDiag), batch[0].float()
    assert oracle.relative(F32.get_diag().double(), M.diag()) < 1e-5
    model[1].use = lambda m, x: F.linear(x.float(), m.weight.float(), m.bias.to(x.dtype).float()).type_as(x)
    assert oracle.relative(FIM(model.bfloat16(), (x.bfloat16(),), PMatDiag).get_diag().double(), M.diag()) < 0.1


def test_what_is_computed_from_a_weight_is_refused():
    model, batch = net("linear")
    model[1].use = lambda m, x: F.linear(x, m.weight / m.weight.norm(), m.bias)
    with pytest.raises(NotImplementedError, match=r"layer '1.child' .*nngeometry.whole\(Using\)"):
        FIM(model, batch, PMatDiag)


def test_a_function_of_a_weight_has_no_kronecker_factors():
    model, batch = net("of a function")
    with pytest.raises(ValueError, match=r"layer '1.child'.* through a function \(softplus, .*use PMatDiag"):
        FIM(model, batch, PMatKFAC)


def test_what_mixes_entries_of_a_bias_is_refused():
    model, batch = net("linear")
    model[1].use = lambda m, x: F.linear(x, m.weight, m.bias.flip(0))
    with pytest.raises(NotImplementedError, match=r"layer '1.child' .*nngeometry.whole\(Using\)"):
        FIM(model, batch, PMatDiag)


def test_the_model_is_left_alone():
    model, batch = net("parts")
    FIM(model, batch, PMatDiag)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch._C._len_torch_function_stack() == 0


@pytest.mark.parametrize("name", ["parts", "matmul", "from the left", "einsum", "einsum, moved", "tied head"])
def test_in_activation_checkpoints(name):
    model, batch = net(name)
    use = model[1].use
    model[1].use = lambda m, x: checkpoint(use, m, x, use_reentrant=False)
    M = oracle.fim(model, [batch], "classif_logits")
    assert oracle.relative(FIM(model, batch, PMatDiag).get_diag(), M.diag()) < 1e-10


def test_running_estimates():
    model, (x, _) = net("parts")
    running = Accumulator(FIM, model, PMatKFAC).update((x[:2],)).update((x[2:],))
    K = FIM(model, (x,), PMatKFAC).to_torch()
    assert oracle.relative(running.matrix().to_torch(), K) < 1e-10
