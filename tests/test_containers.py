"""Parameters of modules without a form: added, multiplied, given to all examples. What is done with them is seen."""

from __future__ import annotations

from functools import partial

import oracle
import pytest
import torch
from torch import nn

from nngeometry import (
    FIM,
    Accumulator,
    EmpiricalFisher,
    Jacobian,
    LayerCollection,
    PMatDense,
    PMatDiag,
    PMatEKFAC,
    PMatKFAC,
)
from nngeometry.generator import Generator, rowwise
from nngeometry.likelihood import Gaussian

T, D = 3, 4


class Container(nn.Module):
    def __init__(self, use, *shapes, seen=True):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(2, D), nn.Linear(D, D), nn.Linear(D, 3)
        for k, shape in enumerate(shapes):
            self.register_parameter(f"p{k}", nn.Parameter(torch.randn(shape)))
        self.register_buffer("mask", torch.eye(D) + torch.ones(D, D).tril(-1))
        self.use, self.seen = use, seen

    def forward(self, x):
        self.x = x
        h = self.use(self, torch.tanh(self.first(x)))
        return self.head(torch.tanh(self.second(h))).mean(1)


def classes(m, h):
    h = torch.cat([m.p0.expand(len(h), -1, -1), h], 1) + m.p1
    return h * m.p2


def later(m, h):
    return (h.transpose(0, 1) + m.p0).transpose(0, 1)


def experts(m, h):
    """All tokens for each expert, as Llama 4 has them."""
    tokens = h.flatten(0, 1).repeat(2, 1).view(2, -1, D)
    return torch.bmm(torch.bmm(tokens, m.p0).tanh(), mat2=m.p1).sum(0).view_as(h)


def biased(m, h, **scales):
    """The same with biases, by a call or added."""
    tokens = h.flatten(0, 1).repeat(2, 1).view(2, -1, D)
    inner = torch.baddbmm(m.p1, tokens, m.p0, **scales).tanh()
    return ((inner @ m.p0) + m.p2[:, None]).sum(0).view_as(h)


def gemma(m, h):
    """A norm whose scale is one more, and one as torch has it."""
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True)) * (1.0 + m.p0.type_as(h))
    return nn.functional.layer_norm(nn.functional.rms_norm(h, (D,), m.p1.exp()), (D,), m.p2, m.p3)


def mamba(m, h):
    return torch.exp(-torch.exp(m.p0)[None, None] * nn.functional.softplus(h + m.p1)[..., None]).sum(-1)


def mixed(m, h):
    """As RWKV does with the token before."""
    return m.p0 * h + (1 - m.p0) * nn.functional.pad(h, (0, 0, 1, -1))


def in_place(m, h):
    h = h.clone().mul_(m.p0)
    h -= m.p0.exp()
    h[:, 0] *= m.p1
    h /= m.p1.cosh()
    return torch.sub(torch.add(h, m.p1, alpha=0.3), m.p1, alpha=2.0)


def heads(m, h):
    return (h.unflatten(-1, (2, D // 2)).transpose(1, 2) @ m.p0[:, 1:3]).transpose(1, 2).flatten(2)


CASES = {
    "positions": partial(Container, lambda m, h: h + m.p0, (1, T, D)),
    "positions without an axis": partial(Container, lambda m, h: m.p0 + h, (T, D)),
    "some of the positions": partial(Container, lambda m, h: h + m.p0[:, 1 : T + 1], (1, T + 2, D)),
    "one number": partial(Container, lambda m, h: h + m.p0, ()),
    "each position": partial(Container, lambda m, h: h + m.p0, (T, 1)),
    "scale of features": partial(Container, lambda m, h: m.p0 * h, (D,)),
    "scale of positions": partial(Container, lambda m, h: h.mul(m.p0), (1, T, 1)),
    "scale as a number": partial(Container, lambda m, h: h * m.p0, ()),
    "transposed": partial(Container, lambda m, h: h + m.p0.T, (D, T)),
    "in front": partial(Container, lambda m, h: torch.cat([m.p0.expand(h.shape[0], -1, -1), h], 1), (1, 1, D)),
    "a matrix for each expert": partial(Container, experts, (2, D, D), (2, D, D)),
    "a matrix for each head": partial(Container, heads, (2, D, D // 2)),
    "a matrix for each position": partial(
        Container, lambda m, h: (h.transpose(0, 1) @ m.p0).transpose(0, 1), (T, D, D)
    ),
    "as another": partial(Container, lambda m, h: h * h.sin() + m.p0.expand_as(h), (1, T, D)),
    "matrices with biases": partial(Container, biased, (2, D, D), (2, 1, D), (2, D)),
    "scaled matrices with biases": partial(
        Container, partial(biased, alpha=2.0, beta=0.3), (2, D, D), (2, 1, D), (2, D)
    ),
    "as in Gemma": partial(Container, gemma, (D,), (D,), (D,), (D,)),
    "as in Mamba": partial(Container, mamba, (D, 5), (D,)),
    "as in RWKV": partial(Container, mixed, (D,)),
    "softplus": partial(Container, lambda m, h: nn.functional.softplus(m.p0)[:, None] * h, (T,)),
    "temperature": partial(Container, lambda m, h: h / m.p0.exp() + m.p0 / (h + 2), ()),
    "frequencies": partial(Container, lambda m, h: h + torch.sin(m.x[..., :1] * m.p0), (D,)),
    "a mask": partial(Container, lambda m, h: nn.functional.linear(h, m.p0 * m.mask), (D, D)),
    "matrix of a function": partial(Container, lambda m, h: h @ m.p0.exp(), (D, D)),
    "twice": partial(Container, lambda m, h: (h + m.p0) * m.p0.sigmoid() + m.p0, (T, D)),
    "thrice": partial(Container, lambda m, h: ((h + m.p0) * m.p0 + m.p0).sin(), (T, D)),
    "as in a vision transformer": partial(Container, classes, (1, 1, D), (1, T + 1, D), (D,)),
    "not seen": partial(Container, lambda m, h: h + m.p0.softmax(0), (T, D), seen=False),
    "not all seen": partial(Container, lambda m, h: h + m.p0 + m.p1.flip(0), (T, D), (D,), seen=False),
    "in place, of inputs": partial(
        Container, lambda m, h: h + m.x.clone().add_(m.p0).sub_(m.p1).sin().sum(-1, True), (T, 2), (2,)
    ),
    "in place": partial(Container, in_place, (T, D), (D,)),
    "outer": partial(Container, lambda m, h: h + m.p0 * m.p1, (T, 1), (1, D), seen=False),
    "features first": partial(Container, lambda m, h: (h.transpose(0, 1) + m.p0).transpose(0, 1), (T, 1, D)),
}


@pytest.mark.parametrize("name", CASES)
def test_exact(name):
    model = CASES[name]()
    batches = [(torch.randn(4, T, 2),), (torch.randn(1, T, 2),)]
    M = oracle.fim(model, batches, "classif_logits")
    assert oracle.relative(FIM(model, batches, PMatDense).to_torch(), M) < 1e-10
    assert oracle.relative(FIM(model, batches, PMatDiag).get_diag(), M.diagonal()) < 1e-10
    for representation in (PMatKFAC, PMatEKFAC):
        F = FIM(model, batches, representation)
        at = F.layer_collection.slices()[""]
        assert oracle.relative(F.block("").to_torch(), M[at, at]) < 1e-10
    y = torch.randint(3, (4,))
    G = oracle.loss_gradients(model, [(batches[0][0], y)], nn.CrossEntropyLoss(reduction="none"))
    E = EmpiricalFisher(model, (batches[0][0], y), PMatDiag)
    assert oracle.relative(E.get_diag(), G.square().mean(0)) < 1e-10


@pytest.mark.parametrize("name", CASES)
def test_one_example(name):
    """Of which a result may have as many entries as the parameter."""
    model, batch = CASES[name](), (torch.randn(1, T, 2),)
    M = oracle.fim(model, [batch], "classif_logits")
    assert oracle.relative(FIM(model, batch, PMatDiag).get_diag(), M.diagonal()) < 1e-10


@pytest.mark.parametrize("name", CASES)
def test_what_is_seen_needs_no_call_of_the_container(name):
    model = CASES[name]()
    lc = LayerCollection.from_model(model)
    generator = Generator(model, lc, rowwise(lambda f, batch, k: Gaussian().sqrt(f)))
    plan = generator.probe(lc.sites(model), next(generator.minibatches([(torch.randn(4, T, 2),)])))
    assert ("" in plan.opened) == model.seen


@pytest.mark.parametrize("small", [1e-3, 1e-5, 1e-8])
def test_what_is_not_seen_counts_however_small_it_is(small):
    model = Container(lambda m, h: h + m.p0 + small * m.p1.softmax(0), (T, D), (T, D))
    batches = [(torch.randn(4, T, 2),)]
    M = oracle.fim(model, batches, "classif_logits").diagonal()
    of_p1 = slice(T * D, 2 * T * D)
    d = FIM(model.float(), [(batches[0][0].float(),)], PMatDiag).get_diag().to(M.dtype)
    assert oracle.relative(d[of_p1], M[of_p1]) < 1e-3


def test_another_use_is_noticed():
    model = CASES["positions"]()
    batches = [(torch.randn(4, T, 2),), (torch.randn(4, T, 2),)]
    running = Accumulator(FIM, model, PMatDense).update(batches[0])
    before = model.use
    model.use = lambda m, h: h * m.p0
    try:
        running.update(batches[1])
        M = oracle.fim(model, batches[1:], "classif_logits")
    finally:
        model.use = before
    M = (M + oracle.fim(model, batches[:1], "classif_logits")) / 2
    assert oracle.relative(running.matrix().to_torch(), M) < 1e-10


class Norm(nn.Module):
    """As Hugging Face writes it."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(D) + 0.5), nn.Parameter(torch.randn(D))

    def forward(self, h):
        return self.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)) + self.bias


class Router(nn.Module):
    """A weight, and no layer of torch's."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D, D))

    def forward(self, h):
        return h * torch.nn.functional.linear(h, self.weight).softmax(-1)


class Odd(nn.Module):
    """A use that is not among those that are known."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(D))

    def forward(self, h):
        return h * self.weight.softmax(0)


@pytest.mark.parametrize("parts", [[Norm], [Router], [Odd], [Norm, Odd, Router, Norm]])
def test_own_modules_are_seen_by_what_is_done_with_their_parameters(parts):
    torch.manual_seed(0)
    between = [part() for part in parts]
    model = nn.Sequential(nn.Linear(2, D), *between, nn.Tanh(), nn.Linear(D, 3))
    batch = (torch.randn(5, 2),)
    lc = LayerCollection.from_model(model)
    generator = Generator(model, lc, rowwise(lambda f, batch, k: Gaussian().sqrt(f)))
    plan = generator.probe(lc.sites(model), next(generator.minibatches([batch])))
    assert plan.opened == {str(k) for k, m in enumerate(between, 1) if not isinstance(m, Odd)}
    M = oracle.fim(model, [batch], "classif_logits")
    assert oracle.relative(FIM(model, batch, PMatDense).to_torch(), M) < 1e-10
    assert oracle.relative(FIM(model, batch, PMatDiag).get_diag(), M.diagonal()) < 1e-10


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("use_cache", [False, True])
def test_recurrent_gemma(use_cache):
    """Gates by baddbmm and softplus, and a state that it keeps from one call to the next, which no call reads. Its
    recurrence is in single precision.
    """
    transformers = pytest.importorskip("transformers")
    config = transformers.RecurrentGemmaConfig(
        vocab_size=7,
        hidden_size=4,
        intermediate_size=3,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=2,
        lru_width=4,
        attention_window_size=8,
        block_types=["recurrent", "attention"],
    )
    model = oracle.randomise(transformers.RecurrentGemmaForCausalLM(config).float())
    ids = torch.randint(7, (3, 4))
    function = partial(lambda ids, of: of(ids, use_cache=use_cache).logits[:, -1], of=model)
    batches = [(ids,), (ids[:1],), (ids.flip(0),)]
    M = oracle.fim(model, batches, "classif_logits", function)
    assert oracle.relative(FIM(model, batches, PMatDiag, function=function).get_diag(), M.diagonal()) < 1e-5
    F = FIM(model, batches, PMatEKFAC, function=function)
    assert abs(F.trace() - M.trace()) < 1e-5 * M.trace()


class TakenSeldom(nn.Module):
    """One bare parameter is seen by its use, another one acts on some examples alone, through a layer."""

    def __init__(self):
        super().__init__()
        self.start, self.shift = nn.Parameter(torch.randn(2)), nn.Parameter(torch.randn(3))
        self.floor, self.body = nn.Linear(2, 3), nn.Linear(3, 3)

    def forward(self, x):
        return torch.maximum(self.body(x), self.floor(self.start)) + self.shift


def test_a_parameter_without_a_use_is_not_lost_where_it_does_not_act_in_the_first_examples():
    model = TakenSeldom().double()
    with torch.no_grad():
        model.body.weight.abs_()
    x = torch.rand(4, 3, dtype=torch.float64) + 100 * torch.tensor([[1.0], [1.0], [-1.0], [-1.0]])
    parameters = LayerCollection.from_model(model).parameters(model)
    rows = [torch.autograd.grad(y, parameters, retain_graph=True) for y in model(x).T.flatten()]
    expected = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]).view(3, 4, -1)
    assert torch.allclose(Jacobian(model, (x,)).to_torch(), expected, atol=1e-14)
