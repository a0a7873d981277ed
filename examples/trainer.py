"""The Trainer of Hugging Face
===========================

The Trainer of transformers takes any optimiser of torch by ``optimizers=``. One method more shows it the minibatches.

A small GPT-2 learns the letters of a text that comes with Python (the topics of ``help()``), with K-FAC and with the
AdamW that the Trainer makes itself. Rates were tuned for both. K-FAC is ahead after the same number of steps; a step of
it costs three of AdamW, as the picture against seconds shows. The training by K-FAC is then stopped in the middle and
resumed from the Trainer's own checkpoint: the weights at the end are the same to the bit.

::

    python examples/trainer.py            half a minute
    python examples/trainer.py --small    the same code on less
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    logging,
)

from nngeometry import GGN_MonteCarlo, TokenCrossEntropy
from nngeometry.optim import SecondOrderOptimizer
from nngeometry.plot import plot_optimisation

PICTURE = Path(__file__).parent / "output" / "trainer.png"
LENGTH = 32


# %%
# The optimiser folds each minibatch into its running matrix after the backward pass. ``inputs`` is the dict that the
# model gets: the same keywords as anywhere in this library say what the loss is.
class SecondOrderTrainer(Trainer):  # type: ignore[misc]
    """A Trainer whose optimiser sees the minibatches."""

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any) -> Tensor:
        loss: Tensor = super().training_step(model, inputs, *args)
        self.optimizer.optimizer.observe(inputs)  # within the wrapper of accelerate
        return loss


def k_fac(model: nn.Module) -> SecondOrderOptimizer:
    """K-FAC of the Gauss-Newton matrix of the loss, which is a mean over tokens, by one drawn label for each token."""
    return SecondOrderOptimizer(
        model,
        matrix=GGN_MonteCarlo,
        lr=0.03,
        damping=1e-2,
        clip=1e-3,
        function=lambda batch: model(input_ids=batch["input_ids"]).logits,
        loss=TokenCrossEntropy(shift=True),
        targets="labels",
    )


# %%
# Data are windows of the text. Dropout is off: it would make the derivative of an example random.
class Windows(Dataset[dict[str, Tensor]]):
    """Windows of letters, each the label of the one before it."""

    def __init__(self, count: int) -> None:
        text = " ".join(topics[name] for name in sorted(topics))
        self.letters = sorted({letter for letter in text if letter.isascii()})
        number = {letter: k for k, letter in enumerate(self.letters)}
        self.tokens = torch.tensor([number[letter] for letter in text if letter in number])
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, k: int) -> dict[str, Tensor]:
        start = k * LENGTH
        window = self.tokens[start : start + LENGTH]
        return {"input_ids": window, "labels": window}


def gpt2(letters: int) -> nn.Module:
    """A small one."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=letters,
        n_positions=LENGTH,
        n_embd=32,
        n_layer=2,
        n_head=4,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=False,
    )
    model: nn.Module = GPT2LMHeadModel(config)
    return model


# %%
# All else is the Trainer's: its schedule, its clipping of gradients, its checkpoints.
class Note(TrainerCallback):  # type: ignore[misc]
    """Losses, and the seconds since the start."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.run: dict[str, list[float]] = {"loss": [], "seconds": []}

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" in logs:
            self.run["loss"].append(logs["loss"])
            self.run["seconds"].append(time.perf_counter() - self.start)


def trained(
    data: Windows, steps: int, folder: str, second_order: bool, resume: bool = False, stop: int | None = None
) -> tuple[nn.Module, Note]:
    """A model, and how it went. stop: after how many steps it is stopped, a checkpoint having been written."""
    model, note = gpt2(len(data.letters)), Note()
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=16,
        learning_rate=6e-3,
        logging_steps=1,
        save_strategy="steps" if second_order else "no",
        save_steps=steps // 2,
        lr_scheduler_type="linear",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    options: dict[str, Any] = {}
    if second_order:
        optimizer = k_fac(model)
        options["optimizers"] = (optimizer, torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.05, steps))
    callbacks = [note] if stop is None else [note, StopAfter(stop)]
    kind = SecondOrderTrainer if second_order else Trainer
    trainer = kind(model=model, args=arguments, train_dataset=data, callbacks=callbacks, **options)
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=resume)
    return model, note


class StopAfter(TrainerCallback):  # type: ignore[misc]
    """Ends a training early."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step >= self.steps


# %%
# The picture shows losses against steps and against seconds.
def main(small: bool) -> None:
    steps = 10 if small else 200
    data = Windows(16 * steps)
    with tempfile.TemporaryDirectory() as folder:
        model, note = trained(data, steps, f"{folder}/whole", second_order=True)
        _, adam = trained(data, steps, f"{folder}/adam", second_order=False)
        trained(data, steps, f"{folder}/parts", second_order=True, stop=steps // 2)
        resumed, _ = trained(data, steps, f"{folder}/parts", second_order=True, resume=True)
    last = steps // 10
    for name, run in (("K-FAC", note.run), ("AdamW", adam.run)):
        print(
            f"{name:6} loss {sum(run['loss'][-last:]) / last:.3f} after {steps} steps, {run['seconds'][-1]:.0f} seconds"
        )
    pairs = zip(model.parameters(), resumed.parameters(), strict=True)
    print(f"resumed from the checkpoint, the same weights: {all(torch.equal(a, b) for a, b in pairs)}")
    PICTURE.parent.mkdir(exist_ok=True)
    plot_optimisation({"K-FAC": note.run, "AdamW": adam.run}, PICTURE)
    print(f"Picture: {PICTURE}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="the same code on less")
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    main(parser.parse_args().small)
