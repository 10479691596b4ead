"""What the five exchanges carry, as bytes. Untrusted: lengths are compared before anything is read.

exchange   to the site                              from the site
keys       nothing                                  its signed keys
shares     signed keys of all                       commitment to its seed, one box for each other
masked     boxes of the others (and the adapter)    the masked vector
confirm    survivors                                a signature
unmask     signatures of survivors                  one share for each site whose boxes it has

A table is a count, then entries of one width under ascending partition ids; numbers are of two
bytes, the higher one first.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from grandrounds.errors import ReplyError
from grandrounds.wire.masks.attempt import (
    CONFIRM,
    KEY_BYTES,
    KEYS,
    MASKED,
    MOST_SITES,
    SHARES,
    SIGNATURE_BYTES,
    TAG_BYTES,
    UNMASK,
)
from grandrounds.wire.masks.shamir import SHARE_BYTES

NUMBER_BYTES = 2

SIGNED_KEYS_BYTES = 2 * KEY_BYTES + SIGNATURE_BYTES

SHARES_BYTES = 2 * SHARE_BYTES
"""The content of a box: a share of the seed, then one of the masks' secret."""

BOX_BYTES = SHARES_BYTES + TAG_BYTES

COMMITMENT_BYTES = 32


@dataclass(frozen=True)
class SignedKeys:
    """A site's public keys of one attempt."""

    box: bytes
    """For the boxes between sites."""
    mask: bytes
    """For the masks between sites."""
    signature: bytes
    """The site's identity over both, and over what they are for."""

    def packed(self) -> bytes:
        """Return them as 160 bytes."""
        return self.box + self.mask + self.signature


def signed_keys(data: bytes) -> SignedKeys:
    """Return a site's signed keys."""
    _check_length("keys", data, SIGNED_KEYS_BYTES)
    return SignedKeys(data[:KEY_BYTES], data[KEY_BYTES : 2 * KEY_BYTES], data[2 * KEY_BYTES :])


def pack_key_list(keys: Mapping[int, SignedKeys]) -> bytes:
    """Return the signed keys of all sites, as every one of them receives them."""
    return _pack({site: one.packed() for site, one in keys.items()})


def key_list(data: bytes) -> dict[int, SignedKeys]:
    """Return partition id → signed keys."""
    table = _table("list of keys", data, SIGNED_KEYS_BYTES)
    return {site: signed_keys(one) for site, one in table.items()}


@dataclass(frozen=True)
class Dealt:
    """A site's boxes for the other ones."""

    commitment: bytes
    """Hash of its seed: a server that recovers the seed can tell whether it is the right one."""
    boxes: Mapping[int, bytes]
    """Partition id → box."""

    def packed(self) -> bytes:
        """Return the commitment and the boxes, in the order of their sites."""
        return self.commitment + b"".join(self.boxes[site] for site in sorted(self.boxes))


def dealt(data: bytes, others: Collection[int]) -> Dealt:
    """Return a site's boxes for these other sites."""
    _check_length("shares", data, COMMITMENT_BYTES + BOX_BYTES * len(others))
    boxes = _cut(data[COMMITMENT_BYTES:], BOX_BYTES)
    return Dealt(data[:COMMITMENT_BYTES], dict(zip(sorted(others), boxes, strict=True)))


def pack_boxes(boxes: Mapping[int, bytes]) -> bytes:
    """Return the boxes that other sites have sent to one, under the senders."""
    return _pack(boxes)


def boxes(data: bytes) -> dict[int, bytes]:
    """Return sender → box."""
    return _table("boxes", data, BOX_BYTES)


def pack_sites(sites: Iterable[int]) -> bytes:
    """Return partition ids."""
    return _pack(dict.fromkeys(sites, b""))


def sites(data: bytes) -> tuple[int, ...]:
    """Return partition ids, in ascending order."""
    return tuple(_table("list of sites", data, 0))


def pack_signatures(signatures: Mapping[int, bytes]) -> bytes:
    """Return the signatures of sites."""
    return _pack(signatures)


def signatures(data: bytes) -> dict[int, bytes]:
    """Return partition id → signature."""
    return _table("signatures", data, SIGNATURE_BYTES)


def opened(data: bytes, senders: Sequence[int]) -> dict[int, bytes]:
    """Return sender → the share that a site tells of it; senders are in ascending order."""
    _check_length("opened shares", data, SHARE_BYTES * len(senders))
    return dict(zip(senders, _cut(data, SHARE_BYTES), strict=True))


def table_bytes(width: int, entries: int) -> int:
    """Return the bytes of a table."""
    return NUMBER_BYTES + entries * (NUMBER_BYTES + width)


@dataclass(frozen=True)
class Sizes:
    """Bytes of the messages of one site in an attempt in which nobody is lost."""

    down: dict[str, int]
    """Exchange → bytes to the site; for `masked`, of the boxes alone."""
    up: dict[str, int]
    """Exchange → bytes from the site; without the masked vector."""


def sizes(count: int) -> Sizes:
    """Return the bytes of an attempt of `count` sites."""
    return Sizes(
        down={
            SHARES: table_bytes(SIGNED_KEYS_BYTES, count),
            MASKED: table_bytes(BOX_BYTES, count - 1),
            CONFIRM: table_bytes(0, count),
            UNMASK: table_bytes(SIGNATURE_BYTES, count),
        },
        up={
            KEYS: SIGNED_KEYS_BYTES,
            SHARES: COMMITMENT_BYTES + BOX_BYTES * (count - 1),
            CONFIRM: SIGNATURE_BYTES,
            UNMASK: SHARE_BYTES * count,
        },
    )


def _pack(table: Mapping[int, bytes]) -> bytes:
    whole = len(table).to_bytes(NUMBER_BYTES)
    return whole + b"".join(site.to_bytes(NUMBER_BYTES) + table[site] for site in sorted(table))


def _table(what: str, data: bytes, width: int) -> dict[int, bytes]:
    """Return partition id → entry.

    Raises
    ------
    ReplyError
        If the length does not fit the count, or the ids do not ascend.
    """
    count = int.from_bytes(data[:NUMBER_BYTES])
    if count > MOST_SITES:
        raise ReplyError(f"the {what} has {count} entries, of at most {MOST_SITES}")
    _check_length(what, data, table_bytes(width, count))
    entries = list(_cut(data[NUMBER_BYTES:], NUMBER_BYTES + width))
    ids = [int.from_bytes(entry[:NUMBER_BYTES]) for entry in entries]
    if any(later <= earlier for earlier, later in pairwise(ids)):
        raise ReplyError(f"the {what} names a site twice, or its sites are not in order")
    return {site: entry[NUMBER_BYTES:] for site, entry in zip(ids, entries, strict=True)}


def _cut(data: bytes, width: int) -> Iterable[bytes]:
    return (data[start : start + width] for start in range(0, len(data), width))


def _check_length(what: str, data: bytes, length: int) -> None:
    if len(data) != length:
        raise ReplyError(f"the {what} has {len(data)} bytes, not {length}")
