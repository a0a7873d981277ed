"""Operations that torch does not differentiate twice, or gets wrong, in products with matrices and as losses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nngeometry import GGN, Hessian, PMatDense, PMatDiag, PMatImplicit
from nngeometry.derivatives.composites import cdist, ctc_loss, pdist
from nngeometry.derivatives.operations import LogCumSumExp

OTHERS = torch.randn(3, 2, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


class Between(nn.Module):
    """Something between two linear layers."""

    def __init__(self, function):
        super().__init__()
        self.first, self.last, self.function = nn.Linear(4, 6), nn.Linear(6, 3), function

    def forward(self, x):
        return self.last(self.function(self.first(x)))


def _to_others(p):
    return lambda h: torch.cdist(h.view(-1, 3, 2), OTHERS.to(h.dtype), p).sum(2).repeat(1, 2) + h


@pytest.mark.parametrize(
    "function",
    [
        lambda h: torch.logcumsumexp(h, 1),
        lambda h: (h.view(-1, 3, 2) * 40).logcumsumexp(dim=-2).flatten(1),
        _to_others(1.0),
        _to_others(2.0),
        _to_others(3.0),
        _to_others(float("inf")),
        lambda h: torch.cdist(h.unsqueeze(2), h.unsqueeze(2)).sum(2),  # zeros among the distances
        lambda h: h + torch.stack([F.pdist(one.view(3, 2)).sum() for one in h]).unsqueeze(1),
    ],
)
def test_in_a_model(function):
    torch.manual_seed(0)
    model = Between(function).double()
    batch = torch.randn(4, 4, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    params = list(model.parameters())

    def gradient(value: Tensor) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, params, retain_graph=True)])

    ggn = 0
    for x in batch[0]:
        J = torch.stack([gradient(one) for one in model(x.unsqueeze(0))[0]])
        ggn = ggn + 2 * J.T @ J / batch[1].numel()
    torch.testing.assert_close(GGN(model, batch, PMatImplicit, nn.MSELoss()).to_torch(), ggn, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(GGN(model, batch, PMatDense, nn.MSELoss()).to_torch(), ggn, rtol=1e-10, atol=1e-10)
    at, step = nn.utils.parameters_to_vector(params).detach(), 1e-5
    v = torch.randn_like(at)
    found = Hessian(model, batch, PMatImplicit, nn.MSELoss()).to_torch() @ v
    there, back = (_gradient_at(model, batch, at + sign * step * v) for sign in (1, -1))
    torch.testing.assert_close(found, (there - back) / (2 * step), rtol=1e-6, atol=1e-6)


def _gradient_at(model, batch, weights):
    nn.utils.vector_to_parameters(weights, model.parameters())
    loss = nn.MSELoss()(model(batch[0]), batch[1])
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, model.parameters())])


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, float("inf")])
def test_distances(p):
    x, y = torch.randn(2, 4, 3, dtype=torch.float64).requires_grad_(), torch.randn(5, 3, dtype=torch.float64)
    y = torch.cat([y, x[0, :1].detach()])
    for mine, theirs in ((cdist(x, y, p), torch.cdist(x, y, p)), (pdist(x[0], p), F.pdist(x[0], p))):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
        if p > 0:
            w = torch.randn_like(mine)
            one, other = (torch.autograd.grad(t, x, w, retain_graph=True)[0] for t in (mine, theirs))
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_logcumsumexp():
    operation, x = LogCumSumExp(1), torch.randn(2, 5, dtype=torch.float64)
    x[0, 0] = 300.0
    y = operation.value(x)
    W = torch.exp(x.unsqueeze(1) - y.unsqueeze(2)).tril()
    u, d = torch.randn(2, 2, 5, dtype=torch.float64)
    u[0, 1] = d[1, 0] = 0.0
    along, back = operation.push([d], (x, y), x.shape), operation.pull(u, (x, y), [True])[0]
    torch.testing.assert_close(along, torch.einsum("bij,bj->bi", W, d), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(back, torch.einsum("bij,bi->bj", W, u), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("form", ["padded", "concatenated", "alone"])
def test_ctc(form, reduction):
    torch.manual_seed(0)
    x = torch.randn(7, 3, 5, dtype=torch.float64).requires_grad_()
    targets, lengths, sizes = torch.tensor([[1, 1, 2], [3, 0, 0], [0, 0, 0]]), (7, 5, 4), (3, 1, 0)
    options = {"reduction": reduction}
    if form == "concatenated":
        targets = torch.tensor([1, 1, 2, 3])
    scores = x.log_softmax(2)
    if form == "alone":
        scores, targets, lengths, sizes = scores[:, 0], targets[0], torch.tensor(7), torch.tensor(3)
    mine, theirs = (of(scores, targets, lengths, sizes, **options) for of in (ctc_loss, F.ctc_loss))
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
    one, other = (torch.autograd.grad(t.sum(), x, retain_graph=True)[0] for t in (mine, theirs))
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("zero_infinity", [False, True])
def test_ctc_of_a_target_that_is_too_long(zero_infinity):
    scores = torch.randn(2, 1, 4, dtype=torch.float64).log_softmax(2).requires_grad_()
    loss = ctc_loss(scores, torch.tensor([[1, 1, 1]]), (2,), (3,), zero_infinity=zero_infinity)
    assert float(loss.detach()) == (0.0 if zero_infinity else float("inf"))
    assert not torch.autograd.grad(loss, scores)[0].any()


class Speech(nn.Module):
    def __init__(self):
        super().__init__()
        self.map = nn.Linear(3, 4)

    def forward(self, x):
        return self.map(x).log_softmax(-1)


def _ctc(f, y):
    n = len(f)
    return F.ctc_loss(f.transpose(0, 1), y, torch.full((n,), f.shape[1]), torch.full((n,), 2), reduction="none")


def test_ctc_as_a_loss():
    torch.manual_seed(0)
    model = Speech().double()
    batch = torch.randn(2, 5, 3, dtype=torch.float64), torch.randint(1, 4, (2, 2))
    found = Hessian(model, batch, PMatDense, _ctc).to_torch()
    at, step, columns = nn.utils.parameters_to_vector(model.parameters()).detach(), 1e-5, []
    for e in torch.eye(len(at), dtype=at.dtype):
        of_signs = []
        for sign in (1, -1):
            nn.utils.vector_to_parameters(at + sign * step * e, model.parameters())
            grads = torch.autograd.grad(_ctc(model(batch[0]), batch[1]).mean(), model.parameters())
            of_signs.append(torch.cat([g.flatten() for g in grads]))
        columns.append((of_signs[0] - of_signs[1]) / (2 * step))
    torch.testing.assert_close(found, torch.stack(columns), rtol=1e-6, atol=1e-7)
    for representation in (PMatDense, PMatImplicit):
        with pytest.raises(ValueError, match=r"negative eigenvalue .* use Hessian, or a convex loss"):
            GGN(model, batch, representation, _ctc).to_torch()


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 2 * g * ctx.saved_tensors[0]


@pytest.mark.parametrize("representation", [PMatDense, PMatImplicit, PMatDiag])
@pytest.mark.parametrize("last", [False, True])
def test_hessians_of_functions_that_are_once_differentiable_are_refused(representation, last):
    """They would lack what comes before such a function, also where it is the last one before a sum."""
    model, batch = Between(lambda h: h if last else h + Once.apply(h)), (torch.randn(4, 4), torch.randn(4, 3))
    loss = (lambda f, y: Once.apply(f - y).sum(1)) if last else nn.MSELoss()
    with pytest.raises(NotImplementedError, match=r"the custom autograd function .* cannot be differentiated"):
        Hessian(model, batch, representation, loss).to_torch()


class Detached(torch.autograd.Function):
    """One that hides from autograd what its backward depends on."""

    @staticmethod
    def forward(ctx, x):
        ctx.at = x.detach()
        return x.square()

    @staticmethod
    def backward(ctx, g):
        return 2 * g * ctx.at


class Right(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, g):
        return 2 * g * ctx.saved_tensors[0]


@pytest.mark.parametrize("representation", [PMatDense, PMatImplicit])
@pytest.mark.parametrize("factor", [lambda f: 1.0, torch.exp])
@pytest.mark.parametrize("function", [Once, Detached])
def test_a_loss_without_a_second_derivative_is_named(function, factor, representation):
    torch.manual_seed(0)
    model, batch = nn.Linear(3, 2), (torch.randn(4, 3), torch.randn(4, 2))
    with pytest.raises(NotImplementedError, match=r"^loss: the custom autograd function .* cannot be differentiated"):
        GGN(model, batch, representation, lambda f, y: (factor(f) * function.apply(f - y)).sum(1)).to_torch()


def _huber(f, y):
    d = f - y
    return torch.where(d.abs() < 1, Right.apply(d) / 2, d.abs() - 0.5).mean(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("mine", "theirs"), [(_huber, nn.HuberLoss()), (lambda f, y: Right.apply(f - y).mean(1), nn.MSELoss())]
)
def test_a_loss_with_a_backward_that_can_be_differentiated(mine, theirs, dtype):
    torch.manual_seed(0)
    model = nn.Linear(3, 40).to(dtype)
    batch = torch.randn(50, 3, dtype=dtype), torch.randn(50, 40, dtype=dtype)  # with kinks among the outputs
    found, expected = (GGN(model, batch, PMatDense, loss).to_torch() for loss in (mine, theirs))
    torch.testing.assert_close(found, expected)


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_loss_that_is_linear_has_no_curvature(dtype):
    torch.manual_seed(0)
    model, batch = nn.Linear(3, 2).to(dtype), (torch.randn(9, 3, dtype=dtype), 1e4 * torch.randn(9, 2, dtype=dtype))
    found = GGN(model, batch, PMatDense, lambda f, y: (Double.apply(f) * y).sum(1)).to_torch()
    assert not found.any()
