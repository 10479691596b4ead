"""The audit log is a chain over all its files: changes are found, a power cut breaks nothing."""

from __future__ import annotations

import json
import multiprocessing
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from grandrounds.errors import ConfigError
from grandrounds.site.custody import audit


def filled(folder: Path, count: int) -> Path:
    """Write `count` lines; return the file."""
    folder.mkdir(exist_ok=True)
    for number in range(count):
        audit.write(folder, {"asked": "train", "round": number})
    return folder / audit.FILE


def test_each_line_carries_the_hash_of_the_line_before(tmp_path: Path) -> None:
    """97ce3f5 wrote lines without a hash: one could be changed unseen."""
    file = filled(tmp_path, 3)
    found = audit.verified(tmp_path)
    assert (found.count, found.before, found.torn, found.broken) == (3, 0, (), ())
    assert json.loads(file.read_text().splitlines()[0])[audit.PREVIOUS] == audit.NOTHING
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert audit.verified(tmp_path, found.last).holds_noted
    assert not audit.verified(tmp_path, "ab" * 32).holds_noted


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda lines: [lines[0].replace('"round": 0', '"round": 9'), *lines[1:]], ":2 does not"),
        (lambda lines: [lines[0], *lines[2:]], ":2 does not continue"),
        (lambda lines: [lines[1], lines[0], *lines[2:]], ":1 continues a line that is not here"),
        (lambda lines: lines[1:], ":1 continues a line that is not here"),
        (lambda lines: [*lines[:2], '{"asked": "query"}', *lines[2:]], ":3 has no hash"),
        (lambda lines: [*lines[:2], "", *lines[2:]], ":4 does not continue"),
    ],
    ids=["changed", "removed", "swapped", "beginning removed", "inserted", "blank inserted"],
)
def test_a_line_that_is_changed_afterwards_is_found(
    tmp_path: Path, harm: Callable[[list[str]], list[str]], told: str
) -> None:
    file = filled(tmp_path, 4)
    harmed = harm(file.read_text().splitlines())
    file.write_text("".join(f"{line}\n" for line in harmed))
    assert told in " ".join(audit.verified(tmp_path).broken)


def test_the_chain_goes_on_over_rotated_files_and_none_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "ROTATE_BYTES", 400)
    filled(tmp_path, 12)
    assert [file.name for file in audit.rotated(tmp_path)][:2] == [
        "audit-000001.jsonl",
        "audit-000002.jsonl",
    ]
    found = audit.verified(tmp_path)
    assert (found.count, found.broken) == (12, ())
    assert [line["round"] for line in audit.read(tmp_path)] == list(range(12))
    audit.rotated(tmp_path)[1].unlink()
    [told] = audit.verified(tmp_path).broken
    assert told.startswith("audit-000003.jsonl:1 does not continue")


@pytest.mark.parametrize("left", [b'{"time": "2026', b"\0\0\0\0", b"\xff{"])
def test_a_torn_last_line_is_told_and_skipped_and_the_next_begins_after_it(
    tmp_path: Path, left: bytes
) -> None:
    """97ce3f5 glued the next line to it, and could read neither."""
    file = filled(tmp_path, 2)
    with file.open("ab") as handle:
        handle.write(left)
    assert [line["round"] for line in audit.read(tmp_path)] == [0, 1]
    audit.write(tmp_path, {"round": 2})
    assert [line["round"] for line in audit.read(tmp_path)] == [0, 1, 2]
    found = audit.verified(tmp_path)
    assert (found.torn, found.broken, found.count) == (("audit.jsonl:3",), (), 4)
    file.write_bytes(file.read_bytes().replace(left + b"\n", b"{}\n"))
    assert audit.verified(tmp_path).broken  # what a power cut left is part of the chain


def test_lines_of_the_time_before_the_chain_are_counted_and_anchored(tmp_path: Path) -> None:
    file = tmp_path / audit.FILE
    file.write_text('{"asked": "query"}\n{"asked": "train"}\n')
    audit.write(tmp_path, {"asked": "train"})
    found = audit.verified(tmp_path)
    assert (found.count, found.before, found.broken) == (3, 2, ())
    file.write_text(file.read_text().replace('{"asked": "train"}', '{"asked": "other"}', 1))
    assert audit.verified(tmp_path).broken


def write_many(folder: Path) -> None:
    for number in range(25):
        audit.write(folder, {"round": number, "reason": "x" * 200})


def test_several_writers_make_one_chain(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_many, args=(tmp_path,)) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(30)
    found = audit.verified(tmp_path)
    assert (found.count, found.torn, found.broken) == (75, (), ())


def test_a_log_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / audit.FILE).mkdir()
    with pytest.raises(ConfigError, match="The audit log cannot be written"):
        audit.write(tmp_path, {"asked": "train"})


def test_a_file_with_other_digits_in_its_name_is_none_of_the_logs(tmp_path: Path) -> None:
    """A site with such a file in its state folder answered nothing any more."""
    (tmp_path / "audit-²³.jsonl").write_text("{}\n")
    filled(tmp_path, 2)
    assert audit.verified(tmp_path).count == 2


def test_a_log_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    (tmp_path / audit.FILE).mkdir()
    with pytest.raises(ConfigError, match=r"cannot be read: .* Only the agent's user"):
        audit.read(tmp_path)
