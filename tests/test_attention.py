"""nn.MultiheadAttention in all of its options: its four linear maps against loops, and KFAC against its definition."""

from __future__ import annotations

import oracle
import pytest
import torch
from torch import nn

from nngeometry import (
    FIM,
    GramMatrix,
    Jacobian,
    LayerCollection,
    PFMapDense,
    PMatBlockDiag,
    PMatDense,
    PMatDiag,
    PMatEKFAC,
    PMatKFAC,
    PMatQuasiDiag,
    PVector,
    memory_budget,
)

E, HEADS, T, S = 4, 2, 3, 5


class Reads(nn.Module):
    """Reads x by attention to itself or to another sequence; options of the call by name."""

    def __init__(self, cross=False, of_call=None, seconds=False, **options):
        super().__init__()
        torch.manual_seed(0)
        self.cross, self.of_call, self.seconds = cross, of_call or {}, seconds
        self.first = nn.Linear(E, E)
        self.attention = nn.MultiheadAttention(E, HEADS, **{"batch_first": True, **options})
        self.head = nn.Linear(E, 3)

    def forward(self, x, other=None, padding=None):
        h = torch.tanh(self.first(x))
        y = torch.sin(self.first(other)) if self.cross else h
        of_call = {k: v(h, y) for k, v in self.of_call.items()}
        if padding is not None:
            of_call["key_padding_mask"] = padding
        if not self.attention.batch_first:
            h, y = h.transpose(0, 1), y.transpose(0, 1)
        read, weights = self.attention(h, y, y, **of_call)
        read = read if self.attention.batch_first else read.transpose(0, 1)
        found = self.head(torch.tanh(read)).mean(1)
        return found + weights.flatten(1).square()[:, :3] if self.seconds else found


def causal(h, y):
    return torch.ones(h.shape[1], y.shape[1], dtype=torch.bool).triu(1)


def added(h, y):
    return torch.arange(h.shape[1] * y.shape[1], dtype=torch.float64).view(h.shape[1], -1).cos()


def of_heads(h, y):
    return added(h, y).expand(len(h) * HEADS, -1, -1) * torch.arange(HEADS).repeat(len(h)).view(-1, 1, 1)


#: Without weights torch takes the hint instead of the mask, also where it is another one.
HINT = {"attn_mask": causal, "is_causal": lambda h, y: True, "need_weights": lambda h, y: False}
CASES = {
    "itself": {},
    "without weights": {"of_call": {"need_weights": lambda h, y: False}},
    "without bias": {"bias": False},
    "sequence first": {"batch_first": False},
    "causal": {"of_call": {"attn_mask": causal, "is_causal": lambda h, y: True}},
    "hint": {"add_zero_attn": True, "of_call": HINT},
    "hint of another mask": {"of_call": {**HINT, "attn_mask": added}},
    "added mask": {"of_call": {"attn_mask": added}},
    "mask of heads": {"of_call": {"attn_mask": of_heads}},
    "zero": {"add_zero_attn": True, "of_call": {"attn_mask": causal}},
    "across": {"cross": True},
    "across, sequence first": {"cross": True, "batch_first": False},
    "padding": {"cross": True},
    "weights used": {"seconds": True, "cross": True},
    "rows of bias": {"add_bias_kv": True},
    "other sizes": {"cross": True, "kdim": E, "vdim": E},
}


def make(name, dtype=torch.float64):
    model = oracle.randomise(Reads(**CASES[name]).to(dtype)).eval()
    batch = {"x": torch.randn(4, T, E, dtype=dtype)}
    if CASES[name].get("cross"):
        batch["other"] = torch.randn(4, S, E, dtype=dtype)
    if name == "padding":
        batch["padding"] = torch.arange(S).expand(4, S) > torch.tensor([[4], [2], [1], [3]])
    return model, batch, lambda **b: model(**b)


def function_of(model):
    return lambda b: model(**b)


@pytest.mark.parametrize("name", CASES)
def test_exact_representations(name):
    model, batch, _ = make(name)
    function = function_of(model)
    J = oracle.jacobian(model, batch, function)
    found = Jacobian(model, batch, representation=PFMapDense, function=function).to_torch()
    assert oracle.relative(found, J) < 1e-10
    M = oracle.fim(model, [batch], "regression", function)
    options = {"variant": "regression", "function": function}
    assert oracle.relative(FIM(model, [batch], PMatDense, **options).to_torch(), M) < 1e-10
    with memory_budget(2**14):
        assert oracle.relative(FIM(model, [batch], PMatDiag, **options).get_diag(), M.diagonal()) < 1e-10
    lc = LayerCollection.from_model(model)
    blocks = oracle.blockdiag(M, lc)
    assert oracle.relative(FIM(model, [batch], PMatBlockDiag, **options).to_torch(), blocks) < 1e-10
    if name == "weights used":
        with pytest.raises(ValueError, match="attention whose weights are used"):
            FIM(model, [batch], PMatEKFAC, **options)
    else:
        assert oracle.relative(FIM(model, [batch], PMatEKFAC, **options).trace(), M.trace()) < 1e-10
    v = PVector.from_model(model).detach()
    of_v = Jacobian(model, batch, function=function).jvp(v).to_torch()
    assert oracle.relative(of_v.flatten(), (J @ v.to_torch()).flatten()) < 1e-10


KNOWN = [name for name in CASES if name not in ("rows of bias", "weights used")]


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_kfac_is_that_of_four_linear_maps(name, sharing):
    """Of a net with four plain linear layers in the place of the module."""
    model, batch, _ = make(name)
    F = FIM(model, [batch], PMatKFAC, "regression", function=function_of(model), sharing=sharing)
    assert "4 x Kron(Dense, Dense)" in repr(F)
    plain, attention = Plain(model), model.attention
    G = FIM(plain, [batch], PMatKFAC, "regression", function=function_of(plain), sharing=sharing)
    v = PVector.from_model(model).detach()
    w = PVector.from_model(plain).detach()
    mine, theirs = F.mv(v).to_dict(), G.mv(w).to_dict()
    parts = dict(zip([n for n, _ in v.layer_collection["attention"].params], mine["attention"], strict=True))
    bias = attention.in_proj_bias is not None
    pairs = [
        (parts[f"in_proj_{which}"].chunk(3)[k], theirs[name][n])
        for k, name in enumerate("qkv")
        for n, which in enumerate(["weight", "bias"][: 1 + bias])
    ]
    pairs += [(parts[f"out_proj.{which}"], theirs["out"][n]) for n, which in enumerate(["weight", "bias"][: 1 + bias])]
    one, other = (torch.cat([t.flatten() for t in side]) for side in zip(*pairs, strict=True))
    assert oracle.relative(one, other) < 1e-10


class Plain(nn.Module):
    def __init__(self, model):
        super().__init__()
        a = model.attention
        self.first, self.head, self.like = model.first, model.head, [model]
        for k, name in enumerate("qkv"):
            layer = nn.Linear(E, E, bias=a.in_proj_bias is not None)
            layer.weight = nn.Parameter(a.in_proj_weight.detach().chunk(3)[k].clone())
            if a.in_proj_bias is not None:
                layer.bias = nn.Parameter(a.in_proj_bias.detach().chunk(3)[k].clone())
            setattr(self, name, layer)
        self.out = nn.Linear(E, E, bias=a.in_proj_bias is not None)
        self.out.load_state_dict(a.out_proj.state_dict())

    def forward(self, x, other=None, padding=None):
        (model,) = self.like
        h = torch.tanh(self.first(x))
        y = torch.sin(self.first(other)) if model.cross else h
        q, k, v = (f(z).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f, z in ((self.q, h), (self.k, y), (self.v, y)))
        if model.attention.add_zero_attn:
            k, v = (nn.functional.pad(t, (0, 0, 0, 1)) for t in (k, v))
        scores = q @ k.mT / (E // HEADS) ** 0.5
        mask = model.of_call.get("attn_mask")
        if model.of_call.keys() == HINT.keys():
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
        elif mask is not None:
            mask = mask(h, y)
            mask = mask.view(-1, HEADS, *mask.shape[1:]) if mask.ndim == 3 else mask
            mask = nn.functional.pad(mask, (0, scores.shape[-1] - mask.shape[-1]))
            scores = scores.masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        if padding is not None:
            scores = scores.masked_fill(padding[:, None, None], -torch.inf)
        read = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return self.head(torch.tanh(self.out(read))).mean(1)


def test_a_layer_of_a_transformer_and_what_is_frozen():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.TransformerEncoderLayer(E, HEADS, 6, batch_first=True), nn.Flatten(), nn.Linear(T * E, 2)
    ).eval()
    x = torch.randn(3, T, E)
    for frozen in ([], ["0.self_attn.out_proj.weight"], ["0.self_attn.in_proj_bias", "0.self_attn.out_proj.bias"]):
        for name, p in model.named_parameters():
            p.requires_grad_(name not in frozen)
        M = oracle.fim(model, [(x,)], "regression")
        lc = LayerCollection.from_model(model)
        for representation in (PMatDense, PMatDiag, PMatQuasiDiag):
            F = FIM(model, (x,), representation, "regression")
            assert oracle.relative(F.get_diag(), M.diagonal()) < 1e-10
        assert oracle.relative(FIM(model, (x,), PMatEKFAC, "regression").trace(), M.trace()) < 1e-10
        assert lc.numel() == len(M)
    K = GramMatrix(model, (x,))
    J = oracle.jacobian(model, (x,))
    J = J.flatten(0, -2)
    assert oracle.relative(K.to_torch().reshape(len(J), len(J)), J @ J.T) < 1e-10


def test_saved_and_loaded(tmp_path):
    model, batch, _ = make("itself")
    for representation in (PMatKFAC, PMatEKFAC, PMatDiag, PMatBlockDiag):
        F = FIM(model, [batch], representation, "regression", function=function_of(model))
        F.save(tmp_path / "F")
        again = representation.load(tmp_path / "F")
        assert torch.equal(again.to_torch(), F.to_torch())
        assert again.layer_collection == F.layer_collection
