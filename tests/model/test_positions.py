"""Texts that a base cannot read are refused before its weights are loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from grandrounds.errors import ModelError
from grandrounds.model.positions import check_examples, position_limit
from grandrounds.model.prefill import prefill
from tests.tiny_models import tiny_bases

SHORT = {"max_position_embeddings": 24, "n_positions": 24, "max_seq_len": 24}


def short_config(kind: str, folder: Path) -> str:
    """Save the configuration of a tiny base that was made for 24 tokens."""
    tiny = tiny_bases.BASES[kind]
    config = tiny_bases.config_of(replace(tiny, changes={**tiny.changes, **SHORT}))
    config.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", ["gpt2", "opt", "biogpt", "gpt_bigcode", "gptj", "mpt"])
def test_examples_beyond_a_table_of_positions_are_refused(kind: str, tmp_path: Path) -> None:
    """They ended with IndexError within the first batch."""
    name = short_config(kind, tmp_path)
    check_examples(name, [range(5, 29)])
    with pytest.raises(ModelError, match=r"table of 24 positions.*25 tokens.*at most 24"):
        check_examples(name, [range(5, 29), range(5, 30)])


def test_computed_positions_have_no_limit(tmp_path: Path) -> None:
    name = short_config("llama", tmp_path)
    check_examples(name, [range(5, 30)])
    assert position_limit(name) == float("inf")


def test_a_token_without_an_embedding_is_refused(tmp_path: Path) -> None:
    """It ended with IndexError, in runs and in evaluations."""
    name = short_config("llama", tmp_path)
    check_examples(name, [[5, 299]])
    with pytest.raises(ModelError, match=r"token id 300, and there are 300 embeddings"):
        check_examples(name, [[5, 6], [5, 300]])
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name))
    with pytest.raises(ModelError, match=r"token id 300, and there are 300 embeddings"):
        next(prefill(model, [[5, 300]], 1, following_tokens=1))
