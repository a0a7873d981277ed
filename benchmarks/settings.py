"""The models and data that are measured, the same for every contender."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: Every job, in the order of the table. A contender has those that it can do.
JOBS = {
    "kfac": "KFAC of the exact Fisher matrix",
    "kfac_mc": "KFAC with one sampled label for each example, or each position",
    "kfac_ef": "KFAC of the empirical Fisher matrix",
    "ekfac": "EKFAC of the exact Fisher matrix, both passes",
    "diag": "the exact diagonal",
    "diag_mc": "the diagonal with one sampled label for each example",
    "diag_ef": "the diagonal of the empirical Fisher matrix",
    "blockdiag": "a dense block for each layer",
    "dense": "all entries",
    "trace": "the exact trace, without the matrix",
    "trace_ef": "the trace of the empirical Fisher matrix, without the matrix",
    "fim_product": "one product with the Fisher matrix, without the matrix",
    "fim_product_again": "a later product with the same one",
    "ggn_product": "one product with the Gauss-Newton matrix of the cross-entropy, without the matrix",
    "ggn_product_lanczos": "20 steps of Lanczos with that matrix: its making, 20 products, orthogonalisation",
    "hessian_product": "one product with the Hessian of the cross-entropy, without the matrix",
    "hessian_product_lanczos": "20 steps of Lanczos with that matrix: its making, 20 products, orthogonalisation",
    "spectral_density": "of the Gauss-Newton matrix, from 20 steps of Lanczos for each of 4 vectors",
    "hessian_trace": "the trace of the Hessian of a net that is trained, from 64 vectors of random signs",
    "hessian_top": "its three eigenvalues of largest magnitude, each right to a thousandth",
    "hessian_density": "its spectral density, from 20 steps of Lanczos for each of 4 vectors",
    "accumulator_update": "one minibatch into a running KFAC, one sampled label for each example",
    "kfac_first_solve": "the first solve with a KFAC that is built: its decomposition included",
    "kfac_solve_1": "a later solve with that KFAC, one right-hand side",
    "kfac_solve_320": "a later solve with that KFAC, 320 right-hand sides",
    "ten_steps": "ten steps of training with KFAC, statistics in each, decomposed in the first",
    "ten_steps_factored": "the same with factors that are damped one by one and inverted by Cholesky",
    "ten_steps_turned": "the same with eigenvectors that are turned once by QR instead of decomposed",
    "ten_steps_seldom": "ten steps of training with KFAC, statistics in the first alone, decomposed there",
    "ten_steps_seldom_factored": "the same with factors that are damped one by one and inverted by Cholesky",
    "ten_steps_seldom_turned": "the same with eigenvectors that are turned once by QR instead of decomposed",
    "influence_factors": "EKFAC of the empirical Fisher matrix, for influence functions",
    "influence_scores": "scores of all examples for two queries, with these factors",
    "jacobian": "of all outputs of all examples, as a tensor",
    "gram": "the tangent kernel between all outputs of all examples, in minibatches",
    "gram_one_batch": "the same with all examples in one minibatch",
    "posterior_fit_kron": "a posterior of all weights, Kronecker factors of the exact Fisher matrix, ready to predict",
    "posterior_fit_diag": "the same with the exact diagonal",
    "posterior_fit_last": "the same of the last layer alone, Kronecker factors",
    "posterior_predict_kron": "probabilities by the linearised outputs and probit, of a posterior that is fitted",
    "posterior_predict_diag": "the same with the diagonal",
    "posterior_predict_last": "the same with the last layer alone",
    "ewc_consolidate": "the diagonal of squared gradients at the end of a task, for elastic weight consolidation",
    "ewc_penalty": "its penalty and the gradient of that, as each step of training has them",
}

#: What is done with a matrix, in few settings.
USES = tuple(job for job in JOBS if job.startswith(("posterior", "ewc")))

#: What is added to a matrix before it is inverted.
REGUL = 1e-3

#: The weight of the old in a running estimate.
DECAY = 0.95

#: Of training: added to the running matrix, and in how many steps it is decomposed once.
DAMPING, CYCLE = 1e-3, 10

INFLUENCE = ("influence_factors", "influence_scores")

#: Of influence functions.
QUERIES = 2

#: Of Lanczos. The cost of such a job is that of all of them.
STEPS = 20

#: Random vectors of a spectral density, and of a trace.
PROBES, TRACE_PROBES = 4, 64

#: How many eigenvalues, and what they may be off by, relatively.
TOP, ACCURACY = 3, 1e-3

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """A model, its minibatches, and the parameters that count: those of layers that all contenders know, or all.

    training: the minibatches that it may be trained with, by default these. everything: whether all parameters count.
    """

    model: nn.Module
    batches: list[Batch]
    training: list[Batch] | None = None
    everything: bool = False

    @cached_property
    def layers(self) -> dict[str, nn.Module]:
        """Those that all contenders know. The output layer of nn.MultiheadAttention, which is never called, is none."""
        return {name: m for name, m in self.model.named_modules() if type(m) in (nn.Linear, nn.Conv2d)}

    @cached_property
    def named(self) -> dict[str, nn.Parameter]:
        """The parameters that count, in the order of the model."""
        if self.everything:
            return dict(self.model.named_parameters())
        return {f"{name}.{k}": p for name, layer in self.layers.items() for k, p in layer.named_parameters()}

    @cached_property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.named.values())

    @property
    def device(self) -> torch.device:
        return self.parameters[0].device

    @property
    def examples(self) -> int:
        return sum(len(x) for x, _ in self.batches)

    @property
    def positions(self) -> int:
        """How many labels an example has."""
        return self.batches[0][1][0].numel()

    def vectors(self, *shape: int) -> Tensor:
        """Fixed standard normal vectors in parameter space: ``(*shape, P)``."""
        size = sum(p.numel() for p in self.parameters)
        return torch.randn(*shape, size, generator=torch.Generator().manual_seed(1)).to(self.device)

    def quadratic_form(self, kernel: Tensor) -> float:
        """Of a kernel ``(C, n, C, n)``, with a fixed standard normal vector."""
        size = kernel.shape[:2].numel()
        u = torch.randn(size, generator=torch.Generator().manual_seed(1)).to(self.device)
        return float(u @ (kernel.reshape(size, size) @ u))

    def few(self) -> Task:
        """The same with two examples in each of two minibatches, which training would learn by heart."""
        batches = [(x[:2], y[:2]) for x, y in self.batches[:2]]
        return replace(self, batches=batches, training=self.training or self.batches)

    def trained(self, steps: int = 24) -> Task:
        """The same after some steps of gradient descent: at random weights a Hessian has eigenvalues of both signs and
        the same size, among which power iteration does not converge.
        """
        model, batches = deepcopy(self.model), self.training or self.batches
        optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for k in range(steps):
            x, y = batches[k % len(batches)]
            optimiser.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimiser.step()
        optimiser.zero_grad()
        return Task(model, self.batches, everything=self.everything)

    def gradient(self, examples: int | None = None) -> None:
        """The unit of cost: one forward and one backward pass over the minibatches (or some ``examples`` of each)."""
        for x, y in self.batches:
            loss = F.cross_entropy(self.model(x[:examples]), y[:examples])
            torch.autograd.grad(loss, self.parameters)


@dataclass(frozen=True)
class Setting:
    """A model and its data.

    examples: how many, in minibatches of ``batch``; small: how many in a trial run. jobs: those that fit. subsets: for
    a job that needs less, how many examples it has, in minibatches of how many. trial: what is run instead in a trial.
    everything: whether all parameters count, but for influence functions, whose peer knows linear layers and
    convolutions alone. needs: what has to be installed for it.
    """

    model: Callable[[], nn.Module]
    data: Callable[[int], Batch]
    examples: int
    batch: int
    small: int
    jobs: tuple[str, ...]
    subsets: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    trial: Setting | None = None
    everything: bool = False
    needs: str | None = None

    @property
    def missing(self) -> str | None:
        """What is missing, in a sentence, if something is."""
        if self.needs is None or find_spec(self.needs):
            return None
        return f"it needs {self.needs}, which is not installed: pip install {self.needs}"

    def load(self, job: str, small: bool = False, device: str = "cpu") -> Task:
        if self.missing:
            raise ModuleNotFoundError(self.missing)
        if small and self.trial:
            return replace(self.trial, everything=self.everything).load(job, small, device)
        torch.manual_seed(0)
        model = self.model().eval()
        examples, batch = self.subsets.get(job, (self.examples, self.batch))
        if small:
            examples = min(examples, self.small)
            batch = min(batch, examples if job == "gram_one_batch" else (examples + 1) // 2)
        x, y = self.data(examples)
        batches = zip(x.to(device).split(batch), y.to(device).split(batch), strict=True)
        return Task(model.to(device), list(batches), everything=self.everything and job not in INFLUENCE)


@cache
def _all_digits() -> Any:
    from sklearn.datasets import load_digits

    return load_digits(return_X_y=True)


def _digits(examples: int) -> Batch:
    """Images of 8 x 8 pixels, as rows."""
    x, y = _all_digits()
    return torch.from_numpy(x[:examples]).float() / 16, torch.from_numpy(y[:examples]).long()


def _digit_images(examples: int, classes: int = 10) -> Batch:
    """classes: if there are not ten, the labels mean nothing."""
    x, y = _digits(examples)
    return x.view(-1, 1, 8, 8), y if classes == 10 else torch.arange(examples) % classes


def _noise_images(examples: int, side: int = 32) -> Batch:
    """Random images."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(examples, 3, side, side, generator=generator)
    return x, torch.randint(10, (examples,), generator=generator)


def _mlp(hidden: int) -> nn.Module:
    hiddens = [nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()]
    return nn.Sequential(*hiddens, nn.Linear(hidden, 10))


def _pooled_convnet(side: int) -> nn.Module:
    """For images of any size, with the same parameters."""
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AvgPool2d(side), nn.Flatten(), nn.Linear(16, 10))


def _convnet(classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(24, 24, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(384, classes),
    )


class _Residual(nn.Module):
    """Two convolutions and a short cut."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(cin, cout, 3, stride, 1, bias=False),
            nn.BatchNorm2d(cout),
            nn.ReLU(),
            nn.Conv2d(cout, cout, 3, 1, 1, bias=False),
            nn.BatchNorm2d(cout),
        )
        self.short = nn.Sequential()
        if stride != 1 or cin != cout:
            self.short = nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout))
        self.last = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(x) + self.short(x))


def _resnet18() -> nn.Module:
    """ResNet-18 as it is used for images of 32 x 32 pixels: a 3 x 3 stem without pooling; 11.2 million parameters."""
    blocks: list[nn.Module] = []
    cin = 64
    for cout in (64, 128, 256, 512):
        blocks += [_Residual(cin, cout, 1 if cin == cout else 2), _Residual(cout, cout, 1)]
        cin = cout
    stem = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


class _Attention(nn.Module):
    """Causal, with several heads; written out, because the fused one has no forward derivative."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.into = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.into(x).unflatten(-1, (3, self.heads, -1)).movedim(-3, 0).transpose(-2, -3)
        scores = q @ k.mT / q.shape[-1] ** 0.5
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
        return self.out((scores.masked_fill(future, float("-inf")).softmax(-1) @ v).transpose(-2, -3).flatten(-2))


class _TransformerBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.attention = _Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


class _Transformer(nn.Module):
    """GPT-2 at another size, its head not tied: ``(n, positions)`` tokens to logits ``(n, vocabulary, positions)``."""

    def __init__(self, vocabulary: int, positions: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.places = nn.Parameter(torch.randn(positions, width) / 10)
        self.blocks = nn.Sequential(*(_TransformerBlock(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.tokens(tokens) + self.places))).mT


class _EncoderBlock(nn.Module):
    """As torchvision's, without dropout."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norms[0](x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.mlp(self.norms[1](x))


class _VisionTransformer(nn.Module):
    """torchvision's vit_b_16 at another size: images to logits of ten classes."""

    def __init__(self, side: int, patch: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(torch.randn(1, 1, width) / 10)
        self.places = nn.Parameter(torch.randn(1, (side // patch) ** 2 + 1, width) / 10)
        self.blocks = nn.Sequential(*(_EncoderBlock(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places
        return self.head(self.norm(self.blocks(x))[:, 0])


class _Lstm(nn.Module):
    """Sequences of tokens to logits of ten classes, from the last state."""

    def __init__(self, vocabulary: int, width: int, hidden: int, depth: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(width, hidden, depth, batch_first=True)
        self.head = nn.Linear(hidden, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.lstm(self.tokens(tokens))[0][:, -1])


class _Experts(nn.Module):
    """Mixtral of transformers at another size, two of eight experts for each token, as the plain transformer above."""

    def __init__(self, vocabulary: int, positions: int, width: int, hidden: int, depth: int) -> None:
        super().__init__()
        from transformers import MixtralConfig, MixtralForCausalLM

        config = MixtralConfig(
            vocab_size=vocabulary,
            max_position_embeddings=positions,
            hidden_size=width,
            intermediate_size=hidden,
            num_hidden_layers=depth,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=8,
            num_experts_per_tok=2,
            initializer_range=0.1,
            use_cache=False,
            attn_implementation="eager",  # the fused one has no forward derivative
        )
        self.inner = MixtralForCausalLM(config)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.inner(input_ids=tokens).logits.mT


def _sequences(vocabulary: int, positions: int) -> Callable[[int], Batch]:
    """Random tokens, each the label of the one before it."""

    def data(examples: int) -> Batch:
        tokens = torch.randint(vocabulary, (examples, positions + 1), generator=torch.Generator().manual_seed(2))
        return tokens[:, :-1], tokens[:, 1:]

    return data


def _labelled_sequences(vocabulary: int, positions: int) -> Callable[[int], Batch]:
    """Random tokens, with one label for all of them."""

    def data(examples: int) -> Batch:
        generator = torch.Generator().manual_seed(2)
        tokens = torch.randint(vocabulary, (examples, positions), generator=generator)
        return tokens, torch.randint(10, (examples,), generator=generator)

    return data


def _without(*left_out: str) -> tuple[str, ...]:
    return tuple(job for job in JOBS if job not in (*left_out, *USES, *INFLUENCE))


_EXACT_ENTRIES = ("dense", "blockdiag", "jacobian")
_GRAM = ("gram", "gram_one_batch")
_SOLVES = ("kfac_first_solve", "kfac_solve_1", "kfac_solve_320")
_PRODUCTS = tuple(job for job in JOBS if "product" in job)
_ONE_COTANGENT = ("kfac_mc", "kfac_ef", "diag_ef", "trace_ef")
_HESSIAN = ("hessian_trace", "hessian_top", "hessian_density")
_TRAINING = tuple(job for job in JOBS if job.startswith("ten_steps"))
#: Its minibatch.
_STEPPED = dict.fromkeys(_TRAINING, (128, 128))

SETTINGS = {
    "digits-mlp-small": Setting(
        partial(_mlp, 32),
        _digits,
        1797,
        256,
        small=64,
        jobs=_without(*_TRAINING),
        subsets={"gram": (512, 128), "gram_one_batch": (512, 512), "accumulator_update": (64, 64)},
    ),
    "digits-mlp": Setting(
        partial(_mlp, 256),
        _digits,
        1797,
        256,
        small=64,
        jobs=_without(*_EXACT_ENTRIES),
        subsets={"gram": (256, 64), "gram_one_batch": (256, 256), "accumulator_update": (64, 64)} | _STEPPED,
    ),
    "convnet": Setting(
        partial(_convnet, 10),
        _digit_images,
        1797,
        256,
        small=16,
        jobs=_without("dense"),
        subsets={
            "jacobian": (512, 128),
            "gram": (256, 64),
            "gram_one_batch": (256, 256),
            "accumulator_update": (64, 64),
            **_STEPPED,
        },
    ),
    "convnet-uses": Setting(
        partial(_convnet, 10),
        _digit_images,
        1024,
        256,
        small=16,
        jobs=USES,
        subsets={job: (128, 64) for job in USES if "predict" in job},
    ),
    "convnet-1000": Setting(
        partial(_convnet, 1000),
        partial(_digit_images, classes=1000),
        256,
        64,
        small=6,
        jobs=("posterior_fit_last", "posterior_predict_last"),
    ),
    "convnet-100": Setting(
        partial(_convnet, 100),
        partial(_digit_images, classes=100),
        256,
        64,
        small=6,
        jobs=_without(*_EXACT_ENTRIES, *_GRAM, *_SOLVES, *_TRAINING, *_HESSIAN, "spectral_density"),
    ),
    "resnet18": Setting(
        _resnet18,
        _noise_images,
        32,
        32,
        small=4,
        jobs=_without(*_EXACT_ENTRIES, *_GRAM, *_HESSIAN, "kfac_solve_320"),
        subsets=_STEPPED,
    ),
    "transformer": Setting(
        partial(_Transformer, vocabulary=1000, positions=64, width=256, depth=4, heads=4),
        _sequences(1000, 64),
        32,
        8,
        small=4,
        jobs=(*_ONE_COTANGENT, *_PRODUCTS, *INFLUENCE),
        trial=Setting(
            partial(_Transformer, vocabulary=20, positions=6, width=16, depth=2, heads=2),
            _sequences(20, 6),
            4,
            2,
            small=4,
            jobs=(),
        ),
    ),
    "vit": Setting(
        partial(_VisionTransformer, side=32, patch=4, width=64, depth=4, heads=4),
        _noise_images,
        256,
        32,
        small=4,
        jobs=("kfac", "diag", "diag_mc", *_ONE_COTANGENT, *_PRODUCTS, *INFLUENCE),
        trial=Setting(
            partial(_VisionTransformer, side=8, patch=4, width=16, depth=2, heads=2),
            partial(_noise_images, side=8),
            4,
            2,
            small=4,
            jobs=(),
        ),
        everything=True,
    ),
    "lstm": Setting(
        partial(_Lstm, vocabulary=100, width=64, hidden=128, depth=2),
        _labelled_sequences(100, 32),
        512,
        32,
        small=4,
        jobs=("kfac", "diag", "diag_mc", *_ONE_COTANGENT, *_PRODUCTS),
        trial=Setting(
            partial(_Lstm, vocabulary=10, width=6, hidden=8, depth=2),
            _labelled_sequences(10, 5),
            4,
            2,
            small=4,
            jobs=(),
        ),
        everything=True,
    ),
    "experts": Setting(
        partial(_Experts, vocabulary=500, positions=32, width=64, hidden=36, depth=2),
        _sequences(500, 32),
        512,
        32,
        small=4,
        jobs=(*_ONE_COTANGENT, *_PRODUCTS, *INFLUENCE),
        trial=Setting(
            partial(_Experts, vocabulary=20, positions=6, width=16, hidden=8, depth=2),
            _sequences(20, 6),
            4,
            2,
            small=4,
            jobs=(),
        ),
        everything=True,
        needs="transformers",
    ),
}

#: For accelerators, and only when they are asked for.
LARGE = {
    "resnet18-large": Setting(
        _resnet18,
        _noise_images,
        1024,
        256,
        small=4,
        jobs=("kfac", "kfac_mc", "kfac_ef", "diag", "diag_mc", "trace", *_PRODUCTS),
    ),
    "transformer-large": Setting(
        partial(_Transformer, vocabulary=4000, positions=128, width=512, depth=8, heads=8),
        _sequences(4000, 128),
        64,
        16,
        small=4,
        jobs=(*_ONE_COTANGENT, *_PRODUCTS),
    ),
}

_SWEPT = ("kfac", "diag", "gram", "fim_product")


def _sweeps() -> dict[str, Setting]:
    """Small nets in which one size at a time grows: ``name=size``."""
    found = {}
    for n in (32, 64, 128, 256, 512):
        found[f"n={n}"] = Setting(partial(_mlp, 64), _digits, n, 32, small=8, jobs=_SWEPT)
    for classes in (5, 10, 20, 50, 100):
        data = partial(_digit_images, classes=classes)
        found[f"C={classes}"] = Setting(partial(_convnet, classes), data, 32, 32, small=4, jobs=_SWEPT)
    for width in (32, 64, 128, 256, 512):
        found[f"width={width}"] = Setting(partial(_mlp, width), _digits, 128, 64, small=8, jobs=_SWEPT)
    for side in (4, 8, 16, 32):
        data = partial(_noise_images, side=side)
        found[f"positions={side**2}"] = Setting(partial(_pooled_convnet, side), data, 32, 32, small=4, jobs=_SWEPT)
    return found


#: For pictures of cost against size.
SWEEPS = _sweeps()

ALL = SETTINGS | LARGE | SWEEPS
