"""The market of models: every kind of layer, in every way that it is used, in nets of a few hundred parameters."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from extensions.adapter import Adapter
from oracle import randomise
from torch import nn
from torch.nn.utils import parametrizations

from nngeometry import layers


@dataclass
class Case:
    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Any, ...] | dict[str, Any]]
    function: Callable[[nn.Module], Callable[..., Any]] | None = None
    expected_warning: str | None = field(default=None)

    def make(self, n: int = 4):
        """The model in eval mode with generic parameters, one minibatch, and the function of a minibatch (or None)."""
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the old weight_norm is deprecated, and used
            model = randomise(self.build())
        torch.manual_seed(1)
        batch = self.inputs(n)
        return model, batch, None if self.function is None else self.function(model)


class MeanPool(nn.Module):
    """Mean over all axes but the first and ``dim``."""

    def __init__(self, dim=1):
        super().__init__()
        self.dim = dim

    def forward(self, x):
        return x if x.ndim == 2 else x.movedim(self.dim, 1).flatten(2).mean(2)


class Take(nn.Module):
    """The first output of a layer that returns several, made a row for each example."""

    def __init__(self, inner, sequence_first=False):
        super().__init__()
        self.inner, self.sequence_first = inner, sequence_first

    def forward(self, x):
        y = self.inner(x)[0]
        y = y.transpose(0, 1) if self.sequence_first else y
        return torch.tanh(y).mean(1)


class SelfAttention(nn.Module):
    def __init__(self, batch_first=True, **options):
        super().__init__()
        self.batch_first = batch_first
        self.attention = nn.MultiheadAttention(4, 2, batch_first=batch_first, **options)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        if not self.batch_first:
            x = x.transpose(0, 1)
        y, _ = self.attention(x, x, x)
        y = y if self.batch_first else y.transpose(0, 1)
        return self.head(torch.tanh(y).mean(1))


class SequenceFirst(nn.Module):
    """Layers that see (T, n, d)."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(3)
        self.linear = nn.Linear(3, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        y = torch.tanh(self.linear(self.norm(x.transpose(0, 1))))
        return self.head(y.mean(0))


class ClsToken(nn.Module):
    """Bare parameters on a container with children, one of which scales a branch."""

    def __init__(self):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.scale = nn.Parameter(torch.ones(4))
        self.embed = nn.Linear(3, 4)
        self.mix = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), self.embed(x)], 1)
        x = x + self.scale * torch.tanh(self.mix(x.cumsum(1)))
        return self.head(torch.tanh(x).mean(1))


class Positions(nn.Module):
    """Token and position embeddings; the positions have no axis of examples."""

    def __init__(self, one_d=False):
        super().__init__()
        self.tokens = nn.Embedding(7, 4, padding_idx=0)
        self.positions = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 3)
        self.one_d = one_d

    def forward(self, ids):
        where = torch.arange(ids.shape[1])
        where = where if self.one_d else where.unsqueeze(0)
        return self.head(torch.tanh(self.tokens(ids) + self.positions(where)).mean(1))


class Shared(nn.Module):
    """A module that is called three times."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.again = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)

    def forward(self, x):
        x = self.first(x)
        for _ in range(3):
            x = torch.tanh(self.norm(self.again(x)))
        return x


class Tied(nn.Module):
    """Embedding and head with one weight; the head has a bias of its own."""

    def __init__(self, bias=True):
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.mix = nn.Linear(4, 4)
        self.head = nn.Linear(4, 6, bias=bias)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.mix(self.embed(ids))).mean(1))


class TiedLinears(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.b = nn.Linear(3, 3)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.bilinear = nn.Bilinear(3, 2, 4)
        self.out = nn.Linear(4, 2)

    def forward(self, x, z):
        return self.out(torch.tanh(self.bilinear(x, z)))


class DictModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.linear = nn.Linear(2, 3)
        self.out = nn.Linear(3, 3)

    def forward(self, ids, features):
        return self.out(torch.tanh(self.embed(ids) + self.linear(features)))


class Custom(nn.Module):
    """A user's own layer with odd parameters, computed in its own way."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.ones(3, 2))
        self.b = nn.Parameter(torch.ones(()))
        self.inner = nn.Linear(2, 2)

    def forward(self, x, power=2):
        return (self.inner(x @ self.a) ** power) * self.b + x[..., :2].exp()


class Linear(nn.Module):  # named like the torch class on purpose
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 3))
        self.bias = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return torch.sin(x @ self.weight.T) * self.bias


class SubLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x) ** 2 + x.mean(-1, keepdim=True)


class Windows(nn.Module):
    """Layers that see (n * windows, ...)."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(2, 3, 2)
        self.norm = nn.BatchNorm1d(3)
        self.linear = nn.Linear(3, 2)
        self.custom = Linear()

    def forward(self, x):  # (n, 3, 2, 4)
        n = x.shape[0]
        y = self.norm(self.conv(x.reshape(-1, 2, 4)))
        y = self.linear(torch.tanh(y.mean(2)))
        y = self.custom(torch.cat([y, y[:, :1]], 1))
        return y.view(n, -1, 2).mean(1)


class Residual(nn.Module):
    """In-place activations and a dead branch."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(2)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(2, 3)
        self.unused_path = nn.Linear(2, 2)

    def forward(self, x):
        y = self.relu(self.bn(self.conv(x)))
        y = self.relu(self.bn(self.conv(y)) + x)
        self.unused_path(y.mean((2, 3)))
        return self.head(y.mean((2, 3)))


class NoVmap(nn.Module):
    """A module whose value depends on the data in a way that cannot be vectorised."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(3))

    def forward(self, x):
        scale = 2.0 if float(x.detach().abs().sum()) > 0 else 3.0
        return x * self.w * scale


class NoVmapNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 3)
        self.odd = NoVmap()

    def forward(self, x):
        return torch.tanh(self.odd(self.linear(x)))


def _image(c, *size):
    return lambda n: (torch.randn(n, c, *size),)


def _net(*modules, dim=1):
    """A net that ends in three outputs whatever its body."""
    return lambda: nn.Sequential(*(m() for m in modules), nn.Tanh(), MeanPool(dim), nn.LazyLinear(3))


def _with_lazy(case: Case) -> Case:
    build = case.build

    def built():
        model = build()
        inputs = case.inputs(2)
        with torch.no_grad():
            if isinstance(inputs, dict):
                model(**inputs)
            else:
                model(*inputs)
        return model

    return Case(case.name, built, case.inputs, case.function, case.expected_warning)


def _conv(cls, *args, **options):
    return lambda: cls(*args, **options)


_CONVS = {
    "conv1d": (_conv(nn.Conv1d, 2, 3, 3, stride=2), (2, 7)),
    "conv2d": (_conv(nn.Conv2d, 2, 3, (2, 3), padding=(1, 2), bias=False), (2, 4, 5)),
    "conv2d-groups": (_conv(nn.Conv2d, 4, 6, 3, groups=2, stride=2, padding=1), (4, 5, 5)),
    "conv2d-depthwise": (_conv(nn.Conv2d, 3, 6, 3, groups=3), (3, 4, 4)),
    "conv2d-dilation": (_conv(nn.Conv2d, 2, 3, 2, dilation=(2, 1)), (2, 5, 4)),
    "conv2d-same": (_conv(nn.Conv2d, 2, 3, (2, 3), padding="same"), (2, 4, 4)),
    "conv2d-valid": (_conv(nn.Conv2d, 2, 3, 2, padding="valid"), (2, 4, 4)),
    "conv2d-reflect": (_conv(nn.Conv2d, 2, 3, 3, padding=(1, 2), padding_mode="reflect"), (2, 4, 4)),
    "conv2d-replicate": (_conv(nn.Conv2d, 2, 2, 3, padding=1, padding_mode="replicate", groups=2), (2, 3, 3)),
    "conv2d-circular": (_conv(nn.Conv2d, 2, 3, 3, padding="same", padding_mode="circular"), (2, 4, 4)),
    "conv3d": (_conv(nn.Conv3d, 2, 2, 2, padding=1, stride=(1, 2, 1)), (2, 2, 3, 2)),
    "convt1d": (_conv(nn.ConvTranspose1d, 2, 3, 3, stride=2, padding=1, output_padding=1), (2, 4)),
    "convt2d": (_conv(nn.ConvTranspose2d, 2, 3, (2, 3), stride=(2, 1), padding=(0, 1), bias=False), (2, 3, 3)),
    "convt2d-groups": (_conv(nn.ConvTranspose2d, 4, 6, 3, groups=2, dilation=2, padding=3), (4, 4, 4)),
    "convt3d": (_conv(nn.ConvTranspose3d, 1, 2, 2, stride=2), (1, 2, 1, 2)),
}
_NORMS = {
    "batchnorm1d": (lambda: nn.BatchNorm1d(3), (3,)),
    "batchnorm1d-length": (lambda: nn.BatchNorm1d(3), (3, 4)),
    "batchnorm2d": (lambda: nn.BatchNorm2d(3), (3, 2, 2)),
    "batchnorm2d-no-affine": (lambda: nn.BatchNorm2d(3, affine=False), (3, 2, 2)),
    "batchnorm3d": (lambda: nn.BatchNorm3d(2), (2, 2, 1, 2)),
    "instancenorm1d": (lambda: nn.InstanceNorm1d(3, affine=True), (3, 4)),
    "instancenorm2d": (lambda: nn.InstanceNorm2d(3, affine=True, track_running_stats=True), (3, 2, 2)),
    "instancenorm3d": (lambda: nn.InstanceNorm3d(2, affine=True), (2, 2, 1, 2)),
    "groupnorm": (lambda: nn.GroupNorm(2, 4), (4, 3)),
    "layernorm": (lambda: nn.LayerNorm(3), (2, 3)),
    "layernorm-2d": (lambda: nn.LayerNorm((2, 3)), (2, 3)),
    "layernorm-no-bias": (lambda: nn.LayerNorm(3, bias=False), (2, 3)),
    "rmsnorm": (lambda: nn.RMSNorm(3), (2, 3)),
    "affine1d": (lambda: layers.Affine1d(3), (3,)),
    "affine1d-no-bias": (lambda: layers.Affine1d(3, bias=False), (2, 3)),
    "prelu": (lambda: nn.PReLU(), (3, 2)),
    "prelu-channels": (lambda: nn.PReLU(3), (3, 2, 2)),
}
_LINEARS = {
    "linear": (lambda: nn.Linear(3, 4), (3,)),
    "linear-no-bias": (lambda: nn.Linear(3, 4, bias=False), (3,)),
    "linear-sequence": (lambda: nn.Linear(3, 4), (5, 3)),
    "linear-grid": (lambda: nn.Linear(3, 2), (2, 2, 3)),
    "cosine1d": (lambda: layers.Cosine1d(3, 4), (3,)),
    "weightnorm1d": (lambda: layers.WeightNorm1d(3, 4), (3,)),
    "weightnorm2d": (lambda: layers.WeightNorm2d(2, 3, 2), (2, 3, 3)),
    "weight_norm": (lambda: parametrizations.weight_norm(nn.Linear(3, 4)), (3,)),
    "weight_norm-old": (lambda: nn.utils.weight_norm(nn.Linear(3, 4)), (3,)),
    "spectral_norm": (lambda: parametrizations.spectral_norm(nn.Conv1d(2, 3, 2)), (2, 4)),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(3, 3)), (3,)),
    "adapter": (lambda: Adapter(3, 4, 2), (3,)),
    "adapter-sequence": (lambda: Adapter(3, 4, 2), (5, 3)),
    "custom": (Custom, (3,)),
    "named-linear": (Linear, (3,)),
    "sub-linear": (lambda: SubLinear(3, 4), (3,)),
}

CASES = {
    name: _with_lazy(Case(name, _net(make), _image(*size)))
    for name, (make, size) in {**_CONVS, **_NORMS, **_LINEARS}.items()
}
for case in (
    Case("mlp", lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), _image(3)),
    Case(
        "convnet",
        lambda: nn.Sequential(
            nn.Conv2d(1, 3, 3, stride=2, padding=1),
            nn.GroupNorm(3, 3),
            nn.ReLU(inplace=True),
            nn.Conv2d(3, 4, 2),
            nn.BatchNorm2d(4),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(4, 3),
        ),
        _image(1, 4, 4),
    ),
    Case(
        "embedding",
        lambda: nn.Sequential(nn.Embedding(6, 3), nn.Tanh(), MeanPool(2), nn.Linear(3, 3)),
        lambda n: (torch.randint(6, (n, 4)),),
    ),
    Case(
        "embedding-1d",
        lambda: nn.Sequential(nn.Embedding(6, 3), nn.Tanh(), nn.Linear(3, 3)),
        lambda n: (torch.randint(6, (n,)),),
    ),
    Case(
        "embedding-2d-padding",
        lambda: nn.Sequential(nn.Embedding(6, 3, padding_idx=2), nn.Tanh(), MeanPool(3), nn.Linear(3, 3)),
        lambda n: (torch.randint(6, (n, 2, 3)),),
    ),
    Case("attention", SelfAttention, lambda n: (torch.randn(n, 3, 4),)),
    Case("attention-sequence-first", lambda: SelfAttention(batch_first=False), lambda n: (torch.randn(n, 4, 4),)),
    Case("attention-bias-kv", lambda: SelfAttention(add_bias_kv=True), lambda n: (torch.randn(n, 3, 4),)),
    Case("lstm", lambda: Take(nn.LSTM(2, 3, batch_first=True)), lambda n: (torch.randn(n, 3, 2),)),
    Case(
        "gru",
        lambda: Take(nn.GRU(2, 2, bidirectional=True), sequence_first=False),
        lambda n: (torch.randn(n, 3, 2),),
        lambda model: lambda x: model.inner(x.transpose(0, 1))[0].transpose(0, 1).tanh().mean(1),
    ),
    Case(
        "transformer-layer",
        lambda: nn.Sequential(nn.TransformerEncoderLayer(4, 2, 5, batch_first=True), MeanPool(2)),
        lambda n: (torch.randn(n, 3, 4),),
    ),
    Case("sequence-first", SequenceFirst, lambda n: (torch.randn(n, 4, 3),)),
    Case("cls-token", ClsToken, lambda n: (torch.randn(n, 2, 3),)),
    Case("positions", Positions, lambda n: (torch.randint(7, (n, 3)),)),
    Case("positions-1d", lambda: Positions(one_d=True), lambda n: (torch.randint(7, (n, 3)),)),
    Case("shared", Shared, lambda n: (torch.randn(n, 3),)),
    Case("tied", Tied, lambda n: (torch.randint(6, (n, 3)),)),
    Case("tied-no-bias", lambda: Tied(bias=False), lambda n: (torch.randint(6, (n, 3)),)),
    Case("tied-linears", TiedLinears, lambda n: (torch.randn(n, 3),)),
    Case(
        "two-inputs",
        TwoInputs,
        lambda n: (torch.randn(n, 3), torch.randn(n, 2)),
        lambda model: lambda x, z: model(x, z),
    ),
    Case(
        "dict",
        DictModel,
        lambda n: {"ids": torch.randint(5, (n,)), "features": torch.randn(n, 2)},
        lambda model: lambda batch: model(**batch),
    ),
    Case("windows", Windows, lambda n: (torch.randn(n, 3, 2, 4),)),
    Case("residual-inplace", Residual, lambda n: (torch.randn(n, 2, 3, 3),)),
    Case("no-vmap", NoVmapNet, lambda n: (torch.rand(n, 2) * 0.1,), None, "cannot be vectorised"),
):
    CASES[case.name] = case

#: A few of them for tests over a product with many other things.
SMALL = ["mlp", "convnet", "embedding", "conv2d-groups", "tied", "shared"]
