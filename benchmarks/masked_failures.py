"""Masked rounds on real agents, some of which are killed: SuperLink, TLS, node keys.

    python benchmarks/masked_failures.py --sites 5
    python benchmarks/masked_failures.py --sites 3

Of five sites one may be lost: in the first round one is killed before its shares, in the second
another one in training; both come back, and the third round goes on with those whose keys are
exchanged. Of three sites none may be lost: one is killed in training, the run ends and says why in
one line, and goes on by `--resume` once the site is back. That no site has answered for two sums of
a round is read from audit logs. Each SuperNode has a network namespace of its own where that is
permitted (root and iproute2); else all are on loopback.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from grandrounds.site.custody import audit
from tests.engines.deployment.test_network import Network, can_make_namespaces
from tests.real import FORMULARY, Consortium, rounds_done, wait_for
from tests.runs import Settings, metrics_of

MASKED: Settings = {
    **FORMULARY,
    "secure-aggregation": "masked32",
    "strategy.fraction-train": 1.0,
    "strategy.min-reply-fraction": 0.6,
    "strategy.connect-timeout-seconds": 120,
    "train.training-arguments.max-steps": 2,
}


def answered(consortium: Consortium, site: int, asked: str, number: int) -> list[dict[str, Any]]:
    """Return a site's lines of the audit log on one kind of message in a round."""
    folder = consortium.sites[site].place("state")
    return [
        line
        for line in audit.read(folder)
        if (line["asked"], line["round"], line["outcome"]) == (asked, number, "answered")
    ]


def killed(consortium: Consortium, site: int, after: str, number: int) -> None:
    """Kill a site's agent once it has answered one exchange of a round."""
    wait_for(lambda: answered(consortium, site, after, number), 300, f"no {after} at site {site}")
    consortium.kill(f"agent{site}")


def one_sum_a_round(consortium: Consortium) -> bool:
    """Whether no site has answered for two sets of survivors in one round."""
    for i, site in enumerate(consortium.sites):
        sums: dict[int, set[tuple[int, ...]]] = {}
        for line in audit.read(site.place("state")):
            if line["asked"] == "train.unmask" and line["outcome"] == "answered":
                sums.setdefault(line["round"], set()).add(tuple(line["survivors"]))
        if any(len(sets) > 1 for sets in sums.values()):
            print(f"site {i} has answered for two sums: {sums}")
            return False
    return True


def told(run: Path) -> None:
    """Print what came of each round."""
    for line in metrics_of(run)[1:]:
        found = line["masked-sum"]
        print(
            f"round {line['round']}: {found['sites']} sites in the sum, {found['attempts']} "
            f"attempts, {found['exchanges']} exchanges, {line['seconds']:.1f} s; "
            f"failed {line['failed']}"
        )


def of_five(consortium: Consortium, run: Path) -> int:
    """Lose one site before its shares, then another one in training; return the exit code."""
    process = consortium.begin_run(run, 3)
    killed(consortium, 3, "train.keys", 1)
    wait_for(lambda: rounds_done(run) >= 1 or process.poll() is not None, 400)
    consortium.start_agent(3)
    killed(consortium, 2, "train.unmask", 1)  # its keys and shares of the second round are out
    wait_for(lambda: rounds_done(run) >= 2 or process.poll() is not None, 400)
    consortium.start_agent(2)
    return consortium.finished(process, 400)


def of_three(consortium: Consortium, run: Path) -> int:
    """Lose one of three, then resume with all; return the exit code."""
    process = consortium.begin_run(run, 2)
    killed(consortium, 1, "train.shares", 1)
    code = consortium.finished(process, 600)
    lines = [line for line in consortium.log(run.name).splitlines() if "Round 1" in line]
    print(f"exit code {code}: {lines[-1:]}")
    consortium.start_agent(1)
    return consortium.finished(consortium.resume_run(run), 400)


def main() -> None:
    """Play; print what came of each round."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sites", type=int, default=5, choices=(3, 5))
    given = parser.parse_args()
    settings = {**MASKED, "data.num-partitions": given.sites}
    policy = {"policy__max_runs_per_day": 2, "privacy__require": "masked", "secure__min_cohort": 3}
    with tempfile.TemporaryDirectory(prefix="masked-failures-") as scratch:
        folder = Path(scratch) / "c"
        run = folder / "run"
        with contextlib.ExitStack() as opened:
            places: dict[str, Any] = {}
            if can_make_namespaces():
                network = opened.enter_context(Network(given.sites))
                places = {"host": network.host, "outside": network.inside}
            print("network namespaces" if places else "loopback", flush=True)
            consortium = opened.enter_context(Consortium(folder, settings, **places, **policy))
            consortium.share_roster()
            consortium.start_all()
            code = (of_five if given.sites == 5 else of_three)(consortium, run)
            if code != 0:
                print(consortium.log("run")[-3000:])
            is_one = one_sum_a_round(consortium)
        told(run)
        print(f"exit code {code}, one sum a round at every site: {is_one}")
        sys.exit(code or not is_one)


if __name__ == "__main__":
    main()
