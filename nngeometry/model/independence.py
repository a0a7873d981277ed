"""Models that keep examples apart by construction: modules of torch in a row, each of which treats rows one by one."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from functools import cache
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as hooks

#: From a module and how many axes its input has to how many its output has, each row of which is a function of the same
#: row of the input; None if rows (the first axis) need not be apart.
Rule = Callable[[Any, int], int | None]

#: For each type the rule, and the forward that it is about.
_RULES: dict[type[nn.Module], tuple[Rule, Any]] = {}


def called_apart(model: nn.Module, axes: int) -> list[nn.Module] | None:
    """The modules that a model calls, in order, if their types tell that it treats every row of its input, which has so
    many axes, by itself and the same; None if they do not.

    >>> net = nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
    >>> called_apart(net, axes=3) == [net, *net]
    True
    >>> called_apart(net, axes=2)  # a convolution takes that for one example
    """
    called: list[nn.Module] = []
    now: int | None = axes if axes > 0 else None
    fresh = False  # whether what is passed on is not the user's input, or a view of it
    for module in _in_a_row(model):
        rule, forward = _RULES.get(type(module), (None, None))
        known = rule is not None and type(module).forward is forward and not altered(module)
        now = rule(module, now) if known and now is not None else None  # type: ignore[misc]
        if now is None or (not fresh and vars(module).get("inplace")):
            return None
        fresh = fresh or type(module) not in _VIEWS
        called.append(module)
    return None if _hooked_everywhere() else called


def _in_a_row(module: nn.Module) -> Iterator[nn.Module]:
    yield module
    if type(module) is nn.Sequential:
        for child in module:
            yield from _in_a_row(child)


#: Attributes of every module, none of which is a tensor.
_ATTRIBUTES = frozenset(vars(nn.Module()))


def altered(module: nn.Module) -> bool:
    """Whether one module may compute something else than its type: through hooks, attributes in place of methods and
    parameters, or parts that its type does not have.
    """
    own, of = vars(module), type(module)
    if own["_forward_pre_hooks"] or own["_forward_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return True
    if not own.keys().isdisjoint(_names(of)):  # type: ignore[arg-type]
        return True
    if any(isinstance(own[name], Tensor) for name in own.keys() - _ATTRIBUTES):
        return True
    if any(b is not None and b.requires_grad for b in own["_buffers"].values()):
        return True
    if own["_parameters" if of is nn.Sequential else "_modules"]:
        return True
    return any(p is not None and type(p) is not nn.Parameter for p in own["_parameters"].values())


@cache
def _names(of: Hashable) -> frozenset[str]:
    """Methods and other attributes of a class, which no instance should have of its own."""
    return frozenset(dir(of))


def _hooked_everywhere() -> bool:
    return bool(
        hooks._global_forward_pre_hooks
        or hooks._global_forward_hooks
        or hooks._global_backward_hooks
        or hooks._global_backward_pre_hooks
    )


_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
#: Modules that may return what they are given, or a view of it.
_VIEWS = (nn.Sequential, nn.Identity, nn.Flatten, nn.Unflatten, *_DROPOUTS)


def _rule(*types: type[nn.Module]) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        _RULES.update({t: (rule, t.forward) for t in types})
        return rule

    return register


@_rule(
    *(nn.Sequential, nn.Identity, *_DROPOUTS),
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.Softsign),
    *(nn.Sigmoid, nn.LogSigmoid, nn.Tanh, nn.Tanhshrink, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.Hardshrink),
    *(nn.Softshrink, nn.Threshold),
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.LPPool1d, nn.LPPool2d, nn.LPPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
)
def _same(module: nn.Module, axes: int) -> int | None:
    return axes


@_rule(
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
)
def _max_pool(module: Any, axes: int) -> int | None:
    return None if module.return_indices else axes


@_rule(nn.Linear, nn.PReLU, nn.GroupNorm)
def _has_features(module: nn.Module, axes: int) -> int | None:
    return axes if axes >= 2 else None


@_rule(nn.LayerNorm, nn.RMSNorm)
def _last_axes(module: Any, axes: int) -> int | None:
    return axes if axes > len(module.normalized_shape) else None


@_rule(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
def _fixed_statistics(module: Any, axes: int) -> int | None:
    return axes if axes >= 2 and not module.training and module.running_mean is not None else None


def _spatial(axes_of_one: int) -> Rule:
    """With fewer axes the input is taken for one example."""
    return lambda module, axes: axes if axes == axes_of_one + 1 else None


def _own_statistics(axes_of_one: int) -> Rule:
    """In train mode, running ones would change."""

    def rule(module: Any, axes: int) -> int | None:
        writes = module.training and module.running_mean is not None
        return axes if axes == axes_of_one + 1 and not writes else None

    return rule


_rule(nn.Conv1d, nn.ConvTranspose1d)(_spatial(2))
_rule(nn.Conv2d, nn.ConvTranspose2d)(_spatial(3))
_rule(nn.Conv3d, nn.ConvTranspose3d)(_spatial(4))
_rule(nn.InstanceNorm1d)(_own_statistics(2))
_rule(nn.InstanceNorm2d)(_own_statistics(3))
_rule(nn.InstanceNorm3d)(_own_statistics(4))


@_rule(nn.Embedding)
def _embedding(module: nn.Embedding, axes: int) -> int | None:
    return axes + 1 if module.max_norm is None else None


@_rule(nn.Flatten)
def _flatten(module: nn.Flatten, axes: int) -> int | None:
    start, end = module.start_dim % axes, module.end_dim % axes
    return axes - (end - start) if 1 <= start <= end else None


@_rule(nn.Unflatten)
def _unflatten(module: nn.Unflatten, axes: int) -> int | None:
    dim = module.dim
    return axes + len(module.unflattened_size) - 1 if isinstance(dim, int) and dim % axes >= 1 else None


@_rule(nn.Softmax, nn.LogSoftmax)
def _softmax(module: Any, axes: int) -> int | None:
    return axes if module.dim is not None and module.dim % axes >= 1 else None
