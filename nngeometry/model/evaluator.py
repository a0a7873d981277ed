"""A model on data: minibatches in, checked outputs out, and everything left as it was found."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .. import arguments
from ..changes import Borrowed, Change, entered, modes_kept, no_grad, not_compiled, recording, require_recording
from ..distributed import require_whole
from ..layercollection import LayerCollection
from ..memory import BytesMade, keep_freed, nbytes_of, work_array
from ..reading import Assigned
from ..wrappers import require_whole_parameters, unwrapped
from . import data
from .batch_statistics import (
    Norm,
    Statistics,
    apart_from_buffers,
    as_in_training,
    computes_otherwise,
    found_in,
    mixing_norms,
    rate_of_dropout,
)
from .entries import same_entries
from .independence import called_apart
from .packed import lengths_fall
from .recurrent import recurrent_without_cudnn
from .weights import Weights

T = TypeVar("T")

#: Bytes of the parameters of a model up to which its minibatches may be joined.
_SMALL_MODEL = 2**21


class _DoesNotRun(Exception):
    """A model failed while it was looked at."""


@dataclass(frozen=True)
class DryRun:
    """Two examples, what the model returned for them, and the bytes of all that it made on the way."""

    pair: data.Batch
    output: Tensor
    made: int


class Evaluator:
    """A model on data: runs it on minibatches, with its outputs checked.

    model: the model, in the mode in which it is to be looked at. layer_collection: the parameters w. function:
    ``function(*minibatch) -> f`` (``function(minibatch)`` if it is a mapping), by default ``model(minibatch[0])``.
    device: where minibatches are moved, by default where the model is. verbose: show progress. batch_statistics:
    whether the model is as in training, with the statistics of each minibatch held constant, and without dropout. unit:
    what counts as an example: "example", or "minibatch", of which nothing is taken apart.
    """

    def __init__(
        self,
        model: nn.Module,
        layer_collection: LayerCollection,
        *,
        function: Callable[..., Any] | None = None,
        device: torch.device | str | None = None,
        verbose: bool = False,
        batch_statistics: bool = False,
        unit: str = "example",
    ) -> None:
        require_recording()
        arguments.model(model)
        arguments.instance("layer_collection", layer_collection, LayerCollection, "LayerCollection.from_model(model)")
        arguments.function(function)
        arguments.device(device)
        arguments.of_training(batch_statistics, unit)
        require_whole_parameters(model)
        parameters = layer_collection.parameters(model)
        if not parameters:
            raise ValueError("the layer collection is empty: build it with LayerCollection.from_model(model)")
        if any(p.is_meta for p in parameters):
            raise ValueError("model: its parameters are on the meta device, where they have no values: load them first")
        if any(p.is_complex() for p in parameters):
            raise NotImplementedError(
                "complex parameters: a real matrix of derivatives needs them as pairs of real ones"
            )
        _check_one_of("device", {p.device for p in parameters}, "move the model to one device")
        _check_one_of("dtype", {p.dtype for p in parameters}, "cast the model, or use a LayerCollection for each dtype")
        self.model = unwrapped(model)
        self.layer_collection = layer_collection
        self.function = function
        self.device = parameters[0].device if device is None else torch.device(device)
        self.verbose = verbose
        self.batch_statistics = batch_statistics
        self.undivided = unit == "minibatch"
        self._read = data.Reader(function, self._asked, self._holding if batch_statistics else None)
        if self.device.type != parameters[0].device.type:
            raise ValueError(
                f"device={str(self.device)!r}, but the model is on {parameters[0].device}: move the model there"
            )
        #: Whether the model is known to leave its inputs alone.
        self._reads = False
        #: Whether it is known to leave itself alone while statistics are found.
        self._settles = False
        #: Whether it asks for gradients in them, which it gets in others with the same entries.
        self._touches = False
        #: Half precision is accumulated in single.
        self.dtype = torch.float32 if parameters[0].dtype in (torch.float16, torch.bfloat16) else parameters[0].dtype

    def minibatches(self, examples: Any) -> Iterator[data.Batch]:
        """The minibatches of a loader or the one that ``examples`` is, on the device, with a progress bar when
        verbose.
        """
        read = self._read.undivided if self.undivided else self._read
        name = type(self.model).__name__
        if isinstance(examples, Assigned):
            return examples.read(read, self.device, self.verbose, name)
        require_whole(examples)
        return map(read, data.minibatches(examples, self.device, self.verbose, name))

    def _asked(self, batch: data.Batch) -> Any:
        """What the model returns for a minibatch, of which it is given a copy."""
        f = self.looked(lambda: self.outputs_unchecked(batch))
        return f.detach() if isinstance(f, Tensor) else f

    def apart(self, batch: data.Batch, look: Callable[[data.Batch], T]) -> T:
        """``look(batch)``, which takes examples out; if that fails, once more with what is not of examples found."""
        try:
            return look(batch)
        except Exception as error:
            try:
                self._asked(batch)
            except Exception:
                raise error from None  # the model does not run on the whole minibatch either
            found = data.settled(batch, self._asked)
            if found is None:
                raise error
        return look(found)

    def outputs(self, batch: data.Batch) -> Tensor:
        """The output of the model on a minibatch, checked: one row for each example, finite. That of a minibatch that
        counts as one is one row, whatever it is.
        """
        try:
            f = self.outputs_unchecked(batch)
        except (RuntimeError, IndexError, AssertionError) as error:
            arguments.inputs(batch, next(self.model.parameters()).dtype, error)
            raise
        if not isinstance(f, Tensor):
            raise TypeError(_not_a_tensor(f, batch, self.function is not None))
        if not f.is_floating_point():
            raise TypeError(
                f"the model returned {f.dtype}: its outputs must be real numbers that can be differentiated"
            )
        n = data.count(batch)
        f = f.unsqueeze(0) if self.undivided else f
        if f.ndim == 0 or f.shape[0] != n:
            raise ValueError(
                f"the model returned shape {tuple(f.shape)} for a minibatch of {n} examples: it must return one "
                "row for each example"
            )
        if n == 0 or (self.undivided and f.numel() == 0):
            raise ValueError("a minibatch has no example")
        if not _finite(f):
            raise ValueError(
                "the output of the model has NaN or infinite entries: check the parameters and the inputs of this "
                "minibatch"
            )
        return f

    def outputs_of(self, batch: data.Batch) -> Tensor:
        """:meth:`outputs`, and an error if that modified the minibatch."""
        versions = [t._version for t in data.tensors_of(batch)]
        f = self.outputs(batch)
        if versions != [t._version for t in data.tensors_of(batch)]:
            raise ValueError(WRITES)
        return f

    def outputs_unchecked(self, batch: data.Batch) -> Any:
        """What the model or the user's function returns for a minibatch."""
        within = self.within(batch)
        if not within:
            return self._given(batch)
        with Borrowed(*within):
            return self._given(batch)

    def within(self, batch: data.Batch) -> list[Change]:
        """What is in force while the model is at a minibatch, or at some examples of one, on the way there and back:
        its norms as in training. Statistics are found the first time, at the parameters as they are then.
        """
        if self.batch_statistics:
            held = self._holding(data.known(batch)).statistics
            assert isinstance(held, Statistics)
            return [held.settled().in_place]
        return [apart_from_buffers(self.model)] if self.undivided else []

    def norms_as_in_training(self) -> list[str]:
        """The names of the norms that are as in training, where that is asked for."""
        if not self.batch_statistics and not self.undivided:
            return []
        return as_in_training(self.model, self.batch_statistics)

    def _holding(self, batch: data.Minibatch) -> data.Minibatch:
        """A minibatch with its statistics, those of all of it if it is some examples of one that has them."""
        held = batch.statistics
        if isinstance(held, Statistics) and held.model is self.model and held.function is self.function:
            return batch
        whole = replace(batch, statistics=None)
        return replace(batch, statistics=Statistics(self.model, self.function, self._statistics, whole))

    def _statistics(self, batch: data.Batch) -> list[Norm]:
        """The statistics of a minibatch. The first time they are found at copies of all tensors of the model."""
        if self._settles:
            state = State(self.model)
            with self.running(state):  # recorded, since a model may differentiate something in its forward
                found = self._found(batch)
                state.check(lambda: self._found(batch))
            return found
        found = self.looked(lambda: self._found(batch))
        self._settles = True
        return found

    def _found(self, batch: data.Batch) -> list[Norm]:
        found, f = found_in(self.model, lambda: self._given(batch))
        odd = computes_otherwise(found)
        if odd and isinstance(f, Tensor) and f.is_floating_point():
            held = Statistics(self.model, self.function, lambda _: found, None).settled()
            with Borrowed(held.in_place):
                g = self._given(batch).detach()
            f = f.detach()
            problem = (
                f"with the statistics of the minibatch held constant the model ({odd}) returns something else than in "
                "training"
            )
            remedy = "Use nn.BatchNorm1d, 2d or 3d, or leave batch_statistics out and call model.eval()"
            check_same(g, f, f, problem, remedy)
        return found

    def _given(self, batch: data.Batch) -> Any:
        """The first time a copy is given, so that a model that modifies its inputs is found out before it has modified
        the user's.
        """
        if self._reads:
            return self._called(data.map_tensors(Tensor.detach, batch) if self._touches else batch)
        own = data.map_tensors(lambda t: t.detach().clone(), batch)
        f = self._called(own)
        given, seen = data.tensors_of(batch), data.tensors_of(own)
        if any(t._version for t in seen) or not all(map(same_entries, given, seen)):
            raise ValueError(WRITES)
        self._reads = True
        self._touches = any(t.requires_grad or t.grad is not None for t in seen)
        return f

    def _called(self, batch: data.Batch) -> Any:
        arguments = data.arguments(batch)
        if self.function is not None:
            return self.function(*arguments)
        if isinstance(arguments[0], Tensor):
            return self.model(arguments[0])
        first, call = type(arguments[0]).__name__, "batch: model(**batch).logits"
        if len(arguments) > 1:
            first, call = f"{first} and more", "*batch: model(batch[0])"
        raise TypeError(f"minibatches of type {first} need function=, e.g. function=lambda {call}")

    def running(self, *changes: Change, record: bool = True) -> Borrowed:
        """What is in force while the model runs: changes, and whether autograd records."""
        require_recording()
        if self.device.type == "cuda":
            changes = (entered(recurrent_without_cudnn(self.model)), *changes)
        return Borrowed(modes_kept, recording(record), not_compiled, *changes)

    def joined(self, examples: Any, made_of_two: Callable[[data.Batch], int]) -> Iterator[tuple[int, list[data.Batch]]]:
        """The minibatches, each with its neighbours that may be looked at together with it, and the position of the
        first.

        These are several where a model is so small that most time would go into starting operations, and as many as
        what is made of them takes half of a work array. made_of_two: from a minibatch to the bytes that are made
        of two of its examples.
        """

        if self.undivided or self.batch_statistics:
            return ((data.position_of(batch, k), [batch]) for k, batch in enumerate(self.minibatches(examples)))

        def most(batch: data.Batch) -> int:
            room = work_array(self.device) // 2
            if nbytes_of(self.model.parameters()) > _SMALL_MODEL or nbytes_of(data.tensors_of(batch)) > room:
                return 0
            keep_freed(self.device)  # there are more minibatches
            if data.count(batch) < 2 or not data.aligned(batch) or self.needs_order(batch):
                return 0
            return 2 * room // max(1, made_of_two(batch))

        return data.grouped(self.minibatches(examples), most, lambda batch: self.keeps_apart(batch, [0], 2))

    def needs_order(self, batch: data.Batch) -> bool:
        """Whether a minibatch has the longest sequences first because the model packs them as they come."""
        if not any(isinstance(m, nn.RNNBase) for m in self.model.modules()):
            return False
        return self.looked(lambda: lengths_fall(self.model, lambda: self.outputs_of(batch)))

    def keeps_apart(self, batch: data.Batch, some: Sequence[int], among: int | None = None) -> bool:
        """Whether the model returns the same for some examples of a minibatch as for these among others.

        some: which examples. among: how many of the first ones the others are, by default all.
        """
        if self.called_apart(batch) is not None:
            return True

        def alike() -> bool:
            try:
                whole = batch if among is None else data.take(batch, torch.arange(among))
                f = self.outputs_of(whole).detach()
                g = self.outputs_of(data.take(whole, torch.tensor(some))).detach()
            except Exception as error:
                raise _DoesNotRun from error
            return same_up_to_rounding(g, f[list(some)], f)

        try:
            return self.looked(alike)
        except _DoesNotRun:  # which is heard of when it matters
            return False

    def looked(self, look: Callable[[], T]) -> T:
        """What a look at the model finds, at copies of all of its tensors: nothing of the user's is done anything to.

        Raises:
            ValueError: If the forward pass draws random numbers, or writes into parameters or buffers.
        """
        weights = Weights([self.model], self.layer_collection.parameters(self.model))
        state = State(self.model, values=True)
        with self.running(weights.in_place, state):
            before = weights.marks()
            found = look()
            state.check(look)
            weights.check(before)
        return found

    def dry_run(self, batch: data.Batch, *changes: Change) -> DryRun:
        """The model on the first two examples, under changes. Operations that are not recorded count too: a head may be
        all that is differentiated.
        """
        pair = data.take(batch, torch.arange(2))
        apart = self.called_apart(batch) is not None  # others may have hooks on what is recorded
        made = BytesMade()
        if apart:
            with self.running(*changes, entered(made), record=False):
                f = self.outputs(pair)
        else:
            state = State(self.model, values=True)
            with self.running(*changes, state, entered(made)):
                f = self.outputs(pair).detach()
                state.check(lambda: self.outputs(pair))
        return DryRun(pair, f, made.nbytes)

    def check_mode(self) -> None:
        """Raise, naming the module, if the model is in a mode in which what is asked for is undefined."""
        check_mode(self.model, self.batch_statistics, self.undivided)

    def called_apart(self, batch: data.Batch) -> list[nn.Module] | None:
        """The modules that the model calls on a minibatch, if their types tell that examples are apart: the model need
        not be looked at. None if they do not.
        """
        x = data.arguments(batch)[0]
        if self.undivided or self.function is not None or type(x) is not Tensor:
            return None
        if self.batch_statistics:
            with Borrowed(*self.within(batch)):
                called = called_apart(self.model, x.ndim)
        else:
            called = called_apart(self.model, x.ndim)
        self._reads = self._reads or called is not None
        return called


def _not_a_tensor(f: Any, batch: data.Batch, by_function: bool) -> str:
    """What to do with a model that returns something else than its outputs, whose they are among others."""
    one = isinstance(data.content(batch), Mapping)
    call = "lambda batch: model(**batch)" if one else "lambda *batch: model(batch[0])"
    named = list(f.items()) if isinstance(f, Mapping) else list(enumerate(f)) if isinstance(f, tuple | list) else []
    named = named or list(getattr(f, "__dict__", {}).items())
    n = data.count(batch)
    fitting = [k for k, t in named if isinstance(t, Tensor) and t.is_floating_point() and t.ndim > 0 and len(t) == n]
    key = "logits" if "logits" in fitting else fitting[0] if fitting else None
    if key is None:
        part, hint = "", "one row of real numbers for each example"
    else:
        part = f".{key}" if isinstance(key, str) and hasattr(f, key) else f"[{key!r}]"
        hint = f"its {part}" if len(fitting) == 1 else f"one of {', '.join(map(str, fitting))}"
    who = "function= returned" if by_function else "the model returned"
    how = "let it return" if by_function else "pass a function= that returns"
    example = f", e.g. function={call}{part}" if part else ""
    return f"{who} a {type(f).__name__}, not a tensor: {how} {hint}{example}"


def check_mode(model: nn.Module, batch_statistics: bool = False, undivided: bool = False) -> None:
    """Raise, naming the module, if the model is in a mode in which per-example derivatives are undefined.

    batch_statistics, undivided: as of :class:`Evaluator`, which decide what may be.
    """
    if not batch_statistics and not undivided:
        for name, module in mixing_norms(model):
            raise ValueError(
                f"layer {name!r} ({type(module).__name__}) normalises with the statistics of the batch, so per-example "
                "derivatives are undefined: call model.eval() (and keep track_running_stats=True), or pass "
                "batch_statistics=True, by which those of each minibatch are held constant, or "
                'unit="minibatch", by which a minibatch counts as one example'
            )
    for name, module in model.named_modules():
        attribute, rate = rate_of_dropout(module)
        if rate > 0 and not (batch_statistics and attribute in vars(module)):
            raise ValueError(
                f"layer {name!r} ({type(module).__name__}) drops units at random in train mode, so its derivative is "
                f"random: {_DROPS[undivided or batch_statistics]}"
            )


#: What can be done about dropout: in general, and where norms are to be as in training.
_DROPS = (
    "call model.eval(), or pass batch_statistics=True, by which dropout is off and norms are as in training",
    "call eval() on it alone, by which norms stay as they are",
)


class State:
    """The model as it is but for its parameters: buffers, modes, gradients, and the random state of torch. The forward
    pass must leave them alone.

    It is a change that makes none: what the forward pass did is taken back.

    model: whose. values: whether the entries of buffers are compared too, and not only how often they were written,
    which writing through ``.data`` does not count.
    """

    def __init__(self, model: nn.Module, values: bool = False) -> None:
        self.model = model
        self.values = values
        self._drawn = False

    def __call__(self) -> Callable[[], Any]:
        self._modules = [
            (m, m.training, dict(m._buffers), set(m._non_persistent_buffers_set))
            if m._buffers
            else (m, m.training, _NONE, _NONE)
            for m in self.model.modules()
        ]
        self._parameters = [(p, p.requires_grad, p.grad) for p in self.model.parameters()]
        self._before = [
            (b, b._version, b.clone()) for *_, own, _ in self._modules if own for b in own.values() if b is not None
        ]
        self._devices = set()
        if torch.cuda.is_initialized():
            tensors = (*self.model.parameters(), *self.model.buffers())
            self._devices = {t.device for t in tensors if t.device.type == "cuda"}
        self._random = self._random_state()
        return self._take_back

    def check(self, again: Callable[[], Any]) -> None:
        """Raise if the forward pass has changed anything. again: the forward pass; if random numbers were drawn, it may
        have been by another thread.
        """
        if not all(map(torch.equal, self._random, self._random_state())):
            with Draws() as draws:
                again()
            self._drawn = draws.met
            if draws.met:
                raise ValueError(
                    "the forward pass of the model draws random numbers, so its derivative is random: call "
                    "model.eval(), or switch the noise off"
                )
        if any(p.requires_grad != before for p, before, _ in self._parameters):
            raise ValueError(
                "the forward pass of the model switches requires_grad of its parameters: leave it alone there"
            )
        others = [m for m, _, own, _ in self._modules if _replaced(m, own)]
        written = [b for b, version, before in self._before if self._written(b, version, before)]
        if others or written:
            found = {id(b) for b in written} | {id(b) for m in others for b in m._buffers.values()}
            names = [name for name, b in self.model.named_buffers() if id(b) in found]
            raise ValueError(
                f"the forward pass of the model changes its buffers {', '.join(names)}, so its output depends on the "
                "batches before: call model.eval(), or make them before"
            )

    def _written(self, b: Tensor, version: int, before: Tensor) -> bool:
        return b._version != version or (self.values and not same_entries(b, before))

    def _random_state(self) -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in self._devices)]

    def _take_back(self) -> None:
        for m, training, own, names in self._modules:
            if m.training != training:
                m.training = training
            if _replaced(m, own):
                m._buffers.clear()
                m._buffers.update(own)
                m._non_persistent_buffers_set.clear()
                m._non_persistent_buffers_set.update(names)
        for p, requires_grad, grad in self._parameters:
            if p.requires_grad != requires_grad:
                p.requires_grad_(requires_grad)
            if p.grad is not grad:
                p.grad = grad
        with no_grad():
            for b, version, before in self._before:
                if self._written(b, version, before):
                    b.copy_(before)
        if self._drawn:
            torch.set_rng_state(self._random[0])
            for d, state in zip(self._devices, self._random[1:], strict=True):
                torch.cuda.set_rng_state(state, d)


class Draws(TorchDispatchMode):
    """Notices operations that draw random numbers, in this thread: ``met``."""

    def __init__(self) -> None:
        super().__init__()
        self.met = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.met = self.met or (
            torch.Tag.nondeterministic_seeded in func.tags and not _drops_nothing(func, args, kwargs)
        )
        return func(*args, **kwargs)


def _drops_nothing(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether an operation draws only for dropout, of which there is none: attention."""
    names = [argument.name for argument in func._schema.arguments]
    if "dropout_p" not in names:
        return False
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return given.get("dropout_p", 0.0) == 0.0


_NONE: Any = MappingProxyType({})


def _replaced(module: nn.Module, buffers: Mapping[str, Tensor | None]) -> bool:
    """Whether a module has other buffers than it had."""
    now = module._buffers
    return len(now) != len(buffers) or any(now.get(k, now) is not b for k, b in buffers.items())


WRITES = "the model modifies its inputs in place, so a second look at them would differ: clone them"


def same_up_to_rounding(f: Tensor, expected: Tensor, scale: Tensor) -> bool:
    """Whether two tensors differ by rounding of numbers as large as those of ``scale`` alone."""
    return bool((f - expected).abs().max() <= tolerance(f.dtype) * scale.abs().max())


def tolerance(dtype: torch.dtype) -> float:
    """What counts as equal up to rounding in a checked sum: far above it, far below any mistake."""
    return {torch.float64: 1e-8, torch.float32: 1e-3}.get(dtype, 0.1)


def _finite(f: Tensor) -> bool:
    """Whether all entries are finite, which they are if their sum is (it may overflow where they are)."""
    return math.isfinite(f.detach().sum()) or bool(torch.isfinite(f).all())


def _check_one_of(what: str, found: set[Any], remedy: str) -> None:
    if len(found) > 1:
        raise ValueError(
            f"the collected parameters have more than one {what} ({', '.join(map(str, sorted(found, key=str)))}): "
            f"{remedy}"
        )


MIXED = (
    "Something mixes examples (batch statistics, attention over the batch, a sequence that is not split by example) or "
    "is random"
)
APART = (
    "use model.eval(), or batch_statistics=True for batch norms in train mode, or feed one example at a time, or pass "
    'unit="minibatch", by which a minibatch counts as one example'
)
MIXES = f"{MIXED}: {APART}"


def check_same(f: Tensor, expected: Tensor, scale: Tensor, problem: str, remedy: str) -> None:
    """Raise unless f is what is expected, up to rounding of numbers as large as those of ``scale``."""
    if not same_up_to_rounding(f, expected, scale):
        raise ValueError(f"{problem}. {remedy}")


def counted(total: float) -> float:
    """What a mean is divided by. Raises ``ValueError`` if that is nothing."""
    if total == 0:
        raise ValueError(
            "the mean of the loss is over nothing: every target of the data is ignored, or has weight zero"
        )
    return total
