"""The quadratic model of the loss of a minibatch, ``q(s) = g . s + s^T (M + R) s / 2``, by products with M."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..object.pmat import PMat


class QuadraticModel:
    """``q(s) = g . s + s^T (M + R) s / 2`` around the parameters as they are.

    Args:
        matrix: M, exact, by its products.
        gradient: g ``(P,)``.
        shift: R, one number or one for each coordinate.
    """

    def __init__(self, matrix: PMat, gradient: Tensor, shift: float | Tensor) -> None:
        self.matrix, self.gradient, self.shift = matrix, gradient, shift

    def _products(self, rows: Tensor) -> Tensor:
        return self.matrix.root.mv(rows) + self.shift * rows

    def change(self, s: Tensor) -> float:
        """``q(s) - q(0)``."""
        return float(self.gradient @ s + 0.5 * (s @ self._products(s.unsqueeze(0))[0]))

    def best(self, directions: Sequence[Tensor]) -> list[float]:
        """The weights of directions whose sum has the least ``q``.

        Raises:
            ValueError: If the model is not convex on them.
        """
        rows = torch.stack(list(directions))
        norms = torch.linalg.vector_norm(rows, dim=1)
        rows = rows / torch.where(norms > 0, norms, 1.0).unsqueeze(1)
        curvature = (rows @ self._products(rows).T).double().cpu()
        l, q = torch.linalg.eigh((curvature + curvature.T) / 2)
        if bool(l[-1] <= 0) or bool(l[0] < -1e-6 * l[-1]):
            raise ValueError(
                f"lr='quadratic': the quadratic model of the minibatch has the curvature {float(l[0]):.3g} along the "
                "step, so that it has no minimum there: use more damping, or a matrix that is positive, such as GGN"
            )
        slope = q.T @ (rows @ self.gradient).double().cpu()
        cut = 1e2 * torch.finfo(self.gradient.dtype).eps * l[-1]  # directions that are the same one
        weights = -(q @ torch.where(l > cut, slope / l, 0.0)) / torch.where(norms > 0, norms, 1.0).double().cpu()
        return [float(w) for w in weights]
