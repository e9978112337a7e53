"""The speed benchmark runs, and says that results are equal."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parent.parent
SCRIPT = REPOSITORY / "benchmarks" / "speed.py"
ITEMS = ("rome_edit", "sadr_overhead", "sweep", "scoring", "covariance", "texts", "memory")
"""Of the README's table."""
COUNTED = ITEMS[:-2]
"""Those whose arithmetic is counted."""
GPU_SHAPES = ("gpt2-xl", "gpt-j-6b", "llama-3-8b")

sys.path.insert(0, str(SCRIPT.parent))

import scale  # noqa: E402
import speed  # noqa: E402
import viewer as viewer_benchmark  # noqa: E402


@pytest.mark.real
def test_the_benchmark_runs_and_results_are_equal(tmp_path: Path) -> None:
    out = tmp_path / "speed.json"
    command = [sys.executable, str(SCRIPT), "--json", str(out), "--pairs", "1", "--steps", "3"]
    subprocess.run(
        [*command, "--documents", "20", "--text-length", "20"],
        check=True,
        capture_output=True,
        text=True,
    )
    result = json.loads(out.read_text())
    for item in ITEMS[:-1]:
        assert result[item]["equal"], item
        assert item not in COUNTED or result[item]["floor_share"] > 0
        assert result[item]["ratio"] > 0  # beside other tests, timings mean nothing
    assert set(result["restrictions"]["medians"]) == set(speed.RESTRICTIONS)
    assert 0 < result["memory"]["ratio"] < 2
    kept = result["memory"]["step_bytes"]
    assert kept["none"] < kept["sadr"] < 1.1 * kept["none"]


def test_the_cases_ask_both_targets_of_every_group() -> None:
    fact = {
        "prompt": "{} is in",
        "subject": "Rome",
        "target_new": "Spain",
        "target_true": "Italy",
        "paraphrases": ["Where is Rome? In"],
        "neighbors": [{"prompt": "Milan is in", "answer": "Italy"}],
        "relations": [{"prompt": "Rome was founded by", "answer": "Romulus"}],
    }
    groups = speed.case_of_fact(fact)
    assert groups["distract neighbours"] == (["Rome is in Spain. Milan is in"], ["Spain", "Italy"])
    assert {tuple(targets) for _, targets in groups.values()} == {("Spain", "Italy")}
    assert speed.trie_of([[1, 2, 3], [1, 2, 4]]) == (4, 1 + 2 + 3 + 3)


def test_the_table_has_a_column_for_each_model() -> None:
    item = {"ratio": 2.0, "floor_share": 0.5, "steps": 20}
    result = dict.fromkeys(ITEMS, item) | {"model": {"name": "some"}}
    table = speed.table([result, result])
    assert table.count("| 2.00 (50%) | 2.00 (50%) |") == len(ITEMS)
    assert table.startswith("| | some | some |")


def test_restrictions_have_a_row_each_and_models_a_column() -> None:
    def result(model: str, times: float) -> dict[str, Any]:
        medians = {name: times * (i + 1) for i, name in enumerate(speed.RESTRICTIONS)}
        return {"model": {"name": model}, "restrictions": {"medians": medians}}

    table = speed.restrictions_table([result("small", 1.0), result("large", 0.5)]).splitlines()
    assert table[:2] == ["| restriction | small | large |", "|---|---|---|"]
    assert table[2] == "| SADR, as in the paper | 1.00 | 0.50 |"
    assert table[-1] == "| EssenceKL | 9.00 | 4.50 |"


STORED = [
    REPOSITORY / "assets" / "results" / f"speed-{name}.json"
    for name in ("smollm2-135m", "gemma-3-270m")
]


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_stored_results_are_whole_and_equal(path: Path) -> None:
    result = json.loads(path.read_text())
    for item in ITEMS:
        assert result[item]["ratio"] > 0
        assert result[item]["equal"] is (None if item == "memory" else True)
        assert result[item]["threads"] == (1 if item == "texts" else 2)
    assert result["pairs"] >= 5
    for restriction in speed.RESTRICTIONS:
        assert len(result["restrictions"]["ratios"][restriction]) == result["pairs"]
    assert len(result["rome_edit"]["ratios"]) == result["pairs"]
    assert (result["rome_edit"]["steps"], result["rome_edit"]["contexts"]) == (20, 21)
    for item in COUNTED:
        assert 0 < result[item]["floor_share"] < 1


def test_the_texts_show_the_stored_results() -> None:
    results = [json.loads(path.read_text()) for path in STORED]
    assert speed.table(results) in (REPOSITORY / "README.md").read_text(encoding="utf-8")
    page = (REPOSITORY / "docs" / "concepts" / "sadr.md").read_text(encoding="utf-8")
    assert speed.restrictions_table(results) in page
    kept = [result["memory"]["step_bytes"] for result in results]
    more = [f"{100 * (one['sadr'] / one['none'] - 1):.1f} %" for one in kept]
    assert f"SADR adds {more[0]} to what a step keeps" in page and f"M, {more[1]} on Gemma" in page


def test_the_pages_show_what_was_measured_on_a_gpu() -> None:
    result = json.loads((REPOSITORY / "assets" / "results" / "scale-h200.json").read_text())
    assert result["device"] == "NVIDIA H200" and result["pairs"] == 3
    page = (REPOSITORY / "docs" / "large-models.md").read_text(encoding="utf-8")
    assert scale.table(result) in page
    seconds = [row["seconds"] for name in GPU_SHAPES for row in result[name]["edits"]]
    more = [100 * (one["with"] / one["without"] - 1) for one in seconds]
    assert f"took {min(more):.0f} to {max(more):.0f} % longer" in page
    assert {row["steps"] for name in GPU_SHAPES for row in result[name]["edits"]} == {10}
    largest = result["llama-3-8b"]
    readme = " ".join((REPOSITORY / "README.md").read_text(encoding="utf-8").split())
    assert (
        f"the drift of all {largest['heads']:,} heads of a Llama 3 8B took "
        f"{largest['drift_seconds']:.2f} seconds, a sweep that patches each of them "
        f"{largest['sweep_seconds']:.2f}, and ten steps of a ROME edit "
        f"{largest['edits'][0]['seconds']['without']:.2f}"
    ) in readme


@pytest.mark.real
def test_costs_of_random_models_of_published_shapes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "scale.json"
    given = ["--models", "gpt2", "--steps", "1", "--pairs", "1", "--json", str(out)]
    monkeypatch.setattr(sys, "argv", ["scale.py", *given])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "No layers are known to be good")
        scale.main()
    found = json.loads(out.read_text())["gpt2"]
    assert found["parameters"] == 124_439_808  # as published
    assert [row["method"] for row in found["edits"]] == ["rome", "memit", "pmet"]
    assert [row["contexts"] for row in found["edits"]] == [21, 6, 6]
    for row in found["edits"]:
        assert min(row["seconds"].values()) > 0
        assert 1 < row["megabytes_ratio"] < 1.1
    assert found["heads"] == 144
    assert 0 < found["unchanged_seconds"] < found["fingerprint_seconds"]


@pytest.mark.browser
@pytest.mark.skipif(
    not (shutil.which("chromium") and shutil.which("chromedriver")),
    reason="no Chromium with its chromedriver on the PATH",
)
def test_the_page_is_measured() -> None:
    result = viewer_benchmark.run((8,), repeats=1)
    (row,) = result["rows"]
    assert row["stored_heads"] == 12 and row["tokens"] == 8
    assert 100_000 < row["file_bytes"] < 250_000
    assert 0 < row["ready_ms"] < 60_000 and 0 < row["first_paint_ms"] < 60_000
    assert 200_000 < row["heap_bytes"] < 100_000_000
    header, rule, line = viewer_benchmark.markdown(result).splitlines()
    assert header.count("|") == rule.count("|") == line.count("|")


def test_the_shipped_measurements_hold_what_is_promised() -> None:
    """Every page opens in under two seconds and stays under 15 MB."""
    rows = json.loads((REPOSITORY / "assets" / "results" / "viewer.json").read_text())["rows"]
    assert [row["tokens"] for row in rows] == list(viewer_benchmark.LENGTHS)
    for row in rows:
        assert max(row["ready_ms"], row["first_paint_ms"]) < 2000
        assert row["file_bytes"] < 15_000_000


def test_the_table_of_the_viewer_is_the_result_file() -> None:
    result = json.loads((REPOSITORY / "assets" / "results" / "viewer.json").read_text())
    text = (REPOSITORY / "docs" / "howto" / "make-a-page.md").read_text(encoding="utf-8")
    assert viewer_benchmark.markdown(result) in text
    assert result["command"] in text
