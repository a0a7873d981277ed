"""What a model is apart from the values of its tensors, so that one sees whether it is still what was looked at."""

from __future__ import annotations

from collections import OrderedDict
from types import FunctionType, MappingProxyType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

#: Of every module, what changes without any change of what it computes.
_NOT_ITS_OWN = frozenset(("_parameters", "_buffers", "_modules", "_is_full_backward_hook", "_compiled_call_impl"))
#: Containers are looked into up to so many entries, and so deep.
_SMALL, _DEEP = 64, 3
_PLAIN: tuple[type, ...] = (bool, int, float, complex, str, bytes, type(None), torch.Size)
_PLAIN_TYPES = frozenset(_PLAIN)
_DICTS = (dict, OrderedDict)
#: Whose types do not change.
_OTHERS = ("torch", "builtins", "abc", "typing", "collections")
#: What has no attributes of interest, or is noted by itself.
_CLOSED: tuple[type, ...] = (*_PLAIN, nn.Module, type, FunctionType, ModuleType)
_NONE: Any = MappingProxyType({})


class Structure:
    """The modules of a model, their types, plain attributes, modes and hooks, as they are now; also the attributes of
    their types, and those of objects that modules hold (a configuration).

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    >>> before = Structure(model)
    >>> before.same(Structure(model))
    True
    >>> before.same(Structure(model.eval()))
    False
    """

    def __init__(self, model: nn.Module) -> None:
        self._found: list[Any] = []
        self._types: set[type] = set()
        #: Of the objects, each of which is noted once.
        self._objects: set[int] = set()
        for module in model.modules():
            of = type(module)
            self._found += (module, of, of.forward, len(module._parameters), len(module._modules))
            if of not in self._types:
                self._types.add(of)
                self._note_type(of)
            own = vars(module)
            self._found += own
            for name, value in own.items():
                if name in _NOT_ITS_OWN:
                    continue
                if type(value) in _PLAIN_TYPES:
                    self._found.append(value)
                elif type(value) in _DICTS and not value:
                    self._found.append(0)  # as most hooks are
                else:
                    self._note(value)
        for everywhere in (hooks._global_forward_pre_hooks, hooks._global_forward_hooks):
            self._note(everywhere)

    def _note_type(self, of: type) -> None:
        """What a type of the user's has in common for its instances: methods, plain attributes."""
        for base in of.__mro__:
            if base.__module__.partition(".")[0] not in _OTHERS:
                self._found += vars(base).keys()
                for value in vars(base).values():
                    self._note(value, _DEEP - 1)

    def _note(self, value: Any, depth: int = 0) -> None:
        """An attribute: small containers and the objects of a module by what they hold, so that a change inside of them
        is seen; tensors by their shape, since those that are made anew are values and no structure.
        """
        if isinstance(value, Tensor):
            self._found.append(value.shape)
            return
        small = isinstance(value, dict | list | tuple) and len(value) <= _SMALL and depth < _DEEP
        self._found.append(len(value) if small else value)
        if small and isinstance(value, dict):
            self._found += value.keys()
        for held in (value.values() if isinstance(value, dict) else value) if small else ():
            self._note(held, depth + 1)
        if depth == 0 and not small and not isinstance(value, _CLOSED) and id(value) not in self._objects:
            self._objects.add(id(value))
            for name, held in getattr(value, "__dict__", _NONE).items():
                self._found.append(name)
                self._note(held, depth + 1)

    def same(self, other: Structure) -> bool:
        """Whether two are alike: plain values by what they are, all else by identity."""
        return len(self._found) == len(other._found) and all(map(_same, self._found, other._found))


def _same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and isinstance(a, _PLAIN) and bool(a == b))
