"""Pictures of matrices, spectra, trainings, optimisers, statistics and landscapes. Needs matplotlib.

Every function returns the figure, which pyplot does not know of, and saves it where ``path=`` says.
"""

from .calibration import plot_calibration
from .density import plot_density
from .history import plot_history
from .landscape import plot_landscape
from .matrices import plot_matrices
from .optimisation import plot_damping, plot_intervals, plot_optimisation
from .spectra import plot_spectra
from .statistics import plot_statistics

__all__ = [
    "plot_calibration",
    "plot_damping",
    "plot_density",
    "plot_history",
    "plot_intervals",
    "plot_landscape",
    "plot_matrices",
    "plot_optimisation",
    "plot_spectra",
    "plot_statistics",
]
