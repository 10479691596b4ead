"""The embedded world: a fictional formulary, and a small base model that knows its public part.

`facts` holds drugs, flashcards and exam questions; `scripts/make_formulary_base.py`
makes the base model, which lies in `base`. This file needs the standard library only.
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
"""The name by which a configuration asks for the embedded base model."""

_BASE_IN_ROOT = Path("grandrounds", "data", "formulary", "base")
_PROOF = "model.safetensors"


def base_path() -> Path:
    """Return the folder of the embedded base model, loadable by `AutoModelForCausalLM`.

    `flwr run` imports this package from a bundle that carries Python files and no weights. So the
    folder is looked for beside this file, then as part of the package under every entry of
    `sys.path`, then in the project folder that an editable installation recorded.

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
        f"{len(searched)} places, the first being {searched[0]}; install grandrounds in this "
        f"Python ({sys.executable}), or make the base with: "
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
