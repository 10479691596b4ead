"""The benchmark scripts run on small sizes; no test asserts a time."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from grandrounds.config import recipes
from grandrounds.config.keys import CODECS
from grandrounds.model.lora import LoraSpec, adapter_layout
from tests.conftest import write_flashcards
from tests.places import ROOT
from tests.runs import Settings

sys.path.append(str(ROOT / "benchmarks"))

import deployment

pytestmark = pytest.mark.slow

SCRIPTS = ROOT / "benchmarks"


def result(tmp_path: Path, script: str, *arguments: str) -> Any:
    """Run a script with `--out` and return what it wrote."""
    out = tmp_path / "result.json"
    command = [sys.executable, str(SCRIPTS / script), *arguments, "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    return json.loads(out.read_text())


def test_overhead_compares_the_same_steps(tmp_path: Path) -> None:
    figures = result(
        tmp_path, "overhead.py", "--size", "tiny", "--rounds", "1", "--times", "1", "--threads", "1"
    )
    assert figures["steps"] == 1 * 3 * 6
    assert figures["ours_seconds"] > figures["ours_round_seconds"] >= figures["ours_visit_seconds"]
    assert figures["bare_seconds"] > figures["bare_loop_seconds"] > 0
    assert figures["whole_run_ratio"] == pytest.approx(
        figures["ours_seconds"] / figures["bare_seconds"]
    )


def test_host_time_tells_processor_time_and_functions(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPTS / "host_time.py"), "--layers", "2", "--repeats", "1"]
    told = [
        subprocess.run([*command, *more], check=True, capture_output=True, text=True, cwd=tmp_path)
        for more in ([], ["--profile"])
    ]
    assert float(told[0].stdout.split()[2]) > 0
    assert "lora_linear.py" in told[1].stdout


def test_neighbour_runs_every_arm_alone_and_beside_busy_processes(tmp_path: Path) -> None:
    quick = ("--size", "tiny", "--rounds", "1", "--times", "1", "--threads", "1")
    figures = result(tmp_path, "neighbour.py", *quick, "--neighbours", "1", "--waiting", "asleep")
    assert set(figures["medians"]) == {"asleep alone", "asleep beside"}
    assert all(seconds > 0 for seconds in figures["medians"].values())


def test_fused_measures_steps_by_each_way_and_peaks(tmp_path: Path) -> None:
    figures = result(tmp_path, "fused.py", "--architecture", "tiny")
    assert figures["proved"] == ["LoRA"]
    assert len(figures["steps"]) == 4
    assert {(row["fused"], row["checkpointed"]) for row in figures["peaks"]} == {
        (is_fused, layers) for is_fused in (True, False) for layers in (0, 1, 2)
    }


def test_devices_compares_two_processes_with_one(tmp_path: Path) -> None:
    quick = ("--architecture", "tiny", "--steps", "2", "--threads", "1", "--repeats", "1")
    figures = result(tmp_path, "devices.py", *quick, "--dropout", "0.1")
    arms = figures["arms"]
    assert {arm for arm in arms if arms[arm]["same_bits"]} == {"shares", "again", "devices"}
    assert arms["devices"]["train_loss"] == arms["shares"]["train_loss"]
    assert figures["backend"] == "gloo"


def test_attention_compares_paths_and_tails(tmp_path: Path) -> None:
    figures = result(tmp_path, "attention.py", "--steps", "1")
    arms = {row["arm"]: row for row in figures["visits"]}
    assert list(arms) == ["one a sequence", "one a layer", "tails of 256"]
    assert arms["one a sequence"]["paths"] == ["sequence by sequence"]
    assert all(row["new_ms"] > 0 for row in arms.values())
    assert all(0 < row["gradient of keys"] < 0.01 for row in figures["errors"])


def test_full_size_plays_whole_rounds_beside_bare_loops_and_the_templates_way(
    tmp_path: Path,
) -> None:
    quick = ("--architecture", "tiny", "--rounds", "1", "--threads", "1")
    figures = result(tmp_path, "full_size.py", *quick)
    assert figures["base_loads"] == 1
    assert set(figures["seconds"]) == {
        *("ours", "ours_visits", "same", "neither", "grouped", "answers")
    }
    assert figures["gain_same"][0] > 1  # the optimisations of a visit pay off
    assert figures["template_to_ours"] > 1
    assert 0 < figures["utilisation"] < 1
    assert 0.9 < figures["memory"]["planned_gib"] / figures["memory"]["measured_gib"] < 1.15


def test_full_size_says_what_would_fit_where_memory_runs_out(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPTS / "full_size.py"), "--architecture", "tiny"]
    done = subprocess.run(
        [*command, *["--rounds", "1", "--threads", "1", "--arms", "same", "--memory-gib", "0.001"]],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        # Freed memory returns to the system at once: a round shall not fit into what was freed.
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"},
    )
    assert done.returncode == 1
    assert "Memory ran out" in done.stderr, done.stderr


def test_a_dry_run_of_everything_for_a_gpu_passes_in_every_part(tmp_path: Path) -> None:
    """Without PYTHONPATH, from another folder, as on a machine where nothing is installed."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [str(SCRIPTS / "gpu.sh"), "--dry-run", "--out", "gpu"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment | {"PYTHON": sys.executable},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu" / "gpu.json").read_text())
    assert list(found["parts"]) == [*("base", "rounds", "evaluation", "paths", "tests", "bfloat16")]
    rounds = found["parts"]["rounds"]["result"]
    assert [row["memory"] for row in rounds["peaks"]] == [*("as it is", "ample", "half", "scarce")]
    assert rounds["peaks"][1]["measured_gib"] > rounds["peaks"][3]["measured_gib"]
    assert set(rounds["profile"]["kinds_ms_a_step"]) > {"matrix products", "attention", "optimizer"}
    assert rounds["template_to_ours"] > 1
    assert all(
        not row["different_answers"]
        for row in found["parts"]["evaluation"]["result"]["differences"]
    )
    table = (tmp_path / "gpu" / "gpu.md").read_text()
    assert "DRY RUN of small shapes" in table
    assert "| the template's way |" in table


def test_a_part_that_fails_or_hangs_is_told_and_leaves_what_it_wrote(tmp_path: Path) -> None:
    import gpu
    import gpu_table

    wrote = f"import pathlib; pathlib.Path({str(tmp_path)!r}, 'late.json').write_text('[1]')"
    parts = {
        "whole": gpu.Part("whole", 20, ["-c", "print('done')"]),
        "broken": gpu.Part("broken", 20, ["-c", "raise SystemExit('no | card')"]),
        "late": gpu.Part("late", 5, ["-c", f"{wrote}; import time; time.sleep(60)"]),
    }
    found = {name: gpu.run_part(part, tmp_path, 20) for name, part in parts.items()}
    found["left"] = gpu.run_part(gpu.Part("left", 20, ["-c", ""]), tmp_path, 3)
    states = {name: part["state"] for name, part in found.items()}
    assert states == {
        **{"whole": "passed", "broken": "failed", "late": "out of time", "left": "skipped"}
    }
    assert found["late"]["result"] == [1]
    assert "| broken | failed |" in gpu_table.states(found)
    assert "no / card" in gpu_table.states(found)


def test_kernels_are_told_apart_by_their_names() -> None:
    from step_profile import kind_of, union_seconds

    assert kind_of("void cutlass::Kernel2<fmha_cutlassF_bf16_aligned>") == "attention"
    assert kind_of("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT") == "matrix products"
    assert kind_of("void kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>") == "dequantisation"
    assert kind_of("void at::native::(anonymous namespace)::CatArrayBatchedCopy") == (
        "copies and casts"
    )
    assert kind_of("_rms_norm_forward_kernel") == "norms"
    assert kind_of("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>") == (
        "optimizer"
    )
    assert union_seconds([(0, 10), (5, 20), (40, 50), (42, 44)]) == pytest.approx(30e-9)


def test_deployment_plays_both_kinds_on_one_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is told of real processes: tests/engines/deployment/test_deployment.py."""
    bases = []

    def play(folder: Path, settings: Settings, rounds: int, *, agents: bool) -> dict[str, Any]:
        config = recipes.resolve(settings)
        assert adapter_layout(config.model.source, LoraSpec.of(config))
        bases.append(config.model.name)
        seconds = {"round": 4.0, "polling": 1.0, "transfer": 0.5, "start": 1.5, "visit": 1.0}
        return {"seconds": seconds, "base_loads": 1 if agents else rounds, "message_mib": 0.25}

    monkeypatch.setattr(deployment, "play", play)
    out = tmp_path / "result.json"
    quick = ("--architecture", "tiny", "--sites", "1", "--rounds", "3", "--out", str(out))
    monkeypatch.setattr(sys, "argv", ["deployment.py", *quick])
    deployment.main()
    assert len(bases) == 2
    assert len(set(bases)) == 1
    figures = json.loads(out.read_text())
    assert [figures[kind]["base_loads"] for kind in ("agents", "alone")] == [1, 3]
    printed = capsys.readouterr().out
    assert "a message of 0.25 MiB; median of 2 rounds" in printed
    assert printed.splitlines()[-1].split()[-2:] == ["1", "3"]


def test_server_memory_does_not_grow_with_the_cohort(tmp_path: Path) -> None:
    """64 replies of a 13 MiB adapter need at most 3 adapters more memory than 3 replies."""
    figures = result(tmp_path, "server_memory.py")
    assert [row["replies"] for row in figures["rows"]] == [3, 64]
    assert figures["growth_in_adapters"] <= 3


def test_codec_speed_measures_every_codec_and_the_sum_of_replies(tmp_path: Path) -> None:
    figures = result(tmp_path, "codec_speed.py", "--layers", "1", "--replies", "3", "--times", "1")
    assert figures["values"] == 8 * (4096 + 4096) + 8 * (4096 + 1024)
    measured = {(row["codec"], row["entropy_coding"]) for row in figures["codecs"]}
    assert len(measured) == len(figures["codecs"]) == 2 * len(CODECS)
    assert all(row["decode_mb_per_second"] > 0 for row in figures["codecs"])
    sums = figures["replies"]
    assert sums["times_in_place"] == sums["whole_seconds"] / sums["in_place_seconds"]


def test_masks_measures_site_server_and_bytes(tmp_path: Path) -> None:
    figures = result(tmp_path, "masks.py", "--sites", "3", "4", "--mib", "0.1")
    for row, lost in zip(figures["rows"], (0, 1), strict=True):
        assert row["lost"] == lost
        assert all(seconds > 0 for seconds in row["site_seconds"].values())
        size = row["bytes"]
        plain = 2 * 4 * int(0.1 * 2**20 / 4)
        assert size["down"] + size["up"] + plain // 2 == plain + size["beyond_plain"]


def test_real_model_compares_with_the_base(tiny_base: Path, tmp_path: Path) -> None:
    """The smallest form: a random base, two sites and two rounds on a few rows."""
    data, cards = tmp_path / "data", write_flashcards(tmp_path / "cards.jsonl", 60)
    for folder in ("train", "eval"):
        (data / folder).mkdir(parents=True)
    with gzip.open(data / "train" / "wikidoc_patient_information.jsonl.gz", "wb") as file:
        file.write(cards.read_bytes())
    options = {f"op{letter}": f"option {letter}" for letter in "abcd"}
    medmcqa = {"question": "Which helps?", **options, "cop": 1}
    pubmedqa = {"QUESTION": "Does it help?", "CONTEXTS": ["It does."], "final_decision": "yes"}
    for name, row in (("medmcqa", medmcqa), ("pubmedqa", pubmedqa)):
        (data / "eval" / f"{name}.jsonl").write_text(2 * (json.dumps(row) + "\n"))
    quick = (
        *("--data", str(data), "--folder", str(tmp_path / "work"), "--model", str(tiny_base)),
        *("--template", "alpaca", "--sites", "2", "--rounds", "2", "--formulary-rounds", "1"),
        *("--seeds", "1", "--jobs", "2"),
    )
    file = tmp_path / "cells.jsonl"
    command = [sys.executable, str(SCRIPTS / "real_model.py"), str(file), *quick]
    stopped = subprocess.run(
        [*command, "--seconds", "0"], check=True, capture_output=True, text=True, cwd=tmp_path
    )
    assert "missing: formulary plan, seed 1; formulary federated, seed 1; " in stopped.stdout
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path)
    setup, *lines = map(json.loads, file.read_text().splitlines())
    assert setup["setup"]["seeds"] == [1]
    found = {(line["cell"]["part"], line["cell"]["what"]): line["result"] for line in lines}
    assert found.keys() == {
        *(("wikidoc", w) for w in ("plan", "base", "federated", "centralised", "local")),
        *(("formulary", w) for w in ("plan", "base", "federated", "loss")),
        *((part, "benchmarks") for part in ("wikidoc", "formulary")),
    }
    assert {row["n"] for row in found["wikidoc", "benchmarks"]["rows"]} == {2}
    told = [found[cell]["held-out"] for cell in (("wikidoc", "base"), ("formulary", "loss"))]
    assert told[0].keys() == told[1].keys() == {"0", "1"}
    assert told[0] != told[1]
    table = subprocess.run([*command, "--table"], check=True, capture_output=True, text=True)
    assert table.stdout in done.stdout
    assert "  local, everywhere " in table.stdout
    assert "  after the formulary " in table.stdout


def test_cpu_visit_alternates_number_formats_and_libraries(tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    cards = write_flashcards(tmp_path / "cards.jsonl", 60)
    with gzip.open(tmp_path / "train" / "wikidoc_patient_information.jsonl.gz", "wb") as file:
        file.write(cards.read_bytes())
    quick = ("--model", str(tiny_base), "--template", "alpaca", "--steps", "1", "--repeats", "1")
    figures = result(tmp_path, "cpu_visit.py", "--data", str(tmp_path), *quick)
    losses = {arm: found["train_loss"] for arm, found in figures["medians"].items()}
    assert losses["auto"] == losses["float32"]  # a base this small keeps the default library
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)
    assert all(min(pair) > 0 for pair in figures["rates"].values())


def test_hostile_sites_that_agree_are_screened_out_and_a_finished_run_is_kept(
    tmp_path: Path,
) -> None:
    file = tmp_path / "runs.jsonl"
    cell = ("--settings", "robust", "--attacks", "inner-product", "--rounds", "1")
    command = [sys.executable, str(SCRIPTS / "hostile.py"), str(file), *cell]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    [line] = map(json.loads, file.read_text().splitlines())
    assert (line["rejected-hostile"], line["rejected-honest"]) == (2, 0)


def test_kills_end_with_the_bits_of_a_run_that_nobody_killed(tmp_path: Path) -> None:
    quick = ("--kills", "1", "--agent-kills", "2", "--rounds", "3", "--adapters-mib", "1")
    figures = result(tmp_path, "kills.py", *quick)
    assert (figures["kills"], figures["agents"]["kills"]) == (1, 2)
    assert figures["rounds-lost"] == figures["runs-with-other-bits"] == 0
    assert figures["agents"]["audit-lines-lost"] == figures["agents"]["runs-with-other-bits"] == 0
    assert figures["write-milliseconds"]["1 MiB"].keys() == {"all", "without-flushes", "checksum"}
