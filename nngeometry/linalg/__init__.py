"""Algorithms on a matrix that is known by its products alone."""

from .cg import CGResult, cg

__all__ = ["CGResult", "cg"]
