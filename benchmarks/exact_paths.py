"""How far the loss and its gradient are from float32 with plain attention, on two layers.

    python benchmarks/exact_paths.py --architecture llama-3-8b --quantization 4

Two layers of an architecture with random weights and an adapter that is not zero see 16 examples as
long as real ones. The truth is transformers' eager attention in float32, without TF32, one example
at a time, on the same weights, dequantised where they are in 4 bits. Beside it stand the project's
own path, as a visit takes it on this device, the same without fused kernels, with padding too, and
transformers' own way with padding, all in the types of the device.

A loss near another's is no proof: errors are relative L2 norms of the gradient of all factors.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

from bare_loops import padded
from random_base import model_config, write_base

LAYERS, VOCABULARY, EXAMPLES = 2, 32_000, 16


def examples_of(vocabulary: int, longest: int) -> list[Any]:
    """Return random examples of 20 to `longest` tokens."""
    from grandrounds.data.tokenization import TokenizedExample

    draw = random.Random(3)
    found = []
    for place in range(EXAMPLES):
        tokens = longest if not place else draw.randint(20, longest)
        ids = tuple(draw.randrange(3, vocabulary) for _ in range(tokens))
        found.append(TokenizedExample(ids, draw.randint(5, 15)))
    return found


def float32_model(resident: Any) -> Any:
    """Return the same model in float32 with eager attention; 4-bit weights are dequantised."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    own = resident.model
    config = type(own.get_base_model().config).from_dict(own.get_base_model().config.to_dict())
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = "float32"
    with torch.device(resident.device):
        plain = AutoModelForCausalLM.from_config(
            config, attn_implementation="eager", dtype=torch.float32
        )
    plain = get_peft_model(plain, own.peft_config["default"])
    weights = {name: value(parameter) for name, parameter in own.named_parameters()}
    weights |= {n: b for n, b in own.named_buffers() if n in dict(plain.named_buffers())}
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(weights[name])
    return plain.eval()


def value(parameter: Any) -> Any:
    """Return a parameter's values in float32, dequantised if it is in 4 bits."""
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return parameter.detach().float()
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(parameter.data, state).float()


def gradient_of(model: Any) -> Any:
    """Return the gradient of all factors as one float64 vector, and forget it."""
    import torch

    found = []
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            gradient = parameter.grad
            found.append(torch.zeros_like(parameter) if gradient is None else gradient)
            parameter.grad = None
    return torch.cat([g.detach().double().flatten() for g in found])


def truth_of(plain: Any, batch: list[Any], device: Any, answers: int) -> tuple[float, Any]:
    """Return loss and gradient in float32, one example at a time."""
    from torch.nn.functional import cross_entropy

    total = 0.0
    for example in batch:
        ids, _, labels = (t.to(device) for t in padded([example]))
        logits = plain(input_ids=ids, use_cache=False).logits[0, :-1]
        loss = cross_entropy(logits, labels[0, 1:], reduction="sum", ignore_index=-100) / answers
        loss.backward()
        total += float(loss.detach())
    return total, gradient_of(plain)


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Return the errors of every arm."""
    import torch
    from torch.nn.functional import cross_entropy

    from grandrounds.config import recipes
    from grandrounds.model import machine
    from grandrounds.model.base import device_and_dtype, has_bfloat16
    from grandrounds.model.loss import answer_nll_sum, attending, mixed_precision

    torch.manual_seed(4)
    device, dtype = device_and_dtype("auto")
    shapes = model_config(given.architecture).to_dict()
    shapes |= {"num_hidden_layers": LAYERS, "vocab_size": min(VOCABULARY, shapes["vocab_size"])}
    shapes.pop("layer_types", None)
    with tempfile.TemporaryDirectory(dir=given.scratch) as folder:
        written = Path(folder, "shapes.json")
        written.write_text(json.dumps(shapes))
        base = Path(folder, "base")
        write_base(str(written), base, str(device), str(dtype).removeprefix("torch."))
        config = recipes.resolve(
            {
                "model.name": str(base),
                "model.quantization": given.quantization,
                "model.lora.target-modules": given.targets,
                "model.lora.peft-lora-r": 8,
                "train.num-threads": given.threads,
            }
        )
        resident, how = machine.prepare_model(config), machine.forward(config)
    with torch.no_grad():
        for name, parameter in resident.parameters.items():
            if name.endswith("lora_B.weight"):
                parameter.normal_(0.0, 0.02)
    batch = examples_of(shapes["vocab_size"], given.tokens)
    answers = sum(len(e.input_ids) - e.prompt_tokens for e in batch)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    loss, gradient = truth_of(float32_model(resident), batch, device, answers)
    torch.backends.cuda.matmul.allow_tf32 = before
    plain = dataclasses.replace(how, fused=False)
    arms = {
        "ours": how,
        "without fused kernels": plain,
        "and padded": dataclasses.replace(plain, padding_free=False),
    }
    rows = {}
    resident.model.train()
    for name, means in arms.items():
        with attending(resident.model, means):
            own = answer_nll_sum(resident.model, batch, 0, device, means) / answers
            own.backward()
        rows[name] = errors(float(own.detach()), gradient_of(resident.model), loss, gradient)
    ids, mask, labels = (t.to(device) for t in padded(batch))
    with mixed_precision(device, has_bfloat16()):
        logits = resident.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    flat = logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
    own = cross_entropy(*flat, reduction="sum", ignore_index=-100) / answers
    own.backward()
    rows["transformers, padded"] = errors(
        float(own.detach()), gradient_of(resident.model), loss, gradient
    )
    return {
        "architecture": given.architecture,
        "quantization": given.quantization,
        "dtype": str(dtype).removeprefix("torch."),
        "loss": loss,
        "rows": rows,
    }


def errors(loss: float, gradient: Any, true_loss: float, true_gradient: Any) -> dict[str, float]:
    """Return the relative errors of a loss and of its gradient."""
    return {
        "loss_error": abs(loss - true_loss) / true_loss,
        "gradient_error": float((gradient - true_gradient).norm() / true_gradient.norm()),
    }


def lines(result: dict[str, Any]) -> list[str]:
    """Return the result in lines."""
    found = [
        f"two layers of {result['architecture']}, {result['quantization'] or 'no'} bits, "
        f"{result['dtype']}, against float32 eager",
        f"{'':<28}{'loss':>12}{'gradient':>12}",
    ]
    for name, row in result["rows"].items():
        found.append(f"{name:<28}{row['loss_error']:>12.2e}{row['gradient_error']:>12.2e}")
    return found


def main() -> None:
    """Measure; print a table, write JSON; end with 1 if ours is further away than transformers'."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--architecture", default="tiny")
    parser.add_argument("--quantization", type=int, choices=(0, 4), default=0)
    parser.add_argument("--targets", default="q_proj,v_proj,o_proj,down_proj")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--scratch", type=Path, help="where the base is written")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    from grandrounds.quiet import quiet_libraries

    quiet_libraries()
    result = measure(given)
    print("\n".join(lines(result)))
    if given.out:
        given.out.write_text(json.dumps(result, indent=2) + "\n")
    rows = result["rows"]
    allowed = 1.1 * rows["transformers, padded"]["gradient_error"] + 1e-5
    if rows["ours"]["gradient_error"] > allowed:
        sys.exit(f"exact_paths: ours is further from the truth than {allowed:.2e}")


if __name__ == "__main__":
    main()
