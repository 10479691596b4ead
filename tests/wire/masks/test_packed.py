"""The bytes of the five exchanges come back, and nothing else is read."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grandrounds.errors import ReplyError
from grandrounds.wire.masks import packed

TABLES = {
    "keys": (packed.key_list, packed.SIGNED_KEYS_BYTES),
    "boxes": (packed.boxes, packed.BOX_BYTES),
    "sites": (packed.sites, 0),
    "signatures": (packed.signatures, 96),
}


def table(width: int, *sites: int) -> bytes:
    whole = len(sites).to_bytes(2)
    return whole + b"".join(site.to_bytes(2) + bytes([site % 256]) * width for site in sites)


@pytest.mark.parametrize("name", TABLES)
def test_tables_come_back_and_have_the_planned_length(name: str) -> None:
    read, width = TABLES[name]
    found = read(table(width, 0, 3, 65535))
    assert list(found) == [0, 3, 65535]
    assert len(table(width, 0, 3, 65535)) == packed.table_bytes(width, 3)


@pytest.mark.parametrize("name", TABLES)
def test_malformed_tables_are_refused(name: str) -> None:
    read, width = TABLES[name]
    good = table(width, 0, 3, 9)
    for wrong in (b"", b"\0", good[:-1], good + b"\0", table(width, 3, 3), table(width, 3, 1)):
        with pytest.raises(ReplyError):
            read(wrong)
    with pytest.raises(ReplyError, match="257 entries"):
        read((257).to_bytes(2))


def test_keys_boxes_and_opened_shares_come_back() -> None:
    keys = packed.SignedKeys(b"b" * 32, b"m" * 32, b"s" * 96)
    assert packed.signed_keys(keys.packed()) == keys
    assert packed.key_list(packed.pack_key_list({7: keys, 2: keys})) == {2: keys, 7: keys}
    dealt = packed.Dealt(b"c" * 32, {4: b"4" * packed.BOX_BYTES, 1: b"1" * packed.BOX_BYTES})
    assert packed.dealt(dealt.packed(), {1, 4}) == dealt
    assert packed.opened(b"1" * 33 + b"4" * 33, [1, 4]) == {1: b"1" * 33, 4: b"4" * 33}


@pytest.mark.parametrize(
    "read",
    [
        packed.signed_keys,
        lambda data: packed.dealt(data, {1, 2}),
        lambda data: packed.opened(data, [1, 2]),
        *(read for read, _ in TABLES.values()),
    ],
)
@given(data=st.binary(max_size=400))
def test_any_bytes_are_read_or_refused(read: Callable[[bytes], object], data: bytes) -> None:
    with suppress(ReplyError):
        read(data)
