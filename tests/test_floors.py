"""A module imports from its own floor or a lower one; start-up loads nothing heavy."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import grandrounds

ROOT = Path(grandrounds.__file__).parent

FLOORS: dict[int, tuple[str, ...]] = {
    0: ("", "errors", "quiet", "strategies", "allowed", "config", "validation", "recipes"),
    1: (
        "adapter",
        "prompts",
        "schedules",
        "sampling",
        "ledger",
        "architectures",
        "activations",
        "memory",
        "planning",
        "forecast",
        "plan_tables",
        "protocol",
        "drawing",
        "slots",
        "codecs",
        "codecs.blocks",
        "codecs.finite",
        "codecs.plain",
        "codecs.ternary",
        "codecs.topk",
        "aggregation",
        "aggregation.rule",
        "aggregation.replies",
        "aggregation.make",
        "aggregation.weighted_mean",
        "aggregation.product_error",
        "aggregation.low_rank",
        "aggregation.defence",
        "aggregation.fedavg",
        "aggregation.fedprox",
        "aggregation.fedexp",
        "aggregation.ffa",
        "aggregation.rolora",
        "aggregation.product",
        "aggregation.flora",
        "run_directory",
        "resuming",
        "environment",
        "checkpoints",
        "run_state",
        "reporting",
        "model_card",
        "consortium",
        "consortium.audit",
        "consortium.base_content",
        "consortium.policy",
        "consortium.site_file",
        "comparison",
        "comparison_folder",
        "comparison_results",
        "comparison_statistics",
        "comparison_tables",
        "evaluation",
        "evaluation.statistics",
        "report",
        "report.browser",
        "report.charts",
        "report.comparison_file",
        "report.comparison_page",
        "report.drawing",
        "report.facts",
        "report.figures",
        "report.learning",
        "report.one_run",
        "report.read",
        "report.row_charts",
        "report.several_runs",
        "report.updates",
        "formulary",
        "formulary.facts",
        "formulary.vocabulary",
    ),
    2: (
        "consortium.admissions",
        "consortium.keys",
        "consortium.own_data",
        "consortium.set_up",
        "consortium.signed",
        "comparison_exams",
        "files",
        "sources",
        "partitioning",
        "data",
        "tokenization",
        "base",
        "lora",
        "model",
        "attention",
        "loss",
        "training",
        "site",
        "tracking",
        "export",
        "ask",
        "formulary.exam",
        "formulary.make_base",
    ),
    3: (
        "messages",
        "downlink",
        "uplink",
        "updates",
        "exchange",
        "roll_call",
        "fitting",
        "machine",
        "visits",
        "rounds",
        "bookkeeping",
        "federation",
        "engines",
        "flower_cli",
        "flower_runtime",
        "simulation",
        "deployment",
        "consortium.agent_client",
        "consortium.at_site",
        "consortium.checks",
        "consortium.custody",
        "consortium.site_state",
        "consortium.wire",
    ),
    4: (
        "client_app",
        "server_app",
        "consortium.agent",
        "consortium.node_app",
        "comparison_arms",
        "comparison_runner",
    ),
    5: (
        "display",
        "screen",
        "compare_command",
        "evaluate_command",
        "plan_command",
        "options",
        "export_command",
        "ask_command",
        "consortium_command",
        "site_command",
        "report.page",
        "report_command",
        "cli",
        "__main__",
    ),
}
"""Floor → modules: 0 standard library; 1 numpy at most; 2 torch and Hugging Face; 3 Flower; 4 the
two apps; 5 what people touch."""

FLOOR_OF_FOLDER = {"evaluation.": 2, "aggregation.": 3}
"""Prefix → floor of the modules that `FLOORS` does not name, so that a benchmark, or a rule that
asks Flower, is one file."""

HUGGING_FACE = {
    "torch",
    "transformers",
    "tokenizers",
    "peft",
    "bitsandbytes",
    "datasets",
    "datasketch",
    "flwr_datasets",
    "huggingface_hub",
    "pyarrow",
}
TRACKERS = {"tensorboard", "wandb", "mlflow", "trackio"}
THIRD_PARTY: dict[int, set[str]] = {
    0: set(),
    1: {"numpy", "safetensors", "scipy", "zstandard", "filelock"},
    2: HUGGING_FACE | TRACKERS | {"cryptography", "sqlalchemy"},
    3: {"flwr", "psutil", "google", "httpx"},
    4: set(),
    5: {"typer", "rich", "jinja2"},
}
"""Floor → what it may import besides what the floors below may. Neither typer nor rich is of use
below, and Flower of none at floor 2."""


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts).removesuffix("__init__").removesuffix(".")


FILES = {module_name(file): file for file in sorted(ROOT.rglob("*.py"))}

FLOOR_OF = {
    name: floor
    for prefix, floor in FLOOR_OF_FOLDER.items()
    for name in FILES
    if name.startswith(prefix)
} | {name: floor for floor, names in FLOORS.items() for name in names}


@cache
def imports(name: str, everywhere: bool = True) -> frozenset[str]:
    """Return the dotted names that a module imports, in functions too, or at its top level only."""
    tree = ast.parse(FILES[name].read_text())
    found = set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name}: relative import"
            assert node.module
            for alias in node.names:
                inner = f"{node.module}.{alias.name}".removeprefix("grandrounds.")
                is_module = node.module.startswith("grandrounds") and inner in FILES
                found.add(f"grandrounds.{inner}" if is_module else node.module)
    return frozenset(found)


def ours(name: str, everywhere: bool = True) -> set[str]:
    """Return which of our modules a module imports."""
    return {
        found.removeprefix("grandrounds").removeprefix(".")
        for found in imports(name, everywhere)
        if found.partition(".")[0] == "grandrounds"
    }


def test_every_module_stands_on_one_floor() -> None:
    listed = [name for names in FLOORS.values() for name in names]
    assert len(listed) == len(set(listed))
    assert set(listed) <= set(FILES)
    assert set(FLOOR_OF) == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_a_module_imports_from_its_own_floor_or_a_lower_one(name: str) -> None:
    above = {other for other in ours(name) if FLOOR_OF[other] > FLOOR_OF[name]}
    assert not above


@pytest.mark.parametrize("name", FILES)
def test_a_module_imports_no_library_of_a_higher_floor(name: str) -> None:
    allowed = set().union(*(THIRD_PARTY[floor] for floor in range(FLOOR_OF[name] + 1)))
    libraries = {found.partition(".")[0] for found in imports(name)} - {"grandrounds"}
    assert libraries - sys.stdlib_module_names <= allowed


def test_no_arrow_comes_back() -> None:
    graph = {name: ours(name) - {name} for name in FILES}
    assert list(TopologicalSorter(graph).static_order())  # raises CycleError


def test_the_package_itself_imports_nothing() -> None:
    assert imports("") == {"__future__"} or not imports("")


HEAVY = ("torch", "transformers", "flwr", "peft", "datasets", "numpy")

LOADED = f"import sys; print([name for name in {HEAVY!r} if name in sys.modules])"


@pytest.mark.parametrize("code", ["import grandrounds", "import grandrounds.cli"])
def test_import_loads_nothing_heavy(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; {LOADED}"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        *(
            [command, "--help"]
            for command in ("run", "compare", "evaluate", "plan", "export", "ask")
        ),
        ["report", "--help"],
    ],
)
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys, atexit\n"
        f"sys.argv = ['grandrounds', *{arguments!r}]\n"
        f"heavy = lambda: [name for name in {HEAVY!r} if name in sys.modules]\n"
        "atexit.register(lambda: print('loaded:', heavy()))\n"
        "from grandrounds.__main__ import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("loaded: []")
    assert "grandrounds" in done.stdout


def test_a_wrong_configuration_is_told_before_anything_heavy_is_loaded() -> None:
    code = (
        "import sys, atexit\n"
        "sys.argv = ['grandrounds', 'run', '--set', 'seeed=1']\n"
        f"heavy = lambda: [name for name in {HEAVY!r} if name in sys.modules]\n"
        "atexit.register(lambda: print('loaded:', heavy()))\n"
        "from grandrounds.__main__ import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert "Did you mean 'seed'?" in done.stderr
    assert done.stdout.strip() == "loaded: []"
