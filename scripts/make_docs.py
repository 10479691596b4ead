"""Writes docs/configuration.md and docs/cli.md from the code that they describe.

python scripts/make_docs.py            write both
python scripts/make_docs.py --check    write nothing; exit 1 and name the stale ones
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import sys
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import typer

from grandrounds.config import keys as config
from grandrounds.config import recipes

DOCS = Path(__file__).resolve().parent.parent / "docs"
GENERATED = "<!-- Written by scripts/make_docs.py from {source}; do not edit. -->"

CONFIGURATION_HEAD = """# Configuration

Every key, with the value that it has when it is left out. The defaults live in
`[tool.flwr.app.config]` of pyproject.toml and nowhere else. Set a key

- in a recipe: `grandrounds run --config recipe.toml`;
- on the command line: `grandrounds run --set num-server-rounds=10`;
- through Flower: `flwr run . --run-config recipe.toml`, or `--run-config 'num-server-rounds=10'`.

Values are numbers, texts, `true` and `false`. A list is one text with commas, and an empty text
means "not set". An unknown key, a wrong type and a value that is not allowed are errors, told
before anything is loaded.
"""

CLI_HEAD = """# Command line

What `--help` says, on one page.
"""

TYPE_NAMES = {bool: "true/false", int: "whole number", float: "number", str: "text"}


def configuration_page() -> str:
    """Return docs/configuration.md."""
    defaults = recipes.defaults()
    documented = field_docstrings()
    lines = [GENERATED.format(source="grandrounds/config/keys.py"), CONFIGURATION_HEAD]
    without_effect = []
    for section in config.SECTIONS.values():
        title = f"`{section.prefix.rstrip('.')}`" if section.prefix else "The run"
        lines += [f"## {title}", "", inspect.cleandoc(section.__doc__), ""]
        lines += ["| key | type | allowed | default | meaning |", "|---|---|---|---|---|"]
        hints = typing.get_type_hints(section, include_extras=True)
        for field in dataclasses.fields(section):
            key = section.prefix + field.name.replace("_", "-")
            meaning = documented[section.__name__, field.name]
            if meaning.startswith("Accepted, without effect"):
                without_effect.append(key)
            kind, allowed = type_and_rule(hints[field.name])
            lines.append(
                row(f"`{key}`", kind, allowed, f"`{toml_value(defaults[key])}`", cell(meaning))
            )
        lines.append("")
    lines += ["## Other names", "", "Names that other entries use. Set one name of a key, not two."]
    lines += ["", "| name | stands for |", "|---|---|"]
    lines += [row(f"`{alias}`", f"`{key}`") for alias, key in config.ALIASES.items()]
    lines += ["", "## Accepted without effect", ""]
    lines += [
        "Kept so that other entries' files can be read; a run says which of them it was given."
    ]
    lines += ["", *(f"- `{key}`" for key in without_effect)]
    lines += ["- `train.training-arguments.num-train-epochs`, unless `max-steps` is -1", ""]
    return "\n".join(lines)


def field_docstrings() -> dict[tuple[str, str], str]:
    """Return (class, field) → the docstring under the field, for every one that has it."""
    found = {}
    for node in ast.parse(inspect.getsource(config)).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for field, after in zip(node.body, node.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
                and isinstance(after.value.value, str)
            ):
                found[node.name, field.target.id] = inspect.cleandoc(after.value.value)
    return found


def type_and_rule(hint: Any) -> tuple[str, str]:
    """Return a field's type and what it allows, in words."""
    base, *rules = typing.get_args(hint) if hasattr(hint, "__metadata__") else (hint,)
    kinds = [TYPE_NAMES[kind] for kind in typing.get_args(base) or (base,)]
    return " or ".join(kinds), cell("; ".join(rule_text(rule) for rule in rules))


def rule_text(rule: config.Range | config.OneOf) -> str:
    """Return what a rule admits; listed values as TOML."""
    if isinstance(rule, config.OneOf):
        return ", ".join(f"`{toml_value(value)}`" for value in rule.values)
    return str(rule).replace(f"{rule.high:g}", str(rule.high))  # 2147483647, not 2.14748e+09


def toml_value(value: config.Scalar) -> str:
    """Return a value as it stands in a TOML file."""
    return recipes.to_toml({"key": value}).partition(" = ")[2].rstrip("\n")


def cli_page() -> str:
    """Return docs/cli.md."""
    from grandrounds.cli import app

    lines = [GENERATED.format(source="grandrounds/cli"), CLI_HEAD]
    for context in commands(typer.main.get_command(app), "grandrounds", None):
        lines += command_lines(context)
    return "\n".join(lines).rstrip("\n") + "\n"


def commands(
    command: click.Command, name: str, parent: click.Context | None
) -> Iterator[click.Context]:
    """Yield the context of a command, then of all below it."""
    context = click.Context(command, info_name=name, parent=parent, **command.context_settings)
    yield context
    for child, below in getattr(command, "commands", {}).items():
        if not below.hidden:
            yield from commands(below, child, context)


def command_lines(context: click.Context) -> list[str]:
    """Return the part of one command: usage, text, arguments, options, commands."""
    command = context.command
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    lines = [f"## `{context.command_path}`", "", "```", usage, "```", ""]
    lines += [inspect.cleandoc(command.help or "").replace("\f", ""), ""]
    shown = [p for p in command.get_params(context) if not getattr(p, "hidden", False)]
    lines += ["| option | meaning |", "|---|---|"]
    lines += [row(*parameter_cells(parameter, context)) for parameter in shown]
    lines.append("")
    below = {n: c for n, c in getattr(command, "commands", {}).items() if not c.hidden}
    if below:
        lines += ["| command | meaning |", "|---|---|"]
        lines += [
            row(f"`{name}`", cell(inspect.cleandoc(child.help or "").partition("\n\n")[0]))
            for name, child in below.items()
        ]
        lines.append("")
    return lines


def parameter_cells(parameter: click.Parameter, context: click.Context) -> tuple[str, str]:
    """Return a parameter's names with its value, and its help with its default."""
    meaning = str(getattr(parameter, "help", None) or "")
    names = ", ".join(f"`{name}`" for name in reversed(parameter.opts))
    if isinstance(parameter, click.Argument):
        return f"`{parameter.make_metavar(context)}`", cell(meaning)
    default = parameter.default
    if getattr(parameter, "is_flag", False):
        return names, cell(meaning)
    least = getattr(parameter.type, "min", None)
    if least is not None:
        meaning += f" [at least {least:g}]"
    if default is not None and not callable(default) and default != ():
        meaning += f" [default: {getattr(default, 'value', default)}]"
    return f"{names} {cell(value_text(parameter))}", cell(meaning)


def value_text(parameter: click.Parameter) -> str:
    """Return what a value looks like: its metavar, its choices, or its type."""
    if isinstance(parameter.type, click.Choice):
        return "`" + "|".join(str(getattr(c, "value", c)) for c in parameter.type.choices) + "`"
    return f"`{parameter.metavar or parameter.type.name.partition(' ')[0].upper()}`"


def row(*cells: str) -> str:
    """Return one row of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def cell(text: str) -> str:
    """Return a text that is safe inside a Markdown table: one line, no bare bars or tags."""
    parts = " ".join(text.split()).replace("|", "\\|").split("`")
    return "`".join(part if i % 2 else part.replace("<", "&lt;") for i, part in enumerate(parts))


PAGES = {"configuration.md": configuration_page, "cli.md": cli_page}
"""File below docs/ → the function that makes it."""


def main(arguments: Sequence[str]) -> int:
    """Write or check both pages; return the exit code."""
    if arguments not in ([], ["--check"]):
        print(__doc__, file=sys.stderr)
        return 2
    stale = []
    for name, page in PAGES.items():
        file, text = DOCS / name, page()
        if arguments:
            if not file.is_file() or file.read_text(encoding="utf-8") != text:
                stale.append(f"docs/{name}")
        else:
            file.write_text(text, encoding="utf-8")
    if stale:
        print(f"Stale: {', '.join(stale)}. Run: python scripts/make_docs.py", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
