"""An algorithm: a solver from products alone."""

import torch

from nngeometry.linalg import Solution


def minimal_residual(matvec, b, *, rtol=1e-6, max_products=2000):
    """Solve ``A x = b`` for A with a positive definite symmetric part, each row of b on its own."""
    x, size = torch.zeros_like(b), torch.linalg.vector_norm(b, dim=1)
    for products in range(1, max_products, 2):
        r = b - matvec(x)
        residuals = torch.linalg.vector_norm(r, dim=1) / size.where(size > 0, 1.0)
        if bool((residuals <= rtol).all()):
            return Solution(x, residuals, products)
        image = matvec(r)
        step = (r * image).sum(1) / image.square().sum(1)
        x = x + step.where(size > 0, 0.0).unsqueeze(1) * r
    raise RuntimeError(
        f"minimal_residual: relative residual {float(residuals.max()):.2g} after {products} products, the target was "
        f"{rtol:.2g}: raise max_products or rtol, or add regul"
    )
