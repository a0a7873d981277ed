"""Whatever a call does, and however it ends, it leaves all that is the user's as it found it.

That is the model (parameters, gradients, buffers, hooks, modes, attributes), the minibatches, the random state, and the
switches of torch and Python. Tests that break a call do so at ``--moments`` of its moments at most.
"""

import random
import threading
import zlib

import numpy as np
import pytest
import torch
from interrupts import Tracer, in_threads, where
from state import CALLS, DRAWS, PATHS, SUBJECTS, Case, Picture
from torch import backends, nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.data import DataLoader, Dataset, TensorDataset

from nngeometry import (
    FIM,
    FIM_MonteCarlo,
    Generator,
    LayerCollection,
    PMatDense,
    PMatImplicit,
    PVector,
)
from nngeometry.changes import modes_kept
from nngeometry.generator import rowwise
from nngeometry.likelihood import Gaussian

pytestmark = pytest.mark.filterwarnings("ignore:layer .* cannot be vectorised:RuntimeWarning")
BY_NAME = {subject.name: subject for subject in SUBJECTS}


class Broken(LookupError):
    """What goes wrong in the user's code."""


@pytest.fixture
def make(tmp_path):
    """``make(subject)``: what its calls are given."""

    def made(subject):
        case = subject.make()
        case.tmp = tmp_path
        return case

    return made


@pytest.fixture
def moments(request):
    """``moments(many)``: numbers below ``many`` at which to break something, evenly spread, others in other tests."""
    most, first = request.config.getoption("--moments"), zlib.crc32(request.node.name.encode())

    def chosen(many):
        stride = max(1, -(-many // most))
        return range(first % stride, many, stride)

    return chosen


@pytest.fixture(autouse=True)
def clean():
    """``clean()``, and once in the end: the switches that a test has found changed, so that the next finds them."""
    restore, attention = modes_kept(), [backends.cuda.flash_sdp_enabled, backends.cuda.mem_efficient_sdp_enabled]
    attention += [backends.cuda.math_sdp_enabled, backends.cuda.cudnn_sdp_enabled, backends.mha.get_fastpath_enabled]
    found = [switch() for switch in attention]

    def clean():
        restore()
        backends.cuda.enable_flash_sdp(found[0])
        backends.cuda.enable_mem_efficient_sdp(found[1])
        backends.cuda.enable_math_sdp(found[2])
        backends.cuda.enable_cudnn_sdp(found[3])
        backends.mha.set_fastpath_enabled(found[4])

    yield clean
    clean()


def _result(call, case):
    """What a call gives, None if it is refused."""
    try:
        return call(case)
    except NotImplementedError:
        return None


def _numbers(result):
    """The tensors of a result."""
    if result is None or isinstance(result, torch.Tensor):
        return [] if result is None else [result]
    if hasattr(result, "to_torch"):
        return [result.to_torch()]
    if isinstance(result, dict):
        return [t for one in result.values() for t in _numbers(one)]
    return [t for one in result for t in _numbers(one)] if isinstance(result, tuple | list) else []


# When nothing goes wrong


#: All calls of some models, some calls of all.
EVERY = [(s.name, name) for s in SUBJECTS for name in (CALLS if s.name in ("mlp", "transformer") else PATHS)]


@pytest.mark.parametrize(("subject", "name"), EVERY)
def test_nothing_has_changed(subject, name, make):
    case = make(BY_NAME[subject])
    picture = Picture(case.model, data=case.loader, random=name not in DRAWS)
    result = _result(CALLS[name], case)
    picture.check()
    del result
    picture.check()


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.enable_grad, lambda: torch.autograd.set_multithreading_enabled(False)]
)
def test_the_modes_of_the_user_stay(name, mode, make):
    case = make(BY_NAME["mlp"])
    with mode():
        picture = Picture(case.model, data=case.loader)
        CALLS[name](case)
        picture.check()


def test_the_only_draw_without_a_generator_is_one_number():
    model, batch = nn.Linear(3, 2), (torch.ones(4, 3),)
    before = torch.get_rng_state()
    F = FIM_MonteCarlo(model, batch, PMatImplicit)
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    torch.randint(2**62, ())
    assert torch.equal(torch.get_rng_state(), after)
    F.mv(PVector.from_model(model).detach())
    F.trace()
    assert torch.equal(torch.get_rng_state(), after)


def _augmented(x):
    return x + torch.randn(()) + np.random.randn() + random.random()  # noqa: NPY002


class Augmented(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, k):
        return (_augmented(torch.full((3,), float(k))),)


@pytest.mark.parametrize("call", [lambda m, l: FIM(m, l, PMatDense), lambda m, l: FIM(m, l, PMatImplicit).trace()])
def test_what_a_loader_draws_is_put_back(call):
    model = nn.Linear(3, 2)
    for loader in (DataLoader(TensorDataset(torch.ones(8, 3)), 4), DataLoader(Augmented(), 4, shuffle=True)):
        before = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
        call(model, loader)
        assert torch.equal(torch.get_rng_state(), before[0])
        assert str(np.random.get_state()) == str(before[1])  # noqa: NPY002
        assert random.getstate() == before[2]


def test_a_loader_draws_what_it_would_by_itself():
    model, loader = nn.Linear(3, 2), DataLoader(Augmented(), 3, shuffle=True)
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    M = FIM(model, loader, PMatDense, "regression").to_torch()
    batches = list(loader)
    torch.set_rng_state(before[0])
    torch.testing.assert_close(FIM(model, batches, PMatDense, "regression").to_torch(), M)


def test_a_stream_that_is_not_finished_holds_nothing():
    case = BY_NAME["mlp"].make()
    generator = Generator(case.model, case.layers, rowwise(lambda f, batch, k: Gaussian().sqrt(f)))
    picture = Picture(case.model, data=case.loader)
    stream = generator.stream(case.loader)
    next(stream)
    picture.check()
    del stream
    picture.check()


# When the user's code raises


def _broken_in_turn(case, count, call, moments):
    """Break a call at its moments: count(at) is a context in which the user's code is broken at its at-th turn, counted
    from zero, and says how many turns there were.
    """
    with count(None) as turns:
        before = _numbers(call(case))
    many = len(turns)
    for k in moments(many):
        with count(k):
            picture = Picture(case.model, data=case.loader)
            try:
                found, error = _numbers(call(case)), None
                torch.testing.assert_close(found, before)
            except Exception as caught:
                error = caught
            picture.check(f"after turn {k} of {many}: ")
        # A look at something may do without it, and the numbers are the same.
        assert error is None or isinstance(error, Broken), f"at turn {k} of {many}: {error!r}"
    after = _numbers(call(case))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    return many


class Turns(list):
    """Of all calls of modules, of which the at-th breaks."""

    def __init__(self, at):
        super().__init__()
        self.at = at

    def take(self, *arguments):
        self.append(None)
        if self.at is not None and len(self) == self.at + 1:
            raise Broken("of the user")

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass


class OfModules(Turns):
    def __enter__(self):
        self.handle = register_module_forward_pre_hook(self.take)
        return self

    def __exit__(self, *exception):
        self.handle.remove()


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda s: s.name)
def test_a_module_raises(subject, name, make, moments):
    assert _broken_in_turn(make(subject), OfModules, CALLS[name], moments)


class Loader:
    """Minibatches that can be read again and again, of which the at-th of all breaks."""

    def __init__(self, batches):
        self.batches, self.turns = batches, Turns(None)

    def __iter__(self):
        for batch in self.batches:
            self.turns.take()
            yield batch

    def counted(self, at):
        self.turns = Turns(at)
        return self.turns


@pytest.mark.parametrize("name", [name for name in PATHS if "Influence" not in name])
@pytest.mark.parametrize("subject", ["mlp", "transformer", "lstm", "frozen"])
def test_the_loader_raises(subject, name, make, moments):
    case = make(BY_NAME[subject])
    batches, case.loader = case.loader, Loader(case.loader)

    def with_the_minibatches(case):
        result = CALLS[name](case)
        picture.check()
        return result

    picture = Picture(case.model, data=batches)
    assert _broken_in_turn(case, case.loader.counted, with_the_minibatches, moments)
    picture.check()


WITH_LOSS = [name for name in CALLS if name.startswith(("Emp", "Grad", "GGN", "Hess", "Influence"))]


@pytest.mark.parametrize("name", WITH_LOSS)
def test_the_loss_raises(name, make, moments):
    case = make(BY_NAME["mlp"])

    def loss(f, y):
        loss.turns.take()
        return cross_entropy(f, y, reduction="none")

    def counted(at):
        loss.turns = Turns(at)
        return loss.turns

    case.loss, loss.turns = loss, Turns(None)
    if _result(CALLS[name], case) is None:
        return
    assert _broken_in_turn(case, counted, CALLS[name], moments)


@pytest.mark.parametrize("how", ["backward", "forward"])
@pytest.mark.parametrize("name", PATHS)
def test_an_operation_raises(name, how, make):
    """Of the user's own, in its forward or its backward."""

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            if how == "forward":
                raise Broken("of the user")
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            raise Broken("of the user")

    class Inside(nn.Module):
        def forward(self, x):
            return Fails.apply(x)

    case = make(BY_NAME["mlp"])
    case.model[1] = Inside()
    picture = Picture(case.model, data=case.loader)
    with pytest.raises(Exception):  # noqa: B017, PT011
        CALLS[name](case)
    picture.check()


# When the user interrupts


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of generators that never began
@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("subject", ["mlp", "transformer", "lstm", "frozen"])
def test_an_interrupt(subject, name, make, moments, clean):
    """The same at all moments in turn (--moments=100000), at some of them otherwise."""
    tracer, wrong = Tracer(), {}

    def fresh():
        case = make(BY_NAME[subject])
        return lambda: CALLS[name](case), Picture(case.model, data=case.loader)

    program, picture = fresh()
    program()
    found = tracer.moments(program)
    for k in moments(len(found)):
        interrupt = tracer.run(program, found[k])
        changed = picture.changed()  # while the exception is still there
        del interrupt
        if changed:
            wrong[where(found[k])] = changed[:2]
            clean()
            program, picture = fresh()
    assert not wrong, f"{len(wrong)} of {len(found)} moments: {wrong}"


# With several threads


def _alone_and_together(jobs, models, rounds=4):
    """Jobs by themselves and at the same time: the same numbers, or a sentence about threads."""
    alone = [_numbers(job()) for job in jobs]
    picture = Picture(*models)
    together = in_threads(*jobs, rounds=rounds)
    picture.check()
    for job, one, many in zip(jobs, alone, together, strict=True):
        for found in many:
            if isinstance(found, Exception):
                assert "thread" in str(found), repr(found)
            else:
                for a, b in zip(one, _numbers(found), strict=True):
                    torch.testing.assert_close(b, a)
        assert [torch.allclose(a, b) for a, b in zip(one, _numbers(job()), strict=True)] == [True] * len(one)


PAIRS = [(name, PATHS[(k + 3) % len(PATHS)]) for k, name in enumerate(PATHS)] + [(name, name) for name in PATHS[:4]]


@pytest.mark.parametrize("pair", PAIRS, ids=" and ".join)
@pytest.mark.parametrize("subject", ["mlp", "transformer", "lstm", "frozen"])
def test_two_threads_on_one_model(subject, pair, make):
    case = make(BY_NAME[subject])
    _alone_and_together([lambda n=n: CALLS[n](case) for n in pair], [case.model])


@pytest.mark.parametrize("pair", PAIRS, ids=" and ".join)
def test_two_threads_on_two_models(pair, make):
    cases = [make(BY_NAME[name]) for name in ("mlp", "transformer")]
    _alone_and_together(
        [lambda c=c, n=n: CALLS[n](c) for c, n in zip(cases, pair, strict=True)], [c.model for c in cases]
    )


@pytest.mark.parametrize("pair", PAIRS, ids=" and ".join)
def test_two_threads_on_two_models_with_a_module_in_common(pair, make):
    one, other = (make(BY_NAME["mlp"]) for _ in range(2))
    other.model[0] = one.model[0]
    cases = [Case(c.model, c.loader, LayerCollection.from_model(c.model)) for c in (one, other)]
    _alone_and_together(
        [lambda c=c, n=n: CALLS[n](c) for c, n in zip(cases, pair, strict=True)], [c.model for c in cases]
    )


@pytest.mark.parametrize("name", PATHS)
def test_a_thread_that_only_uses_the_model(name, make):
    case = make(BY_NAME["mlp"])
    x = torch.randn(2, 3)
    _alone_and_together([lambda: CALLS[name](case), lambda: case.model(x).detach()], [case.model])


@pytest.mark.parametrize("name", PATHS)
def test_a_thread_that_draws_random_numbers(name, make):
    """It must not be taken for the model."""
    case, stop = make(BY_NAME["transformer"]), threading.Event()

    def draw():
        while not stop.is_set():
            torch.rand(1)

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        for _ in range(5):
            CALLS[name](case)
    finally:
        stop.set()
        thread.join()


# Models that change what they should not


class Changing(nn.Module):
    """A model with something that it does to itself or to its input when it is called."""

    def __init__(self, change):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("count", torch.zeros(1))
        self.register_buffer("empty", None)
        self.change = change

    def forward(self, x):
        self.change(self, x)
        return self.linear(torch.tanh(x))


@torch.no_grad()
def _write(t):
    t.mul_(0.9).add_(0.1)


def _set(**attributes):
    def change(model, x):
        for name, make in attributes.items():
            setattr(model.linear.weight, name, make(model.linear.weight))

    return change


#: Those that make the model another one: refused.
REFUSED = {
    "writes a buffer": lambda m, x: _write(m.count),
    "writes the data of a buffer": lambda m, x: m.count.data.add_(1),
    "replaces a buffer": lambda m, x: setattr(m, "count", m.count + 1),
    "fills a buffer": lambda m, x: setattr(m, "empty", torch.zeros(1)),
    "writes a parameter": lambda m, x: _write(m.linear.weight),
    "writes the data of a parameter": lambda m, x: m.linear.weight.data.mul_(0.9),
    "sets the data of a parameter": _set(data=lambda p: 0.9 * p.detach()),
    "replaces a parameter": lambda m, x: setattr(m.linear, "weight", nn.Parameter(m.linear.weight.detach() * 0.9)),
    "draws random numbers of torch": lambda m, x: torch.rand(1),
}
#: Those that make no difference to the numbers: undone, and right or refused.
UNDONE = {
    "registers a buffer": lambda m, x: m.register_buffer("mask", torch.ones(3)),
    "sets a gradient": _set(grad=torch.ones_like),
    "sets requires_grad": lambda m, x: m.linear.bias.requires_grad_(not m.linear.bias.requires_grad),
    "changes the mode": lambda m, x: m.train(not m.training),
    "switches grad mode": lambda m, x: torch.set_grad_enabled(True),
}
#: Those that change the minibatch: the user's is not changed, and the numbers are right or it is refused.
INPUTS = {
    "writes its input": lambda m, x: _write(x),
    "writes the data of its input": lambda m, x: x.data.mul_(0.9),
    "wants the gradient of its input": lambda m, x: x.requires_grad_(True) if x.is_leaf else None,
    "sets the gradient of its input": lambda m, x: setattr(x, "grad", torch.ones_like(x)) if x.is_leaf else None,
}


def _changing(change):
    torch.manual_seed(0)
    model = Changing(change).eval()
    loader = [(torch.randn(n, 3), torch.arange(n) % 3) for n in (3, 2)]
    return Case(model, loader, LayerCollection.from_model(model))


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("what", REFUSED)
def test_a_model_that_changes_itself_is_refused_and_put_back(what, name):
    case = _changing(REFUSED[what])
    picture = Picture(case.model, data=case.loader, versions=False)
    with pytest.raises((ValueError, NotImplementedError)):
        CALLS[name](case)
    picture.check()


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("what", {**UNDONE, **INPUTS})
def test_what_a_model_changes_in_passing_is_put_back(what, name):
    before = Case(*vars(_changing(lambda m, x: None)).values())
    case = _changing({**UNDONE, **INPUTS}[what])
    picture = Picture(case.model, data=case.loader, versions=False)
    try:
        found = _numbers(CALLS[name](case))
    except (ValueError, NotImplementedError):
        found = None
    picture.check()
    if found is not None and what in UNDONE:
        for a, b in zip(_numbers(CALLS[name](before)), found, strict=True):
            torch.testing.assert_close(b, a)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("late", ["writes a buffer", "writes a parameter", "writes the data of a buffer"])
def test_a_model_that_changes_itself_before_it_raises_is_put_back(late, name):
    def change(model, x):
        REFUSED[late](model, x)
        raise Broken("of the user")

    case = _changing(change)
    picture = Picture(case.model, data=case.loader, versions=False)
    with pytest.raises(Broken, match="of the user"):
        CALLS[name](case)
    picture.check()


# That these tests see something


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m[0].weight.data.add_(1),
        lambda m: setattr(m[0].weight, "grad", torch.ones_like(m[0].weight)),
        lambda m: m[0].weight.requires_grad_(False),
        lambda m: setattr(m[0], "weight", nn.Parameter(m[0].weight.detach().clone())),
        lambda m: m[0].register_forward_pre_hook(lambda m, a: None),
        lambda m: m[0].weight.register_hook(lambda g: g),
        lambda m: m[0].train(),
        lambda m: m.register_buffer("more", torch.zeros(1)),
        lambda m: setattr(m, "label", "other"),
        lambda m: m.cache.append(3),
        lambda m: torch.rand(1),
    ],
)
def test_a_picture_shows_a_change(change):
    case = BY_NAME["mlp"].make()
    picture = Picture(case.model, data=case.loader)
    assert picture.changed() == []
    change(case.model)
    assert picture.changed()


def test_a_picture_shows_switches_and_minibatches():
    case = BY_NAME["mlp"].make()
    for switch in (torch.no_grad(), torch.nn.attention.sdpa_kernel([torch.nn.attention.SDPBackend.MATH])):
        picture = Picture(data=case.loader)
        with switch:
            assert picture.changed()
        assert picture.changed() == []
    case.loader[1][0].mul_(2)
    assert picture.changed()
