"""The next round's keys and shares, which ride on this round's last two exchanges.

Both ends of a site's message answer two questions at once, and the next round begins with its
adapter. Sites of the next cohort that are not in this round are asked in the same wait.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from flwr.app import RecordDict

from grandrounds.errors import GrandRoundsError, ReplyError, RoundError
from grandrounds.server.masks.masked_sum import MaskedSum
from grandrounds.wire import messages
from grandrounds.wire.masks.attempt import KEYS, SHARES
from grandrounds.wire.masks.carried import NEXT, carried
from grandrounds.wire.names import one_line

SILENT = "did not answer in the round before"


@dataclass
class Ride:
    """The first attempt of the next round, as far as it comes in this one."""

    following: MaskedSum
    """The sum of the next round, which gets keys and shares here."""
    nodes: Mapping[int, int]
    """Partition id → node, of the next cohort's sites; none after the last round."""
    failed: dict[int, str] = field(default_factory=dict)
    """Partition id → why the site is not aboard."""

    def requests(self, exchange: str, silent: Collection[int]) -> dict[int, bytes]:
        """Return partition id → what `keys` or `shares` of the next round sends; empty if lost.

        Parameters
        ----------
        silent
            Sites that have not answered in this round: nobody waits for them once more.
        """
        if exchange == KEYS:
            self.failed |= dict.fromkeys(self.nodes.keys() & set(silent), SILENT)
            return dict.fromkeys(self.nodes.keys() - set(silent), b"")
        try:
            request = self.following.key_list()
        except RoundError:
            return {}
        return dict.fromkeys(self.following.listed, request)

    def take(self, site: int, exchange: str, content: RecordDict, *, rides: bool) -> None:
        """Take a site's part of a reply.

        Parameters
        ----------
        rides : bool
            Whether it came beside this round's, which is good whatever this part is.

        Raises
        ------
        ReplyError
            If it is of no use, and came alone.
        """
        take = {KEYS: self.following.take_keys, SHARES: self.following.take_shares}[exchange]
        try:
            if rides and NEXT in messages.instruction_of(content):
                raise ReplyError(one_line(str(messages.instruction_of(content)[NEXT])))
            take(site, carried(content, exchange, record=NEXT if rides else messages.ARRAYS))
        except GrandRoundsError as error:
            if not rides:
                raise
            self.failed[site] = one_line(str(error))
