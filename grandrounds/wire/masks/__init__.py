"""Masks for sums of client updates: what both ends of the five exchanges must agree on.

The protocol is that of Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving
Machine Learning" (2017), figure 4, with its active adversary, on the complete graph of a cohort.
"""
