"""Audits of privacy: attacks whose success is measured beside what is claimed.

    one_run.py       lower bound of ε from one run with many canaries
    mechanism.py     canaries as gradients, through the noise alone or the product's clip and noise
    membership.py    how well scores tell members from non-members
    extraction.py    what a model gives away of its canaries by itself
    canaries.py      fresh canaries in a synthetic world, flipped in or out by secret coins
    run.py           one audited run: world, training, scores, findings
    words.py         findings as text

An audit finds what is broken. It cannot show that a guarantee holds: a bound below the claim is
what a correct implementation gives, and what an attack that is too weak gives as well.
"""
