"""Every byte sent and received, by FlowerTune's counting rule.

The rule: tensor buffers as sent (each with its 128-byte npy header), in all messages and both
directions, divided by 2**20. `with_key_names` adds the tensors' names, as later versions of
FlowerTune's counter do.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

MIB = 2**20

NPY_HEADER_BYTES = 128
"""numpy.save's header (format version 1.0) for the shapes of adapter tensors."""


@dataclass
class Traffic:
    """Messages of one kind and direction."""

    messages: int = 0
    """Messages that carried tensors."""
    tensor_bytes: int = 0
    """Bytes of tensor buffers with their npy headers."""
    key_bytes: int = 0
    """Bytes of the tensors' names."""


@dataclass
class Ledger:
    """Running totals by kind of message: `train.down`, `train.up`, `evaluate.down`, ..."""

    totals: dict[str, Traffic] = field(default_factory=dict)
    """Kind and direction → traffic."""

    def count(self, kind: str, tensors: Iterable[tuple[str, int]]) -> None:
        """Add one message.

        Parameters
        ----------
        kind : str
            For example `train.down`; down is server to site.
        tensors : iterable of (name, bytes)
            The message's tensors as sent. A message without tensors adds nothing.
        """
        tensors = list(tensors)
        keys = sum(len(name.encode()) for name, _ in tensors)
        self.add(kind, sum(size for _, size in tensors), keys)

    def add(self, kind: str, tensor_bytes: int, key_bytes: int) -> None:
        """Add one message of known size; one without tensors adds nothing."""
        if tensor_bytes:
            traffic = self.totals.setdefault(kind, Traffic())
            traffic.messages += 1
            traffic.tensor_bytes += tensor_bytes
            traffic.key_bytes += key_bytes

    def include(self, other: Ledger) -> None:
        """Add all messages of another ledger."""
        for kind, traffic in other.totals.items():
            own = self.totals.setdefault(kind, Traffic())
            own.messages += traffic.messages
            own.tensor_bytes += traffic.tensor_bytes
            own.key_bytes += traffic.key_bytes

    def minus(self, earlier: Ledger) -> Ledger:
        """Return the messages that were added since an earlier copy of this ledger."""
        none, since = Traffic(), Ledger()
        for kind, now in self.totals.items():
            then = earlier.totals.get(kind, none)
            if now != then:
                since.totals[kind] = Traffic(
                    now.messages - then.messages,
                    now.tensor_bytes - then.tensor_bytes,
                    now.key_bytes - then.key_bytes,
                )
        return since

    def mib_of(self, way: str) -> float:
        """All MiB of one direction, `up` or `down`."""
        return sum(t.tensor_bytes for k, t in self.totals.items() if k.endswith(f".{way}")) / MIB

    @property
    def tensor_bytes(self) -> int:
        """All bytes so far by FlowerTune's rule."""
        return sum(t.tensor_bytes for t in self.totals.values())

    @property
    def mib(self) -> float:
        """All MiB so far by FlowerTune's rule."""
        return self.tensor_bytes / MIB

    def as_dict(self) -> dict[str, object]:
        """Return the ledger for JSON."""
        keys = sum(t.key_bytes for t in self.totals.values())
        return {
            "rule": "FlowerTune: tensor buffers with npy headers, both directions, / 2**20",
            "communication_mib": self.mib,
            "communication_mib_with_key_names": (self.tensor_bytes + keys) / MIB,
            "totals": {kind: asdict(t) for kind, t in sorted(self.totals.items())},
        }

    @classmethod
    def from_dict(cls, data: dict[str, dict[str, dict[str, int]]]) -> Ledger:
        """Return the ledger that `as_dict` wrote."""
        return cls({kind: Traffic(**t) for kind, t in data["totals"].items()})
