"""Every experiment, quickly, on a real model, as the README has it."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path

import pytest

from driftlens import cli
from driftlens.experiments.reproduce import EXPERIMENTS

pytestmark = pytest.mark.real


def test_all_experiments_run_quickly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["reproduce", "all", "--quick", "--quiet", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["driftlens", *options])
    began = time.monotonic()
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code in (0, None)
    assert time.monotonic() - began < 15 * 60, "too long for two cores"
    shown = capsys.readouterr().out
    for name in EXPERIMENTS:
        record = json.loads((tmp_path / f"{name}.json").read_text())
        assert len(record["cases"]) == (2 if name in ("fluency", "heads", "cost") else 4)
        assert record["text"] in shown
    table = {
        (row["arm"], row["metric"]): row["value"]
        for row in json.loads((tmp_path / "table3.json").read_text())["rows"]
    }
    assert table["rome", "ES"] == table["rome + sadr", "ES"] == 100
    assert table["rome", "DNS"] < table["unedited", "DNS"]
    fluency = json.loads((tmp_path / "fluency.json").read_text())["rows"]
    assert {row["arm"] for row in fluency} == {"unedited", "rome", "rome + sadr"}
    assert all(row["metric"] == "FL" and 300 < row["value"] < 700 for row in fluency)
    both = [row for row in json.loads((tmp_path / "strength.json").read_text())["rows"]
            if (row["compared"], row["metric"]) == ("at equal strength", "ES")]  # fmt: skip
    assert all(math.isclose(row["P without"], row["P with"], rel_tol=0.011) for row in both)
    assert both and all(0 < row["left without"] < 1 for row in both)
    # What restores everything that the last token reads brings everything back.
    rows = json.loads((tmp_path / "fig5.json").read_text())["rows"]
    for row in rows:
        if (row["patched"], row["layers"]) == ("both", "all"):
            assert math.isclose(row["change of P(answer)"], row["lost P(answer)"], abs_tol=0.02)
