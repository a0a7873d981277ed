"""BatchNorm as it is in training: with the statistics of the minibatch at hand, and without a trace in its buffers.

The statistics are either held constant, found once for a whole minibatch (:class:`Statistics`), or those of whatever is
put through the model (:func:`apart_from_buffers`), so that derivatives go through them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from ..changes import Change, Changed, no_grad
from .batch import Opaque

#: ``(where, key, value)``: an entry of a dict of a module.
Entry = tuple[dict[str, Any], str, Any]
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
_ABSENT: Any = object()


def entries(wanted: list[Entry]) -> Change:
    """Other values in the dicts of modules: attributes, buffers."""

    def change() -> Callable[[], Any]:
        before = [(held, key, held.get(key, _ABSENT)) for held, key, _ in wanted]

        def undo() -> None:
            for held, key, value in before:
                if value is _ABSENT:
                    held.pop(key, None)
                else:
                    held[key] = value

        try:
            for held, key, value in wanted:
                held[key] = value
        except BaseException:
            undo()
            raise
        return undo

    return change


def mixing_norms(model: nn.Module) -> Iterator[tuple[str, _BatchNorm]]:
    """The batch norms that use the statistics of the batch as the model is now."""
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            yield name, module


def held_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """The batch norms that are given the statistics of the minibatch: of a model in train mode those that use them in
    it, of one in eval mode all.
    """
    if model.training:
        return dict(mixing_norms(model))
    return {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}


def _instance_norms(model: nn.Module) -> dict[str, _InstanceNorm]:
    """Those that use the statistics of each example in training, and keep running ones for afterwards."""
    return {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, _InstanceNorm) and m.running_mean is not None and (m.training or not model.training)
    }


def as_in_training(model: nn.Module, held: bool) -> list[str]:
    """The names of the norms that are as in training, with their statistics held constant or not."""
    if held:
        return [*held_norms(model), *_instance_norms(model)]
    norms = _BatchNorm | _InstanceNorm
    return [name for name, module in model.named_modules() if isinstance(module, norms) and module.training]


def rate_of_dropout(module: nn.Module) -> tuple[str, float]:
    """The attribute with the rate at which a module drops units in train mode, and the rate: zero if it drops none."""
    name = "p" if isinstance(module, nn.modules.dropout._DropoutNd) else "dropout"
    rate = getattr(module, name, 0.0)
    return name, rate if isinstance(rate, float) and module.training else 0.0


def _common(model: nn.Module) -> list[Entry]:
    """The model as in training but for its batch norms and without dropout."""
    wanted: list[Entry] = []
    for norm in _instance_norms(model).values():
        wanted += [(vars(norm), "training", True), *((norm._buffers, name, None) for name in _BUFFERS[:2])]
    for module in model.modules():
        name, rate = rate_of_dropout(module)
        if rate > 0 and name in vars(module):
            wanted.append((vars(module), name, 0.0))
    return wanted


def _own_buffers(module: Any) -> list[Entry]:
    """Copies in the place of what a norm in train mode writes into."""
    kept = [(name, module._buffers.get(name)) for name in _BUFFERS]
    return [(module._buffers, name, b.detach().clone()) for name, b in kept if b is not None]


def apart_from_buffers(model: nn.Module) -> Change:
    """Copies of the buffers that norms in train mode write into, which are otherwise as they are."""

    def change() -> Callable[[], Any]:
        norms = [m for m in model.modules() if isinstance(m, _BatchNorm | _InstanceNorm) and m.training]
        return entries([entry for module in norms for entry in _own_buffers(module)])()

    return change


class Found(NamedTuple):
    """The statistics of one norm: the mean and the biased variance of each channel."""

    module: _BatchNorm
    mean: Tensor
    var: Tensor

    def entries(self) -> list[Entry]:
        """What makes the norm one with these statistics, in the precision that it is in now."""
        like = next((t for t in (self.module.running_mean, self.module.weight) if t is not None), self.mean)
        stats = (("running_mean", self.mean), ("running_var", self.var))
        return [(vars(self.module), "training", False), *((self.module._buffers, k, t.to(like)) for k, t in stats)]


class Uncalled(NamedTuple):
    """A norm that was not called for the whole minibatch."""

    module: _BatchNorm
    name: str

    def entries(self) -> list[Entry]:
        """What makes the norm one that cannot be called."""
        return [(vars(self.module), "forward", self._refuse)]

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            f"layer {self.name!r} ({type(self.module).__name__}) is called for some of the examples of a minibatch but "
            "not for all of them together, so it has no batch statistics: leave batch_statistics out and call "
            "model.eval()"
        )


#: A norm in one minibatch.
Norm = Found | Uncalled


class Statistics(Opaque):
    """The statistics of one minibatch, found when they are first asked for, at the parameters as they then are.

    model, function: what is put through. find: from the minibatch to its statistics. batch: the whole minibatch.
    """

    def __init__(self, model: nn.Module, function: Any, find: Callable[[Any], list[Norm]], batch: Any) -> None:
        self.model, self.function = model, function
        self._find = find
        self._batch = batch
        self._found: list[Norm] | None = None
        self._common: list[Entry] = []

    def settled(self) -> Statistics:
        """Itself, with the statistics found."""
        if self._found is None:
            self._found, self._common, self._batch = self._find(self._batch), _common(self.model), None
        return self

    def in_place(self) -> Callable[[], Any]:
        """A change: the model as in training, with these statistics, which are constants, and without dropout."""
        assert self._found is not None
        return entries([*self._common, *(entry for found in self._found for entry in found.entries())])()


def found_in(model: nn.Module, run: Callable[[], Any]) -> tuple[list[Norm], Any]:
    """The statistics of a minibatch, and what the model returns for it in training without dropout.

    run: puts the minibatch through the model.
    """
    norms = held_norms(model)
    found: dict[str, list[Found]] = {name: [] for name in norms}

    def hook(name: str) -> Callable[..., None]:
        def see(module: Any, args: Any, kwargs: Any) -> None:
            x = args[0] if args else kwargs["input"]
            if isinstance(x, Tensor) and x.ndim > 1:
                found[name].append(_statistics(name, module, x))

        return see

    wanted = _common(model)
    for module in norms.values():
        wanted += [(vars(module), "training", True), *_own_buffers(module)]
    watched = [_before(module, hook(name)) for name, module in norms.items()]
    with Changed(entries(wanted), *watched):
        output = run()
    return [_one(name, norms[name], seen) for name, seen in found.items()], output


def computes_otherwise(found: list[Norm]) -> str:
    """The names of the types of norms that have a forward of their own, of which one cannot know what it does."""
    plain = _BatchNorm.forward
    return ", ".join(sorted({type(f.module).__name__ for f in found if type(f.module).forward is not plain}))


def _before(module: nn.Module, hook: Callable[..., None]) -> Change:
    return lambda: module.register_forward_pre_hook(hook, with_kwargs=True).remove


def _statistics(name: str, module: _BatchNorm, x: Tensor) -> Found:
    if x.numel() == x.shape[1]:
        raise ValueError(
            f"layer {name!r} ({type(module).__name__}): the minibatch has one value for each channel, of which there "
            "are no batch statistics: use larger minibatches (DataLoader(drop_last=True) leaves out a last one that is "
            "smaller), or leave batch_statistics out and call model.eval()"
        )
    with no_grad():
        x = x.detach()
        x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        var, mean = torch.var_mean(x, [k for k in range(x.ndim) if k != 1], correction=0)
    return Found(module, mean, var)


def _one(name: str, module: _BatchNorm, seen: list[Found]) -> Norm:
    """The statistics of a norm, of which there must be one set for each minibatch."""
    if not seen:
        return Uncalled(module, name)
    first = seen[0]
    if any(not torch.equal(first.mean, f.mean) or not torch.equal(first.var, f.var) for f in seen[1:]):
        raise NotImplementedError(
            f"layer {name!r} ({type(module).__name__}) is called {len(seen)} times for a minibatch, with other "
            "statistics each time, of which batch_statistics=True can hold one set: give each call a norm of its own, "
            'use unit="minibatch", or leave batch_statistics out and call model.eval()'
        )
    return first
