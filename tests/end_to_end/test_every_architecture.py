"""Run, loss, gradient, evaluation and merge on unusual bases equal the models' own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny_models import architectures, tiny_bases


def test_every_row_of_ci_is_a_row_of_the_table() -> None:
    page = (Path(__file__).parents[2] / "docs" / "architectures.md").read_text()
    assert set(architectures.SAMPLE) <= set(tiny_bases.BASES)
    assert len(tiny_bases.BASES) >= 40
    for name in tiny_bases.BASES:
        assert f"| {name} |" in page


@pytest.mark.slow
@pytest.mark.parametrize("name", architectures.SAMPLE)
def test_an_architecture_computes_what_its_own_model_does(name: str, tmp_path: Path) -> None:
    """MPT was off by 0.99 nats, DeepSeek failed, a composite could not be merged."""
    row = architectures.measure(name, tiny_bases.BASES[name], tmp_path)
    assert row.is_right, row
    assert not row.line
    figures = (row.loss, row.gradient, row.together, row.alone, row.merged)
    assert all(figure is not None for figure in figures)
    for card in (tmp_path / "run" / "peft_1", tmp_path / "merged"):
        text = (card / "README.md").read_text()
        assert f"frozen: {row.frozen}" in text if row.frozen else "frozen:" not in text
    assert (row.parts > 0) == (tiny_bases.BASES[name].part is not None)
