"""Real architectures built from a configuration, without weights: a ResNet with BatchNorm, a ViT with class token,
a GPT-2, a BERT.
"""

import oracle
import pytest
import torch

from nngeometry import (
    FIM,
    Categorical,
    EmpiricalFisher,
    FIM_MonteCarlo,
    LayerCollection,
    PMatBlockDiag,
    PMatDense,
    PMatDiag,
    PMatEKFAC,
    PMatImplicit,
    PMatKFAC,
    PMatLowRank,
    PMatQuasiDiag,
    random_pvector,
)

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow


def resnet():
    config = transformers.ResNetConfig(
        num_channels=1, embedding_size=3, hidden_sizes=[3, 4], depths=[1, 1], layer_type="basic", num_labels=3
    )
    model = transformers.ResNetForImageClassification(config)
    return model, (torch.randn(3, 1, 16, 16),), lambda x: model(x).logits


def vit():
    config = transformers.ViTConfig(
        hidden_size=4, num_hidden_layers=1, num_attention_heads=2, intermediate_size=5,
        image_size=4, patch_size=2, num_channels=1, num_labels=3,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config)
    return model, (torch.randn(3, 1, 4, 4),), lambda x: model(x).logits


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=7, n_positions=6, n_embd=4, n_layer=1, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    model = transformers.GPT2LMHeadModel(config)
    batch = {"input_ids": torch.randint(7, (3, 4)), "attention_mask": torch.ones(3, 4, dtype=torch.long)}
    return model, batch, lambda b: model(input_ids=b["input_ids"], attention_mask=b["attention_mask"]).logits[:, -1]


def bert():
    config = transformers.BertConfig(
        vocab_size=7,
        hidden_size=4,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=5,
        max_position_embeddings=6,
        num_labels=3,
    )
    model = transformers.BertForSequenceClassification(config)
    return model, {"input_ids": torch.randint(1, 7, (3, 4))}, lambda b: model(**b).logits


ARCHITECTURES = {"resnet": resnet, "vit": vit, "gpt2": gpt2, "bert": bert}


def make(name):
    torch.manual_seed(0)
    model, batch, function = ARCHITECTURES[name]()
    return oracle.randomise(model.double()), batch, function


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_exact_representations(name):
    model, batch, function = make(name)
    lc = LayerCollection.from_model(model)
    assert {id(p) for p in lc.parameters(model)} == {id(p) for p in model.parameters()}
    M = oracle.fim(model, [batch], "classif_logits", function)
    v = random_pvector(lc)
    for representation in (PMatDense, PMatLowRank, PMatImplicit):
        F = FIM(model, batch, representation, function=function)
        assert oracle.relative(F.mv(v).to_torch(), M @ v.to_torch()) < 1e-10, representation
        assert oracle.relative(F.trace(), M.trace()) < 1e-10
    blocks = oracle.blockdiag(M, lc)
    assert oracle.relative(FIM(model, batch, PMatBlockDiag, function=function).to_torch(), blocks) < 1e-10
    assert oracle.relative(FIM(model, batch, PMatDiag, function=function).get_diag(), M.diagonal()) < 1e-10
    assert oracle.relative(FIM(model, batch, PMatQuasiDiag, function=function).get_diag(), M.diagonal()) < 1e-10
    kfac = FIM(model, batch, PMatKFAC, function=function)
    ekfac = FIM(model, batch, PMatEKFAC, function=function)
    assert oracle.relative(ekfac.trace(), M.trace()) < 1e-10
    assert torch.linalg.norm(blocks - ekfac.to_torch()) <= torch.linalg.norm(blocks - kfac.to_torch()) * (1 + 1e-12)
    kfac.solve(v, 0.1)


def test_gpt2_layers():
    model, _, _ = make("gpt2")
    lc = LayerCollection.from_model(model)
    assert lc["transformer.h.0.attn.c_attn"].kronecker  # Conv1D
    assert lc["transformer.wpe"].kronecker
    assert lc["transformer.wte"].kronecker  # tied to the head, which is its transpose
    assert "lm_head" not in lc


def test_gpt2_per_sequence():
    """All positions of a sequence are one example."""
    model, batch, _ = make("gpt2")

    def function(b):
        return model(input_ids=b["input_ids"]).logits

    J = oracle.jacobian(model, batch, function)
    p = function(batch).softmax(-1)
    H = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
    J = J.view(4, 7, 3, -1)  # positions, classes, examples, parameters
    M = torch.einsum("tknp,ntkl,tlnq->pq", J, H, J) / 3
    F = FIM(model, batch, PMatDense, Categorical(dim=-1), function=function)
    assert oracle.relative(F.to_torch(), M) < 1e-10
    sampled = FIM_MonteCarlo(
        model,
        batch,
        PMatDense,
        Categorical(dim=-1),
        function=function,
        trials=300,
        generator=torch.Generator().manual_seed(0),
    )
    assert oracle.relative(sampled.to_torch(), M) < 0.35

    def loss(f, b):
        return torch.nn.functional.cross_entropy(f[:, :-1].transpose(1, 2), b["input_ids"][:, 1:], reduction="none")

    E = EmpiricalFisher(model, batch, PMatDense, loss, function=function)
    f = function(batch)
    params = LayerCollection.from_model(model).parameters(model)
    g = torch.stack(
        [
            torch.cat([d.flatten() for d in torch.autograd.grad(one.sum(), params, retain_graph=True)])
            for one in loss(f, batch)
        ]
    )
    assert oracle.relative(E.to_torch(), g.T @ g / 3) < 1e-10
