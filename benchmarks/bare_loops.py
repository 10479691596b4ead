"""Training steps with nothing around them, for comparison; no script by itself.

`bare_visit` is a plain PyTorch loop; `template_visit` does what the FlowerTune template's client
does at each visit.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

RATE, RANK, ALPHA = 1e-5, 8, 32
TARGETS = ["q_proj", "v_proj"]
STEPS, BATCH, TOKENS = 6, 16, 512

BARE = ("same", "neither", "grouped", "answers")
"""Arms of full_size.py that are `bare_visit` by one means or another."""


def padded(batch: Sequence[Any]) -> tuple[Any, Any, Any]:
    """Return input_ids, attention_mask and labels of a padded batch."""
    import torch

    longest = max(len(e.input_ids) for e in batch)
    ids = torch.zeros((len(batch), longest), dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, example in enumerate(batch):
        tokens = torch.tensor(example.input_ids)
        ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
        labels[row, example.prompt_tokens : len(tokens)] = tokens[example.prompt_tokens :]
    return ids, mask, labels


def whole_loss(model: Any, batch: Sequence[Any], device: Any, bf16: bool) -> Any:
    """Return the mean loss by transformers' own means, over all logits."""
    from grandrounds.model.loss import mixed_precision

    ids, mask, labels = (t.to(device) for t in padded(batch))
    with mixed_precision(device, bf16):
        return model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss


def lean_loss(model: Any, batch: Sequence[Any], device: Any, how: Any) -> Any:
    """Return the mean loss by the means of a visit."""
    from grandrounds.model.loss import answer_nll_sum

    count = sum(len(e.input_ids) - e.prompt_tokens for e in batch)
    return answer_nll_sum(model, batch, 0, device, how) / count


def bare_visit(
    model: Any,
    parameters: list[Any],
    batches: Sequence[Any],
    optimizer: str,
    loss: Callable[[Any], Any],
) -> None:
    """Take the steps of one visit, with nothing around them."""
    import torch

    steps = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0, fused=True)
    if optimizer != "adamw_torch":
        import bitsandbytes

        steps = bitsandbytes.optim.AdamW8bit(parameters, lr=RATE, weight_decay=0.0)
    model.train()
    for batch in batches:
        loss(batch).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        steps.step()
        steps.zero_grad(set_to_none=True)


def template_visit(base: Path, batches: Sequence[Any], quantization: int, optimizer: str) -> None:
    """Take one visit as FlowerTune's template does: load, prepare, train on all logits."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from grandrounds.model.base import device_and_dtype, has_bfloat16

    device, dtype = device_and_dtype("auto")
    quantized = {
        4: BitsAndBytesConfig(load_in_4bit=True),  # the library's default: FP4, float32
        8: BitsAndBytesConfig(load_in_8bit=True),
    }.get(quantization)
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=dtype, quantization_config=quantized, device_map={"": device}
    )
    model.config.use_cache = False
    if quantized is not None:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    # transformers 5.23 renamed it.
    checkpoint = getattr(model, "activation_checkpointing_enable", None)
    (checkpoint or model.gradient_checkpointing_enable)({"use_reentrant": False})
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    parameters = [p for p in model.parameters() if p.requires_grad]
    bf16 = device.type == "cuda" and has_bfloat16()
    loss = functools.partial(whole_loss, model, device=device, bf16=bf16)
    bare_visit(model, parameters, batches, optimizer, loss)
    synchronize()
    del model, parameters, loss
    free()


def free() -> None:
    """Let go of what nobody holds."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def synchronize() -> None:
    """Wait until the GPU has done what it was given."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
