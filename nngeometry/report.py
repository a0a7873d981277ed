"""A report on a trained network in one HTML file, which needs no connection to open."""

from __future__ import annotations

import base64
import io
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import arguments
from .changes import Borrowed
from .gram import GramMatrix
from .hessian import Hessian
from .landscape import landscape
from .layercollection import LayerCollection
from .linalg.base import mean_of, rademacher
from .losses import Loss
from .losses.targets import Targets
from .model import data
from .object import FMat, PMat, PMatImplicit, PVector
from .objective import Measured, Objective, as_found, in_eval_mode
from .plot import plot_density, plot_landscape
from .plot.style import Figure, require_matplotlib
from .spectrum import ExtremePairs, extreme_eigenpairs, spectral_density
from .statistics import loss_statistics
from .tables import as_html, number

#: How many products with the Hessian are planned for, and the examples that are looked at at least.
_PRODUCTS, _FEWEST = 600, 8
#: The share of the time that each section may take.
_SHARES = {"layers": 0.2, "density": 0.2, "extreme": 0.25, "noise": 0.15, "landscape": 0.12, "kernel": 0.08}
#: Examples whose kernel is looked at.
_KERNEL = 100


@dataclass
class _Page:
    """The sections of a page, as they are made."""

    sections: list[str] = field(default_factory=list)

    def add(self, title: str, sentence: str, *parts: str) -> None:
        body = "".join(parts)
        self.sections.append(f"<section><h2>{escape(title)}</h2><p>{escape(sentence)}</p>{body}</section>")


@dataclass(frozen=True)
class _Looked:
    """A model on the data that the time allows to look at.

    seconds: of one product of the Hessian with a vector. given: what all constructors of matrices take. top: the
    largest eigenvalues with their vectors, once they are known.
    """

    model: nn.Module
    objective: Objective
    minibatches: list[Any]
    test_loader: Any
    examples: int
    seconds: float
    budget: float
    given: dict[str, Any]
    generator: torch.Generator
    top: list[tuple[float, PVector]] = field(default_factory=list)

    def hessian(self) -> PMat:
        found: PMat = Hessian(self.model, data.Minibatches(self.minibatches), PMatImplicit, **self.given)
        return found

    def products(self, section: str, least: int) -> int:
        """How many products the time of a section allows."""
        return max(least, int(_SHARES[section] * self.budget / self.seconds))


@arguments.called_as
def report(
    model: nn.Module,
    loader: Any,
    loss: Loss | None = None,
    path: str | Path = "report.html",
    test_loader: Any = None,
    *,
    seconds: float = 60.0,
    title: str | None = None,
    targets: Targets = None,
    function: Callable[..., Any] | None = None,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
    verbose: bool = True,
) -> Path:
    """Write a page on a trained model: its layers, the density and the ends of the spectrum of the Hessian,
    its negative part, the noise of gradients, the landscape along the top two eigenvectors, and the alignment of its
    tangent kernel with the labels; each with a sentence that says what it is.

    The page is one file, with pictures inside, that loads nothing. The Hessian is that of as many examples as the time
    allows, which the page says; a section that does not apply to the model says why.

    Args:
        model: Any module; it is looked at in eval mode, and is as before afterwards.
        loader: As in :func:`~nngeometry.FIM`.
        loss: As in :func:`~nngeometry.Hessian`, by default ``nn.CrossEntropyLoss()``.
        path: The file to write.
        test_loader: Other data, for loss and accuracy there.
        seconds: About how long it may take, not counting loss and accuracy on all data.
        title: Of the page.
        targets: What the loss receives beside the outputs, as in :func:`~nngeometry.Hessian`.
        function: As in :func:`~nngeometry.FIM`.
        device: Where minibatches go, by default to the model.
        generator: Of random vectors, by default seeded with 0.
        verbose: Show a progress bar.

    Returns:
        The path.

    Raises:
        ImportError: Without matplotlib.
        ValueError: If the loader has no labels, or there is no folder for the file.

    Example:
        >>> import tempfile
        >>> model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        >>> batch = torch.randn(30, 4), torch.randint(3, (30,))
        >>> written = report(model, batch, path=tempfile.mkdtemp() + "/report.html", seconds=1.0, verbose=False)
        >>> "data:image/png;base64" in written.read_text()
        True
    """
    require_matplotlib("report")
    arguments.call(model, loader, function, None, LayerCollection, device)
    arguments.path("path", path, "where to write the page")
    target = Path(os.fsdecode(path))
    if target.is_dir() or not target.parent.is_dir():
        why = "is a folder" if target.is_dir() else f"cannot be written, since there is no folder {target.parent}"
        raise ValueError(f"path: {target} {why}: pass the path of a file in a folder that exists")
    arguments.number("seconds", seconds, above=0.0)
    arguments.generator(generator)
    arguments.flag("verbose", verbose)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    shared: dict[str, Any] = {"targets": targets, "function": function, "device": device}
    objective = Objective(model, loss, **shared)
    page = _Page()

    def eval_mode() -> Callable[[], Any]:
        model.eval()
        return lambda: None

    with Borrowed(as_found(model), eval_mode):
        steps: list[Callable[[_Looked, _Page], None]] = [_layers, _spectrum, _noise, _landscape, _kernel]
        bar = iter(data.progress([None, *steps], verbose, "report"))
        next(bar)
        with in_eval_mode(model):
            train = objective.measure(loader)
            test = None if test_loader is None else objective.measure(test_loader)
        looked = _looked(model, objective, loader, test_loader, float(seconds), {"loss": loss, **shared}, generator)
        _summary(looked, page, train, test)
        for step in bar:
            step(looked, page)
    made = _HTML.format(
        title=escape(title if title is not None else f"{type(model).__name__}, {_parameters(model)} parameters"),
        body="\n".join(page.sections),
    )
    target.write_text(made, encoding="utf-8")
    return target


def _looked(
    model: nn.Module,
    objective: Objective,
    loader: Any,
    test_loader: Any,
    budget: float,
    given: dict[str, Any],
    generator: torch.Generator,
) -> _Looked:
    """As many minibatches, or examples of the first, as make a product take a fraction of the time."""
    wanted = budget / _PRODUCTS
    source = (data.content(batch) for batch in objective.minibatches(loader))
    first = next(source)
    some, spent = first, _seconds(model, [first], given)
    n = data.count(first)
    while spent > 2 * wanted and n > _FEWEST and data.aligned(first):
        n = max(_FEWEST, min(n // 2, int(n * wanted / spent)))
        some = data.content(data.take(first, torch.arange(n)))
        spent = _seconds(model, [some], given)
    minibatches = [some]
    if some is first:
        while (len(minibatches) + 1) * spent <= wanted and (more := next(source, None)) is not None:
            minibatches.append(more)
    spent = spent * len(minibatches)
    examples = sum(data.count(batch) for batch in minibatches)
    return _Looked(model, objective, minibatches, test_loader, examples, spent, budget, given, generator)


def _seconds(model: nn.Module, minibatches: list[Any], given: dict[str, Any]) -> float:
    """Of one of several products with the Hessian."""
    H = Hessian(model, data.Minibatches(minibatches), PMatImplicit, **given)
    H.matvec(torch.ones(1, H.size(0), dtype=H.dtype, device=H.device))
    began = time.perf_counter()
    H.matvec(torch.ones(1, H.size(0), dtype=H.dtype, device=H.device))
    return max(1e-5, time.perf_counter() - began)


# Sections


def _section(of: Callable[[_Looked, _Page], None]) -> Callable[[_Looked, _Page], None]:
    """A section, or why there is none."""

    def made(looked: _Looked, page: _Page) -> None:
        try:
            of(looked, page)
        except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
            title = (of.__doc__ or "").partition(".")[0]
            page.add(title, "This could not be computed for the model.", f"<pre>{escape(str(error))}</pre>")

    return made


def _summary(looked: _Looked, page: _Page, train: Measured, test: Measured | None) -> None:
    rows = []
    for name, of in (("training data", train), ("test data", test)):
        if of is not None:
            shares = [_percent(of.accuracy), _percent(of.top5)]
            rows.append([name, str(of.n), number(of.loss), *shares])
    page.add(
        "Summary",
        f"The model has {_parameters(looked.model)} parameters. Curvature is that of {looked.examples} of the "
        f"{train.n} training examples, as the time of {looked.budget:g} seconds allows; a product of the Hessian with "
        f"a vector takes {looked.seconds:.2g} seconds.",
        as_html("", ["", "examples", "loss", "accuracy", "among first five"], rows),
    )


@_section
def _layers(looked: _Looked, page: _Page) -> None:
    """Layers. Traces of all by common random vectors, the largest eigenvalue of each by power iteration on all at
    once: each vector is the direction of one layer.
    """
    H = looked.hessian()
    lc = H.layer_collection
    slices = lc.slices()
    count = min(30, looked.products("layers", 12) // 2)
    v = rademacher(count, H.size(0), like=H.like, generator=looked.generator)
    shares = v * H.matvec(v)
    traces = {name: mean_of(shares[:, s].sum(1), count) for name, s in slices.items()}
    rest = looked.products("layers", 12) - count
    by_size = sorted(slices, key=lambda name: slices[name].start - slices[name].stop)
    chosen = by_size[: max(1, rest // 6)]
    steps = min(20, max(4, rest // max(1, len(chosen))))
    top = _largest_of_layers(H, {name: slices[name] for name in chosen}, steps, looked.generator)
    w = PVector.from_model(looked.model, lc).clone().detach()
    rows = []
    for name, layer in lc.layers.items():
        e = traces[name]
        rows.append(
            [
                name or "(root)",
                layer.kind_name,
                str(layer.numel()),
                number(float(e.value), float(e.error)),
                number(top[name]) if name in top else "-",
                number(float(w.to_torch()[slices[name]].double().norm())),
            ]
        )
    page.add(
        "Layers",
        "For each layer its number of parameters; the trace of its block of the Hessian, with a standard error; the "
        f"eigenvalue of largest magnitude of that block, by {steps} steps of power iteration, which is a lower bound"
        f"{'' if len(chosen) == len(slices) else ' (- where the time did not allow it)'}; and the norm of its weights. "
        "Curvature per parameter says where a step is felt most.",
        as_html("", ["layer", "kind", "size", "trace", "top eigenvalue", "norm"], rows),
    )


def _largest_of_layers(H: PMat, slices: dict[str, slice], steps: int, generator: torch.Generator) -> dict[str, float]:
    """Rayleigh quotients after some steps, of one vector for each block."""
    v = H.like.new_zeros(len(slices), H.size(0))
    for row, s in zip(v, slices.values(), strict=True):
        row[s] = rademacher(1, s.stop - s.start, like=H.like, generator=generator)[0]
    values: Tensor = v.new_zeros(len(slices))
    for _ in range(steps):
        v = v / torch.linalg.vector_norm(v, dim=1, keepdim=True).clamp(min=torch.finfo(v.dtype).tiny)
        found = H.matvec(v)
        image = torch.zeros_like(v)
        for k, s in enumerate(slices.values()):
            image[k, s] = found[k, s]
        values, v = (v * image).sum(1), image
    return dict(zip(slices, values.tolist(), strict=True))


@_section
def _spectrum(looked: _Looked, page: _Page) -> None:
    """Spectrum of the Hessian. Its density, its ends."""
    H = looked.hessian()
    products = looked.products("density", 12)
    probes = 4 if products >= 40 else 2
    steps = max(1, min(80, products // probes, H.size(0)))
    spectrum = spectral_density(H, steps=steps, probes=probes, generator=looked.generator)
    picture = plot_density({"linear": spectrum}), plot_density({"logarithmic": spectrum}, log=True)
    rows = [[name, number(float(e.value), float(e.error))] for name, e in spectrum.table().items()]
    page.add(
        "Spectrum of the Hessian",
        f"The density of its {H.size(0)} eigenvalues, by Lanczos quadrature with {probes} random vectors of "
        f"{steps} steps, with bands of two standard errors. Most eigenvalues of a trained net are near zero; few large "
        "ones, about as many as classes, stand apart. Negative ones say that this is no minimum.",
        *(_image(p, "density of eigenvalues") for p in picture),
        as_html("Numbers, and the same per parameter", ["", "value"], rows),
    )
    pairs, problem = _ends(looked, H)
    if pairs is None:
        page.add(
            "Extreme eigenvalues",
            "They did not converge within the time: the largest and the smallest value in the table above are those "
            "that the density knows.",
            f"<pre>{escape(problem)}</pre>",
        )
        return
    largest = zip(pairs.values[: len(pairs.values) // 2].tolist(), pairs.vectors, strict=False)
    looked.top.extend(largest)
    header = ["", "eigenvalue", "residual"]
    lines = [
        [str(k + 1), number(float(value)), f"{float(residual):.1e}"]
        for k, (value, residual) in enumerate(zip(pairs.values, pairs.residuals, strict=True))
    ]
    page.add(
        "Extreme eigenvalues",
        "The largest and the smallest ones, by themselves. Within the residual of each there is an eigenvalue.",
        as_html("", header, lines),
    )


def _ends(looked: _Looked, H: PMat) -> tuple[ExtremePairs | None, str]:
    k = min(5, max(1, H.size(0) // 3))
    most = looked.products("extreme", 1)
    if most < 12 * k:
        return None, f"The time allows {most} products with the Hessian, which is too few to begin."
    try:
        found = extreme_eigenpairs(H, k, "both", tol=1e-4, max_products=most, generator=looked.generator)
    except RuntimeError as error:
        return None, str(error)
    return found, ""


@_section
def _noise(looked: _Looked, page: _Page) -> None:
    """Gradient noise. Over minibatches."""
    minibatches = looked.minibatches
    if len(minibatches) < 2:  # of one, the halves
        (only,) = minibatches
        n = data.count(only)
        if n < 4 or not data.aligned(only):
            raise ValueError("there is only one minibatch, which cannot be split")
        minibatches = [data.content(data.take(only, part)) for part in torch.arange(n).chunk(4) if len(part) > 0]
    probes = max(12, min(15, int(0.6 * looked.products("noise", 10))))
    found = loss_statistics(
        looked.model,
        data.Minibatches(minibatches),
        matrix=Hessian,
        probes=probes,
        generator=looked.generator,
        **looked.given,
    )
    rows = [[name, number(float(e.value), float(e.error))] for name, e in found.columns().items()]
    ratio = number(float(found.gradient_variance.value / found.gradient_norm2.value))
    page.add(
        "Noise of gradient and curvature",
        f"Over {found.minibatches} minibatches of {data.count(minibatches[0])} examples. "
        f"The variance of the gradient is {ratio} times the square of its mean: above one, a step is mostly noise. "
        "The shrinkage is the share of the spread of eigenvalues that is not due to the minibatches.",
        as_html("", ["", "value"], rows),
    )


@_section
def _landscape(looked: _Looked, page: _Page) -> None:
    """Landscape. Along the two largest eigenvectors, as well as the time allows."""
    H = looked.hessian()
    near = ""
    if len(looked.top) >= 2:
        values, directions = (list(each) for each in zip(*looked.top[:2], strict=True))
    else:
        directions, values, near = _top_two(H, min(looked.products("landscape", 1) // 2, 400), looked.generator)
    called = [f"{near}eigenvalue {value:.4g}" for value in values]
    reach = [min(2.0, 2 / max(1e-6, abs(value)) ** 0.5) for value in values]
    began = time.perf_counter()
    with in_eval_mode(looked.model):
        looked.objective.measure(data.Minibatches(looked.minibatches))
    each = max(1e-5, 2 * (time.perf_counter() - began))
    points = 2 * min(10, max(2, int(math.sqrt(_SHARES["landscape"] * looked.budget / each) / 2))) + 1
    given = {k: v for k, v in looked.given.items() if k != "layer_collection"}
    shared = {**given, "recompute_batch_norm": False}
    loader = data.Minibatches(looked.minibatches)
    lines = {
        k: landscape(looked.model, loader, d, distance=r, points=2 * points - 1, names=[name], **shared)
        for k, (d, r, name) in enumerate(zip(directions, reach, called, strict=True))
    }
    pictures = [_image(plot_landscape(lines, ncols=1), "the loss along two eigenvectors")]
    if len(directions) == 2:
        surface = landscape(looked.model, loader, directions, distance=reach, points=points, names=called, **shared)
        pictures.append(_image(plot_landscape(surface), "contours of the loss over their plane"))
    page.add(
        "Landscape",
        "The loss along the two directions in which it is curved most, which have length one, with BatchNorm as it is "
        "in the middle. The parabolas there have the eigenvalues as second derivatives.",
        *pictures,
    )


def _top_two(H: PMat, products: int, generator: torch.Generator) -> tuple[list[PVector], list[float], str]:
    """The two largest eigenvectors, or what a few steps of power iteration make of two random vectors, and a word for
    that.
    """
    if products >= 30:
        try:
            pairs = extreme_eigenpairs(H, 2, tol=1e-2, max_products=products, generator=generator)
            return pairs.vectors, pairs.values.tolist(), ""
        except RuntimeError:  # not converged
            pass
    rows = rademacher(2, H.size(0), like=H.like, generator=generator)
    for _ in range(min(6, max(2, products // 2))):
        rows = torch.linalg.qr(H.matvec(rows).mT).Q.mT
    return [PVector(H.layer_collection, row) for row in rows], (rows * H.matvec(rows)).sum(1).tolist(), "near "


@_section
def _kernel(looked: _Looked, page: _Page) -> None:
    """Tangent kernel. Its alignment with the labels."""
    parts, labels, n = [], [], 0
    for batch in looked.minibatches:
        y = looked.objective.targets_of(batch)
        if not isinstance(y, Tensor) or y.is_floating_point() or y.ndim != 1:
            raise ValueError("alignment with labels is for one class of each example, which these are not")
        if not data.aligned(batch):
            raise ValueError("the examples of this minibatch cannot be taken one by one")
        take = min(len(y), _KERNEL - n)
        index = torch.arange(take)
        parts.append(data.content(data.take(batch, index)))
        labels.append(y[index.to(y.device)])
        n += take
        if n >= _KERNEL:
            break
    y = torch.cat(labels)
    given = {k: v for k, v in looked.given.items() if k in ("function", "device")}
    kernels = GramMatrix(looked.model, data.Minibatches(parts), output="trace", per_layer=True, **given)
    whole = sum(kernels.values())
    total = float(whole.trace())
    rows = [["all", _alignment(whole, y), "100 %"]]
    for name, K in kernels.items():
        rows.append([name or "(root)", _alignment(K, y), _percent(float(K.trace()) / total if total else None)])
    several = len(y.unique()) > 1
    page.add(
        "Tangent kernel",
        f"The kernel of {n} examples, which says how a step on one changes the output of another, and its centred "
        "alignment (CKA) with the labels: one if examples of a class move together and no others"
        f"{'' if several else ', and unknown here, where all are of one class'}. It is the sum of those of the layers, "
        "each with its share of the trace.",
        as_html("", ["layer", "alignment", "share of the trace"], rows),
    )


def _alignment(K: FMat, y: Tensor) -> str:
    found = float(K.cka(y))
    return f"{found:.3f}" if math.isfinite(found) else "-"


# Words and pictures


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _percent(share: float | None) -> str:
    return "-" if share is None or not math.isfinite(share) else f"{100 * share:.1f} %"


def _image(figure: Figure, alt: str) -> str:
    held = io.BytesIO()
    figure.savefig(held, format="png", dpi=150)
    encoded = base64.b64encode(held.getvalue()).decode()
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{encoded}">'


def _pieces() -> Iterator[str]:
    yield "<!DOCTYPE html>"
    yield '<html lang="en"><head><meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield '<link rel="icon" href="data:,">'  # or browsers ask for one
    yield "<title>{title}</title><style>"
    yield "body{{font:16px/1.5 system-ui,sans-serif;color:#222;background:#fff}}"
    yield "body{{max-width:60rem;margin:0 auto;padding:1rem}}"
    yield "h1{{font-size:1.6rem;overflow-wrap:anywhere}}h2{{font-size:1.2rem;margin-top:2.5rem}}"
    yield "img{{max-width:100%;height:auto;display:block;margin:.5rem 0}}"
    yield "table{{display:block;overflow-x:auto;border-collapse:collapse}}"
    yield "table{{font-size:.9rem;font-variant-numeric:tabular-nums}}"
    yield "th,td{{padding:.2rem .8rem .2rem 0;white-space:nowrap}}th{{border-bottom:1px solid #999}}"
    yield "td{{border-bottom:1px solid #eee}}p{{overflow-wrap:anywhere}}"
    yield "pre{{white-space:pre-wrap;overflow-wrap:anywhere;background:#f5f5f5;padding:.5rem}}"
    yield "@media(max-width:40rem){{body{{padding:.7rem}}table{{font-size:.8rem}}th{{font-size:.72rem}}"
    yield "th,td{{padding-right:.3rem;white-space:normal}}td:first-child{{overflow-wrap:anywhere;min-width:2.5rem}}}}"
    yield "</style></head><body><h1>{title}</h1>"
    yield "{body}"
    yield "</body></html>"


_HTML = "\n".join(_pieces())

#: The examples of functions that stand wrapped above, for doctest to find.
__test__ = {f.__name__: f.__doc__ or "" for f in (report,)}
