"""The embedded base model, loaded once, on one thread: the tests are too small for more."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from grandrounds.formulary import base_path


@pytest.fixture(scope="module")
def base() -> Iterator[tuple[Any, Any]]:
    """Model and tokenizer of the embedded base."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield (
        AutoModelForCausalLM.from_pretrained(base_path(), local_files_only=True),
        AutoTokenizer.from_pretrained(base_path(), local_files_only=True),
    )
    torch.set_num_threads(threads)
