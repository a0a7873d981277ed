"""What the optimisers of single parameters take."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def check_real(optimiser: str, parameters: Sequence[Tensor]) -> None:
    """Raise ``TypeError`` for complex parameters."""
    for p in parameters:
        if p.is_complex():
            raise TypeError(
                f"{optimiser}: a parameter of shape {tuple(p.shape)} is complex: hold its real and imaginary parts "
                "as two real ones (torch.view_as_real)"
            )


def check_dense(optimiser: str, parameters: Sequence[Tensor]) -> None:
    """Raise ``TypeError`` for sparse gradients."""
    for p in parameters:
        if p.grad is not None and p.grad.layout != p.layout:
            raise TypeError(
                f"{optimiser}: the gradient of a parameter of shape {tuple(p.shape)} is sparse: make its layer with "
                "sparse=False"
            )
