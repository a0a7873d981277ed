"""Work that was stopped goes on: from the file, to the bit, in the same call."""

import multiprocessing
import os
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
import ranks
import torch
import torch.distributed as dist
from ranks import relative
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nngeometry import (
    FIM,
    GGN,
    Accumulator,
    FIM_MonteCarlo,
    GradientCovariance,
    Hessian,
    PMatBlockDiag,
    PMatDense,
    PMatDiag,
    PMatEKFAC,
    PMatImplicit,
    PMatKFAC,
    PMatLowRank,
)
from nngeometry.distributed import shard

SIZES = (7, 5, 4, 3, 6, 2)
CASES = [
    (FIM, PMatKFAC),
    (FIM, PMatEKFAC),
    (FIM_MonteCarlo, PMatDense),
    (GradientCovariance, PMatDiag),
    (GGN, PMatLowRank),
    (Hessian, PMatBlockDiag),
]


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def batches():
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 4, generator=g).double(), torch.randint(3, (n,), generator=g)) for n in SIZES]


class Stops(list):
    """Minibatches, at the k-th look at one of which something happens."""

    def __init__(self, data, at, what):
        super().__init__(data)
        self.at, self.what = at, what

    def __getitem__(self, k):
        if type(k) is int:
            self.at -= 1
            if self.at < 0:
                self.what()
        return super().__getitem__(k)


class Stopped(Exception):
    pass


def stop():
    raise Stopped


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def options(matrix, seed=5):
    return {"generator": torch.Generator().manual_seed(seed)} if matrix is FIM_MonteCarlo else {}


def made(matrix, representation, path, data=None, every=2, seed=5, **others):
    loader = batches() if data is None else data
    return matrix(net(), loader, representation, checkpoint=path, every=every, **options(matrix, seed), **others)


@pytest.mark.parametrize(("matrix", "representation"), CASES, ids=lambda x: x.__name__)
def test_it_goes_on_to_the_bit_wherever_it_was_killed(matrix, representation, tmp_path):
    expected = made(matrix, representation, tmp_path / "whole")
    assert not (tmp_path / "whole").exists(), "it goes when the matrix is done"
    plain = matrix(net(), batches(), representation, **options(matrix))
    assert relative(expected.to_torch(), plain.to_torch()) < 1e-12
    context = multiprocessing.get_context("fork")
    passes = 2 if representation is PMatEKFAC else 1
    for k in range(len(SIZES) * passes):
        path = tmp_path / f"{k}"
        process = context.Process(target=made, args=(matrix, representation, path, Stops(batches(), k, die)))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert path.exists() == (k >= 2)
        looks = Stops(batches(), 1000, die)
        seed = 99 if path.exists() else 5  # the draws are those of before
        F = made(matrix, representation, path, looks, seed=seed)
        assert torch.equal(F.to_torch(), expected.to_torch()), k
        assert 1000 - looks.at <= len(SIZES) * passes - k // 2 * 2, "what was seen is not read again"
        assert not path.exists()


@pytest.mark.parametrize("kind", ["loader", "shuffled", "stream"])
def test_whatever_the_loader_is(kind, tmp_path):
    x, y = (torch.cat(parts) for parts in zip(*batches(), strict=True))

    class Stream:
        def __init__(self, at):
            self.at = at

        def __iter__(self):
            for k, batch in enumerate(batches()):
                if k == self.at:
                    stop()
                yield batch

    class Items(TensorDataset):
        at = 1000

        def __getitem__(self, k):
            if k == 0:
                return super().__getitem__(k)  # which is looked at first
            self.at -= 1
            return super().__getitem__(k) if self.at >= 0 else stop()

    def loader(at):
        if kind == "stream":
            return Stream(at // 4)
        items = Items(x, y)
        items.at = at
        return DataLoader(items, batch_size=4, shuffle=kind == "shuffled")

    expected = FIM(net(), (x, y), PMatKFAC)
    with pytest.raises(Stopped):
        made(FIM, PMatKFAC, tmp_path / "file", loader(20))
    assert (tmp_path / "file").exists()
    F = made(FIM, PMatKFAC, tmp_path / "file", loader(1000))
    assert relative(F.to_torch(), expected.to_torch()) < 1e-12
    assert not (tmp_path / "file").exists()


def stopped(path, matrix=FIM, representation=PMatKFAC, at=4, **others):
    with pytest.raises(Stopped):
        made(matrix, representation, path, Stops(batches(), at, stop), **others)
    assert path.exists()
    return path


def test_a_file_of_something_else_is_refused_by_name(tmp_path):
    path = stopped(tmp_path / "file")
    content = path.read_bytes()
    other = net()
    nn.init.zeros_(other[0].bias)
    data = batches()
    changed = [(x + (k == 5), y) for k, (x, y) in enumerate(data)]
    wrong = {
        "matrix and options": lambda: made(GGN, PMatKFAC, path),
        "representation=PMatDiag": lambda: made(FIM, PMatDiag, path),
        "sharing='reduce'": lambda: made(FIM, PMatKFAC, path, sharing="reduce"),
        "parameters and buffers": lambda: FIM(other, data, PMatKFAC, checkpoint=path),
        "data": lambda: made(FIM, PMatKFAC, path, changed),
        "layers": lambda: FIM(nn.Linear(4, 3).double(), data, PMatKFAC, checkpoint=path),
        "dtype": lambda: FIM(net().float(), [(x.float(), y) for x, y in data], PMatKFAC, checkpoint=path),
    }
    for words, call in wrong.items():
        with pytest.raises(ValueError, match=f"checkpoint: .*file is of another work.*{words}"):
            call()
        assert path.read_bytes() == content, "nothing is lost"
    weights = [nn.CrossEntropyLoss(torch.tensor(w)) for w in ([1.0, 2, 3], [1.0, 2, 4])]
    path = stopped(tmp_path / "loss", GGN, loss=weights[0])
    with pytest.raises(ValueError, match="of another work"):
        made(GGN, PMatKFAC, path, loss=weights[1])


def test_a_damaged_file_is_refused(tmp_path):
    path = stopped(tmp_path / "file")
    content = path.read_bytes()
    torch.save({"a": torch.ones(2)}, tmp_path / "foreign")
    damaged = {
        "cut": content[: len(content) // 2],
        "short": content[:-1],
        "empty": b"",
        "text": b"hello",
        "foreign": (tmp_path / "foreign").read_bytes(),
    }
    for name, found in damaged.items():
        path.write_bytes(found)
        with pytest.raises(ValueError, match=r"checkpoint: .*file.*(give another path|delete the file)"):
            made(FIM, PMatKFAC, path)
        assert path.read_bytes() == found, name
    expected = made(FIM, PMatKFAC, tmp_path / "other").to_torch()
    refused = 0
    for k in range(0, len(content), len(content) // 40):  # or it does not matter, where there is padding
        path.write_bytes(content[:k] + bytes([content[k] ^ 255]) + content[k + 1 :])
        try:
            F = made(FIM, PMatKFAC, path)
        except ValueError as error:
            refused += str(error).startswith("checkpoint: ")
        else:
            assert torch.equal(F.to_torch(), expected), k
    assert refused > 5
    path.write_bytes(content)
    made(FIM, PMatKFAC, path)
    with pytest.raises(ValueError, match="no folder"):
        made(FIM, PMatKFAC, tmp_path / "no" / "file")
    with pytest.raises(ValueError, match="is a folder"):
        made(FIM, PMatKFAC, tmp_path)


def test_other_data_of_a_stream_are_noticed(tmp_path):
    class Stream:
        def __init__(self, data, at=1000):
            self.data, self.at = data, at

        def __iter__(self):
            for k, batch in enumerate(self.data):
                yield batch if k < self.at else stop()

    with pytest.raises(Stopped):
        made(FIM, PMatKFAC, tmp_path / "file", Stream(batches(), 5))
    changed = [(x + (k == 1), y) for k, (x, y) in enumerate(batches())]
    with pytest.raises(ValueError, match="other minibatches"):
        made(FIM, PMatKFAC, tmp_path / "file", Stream(changed))


def test_it_stays_if_asked_and_then_nothing_is_read(tmp_path):
    F = made(FIM, PMatEKFAC, tmp_path / "file", keep_checkpoint=True)
    again = made(FIM, PMatEKFAC, tmp_path / "file", Stops(batches(), 0, stop), keep_checkpoint=True)
    assert torch.equal(F.to_torch(), again.to_torch())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


def test_an_accumulator_goes_on(tmp_path):
    def run(at):
        acc = Accumulator(FIM, net(), PMatEKFAC)
        data = batches()
        acc.update(data[:3]).decay(0.5)
        acc.update(Stops(data[3:], at, stop), checkpoint=tmp_path / "file", every=1)
        return acc.matrix().to_torch()

    expected = run(1000)
    with pytest.raises(Stopped):
        run(2)
    acc = Accumulator(FIM, net(), PMatEKFAC).update(batches()[:2])
    with pytest.raises(ValueError, match="examples seen before"):
        acc.update(batches()[3:], checkpoint=tmp_path / "file")
    assert torch.equal(run(1000), expected)


def test_the_bar_starts_from_where_it_was(tmp_path, capsys):
    path = stopped(tmp_path / "file")
    made(FIM, PMatKFAC, path, verbose=True)
    shown = capsys.readouterr().err
    assert "4/6" in shown
    assert "6/6" in shown
    assert "0/6" not in shown


def test_bad_arguments():
    data = batches()
    for words, given in {
        "every: it is for checkpoint": {"every": 3},
        "keep_checkpoint: it is for": {"keep_checkpoint": True},
        "every": {"checkpoint": "file", "every": 0},
    }.items():
        with pytest.raises(ValueError, match=words):
            FIM(net(), data, PMatKFAC, **given)
    with pytest.raises(TypeError, match="path of a file"):
        FIM(net(), data, PMatKFAC, checkpoint=3)
    with pytest.raises(ValueError, match="holds nothing that could be kept"):
        FIM(net(), data, PMatImplicit, checkpoint="file")
    with pytest.raises(NotImplementedError, match="no running average"):
        Hessian(net(), data, PMatLowRank, checkpoint="file")


# On another number of processes


def _path(name, k):
    return ranks.folder() / f"{name} {k}"


def _stop_at(group, name, matrix, representation, k):
    """Stop after k minibatches of this rank."""
    loader = shard(Stops(batches(), k, stop), group)
    with pytest.raises((Stopped, RuntimeError)):
        made(matrix, representation, _path(name, k), loader, every=1, process_group=group)


def several(group):
    """What one process began goes on here, and what was begun here goes on elsewhere."""
    size = dist.get_world_size(group)
    for matrix, representation in CASES:
        expected = matrix(net(), batches(), representation, **options(matrix)).to_torch()
        for k in range(1, 12 // size if representation is PMatEKFAC else 6 // size):
            _stop_at(group, "here", matrix, representation, k)
            assert _path("here", k).exists()
            if dist.get_rank(group) == 0:
                alone = shutil.copy(_path("here", k), _path("alone", k))
                F = made(matrix, representation, alone, every=1)
                assert relative(F.to_torch(), expected) < 1e-12
            dist.barrier(group)
            F = made(matrix, representation, _path("here", k), shard(batches(), group), every=2, process_group=group)
            assert relative(F.to_torch(), expected) < 1e-12
            dist.barrier(group)
            assert not _path("here", k).exists()
        for k in (1, 4):
            if dist.get_rank(group) == 0:
                with pytest.raises(Stopped):
                    made(matrix, representation, _path("one", k), Stops(batches(), k, stop), every=1)
            dist.barrier(group)
            F = made(matrix, representation, _path("one", k), shard(batches(), group), process_group=group)
            assert relative(F.to_torch(), expected) < 1e-12


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_on_another_number_of_processes(size, tmp_path):
    found = ranks.run({"several": several}, size, tmp_path)
    assert not found["several"], found["several"]


def test_partial_matrices_have_files_too(tmp_path):
    F = made(partial(FIM, variant="regression"), PMatDiag, tmp_path / "file")
    assert relative(F.to_torch(), FIM(net(), batches(), PMatDiag, "regression").to_torch()) < 1e-12


def test_a_folder_that_cannot_be_written_to_is_found_before_any_work(tmp_path, monkeypatch):
    def none(self, mode="r", *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    seen = []
    model = torch.nn.Linear(4, 3)

    def function(x):
        seen.append(len(x))
        return model(x)

    monkeypatch.setattr(Path, "open", none)
    with pytest.raises(OSError, match=r"cannot be written .*a path on a disk"):
        FIM(model, [(torch.randn(5, 4),)], PMatDiag, function=function, checkpoint=tmp_path / "state.pt")
    assert len(seen) <= 1


@pytest.mark.parametrize("kind", [OSError, RuntimeError])
def test_a_disk_that_is_full_leaves_the_state_before(tmp_path, monkeypatch, kind):
    model, path = torch.nn.Linear(4, 3), tmp_path / "state.pt"
    data = [(torch.randn(5, 4),)] * 4
    original, times = torch.save, []

    def save(*args):
        times.append(1)
        if len(times) == 2:
            raise kind("no space left on device")
        original(*args)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(OSError, match="no space left"):
        FIM(model, data, PMatDiag, checkpoint=path, every=1)
    F = FIM(model, data, PMatDiag, checkpoint=path, every=1)
    assert torch.equal(F.to_torch(), FIM(model, data, PMatDiag).to_torch())
