"""Pages in headless Chromium: no console message, no request, every figure drawn, keys work."""

from __future__ import annotations

import html as markup
import json
import re
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest

from grandrounds.errors import DataError
from grandrounds.study.report.browser import (
    QUIET,
    find_chromium,
    size_of,
    standalone,
    write_figures,
    write_png,
)
from grandrounds.study.report.comparison_file import read_comparison
from grandrounds.study.report.comparison_page import comparison_page
from grandrounds.study.report.figures import Page
from grandrounds.study.report.one_run import run_page
from grandrounds.study.report.page import html, template
from grandrounds.study.report.read import read_run
from grandrounds.study.report.several_runs import several_page
from tests.study.report.run_files import comparison, evaluation, write, write_run

CHROMIUM = find_chromium()

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")

PROBE = """
const frame = document.getElementById("page");
const say = (found) => { document.getElementById("found").textContent = JSON.stringify(found); };
frame.onload = () => {
  const page = frame.contentDocument;
  const press = (mark, key) => mark.dispatchEvent(
    new page.defaultView.KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
  const figures = [...page.querySelectorAll("svg.figure")];
  const marks = [...figures[0].querySelectorAll(".mark")];
  const tip = page.getElementById("tip");
  marks[0].focus();
  const first = tip.textContent;
  press(marks[0], "ArrowRight");
  const second = [page.activeElement === marks[1], marks[0].tabIndex, marks[1].tabIndex];
  press(marks[1], "End");
  const last = page.activeElement === marks.at(-1);
  press(marks.at(-1), "Escape");
  say({
    ready: page.documentElement.dataset.ready,
    width: page.documentElement.scrollWidth,
    figures: figures.length,
    drawn: figures.filter((f) => {
      const box = f.getBoundingClientRect();
      return box.width > 100 && box.height > 40;
    }).length,
    inside: figures.filter((f) => f.getBoundingClientRect().right <= frame.clientWidth).length,
    smallest: Math.min(...[...page.querySelectorAll("svg.figure text")].map(
      (t) => t.getBoundingClientRect().height)),
    broken: [...page.querySelectorAll(".tile .value")].filter((v) => {
      const line = parseFloat(page.defaultView.getComputedStyle(v).lineHeight);
      return v.getBoundingClientRect().height > 1.5 * line || v.scrollWidth > v.clientWidth;
    }).map((v) => v.textContent),
    cut: [...page.querySelectorAll(".scroll")].filter(
      (t) => t.scrollHeight > t.clientHeight + 1).length,
    marks: marks.length,
    alerts: page.defaultView.alerted || 0,
    labels: [marks[0].getAttribute("aria-label"), first],
    second, last, hidden: tip.hidden,
  });
};
frame.srcdoc = JSON.parse(document.getElementById("source").textContent);
"""


def browse(page: Path, folder: Path, *options: str) -> tuple[str, list[str], list[str]]:
    """Open a local page; return its DOM, the console's messages and the addresses it asked for.

    What Chromium asks on its own behalf has "not an origin" as its initiator.
    """
    log = folder / "net.json"
    command = [
        str(CHROMIUM),
        *QUIET,
        *options,
        f"--user-data-dir={folder / 'profile'}",
        f"--log-net-log={log}",
        "--enable-logging=stderr",
        "--virtual-time-budget=3000",
        "--dump-dom",
        page.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    events = [event.get("params", {}) for event in json.loads(log.read_text())["events"]]
    asked = {e["url"] for e in events if e.get("initiator", "not an origin") != "not an origin"}
    asked = {url for url in asked if not url.startswith(("file:", "data:"))}
    return done.stdout, console, sorted(asked)


def probed(content: str, folder: Path, width: int) -> tuple[dict[str, Any], list[str]]:
    """Return what a page of so many CSS pixels is like inside, and the console's messages."""
    source = json.dumps(content).replace("</", "<\\/")
    wrapper = folder / "wrapper.html"
    wrapper.write_text(
        "<!doctype html><meta charset='utf-8'>"
        f"<iframe id='page' width='{width}' height='900' style='border:0'></iframe>"
        f"<script type='application/json' id='source'>{source}</script><pre id='found'></pre>"
        f"<script>{PROBE}</script>"
    )
    dom, console, _ = browse(wrapper, folder, "--window-size=1400,1000")
    [found] = re.findall(r'<pre id="found">(.*?)</pre>', dom, re.DOTALL)
    return json.loads(markup.unescape(found)), console


def pages(folder: Path) -> dict[str, Page]:
    """Return a page of each kind."""
    run = write_run(folder / "run")
    write(run / "evaluation/evaluation.json", evaluation())
    failed = write_run(folder / "failed", planned=8, status="failed", reason="out of memory")
    file = folder / "wards/comparison.json"
    write(file, comparison())
    long_name = write_run(folder / "r", static__dataset__name="/data/" + "long_name_" * 12)
    return {
        "run": run_page(read_run(run)),
        "failed": run_page(read_run(failed)),
        "long": run_page(read_run(long_name)),
        "several": several_page([read_run(run), read_run(failed)]),
        "comparison": comparison_page(read_comparison(file), file),
    }


@needs_chromium
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["run", "failed", "several", "comparison"])
def test_a_page_opens_without_console_message_and_without_request(
    tmp_path: Path, kind: str
) -> None:
    page = pages(tmp_path)[kind]
    (tmp_path / "page.html").write_text(html(page))
    dom, console, asked = browse(tmp_path / "page.html", tmp_path)
    assert (console, asked) == ([], [])
    assert 'data-ready="yes"' in dom  # the script ran
    assert dom.count("<svg") == len(page.figures)


@needs_chromium
@pytest.mark.slow
def test_the_check_of_requests_sees_one(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(
        "<img src='http://127.0.0.1:9/x.png'><script>console.error('seen')</script>"
    )
    _, console, asked = browse(tmp_path / "page.html", tmp_path)
    assert asked == ["http://127.0.0.1:9/x.png"]
    assert any("seen" in line for line in console)


@needs_chromium
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["run", "long", "several", "comparison"])
def test_a_phone_shows_every_figure_without_scrolling_sideways(tmp_path: Path, kind: str) -> None:
    page = pages(tmp_path)[kind]
    found, console = probed(html(page), tmp_path, 390)
    assert found["width"] <= 390
    assert found["figures"] == found["drawn"] == found["inside"] == len(page.figures)
    assert found["smallest"] > 10
    assert console == []


@needs_chromium
@pytest.mark.slow
@pytest.mark.parametrize("width", [320, 390, 760, 1280])
def test_values_of_the_headline_stand_on_one_line_and_tables_show_whole(
    tmp_path: Path, width: int
) -> None:
    run = write_run(tmp_path / "long", rounds=8, sites=28)
    asked = {
        group: {"base": {"correct": 360, "n": 360}, "tuned": {"correct": right, "n": 360}}
        for group, right in (("public", 360), ("private", 294))
    }
    write(run / "summary.json", {"status": "completed", "formulary": asked})
    page = run_page(read_run(run))
    assert {"100.0 → 100.0 %", "100.0 → 81.7 %"} < {tile.value for tile in page.tiles}
    for content in (html(page), html(pages(tmp_path)["comparison"])):
        found, _ = probed(content.replace("<details", "<details open"), tmp_path, width)
        assert (found["broken"], found["cut"]) == ([], 0)


@needs_chromium
@pytest.mark.slow
def test_marks_are_reached_and_told_by_the_keyboard(tmp_path: Path) -> None:
    found, _ = probed(html(pages(tmp_path)["run"]), tmp_path, 1280)
    assert found["labels"] == ["round 0: held-out loss 2", "round 0: held-out loss 2"]
    assert found["second"] == [True, -1, 0]
    assert found["last"]
    assert found["hidden"]  # after Escape


@needs_chromium
@pytest.mark.slow
def test_a_script_in_a_name_does_not_run(tmp_path: Path) -> None:
    evil = "</script><script>window.alerted=1</script><img src=x onerror='window.alerted=2'>"
    run = write_run(tmp_path / "run", model__name=evil, static__dataset__name=evil)
    found, _ = probed(html(run_page(read_run(run))), tmp_path, 390)
    assert found["alerts"] == 0
    assert found["ready"] == "yes"
    # and the policy alone would stop it
    content = html(run_page(read_run(run))).replace("<h1>", "<script>window.alerted=3</script><h1>")
    found, console = probed(content, tmp_path, 390)
    assert found["alerts"] == 0
    assert "Content Security Policy" in console[0]


@needs_chromium
@pytest.mark.slow
def test_figures_become_png_of_twice_their_size(tmp_path: Path) -> None:
    figure = pages(tmp_path)["run"].figures[0]
    [svg] = write_figures([figure], tmp_path / "figures", template("figures.css"))
    png = write_png(str(CHROMIUM), svg)
    width, height = size_of(figure.svg)
    assert struct.unpack(">II", png.read_bytes()[16:24]) == (2 * width, 2 * height)
    assert png.stat().st_size > 5_000


def test_a_figure_alone_has_its_style_and_loads_nothing(tmp_path: Path) -> None:
    figure = pages(tmp_path)["run"].figures[0]
    alone = standalone(figure.svg, template("figures.css"))
    assert alone.startswith('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 440')
    assert alone.count("<style>") == 1
    assert "url(" not in alone


def test_a_chromium_that_fails_is_told_with_its_last_words(tmp_path: Path) -> None:
    fake = tmp_path / "chromium"
    fake.write_text("#!/bin/sh\necho 'no display' >&2\nexit 3\n")
    fake.chmod(0o755)
    figure = pages(tmp_path)["run"].figures[0]
    [svg] = write_figures([figure], tmp_path / "figures", template("figures.css"))
    with pytest.raises(DataError, match=r"\(exit code 3\): no display"):
        write_png(str(fake), svg)
