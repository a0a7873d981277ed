"""Layer collections: every parameter once, in order; selections; equality."""

import pytest
from models import CASES
from torch import nn

from nngeometry import Layer, LayerCollection


@pytest.mark.parametrize("name", CASES)
def test_every_parameter_exactly_once(name):
    model, _, _ = CASES[name].make(2)
    lc = LayerCollection.from_model(model)
    collected = lc.parameters(model)
    assert len({id(p) for p in collected}) == len(collected)
    assert {id(p) for p in collected} == {id(p) for p in model.parameters() if p.requires_grad}
    assert lc.numel() == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_order_and_positions():
    model, _, _ = CASES["convnet"].make(2)
    lc = LayerCollection.from_model(model)
    assert list(lc) == ["0", "1", "3", "4", "7"]
    assert [name for name, _ in lc.named_parameters(model)] == [name for name, _ in model.named_parameters()]
    assert lc.p_pos["1"] == lc["0"].numel()
    assert lc["0"].bias == (3,)
    assert lc["0"].weight == (3, 1, 3, 3)


def test_tied_parameters_belong_to_the_first():
    model, _, _ = CASES["tied"].make(2)
    lc = LayerCollection.from_model(model)
    assert {name: [k for k, _ in layer.params] for name, layer in lc.layers.items()} == {
        "embed": ["weight"],
        "mix": ["weight", "bias"],
        "head": ["bias"],
    }
    assert lc["embed"].kronecker


def test_selections():
    model, _, _ = CASES["transformer-layer"].make(2)
    lc = LayerCollection.from_model(model)
    assert list(lc.select("0.norm1", nn.MultiheadAttention)) == ["0.self_attn", "0.norm1"]
    assert list(lc.select(nn.Linear)) == ["0.linear1", "0.linear2"]
    assert list(lc.select("0")) == list(lc)
    assert list(lc.select(lambda layer: layer.bias == (4,))) == ["0.linear2", "0.norm1", "0.norm2"]
    assert list(lc.exclude(nn.LayerNorm, "0.self_attn")) == ["0.linear1", "0.linear2"]
    assert LayerCollection.from_model(model, nn.LayerNorm) == lc.select(nn.LayerNorm)
    with pytest.raises(KeyError, match="selects no layer"):
        lc.select("nothing")
    with pytest.raises(KeyError, match="selects no layer"):
        lc.select(nn.Conv2d)


def test_merge_and_common():
    model, _, _ = CASES["convnet"].make(2)
    lc = LayerCollection.from_model(model)
    a, b = lc.select("0", "1"), lc.select("1", "7")
    assert list(a.merge(b)) == ["0", "1", "7"]
    assert list(a | b) == ["0", "1", "7"]
    assert list(a.common_layers(b)) == ["1"]
    assert list(a & b) == ["1"]
    with pytest.raises(ValueError, match="layer '0' differs"):
        a.merge(LayerCollection.from_model(nn.Sequential(nn.Linear(2, 2))))


def test_equality():
    def of(module):
        return LayerCollection.from_model(nn.Sequential(module))

    assert of(nn.Linear(2, 3)) == of(nn.Linear(2, 3))
    assert of(nn.Linear(2, 3)) != of(nn.Linear(2, 3, bias=False))
    assert of(nn.Conv2d(2, 3, 2)) != of(nn.Conv2d(2, 3, 2, bias=False))
    assert of(nn.Conv2d(2, 4, 2)) != of(nn.Conv2d(4, 4, 2, groups=2))
    assert of(nn.Linear(2, 3)) != "something else"
    lc = LayerCollection.from_model(CASES["convnet"].make(2)[0])
    assert lc.select("0", "1") != lc.select("1")


def test_add_layer():
    model, _, _ = CASES["convnet"].make(2)
    lc = LayerCollection()
    lc.add_layer_from_model(model, model[3])
    lc.add_layer_from_model(model, model[0])
    assert list(lc) == ["3", "0"]
    assert lc.parameters(model)[0] is model[3].weight
    with pytest.raises(ValueError, match="already"):
        lc.add_layer_from_model(model, model[0])
    with pytest.raises(ValueError, match="not a module of the model"):
        lc.add_layer_from_model(model, nn.Linear(2, 2))


def test_frozen():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    model[0].weight.requires_grad_(False)
    assert LayerCollection.from_model(model).numel() == 3 + 8
    assert LayerCollection.from_model(model, frozen=True).numel() == 17
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(ValueError, match="frozen=True"):
        LayerCollection.from_model(model)


def test_repr_names_everything():
    text = repr(LayerCollection.from_model(nn.Sequential(nn.Linear(2, 3))))
    assert "0: Linear (weight (3, 2), bias (3,)), linear" in text
    model = nn.Sequential(nn.BatchNorm1d(2), nn.utils.spectral_norm(nn.Linear(2, 3)), nn.GRU(3, 2))
    text = repr(LayerCollection.from_model(model))
    assert "bias (2,)), batch_norm" in text
    assert "weight_orig (3, 2)), generic" in text
    assert "bias_hh_l0 (6,)), generic" in text
    assert isinstance(LayerCollection.from_model(nn.Linear(2, 3))[""], Layer)


def test_repr_is_a_table():
    lines = repr(LayerCollection.from_model(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)))).splitlines()
    assert lines == [
        "LayerCollection of 2 layers, 15 parameters",
        "  0: Linear      (weight (3, 2), bias (3,)), linear",
        "  1: BatchNorm1d (weight (3,), bias (3,)), batch_norm",
    ]
