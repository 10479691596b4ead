#!/usr/bin/env bash
# Everything that is measured on a GPU, in at most eight minutes on one card. Run from anywhere:
#
#     benchmarks/gpu.sh --out DIR [--parts rounds evaluation] [--seconds 300] [--data DIR]
#     benchmarks/gpu.sh --dry-run --out DIR      (small shapes, on a CPU too)
#
# Writes gpu.json and gpu.md into DIR, and what each part printed. Needs no network, no Ray, and no
# installed grandrounds. Carries on where a part fails, and ends with 1 then.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" OMP_WAIT_POLICY=PASSIVE HF_HUB_OFFLINE=1
exec "${PYTHON:-python3}" "$root/benchmarks/gpu.py" "$@"
