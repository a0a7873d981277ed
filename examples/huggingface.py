"""Models of Hugging Face
======================

Models of Hugging Face as they come: minibatches are the dicts of a DataLoader and its collator, labels are in there.

A causal language model (GPT-2) and a sequence classifier (BERT), small and of random text, trained for a moment. For
both: the empirical Fisher matrix, the Gauss-Newton matrix, products with the Hessian, and the training sequences that
matter most for a query. Three keywords say what a minibatch is: ``function`` calls the model, ``targets`` are what the
loss receives beside the logits, ``loss`` is what was trained, as a function of the logits (TokenCrossEntropy) or as the
model computes it (OwnLoss). Each number is checked against a plain loop for one example.

::

    python examples/huggingface.py            half a minute
    python examples/huggingface.py --small    the same code on less
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    default_data_collator,
    logging,
)

from nngeometry import (
    GGN,
    EmpiricalFisher,
    Hessian,
    Influence,
    OwnLoss,
    PMatDiag,
    PMatEKFAC,
    PMatImplicit,
    PVector,
    TokenCrossEntropy,
)

Batch = dict[str, Tensor]
VOCABULARY = 24
IGNORED = -100


# %%
# Sentences are random walks. Collators pad them and make labels as those of transformers do.
def sentences(n: int, longest: int) -> list[dict[str, list[int]]]:
    """Random walks on the vocabulary, of unlike lengths; a sentence that goes up is of class 1."""
    found = []
    for _ in range(n):
        length = int(torch.randint(longest // 2, longest + 1, ()))
        step = int(torch.randint(2, ())) * 2 - 1
        walk = torch.randint(VOCABULARY, ()) + (step * torch.randint(3, (length,))).cumsum(0)
        found.append({"input_ids": (walk % VOCABULARY).tolist(), "label": (step + 1) // 2})
    return found


def padded(rows: list[dict[str, Any]], longest: int) -> list[dict[str, Any]]:
    """As a tokenizer pads them."""
    ids = [row["input_ids"] for row in rows]
    masks = [[1] * len(one) + [0] * (longest - len(one)) for one in ids]
    ids = [one + [0] * (longest - len(one)) for one in ids]
    return [{**row, "input_ids": one, "attention_mask": m} for row, one, m in zip(rows, ids, masks, strict=True)]


def language_collator(rows: list[dict[str, Any]]) -> Batch:
    """Labels are the inputs, with padding ignored, as DataCollatorForLanguageModeling(mlm=False) makes them."""
    batch: Batch = default_data_collator([{k: v for k, v in row.items() if k != "label"} for row in rows])
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
    return batch


# %%
# The loop of training is the usual one: the model computes its own loss.
def train(model: nn.Module, loader: DataLoader[Any], steps: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(steps):
        for batch in loader:
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
    model.eval()


# %%
# Plain loops for one example at a time are what the results are checked against.
def loop(model: nn.Module, batches: list[Batch], scale: Any) -> Tensor:
    """The gradients of single examples, one forward and backward pass of the user's model each: ``(n, P)``."""
    rows = []
    for batch in batches:
        for k in range(len(batch["labels"])):
            one = {name: t[k : k + 1] for name, t in batch.items()}
            grads = torch.autograd.grad(model(**one).loss * scale(one), list(model.parameters()), allow_unused=True)
            each = zip(grads, model.parameters(), strict=True)
            rows.append(torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in each]))
    return torch.stack(rows)


def twice(model: nn.Module, batches: list[Batch], scale: Any, v: Tensor) -> Tensor:
    """The Hessian of the mean loss times v. Fused attention cannot be differentiated twice."""
    parameters = list(model.parameters())
    with sdpa_kernel(SDPBackend.MATH):
        value = sum(model(**b).loss * scale(b) for b in batches) / sum(scale(b) for b in batches)
    g = torch.autograd.grad(value, parameters, create_graph=True, materialize_grads=True, allow_unused=True)
    along = torch.cat([x.flatten() for x in g]) @ v
    Hv = torch.autograd.grad(along, parameters, materialize_grads=True, allow_unused=True)
    return torch.cat([x.flatten() for x in Hv])


def check(name: str, ours: Tensor, truth: Tensor, tolerance: float = 1e-5) -> None:
    """transformers computes the loss of a language model in single precision, whatever the model is in."""
    error = float((ours - truth).norm() / truth.norm())
    print(f"  {name:<58} error {error:.0e}")
    if not error < tolerance:
        raise AssertionError(f"{name}: {error}")


# %%
# ``function`` calls the model, ``targets`` names what the loss receives, and ``loss`` is what was trained.
def look(model: nn.Module, loader: DataLoader[Any], loss: Any, count: Any, function: Any) -> None:
    """All that is shown, for one model. count: what the loss of a minibatch counts in the mean over the data set."""
    print(f"{type(model).__name__}, {sum(p.numel() for p in model.parameters())} parameters")
    batches, options = list(loader), {"function": function, "targets": "labels"}
    first = {name: t[:1] for name, t in batches[0].items()}

    gradients = loop(model, batches, count)
    n = len(gradients)
    fisher = EmpiricalFisher(model, loader, PMatDiag, loss, **options)
    check("diagonal of the empirical Fisher", fisher.get_diag(), gradients.square().mean(0))
    singles = [
        {name: t[k : k + 1] for name, t in batch.items()} for batch in batches for k in range(len(batch["labels"]))
    ]
    own = EmpiricalFisher(model, singles, PMatDiag, OwnLoss())
    check("the same of the model's own loss", own.get_diag(), loop(model, batches, lambda one: 1).square().mean(0))

    hessian = Hessian(model, loader, PMatImplicit, loss, **options)
    v = PVector.from_model(model).clone().detach()
    Hv = twice(model, batches, count, v.to_torch())
    check("product with the Hessian", hessian.mv(v).to_torch(), Hv)
    own_hessian = Hessian(model, loader, PMatImplicit, OwnLoss(count))
    check("the same of the model's own loss", own_hessian.mv(v).to_torch(), Hv)

    ggn = GGN(model, loader, PMatEKFAC, loss, **options)
    products = GGN(model, loader, PMatImplicit, loss, **options)
    check("trace of the Gauss-Newton matrix: EKFAC and autograd", ggn.trace(), products.trace())

    influence = Influence(model, ggn, loss, regul=1e-2, **options)
    scores, order = influence.top(first, loader, k=3)
    helpful = PVector(ggn.layer_collection, gradients[order[0, 0]])
    expected = gradients[0] @ ggn.solve(helpful, regul=1e-2).to_torch()
    check("influence of the most helpful example", scores[0, 0], expected)
    print(f"  of {n} examples, those that help the first most: {order[0].tolist()}\n")


# %%
# The same function looks at a language model and at a classifier.
def main(small: bool) -> None:
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    n, longest, width = (12, 8, 8) if small else (64, 12, 16)
    rows = padded(sentences(n, longest), longest)

    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=longest, n_embd=width, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    language = GPT2LMHeadModel(config)
    loader: DataLoader[Any] = DataLoader(rows, batch_size=5, collate_fn=language_collator)  # type: ignore[arg-type]
    train(language, loader, 5)
    look(
        language,
        loader,
        TokenCrossEntropy(shift=True),  # the token after each, where that is no padding
        lambda batch: int((batch["labels"][:, 1:] != IGNORED).sum()),
        lambda batch: language(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits,
    )

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=2 * width,
        max_position_embeddings=longest,
    )
    classifier = BertForSequenceClassification(config)
    loader = DataLoader(rows, batch_size=5, collate_fn=default_data_collator)  # type: ignore[arg-type]
    train(classifier, loader, 5)
    look(
        classifier,
        loader,
        nn.CrossEntropyLoss(),
        lambda batch: len(batch["labels"]),
        lambda batch: classifier(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="smaller models and fewer sentences")
    main(parser.parse_args().small)
