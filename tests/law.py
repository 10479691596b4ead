"""The law of the house: which room may know which, read from the code as text."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter

from tests.places import ROOT

PACKAGE = ROOT / "grandrounds"

GROUND = ("errors", "quiet", "statistics", "storage", "waiting")
ROOMS = (
    *("config", "data", "wire", "model", "site", "server"),
    *("client_app", "server_app", "engines", "study", "api", "cli", "__main__"),
)
"""A room imports only from the ground and from rooms to its left."""

FACE = ("grandrounds", "api")
"""The package itself offers the functions of the API, loaded at their first use."""

STRANGERS = ({"site", "server"}, {"data", "config"})
"""Rooms that never import each other."""


@cache
def sources() -> dict[str, str]:
    """Return every module's dotted name and its text."""
    files = sorted(PACKAGE.rglob("*.py"))
    dotted = {file: ".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files}
    return {name.removesuffix(".__init__"): file.read_text() for file, name in dotted.items()}


@cache
def imported(name: str, text: str, modules: frozenset[str]) -> frozenset[str]:
    """Return which of our modules a module names: in imports anywhere, and in strings."""
    found: set[str] = set()
    tree = ast.parse(text)
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Constant) and id(node) not in prose:
            found |= set(re.findall(r"\bgrandrounds(?:\.\w+)+", str(node.value)))
    return frozenset(module for one in found if (module := nearest_module(one, modules))) - {name}


def nearest_module(dotted: str, modules: frozenset[str]) -> str:
    """Return the module that a dotted name lies in; empty where it is none of ours."""
    while dotted and dotted not in modules:
        dotted = dotted.rpartition(".")[0]
    return "" if dotted == "grandrounds" else dotted


def room_of(module: str) -> str:
    """Return the room of a module; empty for the ground and for the package itself."""
    room = [*module.split("."), ""][1]
    return "" if room in GROUND else room


def broken(texts: dict[str, str]) -> Iterator[str]:
    """Yield each import that the law forbids, and a cycle inside a room."""
    modules = frozenset(texts)
    graph = {name: imported(name, text, modules) for name, text in texts.items()}
    place = {"": -1} | {room: number for number, room in enumerate(ROOMS)}
    inside: dict[str, set[str]] = {}
    for name, targets in graph.items():
        room = room_of(name)
        if room not in place:
            yield f"{name}: {room} is no room"
            continue
        for target in sorted(targets):
            other = room_of(target)
            if (name, other) == FACE:
                continue
            if place.get(other, len(ROOMS)) > place[room] or {room, other} in STRANGERS:
                yield f"{name} imports {target}"
        inside[name] = {target for target in targets if room_of(target) == room}
    try:
        TopologicalSorter(inside).prepare()
    except CycleError as error:
        yield f"a cycle: {' -> '.join(error.args[1])}"


HEAVY = ("torch", "transformers", "flwr", "peft", "datasets", "numpy")
"""What `--help` and the import of the package must not load."""

NUMBERS = {"numpy", "safetensors", "scipy", "zstandard", "filelock"}
MODELS = {
    *("torch", "transformers", "tokenizers", "peft", "bitsandbytes", "datasets", "datasketch"),
    *("flwr_datasets", "huggingface_hub", "liger_kernel", "pyarrow", "psutil", "gguf"),
}
FLOWER = {"flwr", "google", "httpx"}
SCREEN = {"typer", "click", "rich", "jinja2"}
TRACKERS = {"tensorboard", "wandb", "mlflow", "trackio"}
KEYS = {"cryptography", "sqlalchemy"}

LIBRARIES: dict[str, set[str]] = {
    "": {"scipy"},
    "config": set(),
    "data": NUMBERS | MODELS - {"peft", "bitsandbytes"} | {"jinja2"},
    "wire": NUMBERS | FLOWER,
    "model": NUMBERS | MODELS,
    "site": NUMBERS | MODELS | FLOWER | KEYS | {"dp_accounting"},
    "server": NUMBERS | FLOWER | {"peft", "rich"} | TRACKERS,
    "client_app": FLOWER,
    "server_app": FLOWER,
    "engines": FLOWER | KEYS | {"psutil", "torch"},
    "study": NUMBERS | MODELS | FLOWER | {"jinja2"},
    "cli": SCREEN | {"huggingface_hub"},
    "__main__": SCREEN,
}
"""Room → what it may load besides the standard library; for the ground and SciPy see statistics."""


BESIDES = {
    "grandrounds.wire.masks.keys": {"cryptography"},
    "grandrounds.wire.masks.prg": {"cryptography"},
    "grandrounds.wire.masks.rehearsal": {"cryptography"},
    "grandrounds.server.listeners.tracker_libraries": {"torch"},  # holds TensorBoard's writer
}
"""Module → what it may load besides its room's."""


def libraries_out_of_place(texts: dict[str, str]) -> Iterator[str]:
    """Yield each import of a library that its room may not load."""
    for name, text in texts.items():
        allowed = LIBRARIES.get(room_of(name), set()) | BESIDES.get(name, set())
        for library in sorted(loaded(text) - allowed - sys.stdlib_module_names - {"grandrounds"}):
            yield f"{name}: {library}"


@cache
def loaded(text: str) -> frozenset[str]:
    """Return the packages that a text imports, in functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module).partition(".")[0])
    return frozenset(found)


BEFORE_A_WORD = re.compile(
    r"(?:^|[\s(:`])(?:cp|(?:flwr|hf|wandb|trackio|tensorboard) [\w-]+|grandrounds "
    r"(?:run|plan|compare|evaluate|report|export|ask|config|base|privacy|consortium|site))"
    r"(?: [\w./=\0-]+)* (?:--[\w-]+=)?(?:[\w.-]+=)?[\"']?$"
)
"""The beginning of a command, up to a place where its next word stands (\\0: a word put in)."""


def commands_by_hand(texts: dict[str, str]) -> Iterator[str]:
    """Yield each f-string that puts a word into a command to copy without quoting it."""
    for name, text in texts.items():
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.JoinedStr):
                continue
            before = ""
            for part in node.values:
                if isinstance(part, ast.Constant):
                    before += str(part.value)
                    continue
                value = ast.unparse(part.value) if isinstance(part, ast.FormattedValue) else ""
                is_quoted = value.startswith("command(") or value.isupper()
                if BEFORE_A_WORD.search(before) and not is_quoted:
                    yield f"{name}:{node.lineno}: {before}{{{value}}}"
                before += "\0"
