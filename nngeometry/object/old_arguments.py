"""What matrices and maps make of NNGeometry's arguments. Their own signatures take these, and hand them to here."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from .. import arguments
from ..blocks import Block
from ..generator import Generator
from ..layercollection import LayerCollection
from ..spelling import warn
from . import tensors
from .vector import PVector

# Constructors


def of_source(
    name: str, layer_collection: Any, generator: Any, data: Any, examples: Any, new: str = ""
) -> tuple[Any, Any, Any, Any]:
    """``X(generator, data, examples)``, or with the layer collection before it, as the latter. new: what to write."""
    if layer_collection is not None and not isinstance(layer_collection, LayerCollection):
        moved = [v for v in (generator, data) if v is not None]
        value = next((v for v in moved if _is_data(v)), None)
        loader = next((v for v in moved if not _is_data(v)), examples)
        layer_collection, generator, data, examples = None, layer_collection, value, loader
    if layer_collection is None:
        found = getattr(generator, "layer_collection", None)
        if found is None and new:
            raise TypeError(f"{name}: there are no entries and no generator of them: use {new}")
        if found is None and generator is not None:
            raise TypeError(
                f"{name}: generator: expected a Generator, got {arguments.described(generator)}: use FIM(model, "
                "loader, representation) and the like"
            )
        if found is None:
            raise TypeError(
                f"{name}: layer_collection is missing: use FIM(model, loader, {name}) and the like, or pass "
                "LayerCollection.from_model(model)"
            )
        warn(f"{name}(generator, ...)", new or f"{name}(layer_collection, generator, ...)")
        layer_collection = found
    if data is None:
        if examples is None and generator is not None:
            examples = loader_of(generator, f"{name}(generator)")
        if hasattr(generator, "on"):
            generator = generator.on(layer_collection)
        elif new:
            raise TypeError(f"{name}: there are no entries and no generator of them: use {new}")
        _remember(generator, examples)
    return layer_collection, generator, data, examples


def loader_of(generator: Any, what: str) -> Any:
    """The loader that a generator keeps. Raises ``ValueError`` if it has none."""
    examples = getattr(generator, "examples", None)
    if examples is None:
        raise ValueError(f"{what}: the generator keeps no loader: give examples=loader too")
    return examples


def _is_data(value: Any) -> bool:
    """Whether it is what a matrix consists of, not a loader."""
    layers = isinstance(value, tuple) and all(isinstance(v, Mapping) for v in value)
    return isinstance(value, Block | Tensor | Mapping) or layers


def _remember(source: Any, examples: Any) -> None:
    """Keep the loader of a matrix for those that are made of its generator alone, ``PMatDiag(F.generator)``; one of
    several is not told.
    """
    if isinstance(source, Generator) and isinstance(examples, DataLoader):
        vars(source)["examples"] = examples if getattr(source, "examples", examples) is examples else None


def refuse(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options of a representation without those that say what is so here anyway."""
    options = dict(options)
    if options.pop("strategy", "kfac") != "kfac":
        raise NotImplementedError(f"{name}: strategy= other than 'kfac' is not here: leave it out")
    if options.pop("eigendecomposition", None) is not None:
        raise NotImplementedError(f"{name}: eigendecomposition= is torch.linalg.eigh here: leave it out")
    return options


# Solutions and powers

#: What ``impl=`` and ``solve=`` may be for the exact solution, which is one here.
_EXACT = ("default", "solve", "eigendecomposition", "svd", "cg", "symeig")


def _vector_of(b: Any, options: dict[str, Any]) -> Any:
    """The right-hand side, by whatever name."""
    named = [options.pop(old) for old in ("x", "v", "vs") if old in options]
    return named[0] if b is None and named else b


def _no_others(name: str, options: Mapping[str, Any]) -> None:
    for option in options:
        raise TypeError(f"{name} got an unexpected keyword argument {option!r}")


def solve(self: Any, b: Any, regul: Any, impl: Any = None, **options: Any) -> Any:
    """``solve(x, regul, impl=)``, ``solve(x, regul, solve=)`` and the arguments of conjugate gradients, of a matrix."""
    name = f"{type(self).__name__}.solve"
    b = _vector_of(b, options)
    chosen = options.pop("solve", None) if impl is None else impl
    if isinstance(chosen, Mapping):
        return _solve_each(self, b, regul, chosen)
    if chosen == "lstsq":
        warn("solve(b, regul, solve='lstsq')", "pinv(atol=regul) @ b")
        return without_small(self, regul, -1).mv(b)
    if chosen is not None:
        if callable(chosen) or chosen not in _EXACT:
            raise NotImplementedError(f"{name}: solve={chosen!r} is not here: leave it out, the solution is exact")
        warn("solve(b, regul, impl=...)", "solve(b, regul), which is exact in every representation")
    if "use_pi" in options:
        warn("solve(b, regul, use_pi=...)", "solve(b, regul), which is exact in every representation")
        return factored(self, regul, options.pop("use_pi")).mv(b)
    mine = {k: options.pop(k) for k in ("rtol", "preconditioner") if options.get(k) is not None}
    options = {k: v for k, v in options.items() if k not in ("rtol", "preconditioner")}
    iterative = {k: options.pop(k) for k in ("x0", "M", "atol", "max_iter") if k in options}
    _no_others(f"{name}()", options)
    if not iterative:
        return self.solve(b, regul, **mine)
    if not self.root.matrix_free:
        raise TypeError(
            f"{name}: {', '.join(iterative)} is of an iteration, and this matrix is solved exactly: leave it out"
        )
    warn("solve(b, regul, x0=, M=, max_iter=)", "solve(b, regul, rtol=, preconditioner=)")
    return cg(self, b, regul, **mine, **iterative)


def _solve_each(self: Any, b: Any, regul: Any, chosen: Mapping[Any, Any]) -> Any:
    """``solve={PMatEKFAC: "lstsq"}`` of a mixed matrix: the solution by representation."""
    if not hasattr(type(self), "sub_pmats"):
        raise TypeError(f"{type(self).__name__}.solve: solve= with one value for each representation is of PMatMixed")
    mine = b.on(self.layer_collection)
    flat = mine.to_torch().clone()
    slices = self.layer_collection.slices()
    for kind, matrix in self.sub_pmats.items():
        part = matrix.solve(mine.on(matrix.layer_collection), regul, chosen.get(kind, "default"))
        for name, s in matrix.layer_collection.slices().items():
            flat[..., slices[name]] = part.to_torch()[..., s]
    return mine._like(flat)


def solve_kernel(self: Any, b: Any, regul: Any, impl: Any = None, **options: Any) -> Any:
    """``solve(u, regul, solve=)`` of a kernel."""
    b = _vector_of(b, options)
    chosen = options.pop("solve", None) if impl is None else impl
    rtol = options.pop("rtol", None)
    _no_others(f"{type(self).__name__}.solve()", options)
    if chosen is not None:
        warn("solve(b, regul, solve=...)", "solve(b, regul), which is exact")
        if chosen not in ("default", "solve"):
            raise NotImplementedError(f"{type(self).__name__}.solve: solve={chosen!r} is not 'default' or 'solve'")
    return self.solve(b, regul, rtol=rtol)


def pow(
    self: Any, exponent: Any, regul: Any = None, use_pi: Any = None, impl: str | None = None, pow: Any = None
) -> Any:
    """``pow(exponent, regul=, use_pi=, impl=)``: of ``M + regul``."""
    exponent = pow if exponent is None else exponent
    if exponent is None:
        raise TypeError("pow: expected an exponent, a number, got None")
    if isinstance(use_pi, str):  # PMatEKFAC.pow(pow, regul, impl)
        use_pi, impl = None, use_pi
    if impl == "lstsq":
        warn("pow(exponent, regul, impl='lstsq')", "pinv(atol=regul).pow(-exponent)")
        return without_small(self, 1e-8 if regul is None else regul, exponent)
    if impl not in (None, "default"):
        raise NotImplementedError(f"pow: impl={impl!r} is not 'default' or 'lstsq'")
    if use_pi is not None:
        warn("pow(exponent, regul, use_pi)", "pow(exponent)")
        return factored(self, 1e-8 if regul is None else regul, use_pi, exponent)
    if regul is None:
        return self.pow(exponent)
    warn("pow(exponent, regul)", "(M + PMatEye(layer_collection, scaling=regul)).pow(exponent), or inv(regul)")
    shift, p = float(regul), exponent

    def shifted(l: Tensor) -> Tensor:
        if (p != int(p) and bool((l + shift < 0).any())) or (p < 0 and bool((l + shift == 0).any())):
            raise ValueError(f"pow({p}): M + {shift} has an eigenvalue of {float((l + shift).min()):.3g}")
        return (l + shift) ** p

    return self._with(self.root.eig().apply(shifted))


def without_small(self: Any, regul: float, exponent: float) -> Any:
    """M**exponent on the eigenvectors of eigenvalues above regul, zero on the others."""
    if self.root.matrix_free:
        raise NotImplementedError(f"{type(self).__name__}: 'lstsq' needs eigenvalues, which products do not tell")
    return self._with(self.root.eig().apply(lambda l: torch.where(l > regul, l.clamp(min=1e-300) ** exponent, 0.0)))


def factored(matrix: Any, regul: Any, use_pi: bool, exponent: float = -1) -> Any:
    """KFAC with each factor damped before it is inverted, or raised to a power (Martens and Grosse 2015, 1503.05671,
    section 6.3).
    """
    if matrix._tensors is not tensors.KFAC:
        raise TypeError(f"use_pi: {type(matrix).__name__} has no factors to damp one by one: leave it out")

    def power(t: Tensor, r: Tensor) -> Tensor:
        eye = torch.eye(t.shape[-1], dtype=t.dtype, device=t.device)
        damped = t + r[..., None, None] * eye
        if exponent == -1:
            return torch.linalg.inv(damped)
        l, q = torch.linalg.eigh(damped)
        if exponent != int(exponent) and bool((l < 0).any()):
            raise ValueError(f"pow({exponent}): a damped factor has a negative eigenvalue ({float(l.min()):.3g})")
        return (q * l.unsqueeze(-2) ** exponent) @ q.mT

    def inverse(one: Any) -> Any:
        if isinstance(one, Tensor):
            return power(one, torch.as_tensor(regul, dtype=one.dtype, device=one.device))
        a, g = (torch.diag(t) if t.ndim == 1 else t for t in one)
        mean_a, mean_g = (t.diagonal(dim1=-2, dim2=-1).mean(-1) for t in (a, g))
        if bool(((mean_a <= 0) | (mean_g <= 0)).any()):
            raise ValueError("use_pi: a factor is zero, so the damping of the factors is undefined: leave it out")
        pi = (mean_a / mean_g).sqrt() if use_pi else torch.ones_like(mean_a)
        damped = ((a, regul**0.5 * pi), (g, regul**0.5 / pi))
        return tuple(power(t, r) for t, r in damped)

    return matrix._rebuild(
        tensors.make_kfac(matrix.layer_collection, {name: inverse(one) for name, one in matrix.data.items()})
    )


def cg(
    A: Any,
    b: PVector,
    regul: float = 1e-8,
    x0: PVector | None = None,
    rtol: float = 1e-5,
    atol: float = 0.0,
    max_iter: int | None = None,
    M: Any = None,
) -> PVector:
    """``(A + regul)^-1 b`` by conjugate gradients, with M for a preconditioner; warns if max_iter was too few."""
    target = max(rtol * float(b.norm()), atol)
    x = 0.0 * b if x0 is None else x0
    r = b - A.mv(x) - regul * x
    p, before = 0.0 * b, 1.0
    for _ in range(10 * A.size(0) if max_iter is None else max_iter):
        if float(r.norm()) <= target:
            return x
        z = r if M is None else M.solve(r, regul=regul)
        now = float(r.dot(z))
        p, before = z + (now / before) * p, now
        Ap = A.mv(p) + regul * p
        step = now / float(p.dot(Ap))
        x, r = x + step * p, r - step * Ap
    if float(r.norm()) > target:
        warnings.warn(
            f"cg: residual {float(r.norm()):.3g} after max_iter products, the target was {target:.3g}",
            RuntimeWarning,
            stacklevel=2,
        )
    return x


# Orders


def rows_first(matrix: Any, entries: Tensor) -> Tensor:
    """A diagonal or all entries, in the order of the Kronecker product: rows of the weight with their bias last."""
    pieces = []
    lc = matrix.layer_collection
    for layer, s in zip(lc.layers.values(), lc.slices().values(), strict=True):
        index = torch.arange(s.start, s.stop, device=matrix.device)
        beside = layer.kronecker and len(layer.params) > 1  # without a bias the order is that of the weight
        pieces.append((layer.packing.pack(index) if beside else index).flatten())
    order = torch.cat(pieces)
    if entries.ndim == 1:
        warn("get_diag(split_weight_bias=False)", "get_diag(), in the order of the parameters")
        return entries[order]
    warn("to_torch(split_weight_bias=False)", "to_torch(), in the order of the parameters")
    return entries[order][:, order]
