"""Losses: what they are of an example, their targets, and their Hessian in the output of a model."""

from .accepted import Loss, OwnLoss, TokenCrossEntropy, example_loss, loss_gradient, output_loss
from .output import OutputLoss

__all__ = ["Loss", "OutputLoss", "OwnLoss", "TokenCrossEntropy", "example_loss", "loss_gradient", "output_loss"]
