"""A refused message costs next to nothing, and its lines do not fill the disk."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grandrounds.config import recipes
from grandrounds.engines.deployment import checks
from grandrounds.errors import (
    ConfigError,
    GrandRoundsError,
    PolicyError,
    ReplyError,
    ThrottledError,
)
from grandrounds.site.custody import answer as custody
from grandrounds.site.custody import audit, clock, quota, refusals
from grandrounds.site.custody.state import opened
from grandrounds.site.visit import introduction, parsed
from grandrounds.wire import messages
from tests.asking import Asking
from tests.data.test_chat_settings import LEAP, TEMPLATE
from tests.own_sites import sites_of
from tests.runs import Settings

FORBIDDEN: Settings = {"model.lora.peft-lora-r": 128}


@pytest.fixture
def asks(settings: Settings, tmp_path: Path) -> Asking:
    return Asking(sites_of(settings, tmp_path)[0], settings)


@pytest.fixture
def pass_seconds(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    passed = [0.0]
    since_boot = clock._since_boot

    def let_pass(seconds: float) -> None:
        passed[0] += seconds

    monkeypatch.setattr(clock, "_since_boot", lambda: since_boot() + passed[0])
    return let_pass


def refused(asks: Asking, count: int, run: str = "ff", **changes: Any) -> list[str]:
    """Ask for what is forbidden; return what the site says to it."""
    said = []
    for _ in range(count):
        with pytest.raises(GrandRoundsError) as caught:
            asks(run, **{"settings": FORBIDDEN, **changes})
        said.append(str(caught.value))
    return said


def lines_of(asks: Asking) -> list[dict[str, Any]]:
    return audit.read(asks.site.place("state"))


def test_beyond_twenty_refusals_the_answer_is_one_constant_text_without_work_or_log_line(
    asks: Asking, monkeypatch: pytest.MonkeyPatch, pass_seconds: Callable[[float], None]
) -> None:
    said = refused(asks, refusals.MOST)
    assert all("max-rank" in text for text in said)
    monkeypatch.setattr(custody, "parsed", None)  # whatever it did now would be an error
    said = refused(asks, 10) + [text for i in range(10) for text in refused(asks, 1, f"{i:x}f")]
    assert set(said) == {refusals.TOLD}
    assert len(lines_of(asks)) == refusals.MOST
    monkeypatch.setattr(custody, "parsed", parsed)
    pass_seconds(refusals.WINDOW_SECONDS)
    [text] = refused(asks, 1)
    assert "max-rank" in text
    *_, summary, line = lines_of(asks)
    assert (summary["outcome"], summary["messages"]) == ("throttled", 20)
    assert line["outcome"] == "refused"


def test_strangers_refusals_do_not_close_the_site_to_a_run_in_progress(asks: Asking) -> None:
    asks("ab")
    refused(asks, refusals.MOST + 1)
    asks("ab", 2)
    with pytest.raises(ThrottledError):
        asks("cd", kind="query")
    refused(asks, refusals.MOST, "ab")
    with pytest.raises(ThrottledError):
        asks("ab", 3)


def test_refused_roll_calls_use_up_no_answer(asks: Asking, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run asks a site that waits for its operator's approval before each of its rounds."""
    monkeypatch.setattr(quota, "MOST_QUESTIONS_OF_OTHERS", 3)
    refused(asks, 5, kind="query")
    asks(kind="query")


def test_messages_that_fail_or_crash_count_as_refusals(asks: Asking) -> None:
    def crash(_: Any) -> Any:
        raise ZeroDivisionError

    def fail(_: Any) -> Any:
        raise ReplyError("no")

    for i in range(refusals.MOST):
        if i % 2:
            assert asks("ab", i + 1, function=crash).has_error()
        else:
            refused(asks, 1, "ab", number=i + 1, function=fail, settings={})
    with pytest.raises(ThrottledError):
        asks("ab", 99)


def test_messages_without_a_runs_key_are_throttled_too(asks: Asking) -> None:
    said = refused(asks, refusals.MOST + 5, "no key", settings={})
    assert said[-5:] == [refusals.TOLD] * 5
    assert len(lines_of(asks)) == refusals.MOST


def test_the_log_grows_by_megabytes_a_day_at_most(asks: Asking) -> None:
    """It grew by 1.8 GiB: a line for each of 35 messages a second. The longest lines there are."""
    long = "/" + "x" * 5000
    for _ in range(refusals.MOST):
        refused(asks, 1, "f" * 32, settings={"model.name": long}, said={"cursor": long})
    size = (asks.site.place("state") / audit.FILE).stat().st_size
    windows = 24 * 3600 / refusals.WINDOW_SECONDS
    assert size * windows < 16 * 2**20


def test_a_refused_message_reads_no_data(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """20,000 rows were read, queried and tokenised for each: 12.4 s."""
    asks = Asking(sites_of(settings, tmp_path)[0], settings)
    asks("ab")
    monkeypatch.setattr(custody, "site_in_custody", None)
    for kind in ("query", "train", "evaluate"):
        with pytest.raises(PolicyError, match="max-runs-per-day"):
            asks("cd", kind=kind)
    with pytest.raises(PolicyError, match="has changed since its first visit"):
        asks("ab", 2, settings=FORBIDDEN)


def test_a_refusal_takes_milliseconds(asks: Asking) -> None:
    refused(asks, 1)
    started = time.process_time()
    refused(asks, refusals.MOST - 1)
    counted = time.process_time()
    refused(asks, 20)
    ended = time.process_time()
    assert (counted - started) / (refusals.MOST - 1) < 0.25
    assert (ended - counted) / 20 < 0.1


def test_a_run_pinned_by_a_version_without_a_key_goes_on_while_the_key_has_its_default(
    settings: Settings, tmp_path: Path
) -> None:
    asks = Asking(sites_of(settings, tmp_path)[0], settings)
    asks("ab")
    with opened(asks.site.place("state")) as state:
        [[text]] = state.table.execute("select pinned from kept_runs").fetchall()
        pinned = json.loads(text)
        del pinned["data.system-prompt"], pinned["model.revision"]
        state.table.execute("update kept_runs set pinned = ?", (json.dumps(pinned),))
    asks("ab", 2)
    with pytest.raises(PolicyError, match=r"model\.revision: '' → 'v2'"):
        asks("ab", 3, settings={"model.name": "someone/model", "model.revision": "v2"})


def test_a_site_reads_its_own_data_with_the_prompt_of_the_run(
    settings: Settings, tiny_base: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    (base / "chat_template.jinja").write_text(TEMPLATE)
    chat = {"model.name": str(base), "data.prompt-template": "chat", "train.seq-length": 384}
    asks = Asking(sites_of({**settings, **chat}, tmp_path)[0], {**settings, **chat})
    prompts = []
    for number, more in enumerate(({}, {"data.system-prompt": "Be brief."})):
        run = {"data.template-date": LEAP, **more}
        reply = asks(
            f"{number}a",
            kind="query",
            settings=run,
            function=lambda visit: messages.content(config=introduction(visit.site, visit.config)),
        )
        prompts.append(reply.content.config_records["config"]["prompt"])
    assert prompts[0] != prompts[1]
    with pytest.raises(ConfigError, match=r"set data\.template-date"):
        asks("3a", kind="query")
    findings = list(checks.check(asks.site, recipes.resolve({**settings, **chat})))
    [tokens] = [f for f in findings if f.subject.startswith("tokens under")]
    assert tokens.level == "ok"
    assert not [f for f in findings if "template-date" in f.text]
