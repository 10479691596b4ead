"""Keeps warnings, log messages and progress bars of libraries off the terminal.

Only what is raised within the libraries listed here is suppressed; our own warnings are shown.
"""

from __future__ import annotations

import logging
import os
import warnings

LIBRARIES = (
    "accelerate",
    "bitsandbytes",
    "datasets",
    "flwr_datasets",
    "huggingface_hub",
    "peft",
    "ray",
    "torch",
    "transformers",
)


def quiet_libraries() -> None:
    """Set filters, log levels and environment; call this before importing the libraries."""
    for name, value in (
        ("TOKENIZERS_PARALLELISM", "false"),
        ("HF_HUB_DISABLE_TELEMETRY", "1"),
        ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
        ("TRANSFORMERS_VERBOSITY", "error"),
    ):
        os.environ.setdefault(name, value)
    for library in LIBRARIES:
        warnings.filterwarnings("ignore", module=rf"{library}(\.|$)")
    for library in ("bitsandbytes", "torch.utils.flop_counter"):
        logging.getLogger(library).setLevel(logging.ERROR)
