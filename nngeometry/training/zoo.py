"""Networks for small images, of 8 x 8 pixels and more, with any number of channels and classes.

Those of the literature have the published numbers of parameters for images of CIFAR, ``channels=3, size=32``.
``width=`` scales the number of their filters.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import pairwise
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import arguments

__all__ = [
    "all_cnn",
    "densenet",
    "lenet",
    "mlp",
    "preresnet",
    "resnet",
    "resnext",
    "vgg",
    "wide_resnet",
]


def mlp(
    inputs: int = 64,
    hidden: Sequence[int] = (64, 64),
    classes: int = 10,
    *,
    activation: Callable[[], nn.Module] = nn.Tanh,
) -> nn.Sequential:
    """Layers of units, on inputs that are flattened.

    Args:
        inputs: How many numbers an example has.
        hidden: How many units each hidden layer has.
        classes: How many outputs.
        activation: Makes what is between layers.

    Example:
        >>> mlp(64, (10,))(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    widths = [inputs, *hidden]
    for k, (a, b) in enumerate(pairwise(widths), 1):
        layers[f"linear{k}"] = nn.Linear(a, b)
        layers[f"act{k}"] = activation()
    layers["output"] = nn.Linear(widths[-1], classes)
    return nn.Sequential(layers)


def lenet(channels: int = 1, classes: int = 10, size: int = 28) -> nn.Sequential:
    """LeNet-5 with ReLU and max-pooling: for 28 x 28 digits 61706 parameters.

    Source: LeCun, Bottou, Bengio, Haffner (1998), Proceedings of the IEEE 86.
    """
    _size("lenet", size, 8)
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=nn.Conv2d(channels, 6, 5, padding=2),
        act1=nn.ReLU(),
        pool1=nn.MaxPool2d(2),
        conv2=nn.Conv2d(6, 16, 5, padding=0 if size >= 16 else 2),
        act2=nn.ReLU(),
        pool2=nn.MaxPool2d(2),
        flatten=nn.Flatten(),
    )
    side = (size // 2 - (4 if size >= 16 else 0)) // 2
    layers["linear1"], layers["act3"] = nn.Linear(16 * side * side, 120), nn.ReLU()
    layers["linear2"], layers["act4"] = nn.Linear(120, 84), nn.ReLU()
    layers["output"] = nn.Linear(84, classes)
    return nn.Sequential(layers)


#: Numbers of filters, in units of 64; 0 is pooling.
_VGG = {
    11: (1, 0, 2, 0, 4, 4, 0, 8, 8, 0, 8, 8, 0),
    13: (1, 1, 0, 2, 2, 0, 4, 4, 0, 8, 8, 0, 8, 8, 0),
    16: (1, 1, 0, 2, 2, 0, 4, 4, 4, 0, 8, 8, 8, 0, 8, 8, 8, 0),
    19: (1, 1, 0, 2, 2, 0, 4, 4, 4, 4, 0, 8, 8, 8, 8, 0, 8, 8, 8, 8, 0),
}


def vgg(
    depth: int = 16,
    batch_norm: bool = False,
    *,
    channels: int = 3,
    classes: int = 10,
    size: int = 32,
    width: float = 1.0,
    dropout: float = 0.5,
) -> nn.Sequential:
    """VGG for small images: with a head of two hidden layers of 512, as in studies of averages of weights. VGG16 has
    15245130 parameters for ten classes, with BatchNorm 15253578.

    Args:
        depth: 11, 13, 16 or 19.
        batch_norm: Whether there is BatchNorm after each convolution.
        channels: Of the images.
        classes: How many outputs.
        size: Of the images, in pixels; pooling ends where there is one pixel left.
        width: Times the published numbers of filters and units.
        dropout: In the head, 0 for none.

    Example:
        >>> vgg(11, channels=1, size=8, width=0.125)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])

    Source: Simonyan and Zisserman (2015), 1409.1556.
    """
    if depth not in _VGG:
        raise ValueError(f"vgg: depth={depth} is not one of {', '.join(map(str, _VGG))}")
    _size("vgg", size, 1)
    layers: list[nn.Module] = []
    filters = channels
    for units in _VGG[depth]:
        if units == 0:
            if size > 1:
                layers.append(nn.MaxPool2d(2))
                size //= 2
            continue
        out = _scaled(64 * units, width)
        layers.append(nn.Conv2d(filters, out, 3, padding=1))
        if batch_norm:
            layers.append(nn.BatchNorm2d(out))
        layers.append(nn.ReLU())
        filters = out
    hidden = _scaled(512, width)
    head: list[nn.Module] = [nn.Flatten()]
    for inputs in (filters * size * size, hidden):
        head += [nn.Dropout(dropout)] if dropout > 0 else []
        head += [nn.Linear(inputs, hidden), nn.ReLU()]
    head.append(nn.Linear(hidden, classes))
    net = nn.Sequential(OrderedDict(features=nn.Sequential(*layers), classifier=nn.Sequential(*head)))
    for m in net.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.normal_(m.weight, 0, (2 / (m.kernel_size[0] * m.kernel_size[1] * m.out_channels)) ** 0.5)
            assert m.bias is not None
            nn.init.zeros_(m.bias)
    return net


class Residual(nn.Module):
    """``branch(x) + shortcut(x)``, then an activation if there is one."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.branch = branch
        self.shortcut = shortcut
        self.activation = nn.Identity() if activation is None else activation

    def forward(self, x: Tensor) -> Tensor:
        """The sum."""
        return self.activation(self.branch(x) + self.shortcut(x))


class Preactivated(nn.Module):
    """``branch(act(x)) + shortcut``, where the shortcut is of x, or of ``act(x)`` if it is a convolution."""

    def __init__(self, act: nn.Module, branch: nn.Module, shortcut: nn.Module | None, of_x: bool = False) -> None:
        super().__init__()
        self.act = act
        self.branch = branch
        self.shortcut = nn.Identity() if shortcut is None else shortcut
        self.of_x = shortcut is None or of_x

    def forward(self, x: Tensor) -> Tensor:
        """The sum."""
        a = self.act(x)
        return self.branch(a) + self.shortcut(x if self.of_x else a)


class Dense(nn.Module):
    """x, and new channels beside it."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        """``cat(x, branch(x))``."""
        return torch.cat([x, self.branch(x)], 1)


class Mean(nn.Module):
    """The mean over pixels, flattened."""

    def forward(self, x: Tensor) -> Tensor:
        """``(n, channels)``."""
        return F.adaptive_avg_pool2d(x, 1).flatten(1)


def _conv(a: int, b: int, k: int = 3, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(a, b, k, stride=stride, padding=k // 2, groups=groups, bias=False)


def _act(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU())


def _shortcut(a: int, b: int, stride: int) -> nn.Module:
    return nn.Identity() if a == b and stride == 1 else nn.Sequential(_conv(a, b, 1, stride), nn.BatchNorm2d(b))


def resnet(
    depth: int = 18, *, channels: int = 3, classes: int = 10, size: int = 32, width: float = 1.0
) -> nn.Sequential:
    """ResNet with the blocks of the one for large images and a stem of one 3 x 3 convolution: ResNet-18 has 11173962
    parameters for ten classes.

    Args:
        depth: 18, 34 or 50.
        channels: Of the images.
        classes: How many outputs.
        size: Of the images, in pixels.
        width: Times the published numbers of filters.

    Source: He, Zhang, Ren, Sun (2016), 1512.03385.
    """
    blocks = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}
    if depth not in blocks:
        raise ValueError(f"resnet: depth={depth} is not one of {', '.join(map(str, blocks))}")
    _size("resnet", size, 8)
    a = _scaled(64, width)
    stem = nn.Sequential(_conv(channels, a), nn.BatchNorm2d(a), nn.ReLU())
    groups = []
    for k, count in enumerate(blocks[depth]):
        inner, expansion = _scaled(64 * 2**k, width), 4 if depth == 50 else 1
        group = []
        for i in range(count):
            stride = 2 if i == 0 and k > 0 else 1
            b = inner * expansion
            if depth == 50:
                layers = [_conv(a, inner, 1), *_act(inner), _conv(inner, inner, 3, stride), *_act(inner)]
                layers += [_conv(inner, b, 1), nn.BatchNorm2d(b)]
            else:
                layers = [_conv(a, b, 3, stride), *_act(b), _conv(b, b), nn.BatchNorm2d(b)]
            group.append(Residual(nn.Sequential(*layers), _shortcut(a, b, stride), nn.ReLU()))
            a = b
        groups.append(nn.Sequential(*group))
    return _net(stem, groups, [Mean()], a, classes)


def preresnet(
    depth: int = 110, *, channels: int = 3, classes: int = 10, size: int = 32, width: float = 1.0
) -> nn.Sequential:
    """ResNet with activations before convolutions: PreResNet-110 has 1730522 parameters for ten classes, and
    PreResNet-164, of bottlenecks, 1703258.

    Args:
        depth: 20, 56, 110 or 164.
        channels: Of the images.
        classes: How many outputs.
        size: Of the images, in pixels.
        width: Times the published numbers of filters.

    Source: He, Zhang, Ren, Sun (2016), 1603.05027.
    """
    if depth not in (20, 56, 110, 164):
        raise ValueError(f"preresnet: depth={depth} is not one of 20, 56, 110, 164")
    _size("preresnet", size, 4)
    bottleneck = depth == 164
    count = (depth - 2) // (9 if bottleneck else 6)
    a = _scaled(16, width)
    stem = _conv(channels, a)
    groups = []
    for k in range(3):
        inner = _scaled(16 * 2**k, width)
        b = inner * (4 if bottleneck else 1)
        group = []
        for i in range(count):
            stride = 2 if i == 0 and k > 0 else 1
            if bottleneck:
                layers = [_conv(a, inner, 1), *_act(inner), _conv(inner, inner, 3, stride), *_act(inner)]
                layers.append(_conv(inner, b, 1))
            else:
                layers = [_conv(a, b, 3, stride), *_act(b), _conv(b, b)]
            short = None if a == b and stride == 1 else _conv(a, b, 1, stride)
            group.append(Preactivated(_act(a), nn.Sequential(*layers), short))
            a = b
        groups.append(nn.Sequential(*group))
    return _net(stem, groups, [_act(a), Mean()], a, classes)


def wide_resnet(
    depth: int = 28,
    widening: int = 10,
    *,
    channels: int = 3,
    classes: int = 10,
    size: int = 32,
    width: float = 1.0,
    dropout: float = 0.0,
) -> nn.Sequential:
    """Wide ResNet: WRN-28-10 has 36479194 parameters for ten classes.

    Args:
        depth: ``6 n + 4``.
        widening: Times 16, 32 and 64 filters.
        channels: Of the images.
        classes: How many outputs.
        size: Of the images, in pixels.
        width: Times the published numbers of filters.
        dropout: Between the two convolutions of a block.

    Source: Zagoruyko and Komodakis (2016), 1605.07146.
    """
    if depth < 10 or (depth - 4) % 6:
        raise ValueError(f"wide_resnet: depth={depth} is not 10, 16, 22, 28, ...")
    _size("wide_resnet", size, 4)
    a = _scaled(16, width)
    stem = _conv(channels, a)
    groups = []
    for k in range(3):
        b = _scaled(16 * 2**k * widening, width)
        group = []
        for i in range((depth - 4) // 6):
            stride = 2 if i == 0 and k > 0 else 1
            layers: list[nn.Module] = [_conv(a, b, 3, stride), *_act(b)]
            layers += [nn.Dropout(dropout)] if dropout > 0 else []
            layers.append(_conv(b, b))
            short = None if a == b and stride == 1 else _conv(a, b, 1, stride)
            group.append(Preactivated(_act(a), nn.Sequential(*layers), short))
            a = b
        groups.append(nn.Sequential(*group))
    return _net(stem, groups, [_act(a), Mean()], a, classes)


def resnext(
    depth: int = 29,
    cardinality: int = 8,
    group_width: int = 64,
    *,
    channels: int = 3,
    classes: int = 10,
    size: int = 32,
    width: float = 1.0,
) -> nn.Sequential:
    """ResNeXt: for ten classes ResNeXt-29 (8 x 64) has 34426698 parameters.

    Args:
        depth: ``9 n + 2``.
        cardinality: Groups of the convolution in the middle of a block.
        group_width: Filters of a group in the first stage.
        channels: Of the images.
        classes: How many outputs.
        size: Of the images, in pixels.
        width: Times the published numbers of filters.

    Source: Xie et al. (2017), 1611.05431.
    """
    if depth < 11 or (depth - 2) % 9:
        raise ValueError(f"resnext: depth={depth} is not 11, 20, 29, ...")
    _size("resnext", size, 4)
    a = _scaled(64, width)
    stem = nn.Sequential(_conv(channels, a), nn.BatchNorm2d(a), nn.ReLU())
    groups = []
    for k in range(3):
        inner, b = cardinality * _scaled(group_width * 2**k, width), _scaled(256 * 2**k, width)
        group = []
        for i in range((depth - 2) // 9):
            stride = 2 if i == 0 and k > 0 else 1
            layers = [_conv(a, inner, 1), *_act(inner), _conv(inner, inner, 3, stride, cardinality), *_act(inner)]
            layers += [_conv(inner, b, 1), nn.BatchNorm2d(b)]
            group.append(Residual(nn.Sequential(*layers), _shortcut(a, b, stride), nn.ReLU()))
            a = b
        groups.append(nn.Sequential(*group))
    return _net(stem, groups, [Mean()], a, classes)


def densenet(
    depth: int = 100,
    growth: int = 12,
    *,
    channels: int = 3,
    classes: int = 10,
    size: int = 32,
    width: float = 1.0,
) -> nn.Sequential:
    """DenseNet-BC with compression by half: DenseNet-BC-100 with growth 12 has 769162 parameters for ten classes.

    Args:
        depth: ``6 n + 4``.
        growth: How many channels a layer adds.
        channels: Of the images.
        classes: How many outputs.
        size: Of the images, in pixels.
        width: Times the published growth.

    Source: Huang, Liu, van der Maaten, Weinberger (2017), 1608.06993.
    """
    if depth < 10 or (depth - 4) % 6:
        raise ValueError(f"densenet: depth={depth} is not 10, 16, ..., 40, ..., 100, ...")
    _size("densenet", size, 4)
    growth = _scaled(growth, width)
    a = 2 * growth
    stem = _conv(channels, a)
    groups = []
    for k in range(3):
        layers: list[nn.Module] = []
        for _ in range((depth - 4) // 6):
            inner = 4 * growth
            layers.append(Dense(nn.Sequential(*_act(a), _conv(a, inner, 1), *_act(inner), _conv(inner, growth))))
            a += growth
        if k < 2:
            layers += [_act(a), _conv(a, a // 2, 1), nn.AvgPool2d(2)]
            a //= 2
        groups.append(nn.Sequential(*layers))
    return _net(stem, groups, [_act(a), Mean()], a, classes)


def all_cnn(
    *, channels: int = 3, classes: int = 10, size: int = 32, width: float = 1.0, dropout: bool = True
) -> nn.Sequential:
    """All-CNN-C, of convolutions alone: 1369738 parameters for ten classes.

    Args:
        channels: Of the images.
        classes: How many outputs.
        size: Of the images, in pixels.
        width: Times the published numbers of filters.
        dropout: Whether units are dropped at the published rates.

    Source: Springenberg, Dosovitskiy, Brox, Riedmiller (2015), 1412.6806.
    """
    _size("all_cnn", size, 8)
    a, b = _scaled(96, width), _scaled(192, width)
    plan = [(channels, a, 3, 1), (a, a, 3, 1), (a, a, 3, 2), (a, b, 3, 1), (b, b, 3, 1), (b, b, 3, 2)]
    plan += [(b, b, 3, 1), (b, b, 1, 1), (b, classes, 1, 1)]
    layers: list[nn.Module] = [nn.Dropout(0.2)] if dropout else []
    for k, (i, o, kernel, stride) in enumerate(plan):
        layers += [nn.Conv2d(i, o, kernel, stride=stride, padding=kernel // 2), nn.ReLU()]
        if dropout and k in (2, 5):
            layers.append(nn.Dropout(0.5))
    return nn.Sequential(*layers, Mean())


def _net(
    stem: nn.Module, groups: Sequence[nn.Module], end: Sequence[nn.Module], features: int, classes: int
) -> nn.Sequential:
    named = OrderedDict(stem=stem, **{f"group{k}": g for k, g in enumerate(groups, 1)})
    net = nn.Sequential(OrderedDict(**named, end=nn.Sequential(*end), output=nn.Linear(features, classes)))
    for m in net.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.normal_(m.weight, 0, (2 / (prod(m.kernel_size) * m.out_channels)) ** 0.5)
    return net


def _scaled(filters: int, width: float) -> int:
    return max(1, round(filters * arguments.number("width", width, above=0.0)))


def _size(name: str, size: int, least: int) -> None:
    arguments.integer(f"{name}: size", size, least=least)
