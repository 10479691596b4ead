"""Where a base model is: a look at a local folder that reads no weights and loads no library."""

from __future__ import annotations

import json
from pathlib import Path

from grandrounds.config.bases import names_a_base
from grandrounds.data.formulary import FORMULARY
from grandrounds.errors import ModelError, nearest
from grandrounds.storage import found

WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")
"""Files of weights that transformers reads."""

_ADVICE = (
    "Give a folder with config.json, tokenizer and weights (*.safetensors) as save_pretrained "
    'writes it, a name on the Hugging Face hub, or model.name = "formulary".'
)


def check_location(name: str) -> None:
    """Raise `ModelError` if `model.name` is a local folder, there or not, that is no base model.

    A name on the hub is not looked up.
    """
    path = found(name)
    if names_a_base(name) or name == FORMULARY or (path is None and not _looks_like_path(name)):
        return
    if path is None:
        raise ModelError(f"{name}: there is no such folder.{_nearest_folder(Path(name))} {_ADVICE}")
    if path.is_file():
        raise ModelError(f"{name} is a file, not the folder of a base model. {_ADVICE}")
    if not (path / "config.json").is_file():
        raise ModelError(f"{name} is no base model: {_instead(path)}. {_ADVICE}")
    if not any(next(path.glob(kind), None) for kind in WEIGHTS):
        raise ModelError(f"{name} is no base model: it has no weights ({WEIGHTS[0]}). {_ADVICE}")


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith("/")


def _nearest_folder(path: Path) -> str:
    parent = found(str(path.parent))
    if parent is None or not parent.is_dir():
        return f" There is no folder {str(path.parent)!r} either."
    return nearest(path.name, sorted(one.name for one in parent.iterdir() if one.is_dir()))


def _instead(path: Path) -> str:
    """Return what a folder without config.json is."""
    if (path / "config.toml").is_file():
        return "it is a run directory, whose base is named in its config.toml"
    adapter = path / "adapter_config.json"
    if adapter.is_file():
        try:
            base = json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]
        except (OSError, ValueError, KeyError, TypeError):
            base = "another model"
        return f"it is a LoRA adapter on {base}"
    return "it has no config.json"
