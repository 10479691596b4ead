"""What a run, an evaluation and a merge compute on every architecture, against the model itself.

    python benchmarks/architectures.py --markdown docs/architectures.md

Each row is a tiny random base, built from transformers' configuration, in float32 on the CPU:

- run: one round at two sites in this process, with a checkpoint.
- loss, gradient: on the first site's examples with the trained adapter, against the plain model of
  transformers with W + (alpha / r) B A for weights. It reads the conversation as the chat template
  renders it, one at a time, without padding, cache or PEFT. Relative differences; of the gradient
  by Frobenius norm over all tensors of the adapter.
- evaluation: log-likelihoods of options after prompts read together, and one prompt at a time,
  against the plain model. Largest difference in nats.
- merge: logits of the exported model as plain transformers loads it. Largest difference. Of a
  composite also that all other parts are bit for bit those of the base.
- attention: what the attention that transformers chooses is off its eager one, in the plain model.

The plain model computes in float64, so that each figure is the rounding of the product alone.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from architectures_table import Row, page
from tiny_bases import BASES, Tiny, make_base

QUESTIONS = (
    "What helps against fever?",
    "What helps a patient of seven against a cough and a rash?",
    "Is tea of use?",
    "Which drug is given first for pain in the chest, and how much of it?",
)
ANSWERS = ("Rest.", "Two cups of tea, and rest against the rash.", "Yes", "Zyx, seven a day")
SAMPLE = ("llama", "gpt2", "mpt", "deepseek_v3", "mamba", "gemma3 (MedGemma)", "llama4")
"""The rows that CI computes."""


# --- The model itself -----------------------------------------------------------------------------


class Plain:
    """transformers' own model with an adapter's products added to its weights."""

    def __init__(self, folder: Path, checkpoint: Path, *, in_float64: bool) -> None:
        import torch
        from safetensors.torch import load_file
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, experts_implementation="eager"
        )
        dtype = torch.float64 if in_float64 else torch.float32
        self.model = model.to(dtype).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.factors = {
            name: tensor.to(dtype).requires_grad_()
            for name, tensor in load_file(checkpoint / "adapter_model.safetensors").items()
        }
        config = json.loads((checkpoint / "adapter_config.json").read_text())
        self._scale = config["lora_alpha"] / config["r"]
        ids, _ = self.conversation(QUESTIONS[1], ANSWERS[1])
        with torch.no_grad():
            before = self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
            moved = float((self.logits(ids) - before).abs().max() / before.std())
            if moved < 0.1:  # else agreement would show nothing
                raise RuntimeError(f"the run has moved the logits by {moved} deviations only")
            eager = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
            found = eager(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        self.attention = float((found - before).abs().max())

    def logits(self, ids: Sequence[int]) -> Any:
        """Return the logits of one text: (tokens, vocabulary)."""
        import torch
        from torch.func import functional_call
        from transformers.pytorch_utils import Conv1D

        weights = {}
        for name, a in self.factors.items():
            if ".lora_A." not in name:
                continue
            path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            change = self._scale * self.factors[name.replace(".lora_A.", ".lora_B.")] @ a
            module = self.model.get_submodule(path)
            is_turned = isinstance(module, Conv1D)
            weights[f"{path}.weight"] = module.weight.detach() + (change.T if is_turned else change)
        inputs = {"input_ids": torch.tensor([list(ids)]), "use_cache": False}
        return functional_call(self.model, weights, kwargs=inputs).logits[0]

    def conversation(self, question: str, answer: str) -> tuple[list[int], int]:
        """Return a rendered conversation's tokens, and how many of them are its prompt."""
        asked = [{"role": "user", "content": question}]
        told = [*asked, {"role": "assistant", "content": answer}]
        render = self.tokenizer.apply_chat_template
        prompt = render(asked, add_generation_prompt=True, tokenize=True, return_dict=False)
        return render(told, tokenize=True, return_dict=False), len(prompt)

    def continuation(self, prompt: Sequence[int], option: Sequence[int]) -> float:
        """Return the log-likelihood of a continuation."""
        import torch

        with torch.no_grad():
            logits = self.logits([*prompt, *option])
        return float(_log_likelihood(logits, [*prompt, *option], len(prompt)))


def _log_likelihood(logits: Any, ids: Sequence[int], prompt_tokens: int) -> Any:
    """Return the summed log-probability of all tokens after a prompt, in float64."""
    import torch

    scores = logits.double().log_softmax(dim=-1)[prompt_tokens - 1 : -1]
    targets = torch.tensor(list(ids[prompt_tokens:])).unsqueeze(1)
    return scores.gather(1, targets).sum()


# --- The product ----------------------------------------------------------------------------------


def run_settings(base: Path, work: Path) -> dict[str, Any]:
    """Return the settings of a run of one round at two sites."""
    data = work / "cards.jsonl"
    rows = [
        {"input": f"{question} {i}", "output": answer}
        for i in range(2)
        for question, answer in zip(QUESTIONS, ANSWERS, strict=True)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model.name": str(base),
        "model.lora.target-modules": "all-linear",
        "model.lora.peft-lora-r": 4,
        "model.lora.peft-lora-alpha": 8,
        "static.dataset.name": str(data),
        "data.num-partitions": 2,
        "data.prompt-template": "chat",
        "data.held-out-fraction": 0.25,
        "num-server-rounds": 1,
        "strategy.fraction-train": 1.0,
        "strategy.fraction-evaluate": 0.5,
        "train.save-every-round": 1,
        "train.num-threads": 1,
        "train.learning-rate-max": 2e-2,
        "train.learning-rate-min": 2e-2,
        "train.training-arguments.max-steps": 2,
        "train.training-arguments.per-device-train-batch-size": 3,
        "run-directory": str(work / "run"),
    }


def play(settings: Mapping[str, Any]) -> Any:
    """Play a run in this process; return its configuration."""
    from grandrounds.config import recipes
    from grandrounds.engines.in_process import run_in_process
    from grandrounds.server.listeners import Listener

    config = recipes.resolve(dict(settings))
    run_in_process(config, Listener())
    return config


def compare_training(row: Row, config: Any, plain: Plain, *, training: bool) -> None:
    """Compare loss and gradient of a site's examples, as a visit computes them."""
    from grandrounds.model import headroom, machine
    from grandrounds.model.loss import answer_nll_sum, attending
    from grandrounds.model.resident import checkpoint_activations
    from grandrounds.model.tokenizers import tokenizer_of
    from grandrounds.site.local_data import site_of

    resident = machine.prepare_model(config)
    set_adapter_of(resident, plain)
    checkpoint_activations(resident, headroom.checkpoints_activations(config))
    how, site = machine.forward(config), site_of(config, 0)
    resident.model.train(training)
    for parameter in resident.parameters.values():
        parameter.requires_grad_(True)
        parameter.grad = None
    pad = tokenizer_of(config.model.source).pad_token_id
    with attending(resident.model, how):
        loss = answer_nll_sum(resident.model, site.train, pad, resident.device, how)
        loss.backward()

    by_prompt = {}
    for question, answer in zip(QUESTIONS, ANSWERS, strict=True):
        for i in range(2):
            ids, prompt_tokens = plain.conversation(f"{question} {i}", answer)
            by_prompt[tuple(ids[:prompt_tokens])] = ids, prompt_tokens
    total: Any = 0.0
    for example in site.train:
        ids, prompt_tokens = by_prompt[example.input_ids[: example.prompt_tokens]]
        total = total - _log_likelihood(plain.logits(ids), ids, prompt_tokens)
    total.backward()
    row.loss = abs(float(loss.detach()) - float(total.detach())) / float(total.detach())
    apart, size = 0.0, 0.0
    for name, factor in plain.factors.items():
        ours = resident.parameters[name].grad
        theirs = factor.grad.double()
        found = theirs * 0 if ours is None else ours.double()
        apart += float((found - theirs).square().sum())
        size += float(theirs.square().sum())
    row.gradient = (apart / size) ** 0.5


def set_adapter_of(resident: Any, plain: Plain) -> None:
    """Give the resident model the adapter that the plain one adds."""
    from grandrounds.model.resident import set_adapter

    set_adapter(resident, {n: t.detach().float().numpy() for n, t in plain.factors.items()})


def compare_evaluation(row: Row, config: Any, plain: Plain) -> None:
    """Compare the log-likelihoods of options, prompts read together and alone."""
    from grandrounds.model import machine
    from grandrounds.model.prefill import evaluating, proven_layout
    from grandrounds.model.scoring import option_log_likelihoods

    resident = machine.prepare_model(config)
    set_adapter_of(resident, plain)
    encode = plain.tokenizer.encode
    prompts = [encode(f"Answer in one word. Question: {question}") for question in QUESTIONS]
    options = [[encode(" yes"), encode(" no, never")] for _ in prompts]
    expected = [
        [plain.continuation(prompt, option) for option in choices]
        for prompt, choices in zip(prompts, options, strict=True)
    ]
    alone = [
        option_log_likelihoods(resident.model, [prompt], [choices])[0]
        for prompt, choices in zip(prompts, options, strict=True)
    ]
    together = option_log_likelihoods(resident.model, prompts, options)
    with evaluating(resident.model):
        row.layout = proven_layout(resident.model, max(map(len, prompts)))
    row.together, row.alone = _furthest(together, expected), _furthest(alone, expected)


def _furthest(found: list[list[float]], expected: list[list[float]]) -> float:
    pairs = zip(chain(*found), chain(*expected), strict=True)
    return max(abs(one - other) for one, other in pairs)


def compare_merge(row: Row, tiny: Tiny, folder: Path, work: Path, plain: Plain) -> None:
    """Compare the merged model, as plain transformers loads it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    from grandrounds.server.directory import find_checkpoint
    from grandrounds.study.export import export

    merged = work / "merged"
    export(find_checkpoint(work / "run"), merge=True, to=merged)
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    ids, _ = plain.conversation(QUESTIONS[1], ANSWERS[1])
    with torch.no_grad():
        found = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        row.merged = float((found - plain.logits(ids)).abs().max())
    if tiny.part is None:
        return
    whole, base = (
        AutoModelForImageTextToText.from_pretrained(place).state_dict()
        for place in (merged, folder)
    )
    changed = sum(not torch.equal(whole[name], tensor) for name, tensor in base.items())
    adapted = len(plain.factors) // 2
    if whole.keys() != base.keys() or changed != adapted:
        row.crash = f"{changed} tensors differ in the merged model, and {adapted} were adapted"
    row.parts = len(base) - changed


# --- Rows -----------------------------------------------------------------------------------------


def measure(name: str, tiny: Tiny, work: Path) -> Row:
    """Return the row of one architecture."""
    from grandrounds.errors import GrandRoundsError

    row, folder, started = Row(name), work / "base", time.perf_counter()
    try:
        make_base(tiny, folder)
        config = play(run_settings(folder, work))
        plan = json.loads((work / "run" / "plan.json").read_text())
        row.adapted = ", ".join(plan["target-modules"])
        row.frozen = ", ".join(plan.get("frozen-modules", ()))
        checkpoint = work / "run" / "peft_1"
        plain = Plain(folder, checkpoint, in_float64=tiny.in_float64)
        row.attention = plain.attention
        compare_training(row, config, plain, training=not tiny.is_random)
        compare_merge(row, tiny, folder, work, plain)
        compare_evaluation(row, config, plain)
    except GrandRoundsError as error:
        row.line = str(error).replace(str(folder), "BASE")
    except Exception as error:
        row.crash = f"{type(error).__name__}: {error}".splitlines()[0]
        if os.environ.get("TRACE"):
            raise
    row.seconds = time.perf_counter() - started
    return row


def rows_of(names: Sequence[str], tell: Callable[[str], None]) -> Iterator[Row]:
    """Yield the rows of architectures, telling of each."""
    for number, name in enumerate(names, 1):
        with tempfile.TemporaryDirectory() as folder:
            row = measure(name, BASES[name], Path(folder))
        verdict = row.crash or row.line or ("right" if row.is_right else "WRONG")
        tell(f"{number}/{len(names)} {name}: {verdict[:150]} ({row.seconds:.1f} s)")
        yield row


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write JSON or Markdown; 1 if a row is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="rows, by default all")
    parser.add_argument("--sample", action="store_true", help="the rows that CI computes")
    parser.add_argument("--out", type=Path, help="file for the figures as JSON")
    parser.add_argument("--markdown", type=Path, help="page to write")
    given = parser.parse_args(arguments)
    if unknown := [name for name in given.names if name not in BASES]:
        parser.error(f"no such row: {unknown[0]!r}; one of: {', '.join(BASES)}")
    from grandrounds.quiet import quiet_libraries

    quiet_libraries()
    names = given.names or (list(SAMPLE) if given.sample else list(BASES))
    rows = list(rows_of(names, lambda line: print(line, file=sys.stderr, flush=True)))
    if given.markdown:
        given.markdown.write_text(page(rows), encoding="utf-8")
    if given.out:
        given.out.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    if not given.out and not given.markdown:
        for row in rows:
            print(json.dumps(asdict(row)))
    return 0 if all(row.is_right for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
