"""Measuring a model: scores of answers, benchmarks and their confidence intervals."""
