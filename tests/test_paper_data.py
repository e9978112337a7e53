"""The part of the paper's data that results are of, made again from the whole."""

from __future__ import annotations

import hashlib
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from driftlens.errors import DataError
from driftlens.experiments import paper_data

DATA = Path(__file__).parent.parent.parent / "shared/data/counterfact_wikidata_dev.json"

needs_data = pytest.mark.skipif(not DATA.is_file(), reason=f"{DATA.name} is not there")


def whole() -> list[Any]:
    """The part's records among others."""
    rng = random.Random(0)
    found: list[Any] = []
    for number, record in enumerate(json.loads(DATA.read_text("utf-8"))):
        if rng.random() < 0.3:
            found.append({"requested_rewrite": {"subject": f"another {number}"}})
        found.append(record)
    return found


@needs_data
def test_the_part_is_made_from_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = tmp_path / "merged.json", tmp_path / "part.json"
    source.write_text(json.dumps(whole(), indent=4))
    monkeypatch.setattr(sys, "argv", ["paper_data", str(source), "--out", str(target)])
    paper_data.main()
    assert target.read_bytes() == DATA.read_bytes()
    assert f"wrote {target}" in capsys.readouterr().out
    assert hashlib.sha256(target.read_bytes()).hexdigest() == paper_data.SHA256


@needs_data
def test_what_is_not_the_whole_is_refused() -> None:
    records = whole()
    text = DATA.read_text("utf-8")
    assert paper_data.part_of(records[::-1]) == text  # the order of records is the part's
    assert paper_data.part_of([*records, records[-1]]) == text
    turned = [dict(reversed(record.items())) for record in records]
    with pytest.raises(DataError, match="fields are in another order"):
        paper_data.part_of(turned)
    changed = json.loads(json.dumps(records))
    changed[-1]["requested_rewrite"]["target_new"] += "."
    with pytest.raises(DataError, match="1 of the 1229 records"):
        paper_data.part_of(changed)


def test_files_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, target = tmp_path / "merged.json", tmp_path / "part.json"
    for text, problem in (
        (None, "cannot be read"), ("{", "is no JSON"), ("{}", "is no list"),
        ('[{"a": 1}]', "1229 of the 1229 records"),
    ):  # fmt: skip
        if text is not None:
            path.write_text(text)
        monkeypatch.setattr(sys, "argv", ["paper_data", str(path), "--out", str(target)])
        with pytest.raises(SystemExit, match=problem):
            paper_data.main()
    assert not target.exists()
