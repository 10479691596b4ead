"""What a masked sum costs one site and the server, in seconds and in bytes.

    OMP_NUM_THREADS=1 python benchmarks/masks.py [--sites 3 20 100] [--mib 0.47 13 84] [--out FILE]

Sites and server run one after another in this process, with keys, shares, boxes and signatures of a
whole cohort, and stores in memory. Seconds are CPU seconds of one thread: those of the first site,
and the server's for all sites, of whom as many are lost after their shares as the threshold allows.
Bytes are those of one site, both ways, beyond a float32
adapter both ways.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MIB = 2**20


def cpu_seconds(action: Callable[[], Any]) -> tuple[float, Any]:
    """Return the CPU seconds of an action, and its result."""
    start = time.process_time()
    result = action()
    return time.process_time() - start, result


def measured(count: int, values: int, codec: str) -> dict[str, Any]:
    """Play one attempt of a cohort and return its seconds and bytes."""
    import numpy as np
    from cryptography.hazmat.primitives.asymmetric import ec
    from flwr.app import RecordDict

    from grandrounds.server.masks.masked_sum import MaskedSum
    from grandrounds.site.masks.end import SiteEnd
    from grandrounds.site.masks.held import RehearsalStore
    from grandrounds.wire.masks.attempt import threshold
    from grandrounds.wire.masks.fixed_point import FixedPoint
    from grandrounds.wire.masks.roster import Member, Roster

    identities = [ec.generate_private_key(ec.SECP384R1()) for _ in range(count)]
    members = {i: Member(f"site-{i}", key.public_key()) for i, key in enumerate(identities)}
    roster, received = Roster("benchmark", 1, members), bytes(32)
    ends = [
        SiteEnd(i, key, roster, 3, RehearsalStore(RecordDict())) for i, key in enumerate(identities)
    ]
    attempt = ends[0].attempt("ab", 1, 0)
    numbers = FixedPoint(codec, count, values, 0.05, 1000)
    server = MaskedSum(attempt, roster)
    site: dict[str, float] = {}
    others = ends[1:]

    def first(name: str, action: Callable[[], Any]) -> Any:
        site[name], result = cpu_seconds(action)
        return result

    server.take_keys(0, first("keys", lambda: ends[0].keys(attempt)))
    for end in others:
        server.take_keys(end.site, end.keys(attempt))
    listed = server.key_list()
    own = first("shares", lambda: ends[0].shares(attempt, listed))
    server.take_shares(0, own)
    for end in others:
        server.take_shares(end.site, end.shares(attempt, listed))
    server.expect(numbers, received)
    boxes = server.boxes(0)
    change = np.random.default_rng(0).normal(0, 0.003, values).astype(np.float32)
    vector = first("fixed point", lambda: numbers.encode(change, 500))
    masked = first("mask", lambda: ends[0].masked(attempt, boxes, received, vector))
    sent = np.frombuffer(masked, np.uint8)
    lost = count - threshold(count)
    alive = ends[: count - lost]
    for end in others:  # a vector of one number: the others' seconds are not counted
        one = np.zeros(1, dtype=numbers.dtype)
        end.masked(attempt, server.boxes(end.site), received, one)

    def add() -> None:
        for end in alive:
            server.take_masked(end.site, sent)

    adding, _ = cpu_seconds(add)
    survivors = server.survivors()
    signature = first("confirm", lambda: ends[0].confirm(attempt, survivors))
    server.take_signature(0, signature)
    for end in alive[1:]:
        server.take_signature(end.site, end.confirm(attempt, survivors))
    signatures = server.signatures()
    opened = first("unmask", lambda: ends[0].unmask(attempt, signatures))
    server.take_opened(0, opened)
    for end in alive[1:]:
        server.take_opened(end.site, end.unmask(attempt, signatures))
    unmasking, _ = cpu_seconds(server.total)
    down = len(listed) + len(boxes) + len(survivors) + len(signatures)
    up = 160 + len(own) + len(masked) + len(signature) + len(opened)
    plain = 2 * 4 * values
    return {
        "sites": count,
        "mib": round(4 * values / MIB, 2),
        "codec": codec,
        "lost": lost,
        "site_seconds": site,
        "server_seconds": {"add": adding, "unmask": unmasking},
        "bytes": {
            "down": down,
            "up": up,
            "vector": len(masked),
            "beyond_plain": down + up - plain // 2,
            "beyond_plain_share": (down + up - plain // 2) / plain,
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sites", type=int, nargs="+", default=[3, 20, 100])
    parser.add_argument("--mib", type=float, nargs="+", default=[0.47, 13.0, 84.0])
    parser.add_argument("--codec", choices=("masked32", "masked16"), default="masked32")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    for count in args.sites:
        for mib in args.mib:
            row = measured(count, int(mib * MIB / 4), args.codec)
            rows.append(row)
            site, server, size = row["site_seconds"], row["server_seconds"], row["bytes"]
            print(
                f"{count:4} sites {mib:6.2f} MiB  site {sum(site.values()):7.3f} s (mask "
                f"{site['mask']:.3f}, checks and shares {site['shares'] + site['unmask']:.3f})  "
                f"server {sum(server.values()):8.3f} s, {row['lost']} lost  "
                f"{size['beyond_plain']:,} bytes more, {size['beyond_plain_share']:.3%}",
                flush=True,
            )
    if args.out:
        args.out.write_text(json.dumps({"rows": rows}, indent=2))


if __name__ == "__main__":
    main()
