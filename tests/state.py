"""What a call must find and leave: a picture of all that is the user's, models to take it of, and the public calls."""

from __future__ import annotations

import random
import signal
import sys
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import scipy.sparse.linalg  # noqa: F401
import sympy.utilities.exceptions  # noqa: F401 both are imported late otherwise, and add filters of warnings
import torch
from models import Shared
from torch import Tensor, nn
from torch.nn.modules import module as modules_of_torch
from torch.utils.checkpoint import checkpoint

from nngeometry import (
    FIM,
    GGN,
    EmpiricalFisher,
    FIM_MonteCarlo,
    FiniteDifference,
    FMatImplicit,
    FMatMemmap,
    FVector,
    GradientCovariance,
    GramMatrix,
    Hessian,
    Influence,
    Jacobian,
    LayerCollection,
    PFMapDense,
    PFMapFactored,
    PFMapImplicit,
    PMatBlockDiag,
    PMatDense,
    PMatDiag,
    PMatEKFAC,
    PMatImplicit,
    PMatKFAC,
    PMatLowRank,
    PMatMixed,
    PMatQuasiDiag,
    PVector,
    linalg,
)
from nngeometry.changes import _one_at_a_time, hooks_on_saved
from nngeometry.hierarchy import ggn_by_class
from nngeometry.spectrum import extreme_eigenpairs, layer_spectra, spectral_density

# The picture: names of things to values that can be compared.


def _tensor(t: Tensor | None, version: bool = True) -> Any:
    """A tensor as it is: which, where its entries are, what they are, and what autograd knows of it."""
    if t is None:
        return None
    with torch.no_grad():
        entries = t.detach().clone()
    found = {
        "object": id(t),
        "memory": t.data_ptr(),
        "entries": entries,
        "requires_grad": t.requires_grad,
        "is_leaf": t.is_leaf,
        "hooks": list(t._backward_hooks or ()),
        "after": list(getattr(t, "_post_accumulate_grad_hooks", None) or ()),
    }
    if t.is_leaf:
        found["grad"] = _tensor(t.grad)
    if version:
        found["version"] = t._version
    return found


def _plain(value: Any, version: bool = True) -> Any:
    """An attribute of a module: containers by what they hold, tensors by what they are, all else by identity."""
    if isinstance(value, Tensor):
        return _tensor(value, version)
    if isinstance(value, weakref.ref):
        return id(value())
    if isinstance(value, dict):
        return id(value), [(key, _plain(one, version)) for key, one in value.items()]
    if isinstance(value, list | tuple | set):
        return id(value), [_plain(one, version) for one in value]
    return value if isinstance(value, bool | int | float | str | None) else id(value)


def of_model(model: nn.Module, versions: bool = True) -> dict[str, Any]:
    """Modules with all of their attributes (hooks, modes and the order of their dicts are among these).

    versions: whether nothing was written, not even what was there before.
    """
    return {
        f"{name or 'model'}.{key}": value
        for name, module in model.named_modules(remove_duplicate=False)
        for key, value in {"class": type(module), **{k: _plain(v, versions) for k, v in vars(module).items()}}.items()
    }


def of_data(loader: Any) -> dict[str, Any]:
    """The minibatches of a list, which are looked at without being drawn."""
    batches = loader if isinstance(loader, list) else [loader]
    return {f"minibatch {k}": _plain(batch) for k, batch in enumerate(batches)}


def of_random() -> dict[str, Any]:
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002
    return {
        "random state of torch": torch.get_rng_state(),
        "random state of numpy": (kind, keys.tobytes(), *rest),
        "random state of python": random.getstate(),
        **{f"random state of {d}": torch.cuda.get_rng_state(d) for d in range(_cuda_devices())},
    }


def _cuda_devices() -> int:
    return torch.cuda.device_count() if torch.cuda.is_initialized() else 0


def of_process() -> dict[str, Any]:
    """Switches of torch and of Python, by which others are affected."""
    cuda, cudnn, c = torch.backends.cuda, torch.backends.cudnn, torch._C
    switches = {
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "multithreading of autograd": c._is_multithreading_enabled(),
        "anomaly mode": torch.is_anomaly_enabled(),
        "deterministic": (torch.are_deterministic_algorithms_enabled(), torch.get_deterministic_debug_mode()),
        "fill memory": torch.utils.deterministic.fill_uninitialized_memory,
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "threads": torch.get_num_threads(),
        "precision": torch.get_float32_matmul_precision(),
        "fast path of attention": torch.backends.mha.get_fastpath_enabled(),
        "flash": cuda.flash_sdp_enabled(),
        "efficient": cuda.mem_efficient_sdp_enabled(),
        "math": cuda.math_sdp_enabled(),
        "cudnn attention": cuda.cudnn_sdp_enabled(),
        "attention": (c._get_sdp_priority_order(), cuda.fp16_bf16_reduction_math_sdp_allowed()),
        "cudnn": (cudnn.enabled, cudnn.benchmark, cudnn.deterministic),
        "mkldnn": c._get_mkldnn_enabled(),
        "autocast": [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")]
        + [torch.is_autocast_cache_enabled()],
        "modes of functions": c._len_torch_function_stack(),
        "modes of dispatch": c._len_torch_dispatch_stack(),
        "levels of torch.func": c._functorch.get_dynamic_layer_stack_depth(),
        "in place in torch.func": c._functorch.get_inplace_requires_grad_allowed(),
        "functions in torch.func": c._functorch.get_single_level_autograd_function_allowed(),
        "hooks on what is saved": hooks_on_saved(),
        "hooks on all modules": [
            list(hooks)
            for name, hooks in sorted(vars(modules_of_torch).items())
            if name.startswith("_global") and isinstance(hooks, dict)
        ],
        "filters of warnings": (id(warnings.filters), list(warnings.filters)),
        "how warnings are shown": warnings.showwarning,
        "handlers of signals": [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)],
        "recursion limit": sys.getrecursionlimit(),
    }
    return {f"torch: {name}": value for name, value in switches.items()}


class Picture:
    """All that is the user's, as it was when this was made."""

    def __init__(self, *models: nn.Module, data: Any = (), random: bool = True, versions: bool = True) -> None:
        self.models, self.data, self.random, self.versions = models, data, random, versions
        self.before = self._now()

    def _now(self) -> dict[str, Any]:
        found = {
            f"{k}: {key}": v for k, model in enumerate(self.models) for key, v in of_model(model, self.versions).items()
        }
        found.update(of_data(self.data))
        found.update(of_process())
        if self.random:
            found.update(of_random())
        return found

    def changed(self) -> list[str]:
        """What is not as it was, by name, and how."""
        now = self._now()
        names = dict.fromkeys([*self.before, *now])
        found = [f"{name}: {d}" for name in names for d in _differences(self.before.get(name), now.get(name))]
        acquired = _one_at_a_time.acquire(blocking=False)
        if acquired:
            _one_at_a_time.release()
        return found if acquired else [*found, "the lock is held"]

    def check(self, when: str = "") -> None:
        """Raise if anything has changed."""
        changed = self.changed()
        assert not changed, when + "; ".join(changed[:4])


def _differences(one: Any, other: Any) -> list[str]:
    """Where two values differ."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        same = one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
        return [] if same or torch.allclose(one, other, 0, 0, equal_nan=True) else ["other entries"]
    if type(one) is not type(other):
        return [f"{_short(one)} is {_short(other)}"]
    if isinstance(one, dict):
        if list(one) != list(other):
            return [f"{_short(list(one))} is {_short(list(other))}"]
        return [f"{key}: {d}" for key in one for d in _differences(one[key], other[key])]
    if isinstance(one, list | tuple):
        if len(one) != len(other):
            return [f"{_short(one)} is {_short(other)}"]
        return [d for a, b in zip(one, other, strict=True) for d in _differences(a, b)]
    return [] if one is other or one == other else [f"{_short(one)} is {_short(other)}"]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else text[:57] + "..."


# Models.


class _Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = checkpoint(lambda x: torch.tanh(self.middle(torch.tanh(self.first(x)))), x, use_reentrant=False)
        return self.last(y)


class _Last(nn.Module):
    """A recurrent layer, at the end of the sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent, self.head = nn.LSTM(3, 2, batch_first=True), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(x)[0][:, -1])


class _Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 5, dropout=0.1, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).mean(1))


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))


def _conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(8, 3)
    )


def _frozen() -> nn.Module:
    model = _mlp()
    model[0].weight.requires_grad_(False)
    model[2].requires_grad_(False)
    return model


def _hooked() -> nn.Module:
    """A model on which the user has hooks of every kind."""
    model = _mlp()
    model.register_forward_hook(lambda m, a, y: y * 2.0)
    model[0].register_forward_pre_hook(lambda m, a: None)
    model[0].register_forward_hook(lambda m, a, k, y: None, with_kwargs=True)
    model[0].register_forward_hook(lambda m, a, y: None, always_call=True)
    model[2].register_forward_pre_hook(lambda m, a, k: None, with_kwargs=True)
    model[2].register_full_backward_hook(lambda m, gi, go: None)
    model[2].register_state_dict_post_hook(lambda *a: None)
    model[0].weight.register_hook(lambda g: None)
    model[0].bias.register_post_accumulate_grad_hook(lambda p: None)
    return model


def _shared() -> nn.Module:
    return nn.Sequential(Shared(), nn.Linear(4, 3))


@dataclass(frozen=True)
class Subject:
    """A model and its data. shape: of one example."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...] = (3,)
    collected: dict[str, Any] = field(default_factory=dict)

    def make(self) -> Case:
        torch.manual_seed(0)
        model = self.build().eval()
        model.label, model.cache = "of the user", [1, 2]
        for k, p in enumerate(model.parameters()):
            if k % 2 and p.requires_grad:
                p.grad = torch.full_like(p, 0.5)
        loader = [(torch.randn(n, *self.shape), torch.arange(n) % 3) for n in (3, 2)]
        return Case(model, loader, LayerCollection.from_model(model, **self.collected))


@dataclass
class Case:
    """What a public call is given."""

    model: nn.Module
    loader: Any
    layers: LayerCollection
    loss: Any = nn.CrossEntropyLoss()  # noqa: RUF009
    tmp: Any = None

    def vector(self) -> PVector:
        return PVector(self.layers, torch.linspace(-1, 1, self.layers.numel()))

    def functional(self, n: int = 5) -> FVector:
        return FVector(torch.linspace(-1, 1, 3 * n).view(3, n))

    def made(self, of: Callable[..., Any], representation: Any, *args: Any, **options: Any) -> Any:
        return of(self.model, self.loader, representation, *args, layer_collection=self.layers, **options)


SUBJECTS = [
    Subject("mlp", _mlp),
    Subject("conv", _conv, (1, 4, 4)),
    Subject("transformer", _Pooled, (2, 4)),
    Subject("lstm", _Last, (2, 3)),
    Subject("frozen", _frozen, collected={"frozen": True}),
    Subject("checkpoints", _Checkpointed),
    Subject("hooks", _hooked),
    Subject("shared", _shared),
]

# Calls: each is given a case, and does everything from the model on.

Call = Callable[[Case], Any]
CALLS: dict[str, Call] = {}
#: Those that draw from torch's global generator, as documented.
DRAWS = {"FIM_MonteCarlo without a generator"}
#: Some that between them go through all of the code that swaps something.
PATHS = [
    "FIM PMatDense",
    "FIM PMatKFAC",
    "FIM_MonteCarlo PMatDiag",
    "FIM PMatImplicit.mv",
    "FIM PMatImplicit.trace",
    "FIM PMatImplicit.get_diag",
    "GradientCovariance PMatImplicit",
    "Hessian PMatImplicit",
    "Hessian FiniteDifference",
    "Jacobian PFMapImplicit",
    "GramMatrix FMatImplicit",
    "Influence.scores",
]


def _gen() -> torch.Generator:
    return torch.Generator(torch.empty(0).device).manual_seed(1)


HELD = [PMatDense, PMatLowRank, PMatBlockDiag, PMatKFAC, PMatEKFAC, PMatQuasiDiag, PMatDiag, PMatImplicit]
for _r in HELD:
    CALLS[f"FIM {_r.__name__}"] = lambda c, r=_r: c.made(FIM, r)
    CALLS[f"FIM_MonteCarlo {_r.__name__}"] = lambda c, r=_r: c.made(FIM_MonteCarlo, r, generator=_gen())
    CALLS[f"EmpiricalFisher {_r.__name__}"] = lambda c, r=_r: c.made(EmpiricalFisher, r, loss=c.loss)
    CALLS[f"GradientCovariance {_r.__name__}"] = lambda c, r=_r: c.made(GradientCovariance, r, loss=c.loss)
    CALLS[f"GGN {_r.__name__}"] = lambda c, r=_r: c.made(GGN, r, loss=c.loss)
for _r in (PMatDense, PMatBlockDiag, PMatDiag):
    CALLS[f"Hessian {_r.__name__}"] = lambda c, r=_r: c.made(Hessian, r, loss=c.loss)


def _implicit(c: Case, of: Any = FIM, **options: Any) -> Any:
    return c.made(of, PMatImplicit, **options)


CALLS |= {
    "FIM PMatMixed": lambda c: c.made(FIM, PMatMixed.of(PMatDiag, {next(iter(c.layers)): PMatDense})),
    "FIM_MonteCarlo without a generator": lambda c: c.made(FIM_MonteCarlo, PMatDiag),
    "Hessian PMatLowRank": lambda c: c.made(Hessian, PMatLowRank, loss=c.loss, rank=2),
    "Hessian PMatImplicit": lambda c: c.made(Hessian, PMatImplicit, loss=c.loss).mv(c.vector()),
    "Hessian FiniteDifference": lambda c: c.made(Hessian, PMatImplicit, loss=c.loss, products=FiniteDifference()).mv(
        c.vector()
    ),
    "GGN PMatImplicit.mv": lambda c: _implicit(c, GGN, loss=c.loss).mv(c.vector()),
    "FIM PMatImplicit.mv": lambda c: _implicit(c).mv(c.vector()),
    "FIM PMatImplicit.mv again": lambda c: [F.mv(c.vector()) for F in [_implicit(c)] * 3],
    "FIM PMatImplicit.vTMv": lambda c: _implicit(c).vTMv(c.vector()),
    "FIM PMatImplicit.mapTMmap": lambda c: _implicit(c).mapTMmap(
        Jacobian(c.model, c.loader, layer_collection=c.layers)
    ),
    "FIM PMatImplicit.solve": lambda c: _implicit(c).solve(c.vector(), 0.1),
    "FIM PMatImplicit.solve preconditioned": lambda c: _implicit(c).solve(
        c.vector(), 0.1, preconditioner=c.made(FIM, PMatKFAC)
    ),
    "FIM PMatImplicit.inv": lambda c: _implicit(c).inv(0.1).mv(c.vector()),
    "FIM PMatImplicit.trace": lambda c: _implicit(c).trace(),
    "FIM PMatImplicit.trace per layer": lambda c: _implicit(c).trace(per_layer=True),
    "FIM PMatImplicit.trace estimated": lambda c: _implicit(c).trace(
        estimator=partial(linalg.xtrace, products=6, generator=_gen())
    ),
    "FIM PMatImplicit.get_diag": lambda c: _implicit(c).get_diag(),
    "FIM PMatImplicit.get_diag estimated": lambda c: _implicit(c).get_diag(
        estimator=partial(linalg.xdiag, products=6, generator=_gen())
    ),
    "FIM PMatImplicit.eig": lambda c: _implicit(c).eig(1),
    "FIM PMatImplicit.eigenvalues": lambda c: _implicit(c).eigenvalues(),
    "FIM PMatImplicit.norm": lambda c: _implicit(c).norm(),
    "FIM PMatImplicit.to_torch": lambda c: _implicit(c).to_torch(),
    "FIM PMatImplicit.to_scipy": lambda c: _implicit(c).to_scipy() @ np.ones(c.layers.numel()),
    "FIM PMatImplicit.block": lambda c: _implicit(c).block(next(iter(c.layers))).to_torch(),
    "GradientCovariance PMatImplicit.mv": lambda c: _implicit(c, GradientCovariance, loss=c.loss).mv(c.vector()),
    "GradientCovariance PMatImplicit.trace": lambda c: _implicit(c, GradientCovariance, loss=c.loss).trace(),
    "PMat.sample": lambda c: c.made(FIM, PMatDense).sample(_gen()),
    "PMatImplicit.sample": lambda c: _implicit(c).sample(_gen()),
    "PMatKFAC.solve": lambda c: c.made(FIM, PMatKFAC).solve(c.vector(), 0.1),
    "PMatLowRank.nystrom": lambda c: PMatLowRank.nystrom(_implicit(c), rank=2, generator=_gen()),
    "PMatLowRank.randomised": lambda c: PMatLowRank.randomised(_implicit(c), rank=2, generator=_gen()),
    "Jacobian PFMapDense": lambda c: _jacobian(c, PFMapDense),
    "Jacobian PFMapFactored": lambda c: _jacobian(c, PFMapFactored),
    "Jacobian PFMapImplicit": lambda c: _jacobian(c, PFMapImplicit),
    "Jacobian centred": lambda c: _jacobian(c, PFMapImplicit, centering=True),
    "GramMatrix FMatDense": lambda c: GramMatrix(c.model, c.loader, layer_collection=c.layers),
    "GramMatrix FMatImplicit": lambda c: GramMatrix(
        c.model, c.loader, layer_collection=c.layers, representation=FMatImplicit
    ).mv(c.functional()),
    "GramMatrix FMatImplicit.trace": lambda c: GramMatrix(
        c.model, c.loader, layer_collection=c.layers, representation=FMatImplicit
    ).trace(),
    "GramMatrix FMatMemmap": lambda c: GramMatrix(
        c.model, c.loader, layer_collection=c.layers, representation=FMatMemmap.at(c.tmp / "kernel")
    ),
    "GramMatrix between": lambda c: GramMatrix(
        c.model, c.loader, c.loader[:1], layer_collection=c.layers, output="trace"
    ),
    "GramMatrix sum": lambda c: GramMatrix(c.model, c.loader, layer_collection=c.layers, output="sum"),
    "GramMatrix through a metric": lambda c: GramMatrix(
        c.model, c.loader, layer_collection=c.layers, metric=c.made(FIM, PMatKFAC).inv(0.1)
    ),
    "Influence.scores": lambda c: _influence(c).scores(c.loader[:1], c.loader),
    "Influence.self_scores": lambda c: _influence(c).self_scores(c.loader),
    "Influence.top": lambda c: _influence(c).top(c.loader[:1], c.loader, 2),
    "Influence refined": lambda c: _influence(c, refine=_implicit(c, GGN, loss=c.loss)).scores(c.loader[:1], c.loader),
    "spectral_density": lambda c: spectral_density(_implicit(c), steps=3, probes=2, generator=_gen()),
    "spectral_density of a Hessian": lambda c: spectral_density(
        c.made(Hessian, PMatImplicit, loss=c.loss), steps=3, probes=2, generator=_gen()
    ),
    "layer_spectra": lambda c: layer_spectra(c.made(FIM, PMatKFAC), steps=3, probes=2, generator=_gen()),
    "extreme_eigenpairs": lambda c: extreme_eigenpairs(_implicit(c), 1, generator=_gen()),
    "ggn_by_class": lambda c: ggn_by_class(c.model, c.loader, PMatDense, layer_collection=c.layers),
    "PVector.from_model": lambda c: PVector.from_model(c.model, c.layers).detach(),
    "LayerCollection.from_model": lambda c: LayerCollection.from_model(c.model, frozen=True),
}


def _jacobian(c: Case, representation: Any, **options: Any) -> Any:
    J = Jacobian(c.model, c.loader, layer_collection=c.layers, representation=representation, **options)
    return J.jvp(c.vector()), J.vjp(c.functional())


def _influence(c: Case, **options: Any) -> Influence:
    return Influence(c.model, c.made(GGN, PMatKFAC, loss=c.loss), c.loss, 0.1, **options)
