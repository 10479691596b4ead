"""Federated instruction tuning of medical language models, on Flower and PEFT."""

from grandrounds.waiting import wait_passively

__version__ = "0.1.0"

wait_passively()  # before any module of this package loads PyTorch
