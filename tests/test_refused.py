"""What a refusal says to do works: every remedy that is named is followed, and compared with a loop over examples."""

import re
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import nngeometry
from nngeometry import FIM, FIM_MonteCarlo, GramMatrix, LayerCollection, PMatDense, PMatDiag, PMatImplicit, PVector
from nngeometry.changes import Borrowed
from nngeometry.kinds import declared_whole

T, D = 3, 4


class Bias(nn.Module):
    """Attention with a bias for each pair of positions, which is alike for all examples, as in T5 and MPNet."""

    def __init__(self):
        super().__init__()
        self.q, self.table = nn.Linear(D, 2 * D), nn.Embedding(2 * T - 1, 2)

    def forward(self, x):
        k = torch.arange(T)
        bias = self.table(k[:, None] - k + T - 1).permute([2, 0, 1]).unsqueeze(0)
        q = self.q(x).unflatten(-1, (2, D)).transpose(1, 2)
        return (q @ q.mT + bias).softmax(-1).sum(1) @ x, bias


class Stack(nn.Module):
    """Passes the bias on, so that its parts have an output without an axis of examples."""

    def __init__(self):
        super().__init__()
        self.block, self.last = Bias(), nn.Linear(D, D)

    def forward(self, x):
        x, bias = self.block(x)
        return self.last(x) * bias.mean()


class Passing(nn.Module):
    """Reads a table that a child owns, and gives parts of it to others, as DeBERTa."""

    def __init__(self):
        super().__init__()
        self.table, self.key, self.query = nn.Embedding(T, D), nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x):
        position = self.key(self.table.weight).permute([1, 0])
        return x + (self.query(x) @ position).softmax(-1) @ x


class Reading(nn.Module):
    """Computes with weights of children that it does not call, as layers with weights of their own precision."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x):
        q, k, v = F.linear(x, self.qkv.weight.softmax(1), self.qkv.bias).chunk(3, -1)
        return F.linear(F.scaled_dot_product_attention(q, k, v), self.proj.weight.softmax(0), self.proj.bias)


class Window(nn.Module):
    """Attention in windows, of which its input is made: it has a mask for each, and a small network for positions."""

    def __init__(self):
        super().__init__()
        self.scale, self.q = nn.Parameter(torch.ones(1)), nn.Linear(D, D)
        self.positions = nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 2, bias=False))

    def forward(self, x, mask):
        table = self.positions(torch.linspace(-1, 1, 8).view(1, 2, 2, 2)).view(-1, 2)
        bias = table[torch.tensor([[0, 1], [2, 3]]).view(-1)].view(2, 2, 2).permute(2, 0, 1).sum(0)
        a = self.q(x) @ x.mT * self.scale + bias
        a = a.view(len(x) // len(mask), len(mask), 2, 2) + mask[None]
        return a.view(-1, 2, 2).softmax(-1) @ x


class Windows(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.norm = Window(), nn.LayerNorm(D)

    def forward(self, x):
        inside = x[:, :2].repeat_interleave(2, 1).reshape(-1, 2, D)
        y = self.attention(inside, torch.stack([torch.zeros(2, 2), torch.eye(2)]))
        return self.norm(y.reshape(len(x), 4, D)[:, :T])


class Cache:
    def __init__(self):
        self.state = None


class Mixer(nn.Module):
    """Reads the weight of a child, beside a state of all examples, as Mamba."""

    def __init__(self):
        super().__init__()
        self.conv, self.out = nn.Conv1d(D, D, 2, groups=D), nn.Linear(D, D)

    def forward(self, x, cache):
        cache.state = x[:, :1] if cache.state is None else cache.state
        y = torch.cat([cache.state, x], 1).mT
        return self.out(F.conv1d(y, self.conv.weight.softmax(0), self.conv.bias, groups=D).mT.tanh())


class Cached(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = Mixer(), Mixer()

    def forward(self, x):
        cache = Cache()
        return self.second(self.first(x, cache), cache)


class Heads(nn.Module):
    """Unlike heads of examples laid end to end, which it also returns, as WavLM."""

    def __init__(self):
        super().__init__()
        self.q, self.table = nn.Linear(D, D), nn.Embedding(T * T, 2)

    def forward(self, x, bias):
        if bias is None:
            bias = self.table(torch.arange(T * T).view(T, T)).permute(2, 0, 1).repeat(len(x), 1, 1)
        q = (
            F.linear(x, self.q.weight.softmax(1), self.q.bias.softmax(0))
            .unflatten(-1, (2, D // 2))
            .transpose(1, 2)
            .flatten(0, 1)
        )
        a = (q @ q.mT + bias).softmax(-1) @ q
        return a.unflatten(0, (-1, 2)).transpose(1, 2).flatten(2), bias


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Heads(), Heads()])
        del self.layers[1].table

    def forward(self, x):
        bias = None
        for layer in self.layers:
            x, bias = layer(x, bias)
        return x


class Net(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.embed, self.body, self.head = nn.Linear(2, D), body, nn.Linear(D, 3)

    def forward(self, x):
        return self.head(self.body(self.embed(x)).mean(1))


def jacobian(f, parameters):
    rows = [torch.autograd.grad(y, parameters, retain_graph=True, materialize_grads=True) for y in f.flatten()]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]).view(*f.shape, -1)


def fisher(f, parameters):
    J, p = jacobian(f, parameters), f.detach().softmax(-1)
    M = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    return torch.einsum("bcp,bcd,bdq->pq", J, M, J) / len(f)


def refused(model, x, **how):
    with pytest.raises(nngeometry.model.refused.Refused) as error:
        FIM(model, x, PMatDiag, **how)
    return str(error.value)


def check(model, x, lc, **how):
    """Matrices of a collection are what the loop says."""
    truth = fisher(how.get("function", model)(x), lc.parameters(model))
    torch.testing.assert_close(FIM(model, x, PMatDense, layer_collection=lc, **how).to_torch(), truth)
    torch.testing.assert_close(FIM(model, x, PMatDiag, layer_collection=lc, **how).get_diag(), truth.diag())


def check_products(model, x, **how):
    lc = LayerCollection.from_model(model)
    v = PVector(layer_collection=lc, vector_repr=torch.randn(lc.numel()))
    truth = fisher(how.get("function", model)(x), lc.parameters(model)) @ v.to_torch()
    torch.testing.assert_close(FIM(model, x, PMatImplicit, **how).mv(v).to_torch(), truth)


MODELS = {
    "bias": (Stack, "body.block.table", "Stack"),
    "passing": (Passing, "body.table", "Passing"),
    "reading": (Reading, "body.qkv", "Reading"),
    "windows": (Windows, "body.attention.positions.0", "Windows"),
    "cached": (Cached, "body.first.conv", "Cached"),
    "heads": (Encoder, "body.layers.0.q", "Encoder"),
    "twice": (lambda: nn.Sequential(Stack(), nn.Tanh(), Stack()), "body.0.block.table", "Stack"),
}


#: What they have in common is found one example at a time.
IN_COMMON = ("bias", "windows", "twice")


@pytest.mark.parametrize("name", IN_COMMON)
def test_what_examples_have_in_common_is_no_reason(name):
    body, layer, one = MODELS[name]
    torch.manual_seed(0)
    model, x = Net(body()), torch.randn(5, T, 2)
    check(model, x, LayerCollection.from_model(model))
    check(model, x, LayerCollection.from_model(model).exclude(layer))
    check_products(model, x)
    with Borrowed(declared_whole(globals()[one])):
        check(model, x, LayerCollection.from_model(model))


@pytest.mark.parametrize("name", [name for name in MODELS if name not in IN_COMMON])
def test_what_a_refusal_names_works(name):
    body, layer, one = MODELS[name]
    torch.manual_seed(0)
    model, x = Net(body()), torch.randn(5, T, 2)
    said = refused(model, x)
    assert said.startswith(f"layer {layer!r} (")
    assert f"nngeometry.whole({one})" in said
    assert "PMatImplicit" in said
    assert "\n" not in said
    check_products(model, x)
    names = re.search(r"LayerCollection\.exclude\((.*?)\)", said)[1]
    check(model, x, LayerCollection.from_model(model).exclude(*re.findall("'(.*?)'", names)))
    with Borrowed(declared_whole(globals()[one])):
        check(model, x, LayerCollection.from_model(model))


def test_others_that_need_jacobians_say_the_same():
    torch.manual_seed(0)
    model, x = Net(Reading()), torch.randn(5, T, 2)
    for make in (lambda: GramMatrix(model, x), lambda: FIM_MonteCarlo(model, x, PMatDiag)):
        with pytest.raises(ValueError, match=r"'body.qkv'.*nngeometry.whole\(Reading\)"):
            make()


def test_remedies_are_of_the_layers_that_were_collected():
    torch.manual_seed(0)
    model, x = Net(Reading()), torch.randn(5, T, 2)
    model.embed.requires_grad_(False)
    assert "nngeometry.whole(Reading)" in refused(model, x, layer_collection=LayerCollection.from_model(model, "body"))
    assert list(LayerCollection.from_model(model)) == ["body.qkv", "body.proj", "head"]  # nothing stays declared


def test_layers_that_are_read_have_no_derivative_of_zero():
    torch.manual_seed(0)
    model, x = Net(Reading()), torch.randn(5, T, 2)
    for names in ([], ["body"], ["body.proj"]):
        lc = LayerCollection.from_model(model, *names, ignore_uncalled=True)
        with pytest.raises(ValueError, match=r"layer 'body\..*do not add up.*nngeometry.whole\(Reading\)"):
            FIM(model, x, PMatDiag, layer_collection=lc)


def test_a_look_for_remedies_leaves_the_model_as_it_was():
    torch.manual_seed(0)
    model, x = Net(Encoder()), torch.randn(5, T, 2)
    state, random = {k: t.clone() for k, t in model.state_dict().items()}, torch.get_rng_state()
    refused(model, x)
    assert all(torch.equal(t, state[k]) for k, t in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(m._forward_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


class Towers(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.text = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 3))
        self.image = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 3))

    def forward(self, x):
        return self.text(x) @ self.image(x).T * self.scale


def test_one_of_two_towers():
    model, x = Towers(), torch.randn(5, 2)
    said = refused(model, x, function=model.image)
    assert said.startswith("layer '' (Towers, the model itself, and 2 more) was never called")
    assert "exclude('', 'text')" in said
    assert "ignore_uncalled=True" in said
    assert "whole" not in said
    every = LayerCollection.from_model(model)
    for lc in (every.exclude("", "text"), LayerCollection.from_model(model, ignore_uncalled=True)):
        check(model, x, lc, function=model.image)


class Backwards(nn.Module):
    """Time first, as in XLNet and recurrent layers without batch_first."""

    def __init__(self):
        super().__init__()
        self.embed, self.inner, self.head = nn.Embedding(6, D), nn.Linear(D, D), nn.Linear(D, 3)

    def forward(self, ids):
        return self.head(self.inner(self.embed(ids.T)).tanh().mean(0))


@pytest.mark.parametrize("padding", [None, 2])
def test_examples_along_a_later_axis_of_an_embedding(padding):
    torch.manual_seed(0)
    model, ids = Backwards(), torch.randint(0, 6, (5, T))
    model.embed.padding_idx = padding
    check(model, ids, LayerCollection.from_model(model))


class Norm(nn.Module):
    """Computes in single precision whatever it is given, as in Gemma and Cohere."""

    def __init__(self, cast=torch.Tensor.float):
        super().__init__()
        self.weight, self.cast = nn.Parameter(torch.ones(D)), cast

    def forward(self, x):
        y = self.cast(x)
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (y * (1 + self.cast(self.weight))).type_as(x)


@pytest.mark.parametrize("body", [Norm, lambda: nn.Sequential(nn.Tanh(), Norm())])
def test_a_layer_that_computes_in_single_precision(body):
    torch.manual_seed(0)
    model, x = Net(body()), torch.randn(7, 200, 2)
    message = r"layer '.*' \(\w+\).* in torch.float32, .* torch.float64: cast model and data to torch.float32.*Implicit"
    with pytest.raises(NotImplementedError, match=message):
        FIM(model, x, PMatDiag)
    lc = LayerCollection.from_model(model)
    truth = fisher(model(x), lc.parameters(model))
    v = PVector(layer_collection=lc, vector_repr=torch.randn(lc.numel()))
    found = FIM(model, x, PMatImplicit).mv(v).to_torch()
    torch.testing.assert_close(found, truth @ v.to_torch(), rtol=1e-4, atol=1e-6)
    single = FIM(model.float(), x.float(), PMatDiag).get_diag()
    torch.testing.assert_close(single.double(), truth.diag(), rtol=1e-4, atol=1e-6)


class Low(nn.Linear):
    """Casts by itself."""

    def forward(self, x):
        return F.linear(x.bfloat16(), self.weight.bfloat16(), self.bias.bfloat16()).float()


def test_casts_to_half_precision_in_the_forward():
    torch.manual_seed(0)
    model, x = nn.Sequential(Low(2, D), nn.Tanh(), nn.Linear(D, 3)).float(), torch.randn(50, 2).float()
    with pytest.raises(NotImplementedError, match=r"layer '0'.*bfloat16.*autocast out of the forward, or use PMatImpl"):
        FIM(model, x, PMatDiag)


def test_autocast_in_the_forward():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(2, D), nn.Tanh(), nn.Linear(D, 3)).float(), torch.randn(50, 2).float()

    def cast(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(x).float()

    truth = FIM(model, x, PMatDense).mv(v := PVector.from_model(model).clone().detach()).to_torch()
    torch.testing.assert_close(FIM(model, x, PMatImplicit, function=cast).mv(v).to_torch(), truth, rtol=0.1, atol=0.01)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # what it keeps of weights is no hindrance
        around = FIM(model, x, PMatImplicit).mv(v).to_torch()
        model(x)
        again = FIM(model, x, PMatImplicit).mv(v).to_torch()
    torch.testing.assert_close(around, truth, rtol=0.1, atol=0.01)
    torch.testing.assert_close(again, around)


def test_a_forward_that_mixes_dtypes_is_not_blamed_on_the_minibatch():
    class Mixing(Norm):
        def forward(self, x):
            return super().forward(x).float()

    model = nn.Sequential(nn.Linear(2, D), Mixing(), nn.Linear(D, 3))
    with pytest.raises(ValueError, match=r"forward pass of the model mixes dtypes.*cast back to torch.float64"):
        FIM(model, torch.randn(5, 2), PMatDiag)


class Output(OrderedDict):
    def __getattr__(self, key):
        try:
            return self[key]
        except KeyError:
            raise AttributeError(key) from None


class Returning(nn.Module):
    def __init__(self, made):
        super().__init__()
        self.linear, self.made = nn.Linear(2, 3), made

    def forward(self, x):
        return self.made(self.linear(x))


@pytest.mark.parametrize(
    ("made", "part"),
    [
        (lambda f: Output(loss=f.sum(), hidden=f, logits=f), ".logits"),
        (lambda f: Output(scores=f), ".scores"),
        (lambda f: {"out": f, "n": 3}, "['out']"),
        (lambda f: (f.sum(), f), "[1]"),
        (lambda f: [f], "[0]"),
    ],
)
@pytest.mark.parametrize("mapping", [False, True])
def test_a_model_that_returns_more_than_a_tensor(made, part, mapping):
    model, x = Returning(made), torch.randn(5, 2)
    batch, call = ({"x": x}, "lambda batch: model(**batch)") if mapping else (x, "lambda *batch: model(batch[0])")
    function = (lambda batch: model(**batch)) if mapping else None
    with pytest.raises(TypeError, match=re.escape(f"function={call}{part}")) as error:
        FIM(model, batch, PMatDiag, function=function)
    named = eval(re.search("function=(lambda.*)", str(error.value))[1], {"model": model})  # what it says, as it is
    FIM(model, batch, PMatDiag, function=named)


def test_a_model_that_returns_nothing_of_use():
    with pytest.raises(TypeError, match="the model returned a NoneType, not a tensor: pass a function= that returns"):
        FIM(Returning(lambda f: None), torch.randn(5, 2), PMatDiag)
