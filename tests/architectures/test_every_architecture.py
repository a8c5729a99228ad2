"""E2, G2, D1, D6: every architecture that transformers lists is token-identical, or refused as documented."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.architectures import table
from tests.architectures.catalogue import flagged, judge


@pytest.mark.parametrize("model_type", list(flagged()))
def test_identical_or_refused(model_type: str, tmp_path: Path, tokenizer_dir: Path) -> None:
    verdict = judge(model_type, tmp_path / "model", tokenizer_dir)
    assert table.row(verdict) == table.documented().get(model_type), (
        "python -m tests.architectures.table writes it anew"
    )


def test_the_table_is_of_this_version_and_counts_right() -> None:
    rows = table.documented()
    assert list(rows) == list(flagged())
    identical = [name for name, line in rows.items() if "| identical" in line]
    refused = [name for name, line in rows.items() if "| refused: " in line]
    assert len(identical) + len(refused) == len(rows)
    head = table.PATH.read_text().partition("| model type")[0]
    assert head == table.render([]).partition("| model type")[0].replace(
        ": 0 are token-identical", f": {len(identical)} are token-identical"
    ).replace(" 0 are refused", f" {len(refused)} are refused")
    assert len(identical) >= 95
    assert {"mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"} <= set(identical)
