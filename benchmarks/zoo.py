"""What torchvision's models cost in every verb: ``python benchmarks/zoo.py [name ...] [--size 64] [--images 3]``.

Of each model, untrained, on random pictures: the time of a matrix or product over that of a gradient of the minibatch,
the first call's look at the model included, and of a plain loop over the examples for comparison. What is refused says
why.
It needs torchvision, which is installed beside torch.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from torch.nn import functional as F

from nngeometry import (
    FIM,
    GGN,
    EmpiricalFisher,
    FIM_MonteCarlo,
    GramMatrix,
    Hessian,
    Influence,
    Jacobian,
    LayerCollection,
    PMatDiag,
    PMatEKFAC,
    PMatImplicit,
    PMatKFAC,
    Posterior,
    PVector,
)
from nngeometry.spectrum import extreme_eigenpairs

#: One of each family, with what its constructor wants.
MODELS: dict[str, dict[str, Any]] = {
    "alexnet": {},
    "convnext_tiny": {},
    "densenet121": {},
    "efficientnet_b0": {},
    "efficientnet_v2_s": {},
    "googlenet": {"init_weights": False, "aux_logits": False},
    "inception_v3": {"init_weights": False, "aux_logits": False},
    "maxvit_t": {},
    "mnasnet0_5": {},
    "mobilenet_v2": {},
    "mobilenet_v3_small": {},
    "regnet_y_400mf": {},
    "resnet18": {},
    "resnext50_32x4d": {},
    "shufflenet_v2_x0_5": {},
    "squeezenet1_1": {},
    "swin_t": {},
    "swin_v2_t": {},
    "vgg11_bn": {},
    "vit_b_16": {},
    "wide_resnet50_2": {},
}
#: Those that take pictures of one size only, or none so small.
FIXED = {"inception_v3": 75, "maxvit_t": 224, "vit_b_16": 224}

Verb = Callable[..., Any]


def first_output(model: torch.nn.Module) -> Verb:
    """Of all that a model has."""
    return lambda x: model(x)[:, :1]


def last_layer(model: torch.nn.Module) -> LayerCollection:
    """The head of a model, by itself."""
    return LayerCollection.from_model(model, list(LayerCollection.from_model(model))[-1])


def influence(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Of each picture on each, by the last layer."""
    head = GGN(model, (x, y), PMatKFAC, layer_collection=last_layer(model))
    return Influence(model, head).scores((x, y), (x, y))


def variance(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Of the outputs, by a posterior of the last layer."""
    head = FIM(model, (x,), PMatKFAC, layer_collection=last_layer(model))
    return Posterior(model, head, num_data=len(x)).variance(x)


VERBS: dict[str, Verb] = {
    "diagonal": lambda m, x, y: EmpiricalFisher(m, (x, y), PMatDiag),
    "kfac": lambda m, x, y: FIM_MonteCarlo(m, (x,), PMatKFAC, n_output=1000),
    "ekfac": lambda m, x, y: FIM_MonteCarlo(m, (x,), PMatEKFAC, n_output=1000),
    "fim product": lambda m, x, y: FIM(m, (x,), PMatImplicit).mv(PVector.from_model(m).detach()),
    "ggn product": lambda m, x, y: GGN(m, (x, y), PMatImplicit).mv(PVector.from_model(m).detach()),
    "hessian product": lambda m, x, y: Hessian(m, (x, y), PMatImplicit).mv(PVector.from_model(m).detach()),
    "sampled": lambda m, x, y: FIM_MonteCarlo(m, (x,), PMatDiag, n_output=1000),
    "jacobian": lambda m, x, y: Jacobian(m, (x,), first_output(m)),
    "kernel": lambda m, x, y: GramMatrix(m, (x,), function=first_output(m)),
    "influence": influence,
    "variance": variance,
    "top eigenvalue": lambda m, x, y: extreme_eigenpairs(GGN(m, (x, y), PMatImplicit), 1, tol=1e-2),
}


def seconds(run: Verb, *of: Any) -> float:
    """Of one run."""
    start = time.perf_counter()
    run(*of)
    return time.perf_counter() - start


def gradient(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> Any:
    """Of the loss of the minibatch."""
    return torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()), allow_unused=True)


def loop(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    """The diagonal of the empirical Fisher matrix, one example at a time."""
    total = [torch.zeros_like(p) for p in model.parameters()]
    for one, label in zip(x.split(1), y.split(1), strict=True):
        found = torch.autograd.grad(F.cross_entropy(model(one), label), list(model.parameters()), allow_unused=True)
        for t, g in zip(total, found, strict=True):
            if g is not None:
                t.add_(g.square())


def main() -> None:
    """Print a line for each model and verb."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(MODELS), help="by default one of each family")
    parser.add_argument("--size", type=int, default=64, help="pixels of a side, where a model takes any")
    parser.add_argument("--images", type=int, default=3)
    parser.add_argument("--verbs", nargs="*", default=list(VERBS), choices=list(VERBS))
    given = parser.parse_args()
    for name in given.names:
        torch.manual_seed(0)
        model = getattr(torchvision.models, name)(weights=None, **MODELS.get(name, {})).eval()
        size = FIXED.get(name, given.size)
        x, y = torch.randn(given.images, 3, size, size), torch.randint(1000, (given.images,))
        one = [seconds(gradient, model, x, y) for _ in range(2)][1]
        print(f"{name:20} gradient        {one:7.2f} s", flush=True)
        print(f"{name:20} loop            {seconds(loop, model, x, y) / one:7.1f}", flush=True)
        for verb in given.verbs:
            try:
                said = f"{seconds(VERBS[verb], model, x, y) / one:7.1f}"
            except Exception as error:
                said = f"{type(error).__name__}: {error}"
            print(f"{name:20} {verb:15} {said}", flush=True)


if __name__ == "__main__":
    main()
