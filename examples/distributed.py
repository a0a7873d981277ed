"""Several processes
=================

KFAC and the top eigenvalues of a convnet on digits, by several processes: the same numbers as by one.

Every rank reads its own minibatches. The statistics of KFAC add up by one collective for each layer, products with
the generalised Gauss-Newton matrix by one for each product, and Lanczos runs the same on all ranks. Rank 0 computes
both alone too and prints how far they are apart, and the seconds of each. (Ranks that share the cores of one machine
have no more of them than one process; what the numbers show is the work of communication.)

::

    torchrun --nproc-per-node 2 examples/distributed.py            less than a minute
    torchrun --nproc-per-node 2 examples/distributed.py --small    the same code on less
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from nngeometry import GGN, PMatImplicit, PMatKFAC
from nngeometry.distributed import shard
from nngeometry.spectrum import extreme_eigenpairs


# %%
# Every rank trains the same net on the same data.
def digits(n: int) -> TensorDataset:
    data = load_digits()
    images = torch.tensor(data.images[:n, None] / 16)
    return TensorDataset(images, torch.tensor(data.target[:n]))


def trained(data: TensorDataset, steps: int) -> nn.Module:
    """A convnet with a norm, trained in the same way on every rank."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10)),
    ).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    x, y = data.tensors
    for _ in range(steps):
        index = torch.randperm(len(x))[:128]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[index]), y[index]).backward()
        optimizer.step()
    for tensor in model.state_dict().values():
        dist.broadcast(tensor, 0)  # whatever the rounding on other machines
    return model.eval()


# %%
# The matrix and its eigenvalues are computed by all ranks together, and by rank 0 alone.
def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    found = call()
    return found, time.perf_counter() - start


def numbers(model: nn.Module, loader: Any, k: int, group: Any) -> list[tuple[str, Tensor, float]]:
    """KFAC and the top eigenvalues, with seconds."""
    F, of_kfac = timed(lambda: GGN(model, loader, PMatKFAC, process_group=group))
    G = GGN(model, loader, PMatImplicit, process_group=group)
    generator = torch.Generator().manual_seed(0)
    pairs, of_pairs = timed(lambda: extreme_eigenpairs(G, k, generator=generator))
    return [("KFAC", F.get_diag(), of_kfac), (f"top {k} eigenvalues", pairs.values, of_pairs)]


# %%
# ``process_group=`` is the one argument that is new.
def main(small: bool) -> None:
    dist.init_process_group("gloo")
    rank, group = dist.get_rank(), dist.group.WORLD
    torch.set_num_threads(1)
    data = digits(300 if small else 1797)
    model = trained(data, 20 if small else 150)
    loader = DataLoader(data, batch_size=50)
    several = numbers(model, shard(loader, group), 2 if small else 5, group)
    if rank == 0:
        alone = numbers(model, loader, 2 if small else 5, None)
        print(f"{sum(p.numel() for p in model.parameters())} parameters, {len(data)} images")
        for (name, a, of_a), (_, b, of_b) in zip(several, alone, strict=True):
            apart = float((a - b).norm() / b.norm())
            print(f"{name:20} {dist.get_world_size()} ranks {of_a:6.2f} s, one {of_b:6.2f} s, apart by {apart:.1e}")
            assert apart < 1e-8
        print("eigenvalues", ", ".join(f"{v:.4f}" for v in several[1][1].tolist()))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    main(parser.parse_args().small)
