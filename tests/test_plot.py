"""Pictures of what is odd: one point, many runs, nothing finite, nothing at all."""

import io
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from nngeometry import GGN, PMatDense, PVector
from nngeometry.landscape import landscape
from nngeometry.plot import plot_history, plot_landscape, plot_spectra, plot_statistics
from nngeometry.spectrum import spectral_density
from nngeometry.statistics import Trajectory


def problem():
    torch.manual_seed(0)
    return nn.Linear(3, 4), (torch.randn(20, 3), torch.randint(4, (20,)))


def test_an_epoch_is_a_point_that_can_be_seen():
    figure = plot_history({"epoch": [1], "loss": [1.0], "test_loss": [0.5], "lr": [0.1]})
    assert [line.get_marker() for ax in figure.axes for line in ax.lines] == ["o", "o", "o"]


def test_many_runs_are_told_apart_beside_their_panels():
    run = {"epoch": list(range(40)), "loss": [1 / (k + 1) for k in range(40)], "lr": [0.1] * 40}
    figure = plot_history({f"run {k}": run for k in range(16)})
    loss = figure.axes[0]
    assert len({(line.get_color(), line.get_marker()) for line in loss.lines}) == 16
    assert all(ax.get_legend() is None for ax in figure.axes)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [f"run {k}" for k in range(16)]
    figure.savefig(io.BytesIO())  # lays it out
    right = max(ax.get_position().x1 for ax in figure.axes)
    assert legend.get_window_extent().transformed(figure.transFigure.inverted()).x0 >= right


def test_panels_of_landscapes_stand_beneath_each_other():
    model, batch = problem()
    d = PVector.from_model(model).clone().detach()
    line = landscape(model, batch, d, points=3)
    beside, beneath = (plot_landscape(line, ncols=n) for n in (2, 1))
    assert beneath.get_figwidth() == beside.get_figwidth() / 2
    assert [ax.get_title() for ax in beneath.axes] == ["loss", "accuracy"]
    surface = landscape(model, batch, [d, d], points=3)
    some = surface.loss.clone()
    some[0, 0], some[1, 2] = math.inf, math.nan
    assert plot_landscape(replace(surface, loss=some)).axes[0].get_title() == "training loss"
    with pytest.raises(ValueError, match="no finite loss"):
        plot_landscape(replace(surface, loss=math.nan * surface.loss))
    with pytest.raises(ValueError, match="ncols: expected at least 1"):
        plot_landscape(line, ncols=0)


def test_spectra_over_many_checkpoints_fit_on_paper():
    model, batch = problem()
    spectrum = spectral_density(GGN(model, batch, PMatDense), steps=5, outliers=1)
    figure = plot_spectra(dict.fromkeys(range(0, 4000, 100), spectrum))
    assert figure.get_figwidth() < 11
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()][:2] == ["0", "300"]
    with pytest.raises(ValueError, match="all eigenvalues are zero"):
        plot_spectra({0: spectral_density(0 * GGN(model, batch, PMatDense), steps=5)})


def test_nothing_to_draw_of_statistics():
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_statistics(Trajectory({}))
    with pytest.raises(ValueError, match="ncols: expected at least 1"):
        plot_statistics(Trajectory({}), ncols=0)
