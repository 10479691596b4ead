"""A site's own data: files, SQLite and a real PostgreSQL; nothing is written, no password told."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from grandrounds.config import recipes
from grandrounds.data import large
from grandrounds.errors import DataError, OwnDataError
from grandrounds.site.custody import own_data
from grandrounds.site.custody.own_data import own_identifiers, own_split
from grandrounds.site.custody.own_run import examples_shown, localized, site_in_custody
from grandrounds.site.custody.site_file import SiteFile
from tests.conftest import write_flashcards
from tests.own_sites import make_site
from tests.real import free_port, wait_for

CARDS = [(f"What helps patient {i}?", f"Rest, and {i} cups of tea.") for i in range(40)]
QUERY = "SELECT question, answer FROM cards WHERE consent ORDER BY id"


@pytest.fixture(autouse=True)
def _fresh() -> None:
    own_data._databases.clear()


@pytest.fixture
def sqlite(tmp_path: Path) -> str:
    """URL of a database with 40 cards that may be used, and 5 that may not."""
    file = tmp_path / "clinic.db"
    with sqlite3.connect(file) as connection:
        connection.execute("create table cards (id integer, question, answer, consent integer)")
        rows = [(i, q, a, 1) for i, (q, a) in enumerate(CARDS)]
        rows += [(100 + i, "secret", "secret", 0) for i in range(5)]
        connection.executemany("insert into cards values (?, ?, ?, ?)", rows)
    connection.close()
    return f"sqlite:///{file}"


def database_site(tmp_path: Path, url: str, query: str = QUERY, **changes: Any) -> SiteFile:
    return make_site(
        tmp_path / "site",
        {"formulary": ""},
        source="",
        data__database=url,
        data__query=query,
        data__question_column="question",
        data__answer_column="answer",
        **changes,
    )


def pairs(site: SiteFile) -> set[tuple[str, str]]:
    split = own_split(site)
    return {(e.question, e.answer) for e in (*split.train, *split.held_out)}


def test_a_query_over_sqlite_gives_the_sites_examples(tmp_path: Path, sqlite: str) -> None:
    site = database_site(tmp_path, sqlite)
    assert pairs(site) == set(CARDS)
    split = own_split(site)
    assert split.report.held_out_examples == 2
    assert not {e.question for e in split.train} & {e.question for e in split.held_out}


def test_a_file_that_is_stored_on_the_disk_gives_the_same_examples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    for name, stored_bytes in (("whole", large.STORED_BYTES), ("stored", 0)):
        monkeypatch.setattr(large, "STORED_BYTES", stored_bytes)
        site = make_site(tmp_path / name, {"formulary": ""})
        write_flashcards(site.path.with_name("cards.jsonl"), 60)
        run = localized(site, recipes.resolve({}))
        own = site_in_custody(site, run, "a run")
        identifiers = own_identifiers(site)
        shown = list(examples_shown(site, run, 2))
        found.append((list(own.train), list(own.held_out), own.report, identifiers, shown, own.tag))
    (*whole, counts, searched, told, tag), (*stored, fewer, also, also_told, of_texts) = found
    assert stored == whole
    assert {"truncated": 0, **fewer} == counts
    assert (also, also_told) == (searched, told)
    assert of_texts.startswith("t")
    assert len(of_texts) == len(tag) + 1


def test_the_order_of_the_database_plays_no_part(tmp_path: Path, sqlite: str) -> None:
    one = own_split(database_site(tmp_path, sqlite))
    other = own_split(
        database_site(tmp_path / "b", sqlite, QUERY.replace("ORDER BY id", "ORDER BY id DESC"))
    )
    assert one == other


def test_held_out_examples_are_the_same_in_every_run_and_others_by_another_seed(
    tmp_path: Path, sqlite: str
) -> None:
    site = database_site(tmp_path, sqlite)
    assert own_split(site, "ab").held_out == own_split(site, "cd").held_out
    other = database_site(tmp_path / "b", sqlite, data__held_out_seed=7)
    assert own_split(other).held_out != own_split(site).held_out


def test_a_database_is_queried_once_a_day_however_many_runs_ask(
    tmp_path: Path, sqlite: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was once a run, and so once a refused message under a new key. A run keeps its rows."""
    asked: list[str] = []
    really = own_data._asked
    monkeypatch.setattr(
        own_data, "_asked", lambda url, query: asked.append(query) or really(url, query)
    )
    site, start, hour = database_site(tmp_path, sqlite), time.monotonic(), 3600.0

    def asks(run: str, hours: float) -> int:
        monkeypatch.setattr(time, "monotonic", lambda: start + hours * hour)
        own_split(site, run)
        return len(asked)

    assert [asks(run, 0) for run in ("ab", "cd", "ef", "ab")] == [1, 1, 1, 1]
    assert [asks("ab", 23.9), asks("ab", 30), asks("cd", 30), asks("ab", 30)] == [1, 1, 2, 2]


def test_a_query_that_fails_is_not_tried_again_for_a_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def fail(url: str, query: str) -> Any:
        asked.append(query)
        raise DataError("no server")

    monkeypatch.setattr(own_data, "_asked", fail)
    site = database_site(tmp_path, "sqlite://")
    for _ in range(3):
        with pytest.raises(DataError, match="no server"):
            own_split(site)
    assert len(asked) == 1
    monkeypatch.setattr(own_data, "RETRY_SECONDS", 0.0)
    with pytest.raises(DataError, match="no server"):
        own_split(site)
    assert len(asked) == 2


def test_columns_are_mapped(tmp_path: Path, sqlite: str) -> None:
    query = "SELECT question AS q, answer AS a FROM cards WHERE consent"
    site = make_site(
        tmp_path / "site",
        {"formulary": ""},
        source="",
        data__database=sqlite,
        data__query=query,
        data__question_column="q",
        data__answer_column="a",
    )
    assert pairs(site) == set(CARDS)
    query = "SELECT 'Say:' AS instruction, question AS input, answer FROM cards WHERE consent"
    both = make_site(
        tmp_path / "both",
        {"formulary": ""},
        source="",
        data__database=sqlite,
        data__query=query,
        data__question_column="instruction,input",
        data__answer_column="answer",
    )
    assert pairs(both) == {(f"Say: {question}", answer) for question, answer in CARDS}


WRONG = [
    ("sqlite:///{folder}/none/clinic.db", QUERY, "the query failed"),
    ("sqlite:///{file}", "SELECT question FROM carts", "no such table: carts"),
    ("sqlite:///{file}", "SELECT question FROM cards", "no column 'answer'"),
    ("sqlite:///{file}", "DELETE FROM cards WHERE id < 0", "returns no rows: it must be a SELECT"),
    ("sqlite:///{file}", "SELECT question, answer FROM cards WHERE id < 0", "has no rows"),
    ("clinic", QUERY, "is not an SQLAlchemy URL"),
    ("martian://x/y", QUERY, "is not an SQLAlchemy URL"),
    (
        "mysql+pymysql://reader:topsecret@localhost/clinic",
        QUERY,
        "a driver: pip install pymysql",
    ),
    (
        "postgresql+psycopg://reader:topsecret@127.0.0.1:1/clinic",
        QUERY,
        r"reader:\*\*\*@127\.0\.0\.1:1/clinic.*the query failed",
    ),
]


@pytest.mark.parametrize(("url", "query", "reason"), WRONG)
def test_what_cannot_be_read_is_told_without_the_password(
    tmp_path: Path, sqlite: str, url: str, query: str, reason: str
) -> None:
    url = url.format(folder=tmp_path, file=sqlite.removeprefix("sqlite:///"))
    with pytest.raises(DataError, match=reason) as caught:
        own_split(database_site(tmp_path, url, query))
    assert "topsecret" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_nothing_is_written_anywhere(tmp_path: Path, sqlite: str) -> None:
    """No cache of rows: Hugging Face's would copy them to the home folder."""
    code = (
        "import sys, os\n"
        "from pathlib import Path\n"
        "from grandrounds.site.custody.site_file import read_site_file\n"
        "from grandrounds.site.custody.own_data import own_split\n"
        "import datasets, sqlalchemy\n"
        "written = []\n"
        "def watch(event, args):\n"
        "    if event == 'open' and (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):\n"
        "        written.append(args[0])\n"
        "sys.addaudithook(watch)\n"
        "print(len(own_split(read_site_file(Path(sys.argv[1]))).train), written)\n"
    )
    site = database_site(tmp_path, sqlite)
    command = [sys.executable, "-B", "-c", code, str(site.path)]  # nor compiled modules
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.strip().splitlines()[-1] == "38 []", done.stderr


def test_a_file_is_read_in_place_of_a_database(tmp_path: Path) -> None:
    import csv

    site = make_site(tmp_path, {"formulary": ""}, source="cards.csv")
    with (tmp_path / "cards.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("input", "output"), *CARDS])
    assert pairs(site) == set(CARDS)


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """URL of a PostgreSQL server of our own, run by another user than root."""
    programs = Path(shutil.which("pg_ctl") or "/usr/lib/postgresql/15/bin/pg_ctl")
    if not programs.exists():
        pytest.skip("no PostgreSQL server here (Debian: postgresql)")
    bin_folder = programs.resolve().parent
    who: dict[str, Any] = {}
    if os.getuid() == 0:
        name = "postgres" if any(u.pw_name == "postgres" for u in pwd.getpwall()) else "nobody"
        user = pwd.getpwnam(name)
        who = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    folder = Path(tempfile.mkdtemp(prefix="gr-pg-", dir="/tmp"))
    if who:
        os.chown(folder, who["user"], who["group"])
    port = free_port()

    def run(*command: str) -> None:
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, **who)
        assert done.returncode == 0, done.stderr

    run(str(bin_folder / "initdb"), "-D", str(folder / "data"), "-A", "trust", "-U", "owner")
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            [
                *(str(bin_folder / "postgres"), "-D", str(folder / "data"), "-p", str(port)),
                *("-k", str(folder), "-h", "127.0.0.1"),
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=folder,
            **who,
        )
    try:
        wait_for(lambda: b"ready to accept" in (folder / "log").read_bytes(), 60)
        yield f"postgresql+psycopg://owner@127.0.0.1:{port}/postgres"
    finally:
        server.terminate()
        server.wait(30)
        shutil.rmtree(folder)


@pytest.mark.slow
def test_a_real_postgresql_server_is_read(tmp_path: Path, postgres: str) -> None:
    import sqlalchemy

    engine = sqlalchemy.create_engine(postgres)
    with engine.begin() as connection:
        connection.execute(
            sqlalchemy.text(
                "create table cards (id int, question text, answer text, consent boolean)"
            )
        )
        rows = [{"i": i, "q": q, "a": a} for i, (q, a) in enumerate(CARDS)]
        connection.execute(sqlalchemy.text("insert into cards values (:i, :q, :a, true)"), rows)
        connection.execute(
            sqlalchemy.text("insert into cards values (99, 'secret', 'secret', false)")
        )
        connection.execute(sqlalchemy.text("create role reader login password 'topsecret'"))
        connection.execute(sqlalchemy.text("create role stranger login"))
        connection.execute(sqlalchemy.text("grant select on cards to reader"))
    engine.dispose()
    reader = postgres.replace("owner@", "reader:topsecret@")
    assert pairs(database_site(tmp_path, reader)) == set(CARDS)
    stranger = postgres.replace("owner@", "stranger@")
    with pytest.raises(DataError, match="permission denied for table cards"):
        own_split(database_site(tmp_path / "b", stranger))
    with pytest.raises(DataError, match='relation "carts" does not exist') as caught:
        own_split(database_site(tmp_path / "c", reader, "SELECT question FROM carts"))
    assert "topsecret" not in str(caught.value)


# --- The run's prompt -----------------------------------------------------------------------------

APART = "{% if instruction %}[{{ instruction }}] {% endif %}{{ question }}: {{ answer }}"
ROWS = [{"instruction": "Answer.", "input": q, "output": a} for q, a in CARDS]


def shown(site: SiteFile, base: Path, **settings: Any) -> str:
    config = recipes.resolve({"model.name": str(base), **settings})
    return next(examples_shown(site, config, 1))


def rows_site(tmp_path: Path, base: Path, rows: list[dict[str, str]], **changes: Any) -> SiteFile:
    site = make_site(tmp_path / "site", {str(base): str(base)}, source="cards.jsonl", **changes)
    (site.path.parent / "cards.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in rows))
    return site


def test_a_runs_own_template_shows_instructions_that_others_leave_out(
    tmp_path: Path, tiny_base: Path
) -> None:
    site = rows_site(tmp_path, tiny_base, ROWS)
    said = shown(site, tiny_base, **{"data.prompt-template": APART})
    assert said.startswith("[Answer.] What helps patient")
    assert "Answer." not in shown(site, tiny_base)
    plain, own = own_split(site), own_split(site, template=APART)
    assert [e.apart[1] for e in own.held_out] == [e.question for e in plain.held_out]


def test_identifiers_are_searched_in_what_the_template_shows(
    tmp_path: Path, tiny_base: Path
) -> None:
    rows = [{**row, "instruction": "Answer dr.jane.doe@clinic.example."} for row in ROWS]
    site = rows_site(tmp_path, tiny_base, rows)
    assert not own_identifiers(site).counts
    assert own_identifiers(site, template=APART).counts


def test_a_site_of_plain_text_trains_on_the_whole_of_it(tmp_path: Path, tiny_base: Path) -> None:
    rows = [{"note": f"Patient {i} drank tea."} for i in range(40)]
    columns = {"data__question_column": "", "data__answer_column": "note"}
    site = rows_site(tmp_path, tiny_base, rows, **columns)
    said = shown(site, tiny_base, **{"data.prompt-template": "text"})
    assert said.startswith("P⟦atient ")
    assert said.endswith("drank tea.<eos>⟧")
    with pytest.raises(OwnDataError) as caught:
        shown(site, tiny_base)
    assert "are plain text, without question" in str(caught.value.__cause__)
