"""Likelihoods: the square root, the samples and the product are all of one Hessian, also where numbers are extreme."""

import oracle
import pytest
import torch
from laws import LIKELIHOODS

from nngeometry import Bernoulli, Categorical, Gaussian
from nngeometry.likelihood import likelihood_of
from nngeometry.losses import loss_gradient


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_square_root_and_product(name):
    likelihood, shape, fisher = LIKELIHOODS[name]
    f, u = torch.randn(4, *shape), torch.randn(4, *shape)
    H = fisher(f)
    cotangents = likelihood.sqrt(f)
    S = cotangents.take(0, cotangents.count).flatten(2)
    torch.testing.assert_close(torch.einsum("cnp,cnq->npq", S, S), H)
    torch.testing.assert_close(torch.cat([cotangents.take(k, k + 1) for k in range(cotangents.count)]).flatten(2), S)
    torch.testing.assert_close(likelihood.hvp(f, u).flatten(1), torch.einsum("npq,nq->np", H, u.flatten(1)))


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_samples_are_unbiased_scores(name):
    likelihood, shape, fisher = LIKELIHOODS[name]
    f = 0.5 * torch.randn(2, *shape)
    trials = 40000
    samples = likelihood.sample(f, trials, torch.Generator(f.device).manual_seed(0))
    S = samples.take(0, trials).flatten(2)
    H = fisher(f)
    assert oracle.relative(torch.einsum("cnp,cnq->npq", S, S), H) < 0.05
    mean = S.sum(0) / trials**0.5
    assert float(mean.abs().max()) < 0.05


def test_variance():
    f = torch.randn(3, 2)
    assert float(Gaussian(4.0).hvp(f, torch.ones_like(f))[0, 0]) == 0.25
    S = Gaussian(4.0).sqrt(f).take(0, 2)
    torch.testing.assert_close(torch.einsum("cnp,cnq->npq", S, S), 0.25 * torch.eye(2).expand(3, 2, 2))
    with pytest.raises(ValueError, match="positive"):
        Gaussian(0.0)


def test_categorical_along_another_axis():
    f = torch.randn(2, 3, 4)
    a = Categorical(dim=-1).sqrt(f).take(0, 9)
    b = Categorical(dim=1).sqrt(f.transpose(1, 2)).take(0, 9).transpose(2, 3)
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("scale", [50.0, 700.0, 1e4])
def test_categorical_where_probabilities_underflow(scale):
    f = scale * torch.tensor([[0.0, 1.0, 0.5, -1.0], [1.0, 1.0, 0.0, 0.0], [-1.0, 0.0, 1.0, 2.0]])
    S = Categorical().sqrt(f).take(0, 3)
    p = f.softmax(1)
    H = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    assert bool(torch.isfinite(S).all())
    torch.testing.assert_close(torch.einsum("cnp,cnq->npq", S, S), H, atol=1e-15, rtol=0)


def test_bernoulli_keeps_digits_where_p_rounds_to_one():
    f = torch.tensor([[40.0]])
    assert float(Bernoulli().scale(f) ** 2) == pytest.approx(float(torch.exp(torch.tensor(-40.0))), rel=1e-12)


def test_errors():
    with pytest.raises(ValueError, match="use one of classif_logits"):
        likelihood_of("classification")
    with pytest.raises(ValueError, match="at least 2"):
        Categorical().sqrt(torch.zeros(3, 1))
    with pytest.raises(ValueError, match="no axis of classes"):
        Categorical().sqrt(torch.zeros(3))
    with pytest.raises(ValueError, match='reduction="none"'):
        loss_gradient(lambda f, y: f.sum(), torch.zeros(3, 2), None)


def test_the_users_loss_is_left_alone():
    loss = torch.nn.CrossEntropyLoss(reduction="mean")
    loss_gradient(loss, torch.randn(3, 2), torch.tensor([0, 1, 0]))
    assert loss.reduction == "mean"


def test_labels_are_drawn_from_the_probabilities_of_the_model():
    p = torch.tensor([[0.5, 0.0, 0.3, 0.2], [0.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
    draws = Categorical(positions=False).sample(p.log(), 20000, torch.Generator(p.device).manual_seed(0)).take(0, 20000)
    labels = (20000**0.5 * draws + p).round()  # one-hot: the score is label - p
    assert labels.sum(-1).eq(1).all()
    assert (labels.mean(0) - p).abs().max() < 0.015
    assert labels[:, p == 0].sum() == 0
