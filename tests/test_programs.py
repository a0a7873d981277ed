"""Programs as people write them for NNGeometry, in the names of 0.2 to 0.4: they run unchanged, and are right."""

import math

import pytest
import torch
from oracle import HERE
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from nngeometry.generator import Jacobian
from nngeometry.layercollection import LayerCollection
from nngeometry.metrics import FIM, FIM_MonteCarlo
from nngeometry.object import (
    FMatDense,
    FVector,
    PMatDense,
    PMatDiag,
    PMatEKFAC,
    PMatImplicit,
    PMatKFAC,
    PullBackDense,
    PushForwardDense,
    PushForwardImplicit,
    PVector,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*old name of NNGeometry:DeprecationWarning")


def net():
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4, bias=False), nn.Tanh(), nn.Linear(4, 3))


def dataset(n=20):
    return TensorDataset(torch.randn(n, 6), torch.randint(3, (n,)))


def per_example_gradients(model, loader, function):
    """Rows of the Jacobian of ``function(*minibatch)`` (n, C), one backward at a time: (C, n, P)."""
    rows = []
    for batch in loader:
        for f in function(*batch):
            grads = [torch.autograd.grad(v, list(model.parameters()), retain_graph=True) for v in f]
            rows.append(torch.stack([torch.cat([g.flatten() for g in gs]) for gs in grads]))
    return torch.stack(rows, 1)


def test_elastic_weight_consolidation_with_running_factors():
    model, fisher, decay = net(), None, 0.9
    for _ in range(3):  # three tasks
        loader = DataLoader(dataset(), batch_size=8)
        new = FIM(
            model=model, loader=loader, representation=PMatKFAC, n_output=3, variant="classif_logits", device=HERE
        )
        if fisher is None:
            fisher = new
        else:
            for layer_id in fisher.data.keys() & new.data.keys():
                a_old, g_old = fisher.data[layer_id]
                a_new, g_new = new.data[layer_id]
                fisher.data[layer_id] = (decay * a_old + (1 - decay) * a_new, decay * g_old + (1 - decay) * g_new)
        anchor = PVector.from_model(model).clone().detach()
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
        for x, y in loader:
            optimiser.zero_grad()
            penalty = fisher.vTMv(PVector.from_model(model) - anchor)
            (F.cross_entropy(model(x), y) + 10 * penalty).backward()
            optimiser.step()
    d = (PVector.from_model(model) - anchor).detach()
    a, g = fisher.data["4"]
    block = torch.cat([d.to_dict()["4"][0], d.to_dict()["4"][1].unsqueeze(1)], 1)
    torch.testing.assert_close((block * (g @ block @ a)).sum(), fisher.block("4").vTMv(_only(d, "4")))
    model.zero_grad()
    fisher.vTMv(PVector.from_model(model) - anchor).backward()
    torch.testing.assert_close(PVector.from_model_grad(model).get_flat_representation(), 2 * fisher.mv(d).to_torch())


def _only(v, layer_id):
    return PVector(v.layer_collection.select(layer_id), dict_repr={layer_id: v.to_dict()[layer_id]})


def test_federated_averaging_of_fisher_matrices():
    clients = [net() for _ in range(3)]
    weights = [0.5, 0.3, 0.2]
    loaders = [DataLoader(dataset(), batch_size=5, shuffle=True) for _ in clients]
    numerator, denominator = 0, 0
    for model, loader, p in zip(clients, loaders, weights, strict=True):
        diag = FIM(model=model, loader=loader, representation=PMatDiag, device=HERE, n_output=3).get_diag() * p
        numerator = numerator + diag * PVector.from_model(model).get_flat_representation().detach()
        denominator = denominator + diag
    server = net()
    lc = LayerCollection.from_model(server)
    average = PVector(lc, vector_repr=numerator / denominator)
    average.copy_to_model(server)
    torch.testing.assert_close(torch.nn.utils.parameters_to_vector(server.parameters()).detach(), average.to_torch())
    # The quadratic form of each client's factors at the server's parameters.
    factors = []
    for model, loader, p in zip(clients, loaders, weights, strict=True):
        fisher = FIM(model=model, loader=loader, representation=PMatKFAC, device=HERE, n_output=3)
        for layer_id in fisher.data.keys():  # noqa: SIM118
            fisher.data[layer_id] = list(fisher.data[layer_id])
            fisher.data[layer_id][0].mul_(p**0.5)
            fisher.data[layer_id][1].mul_(p**0.5)
        factors.append((fisher, FIM(model=model, loader=loader, representation=PMatKFAC, device=HERE), p))
    for fisher, unscaled, p in factors:
        torch.testing.assert_close(fisher.mv(average).to_torch(), p * unscaled.mv(average).to_torch())


def test_alignment_of_the_tangent_kernel():
    model, loader = net(), DataLoader(dataset(12), batch_size=5)

    def output_fn(x, t):
        return model(x)

    lc = LayerCollection.from_model(model)
    targets = F.one_hot(torch.cat([args[1] for args in iter(loader)]), 3).double()
    targets -= targets.mean(dim=0)
    targets = FVector(vector_repr=targets.t().contiguous())
    alignments = {}
    for layers in ([lc], [_single(*item) for item in lc.layers.items()]):
        for lc_this in layers:
            generator = Jacobian(
                layer_collection=lc_this, model=model, loader=loader, function=output_fn, n_output=3, centering=True
            )
            K_dense = FMatDense(generator)
            yTKy = K_dense.vTMv(targets)
            align = yTKy / (K_dense.frobenius_norm() * torch.norm(targets.get_flat_representation()) ** 2)
            alignments[len(lc_this), next(iter(lc_this.layers))] = align.item()
    J = per_example_gradients(model, loader, output_fn)
    J = J - J.mean(1, keepdim=True)
    K = torch.einsum("cnp,dmp->cndm", J, J)
    y = targets.to_torch()
    expected = torch.einsum("cn,cndm,dm->", y, K, y) / (K.norm() * y.norm() ** 2)
    assert alignments[3, "0"] == pytest.approx(float(expected), rel=1e-6)
    assert len(alignments) == 4
    assert K_dense.get_dense_tensor().view(36, 36).shape == (36, 36)
    trace = PMatImplicit(Jacobian(model, loader, output_fn, n_output=3)).trace().item()
    plain = per_example_gradients(model, loader, output_fn)
    assert trace * 12 == pytest.approx(float(plain.square().sum()), rel=1e-6)


def _single(name, layer):
    lc = LayerCollection()
    lc.add_layer(name, layer)
    return lc


def test_linearisation():
    model, loader = net(), DataLoader(dataset(), batch_size=10)
    before = PVector.from_model(model).clone().detach()
    logits_before = torch.cat([model(x) for x, _ in loader]).detach()
    generator = Jacobian(model=model, n_output=3)
    push = PushForwardImplicit(generator, examples=loader)
    dense = PushForwardDense(generator=generator, examples=loader)
    pull = PullBackDense(generator=generator, examples=loader)
    F.cross_entropy(model(loader.dataset.tensors[0]), loader.dataset.tensors[1]).backward()
    step = -1e-4 * PVector.from_model_grad(model)
    d_logits = push.mv((step).clone().detach())
    torch.testing.assert_close(dense.mv(step).get_flat_representation(), d_logits.get_flat_representation())
    (before + step).copy_to_model(model)
    logits_after = torch.cat([model(x) for x, _ in loader]).detach()
    linear = d_logits.get_flat_representation().t()
    assert (logits_after - logits_before - linear).norm() < 1e-3 * linear.norm()
    u = FVector(vector_repr=torch.randn(3, 20))
    torch.testing.assert_close(pull.mv(u).dot(step), (u.to_torch() * d_logits.to_torch()).sum())
    assert dense.get_dense_tensor().shape == (3, 20, 70)


def test_influence_functions():
    model, train, test = net(), DataLoader(dataset(), batch_size=8), dataset(2)
    fisher = FIM(model=model, loader=train, representation=PMatEKFAC, device=HERE, n_output=3)
    fisher.update_diag(train)
    regul = 1e-3
    inverse = fisher.inverse(regul=regul)
    influences = []
    for x, y in test:
        model.zero_grad()
        F.cross_entropy(model(x[None]), y[None]).backward()
        g_test = PVector.from_model_grad(model)
        ihvp = inverse.mv(g_test)
        row = []
        for x_train, y_train in train.dataset:
            model.zero_grad()
            F.cross_entropy(model(x_train[None]), y_train[None]).backward()
            row.append(-PVector.from_model_grad(model).dot(ihvp).item())
        influences.append(row)
    damped = fisher.get_dense_tensor() + regul * torch.eye(70)
    torch.testing.assert_close(ihvp.to_torch(), torch.linalg.solve(damped, g_test.to_torch()))
    assert torch.tensor(influences).shape == (2, 20)
    assert torch.tensor(influences).isfinite().all()


def test_natural_gradient_steps():
    model, data = net(), dataset(64)
    loader = DataLoader(data, batch_size=32, shuffle=True)
    losses, lr = [], 0.5
    for _ in range(5):
        for x, y in loader:
            model.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            batch = DataLoader(TensorDataset(x, y), batch_size=x.size(0), shuffle=False)
            fisher = FIM(model=model, loader=batch, representation=PMatKFAC, n_output=3, variant="classif_logits")
            gradient = PVector.from_model_grad(model)
            direction = fisher.solve(gradient, regul=1e-1, impl="default")
            assert gradient.dot(direction) > 0
            for layer_id, module in LayerCollection.from_model(model).get_layerid_module_maps(model)[0].items():
                for p, d in zip(module.parameters(), direction.to_dict()[layer_id], strict=True):
                    p.data.add_(d, alpha=-lr)
            losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_effective_dimension():
    x, n, gamma = torch.randn(30, 6), torch.tensor(60000.0), torch.tensor(1.0)
    loader = DataLoader(TensorDataset(x, torch.zeros(30)), batch_size=10)
    const = gamma * n / (2 * math.pi * torch.log(n))
    values = {}
    for representation in (PMatKFAC, PMatDense):
        fishers = []
        for seed in range(4):  # samples of the parameters
            torch.manual_seed(seed)
            model = net()
            d = LayerCollection.from_model(model).numel()
            fishers.append(FIM(model=model, loader=loader, representation=representation, n_output=3))
        mean_trace = sum(f.trace() for f in fishers) / len(fishers)
        logdets = [torch.slogdet(torch.eye(d) + const * d * f.get_dense_tensor() / mean_trace)[1] for f in fishers]
        values[representation] = (
            float(torch.logsumexp(torch.stack(logdets) / 2, 0) - math.log(4)) * 2 / torch.log(const)
        )
    assert all(0 < v < d for v in values.values())
    assert float(mean_trace) == pytest.approx(
        sum(float(torch.trace(f.to_torch())) for f in fishers) / len(fishers), rel=1e-9
    )


def test_pruning():
    model, loader = net(), DataLoader(dataset(), batch_size=10)
    diag = FIM(model=model, loader=loader, representation=PMatDiag, n_output=3, device=HERE).get_diag()
    start, scores = 0, []
    for p in model.parameters():  # in the order of parameters()
        scores.append(diag[start : start + p.numel()].view_as(p) * p.detach() ** 2)
        start += p.numel()
    assert start == diag.numel()
    threshold = torch.quantile(torch.cat([s.flatten() for s in scores]), 0.5)
    for p, s in zip(model.parameters(), scores, strict=True):
        p.data.mul_(s > threshold)
    alive = sum(int(p.count_nonzero()) for p in model.parameters())
    assert 0.4 < alive / diag.numel() <= 0.5


def test_embedding_of_a_task():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)).eval()
    loader = DataLoader(TensorDataset(torch.randn(16, 2, 4, 4)), batch_size=8)
    lc = LayerCollection()
    for _, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
            lc.add_layer_from_model(model, module)
    diag = FIM_MonteCarlo(
        model=model,
        loader=loader,
        representation=PMatDiag,
        variant="classif_logits",
        trials=400,
        device=HERE,
        function=lambda *d: model(d[0]),
        layer_collection=lc,
    ).get_diag()
    _, module_to_layerid = lc.get_layerid_module_maps(model)
    embedding = {}
    for module, layer_id in module_to_layerid.items():
        start = lc.p_pos[layer_id]
        values = diag[start : start + lc.layers[layer_id].numel()]
        weight = values[: lc.layers[layer_id].weight.numel()].view_as(module.weight)
        embedding[layer_id] = weight.flatten(1).mean(1) if weight.ndim > 1 else weight
    assert {k: v.shape for k, v in embedding.items()} == {"0": (3,), "1": (3,)}
    exact = FIM(model=model, loader=loader, representation=PMatDiag, layer_collection=lc).get_diag()
    assert (diag - exact).norm() < 0.1 * exact.norm()
