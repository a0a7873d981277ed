"""Models whose types tell that examples are apart: each rule is true, and nothing that mixes examples follows one."""

import pytest
import torch
from models import CASES
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from nngeometry import FIM, EmpiricalFisher, Hessian, LayerCollection, PMatDense
from nngeometry.forms import Dense
from nngeometry.kinds import Kind, Packing
from nngeometry.kinds.kind import _TABLE
from nngeometry.model.independence import _RULES, called_apart

#: For each module whose rows are apart, the shape of one example.
APART = [
    *((t(), (3,)) for t in (nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU)),
    *((t(), (3,)) for t in (nn.Mish, nn.Softplus, nn.Softsign, nn.Sigmoid, nn.LogSigmoid, nn.Tanh, nn.Tanhshrink)),
    *((t(), (3,)) for t in (nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.Hardshrink, nn.Softshrink, nn.PReLU)),
    *((t(), (3, 4)) for t in (nn.Dropout, nn.Dropout1d, nn.AlphaDropout, nn.FeatureAlphaDropout)),
    (nn.Dropout2d(), (3, 4, 4)),
    (nn.Dropout3d(), (3, 4, 4, 4)),
    (nn.Threshold(0.1, 0.0), ()),
    (nn.Sequential(nn.Linear(3, 2), nn.Sequential(), nn.Sequential(nn.ReLU())), (3,)),
    (nn.Linear(3, 2), (4, 3)),
    (nn.Embedding(5, 2, padding_idx=0), (4,)),
    *((t(3, 2, 2), (3, *[4] * n)) for n, t in enumerate((nn.Conv1d, nn.Conv2d, nn.Conv3d), 1)),
    *(
        (t(3, 2, 2), (3, *[4] * n))
        for n, t in enumerate((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), 1)
    ),
    *((t(3), (3, *[4] * n)) for n, t in enumerate((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), 1)),
    (nn.BatchNorm1d(3), (3,)),
    *((t(3), (3, *[4] * n)) for n, t in enumerate((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), 1)),
    (nn.GroupNorm(2, 4), (4, 3)),
    (nn.LayerNorm([2, 3]), (2, 3)),
    (nn.RMSNorm(3), (2, 3)),
    *((t(2), (3, *[4] * n)) for n, t in enumerate((nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d), 1)),
    *((t(2), (3, *[4] * n)) for n, t in enumerate((nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d), 1)),
    *((t(2, 2), (3, *[4] * n)) for n, t in enumerate((nn.LPPool1d, nn.LPPool2d, nn.LPPool3d), 1)),
    *(
        (t(2), (3, *[4] * n))
        for n, t in enumerate((nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d), 1)
    ),
    *(
        (t(2), (3, *[4] * n))
        for n, t in enumerate((nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d), 1)
    ),
    (nn.AvgPool2d(2), (4, 4)),
    (nn.MaxPool1d(2), (4,)),
    (nn.Flatten(), (3, 4)),
    (nn.Flatten(-2, -1), (2, 3, 4)),
    (nn.Unflatten(1, (2, 2)), (4,)),
    (nn.Unflatten(-1, (2, -1)), (3, 4)),
    (nn.Softmax(1), (3, 4)),
    (nn.LogSoftmax(-1), (3,)),
]

#: For each module that treats its input as one example, or whose rows depend on each other, the whole input.
TOGETHER = [
    (nn.Linear(3, 2), (3,)),
    (nn.Conv1d(3, 3, 1), (3, 4)),
    (nn.ConvTranspose2d(3, 3, 1), (3, 4, 4)),
    (nn.InstanceNorm1d(3), (3, 4)),
    (nn.LayerNorm([2, 3]), (2, 3)),
    (nn.RMSNorm(3), (3,)),
    (nn.BatchNorm1d(3, track_running_stats=False), (2, 3)),
    (nn.BatchNorm1d(3).train(), (2, 3)),
    (nn.MaxPool1d(2, return_indices=True), (2, 3, 4)),
    (nn.AdaptiveMaxPool1d(2, return_indices=True), (2, 3, 4)),
    (nn.Embedding(5, 2, max_norm=1.0), (4,)),
    (nn.Flatten(0), (2, 3)),
    (nn.Flatten(-2), (2, 3)),
    (nn.Unflatten(0, (2, 2)), (4, 3)),
    (nn.Softmax(0), (2, 3)),
    (nn.Softmax(-2), (2, 3)),
    (nn.LogSoftmax(), (2, 3)),
    (nn.Softmin(1), (2, 3)),  # not in the table
    (nn.Sequential(nn.Flatten(0), nn.Linear(6, 2)), (2, 3)),
]


def _id(value):
    return type(value).__name__ if isinstance(value, nn.Module) else str(list(value))


def test_every_rule_has_a_case():
    assert {type(m) for module, _ in APART for m in module.modules()} == set(_RULES)


@pytest.mark.parametrize(("module", "shape"), APART, ids=_id)
def test_rows_are_apart(module, shape):
    module.double().eval()
    x = torch.randint(5, (4, *shape)) if isinstance(module, nn.Embedding) else torch.randn(4, *shape)
    assert called_apart(module, x.ndim) is not None
    y, some = module(x), [2, 0]
    torch.testing.assert_close(module(x[some]), y[some])
    torch.testing.assert_close(module(x[1:2]), y[1:2])
    following = nn.Sequential(module, nn.LayerNorm(y.shape[1:]))  # the rule tells how many axes come next
    assert called_apart(following, x.ndim) is not None
    assert called_apart(nn.Sequential(module, nn.LayerNorm(y.shape)), x.ndim) is None


@pytest.mark.parametrize(("module", "shape"), TOGETHER, ids=_id)
def test_rows_are_not_apart(module, shape):
    assert called_apart(module, len(shape)) is None


def test_a_subclass_may_compute_anything():
    class Linear(nn.Linear):
        pass

    class Sequential(nn.Sequential):
        pass

    assert called_apart(Linear(3, 2), 2) is None
    assert called_apart(Sequential(nn.Linear(3, 2)), 2) is None


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize(
    "register",
    [
        lambda m: m.register_forward_hook(lambda m, x, y: y - y.mean(0)),
        lambda m: m.register_forward_pre_hook(lambda m, x: None),
        lambda m: m.register_full_backward_hook(lambda m, gx, gy: None),
        lambda m: m.register_full_backward_pre_hook(lambda m, gy: None),
        lambda m: setattr(m, "forward", lambda x: x - x.mean(0)),
    ],
)
def test_altered_modules_are_looked_at(which, register):
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.ReLU()))
    register((model, model[0], model[1][0])[which])
    assert called_apart(model, 2) is None


@pytest.mark.parametrize("first", [nn.Identity(), nn.Flatten(), nn.Unflatten(1, (3, 1)), nn.Dropout(), nn.Sequential()])
def test_inputs_are_not_modified(first):
    model = nn.Sequential(first, nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(3, 2)).eval()
    x = torch.randn(4, 3)
    before = x.clone()
    assert called_apart(model, 2) is None
    assert called_apart(nn.Sequential(nn.Linear(3, 3), model), 2) is not None
    with pytest.raises(ValueError, match="modifies its inputs in place"):
        EmpiricalFisher(model, (x, torch.randint(2, (4,))), PMatDense)
    assert torch.equal(x, before)


def test_parameters_of_another_type():
    class Parameter(nn.Parameter):
        pass

    model = nn.Linear(3, 2)
    model.weight = Parameter(torch.randn(2, 3))
    assert called_apart(model, 2) is None


def test_weights_made_of_others_are_looked_at():
    def net():
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))

    transposed = net()
    del transposed[2].weight
    transposed[2].weight = transposed[0].weight.t()
    buffer = net()
    del buffer[2].weight
    buffer[2].register_buffer("weight", buffer[0].weight.t())
    bare, nested = net(), net()
    bare.scale = nn.Parameter(torch.ones(1))
    nested[0].inner = nn.Linear(2, 2)
    batch = torch.randn(4, 3), torch.randint(3, (4,))
    for model in (transposed, buffer, bare, nested):
        assert called_apart(model, 2) is None
    for model in (transposed, buffer):
        with pytest.raises(ValueError, match="act outside of its forward"):
            EmpiricalFisher(model, batch, PMatDense, layer_collection=LayerCollection.from_model(model).select("0"))
    assert EmpiricalFisher(bare, batch, PMatDense).size() == (32, 32)
    with pytest.raises(ValueError, match="never called"):
        EmpiricalFisher(nested, batch, PMatDense)


def test_kinds_of_the_user_are_looked_at(monkeypatch):
    def wrong(module, gy, x):
        return Dense(2 * (gy * x.clamp(max=0)).flatten(2).sum(2, keepdim=True))

    monkeypatch.setitem(_TABLE, nn.PReLU, Kind(wrong, lambda module, bias: Packing.flat(1)))
    model = nn.Sequential(nn.Linear(3, 3), nn.PReLU())
    with pytest.raises(ValueError, match="do not add up"):
        EmpiricalFisher(model, (torch.randn(4, 3), torch.randint(3, (4,))), PMatDense)


def test_methods_of_a_type_that_was_changed(monkeypatch):
    monkeypatch.setattr(nn.ReLU, "forward", lambda self, x: x - x.mean(0))
    assert called_apart(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), 2) is None


def test_inputs_of_no_axes():
    assert called_apart(nn.Sequential(nn.Flatten()), 0) is None
    assert called_apart(nn.Sequential(nn.Embedding(3, 2)), 0) is None


def test_padding_that_was_changed():
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.Flatten(), nn.Linear(12, 2))
    model[0].padding = (1,)
    x = torch.randn(3, 2, 4)
    batch = x, torch.randint(2, (3,))
    assert called_apart(model, 3) is not None
    G = EmpiricalFisher(model, batch, PMatDense, function=lambda x, y: model(x))  # looked at
    torch.testing.assert_close(EmpiricalFisher(model, batch, PMatDense).to_torch(), G.to_torch())


def test_hooks_of_all_modules():
    model = nn.Sequential(nn.Linear(3, 3))
    handle = register_module_forward_hook(lambda m, x, y: None)
    try:
        assert called_apart(model, 2) is None
    finally:
        handle.remove()
    assert called_apart(model, 2) == [model, model[0]]


def test_normalised_weights_are_looked_at():
    assert called_apart(nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))), 2) is None


def test_a_row_of_modules_that_mixes_is_refused():
    model = nn.Sequential(nn.Linear(3, 4), nn.Softmax(0), nn.Linear(4, 2))
    batch = torch.randn(5, 3), torch.randint(2, (5,))
    with pytest.raises(ValueError, match="depends on the others"):
        EmpiricalFisher(model, batch, PMatDense)


@pytest.mark.parametrize("name", [name for name, c in CASES.items() if not (c.function or c.expected_warning)])
def test_the_same_as_when_looked_at(name):
    model, batch, _ = CASES[name].make()
    model = nn.Sequential(model, nn.Flatten())
    batches = [batch, tuple(t[:3] for t in batch)]
    lc = LayerCollection.from_model(model)
    options = {"loss": lambda f, *_: f.square().sum(1), "layer_collection": lc}
    one = EmpiricalFisher(model, batches, PMatDense, **options)
    other = EmpiricalFisher(model, batches, PMatDense, function=lambda x, *_: model(x), **options)
    torch.testing.assert_close(one.to_torch(), other.to_torch(), rtol=1e-10, atol=1e-12)


class Turns(nn.Module):
    """Writes other values of the same size into its weight at every call."""

    def __init__(self, turned):
        super().__init__()
        self.a, self.b, self.turned = nn.Linear(4, 5), nn.Linear(5, 3), turned

    def forward(self, x):
        with torch.no_grad():
            self.a.weight.data = self.turned(self.a.weight.data)
        return self.b(torch.tanh(self.a(x)))


@pytest.mark.parametrize("turned", [torch.neg, lambda w: w.roll(1, 0), lambda w: w.flip(1)])
@pytest.mark.parametrize("unit", ["example", "minibatch"])
@pytest.mark.parametrize("call", [FIM, Hessian])
def test_a_model_that_turns_its_weights_at_every_call(call, unit, turned):
    model, batch = Turns(turned).double(), (torch.randn(6, 4).double(), torch.randint(3, (6,)))
    before = model.a.weight.clone()
    with pytest.raises(ValueError, match=r"writes into its parameters|depends on the others, or is random"):
        call(model, batch, PMatDense, unit=unit)
    assert torch.equal(model.a.weight, before)
