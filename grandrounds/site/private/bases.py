"""Which bases a private visit cannot train on, found before their weights are loaded.

A guarantee needs that a record's gradient does not follow from the records beside it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from grandrounds.config.keys import Config
from grandrounds.errors import ModelError
from grandrounds.model.base import base_config, bits_of
from grandrounds.model.lora import without_weights
from grandrounds.model.machine import specs
from grandrounds.model.targets import expert_modules


def check_base(config: Config) -> None:
    """Check that the gradients of a base's adapter can be told apart by record.

    Raises
    ------
    ModelError
        If it routes tokens to experts, multiplies in int8, drops activations at random, or chooses
        its positions' frequencies by the longest record of a batch.
    """
    name, microbatch = config.model.source, config.arguments.per_device_train_batch_size
    told = f"privacy.unit-guarantee does not cover {name!r}"
    if experts := _experts(name):
        raise ModelError(
            f"{told}, which routes tokens to experts ({', '.join(experts[:3])}): one record may "
            "change what another one gives. Use a base without experts."
        )
    if microbatch > 1 and bits_of(specs(config)[0]) == 8:
        raise ModelError(
            f"{told} in 8 bits with {microbatch} records in a batch: LLM.int8 takes the columns "
            "that are outliers in any record out of all of them. Set model.quantization = 4, or "
            "train.training-arguments.per-device-train-batch-size = 1 with "
            f"gradient-accumulation-steps = {config.examples_per_step}."
        )
    described = base_config(name).get_text_config()
    if dropped := _dropout(described):
        key, share = dropped
        raise ModelError(
            f"{told}, which drops activations at random ({key} = {share:g}): the masks of a batch "
            "are drawn in a row, so that one record changes those of the others. Use a copy with "
            f"{key} = 0 in its config.json."
        )
    longest = _longest_with_fixed_positions(described)
    if longest is not None and config.train.seq_length > longest:
        raise ModelError(
            f"{told} with train.seq-length = {config.train.seq_length}: beyond {longest} tokens it "
            "computes the positions of all records by the longest one. Set train.seq-length = "
            f"{longest} or less."
        )


@lru_cache(maxsize=4)
def _experts(name: str) -> tuple[str, ...]:
    return tuple(expert_modules(without_weights(name)))


def _dropout(base: Any) -> tuple[str, float] | None:
    """Return a key by which a base drops something in training, and the share; None: by none."""
    for key, value in base.to_dict().items():
        of_heads = key.startswith(("classifier", "summary"))  # of heads that no run has
        if "drop" in key and not of_heads and isinstance(value, int | float) and value > 0:
            return key, float(value)
    return None


def _longest_with_fixed_positions(base: Any) -> int | None:
    """Return the tokens up to which rotary positions are the same in every batch; None: always.

    transformers' `dynamic_rope_update` chooses the frequencies of the types `dynamic` and
    `longrope` by the largest position of a batch.
    """
    rope = getattr(base, "rope_parameters", None) or getattr(base, "rope_scaling", None) or {}
    # Gemma 3 has one table for each type of layer.
    tables = [rope, *(table for table in rope.values() if isinstance(table, dict))]
    kinds = [table.get("rope_type", table.get("type")) or "" for table in tables]
    if not any("dynamic" in kind or kind == "longrope" for kind in kinds):
        return None
    lengths = [table.get("original_max_position_embeddings") for table in tables]
    lengths.append(getattr(base, "original_max_position_embeddings", None))
    known = [int(length) for length in lengths if length]
    return min(known, default=int(base.max_position_embeddings))
