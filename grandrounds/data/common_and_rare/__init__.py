"""A second embedded world: facts that many patients share, and facts of one patient each.

`records` defines patients, their records and the exam. The base and the vocabulary are the
formulary's. This module needs the standard library only.
"""

COMMON_AND_RARE = "common-and-rare"
"""Name of these data in a configuration."""
