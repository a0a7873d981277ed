"""Training goes on after a stop as if there had been none; averages and nets are what they are published as."""

import copy
import io
import shutil
import signal
import time

import numpy as np
import pytest
import ranks
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nngeometry import GGN, PMatEKFAC, PMatKFAC, at
from nngeometry.optim import LevenbergMarquardt, SecondOrderOptimizer, Stale, VIOptimizer
from nngeometry.training import (
    SWA,
    SWAG,
    History,
    checkpoints,
    evaluate,
    load_checkpoint,
    recompute_batch_norm,
    train,
    weights,
    zoo,
)
from nngeometry.training.zoo import all_cnn, densenet, lenet, mlp, preresnet, resnet, resnext, vgg, wide_resnet


def problem(seed=0):
    """A net with BatchNorm and dropout, and data in random order."""
    torch.manual_seed(seed)
    layers = [nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 7)]
    model = nn.Sequential(*layers)
    centres = 2 * torch.randn(7, 4)
    y = torch.randint(7, (70,))
    data = TensorDataset(centres[y] + 0.3 * torch.randn(70, 4), y)
    loader = DataLoader(data, batch_size=16, shuffle=True, generator=torch.Generator().manual_seed(3))
    return model, loader, DataLoader(data, batch_size=70)


def parts(model, kind="sgd"):
    if kind == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)
    elif kind == "adam":
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 5])
    else:
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=2)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1)
    return {"optimizer": optimizer, "scheduler": scheduler, "average": SWAG(start=2, rank=3)}


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k != "seconds")
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("kind", ["sgd", "adam", "lbfgs"])
def test_resumed_is_the_same_to_the_bit(kind, tmp_path):
    def run(folder, epochs):
        model, loader, test = problem()
        torch.manual_seed(5)
        given = parts(model, kind)
        history = train(
            model,
            loader,
            given.pop("optimizer"),
            epochs=epochs,
            test_loader=test,
            checkpoints=folder,
            save_every=2,
            evaluate_every=2,
            verbose=False,
            **given,
        )
        return model, history

    whole, history = run(tmp_path / "whole", 7)
    run(tmp_path / "parts", 4)
    torch.manual_seed(99)
    again, resumed = run(tmp_path / "parts", 7)
    assert same(whole.state_dict(), again.state_dict())
    assert same(history.rows, resumed.rows)
    a, b = (load_checkpoint(checkpoints(tmp_path / name)[7]) for name in ("whole", "parts"))
    assert same(a, b)
    assert list(checkpoints(tmp_path / "whole")) == [0, 2, 4, 6, 7]
    assert kind == "lbfgs" or history["loss"][-1] < history["loss"][0]
    assert whole.training
    assert history.names[:2] == ["epoch", "lr"]
    assert {"test_loss", "test_accuracy", "test_top5", "grad_norm", "weight_norm"} <= set(history.names)


def with_curvature(kind, folder, epochs, workers):
    torch.manual_seed(0)
    norm = nn.Identity() if kind == "vi" else nn.BatchNorm1d(8)
    model = nn.Sequential(nn.Linear(4, 8), norm, nn.ReLU(), nn.Linear(8, 7))
    data = problem()[1].dataset
    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(data, batch_size=16, shuffle=True, num_workers=workers, generator=generator)
    optimizer = {
        "kfac": lambda: SecondOrderOptimizer(model, PMatKFAC, lr=0.05, damping=1e-2, refresh=3),
        "stale": lambda: SecondOrderOptimizer(model, PMatEKFAC, lr=0.05, damping=1e-2, refresh=Stale(0.3)),
        "marquardt": lambda: SecondOrderOptimizer(model, PMatKFAC, GGN, lr=0.5, damping=LevenbergMarquardt(1.0)),
        "vi": lambda: VIOptimizer(model, PMatKFAC, lr=0.05, num_data=70, damping=1e-2),
    }[kind]()
    options = {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5), "average": SWAG(start=2, rank=3)}
    history = train(model, loader, optimizer, epochs=epochs, checkpoints=folder, save_every=2, verbose=False, **options)
    return model.state_dict(), history.rows, load_checkpoint(checkpoints(folder)[epochs])


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "workers"), [("kfac", 0), ("stale", 0), ("marquardt", 0), ("vi", 0), ("kfac", 2)])
def test_resumed_with_curvature_is_the_same_to_the_bit(kind, workers, tmp_path):
    whole = with_curvature(kind, tmp_path / "whole", 5, workers)
    with_curvature(kind, tmp_path / "parts", 2, workers)
    torch.manual_seed(99)
    assert same(whole, with_curvature(kind, tmp_path / "parts", 5, workers))


class Slow(DataLoader):
    """Minibatches that take a while."""

    wait = 0.0

    def __iter__(self):
        for b in super().__iter__():
            time.sleep(self.wait)
            yield b


def trained_for_long(folder, wait=0.0):
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    model, loader, _ = problem()
    slow = Slow(loader.dataset, batch_size=16, shuffle=True, generator=torch.Generator().manual_seed(3))
    slow.wait = wait
    given = parts(model)
    optimizer = given.pop("optimizer")
    train(model, slow, optimizer, epochs=30, checkpoints=folder, save_every=1, verbose=False, **given)
    torch.save(model.state_dict(), folder / "final.state")


def test_killed_and_resumed_is_the_same_to_the_bit(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    whole, running, resumed = (
        ranks.context().Process(target=trained_for_long, args=args) for args in ((a,), (b, 0.02), (b,))
    )
    whole.start()
    running.start()
    until = time.monotonic() + 120
    while not (b.is_dir() and len(list(b.glob("epoch-*.pt"))) > 4) and time.monotonic() < until:
        time.sleep(0.02)
    running.kill()
    running.join()
    assert running.exitcode == -signal.SIGKILL
    assert not (b / "final.state").exists()
    resumed.start()
    for process in (whole, resumed):
        process.join()
        assert process.exitcode == 0
    one, other = (torch.load(f / "final.state", weights_only=True) for f in (a, b))
    assert same(one, other)


def test_seed_and_history(tmp_path):
    losses = []
    for _ in range(2):
        model, loader, _ = problem()
        history = train(
            model,
            loader,
            torch.optim.SGD(model.parameters(), lr=0.05),
            epochs=2,
            seed=4,
            verbose=False,
            evaluate_every=1,
        )
        losses.append(history["loss"])
    assert losses[0] == losses[1]
    figure = history.plot(tmp_path / "history.png")
    assert (tmp_path / "history.png").stat().st_size > 1000
    assert [ax.get_title() for ax in figure.axes] == ["loss", "accuracy", "norms", "learning rate"]
    assert "2 epochs" in repr(history)
    assert len(History()) == 0


def test_one_epoch_is_that_of_a_plain_loop():
    model, loader, _ = problem()
    other, again, _ = problem()
    torch.manual_seed(1)
    train(model, loader, torch.optim.SGD(model.parameters(), lr=0.05), epochs=1, verbose=False)
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.05)
    other.train()
    for x, y in again:
        optimizer.zero_grad()
        nn.functional.cross_entropy(other(x), y).backward()
        optimizer.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_evaluate_is_in_eval_mode_and_leaves_the_model():
    model, _, test = problem()
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = evaluate(model, test)
    assert model.training
    assert same(model.state_dict(), before)
    x, y = next(iter(test))
    f = model.eval()(x).detach()
    assert found.loss == pytest.approx(float(nn.functional.cross_entropy(f, y)))
    assert found.accuracy == pytest.approx(float((f.argmax(1) == y).double().mean()))
    assert found.top5 == pytest.approx(float((f.topk(5).indices == y.unsqueeze(1)).any(1).double().mean()))
    assert evaluate(nn.Linear(2, 1), (torch.zeros(3, 2), torch.zeros(3, 1)), nn.MSELoss()).accuracy is None


def test_averages():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    swag, swa = SWAG(start=1, rank=5), SWA(start=0, every=2)
    seen = []
    for _ in range(8):
        nn.init.normal_(model.weight)
        nn.init.normal_(model.bias)
        swag.update(model)
        swa.update(model)
        seen.append(nn.utils.parameters_to_vector(model.parameters()).detach())
    W = torch.stack(seen)
    torch.testing.assert_close(swag.mean().to_torch(), W.mean(0))
    torch.testing.assert_close(swa.mean().to_torch(), W.mean(0))
    torch.testing.assert_close(swag.variance().to_torch(), W.var(0, correction=0))
    running = torch.stack([W[k] - W[: k + 1].mean(0) for k in range(3, 8)])
    torch.testing.assert_close(swag.deviations(), running / 2)
    g = torch.Generator().manual_seed(0)
    samples = torch.stack([swag.sample(g, scale=0.25).to_torch() for _ in range(20000)])
    expected = 0.25 * (running.mT @ running / 4 + W.var(0, correction=0).diag())
    assert float((samples.T.cov() - expected).norm() / expected.norm()) < 0.05
    torch.testing.assert_close(swag.sample(scale=0.0).to_torch(), W.mean(0))
    with at(model, swag.mean()):
        torch.testing.assert_close(model.bias.detach(), W.mean(0)[6:])
    again = SWAG(start=1, rank=5)
    again.restore(model, swag.state_dict())
    g, h = (torch.Generator().manual_seed(1) for _ in range(2))
    assert torch.equal(again.sample(g).to_torch(), swag.sample(h).to_torch())
    assert [e for e in range(6) if swa.due(e)] == [0, 2, 4]
    with pytest.raises(ValueError, match="nothing was averaged yet"):
        SWA(start=3).mean()
    with pytest.raises(ValueError, match="the checkpoint has SWAG"):
        SWA(start=1).restore(model, swag.state_dict())


def test_batch_norm_of_an_average():
    model, loader, test = problem()
    average = SWA(start=1)
    train(model, loader, torch.optim.SGD(model.parameters(), lr=0.05), epochs=4, average=average, verbose=False)
    assert average.count == 4
    with at(model, average.mean()):
        recompute_batch_norm(model, test)
        found = evaluate(model, test)
        x, _ = next(iter(test))
        torch.testing.assert_close(model[1].running_mean, model[0](x).mean(0).detach())
    assert found.accuracy > 0.3


#: For images of CIFAR, ten classes. VGG16 as in github.com/timgaripov/swa, those of ResNets as in pytorchcv, ResNet-18,
#: ResNeXt and DenseNet as published or as counted from the publications.
PUBLISHED = {
    "vgg16": (lambda: vgg(16), 15_245_130),
    "vgg16 on 100": (lambda: vgg(16, classes=100), 15_291_300),
    "vgg16bn": (lambda: vgg(16, True), 15_253_578),
    "resnet18": (lambda: resnet(18), 11_173_962),
    "resnet34": (lambda: resnet(34), 21_282_122),
    "resnet50": (lambda: resnet(50), 23_520_842),
    "preresnet20": (lambda: preresnet(20), 272_282),
    "preresnet56": (lambda: preresnet(56), 855_578),
    "preresnet110": (lambda: preresnet(110), 1_730_522),
    "preresnet164": (lambda: preresnet(164), 1_703_258),
    "wrn28-10": (lambda: wide_resnet(28, 10), 36_479_194),
    "densenet-bc-100": (lambda: densenet(100, 12), 769_162),
    "resnext29": (lambda: resnext(29), 34_426_698),
    "all-cnn-c": (lambda: all_cnn(), 1_369_738),
    "lenet5": (lambda: lenet(), 61_706),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_numbers_of_parameters(name):
    make, expected = PUBLISHED[name]
    with torch.device("meta"):
        model = make()
    assert sum(p.numel() for p in model.parameters()) == expected


NETS = {
    "mlp": lambda size, channels: mlp(channels * size * size, (5,)),
    "lenet": lambda size, channels: lenet(channels, size=size),
    "vgg": lambda size, channels: vgg(11, True, channels=channels, size=size, width=0.05),
    "vgg19": lambda size, channels: vgg(19, channels=channels, size=size, width=0.02, dropout=0.0),
    "resnet": lambda size, channels: resnet(18, channels=channels, size=size, width=0.05),
    "resnet50": lambda size, channels: resnet(50, channels=channels, size=size, width=0.02),
    "preresnet": lambda size, channels: preresnet(20, channels=channels, size=size, width=0.2),
    "preresnet164": lambda size, channels: preresnet(164, channels=channels, size=size, width=0.1),
    "wide_resnet": lambda size, channels: wide_resnet(10, 1, channels=channels, size=size, width=0.2, dropout=0.1),
    "resnext": lambda size, channels: resnext(11, 2, channels=channels, size=size, width=0.05),
    "densenet": lambda size, channels: densenet(10, 4, channels=channels, size=size),
    "all_cnn": lambda size, channels: all_cnn(channels=channels, size=size, width=0.05),
}


@pytest.mark.parametrize(("size", "channels"), [(8, 1), (28, 1), (32, 3), (12, 2)])
@pytest.mark.parametrize("name", NETS)
def test_nets_for_all_sizes(name, size, channels):
    model = NETS[name](size, channels)
    f = model(torch.randn(2, channels, size, size))
    assert f.shape == (2, 10)
    f.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_bad_input_in_one_sentence(tmp_path):
    model, loader, _ = problem()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    def refused(error, match, *args, **options):
        with pytest.raises(error, match=match):
            train(*args, **{"epochs": 1, "verbose": False, **options})

    refused(ValueError, "no parameter of the model", problem()[0], loader, optimizer)
    refused(ValueError, "no labels", model, [torch.randn(4, 4)] * 0 + [(torch.randn(4, 4),)], optimizer)
    refused(TypeError, "average: expected a SWA", model, loader, optimizer, average=3)
    refused(TypeError, "epohs", model, loader, optimizer, epohs=3)
    refused(ValueError, "not finite any more in epoch 1", model, loader, torch.optim.SGD(model.parameters(), 1e300))
    with pytest.raises(ValueError, match="there is none in"):
        checkpoints(tmp_path)
    with pytest.raises(ValueError, match="there is none in"):
        weights(tmp_path / "nowhere")
    model, loader, _ = problem()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    train(model, loader, optimizer, epochs=1, verbose=False, checkpoints=tmp_path)
    assert list(weights(tmp_path)) == [0, 1]
    assert same(dict(weights(tmp_path)[1]), dict(model.state_dict()))
    refused(ValueError, "has some already", model, loader, optimizer, checkpoints=tmp_path, resume=False)
    refused(ValueError, "written without one", model, loader, optimizer, checkpoints=tmp_path, average=SWA(start=1))
    other = zoo.mlp(4, (3,), 7)
    before = [p.detach().clone() for p in other.parameters()]
    refused(ValueError, "another model", other, loader, torch.optim.SGD(other.parameters(), 0.1), checkpoints=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True))
    (tmp_path / "epoch-00001.pt").write_bytes(b"nothing")
    refused(ValueError, "no checkpoint, or it is damaged", model, loader, optimizer, checkpoints=tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder of three epochs with Adam, a scheduler and SWAG."""
    folder = tmp_path_factory.mktemp("trained")
    model, loader, _ = problem()
    given = parts(model, "adam")
    train(model, loader, given.pop("optimizer"), epochs=3, save_every=2, checkpoints=folder, verbose=False, **given)
    return folder


def in_the_middle(data):
    middle = len(data) // 2
    return data[:middle] + bytes(255 - b for b in data[middle : middle + 99]) + data[middle + 99 :]


def saved(obj):
    def change(_):
        held = io.BytesIO()
        torch.save(obj, held)
        return held.getvalue()

    return change


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda data: data[:-1], "move it away"),
        (lambda data: data[: len(data) // 2], "move it away"),
        (in_the_middle, r"is damaged \(its entry"),
        (saved(nn.Linear(2, 2)), "move it away"),
        (saved(nn.Linear(2, 2).state_dict()), r"no checkpoint of train\(checkpoints=\): it holds an OrderedDict"),
        (saved({"format": 1, "model": {}}), "it holds a dict"),
        (saved({"format": "a", "model": {}}), "it holds a dict"),
    ],
    ids=["one byte short", "half", "other bytes", "a model", "a state dict", "a part", "another format"],
)
def test_damaged_and_foreign_checkpoints(trained, tmp_path, change, match):
    shutil.copytree(trained, tmp_path / "runs")
    last = tmp_path / "runs" / "epoch-00003.pt"
    last.write_bytes(change(last.read_bytes()))
    model, loader, _ = problem()
    given, before = parts(model, "adam"), copy.deepcopy(model.state_dict())
    options = {"epochs": 5, "checkpoints": tmp_path / "runs", "verbose": False}
    with pytest.raises(ValueError, match=match):
        train(model, loader, given["optimizer"], **options, scheduler=given["scheduler"], average=given["average"])
    assert same(model.state_dict(), before)
    last.unlink()
    assert len(train(model, loader, given.pop("optimizer"), **options, **given)) == 5


def sgd(model):
    return {**parts(model, "adam"), "optimizer": torch.optim.SGD(model.parameters(), 0.1)}


def plateau(model):
    of = parts(model, "adam")
    return {**of, "scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau(of["optimizer"])}


@pytest.mark.parametrize(
    ("arguments", "options", "match"),
    [
        (sgd, {}, "is of AdamW, not of SGD"),
        (plateau, {}, "is of MultiStepLR, not of ReduceLROnPlateau"),
        (lambda model: {**parts(model, "adam"), "average": SWAG(start=2, rank=4)}, {}, r"rank=3\), not SWAG"),
        (lambda model: {**parts(model, "adam"), "average": SWA(start=2)}, {}, r"rank=3\), not SWA\("),
        (lambda model: parts(model, "adam"), {"loader": []}, "one with 1 generators"),
        (lambda model: parts(model, "adam"), {"epochs": 2}, "checkpoint of epoch 3 already"),
    ],
)
def test_checkpoints_of_other_arguments_leave_all_as_it_was(trained, arguments, options, match):
    model, loader, _ = problem()
    given = {"loader": loader, "epochs": 5, **arguments(model), **options}
    objects = (model, given["optimizer"], given["scheduler"])
    before = [copy.deepcopy(one.state_dict()) for one in objects]
    with pytest.raises(ValueError, match=match):
        train(model, given.pop("loader"), given.pop("optimizer"), checkpoints=trained, verbose=False, **given)
    assert same(before, [one.state_dict() for one in objects])


class Augmented(torch.utils.data.Dataset):
    """Noise from a generator that the data hold."""

    def __init__(self, of, rng):
        self.of, self.rng = of, rng

    def __len__(self):
        return len(self.of)

    def __getitem__(self, k):
        x, y = self.of[k]
        if isinstance(self.rng, np.random.Generator):
            return x + 0.1 * torch.tensor(self.rng.standard_normal(4), dtype=x.dtype), y
        return x + 0.1 * torch.randn(4, generator=self.rng), y


@pytest.mark.parametrize(
    "rng",
    [
        lambda: np.random.default_rng(0),
        lambda: np.random.Generator(np.random.MT19937(0)),
        lambda: torch.Generator().manual_seed(1),
    ],
    ids=["numpy", "Mersenne twister", "torch"],
)
def test_generators_of_datasets_are_resumed(rng, tmp_path):
    def run(folder, epochs):
        model, loader, _ = problem()
        data = torch.utils.data.ConcatDataset([Augmented(loader.dataset, rng()), loader.dataset])
        loader = DataLoader(data, batch_size=32, shuffle=True)
        torch.manual_seed(2)
        options = {"epochs": epochs, "save_every": 1, "checkpoints": folder, "verbose": False}
        train(model, loader, torch.optim.SGD(model.parameters(), 0.1), **options)
        return model.state_dict()

    whole = run(tmp_path / "whole", 3)
    run(tmp_path / "parts", 1)
    assert same(whole, run(tmp_path / "parts", 3))


def test_workers_that_persist_are_told_of(tmp_path):
    model, loader, _ = problem()
    loader = DataLoader(loader.dataset, 35, num_workers=1, persistent_workers=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.warns(UserWarning, match="persistent_workers=False"):
        train(model, loader, optimizer, epochs=0, checkpoints=tmp_path, verbose=False)


def test_frozen_models_are_evaluated():
    model, _, test = problem()
    expected = evaluate(model, test)
    assert evaluate(model.requires_grad_(False), test) == expected
