"""Locked versions lie within the ranges of pyproject.toml, which begin with versions that ran."""

from __future__ import annotations

import re
import tomllib
from collections import defaultdict
from collections.abc import Iterator

from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.places import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

ENTRY = re.compile(r"([\w.-]+)==(\S+?)(?: ; (.+?))?((?: *\\\n    --hash=sha256:[0-9a-f]{64})+)\n")


def locked() -> dict[str, list[tuple[Version, Marker | None]]]:
    """Return package → its versions, each with the environments that it is for."""
    text = "".join(
        line + "\n"
        for line in (ROOT / "requirements.lock").read_text().splitlines()
        if not line.startswith("#")
    )
    found = defaultdict(list)
    end = 0
    for entry in ENTRY.finditer(text):
        assert entry.start() == end, f"not an entry with a hash: {text[end : end + 80]!r}"
        end = entry.end()
        marker = Marker(entry[3]) if entry[3] else None
        found[canonicalize_name(entry[1])].append((Version(entry[2]), marker))
    assert end == len(text)
    return found


def of_the_extras() -> Iterator[Requirement]:
    """Yield what the extras require, but for `gpu`: Triton's kernels belong to CUDA's torch."""
    for extra, lines in PROJECT["project"]["optional-dependencies"].items():
        if extra == "gpu":
            continue
        yield from (one for line in lines if (one := Requirement(line)).name != "grandrounds")


def wanted() -> Iterator[Requirement]:
    """Yield what the package, its extras and its build require."""
    yield from map(Requirement, PROJECT["build-system"]["requires"])
    yield from of_the_extras()


def ran_at_floors() -> dict[str, tuple[SpecifierSet, Version]]:
    """Return package → its range and the version that ran, as scripts/test-floors printed them."""
    page = (ROOT / "docs" / "versions.md").read_text()
    rows = re.findall(r"^\| (\S+) \| `(\S+)` \| (\S+) \|", page, re.MULTILINE)
    return {
        canonicalize_name(name): (SpecifierSet(text), Version(version))
        for name, text, version in rows
    }


def ci_torch() -> Version:
    """Return the version of torch that CI installs before the lock."""
    match = re.search(r'torch="torch==([^"]+)"', (ROOT / ".ci" / "run").read_text())
    assert match
    return Version(match[1])


def test_every_dependency_is_locked_within_its_range() -> None:
    """A range that was changed without scripts/lock.py."""
    lock = locked()
    assert "torch" not in lock  # whose builds differ by accelerator
    lock["torch"].append((ci_torch(), None))
    for requirement in wanted():
        versions = lock.get(canonicalize_name(requirement.name), [])
        assert versions, f"{requirement} is not in requirements.lock: run scripts/lock.py"
        for version, _ in versions:
            assert version in requirement.specifier, (
                f"{requirement}: {version}; run scripts/lock.py"
            )


def test_every_range_begins_with_a_version_that_was_run() -> None:
    """A floor that was changed without scripts/test-floors. torch is run as in CI."""
    ran = ran_at_floors()
    direct = {canonicalize_name(one.name): one.specifier for one in of_the_extras()}
    assert ran.keys() == direct.keys()
    for name, (specifier, version) in ran.items():
        assert specifier == direct[name], f"{name}: run scripts/test-floors"
        [floor] = (Version(one.version) for one in specifier if one.operator == ">=")
        assert version == (ci_torch() if name == "torch" else floor), name


def test_a_package_has_one_version_in_an_environment() -> None:
    for name, versions in locked().items():
        markers = [marker for _, marker in versions]
        here = [marker for marker in markers if marker is None or marker.evaluate()]
        assert len(here) <= 1, name
        assert len(versions) == 1 or None not in markers, name


def test_the_lock_takes_no_cuda_along() -> None:
    """Gigabytes that only PyPI's build of torch needs, which brings them itself."""
    heavy = [name for name in locked() if name.startswith(("nvidia-", "cuda-", "triton"))]
    assert heavy == []
