"""Aggregation rules: one file per rule, each exact about what it computes."""
