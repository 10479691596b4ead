"""requirements.lock holds one version of every dependency, within the ranges of pyproject.toml."""

from __future__ import annotations

import re
import tomllib
from collections import defaultdict
from collections.abc import Iterator

from packaging.markers import Marker
from packaging.requirements import Requirement
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


def wanted() -> Iterator[Requirement]:
    """Yield what the package, its extras and its build require."""
    for line in PROJECT["build-system"]["requires"]:
        yield Requirement(line)
    for lines in PROJECT["project"]["optional-dependencies"].values():
        yield from (one for line in lines if (one := Requirement(line)).name != "grandrounds")


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
