"""Every figure of a checkpoint's model card."""

from __future__ import annotations

import json
import re
from pathlib import Path

from scripts.check_figures.provenance_rules import configured
from scripts.check_figures.raw import FAILED, Raw
from scripts.check_figures.scores import wilson
from scripts.check_figures.sheet import Sheet


def check_card(card: str, raw: Raw, folder: Path) -> Sheet:
    """Check README.md of a folder `peft_<round>`; the sheet holds what was found."""
    number = int(folder.name.removeprefix("peft_"))
    line = next(line for line in raw.lines if line["round"] == number)
    described = json.loads((folder / "adapter_config.json").read_text())
    sheet = Sheet(texts_of(card), raw.names)
    known = [*configured(raw), number, 95]
    sheet.want("heading", [number, raw.planned])
    loss = line.get("held-out-loss")
    start = next((one["held-out-loss"] for one in raw.lines if one["round"] == 0 and loss), None)
    spent: dict[str, float] = {}
    for one in raw.trained[: raw.trained.index(line) + 1] if number else ():
        spent |= one.get("epsilon") or {}
    for place, text in sheet.texts.items():
        row = place.removeprefix("row/")
        if row == "adapter":
            trained = [raw.config[f"model.lora.peft-lora-{key}"] for key in ("r", "alpha")]
            own = [described["r"], described["lora_alpha"]]
            sheet.want(place, [*own, *trained] if own != trained else own)
        elif row == "held-out loss" and loss is not None:
            sheet.want(place, [loss, start] if "(" in text and start is not None else [loss])
        elif row == "communication so far":
            sheet.want(place, [line["communication-mib"]])
        elif row == "Comm. Costs":
            mib = line["communication-mib"]
            sheet.want(place, [mib, mib / 1024, 2, 20, 2, 30] if "^" in text else [mib, mib / 1024])
        elif row == "failed replies so far":
            sheet.want(place, [failures_until(raw, number)])
        elif row == "epsilon spent":
            sheet.want(place, [max(spent.values())])
        elif row == "epsilon by site":
            told = ((s, spent.get(str(s))) for s in sorted(s["partition-id"] for s in raw.sites))
            sheet.want(place, [n for pair in told for n in pair if n is not None][:200])
        elif row == "Rounds":
            sheet.want(place, [number, len(raw.trained[0]["cohort"])])
        elif row.startswith("accuracy/"):
            shares = re.search(r"(\d[\d,]*)/(\d[\d,]*)", text)
            assert shares
            correct, n = (int(part.replace(",", "")) for part in shares.groups())
            low, high = wilson(correct, n)
            sheet.want(place, [correct, n, 100 * correct / n, 100 * low, 100 * high])
        elif place != "heading":
            sheet.among(place, known)
    return sheet


def failures_until(raw: Raw, number: int) -> int:
    """Return the failed replies up to a round, those of rounds that did not finish among them."""
    before = [line for line in raw.lost if (line["after-round"] or 0) < number]
    until = [line for line in raw.lines if line["round"] <= number]
    return sum(len(line.get(kind) or ()) for line in (*until, *before) for kind in FAILED)


def texts_of(card: str) -> dict[str, str]:
    """Return the texts of a card that may hold figures: heading, rows of tables, lines."""
    found: dict[str, str] = {}
    body = card.split("---\n", 2)[2]
    in_code = False
    for i, line in enumerate(body.splitlines()):
        if line.startswith("```"):
            in_code = not in_code
        elif in_code:
            is_recipe = re.match(r'"([a-z.\d-]+)" = (.*)', line)
            found |= {f"recipe/{i}": is_recipe[2]} if is_recipe else {}
        elif line.startswith("# "):
            found["heading"] = line
        elif line.startswith("| ") and not line.startswith(("| |", "| ---")):
            first, *others = (cell.strip() for cell in line.strip("| ").split(" | "))
            if len(others) == 1:
                found[f"row/{first}"] = others[0]
            elif first != "protocol":
                found[f"row/accuracy/{i}"] = " ".join(others[-3:])
        elif not line.startswith("|"):
            # a sentence; hashes and addresses are no figures
            found[f"line/{i}"] = re.sub(r"https?://\S+|`[^`]*`", "~", line)
    return found
