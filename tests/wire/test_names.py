"""How sites are called: names are cleaned in one place, and no two sites are called the same."""

from __future__ import annotations

import pytest

from grandrounds.wire.names import MOST_CHARACTERS, SiteNames, clean_name, names_of, one_line


@pytest.mark.parametrize(
    ("told", "shown"),
    [
        ("St Elsewhere", "St Elsewhere"),
        ("  Ward\n B\t(north)\u2028", "Ward B (north)"),
        ("Krankenhaus Mu\u0308nchen", "Krankenhaus München"),
        ("\u202eevil\u202c \u2066ward\u2069", "evil ward"),  # bidirectional overrides and isolates
        ("wa\u200brd\u200d \ufeffB\u00ad", "ward B"),  # zero-width characters, a soft hyphen
        ("\x1b[31mred\x1b[0m\x07\x7f", "[31mred[0m"),  # no terminal obeys what is left
        ("\u3164\u2800\u200b\u034f", ""),  # nothing that one could see
        ("", ""),
        (None, ""),
        (7, ""),
        ("本院", "本院"),
        ("<script>alert(1)</script>", "<script>alert(1)</script>"),  # escaped where it is shown
    ],
)
def test_a_name_is_one_line_of_visible_text(told: object, shown: str) -> None:
    assert clean_name(told) == shown
    assert clean_name(shown) == shown


def test_a_long_name_is_cut_with_an_ellipsis() -> None:
    assert clean_name("x" * 1000) == "x" * (MOST_CHARACTERS - 1) + "…"
    assert clean_name("x" * MOST_CHARACTERS) == "x" * MOST_CHARACTERS
    assert len(one_line("y" * 10**6)) == 1000


def names(*told: object) -> SiteNames:
    return names_of({"partition-id": p, "name": name} for p, name in enumerate(told))


def test_a_site_without_a_name_is_called_by_its_number() -> None:
    some = names("Ward A", None, "\u200b")
    assert [some[p] for p in range(4)] == ["Ward A", "site 1", "site 2", "site 3"]
    assert [some.cell(p) for p in range(2)] == ["Ward A", "1"]
    assert some.with_number(0) == "Ward A (site 0)"
    assert some.with_number(1) == "site 1"
    many = names("Ward A", "Clinic of site 11")
    assert many.with_number(1) == "Clinic of site 11 (site 1)"
    assert some.listed([2, 0]) == "site 2, Ward A"
    assert some.in_place_of_number("site 0") == "Ward A"
    assert some.in_place_of_number("node 17") == "node 17"
    assert bool(some)
    assert not names("site 0", "")


def test_no_two_sites_are_called_the_same() -> None:
    """Nor as another's number, nor as the label that another got to be told apart."""
    claims = ["Ward A", "ward\u200b a", "site 0", "Ward A (site 0)", "Site 4", "SITE 5", "x" * 99]
    claims += ["x" * 98 + "y", "site 8", "", "site 9 "]
    labels = [names(*claims)[p] for p in range(len(claims))]
    assert len({label.casefold() for label in labels}) == len(claims)
    assert labels[0] == "Ward A (site 0)"
    assert labels[2] == "site 0 (site 2)"
    assert labels[8:] == ["site 8", "site 9", "site 9 (site 10)"]


def test_introductions_that_are_not_what_a_run_writes_name_nobody() -> None:
    assert not names_of([{"name": "A"}, {"partition-id": "0", "name": "B"}, {}])
