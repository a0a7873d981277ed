"""A model held at other weights: these inside, its own afterwards, whatever happens meanwhile."""

import signal

import oracle
import pytest
import torch
from interrupts import Tracer
from torch import nn

from nngeometry import FIM, Hessian, LayerCollection, PMatDense, PMatImplicit, PVector, at, changes, random_pvector
from nngeometry.object import moving


class Net(nn.Module):
    """Parameters in modules, in a closure, tied, frozen, of odd layouts; a buffer."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 2, 2).to(memory_format=torch.channels_last), nn.BatchNorm2d(2)
        self.a, self.b = nn.Linear(8, 3), nn.Linear(3, 3)
        self.c = nn.Linear(3, 3)
        self.c.weight = self.b.weight
        self.c.bias.requires_grad_(False)
        held = self.a.weight
        self.product = lambda x: x @ held.T + self.a.bias

    def forward(self, x):
        x = torch.tanh(self.norm(self.conv(x))).flatten(1)
        return self.c(torch.tanh(self.b(torch.tanh(self.product(x)))))


NETS = {
    "net": (Net, (4, 1, 3, 3)),
    "lstm": (lambda: nn.LSTM(3, 2, batch_first=True), (4, 5, 3)),
    "parametrised": (lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))), (4, 3)),
    "root": (lambda: nn.Linear(3, 2), (4, 3)),
}


def problem(name):
    make, shape = NETS[name]
    model = oracle.randomise(make()).eval()
    return model, torch.randn(shape)


def output(model, x):
    out = model(x)
    return out[0] if isinstance(out, tuple) else out


def facts(model):
    """What a model is, but for its values."""
    return [
        (name, id(p), p.data_ptr(), p._version, p.requires_grad, p.grad is None, p.is_leaf, p.stride(), type(p))
        for name, p in (*model.named_parameters(), *model.named_buffers())
    ]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_values_inside_and_after(name, frozen):
    model, x = problem(name)
    lc = LayerCollection.from_model(model, frozen=frozen)
    w = random_pvector(lc)
    expected = problem(name)[0]
    expected.load_state_dict(model.state_dict())
    w.copy_to_model(expected)
    before, own, kept = facts(model), PVector.from_model(model, lc).clone().detach(), w.to_torch().clone()
    base = output(model, x)
    for _ in range(2):
        with at(model, w):
            assert torch.equal(output(model, x), output(expected, x))
            assert torch.equal(PVector.from_model(model, lc).to_torch(), w.to_torch())
            inside = facts(model)
            assert [f[:2] + f[4:] for f in inside] == [f[:2] + f[4:] for f in before]
        assert facts(model) == before
        assert torch.equal(PVector.from_model(model, lc).to_torch(), own.to_torch())
        assert torch.equal(output(model, x), base)
    with at(model, w), torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    assert torch.equal(w.to_torch(), kept)  # what is written inside is written nowhere
    assert torch.equal(PVector.from_model(model, lc).to_torch(), own.to_torch())
    assert facts(model)[0][:5] == before[0][:5]


def test_some_layers_and_one_inside_of_another():
    model, _ = problem("net")
    lc = LayerCollection.from_model(model)
    own = PVector.from_model(model, lc).clone().detach()
    one, other = random_pvector(lc.select("a", "b")), random_pvector(lc.select("b", "conv"))
    with at(model, one):
        first = PVector.from_model(model, lc).clone().detach()
        with at(model, other):
            both = PVector.from_model(model, lc).clone().detach().to_dict()
        assert torch.equal(PVector.from_model(model, lc).to_torch(), first.to_torch())
    assert torch.equal(PVector.from_model(model, lc).to_torch(), own.to_torch())
    for name, values in both.items():
        source = next(v for v in (other, one, own) if name in v.layer_collection)
        assert all(torch.equal(a, b) for a, b in zip(values, source.to_dict()[name], strict=True))
    live = PVector.from_model(model, lc)
    with at(model, live), at(model, live * 2), at(model, live):  # each as it is then
        assert torch.equal(PVector.from_model(model, lc).to_torch(), 2 * own.to_torch())
    again = at(model, own)
    with again, pytest.raises(RuntimeError, match="in force already"), again:
        pass
    with again:
        pass


def test_gradients_are_those_at_the_weights_and_stay():
    model, x = problem("net")
    lc = LayerCollection.from_model(model)
    w = random_pvector(lc)
    expected = problem("net")[0]
    expected.load_state_dict(model.state_dict())
    w.copy_to_model(expected)
    loss = output(model, x).square().sum()
    truth = torch.autograd.grad(output(expected, x).square().sum(), lc.parameters(expected))
    own = torch.autograd.grad(output(model, x).square().sum(), lc.parameters(model))
    with at(model, w):
        inside = output(model, x).square().sum()
        inside.backward(retain_graph=True)
        kept = output(model, x).square().sum()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward(retain_graph=True)
    for p, g in zip(lc.parameters(model), truth, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-12, atol=1e-12)
    model.zero_grad()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            kept.backward(retain_graph=True)
        with at(model, 2 * w), pytest.raises(RuntimeError, match="modified by an inplace operation"):
            kept.backward(retain_graph=True)
        model.zero_grad()
    loss.backward()  # of a graph that was recorded before
    for p, g in zip(lc.parameters(model), own, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-12, atol=1e-12)


def test_matrices_inside_are_those_of_the_weights():
    model, x = problem("root")
    y = torch.randint(2, (4,))
    lc = LayerCollection.from_model(model)
    w, v = random_pvector(lc), random_pvector(lc)
    with at(model, w):
        F, H = FIM(model, (x,), PMatDense), Hessian(model, (x, y), PMatImplicit)
        here = H.mv(v)
    after = H.mv(v)  # it stays the matrix at these
    w.copy_to_model(model)
    assert torch.equal(F.to_torch(), FIM(model, (x,), PMatDense).to_torch())
    expected = Hessian(model, (x, y), PMatDense).to_torch() @ v.to_torch()
    for found in (here, after):
        torch.testing.assert_close(found.to_torch(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_in_every_mode(mode):
    model, x = problem("net")
    w = random_pvector(LayerCollection.from_model(model))
    before = facts(model)
    with mode(), at(model, w):
        output(model, x)
    assert facts(model) == before
    with at(model, w), mode():
        output(model, x)
    assert facts(model) == before
    output(model, x).sum().backward()


def test_exceptions_and_signals():
    model, x = problem("net")
    w = random_pvector(LayerCollection.from_model(model))
    before = facts(model)
    with pytest.raises(LookupError), at(model, w):
        raise LookupError
    assert facts(model) == before
    with pytest.raises(KeyboardInterrupt), at(model, w):
        signal.raise_signal(signal.SIGINT)
    assert facts(model) == before

    def run():
        with at(model, w):
            output(model, x)

    tracer = Tracer((changes.__file__, moving.__file__, __file__))
    moments = tracer.moments(run)
    assert len(moments) > 30
    for moment in moments:
        assert isinstance(tracer.run(run, moment), KeyboardInterrupt)
        assert facts(model) == before


def test_what_is_of_another_model_or_no_vector():
    model, _ = problem("net")
    before = facts(model)
    w = random_pvector(LayerCollection.from_model(model))
    others = [
        (random_pvector(LayerCollection.from_model(nn.Linear(8, 3))), ValueError, "of another model"),
        (
            random_pvector(LayerCollection.from_model(nn.ModuleDict({"a": nn.Linear(8, 4)}))),
            ValueError,
            "another model",
        ),
        (w.to(dtype=torch.float32), ValueError, r"at: the vector is torch\.float32.*move one"),
        (w.to(device="meta"), ValueError, "at: the vector is .* on meta.*move one"),
        (w.to_torch(), TypeError, "vector: expected a PVector"),
        (PVector, TypeError, "vector: expected"),
    ]
    for wrong, error, text in others:
        with pytest.raises(error, match=text), at(model, wrong):
            raise AssertionError
        assert facts(model) == before
    with pytest.raises(TypeError, match="model: expected"), at(w, model):
        raise AssertionError


def test_parameters_of_several_dtypes():
    model = nn.Sequential(nn.Linear(3, 2).float(), nn.Linear(2, 2).double())
    lc = LayerCollection.from_model(model)
    w = random_pvector(lc)
    w = PVector(lc, w.to_torch().double())
    with at(model, w):
        assert [p.dtype for p in model.parameters()] == [torch.float32] * 2 + [torch.float64] * 2
        torch.testing.assert_close(PVector.from_model(model).to_torch(), w.to_torch(), rtol=1e-6, atol=1e-6)
