"""What the user passes, looked at before any work: one sentence that names the argument and the remedy."""

from __future__ import annotations

import inspect
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from functools import partial, wraps
from numbers import Integral, Real
from pathlib import Path
from traceback import walk_tb
from typing import Any, NoReturn, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from .model import data

_HERE = str(Path(__file__).parent)
_P = ParamSpec("_P")
_R = TypeVar("_R")


def described(value: Any) -> str:
    """What something is, in a few words.

    >>> described(nn.Linear), described("a"), described([1])
    ('the class Linear', "'a'", 'a list')
    """
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if value is None or isinstance(value, str | int | float | complex):
        return repr(value)
    name = name_of(value)
    return f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"


def name_of(value: Any) -> str:
    """The name of the first class of an object that is public."""
    return next(of.__name__ for of in type(value).__mro__ if not of.__name__.startswith("_"))


def near(word: object, known: Iterable[object]) -> str:
    """A question after the known word that was probably meant, empty if there is none."""
    found = get_close_matches(str(word), [str(k) for k in known], 1, 0.6)
    return f" (did you mean {found[0]!r}?)" if found else ""


def instance(name: str, value: Any, of: type | tuple[type, ...], remedy: str) -> None:
    """Raise ``TypeError`` unless a value is of a type."""
    if isinstance(value, of):
        return
    kinds = of if isinstance(of, tuple) else (of,)
    if isinstance(value, type) and issubclass(value, kinds):
        raise TypeError(f"{name}: expected an instance, got the class {value.__name__}: {remedy}")
    raise TypeError(f"{name}: expected a {kinds[0].__name__}, got {described(value)}: {remedy}")


def one_of(name: str, value: Any, known: Sequence[str]) -> None:
    """Raise ``ValueError`` unless a value is one of some words."""
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, known))}{near(value, known)}")


def integer(name: str, value: Any, least: int) -> int:
    """A whole number that is at least so large. Raises ``TypeError`` or ``ValueError``.

    >>> integer("trials", 2, least=1)
    2
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: expected a whole number, got {described(value)}")
    if not least <= int(value) < 2**63:
        raise ValueError(f"{name}: expected at least {least}, got {value}" if value < least else f"{name} is too large")
    return int(value)


def number(name: str, value: Any, above: float = -math.inf, least: float = -math.inf) -> float:
    """A finite real number, larger than one bound and at least as large as another, given as a number or as a tensor of
    one entry. Raises ``TypeError`` or ``ValueError``.

    >>> number("regul", torch.tensor(0.5))
    0.5
    """
    real = isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex())
    if not real or isinstance(value, bool):
        raise TypeError(f"{name}: expected a number, got {described(value)}")
    value = float(value)
    if not math.isfinite(value) or value <= above or value < least:
        bound = f" above {above:g}" if above > -math.inf else f" of at least {least:g}" if least > -math.inf else ""
        raise ValueError(f"{name}: expected a finite number{bound}, got {value}")
    return value


def how_many(name: str, value: Any, most: int) -> int | None:
    """None, or a whole number of things of which there are ``most``.

    >>> how_many("eig: k", 2, most=3)
    2
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: expected how many as an integer, got {described(value)}")
    if not 0 <= int(value) <= most:
        raise ValueError(f"{name}={int(value)} is not between 0 and {most}, which is all there are")
    return int(value)


def scalar(value: Any) -> float | None:
    """A number or an array of no axes as a float, None for everything else.

    >>> scalar(2), scalar(torch.tensor(0.5)), scalar("2")
    (2.0, 0.5, None)
    """
    if isinstance(value, Tensor):
        return float(value) if value.ndim == 0 and not value.is_complex() else None
    if isinstance(value, Real):
        return float(value)
    real = isinstance(value, np.ndarray) and value.ndim == 0 and value.dtype.kind in "iuf"
    return float(value) if real else None


def flag(name: str, value: Any) -> None:
    """Raise ``TypeError`` unless it is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {described(value)}")


def dtype(value: Any, real: bool = False) -> None:
    """Raise ``TypeError`` unless it is a dtype of torch, or None. real: it must be one of real numbers."""
    if value is not None and not isinstance(value, torch.dtype):
        raise TypeError(f"dtype: expected a torch.dtype such as torch.float64, got {described(value)}")
    if real and value is not None and not value.is_floating_point:
        raise TypeError(f"dtype: expected one of real numbers such as torch.float64, got {value}")


def path(name: str, value: Any, remedy: str) -> None:
    """Raise ``TypeError`` unless it is the path of a file or folder."""
    if not isinstance(value, str | bytes | os.PathLike):
        raise TypeError(f"{name}: expected a path, got {described(value)}: {remedy}")


#: The methods by which the right side of an operator takes part.
_REFLECTED = {"+": "radd", "-": "rsub", "*": "rmul", "/": "rtruediv", "**": "rpow", "@": "rmatmul"}


def unfit(sign: str, left: Any, right: Any, remedy: str) -> Any:
    """What an operator returns that has no meaning for what is on its right: NotImplemented if that is an object of
    another class that may know what to do, as Python asks for. Otherwise raises ``TypeError``.
    """
    of = type(right).__module__.partition(".")[0]
    if (
        of not in ("builtins", "torch", "numpy")
        and type(right) is not type(left)
        and hasattr(type(right), f"__{_REFLECTED[sign]}__")
    ):
        return NotImplemented
    return refuse(sign, left, right, remedy)


def refuse(sign: str, left: Any, right: Any, remedy: str) -> NoReturn:
    """Raise ``TypeError`` for an operator between two things that it has no meaning for."""
    raise TypeError(f"{described(left)} {sign} {described(right)} has no meaning: {remedy}")


# Of calls


def called_as(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """The same function; ``TypeError`` for arguments that it does not take, or lacks, says which it takes.

    >>> @called_as
    ... def add(one, other): ...
    >>> add(1, othr=2)
    Traceback (most recent call last):
    ...
    TypeError: add: got an unexpected keyword argument 'othr' (did you mean 'other'?): it is called as add(one, other)
    """

    @wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return function(*args, **kwargs)
        except TypeError as error:
            if error.__traceback__ is None or error.__traceback__.tb_next is not None:  # it comes from inside
                raise
            problem = _problem_of_call(function, args, kwargs)
        raise TypeError(problem) from None

    return call


def _problem_of_call(function: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> str:
    """What is wrong with arguments that a function does not take."""
    name = function.__qualname__.removesuffix(".__init__")
    parameters = {n: p for n, p in inspect.signature(function).parameters.items() if n not in ("self", "cls")}
    unknown = [option for option in options if option not in parameters]
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        problem = f"got an unexpected keyword argument {unknown[0]!r}{near(unknown[0], parameters)}"
    else:
        try:
            inspect.signature(function).bind(*args, **options)
            problem = "cannot be called like this"
        except TypeError as error:
            problem = str(error)
    return f"{name}: {problem}: it is called as {name}({', '.join(map(_shown, parameters.values()))})"


def _shown(parameter: inspect.Parameter) -> str:
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        return str(parameter).partition(":")[0]
    return parameter.name if parameter.default is parameter.empty else f"{parameter.name}="


def model(value: Any) -> None:
    """Raise ``TypeError`` unless a model is one."""
    if isinstance(value, nn.Module):
        return
    if isinstance(value, type) and issubclass(value, nn.Module):
        raise TypeError(f"model: expected an instance, got the class {value.__name__}: make one, {value.__name__}(...)")
    swapped = isinstance(value, Tensor | tuple | list | torch.utils.data.DataLoader)
    hint = ": the model comes first, then the loader" if swapped else ""
    raise TypeError(f"model: expected an nn.Module, got {described(value)}{hint}")


def loader(value: Any, name: str = "loader") -> None:
    """Raise ``TypeError`` unless minibatches can be read from a value."""
    if isinstance(value, nn.Module):
        raise TypeError(f"{name}: expected data, got the model {type(value).__name__}: the model comes first")
    data.require_loader(value, name)


def function(value: Any, name: str = "function") -> None:
    """Raise ``TypeError`` unless a function is one, or None."""
    if value is not None and (not callable(value) or (isinstance(value, type) and issubclass(value, nn.Module))):
        raise TypeError(
            f"{name}: expected a function from a minibatch to outputs, got {described(value)}: write e.g. "
            f"{name}=lambda x, y: model(x)"
        )


def device(value: Any) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless a device is one, or None."""
    if value is None or isinstance(value, torch.device):
        return
    if not isinstance(value, str):
        raise TypeError(f"device: expected a torch.device or a string, got {described(value)}")
    try:
        torch.device(value)
    except RuntimeError as error:
        remedy = ' (did you mean "cuda"?)' if value.startswith("gpu") else near(value, ("cpu", "cuda", "mps", "xpu"))
        raise ValueError(f'device={value!r} is no device of torch{remedy}: pass e.g. "cpu" or "cuda:0"') from error


def call(
    of_model: Any, of_loader: Any, of_function: Any, layer_collection: Any, of: type, on: Any, name: str = "loader"
) -> None:
    """Check what all constructors take. of: the class of layer collections."""
    model(of_model)
    loader(of_loader, name)
    function(of_function)
    if layer_collection is not None:
        instance("layer_collection", layer_collection, of, "make one with LayerCollection.from_model(model, *names)")
    device(on)


#: What may count as one example.
UNITS = ("example", "minibatch")


def of_training(batch_statistics: Any, unit: Any) -> None:
    """Check what is asked of a model in training."""
    flag("batch_statistics", batch_statistics)
    one_of("unit", unit, UNITS)


def generator(value: Any) -> None:
    """Raise ``TypeError`` unless a source of randomness is one of torch, or None."""
    if value is not None:
        instance("generator", value, torch.Generator, "pass torch.Generator().manual_seed(0)")


def loss(value: Any, name: str = "loss") -> None:
    """Raise ``TypeError`` unless a loss can be called, or None."""
    if isinstance(value, type):
        raise TypeError(f"{name}: expected an instance, got the class {value.__name__}: pass {value.__name__}()")
    if value is not None and not callable(value):
        raise TypeError(
            f"{name}: expected a loss of torch.nn or a function of outputs and targets, got {described(value)}: pass "
            "e.g. nn.CrossEntropyLoss()"
        )


def representation(value: Any, base: type, options: dict[str, Any], matrix: Callable[..., Any], method: str) -> None:
    """Raise ``TypeError`` unless a representation is a class of matrices that takes these options.

    base: the class of all of them. matrix: the function that was called. method: the one of its methods that will
    receive the options, "plan" or "project"; ``NotImplementedError`` if it has none.
    """
    kind = value.func if isinstance(value, partial) else value
    of = f"{base.__name__} class, e.g. PMatKFAC, a partial of one or PMatMixed.of(...)"
    if isinstance(kind, base):
        raise TypeError(f"representation: expected a {of}, got an instance of {type(kind).__name__}: pass the class")
    if isinstance(kind, type):
        if not issubclass(kind, base):
            raise TypeError(f"representation: expected a {of}, got {described(kind)}")
    elif not callable(kind) or isinstance(kind, nn.Module):
        raise TypeError(f"representation: expected a {of}, got {described(kind)}")
    elif not _accepts(kind, ("layer_collection", "generator", "examples", *options)):
        raise TypeError(f"representation: expected a {of}, got a function that takes other arguments")
    if not isinstance(kind, type):
        return
    inherited = [getattr(kind, name).__func__ is getattr(base, name).__func__ for name in (method, "_estimate")]
    if all(inherited):
        getattr(kind, method)(*([[]] if method == "plan" else [None, []]))  # says why it cannot
    if options:
        _check_options(kind, options, matrix, method)


def _check_options(kind: type, options: dict[str, Any], matrix: Callable[..., Any], method: str) -> None:
    own = [getattr(kind, method), kind._estimate, kind.__init__]  # type: ignore[attr-defined,misc]
    of_methods = [inspect.signature(f).parameters for f in own]
    if any(p.kind is p.VAR_KEYWORD for p in of_methods[0].values()):
        return
    hidden = {"self", "layers", "operator", "layer_collection", "generator", "data", "examples", "options"}
    known = {n for of in of_methods for n, p in of.items() if p.kind is not p.VAR_KEYWORD and n not in hidden}
    every = {n for n, p in inspect.signature(matrix).parameters.items() if p.kind is not p.VAR_KEYWORD}
    for name in options.keys() - known - _OLD_OPTIONS:
        of_all = f"; {kind.__name__} takes {', '.join(sorted(known))}" if known else f"; {kind.__name__} takes none"
        raise TypeError(f"{matrix.__name__}: unknown option {name!r}{near(name, known | every)}{of_all}")


def keywords(name: str, function: Callable[..., Any], options: Iterable[str], given: Iterable[str] = ()) -> None:
    """Raise ``TypeError`` for an option that a function does not take, or is given already."""
    known = [n for n in inspect.signature(function).parameters if n not in given]
    for option in options:
        if option not in known:
            raise TypeError(f"{name}: unknown option {option!r}{near(option, known)}")


#: Options in NNGeometry's words.
_OLD_OPTIONS = {"strategy", "eigendecomposition"}


def _accepts(f: Any, names: Iterable[str]) -> bool:
    try:
        inspect.signature(f).bind(**dict.fromkeys(names))
    except TypeError:
        return False
    except ValueError:
        return True
    return True


def variant(value: Any, of: type, known: Sequence[str]) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless a likelihood is one, or the name of one."""
    if isinstance(value, of):
        return
    if not isinstance(value, str):
        hint = f"pass {value.__name__}()" if isinstance(value, type) else "make one, e.g. Categorical()"
        raise TypeError(f"variant: expected a Likelihood or its name, got {described(value)}: {hint}")
    if value not in known:
        raise ValueError(
            f"variant={value!r} is unknown{near(value, known)}: use one of {', '.join(known)}, or a Likelihood object"
        )


# Of losses and models, explained when they fail


def explaining(of: Any, compute: Callable[..., Any]) -> Callable[..., Any]:
    """The same function of outputs and targets; what a loss raises in it becomes a sentence with its arguments."""

    @wraps(compute)
    def explained(f: Tensor, *targets: Any) -> Any:
        try:
            return compute(f, *targets)
        except (TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
            if _is_ours(error):
                raise
            _explain(of, f, targets, error)

    return explained


def _is_ours(error: Exception) -> bool:
    """Whether an error is a sentence of this library, rather than of torch or Python."""
    if isinstance(error, NotImplementedError | torch.OutOfMemoryError):
        return True
    *_, (frame, _) = walk_tb(error.__traceback__)
    inside = frame.f_code.co_filename.startswith(_HERE)
    return inside and (isinstance(error, ValueError) or str(error).startswith(("loss", "target")))


def _explain(of: Any, f: Tensor, targets: Sequence[Any], error: Exception) -> NoReturn:
    """Raise ``TypeError`` or ``ValueError`` with what is wrong with the targets of a loss, as far as it can be seen."""
    name = getattr(of, "__name__", type(of).__name__)
    if not targets:
        raise TypeError(f"loss: {name} needs targets, but minibatches have none: pass (x, y)") from error
    y = targets[0]
    if isinstance(of, nn.Module):
        if not isinstance(y, Tensor):
            raise TypeError(f"loss: {name} needs tensors as targets, got {described(y)}: convert them") from error
        if isinstance(of, nn.CrossEntropyLoss | nn.NLLLoss):
            problem = _problem_of_labels(f, y, of.ignore_index)
            if problem:
                raise ValueError(f"loss: {name} {problem}") from error
    shapes = ", ".join(f"{tuple(t.shape)} {t.dtype}" if isinstance(t, Tensor) else described(t) for t in targets)
    raise ValueError(
        f"loss: {name} fails for outputs {tuple(f.shape)} {f.dtype} and targets {shapes} ({error}): it is called as "
        "loss(outputs, *targets) and returns a tensor that depends on the outputs"
    ) from error


def _problem_of_labels(f: Tensor, y: Tensor, ignored: int) -> str:
    """What is wrong with the classes given for outputs ``(B, K, ...)``; empty if nothing is."""
    if y.is_floating_point():
        if y.shape == f.shape:
            return ""
        return (
            f"got targets {tuple(y.shape)} {y.dtype} for outputs {tuple(f.shape)}: pass classes as integers, y.long(), "
            "or a probability for each class"
        )
    if y.shape == f.shape and f.ndim > 1:
        return f"got integer targets in the shape of the outputs {tuple(f.shape)}: pass y.argmax(1), or y.double()"
    expected = (f.shape[0], *f.shape[2:])
    if y.shape != expected:
        return f"expects targets {tuple(expected)} for outputs {tuple(f.shape)}, got {tuple(y.shape)}"
    if y.dtype != torch.int64:
        return f"got targets {y.dtype}: pass classes as y.long()"
    outside = y[(y != ignored) & ((y < 0) | (y >= f.shape[1]))]
    if outside.numel():
        return f"got the class {int(outside[0])} for outputs of {f.shape[1]} classes: they are 0 to {f.shape[1] - 1}"
    return ""


def labels(of: Any, f: Tensor, targets: Sequence[Any]) -> None:
    """Raise unless the targets of a cross-entropy are classes of these outputs, or probabilities of them."""
    if type(of) is nn.CrossEntropyLoss and targets and isinstance(targets[0], Tensor):
        y = targets[0]
        if y.dtype == torch.int64 and y.shape == (f.shape[0], *f.shape[2:]) and y.numel():
            least, most = y.aminmax()
            if least >= 0 and most < f.shape[1]:
                return
        problem = _problem_of_labels(f, y, of.ignore_index)
        if problem:
            raise ValueError(f"loss: CrossEntropyLoss {problem}")


def inputs(batch: Any, dtype: torch.dtype, error: Exception) -> None:
    """Raise a sentence with the minibatch if what a model raised may be because its inputs are of another dtype or of
    other shapes, or are positions in a table that has not so many.
    """
    found = {t.dtype for t in data.tensors_of(batch) if t.is_floating_point() or t.is_complex()} - {dtype}
    if "dtype" in str(error) or "same type" in str(error):
        if not found and all(t.dtype == dtype for t in data.tensors_of(batch)):
            raise ValueError(
                f"the forward pass of the model mixes dtypes ({error}), where the minibatch and the parameters are "
                f"{dtype}: leave casts (.float()) and torch.autocast out of it, or cast back to {dtype}"
            ) from error
        what = ", ".join(map(str, found or {t.dtype for t in data.tensors_of(batch)}))
        raise ValueError(
            f"the minibatch holds {what}, the model computes in {dtype} ({error}): cast one of them, x.to({dtype})"
        ) from error
    text = str(error).strip()
    if type(error) not in (RuntimeError, IndexError, AssertionError) or not _OF_SHAPES.search(text):
        return
    shapes = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in data.tensors_of(batch)) or "without tensors"
    raise type(error)(
        f"the model fails for the minibatch {shapes} ({text.splitlines()[0]}): give it inputs of the shapes and in the "
        "range that it takes, or pass function= to choose what it is called with"
    ) from error


#: What torch says of operands that do not fit together.
_OF_SHAPES = re.compile(r"shape|\bsizes?\b|dimension|elements|channels|index out of range in self")
