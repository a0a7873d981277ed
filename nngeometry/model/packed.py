"""Packed sequences as padded ones, which have an axis of examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils import _pytree as pytree


class Padded(NamedTuple):
    """Sequences of several lengths, ``(B, T, ...)``, in the order of examples, with zeros behind the end of each."""

    data: Tensor
    lengths: Tensor

    def packed(self) -> PackedSequence:
        """The sequences as a module takes them."""
        return pack_padded_sequence(self.data, self.lengths.cpu(), batch_first=True, enforce_sorted=False)


def sequences(p: PackedSequence, index: Tensor) -> PackedSequence:
    """Some of the sequences that are packed."""
    data, lengths = pad_packed_sequence(p, batch_first=True)
    return Padded(data[index.to(data.device)], lengths[index.cpu()]).packed()


def is_packed(x: Any) -> bool:
    """Whether it is a packed sequence."""
    return isinstance(x, PackedSequence)


def has_packed(tree: Any) -> bool:
    """Whether there is one in arguments or outputs."""
    return any(map(is_packed, pytree.tree_leaves(tree, is_leaf=is_packed)))


def arguments_padded(inputs: Any) -> Any:
    """Arguments of a call with :class:`Padded` in the place of packed sequences."""
    return pytree.tree_map_only(
        PackedSequence, lambda p: Padded(*pad_packed_sequence(p, batch_first=True)), inputs, is_leaf=is_packed
    )


def arguments_packed(inputs: Any) -> Any:
    """The inverse of :func:`arguments_padded`."""
    return pytree.tree_map_only(Padded, Padded.packed, inputs, is_leaf=lambda x: isinstance(x, Padded))


def outputs_padded(output: Any) -> tuple[Any, Callable[[Any], Any]]:
    """What a call returned with padded tensors ``(B, T, ...)`` in the place of packed sequences, and a function that
    packs these as they were.
    """
    leaves, tree = pytree.tree_flatten(output, is_leaf=is_packed)

    def again(padded: Any) -> Any:
        found = [_like(p, y) if is_packed(p) else y for p, y in zip(leaves, pytree.tree_leaves(padded), strict=True)]
        return pytree.tree_unflatten(found, tree)

    return pytree.tree_unflatten([padded(y) for y in leaves], tree), again


def padded(y: Any, shape: Sequence[int] = ()) -> Any:
    """A packed sequence as a padded tensor; what is none as it is. shape: of each, by default as long as the longest
    one.
    """
    return pad_packed_sequence(y, batch_first=True, total_length=shape[0] if shape else None)[0] if is_packed(y) else y


def _like(p: PackedSequence, y: Tensor) -> PackedSequence:
    """Padded sequences, packed as others were."""
    if p.sorted_indices is not None:
        y = y.index_select(0, p.sorted_indices)
    lengths = (p.batch_sizes > torch.arange(len(y)).unsqueeze(1)).sum(1)
    data = pack_padded_sequence(y, lengths, batch_first=True).data
    return PackedSequence(data, p.batch_sizes, p.sorted_indices, p.unsorted_indices)


def lengths_fall(model: nn.Module, run: Callable[[], object]) -> bool:
    """Whether a model packs its sequences as they come, which have to be the longest ones first.

    run: calls the model, under the hooks that see it.
    """
    found: list[bool] = []

    def see(module: nn.Module, args: Any, kwargs: Any) -> None:
        leaves: Iterator[Any] = filter(is_packed, pytree.tree_leaves((args, kwargs), is_leaf=is_packed))
        found.extend(p.sorted_indices is None for p in leaves)

    hooks = [m.register_forward_pre_hook(see, with_kwargs=True) for m in model.modules() if isinstance(m, nn.RNNBase)]
    try:
        if hooks:
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return any(found)
