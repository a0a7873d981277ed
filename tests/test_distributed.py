"""Several processes have the matrix, the kernel and the scores that one has."""

from functools import partial

import pytest
import ranks
import torch
import torch.distributed as dist
from ranks import convnet, relative, transformer, wide
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

from nngeometry import (
    FIM,
    GGN,
    Accumulator,
    EmpiricalFisher,
    FIM_MonteCarlo,
    FiniteDifference,
    FMatImplicit,
    FMatMemmap,
    GradientCovariance,
    GramMatrix,
    Hessian,
    Influence,
    Jacobian,
    LayerCollection,
    PMatBlockDiag,
    PMatDense,
    PMatDiag,
    PMatEKFAC,
    PMatEye,
    PMatImplicit,
    PMatKFAC,
    PMatLowRank,
    PMatMixed,
    PMatQuasiDiag,
    PVector,
    linalg,
)
from nngeometry.distributed import decompose, shard
from nngeometry.optim import SecondOrderOptimizer, Stale, VIOptimizer
from nngeometry.spectrum import extreme_eigenpairs, spectral_density
from nngeometry.team import Team

TOLERANCE = 1e-12
EXACT = [PMatDense, PMatBlockDiag, PMatDiag, PMatQuasiDiag, PMatKFAC, PMatLowRank, PMatEye, PMatEKFAC]
MATRICES = [FIM, FIM_MonteCarlo, EmpiricalFisher, GradientCovariance, GGN]
PAIRS = [(M, R) for M in MATRICES for R in [*EXACT, PMatImplicit] if (GradientCovariance, PMatKFAC) != (M, R)]
PAIRS += [(Hessian, R) for R in (PMatBlockDiag, PMatDiag, PMatImplicit)]
PAIRS += [(GGN, PMatMixed.of(PMatDiag, {"head": PMatEKFAC}))]
#: Of models whose layers are looked at for themselves.
FEW = [(FIM_MonteCarlo, R) for R in EXACT] + [(GGN, R) for R in (PMatImplicit, PMatKFAC, PMatEKFAC, PMatBlockDiag)]


def options(matrix, seed=5):
    return {"generator": torch.Generator().manual_seed(seed)} if matrix is FIM_MonteCarlo else {}


def seen(F):
    """What is compared of a matrix."""
    if not isinstance(F, PMatImplicit):
        return F.to_torch()
    return F.matvec(torch.randn(2, F.size(0), generator=torch.Generator().manual_seed(3)))


def same_on_all(group, t):
    first = t.clone()
    dist.broadcast(first, 0, group=group)
    return torch.equal(first, t)


def of_one(group, make):
    """What rank 0 makes by itself, on all."""
    box = [make() if dist.get_rank(group) == 0 else None]
    dist.broadcast_object_list(box, 0, group=group)
    return box[0]


def raises(kind, words, call):
    with pytest.raises(kind, match=words):
        call()


# Matrices


def all_matrices(group, make):
    model, data = make()
    rank = dist.get_rank(group)

    def looked_at(F, matrix):
        more = isinstance(F, PMatImplicit) and matrix is not Hessian
        return type(F), [seen(F), F.trace(), F.get_diag()] if more else [seen(F)]

    def alone(matrix, representation):
        return looked_at(matrix(model, data, representation, **options(matrix)), matrix)

    for matrix, representation in PAIRS if make is convnet else FEW:
        what = f"{matrix.__name__} {representation}"
        kind, expected = of_one(group, partial(alone, matrix, representation))
        mine = options(matrix, 5 if rank == 0 else 99)  # the draws are those of rank 0
        F = matrix(model, shard(data, group), representation, process_group=group, **mine)
        of, found = looked_at(F, matrix)
        assert of is kind, what
        for a, b in zip(found, expected, strict=True):
            assert relative(a, b) < TOLERANCE, what
        assert same_on_all(group, found[0]), what


def loaders(group):
    """Whatever a loader may be, and that one process would be given instead."""
    model, data = transformer()
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    whole, short = TensorDataset(x, y), data[:1]
    expected = FIM(model, data, PMatKFAC)

    def near(loader, other=expected):
        F = FIM(model, loader, PMatKFAC, process_group=group)
        assert relative(F.to_torch(), other.to_torch()) < TOLERANCE

    near(shard(DataLoader(whole, batch_size=4), group))
    torch.manual_seed(rank)  # every rank would shuffle otherwise
    near(shard(DataLoader(whole, batch_size=4, shuffle=True), group))
    near(shard(DataLoader(whole, batch_sampler=[[0, 1], list(range(2, 31))]), group))
    near(data[rank::size])
    near(DataLoader(whole, batch_size=4, sampler=DistributedSampler(whole, size, rank, shuffle=True, seed=3)))
    near(DataLoader(whole, batch_size=4, sampler=DistributedSampler(whole, size, rank)))
    near(shard(short, group), FIM(model, short, PMatKFAC))  # ranks without data
    near(shard(data[0], group), FIM(model, data[0], PMatKFAC))
    near(data[:1] if rank == 1 else [], FIM(model, short, PMatKFAC))
    for matrix, representation in ((Hessian, PMatDiag), (GGN, PMatImplicit), (FIM_MonteCarlo, PMatEKFAC)):
        one = matrix(model, shard(short, group), representation, process_group=group, **options(matrix))
        assert relative(seen(one), seen(matrix(model, short, representation, **options(matrix)))) < TOLERANCE
    draws = DataLoader(whole, batch_size=4)
    one = FIM_MonteCarlo(model, shard(draws, group), PMatDiag, process_group=group, **options(FIM_MonteCarlo))
    assert relative(seen(one), seen(FIM_MonteCarlo(model, draws, PMatDiag, **options(FIM_MonteCarlo)))) < TOLERANCE
    for matrix, representation in ((FIM_MonteCarlo, PMatDiag), (GGN, PMatImplicit), (EmpiricalFisher, PMatDense)):
        made = partial(matrix, model, unit="minibatch")
        one = made(shard(data, group), representation, process_group=group, **options(matrix))
        other = made(data, representation, **options(matrix))
        assert relative(seen(one), seen(other)) < TOLERANCE
    seen_by_all = [None] * size
    dist.all_gather_object(seen_by_all, [len(b[0]) for b in shard(DataLoader(whole, batch_size=4), group)], group=group)
    assert sorted(n for one in seen_by_all for n in one) == [3, 4, 4, 4, 4, 4, 4, 4]


def accumulators(group):
    model, data = convnet()
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    for matrix, representation in ((FIM, PMatDense), (GGN, PMatKFAC), (GradientCovariance, PMatDiag)):
        expected = Accumulator(matrix, model, representation).update(data[:4]).decay(0.5).update(data[4:])
        one = Accumulator(matrix, model, representation, process_group=group)
        one.update(shard(data[:4], group)).decay(0.5).update(shard(data[4:], group))
        assert relative(one.matrix().to_torch(), expected.matrix().to_torch()) < TOLERANCE
        assert one.n == expected.n
        two = Accumulator(matrix, model, representation)
        if rank > 0 or size == 2:
            two.update(data[:4][max(rank - 1, 0) :: max(size - 1, 1)] if size > 2 else data[:4][rank::2])
        two.reduce(group)
        once = Accumulator(matrix, model, representation).update(data[:4])
        assert relative(two.matrix().to_torch(), once.matrix().to_torch()) < TOLERANCE
        assert same_on_all(group, two.matrix().to_torch())
    mc = Accumulator(FIM_MonteCarlo, model, PMatDiag, process_group=group, **options(FIM_MonteCarlo, rank))
    mc.update(shard(data[:3], group)).update(shard(data[3:], group))
    expected = Accumulator(FIM_MonteCarlo, model, PMatDiag, **options(FIM_MonteCarlo, 0)).update(data)
    assert relative(mc.matrix().to_torch(), expected.matrix().to_torch()) < TOLERANCE
    ekfac = Accumulator(FIM, model, PMatEKFAC, process_group=group).update(shard(data[:4], group))
    ekfac.update(shard(data[4:], group))
    expected = Accumulator(FIM, model, PMatEKFAC).update(data[:4]).update(data[4:])
    assert relative(ekfac.matrix().to_torch(), expected.matrix().to_torch()) < TOLERANCE
    hessian = Accumulator(Hessian, model, PMatDiag).update(data[rank::size]).reduce(group)
    assert relative(hessian.matrix().to_torch(), Hessian(model, data, PMatDiag).to_torch()) < TOLERANCE
    own = Accumulator(FIM, model, PMatEKFAC).update(data[rank::size])
    raises(ValueError, "different bases", lambda: own.reduce(group))
    F = FIM(model, shard(data, group), PMatEKFAC, process_group=group).update_diag(
        shard(data, group), process_group=group
    )
    assert relative(F.to_torch(), FIM(model, data, PMatEKFAC).update_diag(data).to_torch()) < TOLERANCE


# What is done with them


def kernels_and_scores(group):
    model, data = transformer()
    rank = dist.get_rank(group)
    folder = ranks.folder() / "kernel"
    lc = LayerCollection.from_model(model)
    F = FIM(model, shard(data, group), PMatKFAC, process_group=group)
    cases = [{}, {"output": "trace"}, {"per_layer": True, "output": "trace"}, {"loader2": data[:2], "output": "diag"}]
    cases += [{"metric": F.inv(0.1), "output": "mean_trace"}, {"centering": True, "output": "trace"}]
    for case in cases:
        one, other = GramMatrix(model, data, **case), GramMatrix(model, shard(data, group), process_group=group, **case)
        for name in one if case.get("per_layer") else [None]:
            a, b = (K[name] if name is not None else K for K in (one, other))
            assert relative(b.to_torch(), a.to_torch()) < TOLERANCE, case
    disk = partial(GramMatrix, model, data, output="trace", representation=FMatMemmap.at(folder))
    assert (
        relative(disk(process_group=group).to_torch(), GramMatrix(model, data, output="trace").to_torch()) < TOLERANCE
    )
    dist.barrier(group)
    if rank == 0:  # some of the tiles are lost, and are made again by another number of processes
        lines = (folder / "tiles.1.json").read_text().splitlines(keepends=True)
        assert len(lines) > 2
        (folder / "tiles.1.json").write_text("".join(lines[:-1]))
        assert relative(disk().to_torch(), GramMatrix(model, data, output="trace").to_torch()) < TOLERANCE
    dist.barrier(group)
    raises(
        NotImplementedError,
        "no tiles",
        lambda: GramMatrix(model, data, representation=FMatImplicit, process_group=group),
    )
    other = data if rank == 0 else data[::-1]
    raises(ValueError, "other minibatches", lambda: GramMatrix(model, other, process_group=group))

    G = GGN(model, data, PMatEKFAC)
    one, several = (Influence(model, G, regul=0.1, process_group=g) for g in (None, group))
    queries, mine = data[1], shard(data, group)
    assert relative(several.scores(queries, mine), one.scores(queries, data)) < TOLERANCE
    for a, b in zip(
        several.scores(queries, mine, True).values(), one.scores(queries, data, True).values(), strict=True
    ):
        assert relative(a, b) < 1e-11
    assert relative(several.self_scores(mine), one.self_scores(data)) < TOLERANCE
    for largest in (True, False):
        (v, i), (w, j) = several.top(queries, mine, 4, largest), one.top(queries, data, 4, largest)
        assert relative(v, w) < TOLERANCE
        assert relative(one.scores(queries, data).gather(1, i), v) < TOLERANCE, "some are equal"
        assert i.shape == j.shape
    refined = Influence(
        model, G, regul=0.1, refine=GGN(model, mine, PMatImplicit, process_group=group), process_group=group
    )
    expected = Influence(model, G, regul=0.1, refine=GGN(model, data, PMatImplicit)).scores(queries, data)
    assert relative(refined.scores(queries, mine), expected) < 1e-4
    raises(NotImplementedError, "self_scores by products", lambda: refined.self_scores(mine))

    J = Jacobian(model, mine, process_group=group)
    own = torch.cat([x for x, _ in data[rank :: dist.get_world_size(group)]])
    assert relative(J.to_torch(), Jacobian(model, (own,)).to_torch()) < TOLERANCE
    assert J.layer_collection == lc


def products(group):
    """Lanczos, conjugate gradients and traces run the same on all ranks, from whatever random state."""
    model, data = convnet()
    rank = dist.get_rank(group)
    H, one = (Hessian(model, d, PMatImplicit, process_group=g) for d, g in ((shard(data, group), group), (data, None)))
    G = GGN(model, shard(data, group), PMatImplicit, process_group=group)
    v = PVector.from_model(model).detach()
    torch.manual_seed(rank)
    pairs = extreme_eigenpairs(H, 2, "both", tol=1e-10)
    assert relative(pairs.values, extreme_eigenpairs(one, 2, "both", tol=1e-10).values) < 1e-9
    assert same_on_all(group, pairs.vectors[0].to_torch())
    assert same_on_all(group, spectral_density(H, steps=10, probes=2, outliers=1).nodes)
    assert same_on_all(group, G.trace(estimator=partial(linalg.hutchpp, products=12)).value)
    assert same_on_all(group, G.eig(1)[0])
    assert same_on_all(group, PMatLowRank.nystrom(G, 5).to_torch())
    assert same_on_all(group, Hessian(model, shard(data, group), PMatLowRank, process_group=group, rank=2).to_torch())
    x = G.solve(v, 0.1, rtol=1e-12)
    assert relative(x.to_torch(), GGN(model, data, PMatImplicit).solve(v, 0.1, rtol=1e-12).to_torch()) < 1e-10
    raises(RuntimeError, "different vectors", lambda: H.matvec(torch.randn(1, H.size(0))))
    assert relative(H.mv(v).to_torch(), one.mv(v).to_torch()) < TOLERANCE, "and goes on"
    smooth = transformer()
    D, one = (
        Hessian(smooth[0], d, PMatImplicit, process_group=g, products=FiniteDifference())
        for d, g in ((shard(smooth[1], group), group), (smooth[1], None))
    )
    v = PVector.from_model(smooth[0]).detach()
    assert relative(D.mv(v).to_torch(), one.mv(v).to_torch()) < 1e-8


# What is communicated


class Counted:
    """How often sums over all ranks are made, and of how many bytes."""

    def __enter__(self):
        self.calls, self.bytes, self.original = 0, 0, dist.all_reduce

        def counted(tensor, *args, **kwargs):
            self.calls += 1
            self.bytes += tensor.nbytes
            return self.original(tensor, *args, **kwargs)

        dist.all_reduce = counted
        return self

    def __exit__(self, *exc):
        dist.all_reduce = self.original


def counted(group):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    data = [(torch.randn(n, 4), torch.randint(3, (n,))) for n in (7, 30, 20, 9)]
    sizes = {PMatDense: 43**2, PMatBlockDiag: 25**2 + 18**2, PMatDiag: 43, PMatQuasiDiag: 43 + 20 + 15, PMatEye: 1}
    sizes |= {PMatKFAC: 25 + 25 + 9 + 36, PMatEKFAC: 25 + 25 + 9 + 36 + 43 + 2, PMatLowRank: 66 * 3 * 43}
    blocks = {PMatDense: 1, PMatLowRank: 1, PMatEye: 1, PMatEKFAC: 4}
    for representation, numbers in sizes.items():
        with Counted() as of:
            FIM(model, shard(data, group), representation, process_group=group)
        assert of.calls == blocks.get(representation, 2), representation
        assert of.bytes <= 8 * numbers, representation  # a dense block of layers without positions takes less
    F = FIM(model, shard(data, group), PMatImplicit, process_group=group)
    with Counted() as of:
        F.matvec(torch.ones(3, 43))
    assert (of.calls, of.bytes) == (1, 8 * (3 * 43 + 4))
    with Counted() as of:
        GradientCovariance(model, shard(data, group), PMatDense, process_group=group)
    assert of.calls == 2


# What is refused


class Split(IterableDataset):
    """A data set that shares itself out, as those for several processes do."""

    def __init__(self, data, rank):
        self.data, self.rank = data, rank

    def __iter__(self):
        return iter(self.data[self.rank :: 2])


class Fails(nn.Module):
    """A model that fails for some inputs."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        if (x > 90).any():
            raise ZeroDivisionError("a bad example")
        return self.model(x)


def refused(group):
    rank = dist.get_rank(group)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    data = [(torch.randn(n, 4), torch.randint(3, (n,))) for n in (7, 3, 2, 9)]
    whole = TensorDataset(*(torch.cat(parts) for parts in zip(*data, strict=True)))
    sampled = DataLoader(whole, batch_size=4, sampler=DistributedSampler(whole, 2, rank))

    def call(loader, model=model, representation=PMatKFAC, **kwargs):
        return partial(FIM, model, loader, representation, process_group=group, **kwargs)

    for alone in (sampled, shard(data, group)):  # the part would pass for the whole
        raises(ValueError, "process_group=", partial(FIM, model, alone, PMatKFAC))
        raises(ValueError, "process_group=", partial(FIM, model, alone, PMatImplicit))
        raises(ValueError, "process_group=", partial(GramMatrix, model, alone))
        raises(ValueError, "process_group=", partial(Jacobian, model, alone))
        raises(ValueError, "process_group=", lambda alone=alone: Accumulator(FIM, model, PMatKFAC).update(alone))
        raises(
            ValueError,
            "process_group=",
            lambda alone=alone: Influence(model, GGN(model, data, PMatKFAC)).scores(data, alone),
        )
    raises(ValueError, "without it", partial(GramMatrix, model, sampled, process_group=group))
    raises(ValueError, "part of the data|already", lambda: shard(sampled, group))
    raises(ValueError, "already", lambda: shard(shard(data, group), group))
    raises(ValueError, "one-pass", lambda: shard(iter(data), group))
    raises(ValueError, "group", lambda: shard(data, None))
    raises(ValueError, "same minibatches", call(data))
    raises(ValueError, "same minibatches", call(DataLoader(whole, batch_size=4)))
    raises(ValueError, "same minibatches", call(data[0]))
    other = DataLoader(whole, batch_size=4, sampler=DistributedSampler(whole, 3, rank))
    raises(ValueError, "num_replicas=2", call(other))
    own = type("Own", (DistributedSampler,), {})(whole, 2, rank)
    raises(ValueError, "drop_last=True", call(DataLoader(whole, batch_size=4, sampler=own)))
    raises(
        ValueError, "same minibatches on all ranks", call(shard(DataLoader(Split(data, rank), batch_size=None), group))
    )
    raises(ValueError, "same minibatches on all ranks", call(shard(data if rank else data[:2], group)))
    raises(
        ValueError, "matrix and options", call(shard(data, group), variant="classif_logits" if rank else "regression")
    )
    raises(ValueError, "matrix and options", call(shard(data, group), representation=PMatKFAC if rank else PMatDiag))
    other = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3 + rank))
    raises(ValueError, "layers", call(shard(data, group), other))
    other = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    if rank == 1:
        nn.init.zeros_(other[0].bias)
    raises(ValueError, "parameters and buffers", call(shard(data, group), other))
    bad = [(x + 100 * (k == 1), y) for k, (x, y) in enumerate(data)]  # that of rank 1
    for representation in (PMatKFAC, PMatEKFAC):
        kind, words = (ZeroDivisionError, "bad example") if rank == 1 else (RuntimeError, "rank 1 .*bad example")
        raises(kind, words, call(shard(bad, group), Fails(model), representation))
    F = FIM(Fails(model), shard(bad, group), PMatImplicit, process_group=group)
    raises(kind, words, lambda: F.matvec(torch.ones(1, 43)))
    raises(TypeError, "ProcessGroup", partial(FIM, model, data, PMatKFAC, process_group="world"))
    lone = dist.new_group([0])
    if rank == 0:
        F = FIM(model, shard(data, lone), PMatEKFAC, process_group=lone)
        assert relative(F.to_torch(), FIM(model, data, PMatEKFAC).to_torch()) < TOLERANCE
        assert (
            relative(FIM(model, data, PMatDiag, process_group=lone).to_torch(), FIM(model, data, PMatDiag).to_torch())
            < TOLERANCE
        )
    else:
        raises(ValueError, "not in the group", partial(FIM, model, data, PMatKFAC, process_group=lone))
    F = FIM(model, shard(data, group), PMatKFAC, process_group=group)
    assert relative(F.to_torch(), FIM(model, data, PMatKFAC).to_torch()) < TOLERANCE, "after all of that"


def test_a_group_needs_processes():
    net = nn.Linear(2, 1)
    with pytest.raises(ValueError, match="not initialised"):
        FIM(net, (torch.randn(3, 2),), PMatDiag, variant="regression", process_group=object())
    with pytest.raises(ValueError, match="not initialised"):
        shard([(torch.randn(3, 2),)], object())


def test_what_is_sent_is_where_the_backend_can_send_it_from(monkeypatch):
    cpu, meta = torch.device("cpu"), torch.device("meta")
    for config, expected in (("cpu:gloo,cuda:gloo", "cpu"), ("cuda:nccl", "cuda"), ("cpu:gloo,cuda:nccl", "cpu")):
        monkeypatch.setattr(dist, "get_backend_config", lambda group, config=config: config)
        assert Team().wire(cpu).type == expected
    monkeypatch.setattr(dist, "get_backend_config", lambda group: "meta:nccl")
    sent = []
    monkeypatch.setattr(dist, "all_reduce", lambda t, group: sent.append(t.device))
    team = Team()
    team.size = 2
    with pytest.raises(NotImplementedError):  # nothing comes back from there
        team.add(torch.ones(2))
    assert sent == [meta]


# Wrapped models


def wrapped(group):
    model, data = convnet()
    names = list(LayerCollection.from_model(model))
    parallel = nn.parallel.DistributedDataParallel(model, process_group=group)
    parts = ranks.ConvNet().eval()
    parts.load_state_dict(model.state_dict())
    parts.body[3] = torch.compile(parts.body[3])
    F = FIM(model, data, PMatKFAC)
    for one in (parallel, torch.compile(model), parts, torch.compile(parallel)):
        G = FIM(one, shard(data, group), PMatKFAC, process_group=group)
        assert list(G.layer_collection) == names
        assert float((F - G).norm()) < TOLERANCE * float(F.norm())
        assert F.mv(PVector.from_model(one).detach()).size()
        K = FIM(one, data, PMatKFAC, layer_collection=LayerCollection.from_model(model))
        assert float((F - K).norm()) < TOLERANCE * float(F.norm())
    parallel.train()  # training goes on as before
    parallel(data[0][0]).sum().backward()
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    fully_shard(net, mesh=DeviceMesh.from_group(group, "cpu"))
    raises(NotImplementedError, "in pieces", partial(FIM, net, (torch.randn(3, 4),), PMatDiag))


# Found by trying


def decomposed(group):
    """Decompositions have owners, and all have what these found."""
    model, data = convnet()
    size = dist.get_world_size(group)
    v = PVector.from_model(model).detach()
    for representation in (PMatDense, PMatBlockDiag, PMatKFAC, PMatEKFAC, PMatLowRank, PMatDiag, PMatImplicit):
        F, one = (
            FIM(model, d, representation, process_group=g) for d, g in ((shard(data, group), group), (data, None))
        )
        G = decompose(F, group)
        assert type(G) is type(F)
        if representation is PMatImplicit:
            continue
        assert relative(G.solve(v, 0.1).to_torch(), one.solve(v, 0.1).to_torch()) < TOLERANCE
        assert relative(G.inv(0.1).mv(v).to_torch(), one.inv(0.1).mv(v).to_torch()) < TOLERANCE
        assert same_on_all(group, G.eigenvalues()), representation
        assert torch.equal(G.to_torch(), F.to_torch())
    done, original = [], torch.linalg.eigh

    def noted(m, *args, **kwargs):
        done.append(m.shape[-1])
        return original(m, *args, **kwargs)

    F = FIM(model, shard(data, group), PMatKFAC, process_group=group)
    torch.linalg.eigh = noted
    try:
        G = decompose(F, group)
        here = len(done)
        G.solve(v, 0.1), G.inv(0.1), G.logdet(0.1), decompose(G, group)
        assert len(done) == here, "nothing is decomposed again"
    finally:
        torch.linalg.eigh = original
    told = [None] * size
    dist.all_gather_object(told, done, group=group)
    assert all(told), "each has some"
    several = decompose([part.block for part in F.root.parts], group)
    assert len(several) == len(F.root.parts)
    own = FIM(model, data[dist.get_rank(group)], PMatKFAC)
    raises(ValueError, "different matrices", lambda: decompose(own, group))


def trained(group):
    """Two processes, each with its part of every minibatch, train as one with all of it."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    torch.manual_seed(0)
    x, y = torch.randn(24, 5), torch.randint(3, (24,))
    loss = nn.CrossEntropyLoss()

    def train(representation, matrix, group, refresh):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
        own = slice(rank, None, size) if group is not None else slice(None)
        loss_of = {} if matrix is FIM else {"loss": nn.CrossEntropyLoss(reduction="none")}
        optimizer = SecondOrderOptimizer(
            model, representation, matrix, lr=0.3, damping=0.05, refresh=refresh, process_group=group, **loss_of
        )
        for k in range(5):
            batch = slice(8 * (k % 3), 8 * (k % 3) + 8)
            mine = x[batch][own], y[batch][own]
            optimizer.zero_grad()
            loss(model(mine[0]), mine[1]).backward()
            for p in model.parameters() if group is not None else ():
                dist.all_reduce(p.grad, group=group)
                p.grad /= size
            optimizer.observe(mine)
            optimizer.step()
        return PVector.from_model(model).detach().to_torch(), optimizer

    for representation in (PMatDense, PMatBlockDiag, PMatDiag, PMatKFAC, PMatEKFAC):
        for matrix in (FIM, EmpiricalFisher):
            refresh = Stale() if representation is PMatKFAC else 2
            one, _ = train(representation, matrix, None, refresh)
            w, optimizer = train(representation, matrix, group, refresh)
            assert relative(w, one) < 1e-10, (representation, matrix)
            assert same_on_all(group, w)
            assert same_on_all(group, optimizer.matrix.to_torch())


def trained_variationally(group):
    """The same with weights that are drawn, which are those of rank 0."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    torch.manual_seed(0)
    x, y = torch.randn(24, 5), torch.randint(3, (24,))
    loss = nn.CrossEntropyLoss()

    def train(representation, matrix, group, refresh, saved=None):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
        seed = 7 if group is None or rank == 0 else 99
        optimizer = VIOptimizer(
            model,
            representation,
            matrix,
            num_data=24,
            lr=0.3,
            samples=2,
            refresh=refresh,
            generator=torch.Generator().manual_seed(seed),
            process_group=group,
            prior_precision={"0": 1.0, "2": 2.0},
        )
        if saved is not None:
            optimizer.load_state_dict(saved[1])
            model.load_state_dict(saved[0])
        own = slice(rank, None, size) if group is not None else slice(None)
        for k in range(4):
            batch = slice(8 * (k % 3), 8 * (k % 3) + 8)
            mine = x[batch][own], y[batch][own]
            for _ in range(optimizer.samples):
                with optimizer.sampled():
                    w = PVector.from_model(model).detach().to_torch().clone()
                    loss(model(mine[0]), mine[1]).backward()
                    for p in model.parameters() if group is not None else ():
                        dist.all_reduce(p.grad, group=group)
                        p.grad /= size
                    optimizer.observe(mine)
                assert group is None or same_on_all(group, w)
            optimizer.step()
        return PVector.from_model(model).detach().to_torch(), optimizer, w, model

    for representation in (PMatDense, PMatBlockDiag, PMatDiag, PMatKFAC, PMatEKFAC):
        for matrix in (FIM, EmpiricalFisher):
            refresh = Stale() if representation is PMatKFAC else 2
            one, _, drawn, _ = train(representation, matrix, None, refresh)
            w, optimizer, here, _ = train(representation, matrix, group, refresh)
            assert relative(w, one) < 1e-10, (representation, matrix)
            assert relative(here, drawn) < 1e-10, (representation, matrix)
            assert same_on_all(group, w)
            assert same_on_all(group, optimizer.covariance.to_torch())
    _, optimizer, _, model = train(PMatKFAC, FIM_MonteCarlo, group, 2)
    box = [model.state_dict(), optimizer.state_dict()]
    w = train(PMatKFAC, FIM_MonteCarlo, group, 2, box)[0]
    dist.broadcast_object_list(box, 0, group=group)
    again = train(PMatKFAC, FIM_MonteCarlo, group, 2, box)[0]
    assert torch.equal(w, again), "what rank 0 has saved is enough for all"


def tried(group):
    """What would be wrong raises on all ranks alike, and what is right works."""
    rank = dist.get_rank(group)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    data = [(torch.randn(n, 4), torch.randint(3, (n,))) for n in (7, 3, 1, 9)]
    mine = shard(data, group)
    for representation in (PMatKFAC, PMatImplicit):
        raises(ValueError, "no minibatch on any rank", partial(FIM, model, [], representation, process_group=group))
    smooth = nn.CrossEntropyLoss(label_smoothing=0.1 * rank)
    raises(ValueError, "options", partial(GGN, model, mine, PMatKFAC, loss=smooth, process_group=group))
    running = Accumulator(GGN, model, PMatKFAC, loss=smooth, process_group=group)
    raises(ValueError, "options", lambda: running.update(mine))
    model.train(rank == 1)
    raises(ValueError, "training mode", partial(FIM, model, mine, PMatKFAC, process_group=group))
    model.eval()
    norm = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    norm[1].running_mean.fill_(rank)  # as each rank of DistributedDataParallel has its own
    raises(ValueError, "buffers", partial(FIM, norm.eval(), mine, PMatKFAC, process_group=group))
    norm.train()
    several = [b for b in data if len(b[0]) > 1]
    held = partial(FIM, norm, representation=PMatKFAC, batch_statistics=True)
    F = held(loader=shard(several, group), process_group=group)
    assert relative(F.to_torch(), held(loader=several).to_torch()) < TOLERANCE
    matrix = GGN(model, data, PMatKFAC)
    influence = Influence(model, matrix, regul=0.1, process_group=group)
    for ask in (influence.scores, partial(influence.top, k=2)):
        raises(ValueError, "queries: rank 1", lambda ask=ask: ask(data[rank], mine))
    other = Influence(model, matrix, regul=0.1 + rank, process_group=group)
    raises(ValueError, "regul", lambda: other.scores(data[0], mine))
    shuffled = DataLoader(TensorDataset(*data[0]), batch_size=2, shuffle=True)
    assert influence.scores(shuffled, data if rank == 0 else []).shape == (7, 20)


#: Looked at by two processes, and by three.
BY_TWO = {
    "a convnet": partial(all_matrices, make=convnet),
    "a transformer": partial(all_matrices, make=transformer),
    "factors of few inputs": partial(all_matrices, make=wide),
    "loaders": loaders,
    "accumulators": accumulators,
    "kernels and scores": kernels_and_scores,
    "products": products,
    "decompositions": decomposed,
    "tried": tried,
    "trained": trained,
    "trained variationally": trained_variationally,
    "collectives": counted,
    "refused": refused,
    "wrapped": wrapped,
}
BY_THREE = {name: BY_TWO[name] for name in [*BY_TWO][:7]}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return ranks.run(BY_TWO, 2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    return ranks.run(BY_THREE, 3, tmp_path_factory.mktemp("three"))


@pytest.mark.parametrize("name", BY_TWO)
def test_two_processes(name, two):
    assert not two[name], two[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_THREE)
def test_three_processes(name, three):
    assert not three[name], three[name]
