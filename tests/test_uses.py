"""What people do with a curvature: consolidation, merging, pruning, selection, effective dimension."""

from functools import partial
from itertools import combinations

import oracle
import pytest
import torch
from torch import nn

from nngeometry import (
    FIM,
    Accumulator,
    Categorical,
    EmpiricalFisher,
    FIM_MonteCarlo,
    GramMatrix,
    Hessian,
    LayerCollection,
    PMatBlockDiag,
    PMatDense,
    PMatDiag,
    PMatEKFAC,
    PMatImplicit,
    PMatKFAC,
    PMatLowRank,
    PMatQuasiDiag,
    Posterior,
    PVector,
    Relative,
)
from nngeometry.continual import EWC
from nngeometry.merging import merge
from nngeometry.pruning import keep, prune, saliency
from nngeometry.selection import bait, fisher_embeddings, greedy
from nngeometry.spectrum import effective_dimension

ALL = [PMatDense, PMatLowRank, PMatBlockDiag, PMatKFAC, PMatEKFAC, PMatDiag]


def net(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    return oracle.randomise(model, seed)


def task(seed, n=12):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=generator), torch.randint(3, (n,), generator=generator)


def shift(model, by=0.1):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(by * torch.randn_like(p))


# Continual learning


@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize("decay", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("representation", [PMatDense, PMatBlockDiag, PMatDiag, PMatQuasiDiag, PMatLowRank])
def test_the_penalty_is_the_sum_over_tasks(representation, decay, online):
    model = net()
    ewc = EWC(model, representation, strength=3.0, decay=decay, online=online)
    assert float(ewc.penalty()) == 0
    entries, anchors = [], []
    for k in range(3):
        shift(model)
        x, y = task(k, (12, 30, 7)[k])
        ewc.consolidate([(x[:5], y[:5]), (x[5:], y[5:])])
        entries.append(FIM(model, (x,), representation).to_torch())
        anchors.append(PVector.from_model(model).clone().detach().to_torch())
    shift(model)
    w = PVector.from_model(model).to_torch()
    expected = 0.0
    for k in range(3):
        d = (w - anchors[-1 if online else k]).detach()
        expected = expected + 1.5 * decay ** (2 - k) * d @ entries[k] @ d
    penalty = ewc.penalty()
    assert abs(float(penalty.detach() - expected)) < 1e-12 * float(expected)
    penalty.backward()
    gradient = PVector.from_model_grad(model).to_torch()
    truth = sum(3.0 * decay ** (2 - k) * entries[k] @ (w - anchors[-1 if online else k]).detach() for k in range(3))
    assert oracle.relative(gradient, truth) < 1e-12
    assert ewc.tasks == 3


@pytest.mark.parametrize("matrix", [FIM, partial(EmpiricalFisher, loss=nn.CrossEntropyLoss())])
@pytest.mark.parametrize("representation", ALL)
def test_the_penalty_does_not_depend_on_the_size_of_minibatches(representation, matrix):
    model = net()
    x, y = task(0)
    found = []
    for size in (1, 5, 12):
        ewc = EWC(model, representation, matrix, strength=1.0)
        ewc.consolidate(list(zip(x.split(size), y.split(size), strict=True)))
        found.append(ewc)
    torch.manual_seed(1)
    shift(model)
    values = [float(ewc.penalty().detach()) for ewc in found]
    assert max(values) - min(values) < 1e-12 * values[0]


@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize("matrix", [FIM, FIM_MonteCarlo])
def test_tasks_are_kept_in_files(tmp_path, online, matrix):
    model = net()
    options = {"strength": 2.0, "decay": 0.7, "online": online}
    if matrix is FIM_MonteCarlo:
        options["generator"] = torch.Generator().manual_seed(0)
    ewc = EWC(model, PMatKFAC, matrix, **options)
    for k in range(2):
        ewc.consolidate(task(k))
        shift(model)
    torch.save(ewc.state_dict(), tmp_path / "ewc.pt")
    other = EWC(model, PMatKFAC, matrix, **options)
    other.load_state_dict(torch.load(tmp_path / "ewc.pt", weights_only=True))
    assert torch.equal(other.penalty(), ewc.penalty())
    if matrix is FIM:
        for one in (ewc, other):
            one.consolidate(task(2))
        shift(model)
        assert torch.equal(other.penalty(), ewc.penalty())
    assert other.tasks == ewc.tasks


def test_tasks_with_other_heads_are_named():
    model = net()
    trunk = EWC(model, strength=1.0, layer_collection=LayerCollection.from_model(model, "0"))
    whole = EWC(model, strength=1.0)
    for ewc in (trunk, whole):
        ewc.consolidate(task(0))
    state = whole.state_dict()
    model[2] = nn.Linear(5, 7)
    assert float(trunk.penalty().detach()) == 0
    trunk.consolidate(task(1))
    with pytest.raises(ValueError, match=r"penalty: the model does not have .*\(heads\)"):
        whole.penalty()
    with pytest.raises(ValueError, match=r"heads"):
        EWC(model, strength=1.0).load_state_dict(state)
    with pytest.raises(ValueError, match="online=False"):
        EWC(model, strength=1.0, online=True).load_state_dict(state)
    for wrong in ({"strength": -1.0}, {"strength": 1.0, "decay": 1.5}):
        with pytest.raises(ValueError, match=r"strength|decay"):
            EWC(model, **wrong)
    with pytest.raises(TypeError, match="unknown option"):
        EWC(model, strength=1.0, sharring="expand").consolidate(task(0))


@pytest.mark.parametrize("representation", [PMatDiag, PMatKFAC, PMatEKFAC])
@pytest.mark.parametrize("online", [False, True])
def test_a_task_that_fails_is_none(representation, online):
    model = net()
    ewc, other = (EWC(model, representation, strength=1.0, decay=0.5, online=online) for _ in range(2))
    for one in (ewc, other):
        one.consolidate(task(0))
    for wrong in ([], [task(1), (torch.full((3, 4), float("nan")),)], [task(1), (torch.zeros(3, 5),)]):
        with pytest.raises((ValueError, RuntimeError), match=r"no minibatch|NaN|fails for the minibatch"):
            ewc.consolidate(wrong)
    shift(model)
    for one in (ewc, other):
        one.consolidate(task(1))
    shift(model)
    assert ewc.tasks == 2
    assert torch.equal(ewc.penalty(), other.penalty())
    state = ewc.state_dict()
    for wrong in ({}, {**state, "more": 1}, {k: v for k, v in state.items() if k != "online"}):
        with pytest.raises(ValueError, match="load_state_dict: expected what"):
            other.load_state_dict(wrong)


# Merging


@pytest.mark.parametrize("counts", [(20, 20), (20, 35, 15)])
@pytest.mark.parametrize("representation", [PMatDense, PMatLowRank, PMatBlockDiag, PMatKFAC])
def test_linear_regressions_merge_to_the_pooled_fit(representation, counts):
    torch.manual_seed(0)
    truth, experts, data = torch.randn(5, 2), [], []
    for n in counts:
        x = torch.randn(n, 4)
        y = torch.cat([x, torch.ones(n, 1)], 1) @ truth + 0.3 * torch.randn(n, 2)
        data.append((x, y))
        experts.append((fitted([(x, y)]), n * FIM(fitted([(x, y)]), (x,), representation, "regression")))
    found = merge(experts, regul=0.0)
    assert oracle.relative(found.to_torch(), PVector.from_model(fitted(data)).to_torch()) < 1e-10


def fitted(data):
    x, y = (torch.cat([d[k] for d in data]) for k in range(2))
    solution = torch.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1)], 1), y).solution
    model = nn.Linear(4, 2)
    with torch.no_grad():
        model.weight.copy_(solution[:4].T)
        model.bias.copy_(solution[4])
    return model


@pytest.mark.parametrize("representation", [*ALL, PMatImplicit])
def test_the_merged_weights_solve_the_sum(representation):
    models = [net(k) for k in range(3)]
    experts = [(m, FIM(m, task(k), representation)) for k, m in enumerate(models)]
    entries = [F.to_torch() for _, F in experts]
    weights = [PVector.from_model(m).to_torch().detach() for m in models]
    p = len(weights[0])
    A = sum(entries) + 0.1 * torch.eye(p)
    b = sum(F @ w for F, w in zip(entries, weights, strict=True)) + 0.1 * sum(weights) / 3
    found = merge(experts, regul=0.1)
    assert oracle.relative(found.to_torch(), torch.linalg.solve(A, b)) < (
        1e-6 if representation is PMatImplicit else 1e-9
    )


@pytest.mark.parametrize("representation", [*ALL, PMatImplicit, PMatQuasiDiag])
def test_what_no_expert_has_curvature_of_is_the_mean(representation):
    """A common input is always zero, and so is the curvature of what it is multiplied with."""
    models, inputs = [net(k) for k in range(3)], [task(k)[0] for k in range(3)]
    for x in inputs:
        x[:, 1] = 0
    experts = [(m, FIM(m, (x,), representation, "regression")) for m, x in zip(models, inputs, strict=True)]
    mean = torch.stack([m[0].weight.detach()[:, 1] for m in models]).mean(0)
    found = merge(experts, regul=1e-6).to_dict()["0"][0]
    assert float((found[:, 1] - mean).abs().max()) < 1e-8
    with pytest.raises(ValueError, match=r"^regul: with 0 the sum .* no single point .* give a larger regul"):
        merge(experts, regul=0.0)
    for model in models:
        model.float()
    if representation is PMatImplicit:
        single = [FIM(m, (x.float(),), PMatImplicit, "regression") for m, x in zip(models, inputs, strict=True)]
    else:
        single = [F.to(dtype=torch.float32) for _, F in experts]
    if representation not in (PMatDiag, PMatQuasiDiag):  # of which all is known of these directions: zeros
        with pytest.raises(ValueError, match=r"^regul: with 1e-08 the sum .* give a larger regul"):
            merge(list(zip(models, single, strict=True)))


@pytest.mark.parametrize("representation", [PMatDense, PMatBlockDiag, PMatDiag, PMatImplicit])
def test_losses_with_a_saddle_have_no_least_sum(representation):
    models = [net(k) for k in range(2)]
    experts = [(m, Hessian(m, task(k), representation)) for k, m in enumerate(models)]
    A = sum(H.to_torch() for _, H in experts)
    least = float(torch.linalg.eigvalsh(A).min())
    assert least < -1e-3
    with pytest.raises(ValueError, match=r"^regul: with .* not positive definite"):
        merge(experts, regul=-least / 2)
    b = sum(H.mv(PVector.from_model(m)).to_torch() for m, H in experts).detach()
    b = b - least * sum(PVector.from_model(m).to_torch().detach() for m in models)
    found = merge(experts, regul=-2 * least).to_torch()
    assert oracle.relative(found, torch.linalg.solve(A - 2 * least * torch.eye(len(A)), b)) < 1e-8


def test_experts_that_do_not_fit_are_named():
    one, two = net(), nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    F, G = FIM(one, task(0), PMatKFAC), FIM(two, task(0), PMatKFAC)
    with pytest.raises(ValueError, match="number 1 has other layers"):
        merge([(one, F), (two, G)])
    with pytest.raises(ValueError, match="number 1 does not have the layers"):
        merge([(one, F), (two, F)])
    with pytest.raises(TypeError, match=r"pairs \(model, F\)"):
        merge([one, two])
    with pytest.raises(TypeError, match=r"pairs \(model, F\)"):
        merge([])
    shared = [
        (m, FIM(m, task(0), PMatDiag, layer_collection=LayerCollection.from_model(m, "2"))) for m in (one, net(1))
    ]
    assert merge(shared, 1e-3).size(0) == 18


# Pruning


@pytest.mark.parametrize("representation", ALL)
def test_saliency_is_the_rise_of_the_quadratic(representation):
    """Deletion and refit, one weight at a time."""
    model = net()
    F, w = FIM(model, task(0), representation), PVector.from_model(model).detach()
    flat = w.to_torch()
    H = F.to_torch() + 0.1 * torch.eye(len(flat))
    obs, obd = saliency(F, w, 0.1).to_torch(), saliency(F, w, method="obd").to_torch()
    assert torch.allclose(obd, F.get_diag() * flat.square() / 2)
    for q in range(0, len(flat), 5):
        rest = [i for i in range(len(flat)) if i != q]
        step = torch.linalg.solve(H[rest][:, rest], H[rest, q] * flat[q])  # of the others, w_q being removed
        d = torch.zeros_like(flat)
        d[q], d[rest] = -flat[q], step
        assert abs(float(d @ H @ d / 2 - obs[q])) < 1e-10 * float(obs.max())
        mask = torch.ones_like(flat)
        mask[q] = 0
        pruned = prune(F, w, PVector(w.layer_collection, mask), 0.1).to_torch()
        assert oracle.relative(pruned, flat + d) < 1e-8


@pytest.mark.parametrize("representation", [*ALL, PMatImplicit])
def test_pruning_many_is_the_constrained_minimum(representation):
    model = net()
    F, w = FIM(model, task(0), representation), PVector.from_model(model)
    mask = keep(w.detach() ** 2, 0.6)
    kept = mask.to_torch() == 1
    flat = w.to_torch().detach()
    H = F.to_torch() + 0.1 * torch.eye(len(flat))
    expected = torch.zeros_like(flat)
    expected[kept] = flat[kept] + torch.linalg.solve(H[kept][:, kept], H[kept][:, ~kept] @ flat[~kept])
    found = prune(F, w, mask, 0.1)
    assert int(kept.sum()) == round(0.6 * len(flat))
    assert oracle.relative(found.to_torch(), expected) < 1e-8
    for fraction, count in ((0.0, 0), (1.0, len(flat))):
        assert int(keep(w, fraction).to_torch().sum()) == count
    assert torch.equal(prune(F, w, keep(w, 1.0), 0.1).to_torch(), flat)


@pytest.mark.parametrize("representation", [*ALL, PMatQuasiDiag])
@pytest.mark.parametrize("regul", [0.1, Relative(1.0), {"0": 0.1, "2": 0.2}], ids=["number", "relative", "layers"])
def test_one_weight_after_another(representation, regul):
    """Each time the one of least saliency, those before staying removed: the rises add up, and the end is that of
    removing all at once.
    """
    model = net()
    F, w = FIM(model, task(0), representation), PVector.from_model(model).detach()
    lc, flat = w.layer_collection, w.to_torch()
    mean = float(F.trace()) / len(flat)
    d = {"0": 0.1, "2": 0.2} if isinstance(regul, dict) else dict.fromkeys(lc, 0.1 if regul == 0.1 else mean)
    H = F.to_torch() + torch.diag(torch.cat([torch.full((lc[n].numel(),), d[n]) for n in lc]))
    kept, now, rise = torch.ones(len(flat)), w, 0.0

    def rises(kept):
        """Deletion and refit of the quadratic around w."""
        inside = kept == 1
        delta = -flat.clone()
        delta[inside] = torch.linalg.solve(H[inside][:, inside], H[inside][:, ~inside] @ flat[~inside])
        return float(delta @ H @ delta / 2), flat + delta

    for _ in range(6):
        scores = saliency(F, now, regul, mask=PVector(lc, kept)).to_torch()
        assert torch.equal(scores == 0, kept == 0)
        trial = {q: rises(torch.where(torch.arange(len(flat)) == q, 0.0, kept))[0] for q in kept.nonzero()[::6, 0]}
        for q, value in trial.items():
            assert abs(rise + float(scores[q]) - value) < 1e-8 * value
        q = int(torch.where(kept == 1, scores, torch.inf).argmin())
        rise, kept[q] = rise + float(scores[q]), 0.0
        now = prune(F, now, PVector(lc, kept), regul)
    value, pruned = rises(kept)
    assert abs(rise - value) < 1e-8 * value
    assert oracle.relative(now.to_torch(), pruned) < 1e-8
    assert oracle.relative(prune(F, w, PVector(lc, kept), regul).to_torch(), pruned) < 1e-8


@pytest.mark.parametrize("representation", [PMatDense, PMatKFAC, PMatLowRank, PMatImplicit])
def test_of_many_minima_the_nearest(representation):
    model = net()
    F, w = FIM(model, task(0), representation), PVector.from_model(model).detach()
    flat, H, mask = w.to_torch(), F.to_torch(), keep(w**2, 0.6)
    kept = mask.to_torch() == 1
    inner = H[kept][:, kept]
    assert int(torch.linalg.matrix_rank(inner, rtol=1e-10, hermitian=True)) < len(inner)
    expected = torch.zeros_like(flat)
    step = torch.linalg.pinv(inner, rtol=1e-10, hermitian=True) @ (H[kept][:, ~kept] @ flat[~kept])
    expected[kept] = flat[kept] + step
    assert oracle.relative(prune(F, w, mask, 0.0).to_torch(), expected) < 1e-6
    if representation is not PMatImplicit:
        with pytest.raises(ValueError, match=r"saliency: with regul=0.0 .*no single minimum.*singular"):
            saliency(F, w, 0.0)
        removed = PVector(w.layer_collection, (torch.arange(len(flat)) > 1).to(flat))
        with pytest.raises(ValueError, match=r"saliency: with regul=0.0 .*no single minimum.*singular"):
            saliency(F, w, 0.0, mask=removed)


@pytest.mark.parametrize("representation", [PMatDense, PMatBlockDiag, PMatDiag, PMatLowRank])
def test_a_saddle_has_no_saliency(representation):
    model = net()
    H, w = Hessian(model, task(0), representation), PVector.from_model(model).detach()
    least = float(H.eigenvalues().min())
    assert least < -1e-3
    for mask in (None, keep(w**2, 0.9)):
        with pytest.raises(ValueError, match=r"^saliency: with regul=.* no single minimum"):
            saliency(H, w, -least / 20, mask=mask)
        assert bool((saliency(H, w, -2 * least, mask=mask).to_torch() >= 0).all())
    if representation is not PMatDiag:  # of which nothing moves
        with pytest.raises(ValueError, match=r"^prune: with regul=.* no single minimum"):
            prune(H, w, keep(w**2, 0.9), -least / 20)
    assert torch.equal(saliency(H, w, method="obd").to_torch(), H.get_diag() * w.to_torch() ** 2 / 2)


def test_weights_that_are_zero_or_shared_or_frozen():
    torch.manual_seed(0)
    one = nn.Linear(4, 4)
    model = oracle.randomise(nn.Sequential(one, nn.Tanh(), one, nn.Tanh(), nn.Linear(4, 3)))
    model[4].bias.requires_grad_(False)
    with torch.no_grad():
        one.weight[0] = 0
    F, w = FIM(model, task(0), PMatDense), PVector.from_model(model).detach()
    assert F.size(0) == 20 + 12
    flat, H = w.to_torch(), F.to_torch() + 0.1 * torch.eye(32)
    scores = saliency(F, w, 0.1)
    assert torch.allclose(scores.to_torch(), flat**2 / (2 * torch.linalg.inv(H).diagonal()))
    assert int((keep(scores, 28 / 32).to_torch() == 0)[:4].sum()) == 4
    before = model[4].bias.clone()
    mask = keep(scores, 0.5)
    prune(F, w, mask, 0.1).copy_to_model(model)
    assert torch.equal(model[4].bias, before)
    assert model[2].weight is model[0].weight
    assert int((PVector.from_model(model).to_torch() == 0).sum()) == 16
    part = FIM(model, task(0), PMatKFAC, layer_collection=LayerCollection.from_model(model, "4"))
    assert saliency(part, PVector.from_model(model), 0.1).size(0) == 12


def test_what_pruning_does_not_take():
    model = net()
    F, w = FIM(model, task(0), PMatDiag), PVector.from_model(model)
    with pytest.raises(ValueError, match="zeros and ones"):
        prune(F, w, w.detach(), 0.1)
    with pytest.raises(ValueError, match="between 0 and 1"):
        keep(w, 1.2)
    with pytest.raises(ValueError, match="not one of 'obs', 'obd'"):
        saliency(F, w, method="magnitude")
    with pytest.raises(TypeError, match="w: expected a PVector"):
        saliency(F, model)
    for ask in (lambda w: saliency(F, w), lambda w: prune(F, w, keep(F.solve(w) ** 2, 1.0))):
        with pytest.raises(ValueError, match=r"w: the weights are not finite|scores: some are NaN"):
            ask(w.detach() * float("nan"))
    with pytest.raises(NotImplementedError, match=r'saliency: method="obs" .*"obd" or another'):
        saliency(FIM(model, task(0), PMatImplicit), w)


# Selection


@pytest.mark.parametrize("likelihood", ["classif_logits", "regression", "classif_binary_logits", Categorical(dim=-1)])
def test_embeddings_are_roots_of_the_fisher_matrices(likelihood):
    model = net()
    x, _ = task(0)
    V = fisher_embeddings(model, [(x[:5],), (x[5:],)], likelihood)
    assert (
        oracle.relative(torch.einsum("nrp,nrq->pq", V, V) / 12, FIM(model, (x,), PMatDense, likelihood).to_torch())
        < 1e-12
    )
    batch = {"x": x}
    function = partial(lambda b, of: of(b["x"]), of=model)
    assert torch.allclose(fisher_embeddings(model, batch, likelihood, function=function), V)


@pytest.mark.parametrize("seed", range(3))
def test_the_first_choices_of_bait_are_those_of_brute_force(seed):
    torch.manual_seed(seed)
    V = torch.randn(50, 2, 6) * torch.rand(50, 1, 1)
    F = torch.einsum("nrp,nrq->pq", V, V) / 50

    def risk(index):
        M = torch.einsum("nrp,nrq->pq", V[index], V[index]) + 0.5 * torch.eye(6)
        return float(torch.linalg.solve(M, F).trace())

    first, second = bait(V, 2, regul=0.5, oversample=1.0).tolist()
    assert first == min(range(50), key=lambda i: risk([i]))
    assert second == min((i for i in range(50) if i != first), key=lambda i: risk([first, i]))
    third = bait(V, 1, regul=0.5, oversample=1.0, labelled=torch.tensor([first, second])).tolist()
    assert third == [min((i for i in range(50) if i not in (first, second)), key=lambda i: risk([first, second, i]))]
    pair = bait(V, 2, regul=0.5, oversample=3.0).tolist()
    best = min(risk(list(s)) for s in combinations(range(50), 2))
    assert best <= risk(pair) * (1 + 1e-12) < best * 1.1
    forward = bait(V, 4, regul=0.5, oversample=1.0).tolist()
    left = min(combinations(forward, 3), key=lambda s: risk(list(s)))
    assert set(bait(V, 3, regul=0.5, oversample=4 / 3).tolist()) == set(left)


@pytest.mark.parametrize("likelihood", ["classif_logits", "regression"])
@pytest.mark.parametrize("regul", [1e-6, 1.0])
@pytest.mark.parametrize(("k", "oversample", "labelled"), [(6, 2.0, [3, 7, 7]), (20, 2.0, []), (50, 2.0, [])])
def test_bait_is_its_algorithm_done_by_hand(likelihood, regul, k, oversample, labelled):
    """Among the examples one is there twice. In single precision the choice is the same."""
    model = oracle.randomise(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), 1)
    x, _ = task(0, 50)
    x[20] = x[10]
    V = fisher_embeddings(model, (x,), likelihood, layer_collection=LayerCollection.from_model(model, "2"))
    V = V.float().double()
    each = torch.einsum("nrp,nrq->npq", V, V)

    def risks(M, sign, among):
        return torch.stack([torch.linalg.solve(M + sign * each[i], each.mean(0)).trace() for i in among])

    M = regul * torch.eye(V.shape[2]) + each[list(set(labelled))].sum(0)
    free, chosen = [i for i in range(50) if i not in labelled], []
    for _ in range(min(len(free), round(oversample * k))):
        chosen.append(free.pop(int(risks(M, 1, free).argmin())))
        M = M + each[chosen[-1]]
    while len(chosen) > k:
        M = M - each[chosen.pop(int(risks(M, -1, chosen).argmin()))]
    options = {"labelled": torch.tensor(labelled) if labelled else None, "regul": regul, "oversample": oversample}
    found = bait(V, k, **options).tolist()
    assert len(set(found)) == k
    M = [regul * torch.eye(V.shape[2]) + each[[*s, *set(labelled)]].sum(0) for s in (found, chosen)]
    a, b = (float(torch.linalg.solve(m, each.mean(0)).trace()) for m in M)
    assert abs(a - b) < 1e-6 * b  # of two that are alike either may stay
    assert bait(V.float(), k, **options).tolist() == found


@pytest.mark.parametrize("output", ["full", "trace"])
def test_greedy_choices_are_those_of_the_determinant(output):
    model = net()
    x, _ = task(0, 20)
    K = GramMatrix(model, (x,), output=output)
    entries = K.to_torch()
    entries = entries if entries.ndim == 4 else entries[None, :, None, :]

    def gain(index):
        M = entries[:, index][:, :, :, index].permute(1, 0, 3, 2).flatten(2).flatten(0, 1)
        return float(torch.linalg.slogdet(torch.eye(len(M)) + M / 0.3)[1])

    chosen = greedy(K, 3, regul=0.3).tolist()
    for k in range(3):
        others = [i for i in range(20) if i not in chosen[:k]]
        assert chosen[k] == max(others, key=lambda i: gain([*chosen[:k], i]))
    assert greedy(K, 1, regul=0.3, labelled=torch.tensor(chosen[:2])).tolist() == chosen[2:]


def test_what_selection_does_not_take():
    V = torch.randn(5, 2, 3)
    with pytest.raises(ValueError, match="there are 4 examples without a label"):
        bait(V, 5, labelled=torch.tensor([0]))
    with pytest.raises(ValueError, match="there are 5 examples without a label"):
        greedy(torch.eye(5), 6)
    with pytest.raises(ValueError, match=r"expected \(n, r, P\)"):
        bait(V[0], 1)
    with pytest.raises(ValueError, match="expected \\(n, n\\)"):
        greedy(torch.randn(2, 5, 5), 1)
    with pytest.raises(ValueError, match=r"^regul=1e-30: .* give at least"):
        bait(V, 1, regul=1e-30)
    with pytest.raises(TypeError, match="embeddings: expected real numbers"):
        bait(V.long(), 1)
    with pytest.raises(ValueError, match="K: it differs from its transpose"):
        greedy(torch.randn(5, 5), 1)
    with pytest.raises(ValueError, match="K: there are NaN"):
        greedy(torch.full((5, 5), float("nan")), 1)
    with pytest.raises(ValueError, match="loader: there was no minibatch"):
        fisher_embeddings(net(), [])
    twice = torch.tensor([1, 1])
    assert len(bait(V, 0)) == len(greedy(torch.eye(5), 0)) == 0
    assert len(greedy(torch.eye(5), 4, labelled=twice)) == len(bait(V, 4, labelled=twice)) == 4


# Of a posterior


@pytest.mark.parametrize("representation", ALL)
def test_effective_dimension(representation):
    F = FIM(net(), task(0), representation)
    M = F.to_torch()
    expected = torch.linalg.solve(M + 0.1 * torch.eye(len(M)), M).trace()
    assert abs(float(effective_dimension(F, 0.1) - expected)) < 1e-10 * float(expected)
    with pytest.raises(ValueError, match="above 0"):
        effective_dimension(F, 0.0)
    with pytest.raises(NotImplementedError, match="spectral_density"):
        effective_dimension(FIM(net(), task(0), PMatImplicit), 0.1)


@pytest.mark.parametrize("representation", ALL)
def test_effective_dimension_of_singular_matrices(representation):
    """Five examples of three classes determine ten directions at most, however small regul is."""
    model = net()
    F = FIM(model, task(0, 5), representation)
    l = torch.linalg.eigvalsh(F.to_torch())
    l = torch.where(l > 1e-12, l, 0.0)
    for regul in (1e-3, 1e-8, 1e-12):
        assert abs(float(effective_dimension(F, regul) - (l / (l + regul)).sum())) < 1e-3
    single = F.to(dtype=torch.float32)
    assert abs(float(effective_dimension(single, 1e-3) - effective_dimension(F, 1e-3))) < 1e-3
    with pytest.raises(ValueError, match=r"effective_dimension: regul=1e-09 is lost in rounding .* float64"):
        effective_dimension(single, 1e-9)
    assert float(effective_dimension(0 * F, 1e-3)) == 0


@pytest.mark.parametrize("representation", [PMatDense, PMatBlockDiag, PMatLowRank, PMatDiag])
def test_effective_dimension_of_hessians(representation):
    H = Hessian(net(), task(0), representation)
    M, least = H.to_torch(), float(H.eigenvalues().min())
    expected = torch.linalg.solve(M - 2 * least * torch.eye(len(M)), M).trace()
    assert abs(float(effective_dimension(H, -2 * least) - expected)) < 1e-10 * abs(float(expected))
    for regul in (-least, -least / 2, 1e-9):
        with pytest.raises(ValueError, match=r"effective_dimension: the matrix has the eigenvalue -.* use GGN or FIM"):
            effective_dimension(H, regul)


@pytest.mark.parametrize("likelihood", ["classif_logits", "regression"])
def test_information_is_what_an_observation_adds_to_the_precision(likelihood):
    model = net()
    x, _ = task(0)
    posterior = Posterior(model, Accumulator(FIM, model, PMatDense, variant=likelihood).update((x,)), likelihood)
    new, _ = task(1, 4)
    for k in range(4):
        after = posterior.update((new[k : k + 1],)).precision.logdet() - posterior.precision.logdet()
        assert abs(float(posterior.information(new[k : k + 1])[0] - after / 2)) < 1e-10
    assert torch.allclose(posterior.information(new)[:1], posterior.information(new[:1]))
