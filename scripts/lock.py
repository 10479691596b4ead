#!/usr/bin/env python
"""Write requirements.lock: one version of every dependency, with the SHA-256 of its files.

    pip install uv && python scripts/lock.py

The ranges are those of pyproject.toml, with all extras but `gpu`, and what builds the package. It
holds for every platform and Python from 3.11. torch is left out, since its builds differ by
accelerator and come from several indexes; so are the CUDA libraries that PyPI's build of it takes
along. Versions already locked stay unless `--upgrade` is given.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock"

CUDA = (
    *("triton", "cuda-bindings", "cuda-toolkit", "nvidia-cublas", "nvidia-cudnn-cu13"),
    *("nvidia-cusparselt-cu13", "nvidia-nccl-cu13", "nvidia-nvshmem-cu13"),
)
"""What PyPI's build of torch for Linux requires besides other platforms' builds."""

HEADER = """\
# Every dependency of grandrounds[all,dev] but torch, by version and SHA-256; written by
# scripts/lock.py. Install torch first, then this file:
#   pip install --require-hashes --no-deps -r requirements.lock
#   pip install --no-deps --no-build-isolation -e . && pip check
"""


def main() -> None:
    """Resolve the ranges and write the lock."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--upgrade", action="store_true", help="Take the newest versions allowed.")
    options = parser.parse_args()
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    with tempfile.TemporaryDirectory() as folder:
        wanted, excluded = Path(folder, "build.in"), Path(folder, "excluded.txt")
        wanted.write_text("\n".join([*build, "editables"]))  # hatchling's, of an editable install
        excluded.write_text("\n".join(CUDA))
        command = (
            *("uv", "pip", "compile", ROOT / "pyproject.toml", wanted),
            *("--extra", "all", "--extra", "dev"),  # not gpu: Triton belongs to CUDA's torch
            *("--universal", "--python-version", "3.11", "--generate-hashes", "--no-annotate"),
            *("--no-header", "--excludes", excluded, "--no-emit-package", "torch"),
            *("--output-file", LOCK, "--quiet", *["--upgrade"] * options.upgrade),
        )
        if subprocess.run(command, check=False).returncode:
            sys.exit("uv could not resolve the ranges of pyproject.toml; see above.")
    LOCK.write_text(HEADER + LOCK.read_text())


if __name__ == "__main__":
    main()
