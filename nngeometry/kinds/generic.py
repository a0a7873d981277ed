"""The generic kind: any module, exactly, by vectorised vector-Jacobian products of the module itself."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.utils import _pytree as pytree

from ..changes import Borrowed, Change, Changed, entered, recording, uninterrupted, warnings_ignored
from ..derivatives.composites import OneExample
from ..derivatives.pulling import NO_BATCHING_RULE
from ..forms import LayerJacobian, Lazy
from ..model.entries import rows
from ..model.packed import Padded, arguments_packed, is_packed, padded
from ..model.recurrent import recurrent_without_cudnn
from ..model.refused import EXCLUDE, Refused, named
from .kind import whole
from .recurrent import recurrent

# Recurrent layers call a fused kernel on a flat list of weights, which vmap refuses; the loop over examples is exact.
whole(nn.LSTM, nn.GRU, nn.RNN)
_NO_VMAP = (nn.RNNBase, nn.RNNCellBase)
#: Arguments that are not taken apart, but for objects that may hold tensors of all examples.
_PLAIN = (Tensor, str, bool, int, float, complex, type(None), torch.dtype, torch.device)
_CACHES = "switch off what it is given beside tensors (use_cache=False)"


def generic(
    module: nn.Module,
    params: Mapping[str, Tensor],
    inputs: Any,
    axes: Sequence[int | None],
    gys: Sequence[tuple[int, Tensor]],
    name: str,
    dtype: torch.dtype,
) -> LayerJacobian:
    """The Jacobian of a module with respect to ``params``, flat in their order.

    inputs: ``(args, kwargs)`` of the call. axes: for each leaf of ``inputs``, the axis of its examples, None if it
    has none. gys: (leaf of the output, its cotangents ``(C, B, *rest)`` with the axis of examples in front of the
    rest).
    """
    leaves, tree = pytree.tree_flatten(inputs)
    if isinstance(module, nn.RNNBase):
        known = _recurrent(module, params, inputs, axes, gys, dtype)
        if known is not None:
            return known
    # One example is a batch of one: the axis that vmap hides is put back with length one.
    leaves = [x.movedim(a, 0) if a is not None else x for x, a in zip(leaves, axes, strict=True)]
    mapped = tuple(0 if a is not None else None for a in axes)
    cotangents, examples = gys[0][1].shape[:2]
    numel = sum(p.numel() for p in params.values())

    def outputs(p: dict[str, Tensor], xs: Sequence[Any]) -> tuple[Tensor, ...]:
        batch_of_one = [x.unsqueeze(a) if a is not None else x for x, a in zip(xs, axes, strict=True)]
        args, kwargs = arguments_packed(pytree.tree_unflatten(batch_of_one, tree))
        found = functional_call(module, p, args, kwargs, tie_weights=False)
        found = pytree.tree_leaves(found, is_leaf=is_packed)
        return tuple(padded(found[k], g.shape[2:]).reshape(g.shape[2:]) for k, g in gys)

    def one_example(xs: Sequence[Any], gs: tuple[Tensor, ...]) -> Tensor:
        pull = vjp(lambda p: outputs(p, xs), {k: p.detach() for k, p in params.items()})[1]
        (grads,) = vmap(pull)(gs)
        return torch.cat([grads[k].reshape(len(gs[0]), -1) for k in params], 1)  # (C, p)

    def by_loop(xs: Sequence[Any], gs: tuple[Tensor, ...]) -> Tensor:
        leaf = {k: p.detach().clone().requires_grad_() for k, p in params.items()}
        found = []
        with Changed(recording(True)):
            for b in range(gs[0].shape[1]):
                ys = uninterrupted(outputs, leaf, [x[b] if m == 0 else x for x, m in zip(xs, mapped, strict=True)])
                for c in range(len(gs[0])):
                    grads = torch.autograd.grad(
                        ys,
                        list(leaf.values()),
                        [g[c, b] for g in gs],
                        retain_graph=True,
                        allow_unused=True,
                        materialize_grads=True,
                    )
                    found.append(torch.cat([d.flatten() for d in grads]))
        return torch.stack(found).view(-1, len(gs[0]), numel).transpose(0, 1)

    def one_by_one(xs: Sequence[Any], gs: tuple[Tensor, ...]) -> Tensor:
        try:
            return by_loop(xs, gs).to(dtype)
        except (RuntimeError, ValueError, IndexError) as error:
            reason = str(error).strip().splitlines()[0]
            raise Refused(
                [name],
                f"{named(name, module)} does not run on one example alone ({reason}), so its per-example Jacobian is "
                "unknown",
                *([_CACHES] if any(not isinstance(x, _PLAIN) for x in leaves) else []),
                EXCLUDE,
            ) from error

    def vectorised(xs: Sequence[Any], gs: tuple[Tensor, ...]) -> Tensor:
        return vmap(one_example, in_dims=(list(mapped), 1), out_dims=1)(xs, gs).to(dtype)

    def compute(start: int, stop: int, first: int, last: int) -> Tensor:
        xs = [rows(x, start, stop) if m == 0 else x for x, m in zip(leaves, mapped, strict=True)]
        gs = tuple(g[first:last, start:stop] for _, g in gys)
        changes = [_undisturbed(module), warnings_ignored(NO_BATCHING_RULE), entered(OneExample())]
        if gs[0].device.type == "cuda":
            changes.append(entered(recurrent_without_cudnn(module)))
        with Borrowed(*changes):
            if isinstance(module, _NO_VMAP):
                return one_by_one(xs, gs)
            try:
                return uninterrupted(vectorised, xs, gs)
            except RuntimeError as error:
                reason = str(error).strip().splitlines()[0]
            warnings.warn(
                f"layer {name!r} ({type(module).__name__}) cannot be vectorised over examples ({reason}): its Jacobian "
                "is computed one example and one output at a time. nngeometry.kind registers a faster one",
                RuntimeWarning,
                stacklevel=2,
            )
            return one_by_one(xs, gs)

    return Lazy(compute, cotangents, examples, (numel,), dtype, gys[0][1].device)


def _recurrent(
    module: nn.Module,
    params: Mapping[str, Tensor],
    inputs: Any,
    axes: Sequence[int | None],
    gys: Sequence[tuple[int, Tensor]],
    dtype: torch.dtype,
) -> LayerJacobian | None:
    """That of a recurrent module which is called as it is known to be."""
    leaves = pytree.tree_leaves(inputs)
    args, kwargs = inputs
    first = next(iter((*args, *kwargs.values())), None)
    if isinstance(first, Padded):
        x, lengths, *states = leaves
        return recurrent(module, params, [x, *states], [axes[0], *axes[2:]], gys, dtype, lengths)
    return recurrent(module, params, leaves, axes, gys, dtype)


def _undisturbed(module: nn.Module) -> Change:
    """A module called without the user's hooks on it (they see the recorded call already), its plain tensor attributes
    kept.

    The hooks of torch.nn.utils stay: the old weight_norm computes the weight in one, and stores it.
    """

    def change() -> Callable[[], Any]:
        kept = [(m, {k: v for k, v in vars(m).items() if isinstance(v, Tensor)}) for m in module.modules()]
        # Recurrent layers have lists of their parameters, which a substitution changes.
        lists = [
            (m, {k: (held, list(held)) for k in ("_flat_weights", "_flat_weight_refs") if (held := vars(m).get(k))})
            for m in module.modules()
            if isinstance(m, nn.RNNBase)
        ]
        hooks = (module._forward_hooks, module._forward_pre_hooks)
        before = [dict(h) for h in hooks]
        for hook in hooks:
            for key, function in list(hook.items()):
                if not type(function).__module__.startswith("torch.nn.utils"):
                    del hook[key]

        def undo() -> None:
            for hook, all_of_them in zip(hooks, before, strict=True):
                hook.clear()
                hook.update(all_of_them)
            for m, attributes in kept:
                vars(m).update(attributes)
            for m, found in lists:
                for k, (held, items) in found.items():
                    held[:] = items
                    vars(m)[k] = held

        return undo

    return change
