"""The parts of gpu.sh, one process each, each with a limit of its own.

    benchmarks/gpu.sh --out DIR

One process a part, so that a part that fails or hangs costs the others nothing. The base is written
once, into main memory where that has room.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from gpu_table import markdown

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"

BASE_BYTES = 18_000_000_000
"""Room for an 8B base in bfloat16."""

PACKAGES = (
    *("torch", "transformers", "peft", "bitsandbytes", "accelerate", "flwr", "triton"),
    "liger-kernel",
)


@dataclass(frozen=True)
class Part:
    """One process."""

    name: str
    limit_seconds: int
    command: list[str]
    """Without the interpreter."""
    by_default: bool = True


def parts_of(given: argparse.Namespace, work: Path, base: Path) -> list[Part]:
    """Return the parts in order of importance."""
    dry, out = given.dry_run, given.out

    def script(name: str, part: str, *options: str) -> list[str]:
        return [str(BENCHMARKS / name), *options, "--out", str(out / f"{part}.json")]

    shape = ["--architecture", given.architecture, "--base", str(base), "--scratch", str(work)]
    if dry:
        shape += ["--threads", "1", "--lengths", str(short_pairs(work))]
    four = ["--quantization", "4"]
    rounds = ["--rounds", "1" if dry else "3", "--arm-rounds", "1" if dry else "2"]
    few = ["--rounds", "1" if dry else "2", "--arms", "none"]
    template = ["--template-visits", "1", "--arms", "neither", "template"]
    asked = ["--base", str(base), *four, "--scratch", str(work)]
    asked += ["--limit", "24" if dry else str(given.limit)]
    asked += ["--arms", "default", "as on a GPU"] if dry else []
    if given.data:
        asked += ["--data", str(given.data.resolve()), "--benchmarks", *given.benchmarks]
    paths = ["--architecture", given.architecture, *four, "--scratch", str(work)]
    paths += ["--tokens", "48", "--threads", "1"] if dry else []
    tests = sorted(
        str(file.relative_to(ROOT))
        for file in (ROOT / "tests").rglob("test_*.py")
        if "mark.gpu" in file.read_text(encoding="utf-8")
    )
    pytest = ["-m", "pytest", "-q", "-m", "gpu", "-o", "addopts=", "-p", "no:cacheprovider"]
    pytest += ["-W", "ignore::pytest.PytestConfigWarning"]  # pytest-timeout may be absent
    full = "full_size.py"
    measured = ["--peaks", "--profile"]
    return [
        Part("base", 90, [str(BENCHMARKS / "random_base.py"), given.architecture, str(base)]),
        Part("rounds", 180, script(full, "rounds", *shape, *four, *rounds, *template, *measured)),
        Part("evaluation", 120, script("evaluation_full_size.py", "evaluation", *asked)),
        Part("paths", 60, script("exact_paths.py", "paths", *paths)),
        Part("tests", 120, [*pytest, *tests]),
        Part("bfloat16", 90, script(full, "bfloat16", *shape, "--quantization", "0", *few)),
        Part("compiled", 120, script(full, "compiled", *shape, *four, *few, "--compile"), False),
    ]


def short_pairs(work: Path) -> Path:
    """Write question-answer pairs of a few words, so that a dry run is short."""
    file = work / "pairs.jsonl"
    rows = ({"input": "w" * (20 + i), "output": "w" * (30 + 7 * i)} for i in range(20))
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return file


def run_part(part: Part, out: Path, seconds: float) -> dict[str, Any]:
    """Run a part for so long at most; return its state, its seconds and what it measured."""
    limit = min(part.limit_seconds, seconds)
    if limit < 5:
        return {"state": "skipped", "seconds": 0.0, "reason": "no time was left"}
    log, result = out / f"{part.name}.txt", out / f"{part.name}.json"
    started = time.perf_counter()
    with log.open("w") as printed:
        process = subprocess.Popen(
            [sys.executable, *part.command],
            stdout=printed,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd=ROOT,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=limit)
            state = "passed" if code == 0 else "failed"
        except subprocess.TimeoutExpired:
            state = "out of time"
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its own session, hence only its processes
            process.wait()
    found: dict[str, Any] = {"state": state, "seconds": time.perf_counter() - started}
    text = log.read_text(errors="replace").strip().splitlines()
    if state == "failed":
        found["reason"] = text[-1][:300] if text else f"ended with {code}"
    if state == "out of time":
        found["reason"] = f"stopped after {limit:.0f} s"
    if result.is_file():
        found["result"] = json.loads(result.read_text())
    elif text:
        found["printed"] = text[-1][:300]
    print(f"\n== {part.name}: {state}, {found['seconds']:.1f} s", flush=True)
    print("\n".join(text[-40:]), flush=True)
    return found


def card(commit_of_code: str | None) -> dict[str, Any]:
    """Return the card, its driver, and the versions of the libraries."""
    versions = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    found: dict[str, Any] = {
        "card": "none",
        "versions": versions,
        "commit": commit_of_code or commit(),
    }
    asked = ["--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    if shutil.which("nvidia-smi"):
        told = subprocess.run(["nvidia-smi", *asked], capture_output=True, text=True, check=False)
        first = told.stdout.strip().splitlines()[:1]
        if told.returncode == 0 and first:
            name, driver, memory = first[0].split(", ")
            found |= {"card": name, "driver": driver, "memory": memory}
    return found


def commit() -> str:
    """Return the commit of the code, with `+` if files differ from it."""
    if not shutil.which("git"):
        return "unknown"
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if head.returncode:
        return "unknown"
    changed = [*git, "status", "--porcelain", "--untracked-files=no"]
    state = subprocess.run(changed, capture_output=True, text=True, check=False)
    return head.stdout.strip()[:12] + ("+" if state.stdout.strip() else "")


def place_of_base(given: argparse.Namespace) -> Path:
    """Return a new folder for the base: in main memory where it has room, else on disk."""
    shm = Path("/dev/shm")
    roomy = shm.is_dir() and shutil.disk_usage(shm).free > BASE_BYTES
    return Path(tempfile.mkdtemp(prefix="gpu-", dir=shm if roomy and not given.dry_run else None))


def main() -> None:
    """Run the parts; write one JSON and a table; end with 1 if a part failed."""
    names = ("base", "rounds", "evaluation", "paths", "tests", "bfloat16", "compiled")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", choices=names, help="default: all but compiled")
    parser.add_argument("--seconds", type=float, default=480, help="limit of all parts together")
    parser.add_argument("--architecture", default=None, help="default: llama-3-8b")
    parser.add_argument("--limit", type=int, default=400, help="questions of each benchmark")
    parser.add_argument("--data", type=Path, help="files of the benchmarks; default: made up")
    parser.add_argument("--benchmarks", nargs="+", default=["medmcqa"])
    parser.add_argument("--commit", help="of this code, where its folder is no git checkout")
    parser.add_argument("--dry-run", action="store_true", help="small shapes, on a CPU too")
    given = parser.parse_args()
    given.out = given.out.resolve()
    given.out.mkdir(parents=True, exist_ok=True)
    given.architecture = given.architecture or ("tiny" if given.dry_run else "llama-3-8b")
    work = place_of_base(given)
    began = time.perf_counter()
    found: dict[str, Any] = {**card(given.commit), "architecture": given.architecture, "parts": {}}
    found["dry_run"] = given.dry_run
    try:
        chosen = [
            part
            for part in parts_of(given, work, work / "base")
            if (part.name in given.parts if given.parts else part.by_default) or part.name == "base"
        ]
        for part in chosen:
            left = given.seconds - (time.perf_counter() - began)
            found["parts"][part.name] = run_part(part, given.out, left)
            (given.out / "gpu.json").write_text(json.dumps(found, indent=2) + "\n")
    finally:
        shutil.rmtree(work, ignore_errors=True)
    found["seconds"] = time.perf_counter() - began
    (given.out / "gpu.json").write_text(json.dumps(found, indent=2) + "\n")
    (given.out / "gpu.md").write_text(table := markdown(found))
    print(f"\n{table}")
    if failed := [n for n, part in found["parts"].items() if part["state"] != "passed"]:
        sys.exit(f"gpu.sh: {', '.join(failed)} did not pass")


if __name__ == "__main__":
    main()
