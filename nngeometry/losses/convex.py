"""Hessians of a loss in the outputs, one small matrix for each example, known by their products."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from ..changes import Changed, entered, recording
from ..derivatives.composites import DifferentiableTwice
from ..derivatives.pulling import BatchedVJP, check_twice, nodes, operations_named
from ..memory import chunk_length, slices

_REMEDY = "use other operations in it, or Hessian with products=FiniteDifference() instead of GGN"
#: At most what share of the entries of a gradient has a kink between two outputs that are near each other.
_KINKS = 0.05
#: How many products the sign of the eigenvalues is looked at with.
_LOOKS = 8


class OutputHessian:
    """The Hessians ``(K, K)`` of a sum of losses with respect to the output of each example.

    total: from outputs ``(n, *out)`` to the sum of their losses, each a function of its own output. f: where.
    """

    def __init__(self, total: Callable[[Tensor], Tensor], f: Tensor) -> None:
        self.leaf = f.detach().requires_grad_()
        with Changed(recording(True), entered(DifferentiableTwice())), _named():
            loss = total(self.leaf)
            # A cotangent that is differentiated too: functions that are once differentiable show only then.
            one = torch.ones_like(loss, requires_grad=True)
            (self.gradient,) = torch.autograd.grad(loss, self.leaf, one, create_graph=True)
        check_twice([self.gradient], "loss: ", _REMEDY)
        if bool(self.gradient.detach().isnan().any()):
            raise ValueError("loss: its gradient has NaN entries: check the targets of this minibatch")
        self._pull = BatchedVJP()
        if any(isinstance(node, BackwardCFunction) for node in nodes([loss])):
            self._check_against_differences(total)

    def _check_against_differences(self, total: Callable[[Tensor], Tensor]) -> None:
        """Raise unless a product is a difference of gradients, but for a few entries with a kink in between: not so if
        a backward of the user's hides what it depends on from autograd, which then takes it for constant.
        """
        f = self.leaf.detach()
        v = torch.cos(torch.arange(1, f.numel() + 1, dtype=f.dtype, device=f.device)).view(f.shape)
        step = torch.finfo(f.dtype).eps ** 0.5 * (1.0 + float(f.abs().mean()))
        found: list[Tensor] = []
        with Changed(recording(True)):
            for sign in (1, -1):
                leaf = (f + sign * step * v).requires_grad_()
                found += torch.autograd.grad(total(leaf), leaf)
        expected = (found[0] - found[1]) / (2 * step)
        rounding = 8 * torch.finfo(f.dtype).eps * float(found[0].abs().amax()) / step if f.numel() else 0.0
        wrong = (self.mv(v) - expected).abs() > 1e-2 * (expected.abs() + expected.abs().mean()) + rounding
        if float(wrong.to(f.dtype).mean()) > _KINKS:
            raise NotImplementedError(
                f"loss: the custom autograd function in it has a backward that cannot be differentiated: {_REMEDY}"
            )

    def mv(self, u: Tensor) -> Tensor:
        """Times one vector for each example, ``(n, *out)``: one differentiation of the gradient."""
        return self.mm(u.unsqueeze(0))[0]

    def mm(self, U: Tensor) -> Tensor:
        """Times several vectors for each example, ``(k, n, *out)``."""
        found = None
        if self.gradient.requires_grad:
            with _named():
                (found,) = self._pull([self.gradient], [self.leaf], [U])
        return torch.zeros_like(U) if found is None else found

    def root(self, examples: slice) -> Tensor:
        """Columns of a square root for some of the examples, ``(K, b, *out)``. Raises ``ValueError`` for a negative
        eigenvalue.
        """
        f = self.leaf
        n, k = len(f), f[0].numel()
        h = f.new_empty(k, len(range(n)[examples]), k)
        for c in slices(k, chunk_length(4 * f.numel() * f.element_size(), k, f.device)):
            basis = f.new_zeros(c.stop - c.start, n, k)
            basis[torch.arange(c.stop - c.start), :, torch.arange(c.start, c.stop)] = 1
            h[c] = self.mm(basis.view(-1, *f.shape)).reshape(-1, n, k)[:, examples]
        if not bool(torch.isfinite(h.sum())):
            raise ValueError("loss: its second derivative has NaN or infinite entries: check the targets")
        if self.gradient.requires_grad:
            largest = h.diagonal(dim1=0, dim2=2).abs().amax()
            for e in slices(h.shape[1], chunk_length(4 * k * k * f.element_size(), h.shape[1], f.device)):
                h[:, e] = root(h[:, e].movedim(1, 0), largest).movedim(2, 0)
        return h.view(k, -1, *f.shape[1:])

    def check_positive(self) -> None:
        """Raise ``ValueError`` for a negative eigenvalue, as far as a few products for each example tell: Lanczos'
        method finds the extreme ones first.
        """
        f = self.leaf
        n, k = len(f), f[0].numel()
        generator = torch.Generator().manual_seed(0)
        q = torch.randn(n, k, generator=generator, dtype=torch.float64, device="cpu").to(f)
        basis: list[Tensor] = []
        columns: list[Tensor] = []
        for _ in range(min(k, _LOOKS)):
            for _ in range(2):  # once more for what rounding left
                for b in basis:
                    q = q - b * (b * q).sum(1, keepdim=True)
                q = q / q.norm(dim=1, keepdim=True).clamp(min=torch.finfo(f.dtype).tiny)
            basis.append(q)
            q = self.mv(q.view(f.shape)).reshape(n, k)
            columns.append(q)
        Q, HQ = torch.stack(basis, 1).double(), torch.stack(columns, 1).double()
        l = torch.linalg.eigvalsh(_symmetric(Q @ HQ.mT))
        # Rounding is that of numbers of the size of probabilities, also where what is left of them is small.
        _check_sign(l, 10 * k * torch.finfo(f.dtype).eps * max(1.0, float(l.abs().amax())))


def _named() -> AbstractContextManager[None]:
    return operations_named("loss: ", _REMEDY)


def root(h: Tensor, largest: Tensor) -> Tensor:
    """L with ``L L^T = h``, for positive semidefinite matrices ``(b, K, K)``, by Cholesky's method.

    A matrix that is singular up to rounding is shifted by as little as lets it pass. largest: the size of diagonal
    entries, of which rounding is a fraction. Raises ``ValueError`` for a negative eigenvalue.
    """
    eps = torch.finfo(h.dtype).eps
    h = _symmetric(h.float() if h.dtype in (torch.float16, torch.bfloat16) else h)
    l, info = torch.linalg.cholesky_ex(h)
    zero = (h == 0).flatten(1).all(1)
    l[zero] = 0
    failed = ((info != 0) & ~zero).nonzero()[:, 0]
    shift = 4 * eps * h.diagonal(dim1=1, dim2=2).abs().amax(1)
    most = 10 * h.shape[1] * eps * float(largest)
    identity = torch.eye(h.shape[1], dtype=h.dtype, device=h.device)
    while len(failed):
        small = shift[failed].clamp(max=most)
        l[failed], info = torch.linalg.cholesky_ex(h[failed] + small.view(-1, 1, 1) * identity)
        hopeless = failed[(info != 0) & ((small >= most) | (small == 0))]
        if len(hopeless):
            values, vectors = torch.linalg.eigh(h[hopeless])
            _check_sign(values, most)
            l[hopeless] = vectors * values.clamp(min=0).sqrt().unsqueeze(1)
        failed = failed[(info != 0) & (small < most) & (small > 0)]
        shift[failed] *= 8
    return l


def _symmetric(h: Tensor) -> Tensor:
    return (h + h.mT) / 2


def _check_sign(l: Tensor, noise: float) -> None:
    if bool((l < -noise).any()):
        raise ValueError(
            f"loss: its Hessian with respect to the output has a negative eigenvalue ({float(l.min()):.3g}), so "
            "the Gauss-Newton matrix is not positive semidefinite: use Hessian, or a convex loss"
        )
