"""The model card beside every checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

from grandrounds import recipes
from grandrounds.config import Config
from grandrounds.formulary import BASE_NAME


def model_card(
    config: Config,
    target_modules: Sequence[str],
    round_number: int,
    held_out_loss: float | None,
    mib: float,
) -> str:
    """Return the README.md of a checkpoint, with Hugging Face's metadata at its head.

    Parameters
    ----------
    target_modules
        The names of the adapted modules, resolved.
    held_out_loss : float or None
        Nats per answer token; None where it was not measured.
    mib : float
        Traffic of the run so far.
    """
    base = config.model.name
    tags = ["lora", "federated-learning", "flower", "medical"]
    metadata = ["library_name: peft", f"tags: [{', '.join(tags)}]"]
    if base == BASE_NAME:
        load = "from grandrounds.formulary import base_path\n\nbase = base_path()"
    else:
        metadata.insert(0, f"base_model: {base}")
        load = f'base = "{base}"'
    reasons = recipes.leaderboard_differences(config)
    comparable = (
        f"Not comparable with the FlowerTune leaderboard: {'; '.join(reasons)}."
        if reasons
        else "Data set and number of sites are those of the FlowerTune medical leaderboard."
    )
    lora, train, strategy, data = config.lora, config.train, config.strategy, config.data
    modules = ", ".join(target_modules)
    total = config.federation.num_server_rounds
    loss = "not measured" if held_out_loss is None else f"{held_out_loss:.4f} nats per answer token"
    mu = f" (mu {strategy.proximal_mu:g})" if strategy.name == "fedprox" else ""
    return f"""---
{chr(10).join(metadata)}
---
# LoRA adapter for {base}, after round {round_number} of {total}

Trained by federated instruction tuning with Grand Rounds: the examples stayed at their sites, only
adapters travelled.

| | |
|---|---|
| data | {config.static.name}, {data.num_partitions} sites, {data.partitioner} |
| adapter | r = {lora.peft_lora_r}, alpha = {lora.peft_lora_alpha:g}, on {modules} |
| aggregation | {strategy.name}{mu}, {config.cohort_size} of {data.num_partitions} sites a round |
| learning rate | {train.learning_rate_max:g} to {train.learning_rate_min:g}, cosine over rounds |
| held-out loss | {loss} |
| communication so far | {mib:,.2f} MiB (FlowerTune's counting rule) |
| seed | {config.federation.seed} |

{comparable}

## Use

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

{load}
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), ".")
```

Prompt template: `{data.prompt_template}`. Research software, not a medical device: do not use its
answers for decisions about patients.
"""
