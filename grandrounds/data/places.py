"""Where rows lie: a file, the files of a folder or a pattern, or a data set on the hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from grandrounds.data.embedded import EMBEDDED
from grandrounds.errors import DataError, first_line, nearest
from grandrounds.storage import found

SOURCE_KEY = "static.dataset.name"

BUILT_IN = f"built-in data ({', '.join(EMBEDDED)})"

TABLE_ENDINGS = (
    *(".json", ".jsonl", ".json.gz", ".jsonl.gz"),
    *(".csv", ".csv.gz", ".tsv", ".tsv.gz", ".parquet"),
)
"""Names of files with columns. A `.json` file is an array of objects, alone or as the value of
`data`, or has one object per line."""

TEXT_ENDINGS = (".txt", ".txt.gz")
"""Names of files with one text a paragraph. Of a folder they are read only if there are no others:
beside data they describe them."""

FILE_ENDINGS = (*TABLE_ENDINGS, *TEXT_ENDINGS)
"""Supported file names."""

SURVEYED_BYTES = 64 * 2**20
"""Largest local source that is read before a run (`survey`); a larger one is only looked up."""

Version = tuple[tuple[Path, int, int], ...]
"""Files with modification time and length: another version of a source is read again."""

_ON_HUB = re.compile(
    r"(?P<name>\w[\w.-]*(/\w[\w.-]*)?)(:(?P<config>[^\[@]+))?(\[(?P<split>.+)\])?(@(?P<revision>.+))?"
)


@dataclass(frozen=True)
class OnHub:
    """A data set on the Hugging Face hub."""

    name: str
    config: str = ""
    """Its configuration; empty: the only one, or the default."""
    split: str = "train"
    """One of its splits, or a part of one as `datasets` writes it: `train[:1000]`."""
    revision: str = ""
    """Commit, branch or tag; empty: the main branch."""

    @classmethod
    def of(cls, source: str) -> OnHub:
        """Return what a source `NAME:CONFIG[SPLIT]@REVISION` names; all but the name may be absent.

        Raises
        ------
        DataError
            If it is not written so.
        """
        parts = _ON_HUB.fullmatch(source)
        if parts is None:
            raise DataError(
                f"{SOURCE_KEY} = {source!r} is neither a file or folder that exists nor the name "
                "of a data set on the hub (owner/name). Its configuration, split and revision have "
                "keys of their own (static.dataset.config, -split, -revision)."
            )
        split = parts["split"] or "train"
        return cls(parts["name"], parts["config"] or "", split, parts["revision"] or "")

    def __str__(self) -> str:
        config = f":{self.config}" if self.config else ""
        split = f"[{self.split}]" if self.split != "train" else ""
        return f"{self.name}{config}{split}" + (f"@{self.revision}" if self.revision else "")


def name_in(version: Version, path: Path, source: str) -> str:
    """Return how messages call a file of a source: by the source's own name, if it is the file."""
    return source if len(version) == 1 and path.name == Path(source).name else str(path)


def looks_like_path(source: str) -> bool:
    """Whether a source is local, there or not, rather than a name on the hub."""
    return (
        source.startswith((".", "/", "~"))
        or source.lower().endswith(FILE_ENDINGS)
        or found(source) is not None
        or _is_pattern(source)
    )


def _is_pattern(source: str) -> bool:
    return "*" in source or "?" in source


def files_of(source: str) -> Version:
    """Return the files of a local source, in the order of their names, with their versions.

    A folder stands for all files in it that can be read, those of its folders left out.

    Raises
    ------
    DataError
        If there is none, or one that is named cannot be read.
    """
    allowed = ", ".join(FILE_ENDINGS)
    try:
        place = Path(source).expanduser()
        paths = _paths(source, place.absolute())
        missing = next((path for path in paths if not path.is_file()), None)
        if missing is not None:
            raise DataError(
                f"{source}: {_absence(missing)} Set {SOURCE_KEY} to a file that "
                f"exists ({allowed}), to the name of a hub data set or to {BUILT_IN}."
            )
        stats = [(path.resolve(), path.stat()) for path in paths]
    except (OSError, RuntimeError) as error:  # RuntimeError: the home folder of an unknown user
        raise unreadable(source, error) from error
    for path, _ in stats:
        if not path.name.lower().endswith(FILE_ENDINGS):
            raise DataError(
                f"{source}: files ending in {path.suffix!r} cannot be read; allowed: {allowed}. "
                "Convert the file, or give it the ending of its format."
            )
    return tuple((path, status.st_mtime_ns, status.st_size) for path, status in stats)


def _paths(source: str, place: Path) -> list[Path]:
    """Return the files that a source names; raise `DataError` if a folder or pattern has none."""
    allowed = ", ".join(FILE_ENDINGS)
    if place.is_dir():
        inside = [path for path in place.iterdir() if not path.name.startswith(".")]
        named = [path for path in inside if path.name.lower().endswith(FILE_ENDINGS)]
        paths = [path for path in named if not path.is_dir()]
        if not paths:
            raise DataError(
                f"{source}: this folder holds no file that can be read ({allowed}); set "
                f"{SOURCE_KEY} to a file, or to a folder of such files."
            )
        tables = [path for path in paths if not path.name.lower().endswith(TEXT_ENDINGS)]
        return sorted(tables or paths)
    if place.exists() or not _is_pattern(source):
        return [place]
    anchor = Path(place.anchor)
    matching = sorted(anchor.glob(str(place.relative_to(anchor))))
    paths = [path for path in matching if not path.is_dir()]
    if not paths:
        raise DataError(
            f"{source}: no file has such a name. Set {SOURCE_KEY} to a pattern, a folder or a file "
            f"({allowed})."
        )
    return paths


def _absence(path: Path) -> str:
    """Say why a path is no file that can be read."""
    if path.is_symlink() or path.exists():
        return f"{path} is {'a broken link' if path.is_symlink() else 'no regular file'}."
    if not path.parent.is_dir():
        return f"no such file. There is no folder {str(path.parent)!r} either."
    return "no such file." + nearest(path.name, sorted(file.name for file in path.parent.iterdir()))


def unreadable(source: str, error: Exception) -> DataError:
    """Return the error for a file that is damaged or closed to this user."""
    return DataError(
        f"{source}: the file is damaged or cannot be read ({first_line(error)}). "
        "Copy or download it again, and check its name and permissions."
    )
