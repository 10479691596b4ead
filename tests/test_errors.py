"""What of a library's error is quoted in ours."""

from __future__ import annotations

from grandrounds.errors import first_line


def test_the_first_line_is_quoted_without_its_full_stop() -> None:
    assert first_line(OSError("\nNo such model.\nTry another.\n")) == "No such model"


def test_a_failure_of_the_system_is_quoted_in_words() -> None:
    assert first_line(FileNotFoundError(2, "No such file or directory", "/x")) == (
        "No such file or directory"
    )
    assert first_line(ValueError("I/O error: No space left on device (os error 28)")) == (
        "I/O error: No space left on device"
    )


def test_an_error_without_a_message_is_quoted_by_its_type() -> None:
    assert first_line(TimeoutError()) == "TimeoutError"


def test_a_long_line_is_cut_unless_all_of_it_is_wanted() -> None:
    assert first_line(ValueError("x" * 300)) == "x" * 200
    assert first_line(ValueError("x" * 300), most=None) == "x" * 300
