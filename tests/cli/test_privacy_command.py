"""`grandrounds privacy` as a person meets it."""

from __future__ import annotations

import json
import subprocess
import sys

HEAVY = ("torch", "transformers", "flwr", "peft", "datasets", "pyarrow")

OPTIONS = (
    "--units 1000 --sampling-rate 1 --steps 1 --noise-multiplier 20 --delta 1e-6 "
    "--set strategy.name=fedavg"
)


def test_a_guarantee_is_planned_without_torch() -> None:
    """Five visits of a step each are five releases of multiplier 20, or one of 8.94."""
    code = (
        "import sys, atexit\n"
        f"atexit.register(lambda: print([n for n in {HEAVY!r} if n in sys.modules], "
        "file=sys.stderr))\n"
        f"sys.argv = ['grandrounds', 'privacy', 'plan', '--json', *{OPTIONS.split()!r}]\n"
        "from grandrounds.__main__ import main\nmain()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip().endswith("\n[]")
    found = json.loads(done.stdout)
    assert [(one["rounds"], one["visits"]) for one in found["epsilon"]] == [
        (1, 1),
        (12, 3),
        (24, 5),
    ]
    spent = [one["epsilon"] for one in found["epsilon"]]
    assert spent == sorted(spent)
    assert found["unit"] == "record"
    # noise 20 on 122,880 values, over 1,000 units a step
    assert round(found["noise-to-clip"], 2) == 7.01
    assert found["learns"] == "doubtful"
    assert found["site-level"]["private"] is False
    assert "below about 80 sites a round" in found["site-level"]["why"]
    assert "site level: not private" in done.stderr
    assert "may not learn" in done.stderr
