"""All tensors of a model at one moment, to be put in their places again later."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from ..changes import alone, other_tensors
from .entries import stored

WRITES_WEIGHTS = (
    "the forward pass of the model writes into its parameters, so its output depends on the calls before: leave them "
    "alone in the forward pass"
)


class Weights:
    """Copies of the parameters and buffers of a model as they are now.

    modules: whose, the model and what else takes part, a loss. wanted: the parameters in which derivatives are taken;
    their copies are leaves of autograd, all others are constants.

    >>> model = nn.Linear(2, 1)
    >>> weights = Weights([model], [model.weight])
    >>> _ = nn.init.zeros_(model.weight)
    >>> from nngeometry.changes import Borrowed
    >>> with Borrowed(weights.in_place):
    ...     bool(model.weight.any())
    True
    >>> bool(model.weight.any())
    False
    """

    @alone
    def __init__(self, modules: Sequence[nn.Module], wanted: Sequence[Tensor]) -> None:
        chosen = {id(p) for p in wanted}
        self._tops = list(modules)
        self._modules = self._present()
        #: Where modules hold their tensors.
        self._places: list[tuple[dict[str, Any], str, Tensor]] = [
            (held, name, t)
            for top in modules
            for module in top.modules()
            for held in _held(module)
            for name, t in held.items()
            if t is not None and not _computed(t)
        ]
        theirs = {id(t): t for _, _, t in self._places}
        theirs.update((id(p), p) for p in wanted)
        self._theirs = list(theirs.values())
        copies = {key: t.detach().clone().requires_grad_(key in chosen) for key, t in theirs.items()}
        self._ours = list(copies.values())
        self._wanted = {id(p): k for k, p in enumerate(wanted)}
        self._parameters = list(wanted)
        self._leaves = [copies[id(p)] for p in wanted]
        self._inside = 0
        #: The values of the wanted parameters, and where gradients in them arrive, whoever holds them.
        self.values = [leaf.detach() for leaf in self._leaves]
        self.edges = [get_gradient_edge(leaf) for leaf in self._leaves]

    def in_place(self) -> Callable[[], Any]:
        """A change: the model at these; once, however often it is made inside of itself."""
        take_back = self.moved(self._leaves)() if self._inside == 0 else None
        self._inside += 1
        _active.append(self)

        def undo() -> None:
            self._inside -= 1
            _active.pop()
            if take_back is not None:
                take_back()

        return undo

    def moved(
        self, leaves: Sequence[Tensor], cast: Callable[[Tensor], Tensor] | None = None
    ) -> Callable[[], Callable[[], Any]]:
        """A change: the model at these, with other tensors for the wanted parameters. cast: what becomes of others."""
        ours = list(self._ours) if cast is None else list(map(cast, self._ours))
        for k, t in enumerate(self._theirs):
            if id(t) in self._wanted:
                ours[k] = leaves[self._wanted[id(t)]]
        swap = other_tensors(self._theirs, ours)

        def change() -> Callable[[], Any]:
            if self._present() != self._modules:
                raise ValueError(
                    "the model has other modules than when this was made of it (a parametrisation, a layer put in or "
                    "taken out): make it again"
                )
            # Modules may have got other parameters in the meantime.
            replaced = [
                (held, name, t, held.get(name, _ABSENT)) for held, name, t in self._places if held.get(name) is not t
            ]
            for held, name, t, _ in replaced:
                held[name] = t
            take_back = swap()

            def undo() -> None:
                take_back()
                for held, name, t in self._places:  # the forward pass may have put in others
                    if held.get(name) is not t:
                        held[name] = t
                for held, name, _, other in replaced:
                    if other is _ABSENT:
                        del held[name]
                    else:
                        held[name] = other

            return undo

        return change

    def replaced(self) -> bool:
        """Whether something has put other parameters in their places."""
        return any(held.get(name) is not t for held, name, t in self._places if isinstance(t, nn.Parameter))

    def check(self, marks: list[float] | None = None) -> None:
        """Raise if a forward pass has written into the parameters or put others in their place. marks: of before, if
        they are to be compared.
        """
        if self.replaced() or (marks is not None and repr(marks) != repr(self.marks())):
            raise ValueError(WRITES_WEIGHTS)

    def _present(self) -> list[tuple[int, type]]:
        return [(id(module), type(module)) for top in self._tops for module in top.modules()]

    def marks(self) -> list[float]:
        """Sums over all copies with weights that are alike nowhere, by which one sees whether something has written
        into them: one for each dtype and device.
        """
        holders = self._theirs if self._inside else self._ours
        like: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for entries in chain.from_iterable(map(stored, holders)):
            if entries.is_floating_point():
                like.setdefault((entries.dtype, entries.device), []).append(entries)
        return [_mark(tensors, *key) for key, tensors in like.items()]

    def check_reached(self, nodes: Iterable[Any], wanted: Sequence[Tensor], name_of: Callable[[Tensor], str]) -> None:
        """Raise, naming it, if a graph that was recorded of the copies goes to a parameter of the model itself: through
        a tensor that was computed from it before, of which the derivative would be missed.

        wanted: the parameters. name_of: how one is called.
        """
        known = {id(p): p for p in wanted}
        for weights in _active:  # while their copies are in place, these hold what is the model's
            known.update(zip(map(id, weights._leaves), weights._parameters, strict=True))
        for node in nodes:
            if type(node).__name__ == "AccumulateGrad" and id(node.variable) in known:
                name = name_of(known[id(node.variable)])
                raise ValueError(
                    f"layer {name.rpartition('.')[0]!r}: its parameters also act outside of its forward: {name!r} "
                    "through a tensor that was computed from it before the call (a stored transpose, a cached "
                    "product), whose derivative is not seen. Compute that in the forward, or leave the layer out with "
                    "LayerCollection.exclude"
                )


def _held(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    return module._parameters, module._buffers


#: Those whose copies are in place, the last one last.
_active: list[Weights] = []
_ABSENT: Any = object()


def _mark(tensors: Sequence[Tensor], dtype: torch.dtype, device: torch.device) -> float:
    flat = [t.flatten() for t in tensors]
    whole = [len(t) // _ROW * _ROW for t in flat]
    rows = [t[:n].view(-1, _ROW) @ _weights(_ROW, dtype, device) for t, n in zip(flat, whole, strict=True) if n]
    left = [t[n:] for t, n in zip(flat, whole, strict=True)]
    each = torch.cat([*left, *rows]).to(torch.promote_types(dtype, torch.float32))
    return float(each @ _weights(len(each), each.dtype, device))


#: Large tensors are multiplied as matrices with rows of that length.
_ROW = 4096


@lru_cache(8)
def _weights(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.cos(torch.arange(1, size + 1, dtype=torch.float64)).to(dtype).to(device)


def _computed(t: Tensor) -> bool:
    """Whether a buffer is the result of a recorded computation, of which a copy would not be."""
    return t.grad_fn is not None
