"""A representation from estimators that exist: dense blocks of two layers each."""

from nngeometry import PMat, estimators


class PMatPairs(PMat):
    """Neighbouring layers two by two, with their cross terms. Exact inside of pairs."""

    @classmethod
    def plan(cls, layers):
        return [estimators.dense(layers[k : k + 2]) for k in range(0, len(layers), 2)]
