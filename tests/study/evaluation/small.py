"""A few benchmark items, an adapter saved by plain PEFT, and an evaluation in one call."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grandrounds.study.evaluation.benchmarks import load_questions
from grandrounds.study.evaluation.runner import Listener, evaluate
from grandrounds.study.evaluation.tasks import EvaluationTasks, Method, find_target
from tests.conftest import WORDS

MEDMCQA, PUBMEDQA = 14, 6
"""Items written for the tests."""


def evaluate_target(
    target: Path | str,
    *,
    base: str | None = None,
    quantization: int | None = None,
    benchmarks: Sequence[str] | None = None,
    data: Path | None = None,
    limit: int | None = None,
    out: Path | None = None,
    resume: bool = False,
    listener: Listener = lambda event, values: None,
    **method: Any,
) -> dict[str, Any]:
    """Resolve a target and its questions, and evaluate."""
    found = find_target(str(target), base, quantization)
    questions = load_questions(benchmarks or found.benchmarks, data, limit)
    tasks = EvaluationTasks(found, questions, Method(**method), out)
    return evaluate(tasks, resume=resume, listener=listener)


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def medmcqa_rows(count: int) -> list[dict[str, Any]]:
    """Rows in the hub's columns, of different lengths."""
    options = ("opa", "opb", "opc", "opd")
    return [
        {
            "question": f"What helps patient {i} against {' and '.join(WORDS[: 1 + i % 5])}?",
            **{name: f"{WORDS[(i + j) % 10]} tea" for j, name in enumerate(options)},
            "cop": i % 4,
        }
        for i in range(count)
    ]


def save_adapter(base: Path, folder: Path, *, trained: bool = True, **config: Any) -> Path:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **config}
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **settings)
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and trained:
                parameter.normal_(0.0, 0.5)
    model.save_pretrained(folder)
    return folder
