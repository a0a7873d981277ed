"""A consumer: the number of directions that the data determine."""

from nngeometry import PMat


def effective_dimension(F: PMat, regul: float) -> float:
    """``tr F (F + regul)^-1``: each eigenvalue l counts ``l / (l + regul)``."""
    if not regul > 0:
        raise ValueError(f"effective_dimension: regul must be positive, got {regul}")
    return F.size(0) - regul * float(F.inv(regul).trace())
