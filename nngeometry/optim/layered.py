"""Optimisers of torch whose parameter groups are the layers of a model, with flat vectors of all of them."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from .. import arguments
from ..layercollection import LayerCollection
from ..model.batch_statistics import mixing_norms


class LayeredOptimizer(torch.optim.Optimizer):
    """What optimisers have in common that take the parameters of a layer collection as one flat vector.

    Every layer is a parameter group, with its ``group["name"]``. Trainable parameters outside of the collection are in
    a last group, whose name is None, and are stepped by their gradient alone.

    Args:
        model: The model.
        layer_collection: The layers, by default all.
        defaults: What every group has: numbers that are at least zero.
        per_layer: What groups of layers have instead, by the name of the layer.
    """

    #: A GradScaler tells ``step`` that it would skip it.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        model: nn.Module,
        layer_collection: LayerCollection | None,
        defaults: dict[str, float],
        per_layer: Mapping[str, Mapping[str, float]],
    ) -> None:
        self.model = model
        self.layer_collection = LayerCollection.from_model(model) if layer_collection is None else layer_collection
        self._numbers = tuple(defaults)
        self._told = False
        groups = list(_groups(model, self.layer_collection))
        for group in groups:
            group.update(per_layer.get(group.get("name", ""), {}))
        super().__init__(groups, {**defaults, "name": None})
        self._parameters: list[Tensor] = [p for group in self._layers() for p in group["params"]]
        self._found = _found(model)
        self._named = [(name, p.dtype, p.device, p.shape) for name, p in self.layer_collection.named_parameters(model)]
        half = self._parameters[0].dtype in (torch.float16, torch.bfloat16)
        self._dtype = torch.float32 if half else self._parameters[0].dtype
        #: The momentum of the layers, flat.
        self._kept: Tensor | None = None

    # Groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, which are stepped by their gradient alone unless they are those of a layer of the
        collection.
        """
        for name in self._numbers:
            arguments.number(name, param_group.get(name, self.defaults.get(name)), least=0.0)
        super().add_param_group(param_group)
        if self.param_groups[-1]["name"] is None and not self._told:
            self._told = True
            here = {id(p) for p in self.param_groups[-1]["params"]}
            names = [name for name, p in self.model.named_parameters() if id(p) in here]
            warnings.warn(
                f"{type(self).__name__}: parameters outside of the layer collection are stepped by their gradient "
                f"alone: {', '.join(names) if names else 'those of a group that was added'}",
                stacklevel=4,
            )

    def _layers(self) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group["name"] is not None]

    def _all(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _step_plainly(self) -> None:
        """Step the parameters outside of the collection, with momentum."""
        for group in self.param_groups:
            for p in group["params"] if group["name"] is None else ():
                if p.grad is not None:
                    self._plain(p, group)

    def _plain(self, p: Tensor, group: dict[str, Any]) -> None:
        """Step one of them."""
        assert p.grad is not None
        m = self.state[p].get("momentum")
        m = p.grad.clone() if m is None else group["momentum"] * m + p.grad
        self.state[p]["momentum"] = m
        p.add_(m, alpha=-group["lr"])

    # Flat values

    def _of_layers(self, name: str) -> float | Tensor:
        """What the groups of the layers say: one number if it is the same for all, or one for each coordinate."""
        values = [group[name] for group in self._layers()]
        return float(values[0]) if _same(values) else self._spread(values)

    def _spread(self, values: Sequence[float]) -> Tensor:
        """One number for each coordinate from one for each layer."""
        sizes = torch.tensor([layer.numel() for layer in self.layer_collection.layers.values()])
        spread = torch.tensor(values, dtype=torch.float64).repeat_interleave(sizes)
        return spread.to(self._parameters[0].device, self._dtype)

    def _by_layer(self, number: Callable[[dict[str, Any]], float]) -> float | dict[str, float]:
        """A number of each layer, as ``regul=`` takes it: one if it is the same for all."""
        values = {group["name"]: float(number(group)) for group in self._layers()}
        first, *_ = values.values()
        return first if _same(list(values.values())) else values

    def _flat(self, tensors: Sequence[Tensor]) -> Tensor:
        flat = torch.cat([(t.to_dense() if t.is_sparse else t).reshape(-1) for t in tensors])
        return flat.to(self._dtype)

    def _pieces(self, flat: Tensor) -> list[Tensor]:
        """Views of flat values in the shapes of the parameters."""
        pieces = flat.split([p.numel() for p in self._parameters])
        return [piece.view(p.shape) for p, piece in zip(self._parameters, pieces, strict=True)]

    def _gradient(self) -> Tensor:
        """The flat gradient of the layers. Raises ``ValueError`` naming a parameter that has none, or one that is not
        finite, with which the step is given up.
        """
        for p, (name, *_) in zip(self._parameters, self._named, strict=True):
            if p.grad is None:
                raise ValueError(
                    f"step: parameter {name!r} has no gradient: "
                    + (
                        "call backward() before, or leave its layer out of layer_collection"
                        if p.requires_grad
                        else "it is frozen now (requires_grad=False): make the optimiser after that"
                    )
                )
        flat = self._flat([p.grad for p in self._parameters])  # type: ignore[misc]
        others = [p.grad for group in self.param_groups if group["name"] is None for p in group["params"]]
        if not all(bool(torch.linalg.vector_norm(g).isfinite()) for g in (flat, *others) if g is not None):
            self._check_finite()
        return flat

    def _check_finite(self) -> None:
        """Raise ``ValueError`` naming a parameter whose gradient is not finite, and give the step up."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        for p in self._all():
            if p.grad is not None and not bool(p.grad.isfinite().all()):
                self._give_up()
                raise ValueError(
                    f"step: the gradient of parameter {names.get(id(p), 'of a group that was added')!r} has NaN or "
                    "infinite entries, so that no step is made and what was observed for it does not count: look at "
                    "the loss of this minibatch; in half precision use a torch.amp.GradScaler, which skips such steps"
                )

    def _give_up(self) -> None:
        """Forget what was noted for a step that is not made."""

    def _add(self, s: Tensor) -> None:
        """Add flat values to the parameters."""
        for p, piece in zip(self._parameters, self._pieces(s), strict=True):
            p.add_(piece.to(p.dtype))

    def _keep(self, m: Tensor) -> None:
        """Have a momentum."""
        self._kept = m
        for p, piece in zip(self._parameters, self._pieces(m), strict=True):
            self.state[p]["momentum"] = piece

    # Scaled losses

    def _skipped(self) -> bool:
        """Whether a GradScaler has found gradients that are not finite; otherwise they are divided by its scale."""
        found, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if found is not None and bool(found):
            self._give_up()
            return True
        if scale is not None:
            for p in self._all():
                if p.grad is not None:
                    p.grad.mul_(scale.double().reciprocal().to(p.grad))
        return False

    # What is kept

    #: The part of the state dict that torch does not have, and the version of it.
    _PART: tuple[str, int]

    def _load(self, saved: Mapping[str, Any]) -> None:
        """Be what that part says, before torch has read its own."""

    def _loaded(self, saved: Mapping[str, Any]) -> None:
        """What is left to do of it after that."""

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave, to the bit. The model has a state dict of its own.

        Raises:
            ValueError: If it is of an optimiser of something else, or damaged; then nothing has changed.
        """
        name, version = self._PART
        saved = state_dict.get(name) if isinstance(state_dict, Mapping) else None
        if not isinstance(saved, Mapping) or saved.get("format") != version:
            raise ValueError(
                f"load_state_dict: expected what the state_dict() of a {type(self).__name__} of this version gives"
            )
        before = self.state_dict()
        try:
            self._load_all(state_dict, saved)
        except Exception as error:
            self._load_all(before, before[name])
            if isinstance(error, ValueError):
                raise
            raise ValueError(f"load_state_dict: the state is damaged ({type(error).__name__}: {error})") from error

    def _load_all(self, state_dict: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
        self._load(saved)
        super().load_state_dict(dict(state_dict))
        self._load_momentum(state_dict)
        self._loaded(saved)

    def _load_momentum(self, state_dict: Mapping[str, Any]) -> None:
        """Have the momentum of a state dict, as it was saved: torch casts it to the dtype of the parameters."""
        self._kept = None
        index = [k for group in state_dict["param_groups"] if group["name"] is not None for k in group["params"]]
        momenta = [state_dict["state"].get(k, {}).get("momentum") for k in index]
        if momenta and all(m is not None for m in momenta):
            device = self._parameters[0].device
            self._keep(torch.cat([m.reshape(-1).to(device) for m in momenta]))

    def _check_model(self, what: str) -> None:
        """Raise ``ValueError`` unless the model is the one that it was."""
        found = _found(self.model)
        if len(found) == len(self._found) and all(map(_alike, found, self._found)):
            return
        names = {id(p) for p in self.model.parameters()}
        ours = {id(p) for p in self._all()}
        pairs = list(zip(self._parameters, self._named, strict=True))
        for problem, of in (
            ("is another one now", [name for p, (name, *_) in pairs if id(p) not in names]),
            (
                "has another shape, dtype or device now",
                [name for p, (name, *rest) in pairs if [p.dtype, p.device, p.shape] != rest],
            ),
            (
                "is new, or was frozen then",
                [n for n, p in self.model.named_parameters() if p.requires_grad and id(p) not in ours],
            ),
        ):
            if of:
                raise ValueError(
                    f"{what}: the model has changed since the optimiser was made: parameter {of[0]!r} {problem}: "
                    "make the optimiser after that, or give it what is new by add_param_group"
                )
        self._found = found

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        name = type(self).__name__
        raise TypeError(f"a {name} cannot be copied, since it holds its model: make one, and load_state_dict")

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"a {type(self).__name__} cannot be pickled, since it holds its model: save its state_dict()")


def options_for(
    matrix: Callable[..., Any], model: nn.Module, options: Mapping[str, Any], generator: torch.Generator | None = None
) -> dict[str, Any]:
    """Options of a matrix, with those that it takes and that are not given: random draws of the optimiser's own, and
    the statistics of the minibatch where the model, as it is now, normalises with them.

    generator: for the draws, by default one with a seed from torch's global one.
    """
    known = parameters_of(matrix)
    given = {**getattr(matrix, "keywords", {}), **options}
    chosen = dict(options)
    if "generator" in known and given.get("generator") is None:
        chosen["generator"] = own_generator(torch.device("cpu")) if generator is None else generator
    if "batch_statistics" in known and "batch_statistics" not in given and any(mixing_norms(model)):
        chosen["batch_statistics"] = True
    return chosen


def parameters_of(matrix: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """What a constructor of matrices takes, by name."""
    return inspect.signature(matrix).parameters if callable(matrix) else {}


def own_generator(device: torch.device) -> torch.Generator:
    """A generator whose seed is drawn from torch's global one."""
    return torch.Generator(device).manual_seed(int(torch.randint(2**62, ())))


def _same(values: Sequence[float]) -> bool:
    return all(value == values[0] for value in values)


def _alike(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    return a[0] is b[0] and a[1:] == b[1:]


def _found(model: nn.Module) -> list[tuple[Any, ...]]:
    """The parameters of a model, with what of them must not change."""
    return [(p, p.dtype, p.device, p.shape, p.requires_grad) for p in model.parameters()]


def _groups(model: nn.Module, layer_collection: LayerCollection) -> Iterator[dict[str, Any]]:
    """One group for each layer, and one for all other trainable parameters."""
    parameters = iter(layer_collection.parameters(model))
    ours: set[int] = set()
    for name, layer in layer_collection.layers.items():
        own = [next(parameters) for _ in layer.params]
        ours.update(map(id, own))
        yield {"params": own, "name": name}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in ours]
    if others:
        yield {"params": others}
