"""Errors at a site as they may be written down: their kind and place, without their text.

The text of an error may quote a row: a token that has no number, a value that is none. So may the
messages that libraries log, and their warnings. Whatever a process writes to its terminal ends in
the system's journal, which more people read than the data.
"""

from __future__ import annotations

import functools
import logging
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from flwr.app import Context, Error, Message

from grandrounds.errors import GrandRoundsError
from grandrounds.site.custody.clock import utc_text
from grandrounds.wire.messages import CLIENT_APP_RAISED

MOST_PLACES = 12
"""Frames that are named, the innermost first."""

WITHHELD = "(text withheld, since it may quote data)"

Handler = Callable[[Message, Context], Message]


def written(error: BaseException, *, with_text: bool) -> dict[str, object]:
    """Return an error for the audit log: its kinds and places; its text only if asked for."""
    entry: dict[str, object] = {"error": kinds(error), "where": places(error)}
    if with_text:
        entry["text"] = "".join(traceback.format_exception(error))[-2000:]
    return entry


def kinds(error: BaseException) -> str:
    """Return the class of an error and of those that led to it: `ValueError from KeyError`."""
    return " from ".join(type(one).__name__ for one in _chain(error))


def places(error: BaseException) -> list[str]:
    """Return where an error was raised, innermost first: `training.py:88 train_visit`."""
    frames = traceback.extract_tb(error.__traceback__)[::-1][:MOST_PLACES]
    return [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames]


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def told(error: BaseException) -> str:
    """Return what the server learns of an unexpected error."""
    return f"the site's visit crashed ({type(error).__name__}); its own log says where"


def telling_kinds_only(function: Handler) -> Handler:
    """Wrap a message handler so that an unexpected error reaches Flower without its text.

    Flower sends an exception's text to the server, and prints its traceback. Expected errors, whose
    texts are ours, pass through.
    """

    @functools.wraps(function)
    def answer(message: Message, context: Context) -> Message:
        try:
            return function(message, context)
        except GrandRoundsError:
            raise
        except Exception as error:
            say(f"a visit crashed: {kinds(error)} at {', '.join(places(error))}")
            return Message(Error(CLIENT_APP_RAISED, told(error)), reply_to=message)

    return answer


def say(line: str) -> None:
    """Print a line for the site's operator, with the time."""
    print(f"grandrounds: {utc_text()} {line}", file=sys.stderr, flush=True)


# --- A whole process ------------------------------------------------------------------------------


def keep_texts_off_the_terminal() -> None:
    """Let errors, warnings and log messages of this process show their kind and place only.

    For processes that hold a site's data: what they print ends in the journal. There is no way
    back, so that no library undoes it.
    """
    sys.excepthook = _show
    sys.unraisablehook = lambda found: _show(found.exc_type, found.exc_value, found.exc_traceback)
    threading.excepthook = lambda found: _show(found.exc_type, found.exc_value, found.exc_traceback)
    warnings.showwarning = _show_warning
    logging.setLogRecordFactory(_record)


def _show(
    kind: type[BaseException], error: BaseException | None, trace: TracebackType | None
) -> None:
    if issubclass(kind, KeyboardInterrupt):
        return
    if error is None:
        say(f"{kind.__name__} {WITHHELD}")
        return
    say(f"{kinds(error)} at {', '.join(places(error))} {WITHHELD}")


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: object = None,
    line: str | None = None,
) -> None:
    del message, file, line
    say(f"{category.__name__} at {Path(filename).name}:{lineno} {WITHHELD}")


def _record(*arguments: Any, **options: Any) -> logging.LogRecord:
    """Return a log record without its message and without the text of its exception."""
    record = logging.LogRecord(*arguments, **options)
    kind = f"{record.exc_info[0].__name__} " if record.exc_info and record.exc_info[0] else ""
    record.msg = f"{utc_text()} {kind}at {record.filename}:{record.lineno} {WITHHELD}"
    record.args, record.exc_info, record.exc_text, record.stack_info = (), None, None, None
    return record
