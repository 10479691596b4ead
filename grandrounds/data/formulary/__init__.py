"""The embedded world: a fictional formulary, and a small base model trained on its public part.

`facts` defines drugs, flashcards and exam questions; `scripts/make_formulary_base.py` trains the
base model in `base`. This module needs the standard library only.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from grandrounds.errors import ModelError

FORMULARY = "formulary"
"""Name of the embedded base model, and of its data, in a configuration."""

FORMULARY_PREFERENCES = "formulary-preferences"
"""Name of the same facts as preferences: a question, the right answer, and a wrong one."""

_BASE_IN_ROOT = Path("grandrounds", "data", "formulary", "base")
_PROOF = "model.safetensors"


def base_path() -> Path:
    """Return the folder of the embedded base model, loadable by `AutoModelForCausalLM`.

    `flwr run` imports this package from a bundle of Python files without weights. The search covers
    this file's folder, the package under every entry of `sys.path`, and the project folder recorded
    by an editable installation.

    Raises
    ------
    ModelError
        If the base is in none of these places.
    """
    searched: list[Path] = []
    for folder in _candidates():
        if (folder / _PROOF).is_file():
            return folder
        searched.append(folder)
    raise ModelError(
        f"the embedded base model ({_BASE_IN_ROOT / _PROOF}) was found in none of "
        f"{len(searched)} places, the first being {searched[0]}; install grandrounds for this "
        f"Python ({sys.executable}), or train the base with: "
        "python scripts/make_formulary_base.py"
    )


def _candidates() -> Iterator[Path]:
    yield Path(__file__).resolve().parent / "base"
    for entry in sys.path:
        # An empty entry stands for the working directory.
        yield Path(entry or ".").resolve() / _BASE_IN_ROOT
    yield from (root / _BASE_IN_ROOT for root in _editable_roots())


def _editable_roots() -> Iterator[Path]:
    """Yield the project folders from which grandrounds is installed (PEP 610, direct_url.json)."""
    for distribution in importlib.metadata.distributions(name="grandrounds"):
        record = distribution.read_text("direct_url.json")
        if record is None:
            continue
        address = urlsplit(json.loads(record).get("url", ""))
        if address.scheme == "file":
            yield Path(url2pathname(address.path))
