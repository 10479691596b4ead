"""Standard output and error of a command, and what happens once nobody takes what they are given.

A closed pipe (`grandrounds run | head`) or a full disk interrupts the command as Ctrl-C does, once:
a run writes its summary and keeps its finished rounds. What is printed from then on is dropped. A
terminal that has gone is no failure, since SIGHUP decides what follows.

Characters that the encoding of an output lacks are written in its own, since a command's names,
bullets and arrows are no reason to fail: `→` as `->`, `é` as `e`, and others as `?`.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import os
import sys
import threading
import unicodedata
from collections.abc import Iterator
from typing import Any, TextIO, cast

CLOSED = 141
"""Exit code where nobody reads the output, by shell convention: 128 and the number of SIGPIPE."""

PLAIN = "plain-characters"
SIMILAR = {"•": "*", "…": ".", "→": "->", "±": "+-", "ε": "epsilon", "⟦": "[[", "⟧": "]]"}
"""Character → what replaces it. Bullets and cropped text keep their width, for the boxes around."""


def plain(error: UnicodeError) -> tuple[str, int]:
    """Return what replaces characters that cannot be encoded, as a handler of `codecs`."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    characters = error.object[error.start : error.end]
    return "".join(map(_similar, characters)), error.end


def _similar(character: str) -> str:
    if found := SIMILAR.get(character):
        return found
    base = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
    return base or "?"


codecs.register_error(PLAIN, plain)


class Failure:
    """Which write to standard output or error was the first to fail."""

    def __init__(self) -> None:
        self.error: OSError | None = None
        self._is_told = False

    def note(self, error: OSError) -> None:
        """Note a failed write."""
        self.error = self.error or error

    def interrupt(self) -> None:
        """Interrupt the command if a write has failed; once, and in its main thread only."""
        in_main = threading.current_thread() is threading.main_thread()
        if self.error and not self._is_told and in_main:
            self._is_told = True
            raise KeyboardInterrupt

    @property
    def told(self) -> str:
        """What failed, as a clause."""
        is_closed = self.exit_code == CLOSED
        why = self.error.strerror if self.error else ""
        return "the output was closed" if is_closed else f"the output cannot be written: {why}"

    @property
    def exit_code(self) -> int:
        """Exit code of a command that ended because of it."""
        return CLOSED if isinstance(self.error, BrokenPipeError) else 1


class Output:
    """A text stream that notes its first failed write, and then drops what it is given."""

    def __init__(self, stream: TextIO, failure: Failure) -> None:
        self._stream = stream
        self._failure = failure
        self._is_terminal = stream.isatty()
        self._is_gone = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write a text, unless an earlier one could not be written."""
        with self._guarded():
            self._stream.write(text)
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        """Write several texts."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Hand over what was written."""
        with self._guarded():
            self._stream.flush()

    def close(self) -> None:
        """Leave the stream open: a library that has kept this object may outlive the command."""

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        if self._is_gone:
            with contextlib.suppress(OSError, ValueError):
                yield
        else:
            try:
                yield
            except OSError as error:
                self._drop()
                if not (self._is_terminal and error.errno == errno.EIO):
                    self._failure.note(error)
        self._failure.interrupt()

    def _drop(self) -> None:
        """Let what is still buffered, and whatever follows, go nowhere."""
        self._is_gone = True
        with contextlib.suppress(OSError, ValueError):  # a stream in memory has no descriptor
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@contextlib.contextmanager
def guarded_output() -> Iterator[Failure]:
    """Guard standard output and error meanwhile; yield what notes their failure."""
    failure = Failure()
    before = sys.stdout, sys.stderr
    for stream in before:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=PLAIN)
    sys.stdout, sys.stderr = (
        cast(TextIO, Output(stream, failure)) if stream else stream for stream in before
    )
    try:
        yield failure
    finally:
        sys.stdout, sys.stderr = before
