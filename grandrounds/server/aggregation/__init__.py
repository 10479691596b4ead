"""Aggregation rules, one file each, with the formula that each computes."""
