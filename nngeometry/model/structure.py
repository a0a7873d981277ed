"""What a model is apart from the values of its tensors, so that one sees whether it is still what was looked at."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as hooks

#: Of every module, what changes without any change of what it computes.
_NOT_ITS_OWN = frozenset(("_parameters", "_buffers", "_modules", "_is_full_backward_hook", "_compiled_call_impl"))
#: Containers are looked into up to so many entries, and so deep.
_SMALL, _DEEP = 64, 3
_PLAIN = (bool, int, float, complex, str, bytes, type(None))


class Structure:
    """The modules of a model, their types, plain attributes, modes and hooks, as they are now.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    >>> before = Structure(model)
    >>> before.same(Structure(model))
    True
    >>> before.same(Structure(model.eval()))
    False
    """

    def __init__(self, model: nn.Module) -> None:
        self._found: list[Any] = []
        for module in model.modules():
            of = type(module)
            self._found += (module, of, of.forward, len(module._parameters), len(module._modules))
            for name, value in vars(module).items():
                if name not in _NOT_ITS_OWN:
                    self._found.append(name)
                    self._note(value)
        for everywhere in (hooks._global_forward_pre_hooks, hooks._global_forward_hooks):
            self._note(everywhere)

    def _note(self, value: Any, depth: int = 0) -> None:
        """An attribute: small containers by what they hold, so that a change inside of them is seen."""
        small = isinstance(value, dict | list | tuple) and len(value) <= _SMALL and depth < _DEEP
        self._found.append(len(value) if small else value)
        if small and isinstance(value, dict):
            self._found += value.keys()
        for held in (value.values() if isinstance(value, dict) else value) if small else ():
            self._note(held, depth + 1)

    def same(self, other: Structure) -> bool:
        """Whether two are alike: plain values by what they are, all else by identity."""
        return len(self._found) == len(other._found) and all(map(_same, self._found, other._found))


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if type(a) is type(b) and isinstance(a, _PLAIN):
        return bool(a == b)
    # Tensors that are made anew are values, not structure.
    return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape
