"""The jobs written the obvious way with torch.func: one example at a time, in a vmap over each minibatch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from settings import Batch, Task
from torch import Tensor
from torch.func import functional_call, grad, jacrev, jvp, vjp, vmap
from torch.nn import functional as F

from contenders._kernels import with_forward_derivatives
from contenders._lanczos import largest_ritz_value

VERSION = torch.__version__
NOTES: dict[str, str] = {}
LACKS: dict[str, set[str]] = {}

Parameters = dict[str, Tensor]


class Diagonal(NamedTuple):
    """Of a matrix in parameter space."""

    entries: Tensor


def _parameters(task: Task) -> Parameters:
    return {name: p.detach() for name, p in task.named.items()}


def _flat(task: Task, per_example: Parameters, axes: int) -> Tensor:
    """All parameters in one axis, after as many others."""
    return torch.cat([per_example[name].flatten(axes) for name in _parameters(task)], -1)


def _unflat(task: Task, v: Tensor) -> Parameters:
    like = _parameters(task)
    parts = v.split([p.numel() for p in like.values()])
    return {name: part.view_as(p) for part, (name, p) in zip(parts, like.items(), strict=True)}


def _outputs(task: Task, p: Parameters, x: Tensor) -> Tensor:
    return functional_call(task.model, p, (x,))


def _jacobian_of(task: Task, x: Tensor) -> Parameters:
    """``(n, C, ...)``."""
    return vmap(jacrev(lambda p, one: _outputs(task, p, one[None])[0]), (None, 0))(_parameters(task), x)


def _jacobian(task: Task) -> Callable[[], Tensor]:
    return lambda: torch.cat([_flat(task, _jacobian_of(task, x), 2) for x, _ in task.batches])


def _gram(task: Task) -> Callable[[], Tensor]:
    """``(n, C, n, C)``: a contraction of the Jacobians for each parameter."""

    def run() -> Tensor:
        jacobians = [_jacobian_of(task, x) for x, _ in task.batches]
        whole = {name: torch.cat([J[name] for J in jacobians]).flatten(2) for name in jacobians[0]}
        return sum(torch.einsum("ncp,mdp->ncmd", J, J) for J in whole.values())

    return run


def _gradients(task: Task, batch: Batch) -> Parameters:
    """Of the loss of each example ``(n, ...)``."""

    def loss(p: Parameters, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(_outputs(task, p, x[None]), y[None], reduction="sum")

    return vmap(grad(loss), (None, 0, 0))(_parameters(task), *batch)


def _diag_empirical(task: Task) -> Callable[[], Diagonal]:
    def run() -> Diagonal:
        found = sum(_flat(task, _gradients(task, batch), 1).square().sum(0) for batch in task.batches)
        return Diagonal(found / task.examples)

    return run


def _trace_empirical(task: Task) -> Callable[[], Tensor]:
    return lambda: sum(g.square().sum() for b in task.batches for g in _gradients(task, b).values()) / task.examples


def _dense(task: Task) -> Callable[[], Tensor]:
    def run() -> Tensor:
        found: Any = 0
        for x, _ in task.batches:
            p, J = _outputs(task, _parameters(task), x).softmax(1), _flat(task, _jacobian_of(task, x), 2)
            rows = p.sqrt().unsqueeze(2) * (J - (p.unsqueeze(1) @ J))
            found = found + rows.flatten(0, 1).T @ rows.flatten(0, 1)
        return found / task.examples

    return run


def _gauss_newton(task: Task, v: Tensor) -> Tensor:
    """Of the sum over examples and positions."""
    params, direction, found = _parameters(task), _unflat(task, v), torch.zeros_like(v)
    for x, _ in task.batches:

        def f(p: Parameters, x: Tensor = x) -> Tensor:
            return _outputs(task, p, x)

        out, u = jvp(f, (params,), (direction,))
        p = out.softmax(1)
        found += _flat(task, vjp(f, params)[1](p * (u - (p * u).sum(1, keepdim=True)))[0], 0)
    return found


def _fim(task: Task, v: Tensor) -> Tensor:
    return _gauss_newton(task, v) / task.examples


def _ggn(task: Task, v: Tensor) -> Tensor:
    return _gauss_newton(task, v) / (task.examples * task.positions)


def _hessian(task: Task, v: Tensor) -> Tensor:
    params, direction, found = _parameters(task), _unflat(task, v), torch.zeros_like(v)
    for x, y in task.batches:

        def loss(p: Parameters, x: Tensor = x, y: Tensor = y) -> Tensor:
            return F.cross_entropy(_outputs(task, p, x), y, reduction="sum")

        found += _flat(task, jvp(grad(loss), (params,), (direction,))[1], 0)
    return found / (task.examples * task.positions)


def _product(product: Callable[[Task, Tensor], Tensor]) -> Callable[[Task], Callable[[], Tensor]]:
    def prepare(task: Task) -> Callable[[], Tensor]:
        v = task.vectors()
        return lambda: product(task, v)

    return prepare


def _lanczos(product: Callable[[Task, Tensor], Tensor]) -> Callable[[Task], Callable[[], float]]:
    def prepare(task: Task) -> Callable[[], float]:
        start = task.vectors()
        return lambda: largest_ritz_value(lambda v: product(task, v), start)

    return prepare


JOBS: dict[str, Callable[[Task], Callable[[], Any]]] = {
    "diag_ef": _diag_empirical,
    "dense": _dense,
    "trace_ef": _trace_empirical,
    "fim_product": _product(_fim),
    "fim_product_again": _product(_fim),
    "ggn_product": _product(_ggn),
    "ggn_product_lanczos": _lanczos(_ggn),
    "hessian_product": _product(_hessian),
    "hessian_product_lanczos": _lanczos(_hessian),
    "jacobian": _jacobian,
    "gram": _gram,
    "gram_one_batch": _gram,
}
JOBS |= {name: with_forward_derivatives(job) for name, job in JOBS.items() if "product" in name}


def fingerprint(task: Task, result: Any) -> float:
    """One number that tells a result from a wrong one."""
    v = task.vectors()
    if isinstance(result, Diagonal):
        return float(v @ (result.entries * v))
    if isinstance(result, float) or result.ndim == 0:
        return float(result)
    if result.ndim == 4:
        return task.quadratic_form(result.permute(1, 0, 3, 2))
    if result.ndim == 2:
        return float(v @ (result @ v))
    result = result.movedim(-2, 0) if result.ndim == 3 else result
    return float((result * task.vectors(*result.shape[:-1])).sum(-1).mean())
