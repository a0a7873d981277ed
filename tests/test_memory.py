"""The memory budget and what else depends on the device."""

from functools import partial

import oracle
import pytest
import torch
from torch import nn

from nngeometry import FIM, LayerCollection, PMatDense, PMatKFAC, memory, memory_budget, random_pvector
from nngeometry.model.recurrent import recurrent_without_cudnn

CPU = torch.device("cpu")


def test_the_budget_of_a_device_unless_one_is_chosen(monkeypatch):
    cards = {0: 80 * 2**30, 1: 24 * 2**30}
    monkeypatch.setattr(memory, "_cuda_memory", cards.__getitem__)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert memory.budget(CPU) == 2**30
    assert memory.budget(torch.device("mps")) == 2**30
    assert memory.budget(torch.device("cuda:0")) == 10 * 2**30
    assert memory.budget(torch.device("cuda")) == 3 * 2**30
    assert memory.work_array(CPU) == 2**25
    assert memory.work_array(torch.device("cuda")) == 3 * 2**28
    with memory_budget(2**20):
        for device in (CPU, torch.device("cuda:0")):
            assert memory.budget(device) == 2**20


@pytest.mark.parametrize("budget", [1, 2**20, 2**40])
def test_nothing_is_kept_elsewhere_than_in_this_process(budget):
    torch.set_default_device("meta")
    try:
        with memory_budget(budget):
            memory.keep_freed(CPU)
            memory.keep_freed(torch.device("cuda"))
    finally:
        torch.set_default_device(None)


def test_a_block_that_does_not_fit_the_budget_of_its_device():
    model = nn.Sequential(nn.Linear(3, 4), nn.MultiheadAttention(4, 2, add_bias_kv=True, batch_first=True))
    function = lambda x: model[1](model[0](x), model[0](x), model[0](x))[0].mean(1)  # noqa: E731
    with memory_budget(2**12), pytest.raises(MemoryError, match=r"layer '1' .* has no Kronecker form"):
        FIM(model, (torch.randn(5, 2, 3),), PMatKFAC, "regression", function=function, dense=True)


@pytest.mark.parametrize("before", [True, False])
def test_recurrent_layers_without_cudnn(before):
    cudnn = torch.backends.cudnn
    x, seen = torch.randn(2, 3, 4), []
    model = nn.ModuleDict({"linear": nn.Linear(4, 4), "recurrent": nn.LSTM(4, 2, batch_first=True)})
    for layer in model.values():
        layer.register_forward_hook(lambda *a: seen.append(cudnn.enabled))
    hooks = [dict(layer._forward_hooks) for layer in model.values()]
    with cudnn.flags(enabled=before):
        with recurrent_without_cudnn(model):
            model["recurrent"](model["linear"](x))
            assert cudnn.enabled == before
        assert seen == [before, False]
        with pytest.raises(RuntimeError), recurrent_without_cudnn(model):
            model["recurrent"](x[..., :1])
        assert cudnn.enabled == before
        off = partial(cudnn.flags, enabled=False)  # as a user may have it in a forward
        with pytest.raises(RuntimeError), recurrent_without_cudnn(model), off():
            model["recurrent"](x[..., :1])
        assert cudnn.enabled == before
    assert hooks == [dict(layer._forward_hooks) for layer in model.values()]
    assert not model["recurrent"]._forward_pre_hooks


def test_random_vectors_take_a_generator_of_any_device():
    model = nn.Linear(3, 2)
    lc = LayerCollection.from_model(model)
    draw = lambda: torch.Generator("cpu").manual_seed(0)  # noqa: E731
    v = random_pvector(lc, device=oracle.HERE, generator=draw())
    assert v.device == torch.device(oracle.HERE)
    assert torch.equal(v.to_torch(), random_pvector(lc, device="cpu", generator=draw()).to_torch().to(oracle.HERE))
    F = FIM(model, (torch.randn(9, 3),), PMatDense)
    assert F.sample(generator=draw()).device == F.device
