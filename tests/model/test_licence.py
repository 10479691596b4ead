"""The licence of a base is that of its own card, where this machine has it."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest

from grandrounds.config.bases import REAL_BASE
from grandrounds.model.licence import licence_of


def test_known_bases_have_theirs_fetched_or_not() -> None:
    assert licence_of("formulary") == {"license": "apache-2.0"}
    assert licence_of(REAL_BASE) == {"license": "apache-2.0"}


@pytest.mark.parametrize(
    ("card", "told"),
    [
        ("---\nlicense: mit\ntags:\n- x\n---\n# A base\n", {"license": "mit"}),
        (
            "---\r\nlicense: other\r\nlicense_name: 'llama3'\r\nlicense_link: LICENSE\r\n---\r\n",
            {"license": "other", "license_name": "llama3", "license_link": "LICENSE"},
        ),
        ("---\nlicense:\n- mit\n- gpl-3.0\n---\n", {}),
        ("---\nlicense_name: llama3\n---\n", {}),
        ("---\ntags: [x]\n---\nlicense: mit\n", {}),
        ("# A base without metadata\n\nlicense: mit\n", {}),
        ("---\nlicense: 'mit\nexact: |\n---\n", {}),
        (b"\xff\xfe---", {}),
        (None, {}),
    ],
)
def test_a_folder_s_card_states_it_in_the_metadata_or_not_at_all(
    card: str | bytes | None, told: dict[str, str], tmp_path: Path
) -> None:
    if card is not None:
        content = card if isinstance(card, bytes) else card.encode()
        (tmp_path / "README.md").write_bytes(content)
    assert licence_of(str(tmp_path)) == told


def test_a_hub_name_is_looked_up_in_the_cache_and_never_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: gemma\n---\n")
    asked = []

    def cached(name: str, file: str, revision: str | None) -> str | None:
        asked.append((name, file, revision))
        return str(tmp_path / file) if name == "org/here" else None

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    assert licence_of("org/here@v1") == {"license": "gemma"}
    assert licence_of("org/elsewhere") == {}
    assert asked == [("org/here", "README.md", "v1"), ("org/elsewhere", "README.md", None)]
