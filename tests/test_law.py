"""The law of the house holds, and each planted breach of it is seen."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

from tests.law import (
    HEAVY,
    PACKAGE,
    ROOMS,
    broken,
    commands_by_hand,
    libraries_out_of_place,
    sources,
)


def test_a_room_imports_only_from_rooms_to_its_left() -> None:
    assert list(broken(sources())) == []


def test_a_room_loads_no_library_of_another_one() -> None:
    assert list(libraries_out_of_place(sources())) == []


def test_every_room_of_the_law_is_there() -> None:
    found = {path.stem for path in PACKAGE.iterdir() if not path.name.startswith("__")}
    assert set(ROOMS) - {"__main__", "api"} <= found


PLANTED = {
    "to the right": ("grandrounds.wire.adapter", "from grandrounds.model import base"),
    "a module by its name": ("grandrounds.wire.adapter", "import grandrounds.model.base"),
    "inside a function": (
        "grandrounds.site.visit",
        "def f():\n    from grandrounds.engines import flower",
    ),
    "under TYPE_CHECKING": (
        "grandrounds.config.keys",
        "if TYPE_CHECKING:\n    import grandrounds.cli.run",
    ),
    "in a string": ("grandrounds.data.files", "NAME = 'grandrounds.engines.simulation:app'"),
    "inside an f-string": (
        "grandrounds.model.base",
        "NAME = f'python -m grandrounds.cli.run {1}'",
    ),
    "site of server": ("grandrounds.site.visit", "from grandrounds.server.run import Run"),
    "server of site": ("grandrounds.server.run", "from grandrounds.site import visit"),
    "data of config": ("grandrounds.data.files", "from grandrounds.config.keys import Config"),
    "a room that nobody knows": ("grandrounds.attic.box", ""),
    "the ground of a room": ("grandrounds.storage", "from grandrounds.config import keys"),
}


@pytest.mark.parametrize("where", PLANTED)
def test_a_planted_breach_is_seen(where: str) -> None:
    name, line = PLANTED[where]
    texts = sources()
    found = list(broken({**texts, name: f"{texts.get(name, '')}\n{line}\n"}))
    assert len(found) == 1
    assert found[0].startswith(name)


def test_a_cycle_within_a_room_is_seen() -> None:
    texts = dict(sources())
    texts["grandrounds.wire.adapter"] += "\nfrom grandrounds.wire import downlink\n"
    [found] = broken(texts)
    assert found.startswith("a cycle: ")


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("grandrounds.wire.adapter", "import torch"),
        ("grandrounds.config.keys", "import numpy"),
        ("grandrounds.server.run", "def f():\n    import transformers"),
        ("grandrounds.model.loss", "from flwr.app import Message"),
        ("grandrounds.study.ask", "import typer"),
        ("grandrounds.errors", "import numpy"),
    ],
)
def test_a_planted_library_is_seen(name: str, line: str) -> None:
    texts = sources()
    found = list(libraries_out_of_place({**texts, name: f"{texts[name]}\n{line}\n"}))
    assert [one.partition(":")[0] for one in found] == [name]


def test_a_command_to_copy_is_quoted_for_the_shell_by_one_function() -> None:
    texts = sources()
    assert list(commands_by_hand(texts)) == []
    assert [name for name, text in texts.items() if "shlex" in text] == ["grandrounds.config.words"]


@pytest.mark.parametrize(
    ("line", "is_by_hand"),
    [
        ("""f'resume: grandrounds run --resume {path}'""", True),
        ("""f"then grandrounds run --set consortium='{folder}'\"""", True),
        ("""f'(hf download {name} --revision {revision})'""", True),
        ("""f'cp {copy} there'""", True),
        ("""f'{command("cp", copy)} and grandrounds base fetch {REAL_BASE}'""", False),
        ("""f'resume: {command("grandrounds", "run", "--resume", path)}'""", False),
        ("""f'not what grandrounds report writes: {error}'""", False),
    ],
)
def test_a_planted_command_by_hand_is_seen(line: str, is_by_hand: bool) -> None:
    assert bool(list(commands_by_hand({"grandrounds.cli.run": line}))) == is_by_hand


LONG_SIGNATURES = {
    "grandrounds.model.attention.attend": "transformers' AttentionInterface calls it so",
}
"""Functions of more than six parameters outside commands and API → the reason; eight at most."""


def test_a_function_takes_at_most_six_parameters() -> None:
    found = set()
    for name, text in sources().items():
        if name.startswith("grandrounds.cli") or name == "grandrounds.api":
            continue  # whose parameters are the options of commands
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                taken = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                if len([one for one in taken if one.arg not in ("self", "cls")]) > 6:
                    found.add(f"{name}.{node.name}")
    assert found == set(LONG_SIGNATURES)
    assert len(found) <= 8


LOADED = (
    "import sys, atexit\n"
    f"atexit.register(lambda: print('loaded:', [n for n in {HEAVY!r} if n in sys.modules]))\n"
)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        *([name, "--help"] for name in ("run", "compare", "evaluate", "plan", "export", "ask")),
        ["report", "--help"],
        ["run", "--set", "seeed=1"],
    ],
    ids=" ".join,
)
def test_help_and_a_wrong_key_load_nothing_heavy(arguments: list[str]) -> None:
    code = (
        f"{LOADED}sys.argv = ['grandrounds', *{arguments!r}]\n"
        "from grandrounds.__main__ import main\nmain()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip().endswith("loaded: []")
    assert "grandrounds" in done.stdout + done.stderr
    assert done.returncode == (2 if "--set" in arguments else 0)
    assert ("Did you mean 'seed'?" in done.stderr) == ("--set" in arguments)
