"""Before a site trains, it counts what looks like identifiers in its data; nothing of it leaves."""

from __future__ import annotations

import json
from typing import Any

import pytest
from flwr.app import RecordDict

from grandrounds.config import recipes
from grandrounds.engines.deployment import checks
from grandrounds.errors import OwnDataError
from grandrounds.site import visit as visits
from grandrounds.site.custody import audit
from grandrounds.site.custody.site_file import SiteFile
from grandrounds.wire import messages
from tests.asking import Asking
from tests.own_sites import sites_of
from tests.runs import Settings

PLANTED = ["Mrs. Roe, MRN 00123456, came back", "write to jane.roe@example.org"]


def planted(site: SiteFile, texts: list[str]) -> None:
    """Add rows with these texts to a site's data."""
    with site.place(site.data.source).open("a") as file:
        for text in texts:
            file.write(json.dumps({"input": f"What helps? {text}", "output": "Rest."}) + "\n")


def searches(site: SiteFile) -> list[dict[str, Any]]:
    return [line for line in audit.read(site.place("state")) if "searched" in line]


def introduced(visit: visits.Visit) -> RecordDict:
    return messages.content(config=visits.introduction(visit.site, visit.config))


def test_identifiers_are_counted_once_per_version_of_the_data_and_stay_here(
    settings: Settings, tmp_path: Any
) -> None:
    site = sites_of(settings, tmp_path)[0]
    planted(site, PLANTED)
    asking = Asking(site, settings)
    tags = [
        asking(run, kind="query", function=introduced).content.config_records["config"]["data-tag"]
        for run in ("ab", "ab", "cd")
    ]
    reply = asking(kind="train")
    [line] = searches(site)
    found = {"e-mail address": 1, "medical record number": 1, "title and name": 1}
    assert (line["identifiers"], line["searched"]) == (found, 32)
    assert "Roe" not in str(audit.read(site.place("state")))
    assert "identifier" not in str(reply.content)
    planted(site, PLANTED[:1])  # another version, though a duplicate row
    planted(site, ["Herr Roe"])
    asking(number=2)
    assert [line["searched"] for line in searches(site)] == [32, 33]
    [changed] = [asking(kind="query", function=introduced).content.config_records["config"]]
    assert tags[0] == tags[1] != tags[2]
    assert changed["data-tag"] not in tags


def test_a_site_that_refuses_identifiers_tells_the_server_no_reason(
    settings: Settings, tmp_path: Any
) -> None:
    site = sites_of(settings, tmp_path, data__identifiers="refuse")[0]
    asking = Asking(site, settings)
    planted(site, PLANTED[1:])  # an address has no check digit
    asking(kind="query", function=introduced)
    planted(site, PLANTED)
    with pytest.raises(OwnDataError) as told:
        asking("cd", kind="query", function=introduced)
    assert str(told.value) == (
        "The data of site 'site' cannot be used: grandrounds site check says why there."
    )
    line = audit.read(site.place("state"))[-1]
    found = {"e-mail address": 1, "medical record number": 1, "title and name": 1}
    assert (line["outcome"], line["identifiers"]) == ("failed", found)
    findings = list(checks.check(site, recipes.resolve(settings)))
    [shown] = [finding for finding in findings if finding.subject == "identifiers"]
    assert shown.level == "error"
    assert "of 32 examples: e-mail address in 1, medical record number in 1, title" in shown.text
    assert "Roe" not in shown.text
