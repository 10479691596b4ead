"""Evaluates models on benchmarks: protocols, scores and confidence intervals."""
