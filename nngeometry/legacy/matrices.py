"""Old names and arguments of matrices in parameter space."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .. import arguments
from ..blocks import Block, Spectral
from ..generator import Generator
from ..layercollection import LayerCollection
from ..object import PMat, PMatDense, PMatEKFAC, PMatEye, PMatKFAC, PMatLowRank, PMatMixed, PVector
from .layout import get_data, layout_of, make_kfac, parts_of, set_data
from .mixed import rules_of, sub_pmats
from .names import attach, renamed, warn
from .sources import TorchHooksJacobianBackend, remember
from .tools import cg

_DATA = "data: expected a block, as in another matrix's root, or tensors as NNGeometry lays them out"
#: The arguments of a matrix, in order; before 0.4 without the first.
ORDER = ("layer_collection", "generator", "data", "examples")


def _constructor(init: Callable[..., None]) -> Callable[..., None]:
    """``PMat*(generator)``, ``PMat*(generator, data, examples)``, and data in NNGeometry's layout."""

    @functools.wraps(init)
    def __init__(self: PMat, *args: Any, **kwargs: Any) -> None:
        kind = type(self)
        names = ORDER if args and isinstance(args[0], LayerCollection) else ORDER[1:]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        source, value = given.get("generator"), given.get("data")
        if "layer_collection" not in given and source is not None:
            if not hasattr(source, "layer_collection"):
                raise TypeError(
                    f"{kind.__name__}: generator: expected a Generator, got {arguments.described(source)}: use "
                    "FIM(model, loader, representation) and the like"
                )
            warn(f"{kind.__name__}(generator, ...)", f"{kind.__name__}(layer_collection, generator, ...)")
            given["layer_collection"] = source.layer_collection
        lc: Any = given.get("layer_collection")
        if lc is None:
            raise TypeError(
                f"{kind.__name__}: layer_collection is missing: use FIM(model, loader, {kind.__name__}) and the like, "
                "or pass LayerCollection.from_model(model)"
            )
        if "strategy" in given and given.pop("strategy") != "kfac":
            raise NotImplementedError(f"{kind.__name__}: strategy= other than 'kfac' is not here: leave it out")
        if given.pop("eigendecomposition", None) is not None:
            raise NotImplementedError(f"{kind.__name__}: eigendecomposition= is torch.linalg.eigh here: leave it out")
        if value is None and given.get("examples") is None:
            given["examples"] = getattr(source, "examples", None)
            if source is not None and given["examples"] is None:
                raise ValueError(f"{kind.__name__}(generator): the generator keeps no loader: give examples=loader too")
        layout = None if value is None or isinstance(value, Block) else layout_of(kind)
        if layout is not None:
            if not isinstance(value, Tensor | Mapping | tuple | list):
                raise TypeError(f"{kind.__name__}: {_DATA}, got {arguments.described(value)}")
            try:
                given["data"] = layout[1](lc, value)
            except (AttributeError, IndexError, KeyError, TypeError) as error:
                raise TypeError(f"{kind.__name__}: {_DATA}, got {arguments.described(value)} ({error})") from error
        elif value is not None and not isinstance(value, Block):
            raise TypeError(f"{kind.__name__}: {_DATA}, got {arguments.described(value)}")
        if isinstance(source, TorchHooksJacobianBackend) and value is None:
            given["generator"] = source = source.on(lc)
        remember(source, given.get("examples"))
        if "map_layers_to" in given:
            given["default"] = given.pop("default_representation")
            given["rules"] = rules_of(lc, given.pop("map_layers_to"))
        init(self, **given)
        if layout is not None:
            set_data(self, value)
        if isinstance(source, TorchHooksJacobianBackend) and value is None and source.centering:
            self.root = source.without_mean(self.root, given["examples"], kind)
        if isinstance(self, PMatEKFAC):
            vars(self)["_examples"] = given.get("examples")

    return __init__


def _eye_constructor(init: Callable[..., None]) -> Callable[..., None]:
    """``PMatEye(layer_collection, scaling)`` with a tensor."""

    @functools.wraps(init)
    def __init__(self: PMatEye, layer_collection: Any = None, *args: Any, **kwargs: Any) -> None:
        if args and isinstance(args[0], Tensor | float | int):
            kwargs["scaling"], args = args[0], args[1:]
        scaling = kwargs.get("scaling")
        if isinstance(scaling, Tensor):
            kwargs["scaling"] = arguments.number("PMatEye: scaling", scaling)
            if scaling.dtype != torch.get_default_dtype() or scaling.device != torch.empty(0).device:
                kwargs |= {"dtype": scaling.dtype, "device": scaling.device}
        init(self, layer_collection, *args, **kwargs)

    return __init__


#: What ``impl=`` and ``solve=`` may be for the exact solution, which is one here.
_EXACT = ("default", "solve", "eigendecomposition", "svd", "cg", "symeig")
#: Arguments of conjugate gradients.
_ITERATIVE = ("x0", "M", "atol", "max_iter")


def _solve(solve: Callable[..., Any]) -> Callable[..., Any]:
    """``solve(x, regul, impl=)``, ``solve(x, regul, solve=)`` and the arguments of conjugate gradients."""

    @functools.wraps(solve)
    def with_impl(self: PMat, b: Any = None, regul: Any = 1e-8, impl: Any = None, **options: Any) -> Any:
        if b is None:
            b = next((options.pop(old) for old in ("x", "v", "vs") if old in options), None)
        chosen = options.pop("solve", None) if impl is None else impl
        if chosen is not None:
            if isinstance(chosen, Mapping):
                return _solve_each(self, b, regul, chosen)
            if chosen == "lstsq" and isinstance(self, PMat):
                warn("solve(b, regul, solve='lstsq')", "pinv(atol=regul) @ b")
                return _without_small(self, regul, -1).mv(b)
            if callable(chosen) or chosen not in _EXACT:
                raise NotImplementedError(
                    f"{type(self).__name__}.solve: solve={chosen!r} is not here: leave it out, the solution is exact"
                )
            warn("solve(b, regul, impl=...)", "solve(b, regul), which is exact in every representation")
        if "use_pi" in options:
            warn("solve(b, regul, use_pi=...)", "solve(b, regul), which is exact in every representation")
            return _factored(self, regul, options.pop("use_pi")).mv(b)
        if any(name in options for name in _ITERATIVE):
            if not self.root.matrix_free:
                raise TypeError(
                    f"{type(self).__name__}.solve: {', '.join(n for n in _ITERATIVE if n in options)} is of an "
                    "iteration, and this matrix is solved exactly: leave it out"
                )
            warn("solve(b, regul, x0=, M=, max_iter=)", "solve(b, regul, rtol=, preconditioner=)")
            return cg(self, b, regul, **options)
        return solve(self, b, regul, **options)

    return with_impl


def _solve_each(self: PMat, b: Any, regul: Any, chosen: Mapping[Any, Any]) -> Any:
    """``solve={PMatEKFAC: "lstsq"}`` of a mixed matrix: the solution by representation."""
    if not isinstance(self, PMatMixed):
        raise TypeError(f"{type(self).__name__}.solve: solve= with one value for each representation is of PMatMixed")
    mine = b.on(self.layer_collection)
    flat = mine.to_torch().clone()
    slices = self.layer_collection.slices()
    for kind, matrix in sub_pmats(self).items():
        part = matrix.solve(mine.on(matrix.layer_collection), regul, solve=chosen.get(kind, "default"))  # type: ignore[call-arg]
        for name, s in matrix.layer_collection.slices().items():
            flat[..., slices[name]] = part.to_torch()[..., s]
    return mine._like(flat)


def _without_small(self: PMat, regul: float, exponent: float) -> PMat:
    """M**exponent on the eigenvectors of eigenvalues above regul, zero on the others."""
    if self.root.matrix_free:
        raise NotImplementedError(f"{type(self).__name__}: 'lstsq' needs eigenvalues, which products do not tell")
    return self._with(self.root.eig().apply(lambda l: torch.where(l > regul, l.clamp(min=1e-300) ** exponent, 0.0)))


def _inverse(self: PMat, regul: Any = 1e-8, use_pi: bool | None = None) -> PMat:
    """``(M + regul)^-1``. use_pi: if given, of KFAC, the inverse of the factors damped one by one instead.

    :meta private:
    """
    warn("inverse(regul)", "inv(regul)")
    inverse = self.inv(regul) if use_pi is None else _factored(self, regul, use_pi)
    device = self.device
    inverse.generator = SimpleNamespace(layer_collection=self.layer_collection, get_device=lambda: device)
    return inverse


def _inv(inv: Callable[..., PMat]) -> Callable[..., PMat]:
    """``inv(regul, use_pi)`` of KFAC."""

    @functools.wraps(inv)
    def with_pi(self: PMat, regul: Any = 1e-8, use_pi: bool | None = None) -> PMat:
        return inv(self, regul) if use_pi is None else _factored(self, regul, use_pi)

    return with_pi


def _factored(matrix: PMat, regul: float, use_pi: bool, exponent: float = -1) -> PMat:
    """KFAC with each factor damped before it is inverted, or raised to a power (Martens and Grosse 2015, 1503.05671,
    section 6.3).
    """
    if not isinstance(matrix, PMatKFAC):
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

    return PMatKFAC(
        matrix.layer_collection,
        data=make_kfac(matrix.layer_collection, {name: inverse(one) for name, one in get_data(matrix).items()}),
    )


def _power(power: Callable[..., PMat]) -> Callable[..., PMat]:
    """``pow(exponent, regul=, use_pi=, impl=)``: of ``M + regul``."""

    @functools.wraps(power)
    def with_regul(
        self: PMat,
        exponent: float | None = None,
        regul: float | None = None,
        use_pi: bool | None = None,
        impl: str | None = None,
        pow: float | None = None,
    ) -> PMat:
        exponent = pow if exponent is None else exponent
        if exponent is None:
            raise TypeError("pow: expected an exponent, a number, got None")
        if isinstance(use_pi, str):  # PMatEKFAC.pow(pow, regul, impl)
            use_pi, impl = None, use_pi
        if impl == "lstsq":
            warn("pow(exponent, regul, impl='lstsq')", "pinv(atol=regul).pow(-exponent)")
            return _without_small(self, 1e-8 if regul is None else regul, exponent)
        if impl not in (None, "default"):
            raise NotImplementedError(f"pow: impl={impl!r} is not 'default' or 'lstsq'")
        if use_pi is not None:
            warn("pow(exponent, regul, use_pi)", "pow(exponent)")
            return _factored(self, 1e-8 if regul is None else regul, use_pi, exponent)
        if regul is None:
            return power(self, exponent)
        warn("pow(exponent, regul)", "(M + PMatEye(layer_collection, scaling=regul)).pow(exponent), or inv(regul)")
        shift, p = float(regul), exponent

        def shifted(l: Tensor) -> Tensor:
            if (p != int(p) and bool((l + shift < 0).any())) or (p < 0 and bool((l + shift == 0).any())):
                raise ValueError(f"pow({p}): M + {shift} has an eigenvalue of {float((l + shift).min()):.3g}")
            return (l + shift) ** p

        return self._with(self.root.eig().apply(shifted))

    return with_regul


def _rows_first(matrix: PMat) -> Tensor:
    """The flat parameters in the order of the Kronecker product: rows of the weight with their bias last."""
    pieces = []
    for layer, s in zip(
        matrix.layer_collection.layers.values(), matrix.layer_collection.slices().values(), strict=True
    ):
        index = torch.arange(s.start, s.stop, device=matrix.device)
        beside = layer.kronecker and len(layer.params) > 1  # without a bias the order is that of the weight
        pieces.append((layer.packing.pack(index) if beside else index).flatten())
    return torch.cat(pieces)


def _to_torch(to_torch: Callable[[PMat], Tensor]) -> Callable[..., Tensor]:
    """``to_torch(split_weight_bias=)``."""

    @functools.wraps(to_torch)
    def with_split(self: PMat, split_weight_bias: bool = True) -> Tensor:
        if split_weight_bias:
            return to_torch(self)
        warn("to_torch(split_weight_bias=False)", "to_torch(), in the order of the parameters")
        order = _rows_first(self)
        return to_torch(self)[order][:, order]

    return with_split


def _get_diag(get_diag: Callable[..., Any]) -> Callable[..., Any]:
    """``get_diag(split_weight_bias=)``."""

    @functools.wraps(get_diag)
    def with_split(self: PMat, estimator: Any = None, split_weight_bias: bool = True) -> Any:
        if isinstance(estimator, bool):
            estimator, split_weight_bias = None, estimator
        if split_weight_bias:
            return get_diag(self, estimator)
        warn("get_diag(split_weight_bias=False)", "get_diag(), in the order of the parameters")
        return get_diag(self, estimator)[_rows_first(self)]

    return with_split


def _update_diag(update_diag: Callable[..., PMatEKFAC]) -> Callable[..., PMatEKFAC]:
    """``update_diag()`` on the examples of the estimation."""

    @functools.wraps(update_diag)
    def with_default(self: PMatEKFAC, examples: Any = None) -> PMatEKFAC:
        if not isinstance(self.generator, Generator):
            self.generator = None
        if examples is None:
            warn("update_diag()", "update_diag(examples)")
            examples = vars(self).get("_examples")
        return update_diag(self, examples)

    return with_default


def _get_kfe(self: PMatEKFAC, split_weight_bias: bool = True) -> dict[str, Tensor]:
    """The eigenvectors of each layer as columns, in the order of ``.data[1]``.

    :meta private:
    """
    warn("get_KFE()", "eig(), or the bases of .data[0]")
    bases = {}
    for name, _, packing, block in parts_of(self):
        spectral = block.eig()
        assert isinstance(spectral, Spectral)
        q = spectral.basis.to_dense()
        bases[name] = packing.unpack(q.T.reshape(-1, *packing.shape)).T if split_weight_bias else q
    return bases


def _compute_eigendecomposition(self: PMat, impl: str | None = None) -> None:
    """Store ``evals`` and ``evecs``: ascending by "eigh" (or "symeig"), descending by "svd", which is the default of
    PMatLowRank.

    :meta private:
    """
    check_impl(impl)
    warn("compute_eigendecomposition()", "eig()")
    if isinstance(self, PMatKFAC):
        factors = {n: one if isinstance(one, tuple) else (one,) for n, one in get_data(self).items()}
        pairs = {n: [torch.linalg.eigh(torch.diag(t) if t.ndim == 1 else t) for t in ts] for n, ts in factors.items()}
        vars(self)["evals"] = {n: tuple(l for l, _ in pair) for n, pair in pairs.items()}
        vars(self)["evecs"] = {n: tuple(q for _, q in pair) for n, pair in pairs.items()}
        return
    l, vectors = self.root.top(None)
    ascending = impl in ("eigh", "symeig") or (impl is None and not isinstance(self, PMatLowRank))
    if impl == "svd":
        order = l.abs().argsort(descending=True)
        l, vectors = l[order], vectors[order]
    vars(self)["evals"] = l.flip(0) if ascending else l
    vars(self)["evecs"] = (vectors.flip(0) if ascending else vectors).T


def check_impl(impl: str | None) -> None:
    """Raise ``NotImplementedError`` unless it is the name of an eigendecomposition."""
    if impl not in (None, "eigh", "symeig", "svd"):
        raise NotImplementedError(f"compute_eigendecomposition: impl={impl!r} is not 'eigh' or 'svd'")


def get_eigendecomposition(self: PMat) -> tuple[Any, Any]:
    """What :meth:`compute_eigendecomposition` stored.

    :meta private:
    """
    return vars(self)["evals"], vars(self)["evecs"]


def _project_to_diag(self: PMatDense, v: PVector) -> Tensor:
    """``v`` in the eigenvectors of :meth:`compute_eigendecomposition`.

    :meta private:
    """
    return vars(self)["evecs"].T @ v.to_torch()


def _project_from_diag(self: PMatDense, v: Tensor) -> PVector:
    """The inverse of :meth:`project_to_diag`.

    :meta private:
    """
    return PVector(self.layer_collection, vars(self)["evecs"] @ v)


def install() -> None:
    """Attach the old names and arguments of matrices."""
    attach(
        PMat,
        __init__=_constructor(PMat.__init__),
        solve=_solve(PMat.solve),
        pow=_power(PMat.pow),
        to_torch=_to_torch(PMat.to_torch),
        get_diag=_get_diag(PMat.get_diag),
        inverse=_inverse,
        get_dense_tensor=renamed(
            "get_dense_tensor()", "to_torch()", lambda self, *args, **kw: self.to_torch(*args, **kw)
        ),
        frobenius_norm=renamed("frobenius_norm()", "norm()", lambda self: self.norm()),
        mm=renamed("mm(other)", "M @ other", lambda self, other: self @ other),
        mmap=renamed("mmap(map)", "M @ map", lambda self, pfmap: self @ pfmap),
        pinverse=renamed("pinverse(atol)", "pinv(atol=)", lambda self, atol=1e-8: self.pinv(atol=atol)),
        solvePVec=renamed("solvePVec", "solve", lambda self, *args, **kw: self.solve(*args, **kw)),
        solvePFMap=renamed("solvePFMap", "solve", lambda self, *args, **kw: self.solve(*args, **kw)),
        get_block_torch=renamed(
            "get_block_torch(name, layer)",
            "block(name).to_torch()",
            lambda self, name, layer=None, **kw: self.block(name).to_torch(**kw),
        ),
        get_device=lambda self: self.device,
        compute_eigendecomposition=_compute_eigendecomposition,
        get_eigendecomposition=get_eigendecomposition,
    )
    attach(PMatDense, project_to_diag=_project_to_diag, project_from_diag=_project_from_diag)
    attach(
        PMatEye, __init__=_eye_constructor(PMatEye.__init__), scaling=property(lambda self: self.trace() / self.size(0))
    )
    attach(PMatKFAC, inv=_inv(PMatKFAC.inv))
    attach(PMatEKFAC, update_diag=_update_diag(PMatEKFAC.update_diag), get_KFE=_get_kfe)
