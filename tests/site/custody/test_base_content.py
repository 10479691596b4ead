"""The hash of a base's files: what makes it be computed again, and what it may rest on."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from grandrounds.site.custody import base_content
from grandrounds.site.custody.base_content import KnownHashes, content_sha256


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"the weights")
    return tmp_path


def test_a_file_that_was_swapped_is_noticed_though_its_time_was_restored(base: Path) -> None:
    """Size and modification time were all that was compared: the old hash was returned for ever."""
    known, file = KnownHashes(), base / "model.safetensors"
    before, seen = content_sha256(base, known), file.stat()
    other = base / "other"
    other.write_bytes(b"the WEIGHTS")
    os.utime(other, ns=(seen.st_atime_ns, seen.st_mtime_ns))
    other.replace(file)
    assert content_sha256(base, known) != before
    time.sleep(0.02)  # longer than a tick of the file system's clock
    file.write_bytes(b"the weights")  # in place, in the same inode
    os.utime(file, ns=(seen.st_atime_ns, seen.st_mtime_ns))
    assert content_sha256(base, known) == before


def test_a_base_is_read_once_and_again_after_a_day(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    digest = base_content.hashlib.file_digest
    monkeypatch.setattr(
        base_content.hashlib,
        "file_digest",
        lambda f, kind: (read.append(f.name), digest(f, kind))[1],
    )
    now = 1000.0
    monkeypatch.setattr(base_content.time, "monotonic", lambda: now)
    known = KnownHashes()
    for later, files in ((0.0, 2), (base_content.REREAD_SECONDS - 1, 2), (2.0, 4)):
        now += later
        content_sha256(base, known)
        assert len(read) == files
