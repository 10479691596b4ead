"""The rows of `benchmarks/architectures.py`, and the page that shows them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

TOLERANCE = 1e-5
"""Largest relative difference of loss and gradient."""

NATS = 1e-4
"""Largest difference of a log-likelihood or a logit; float32 sums in another order."""


@dataclass
class Row:
    """What was measured on one architecture."""

    name: str
    adapted: str = ""
    """Target modules under `all-linear`."""
    frozen: str = ""
    """What `all-linear` leaves out."""
    loss: float | None = None
    gradient: float | None = None
    layout: str = ""
    """How prompts are read: shared, batched or single."""
    together: float | None = None
    """Largest difference of a log-likelihood, prompts read together."""
    alone: float | None = None
    """The same, one prompt at a time."""
    merged: float | None = None
    parts: int = 0
    """Tensors of a composite's other parts that the merged model has unchanged."""
    attention: float | None = None
    """Largest difference of a logit between the plain model's attention and its eager one."""
    line: str = ""
    """What is said instead of a result."""
    crash: str = ""
    """A traceback's last line: a fault."""
    seconds: float = 0.0

    @property
    def is_right(self) -> bool:
        """Whether all that was computed agrees with the model itself."""
        close = (self.loss, self.gradient), (self.together, self.alone, self.merged)
        bounds = zip(close, (TOLERANCE, NATS), strict=True)
        return not self.crash and all(
            value is None or value <= most for values, most in bounds for value in values
        )


PAGE = """\
# Architectures

What a run, an evaluation and a merge compute on {count} architectures, each a tiny random base with
`model.lora.target-modules = "all-linear"`, against the plain model of transformers {transformers}
in float64 (PEFT {peft}, PyTorch {torch}, float32 on a CPU). Written by

```bash
python benchmarks/architectures.py --markdown docs/architectures.md
```

- loss, gradient: relative difference on a site's examples with the trained adapter. The plain model
  has W + (alpha / r) B A for weights and reads each conversation as its chat template renders it,
  without padding, cache or PEFT.
- together, alone: largest difference, in nats, of an option's log-likelihood, prompts read together
  or one at a time. How prompts are read is probed once for each model: `shared` reads a common
  beginning once, `batched` pads whole prompts, `single` reads one at a time, `whole` reads a prompt
  again with each continuation, where the cache cannot continue it.
- merge: largest difference of a logit of the exported model in plain transformers.
- eager: what the attention that transformers chooses, and runs here use, is off its eager one.
  Falcon's eager attention counts the ALiBi biases twice, in the mask and in the scores.

{table}

Not adapted under `all-linear`, and named by the run, its card and plan.json as `frozen-modules`:

{frozen}

PEFT reads `gate_proj`, `up_proj` and `down_proj` of some mixtures as their fused experts, at
another rank; these and the experts stay frozen. The weights of state-space projections are read by
kernels past an adapter. A router returns more than a product. Naming one of them in
`model.lora.target-modules` is an error.

- Composite bases (Gemma 3 and MedGemma, Gemma 4, Qwen 3.5, Llama 4) are adapted in their text
  model alone; `exclude_modules` of the saved adapter says the same to PEFT. A merged model keeps
  the vision tower and the projector.
- Bases that bitsandbytes quantised are loaded as they are. Other stored quantisations (GPTQ, AWQ,
  MXFP4, FP8) are refused before anything is loaded.
- PhiMoE draws its routing in training mode, and is compared in evaluation mode. XGLM does not
  compute in float64 and is compared in float32.
"""


def page(rows: Sequence[Row]) -> str:
    """Return the page of docs with all rows."""
    from importlib.metadata import version

    head = ("base", "loss", "gradient", "together", "alone", "read", "merge", "eager")
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in rows:
        figures = [*map(_figure, (row.loss, row.gradient, row.together, row.alone)), row.layout]
        figures += [_figure(row.merged), _figure(row.attention)]
        if row.line or row.crash:
            figures = [row.line or row.crash]
        lines.append(f"| {row.name} | {' | '.join(figures)} |")
    frozen: dict[str, list[str]] = {}
    for row in rows:
        if row.frozen:
            frozen.setdefault(row.frozen, []).append(row.name)
    return PAGE.format(
        count=len(rows),
        table="\n".join(lines),
        frozen="\n".join(f"- {what}: {', '.join(names)}" for what, names in frozen.items()),
        **{name: version(name) for name in ("transformers", "peft", "torch")},
    )


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.0e}"
