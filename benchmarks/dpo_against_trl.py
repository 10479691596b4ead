"""Loss and gradient of DPO beside those of TRL's DPOTrainer, on the same batch in float32.

    pip install trl && python benchmarks/dpo_against_trl.py

The embedded base with a drawn adapter, and pairs of `formulary-preferences`. Reference: the base,
as TRL has it for a new adapter; or a frozen copy of an earlier adapter, as TRL has it for one that
is trained on. Each with log-probabilities summed, and normalised by length.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from grandrounds.config import recipes
from grandrounds.data.formulary import base_path
from grandrounds.data.tokenization import TokenizedExample
from grandrounds.model import machine
from grandrounds.model.lora import adapter_parameters
from grandrounds.model.resident import Resident, set_adapter
from grandrounds.model.tokenizers import run_tokenizer
from grandrounds.site.devices.shares import backward as backward_of
from grandrounds.site.devices.shares import passes
from grandrounds.site.local_data import site_of
from grandrounds.site.preferences import against_reference
from grandrounds.wire.adapter import Adapter

PAIRS, BETA = 8, 0.3


@dataclass(frozen=True)
class Difference:
    """Ours beside TRL's on one batch."""

    reference: str
    length_normalised: bool
    loss: float
    """Ours, in nats per pair."""
    of_loss: float
    """Absolute difference of the losses."""
    of_gradient: float
    """Largest absolute difference of a value of the gradient."""
    gradient: float
    """Largest absolute value of the gradient."""


def drawn(shapes: dict[str, tuple[int, ...]], seed: int) -> Adapter:
    """Return an adapter of which A and B are both random."""
    rng = np.random.default_rng(seed)
    return {n: (0.03 * rng.normal(size=s)).astype(np.float32) for n, s in shapes.items()}


def ours(
    resident: Resident, config: Any, pairs: list[TokenizedExample], start: Adapter, now: Adapter
) -> tuple[float, dict[str, torch.Tensor]]:
    """Return loss and gradient of a step: the reference is read of `start`, the loss of `now`."""
    set_adapter(resident, start)
    preferring = against_reference(config, resident, [pairs])
    set_adapter(resident, now)
    for parameter in resident.parameters.values():
        parameter.requires_grad_(True)
        parameter.grad = None
    [one] = passes([pairs], 1, 0, 0)
    pad, how = run_tokenizer(config).pad_token_id, machine.forward(config)
    total = backward_of(resident.model.train(), one, pad, resident.device, how, preferring)
    found = {n: p.grad.clone() for n, p in resident.parameters.items() if p.grad is not None}
    return float(total) / len(pairs), found


def theirs(
    config: Any, pairs: list[TokenizedExample], start: Adapter, now: Adapter
) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the same of TRL's trainer."""
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    normalised, lora = config.train.dpo_length_normalised, config.lora
    how = LoraConfig(
        r=lora.peft_lora_r,
        lora_alpha=lora.peft_lora_alpha,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    model = AutoModelForCausalLM.from_pretrained(base_path(), dtype=torch.float32)
    is_received = config.train.dpo_reference == "received"
    if is_received:
        model = get_peft_model(model, how)
        put(model, start)
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * len(pairs)
    with tempfile.TemporaryDirectory() as folder:
        trainer = DPOTrainer(
            model,
            args=DPOConfig(
                output_dir=folder,
                beta=BETA,
                loss_type=["sigmoid_norm" if normalised else "sigmoid"],
                per_device_train_batch_size=len(pairs),
                gradient_checkpointing=False,
                bf16=False,
                use_cpu=True,
                report_to=[],
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=run_tokenizer(config),
            peft_config=None if is_received else how,
        )
        put(trainer.model, now)
        ids = [
            {
                "prompt_ids": list(pair.input_ids[: pair.prompt_tokens]),
                "chosen_ids": list(pair.input_ids[pair.prompt_tokens :]),
                "rejected_ids": list(pair.rejected),
            }
            for pair in pairs
        ]
        trainer.model.train()
        loss = trainer.compute_loss(trainer.model, trainer.data_collator(ids))
        loss.backward()
    gradients = adapter_parameters(trainer.model)
    return float(loss.detach()), {n: p.grad for n, p in gradients.items() if p.grad is not None}


@torch.no_grad()
def put(model: Any, adapter: Adapter) -> None:
    """Copy an adapter into the trained one of a PEFT model."""
    for name, parameter in adapter_parameters(model).items():
        parameter.copy_(torch.tensor(adapter[name]))


def differences() -> Iterator[Difference]:
    """Yield ours beside TRL's for both references, summed and normalised by length."""
    for reference in ("base", "received"):
        for normalised in (False, True):
            config = recipes.resolve(
                {
                    "static.dataset.name": "formulary-preferences",
                    "train.objective": "dpo",
                    "train.dpo-beta": BETA,
                    "train.dpo-reference": reference,
                    "train.dpo-length-normalised": normalised,
                    "train.num-threads": 1,
                }
            )
            pairs = list(site_of(config, 0).train[:PAIRS])
            resident = machine.prepare_model(config)
            shapes = {name: tuple(p.shape) for name, p in resident.parameters.items()}
            start, now = drawn(shapes, 1), drawn(shapes, 2)
            loss, gradient = ours(resident, config, pairs, start, now)
            their_loss, their_gradient = theirs(config, pairs, start, now)
            if gradient.keys() != their_gradient.keys():
                raise ValueError("the gradients are of different tensors")
            yield Difference(
                reference,
                normalised,
                loss,
                abs(loss - their_loss),
                max(float((gradient[n] - their_gradient[n]).abs().max()) for n in gradient),
                max(float(tensor.abs().max()) for tensor in gradient.values()),
            )


if __name__ == "__main__":
    import trl

    print(f"trl {trl.__version__}, torch {torch.__version__}, {PAIRS} pairs, beta {BETA}")
    print(
        f"{'reference':>10}{'normalised':>12}{'loss':>10}{'difference':>12}"
        f"{'gradient':>12}{'difference':>12}"
    )
    for found in differences():
        print(
            f"{found.reference:>10}{found.length_normalised!s:>12}{found.loss:10.6f}"
            f"{found.of_loss:12.1e}{found.gradient:12.1e}{found.of_gradient:12.1e}"
        )
