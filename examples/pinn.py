"""A physics-informed net by Gauss-Newton
======================================

A physics-informed network: the Poisson equation in two dimensions, by Gauss-Newton and by Adam.

A network u of 129 parameters is to solve ::

    - (u_xx + u_yy) = 2 pi^2 sin(pi x) sin(pi y)   inside of the unit square,    u = 0   on its boundary,

whose solution is sin(pi x) sin(pi y). Its loss is half the mean of squared residuals, of the equation at points inside
and of u at points on the boundary. Each point is an example with one residual, so the Gauss-Newton matrix of the loss
is the Fisher matrix of regression with the residual as output, J^T J / n, and ``SecondOrderOptimizer`` takes it as any
other.

A residual has second derivatives of the network in it. The network carries them along: its activations at a point are
those of u, u_x, u_y and u_xx + u_yy, four positions that share the weights of a layer, as tokens or pixels do. A column
of ones, which is zero for derivatives, is the bias. So each layer is a call of ``nn.Linear``, and every representation
of the matrix is at hand. (A ``function=`` that calls ``torch.autograd.grad`` has products, PMatImplicit, but no
Jacobians of single layers.)

::

    python examples/pinn.py            about a minute
    python examples/pinn.py --small    fewer points and steps
"""

from __future__ import annotations

import argparse
import time
from math import pi
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from nngeometry import FIM, PMatDense
from nngeometry.optim import LevenbergMarquardt, SecondOrderOptimizer

PICTURE = Path(__file__).parent / "output" / "pinn.png"
#: Relative L2 error of the solution, for each method the times and errors at each step.
Curve = tuple[list[float], list[float]]


# %%
# The network carries the first and second derivatives of its input along.
class Jet(nn.Module):
    """An MLP with tanh on points ``(n, 2)``: its value, gradient and Laplacian, ``(n, 4)``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(3, width, bias=False)
        self.out = nn.Linear(width + 1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        jet = x.new_zeros(len(x), 4, 2)
        jet[:, 0] = x
        jet[:, 1:3] = torch.eye(2, dtype=x.dtype)
        value, *gradient, laplacian = self.hidden(with_one(jet)).unbind(1)
        h = value.tanh()
        slope = 1 - h.square()
        squares = gradient[0].square() + gradient[1].square()
        through = [h, *(slope * z for z in gradient), slope * (laplacian - 2 * h * squares)]
        return self.out(with_one(torch.stack(through, 1))).squeeze(2)


def with_one(jet: Tensor) -> Tensor:
    """A column that is one for the value and zero for its derivatives."""
    one = torch.zeros_like(jet[:, :, :1])
    one[:, 0] = 1
    return torch.cat([jet, one], 2)


# %%
# Points lie inside of the square and on its boundary. The solution is known.
def solution(x: Tensor) -> Tensor:
    return torch.sin(pi * x[:, 0]) * torch.sin(pi * x[:, 1])


def points(inside: int, boundary: int) -> tuple[Tensor, Tensor]:
    """Points, and the weight of the residual of each; those on the boundary are told by a negative one."""
    g = torch.Generator().manual_seed(0)
    on_sides = torch.rand(boundary, 2, generator=g)
    side = torch.arange(boundary) % 4
    on_sides[torch.arange(boundary), side % 2] = (side // 2).double()
    x = torch.cat([torch.rand(inside, 2, generator=g), on_sides])
    n = inside + boundary
    weight = torch.cat([torch.full((inside,), (n / inside) ** 0.5), torch.full((boundary,), -((n / boundary) ** 0.5))])
    return x, weight


# %%
# The residual is the output of a regression, whose Fisher matrix is the Gauss-Newton matrix of the loss.
def training(steps: int, data: tuple[Tensor, Tensor], method: str) -> tuple[nn.Module, Curve]:
    """A trained network, and how its error fell."""
    torch.manual_seed(0)
    model = Jet(32)

    def residual(x: Tensor, weight: Tensor) -> Tensor:
        jet = model(x)
        inside = jet[:, 3] + 2 * pi**2 * solution(x)
        return (weight.abs() * torch.where(weight > 0, inside, jet[:, 0])).unsqueeze(1)

    optimizer: torch.optim.Optimizer
    if method == "Adam":
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    else:
        optimizer = SecondOrderOptimizer(
            model,
            PMatDense,
            FIM,
            variant="regression",
            function=residual,
            lr=1.0,
            momentum=0.0,
            damping=LevenbergMarquardt(1e-2, every=1, omega=0.6, reject=True),
            decay=0.0,  # the matrix of all points, as it is now
            refresh=1,
        )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = 0.5 * residual(*data).square().mean()
        loss.backward()
        return loss

    axis = torch.linspace(0, 1, 41)
    grid = torch.cartesian_prod(axis, axis)
    truth, start, times, errors = solution(grid), time.perf_counter(), [], []
    for _ in range(steps):
        if isinstance(optimizer, SecondOrderOptimizer):
            optimizer.observe(data)
        optimizer.step(closure)
        if method == "Adam":
            schedule.step()
        times.append(time.perf_counter() - start)
        with torch.no_grad():
            errors.append(float((model(grid)[:, 0] - truth).norm() / truth.norm()))
    return model, (times, errors)


# %%
# The picture shows the error over steps, and the solution that was found.
def draw(models: dict[str, nn.Module], curves: dict[str, Curve]) -> None:
    figure = Figure(figsize=(13, 3.4), layout="constrained")
    by_step, by_second, *maps = figure.subplots(1, 4, width_ratios=[1.1, 1.1, 1, 1])
    for name, (times, errors) in curves.items():
        by_step.loglog(range(1, len(errors) + 1), errors, label=name)
        by_second.loglog(times, errors, label=name)
    by_step.set(xlabel="steps", ylabel="relative L2 error")
    by_second.set(xlabel="seconds")
    by_step.legend(loc="lower left")
    axis = torch.linspace(0, 1, 101)
    grid = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        u = models["Gauss-Newton"](grid)[:, 0]
    for ax, values, title in zip(maps, (u, u - solution(grid)), ("u, Gauss-Newton", "its error"), strict=True):
        image = ax.imshow(
            values.view(101, 101).T, origin="lower", extent=(0, 1, 0, 1), cmap="RdBu_r" if ax is maps[1] else None
        )
        figure.colorbar(image, ax=ax)
        ax.set(title=title, xticks=[0, 1], yticks=[0, 1])
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=120)


# %%
# Several optimisers start from the same network.
def main(small: bool) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    data = points(200, 60) if small else points(900, 120)
    budget = {"Gauss-Newton": 30, "Adam": 200} if small else {"Gauss-Newton": 100, "Adam": 4000}
    models, curves = {}, {}
    print(f"{'':14}{'steps':>7}{'seconds':>9}{'relative L2 error':>20}")
    for method, steps in budget.items():
        models[method], curves[method] = training(steps, data, method)
        times, errors = curves[method]
        print(f"{method:14}{steps:7}{times[-1]:9.1f}{errors[-1]:20.1e}", flush=True)
    draw(models, curves)
    print(f"\nPicture: {PICTURE}")
    assert small or curves["Gauss-Newton"][1][-1] < curves["Adam"][1][-1] / 10


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="fewer points and steps")
    main(parser.parse_args().small)
