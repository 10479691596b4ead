"""How fast the codecs write and read an adapter, and how fast the server adds up replies.

    OMP_NUM_THREADS=1 python benchmarks/codec_speed.py [--layers 32] [--times 5] [--out FILE]

The adapter is that of Llama-3-8B with r = 8 on q_proj and v_proj: 13 MiB of float32, normal values.
Rates are in MB (10**6 bytes) of float32 a second: medians of wall time, as they are on a machine
with nothing else to do. The replies are compared with the same float32 arrays added in place.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from server_memory import llama_3_8b_shapes

MB = 1e6


def median_seconds(action: Callable[[], object], times: int) -> float:
    """Return the median wall time of an action, after one run that is not counted."""
    action()
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def codec_rows(count: int, times: int) -> list[dict[str, Any]]:
    """Return bytes, rates and error of each codec, without and with entropy coding."""
    import numpy as np

    from grandrounds.config.codecs import CODECS
    from grandrounds.wire import codecs
    from grandrounds.wire.codecs.codec import Codec

    values = np.random.default_rng(0).standard_normal(count, dtype=np.float32)
    generator = np.random.default_rng(1)
    rows = []
    for entropy_coding in (False, True):
        for name in CODECS:
            codec = Codec(name, 64, 0.05, entropy_coding)
            payload = codecs.encode(codec, values, generator)
            decoded = codecs.decode(codec, payload, count)
            error = np.square(decoded - values, dtype=np.float64).mean()
            encode = median_seconds(lambda c=codec: codecs.encode(c, values, generator), times)
            decode = median_seconds(lambda c=codec, p=payload: codecs.decode(c, p, count), times)
            row = {
                "codec": name,
                "entropy_coding": entropy_coding,
                "bytes": len(payload),
                "times_smaller": values.nbytes / len(payload),
                "encode_mb_per_second": values.nbytes / MB / encode,
                "decode_mb_per_second": values.nbytes / MB / decode,
                "relative_squared_error": float(error / np.square(values, dtype=np.float64).mean()),
            }
            rows.append(row)
    return rows


def reply_seconds(
    shapes: dict[str, tuple[int, ...]], replies: int, times: int
) -> dict[str, float | int]:
    """Return seconds for the replies: added in place, and from record to result."""
    import numpy as np

    from grandrounds.server.aggregation.weighted_mean import WeightedMean
    from grandrounds.wire import messages

    generator = np.random.default_rng(0)
    records = []
    for _ in range(replies):
        change = {n: generator.standard_normal(s, dtype=np.float32) for n, s in shapes.items()}
        records.append(messages.to_arrays(change))
    changes = [messages.from_arrays(record, shapes) for record in records]
    flat = [np.concatenate([a.reshape(-1) for a in change.values()]) for change in changes]
    adapter = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}

    def in_place() -> None:
        total = np.zeros_like(flat[0])
        for array in flat:
            total += array

    def check() -> None:
        for record in records:
            messages.from_arrays(record, shapes)

    def whole() -> None:
        mean = WeightedMean(shapes)
        for record in records:
            mean.add(messages.from_arrays(record, shapes), 1700)
        mean.result(adapter)

    in_place_seconds = median_seconds(in_place, times)
    whole_seconds = median_seconds(whole, times)
    return {
        "replies": replies,
        "in_place_seconds": in_place_seconds,
        "check_seconds": median_seconds(check, times),
        "whole_seconds": whole_seconds,
        "times_in_place": whole_seconds / in_place_seconds,
    }


def main() -> None:
    """Measure codecs and replies; print two tables, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=32, help="of the adapter, at most 32")
    parser.add_argument("--replies", type=int, default=64)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy is loaded
    tensors_per_layer = 4
    shapes = dict(list(llama_3_8b_shapes().items())[: arguments.layers * tensors_per_layer])
    count = sum(rows * columns for rows, columns in shapes.values())
    rows = codec_rows(count, arguments.times)
    print(f"{count:,} values, one core; MB/s of float32")
    print(f"{'codec':>12} {'bytes':>11} {'smaller':>8} {'encode':>8} {'decode':>8} {'error':>9}")
    for row in rows:
        name = row["codec"] + (" + zstd" if row["entropy_coding"] else "")
        print(
            f"{name:>12} {row['bytes']:>11,} {row['times_smaller']:>7.2f}x "
            f"{row['encode_mb_per_second']:>8.0f} {row['decode_mb_per_second']:>8.0f} "
            f"{row['relative_squared_error']:>9.2g}"
        )
    sums = reply_seconds(shapes, arguments.replies, arguments.times)
    print(
        f"{sums['replies']} replies: {sums['whole_seconds']:.3f} s from record to result, of which "
        f"checks {sums['check_seconds']:.3f} s; added in place {sums['in_place_seconds']:.3f} s: "
        f"{sums['times_in_place']:.1f} times"
    )
    if arguments.out:
        result = {"values": count, "codecs": rows, "replies": sums}
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
