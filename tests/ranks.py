"""Functions run by several processes at once, over gloo, and the small things that they are run on."""

import os
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

TESTS = Path(__file__).resolve().parent
#: After so many seconds a rank that waits gives up.
TIMEOUT = 40


def run(functions, size, at):
    """``function(group)`` of each name on each of so many processes, one after the other; by name what went wrong,
    empty if nothing.
    """
    context()
    mp.start_processes(_one, (functions, size, str(at)), nprocs=size, join=True, start_method="forkserver")
    found = {}
    for name in functions:
        errors = [(at / f"{name}.{rank}").read_text() for rank in range(size)]
        errors.sort(key=lambda e: any(word in e for word in ("Connection", "Timed out", "timeout")))  # the cause first
        found[name] = "\n".join(filter(None, errors))
    return found


def context():
    """Of processes that start with nothing but what takes long to import, which a server of theirs has done once."""
    mp.set_forkserver_preload(["torch._dynamo", "nngeometry"])
    return mp.get_context("forkserver")


def folder():
    """Where all processes of this run may write."""
    return _AT[0]


_AT = []


def _one(rank, functions, size, at):
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    _AT.append(Path(at))
    store = dist.FileStore(os.path.join(at, "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=10 * TIMEOUT))
    for name, function in functions.items():
        group = dist.new_group(timeout=timedelta(seconds=TIMEOUT))  # of its own, for one that failed is behind
        error = ""
        try:
            function(group)
        except BaseException:
            error = f"rank {rank}: {traceback.format_exc()}"
        (Path(at) / f"{name}.{rank}").write_text(error)
        dist.barrier()
    dist.destroy_process_group()


class ConvNet(nn.Module):
    """A convnet with norms."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1),
            nn.BatchNorm2d(3),
            nn.ReLU(),
            nn.Conv2d(3, 4, 3, stride=2),
            nn.GroupNorm(2, 4),
            nn.Tanh(),
            nn.AdaptiveAvgPool2d(2),
        )
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.body(x).flatten(1))


class Transformer(nn.Module):
    """A small transformer on tokens."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.block = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.block(self.embedding(x)).mean(1))


def convnet():
    """The model in eval mode, and 31 examples in uneven minibatches."""
    torch.manual_seed(0)
    model = ConvNet().eval()
    model.body[1].running_mean.normal_()
    model.body[1].running_var.uniform_(0.5, 2)
    return model, _split(torch.randn(31, 1, 6, 6), torch.randint(3, (31,)))


def transformer():
    """The model in eval mode, and 31 examples in uneven minibatches."""
    torch.manual_seed(0)
    return Transformer().eval(), _split(torch.randint(7, (31, 5)), torch.randint(3, (31,)))


def wide():
    """A layer of more inputs than there are examples, so that factors are held by these."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(90, 3), nn.Tanh(), nn.Linear(3, 2))
    return model, _split(torch.randn(31, 90), torch.randint(2, (31,)))


def _split(x, y, sizes=(7, 5, 8, 1, 6, 4)):
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


def relative(a, b):
    """How far two tensors are apart."""
    return float((a - b).norm() / b.norm().clamp(min=1e-300))
