"""Federated instruction tuning of medical language models, on Flower and PEFT."""

__version__ = "0.1.0"
