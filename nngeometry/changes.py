"""Changes of the user's objects and of torch's switches that are taken back, whatever happens meanwhile.

A hook on a module, a parameter with other values, a switch of torch: each is a :data:`Change`, made by a ``with
Changed(...)`` or ``with Borrowed(...)``, which undoes it. What makes that more than ``try`` and ``finally`` are signals
(Ctrl-C, a timer) with handlers that raise: these may come between any two operations of Python, in the middle of a
``finally`` or as the very first thing inside of an ``__exit__``. While changes are in force, a handler of the library
therefore stands before the user's. It looks at the stack: where changes are just being made or undone, the signal waits
until that is done; everywhere else the user's handler is called at once. Python runs handlers in the main thread alone,
so that other threads need none of this.
"""

from __future__ import annotations

import _signal as signal  # type: ignore[import-not-found]  # signal itself makes enumerations of numbers and handlers, in ten times as long
import itertools
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from functools import wraps
from types import FrameType, FunctionType
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _python_dispatch

P = ParamSpec("P")
T = TypeVar("T")
C = TypeVar("C")

#: Makes a change and returns what takes it back.
Change = Callable[[], Callable[[], Any]]

#: What people give handlers that raise.
_SIGNALS = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGALRM", "SIGVTALRM", "SIGPROF", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
]
_MAIN = threading.main_thread().ident
#: The handlers of the user that :func:`_on_signal` stands before, and the signals that wait.
_theirs: dict[int, Any] = {}
_waiting: list[int] = []
#: How many blocks the main thread is in.
_depth = 0
#: For what threads have in common: models and switches of the process.
_one_at_a_time = threading.RLock()


class Changed:
    """Changes in force inside of a ``with`` block, of what belongs to this thread alone.

    >>> with Changed(recording(False)):
    ...     torch.is_grad_enabled()
    False
    """

    def __init__(self, *changes: Change) -> None:
        self._changes = changes
        self._undo: list[Callable[[], Any]] = []
        #: Whether the block ended, or is ending, by an exception.
        self.failed = False

    def _before(self) -> None:
        pass

    def _after(self) -> None:
        pass

    def __enter__(self) -> None:
        if self._undo:
            raise RuntimeError("these changes are in force already: make them anew to have them inside of themselves")
        self.failed = False
        _begin()
        try:
            self._before()
            try:
                for change in self._changes:
                    self._undo.append(change())
            except BaseException:
                self._take_back()
                raise
        except BaseException:
            _end()
            raise

    def __exit__(self, *exception: Any) -> None:
        self.failed = any(exception)
        try:
            self._take_back()
        except Exception:
            if not any(exception):  # one that is on its way is not replaced
                raise
        finally:
            _end()

    def _take_back(self) -> None:
        failed: BaseException | None = None
        while self._undo:
            try:
                self._undo.pop()()
            except BaseException as error:  # the others are undone all the same
                failed = failed or error
        self._after()
        if failed is not None:
            raise failed


class Borrowed(Changed):
    """Changes of what threads have in common, a model or a switch of the process: others wait until they are undone."""

    def _before(self) -> None:
        while not _one_at_a_time.acquire(timeout=0.1):
            _let_through()  # so that a thread that waits can be interrupted

    def _after(self) -> None:
        _one_at_a_time.release()


def uninterrupted(function: Callable[..., Any], *arguments: Any) -> Any:
    """``function(*arguments)``, to its end before a signal is heard: for functions of torch that keep state in Python
    and would leave it behind.

    >>> uninterrupted(max, 2, 3)
    3
    """
    _begin()
    try:
        return function(*arguments)
    finally:
        _end()


def _begin() -> None:
    global _depth
    if threading.get_ident() != _MAIN:
        return
    if _depth == 0:
        try:
            for number in _SIGNALS:
                handler = signal.getsignal(number)
                if callable(handler) and handler is not _on_signal:
                    _theirs[number] = handler
                    signal.signal(number, _on_signal)
        except BaseException:  # from a handler that we did not yet stand before
            _stand_back()
            raise
    _depth += 1


def _end() -> None:
    """Leave the handlers as they were, and let through what needs wait no longer."""
    global _depth
    if threading.get_ident() != _MAIN:
        return
    _depth -= 1
    if _depth == 0:
        _stand_back()
    if _waiting and not _in_between(sys._getframe(2)):
        _let_through()


def _stand_back() -> None:
    for number, handler in _theirs.items():
        if signal.getsignal(number) is _on_signal:
            signal.signal(number, handler)


def _on_signal(number: int, frame: FrameType | None) -> None:
    if _in_between(frame):
        _waiting.append(number)
    else:
        _theirs[number](number, frame)


def _let_through() -> None:
    """Call the handlers of the signals that have waited: they may raise."""
    if threading.get_ident() == _MAIN:
        waited, _waiting[:] = _waiting[:], []
        for number in waited:
            _theirs[number](number, sys._getframe(1))


def _in_between(frame: FrameType | None) -> bool:
    """Whether changes are just being made or undone."""
    while frame is not None:
        if frame.f_code in _IN_BETWEEN:
            return True
        frame = frame.f_back
    return False


_IN_BETWEEN = {f.__code__ for f in (Changed.__enter__, Changed.__exit__, uninterrupted, _begin, _end)}


# Changes


def entered(context: AbstractContextManager[Any]) -> Change:
    """A context of somebody else."""

    def change() -> Callable[[], Any]:
        context.__enter__()
        return lambda: context.__exit__(None, None, None)

    return change


def require_recording() -> None:
    """Raise inside of ``torch.inference_mode()``."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "nothing can be differentiated inside of torch.inference_mode(): leave it for this call, or use "
            "torch.no_grad() instead"
        )


def recording(on: bool) -> Change:
    """Whether autograd records."""

    def change() -> Callable[[], Any]:
        before = torch.is_grad_enabled()
        torch._C._set_grad_enabled(on)
        return lambda: torch._C._set_grad_enabled(before)

    return change


def no_grad() -> Changed:
    """``torch.no_grad()``, which an exception in the wrong place does not leave in force.

    >>> with no_grad():
    ...     torch.is_grad_enabled()
    False
    """
    return Changed(recording(False))


def alone(function: Callable[P, T]) -> Callable[P, T]:
    """The function, run while no other thread has borrowed anything: for what reads or writes the tensors of models."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with Borrowed():
            return function(*args, **kwargs)

    return run


def uncast(function: Callable[P, T]) -> Callable[P, T]:
    """The function, run outside of ``torch.autocast``, which would have matrices multiplied in lower precision.

    >>> @uncast
    ... def product(a, b):
    ...     return a @ b
    >>> with torch.autocast("cpu", dtype=torch.bfloat16):
    ...     product(torch.eye(2), torch.eye(2)).dtype
    torch.float32
    """

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        if not _is_cast_anywhere():
            return function(*args, **kwargs)
        around = [device for device in _CASTING if torch.is_autocast_enabled(device)]
        with Changed(*(entered(torch.autocast(device, enabled=False)) for device in around)):
            return function(*args, **kwargs)

    return run


_CASTING = ("cpu", "cuda")


def is_cast() -> bool:
    """Whether it is inside of ``torch.autocast``."""
    return any(map(torch.is_autocast_enabled, _CASTING))


#: The same in one call, since it is asked by every method of matrices.
_is_cast_anywhere: Callable[[], bool] = getattr(torch._C, "_is_any_autocast_enabled", is_cast)


def with_methods_uncast(cls: type[C]) -> type[C]:
    """A class whose own public methods are :func:`uncast`."""
    for name, function in list(vars(cls).items()):
        if isinstance(function, FunctionType) and not name.startswith("_"):
            setattr(cls, name, uncast(function))
    return cls


def unrecorded(function: Callable[P, T]) -> Callable[P, T]:
    """The function, run inside of :func:`no_grad`."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with no_grad():
            return function(*args, **kwargs)

    return run


def warnings_ignored(message: str) -> Change:
    """No warnings that start with a message."""

    def change() -> Callable[[], Any]:
        context = warnings.catch_warnings()
        context.__enter__()
        warnings.filterwarnings("ignore", message=message)
        return lambda: context.__exit__(None, None, None)

    return change


def trainable(parameters: Iterable[Tensor]) -> Change:
    """``requires_grad`` on."""

    def change() -> Callable[[], Any]:
        frozen = [p for p in parameters if not p.requires_grad]
        for p in frozen:
            p.requires_grad_(True)
        return lambda: [p.requires_grad_(False) for p in frozen]

    return change


def forward_hook(module: nn.Module, hook: Callable[..., Any], **options: bool) -> Change:
    """A forward hook."""
    return lambda: module.register_forward_hook(hook, **options).remove


def other_tensors(theirs: Sequence[Tensor], ours: Sequence[Tensor]) -> Change:
    """Tensors of ours in the place of the user's, for whoever holds them: modules, lists, closures.

    Both keep their identity and swap what they are: values, ``requires_grad``, ``.grad``, hooks, the graph. What is
    recorded meanwhile is recorded of ours, and stays so.
    """

    def change() -> Callable[[], Any]:
        done: list[tuple[Tensor, Tensor]] = []

        def undo() -> None:
            torch.clear_autocast_cache()  # it holds what weights were cast to, by these
            while done:
                torch._C._swap_tensor_impl(*done.pop())

        torch.clear_autocast_cache()
        try:
            for one, other in zip(theirs, ours, strict=True):
                torch._C._swap_tensor_impl(one, other)
                done.append((one, other))
        except BaseException:
            undo()
            raise
        return undo

    return change


_set_versions: Any = torch._C._autograd._unsafe_set_version_counter


def _set_version(t: Tensor, version: int) -> None:
    if _SEVERAL_VERSIONS:
        _set_versions((t,), (version,))
    else:
        _set_versions(t, version)


def _sets_several_versions() -> bool:
    """Whether torch sets those of several tensors at once, as it does since 2.7."""
    try:
        _set_versions((), ())
    except TypeError:
        return False
    return True


_SEVERAL_VERSIONS = _sets_several_versions()

#: Counts up what are versions of no tensor, which grow by one with each operation in place.
_visits = itertools.count()


def other_values(theirs: Sequence[Tensor], ours: Sequence[Tensor]) -> Change:
    """The values of tensors of ours in the user's, for whoever holds them.

    All else of theirs stays: ``requires_grad``, ``.grad``, hooks. What is recorded meanwhile can only be differentiated
    meanwhile, and what was recorded before only afterwards, with their own values: each time their versions differ, by
    which autograd sees that.
    """

    def change() -> Callable[[], Any]:
        before = [(t, t.data, t._version) for t in theirs]
        version = 2**31 + next(_visits) * 2**12 % 2**31

        def put(t: Tensor, data: Tensor, version: int) -> None:
            t.data = data
            _set_version(t, version)

        def undo() -> None:
            for entry in before:
                put(*entry)

        try:
            for one, other in zip(theirs, ours, strict=True):
                put(one, other, version)
        except BaseException:
            undo()
            raise
        return undo

    return change


def not_compiled() -> Callable[[], Any]:
    """Models that ``torch.compile`` has compiled run as they were written: compiled code calls no hooks that were not
    there when it was made, and its operations cannot be told.
    """
    frames = sys.modules.get("torch._dynamo.eval_frame")
    compiled = {} if frames is None else frames.cached_backends
    if all(backend is None for backend in compiled.values()):
        return _nothing
    context = torch.compiler.set_stance("force_eager")
    return lambda: context.__exit__(None, None, None)


def _nothing() -> None:
    pass


#: Torch tells of it since 2.7.
_hooks_on_saved: Callable[[bool], Any] | None = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


def hooks_on_saved() -> Any:
    """The innermost hooks on what is saved for backward, None if there are none. Where torch does not tell they are
    those of activation checkpoints alone, and each is known by its frame.
    """
    return _hooks_on_saved(False) if _hooks_on_saved is not None else _frame_of_checkpoint()


def _frame_of_checkpoint() -> FrameType | None:
    """The innermost frame of torch.utils.checkpoint in which something runs."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_globals.get("__name__") != "torch.utils.checkpoint":
        frame = frame.f_back
    return frame


def modes_kept() -> Callable[[], Any]:
    """A change that makes none: the modes of torch are taken back that somebody else's context leaves on, interrupted
    where it was not safe.
    """
    before = _modes()

    def undo() -> None:
        grad, levels, functions, dispatchers, saving = before
        if _modes() == before:
            return
        torch._C._functorch.pop_dynamic_layer_stack_and_undo_to_depth(levels)
        while torch._C._len_torch_function_stack() > functions:
            torch._C._pop_torch_function_stack()
        while torch._C._len_torch_dispatch_stack() > dispatchers:
            _python_dispatch._pop_mode()
        while _hooks_on_saved is not None and (top := _hooks_on_saved(False)) is not None and top != saving:
            torch._C._autograd._pop_saved_tensors_default_hooks()
        torch._C._set_grad_enabled(grad)

    return undo


def _modes() -> tuple[Any, ...]:
    return (
        torch.is_grad_enabled(),
        torch._C._functorch.get_dynamic_layer_stack_depth(),
        torch._C._len_torch_function_stack(),
        torch._C._len_torch_dispatch_stack(),
        hooks_on_saved(),
    )


def differentiable_attention() -> Callable[[], Any]:
    """The plain kernels of attention: the fused ones cannot be differentiated twice."""
    cuda, mha = torch.backends.cuda, torch.backends.mha
    switches = [
        (cuda.flash_sdp_enabled, cuda.enable_flash_sdp, False),
        (cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp, False),
        (cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp, False),
        (cuda.math_sdp_enabled, cuda.enable_math_sdp, True),
        (mha.get_fastpath_enabled, mha.set_fastpath_enabled, False),
    ]
    before = [(put, get()) for get, put, wanted in switches]
    for _, put, wanted in switches:
        put(wanted)
    return lambda: [put(value) for put, value in before]
