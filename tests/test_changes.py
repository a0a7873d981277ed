"""Changes that are taken back, whatever happens meanwhile."""

import signal
import threading

import pytest
import torch
from interrupts import Tracer, in_threads
from torch import nn

from nngeometry import changes
from nngeometry.changes import (
    Borrowed,
    Changed,
    forward_hook,
    no_grad,
    other_tensors,
    recording,
    trainable,
    uninterrupted,
)


def _failing():
    raise LookupError("cannot be made")


def test_changes_are_undone_from_the_last_to_the_first():
    seen = []

    def note(name):
        def change():
            seen.append(name)
            return lambda: seen.append(f"not {name}")

        return change

    with Changed(note("a"), note("b")):
        assert seen == ["a", "b"]
    assert seen == ["a", "b", "not b", "not a"]


def test_what_cannot_be_made_undoes_what_was():
    model = nn.Linear(2, 1)
    with pytest.raises(LookupError), Borrowed(forward_hook(model, lambda *a: None), _failing):
        pass
    assert not model._forward_hooks
    assert changes._one_at_a_time.acquire(blocking=False)
    changes._one_at_a_time.release()


def test_one_that_cannot_be_undone_does_not_keep_the_others():
    model = nn.Linear(2, 1)
    with pytest.raises(LookupError), Borrowed(forward_hook(model, lambda *a: None), lambda: _failing):
        pass
    assert not model._forward_hooks


def _program(model):
    def run():
        with no_grad():
            frozen = trainable(model.parameters())
            with Borrowed(forward_hook(model, lambda *a: None), frozen, recording(True)):
                model(torch.ones(1, 2))
            uninterrupted(model, torch.ones(1, 2))

    return run


def test_an_interrupt_at_every_moment():
    model = nn.Linear(2, 1).requires_grad_(False)
    run, tracer = _program(model), Tracer((changes.__file__, __file__))
    moments = tracer.moments(run)
    assert len(moments) > 30
    for moment in moments:
        interrupt = tracer.run(run, moment)
        assert isinstance(interrupt, KeyboardInterrupt)
        assert torch.is_grad_enabled()
        assert not model._forward_hooks
        assert not any(p.requires_grad for p in model.parameters())
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert (changes._depth, changes._waiting) == (0, [])
        assert changes._one_at_a_time.acquire(blocking=False)
        changes._one_at_a_time.release()


def test_signals_that_do_not_raise_are_heard():
    heard = []
    before = signal.signal(signal.SIGUSR1, lambda *a: heard.append(1))
    try:
        with Changed():
            signal.raise_signal(signal.SIGUSR1)
            assert heard == [1]
        uninterrupted(signal.raise_signal, signal.SIGUSR1)
        assert heard == [1, 1]
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_threads_take_turns():
    model, inside, most = nn.Linear(2, 1), [], []

    def work():
        with Borrowed(forward_hook(model, lambda *a: None)):
            inside.append(1)
            most.append(len(inside))
            model(torch.ones(1, 2))
            inside.pop()

    in_threads(work, work, work, rounds=50)
    assert max(most) == 1
    assert not model._forward_hooks


def test_a_thread_that_waits_can_be_interrupted():
    held, done = threading.Event(), threading.Event()

    def hold():
        with Borrowed():
            held.set()
            done.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(10)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(KeyboardInterrupt), Borrowed():
            pass
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        done.set()
        thread.join()
    with Borrowed():
        pass


def test_tensors_swap_what_they_are():
    p, other = nn.Parameter(torch.zeros(2)), torch.ones(3, requires_grad=True)
    p.grad = torch.full((2,), 5.0)
    holders = [p]
    with Borrowed(other_tensors([p], [other])):
        assert holders[0].shape == (3,)
        assert holders[0].grad is None
        (2 * holders[0]).sum().backward()
    assert torch.equal(p.grad, torch.full((2,), 5.0))
    assert torch.equal(other.grad, torch.full((3,), 2.0))
