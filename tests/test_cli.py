"""The command line, on a tiny local model: results, files, and one clear line for each error."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

import driftlens as dl
from driftlens import cli
from driftlens.editing import defaults
from driftlens.editing.methods import METHODS

PROMPT = "The Eiffel Tower is famous. The Louvre is located in"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder as transformers writes it."""
    path = tmp_path_factory.mktemp("model")
    tiny.hf_model("llama").save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return path


def run(monkeypatch: pytest.MonkeyPatch, *args: object) -> int:
    """Exit code of the command line; an error's text goes to the captured stderr."""
    monkeypatch.setattr(sys, "argv", ["driftlens", *map(str, args)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    code = stopped.value.code
    if isinstance(code, str):
        sys.stderr.write(f"{code}\n")
        return 1
    return int(code or 0)


def make_edit(monkeypatch: pytest.MonkeyPatch, folder: Path, out: Path, *more: object) -> int:
    return run(
        monkeypatch,
        *("edit", "--model", folder, "--prompt", "{} is located in the city of"),
        *("--subject", "The Eiffel Tower", "--target-new", "Rome", "--target-true", "Paris"),
        *("--layer", 1, "--steps", 5, "--covariance", "identity", "--out", out, "--quiet"),
        *more,
    )


@pytest.fixture
def edited(monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path) -> Path:
    out = tmp_path / "edit"
    assert make_edit(monkeypatch, folder, out) == 0
    return out


def test_edit_writes_and_reports(monkeypatch, folder, tmp_path, capsys):
    out, numbers, page = tmp_path / "e", tmp_path / "e.json", tmp_path / "e.html"
    assert make_edit(monkeypatch, folder, out, "--json", numbers, "--html", page) == 0
    written = json.loads(numbers.read_text())
    assert written["request"]["subject"] == "The Eiffel Tower"
    assert len(written["trace"]) == 5
    assert all(record["loss"] > 0 for record in written["trace"])
    assert written["after"]["Rome"] != written["before"]["Rome"]
    assert "plotly" in page.read_text()
    assert f"P(Rome) {written['before']['Rome']:.4f}" in capsys.readouterr().out
    assert (out / "edit.safetensors").is_file()


def test_sadr_is_recorded(monkeypatch, folder, tmp_path):
    numbers = tmp_path / "e.json"
    more = ("--sadr", 0.05, "--json", numbers)
    assert make_edit(monkeypatch, folder, tmp_path / "e", *more) == 0
    written = json.loads(numbers.read_text())
    (penalty,) = written["config"]["penalties"]
    assert (penalty["penalty"], penalty["gamma"], penalty["heads"]) == ("sadr", 0.05, "max")
    assert "held_heads" in written["trace"][0]


def test_the_tuned_gamma_is_the_models_for_the_editor(monkeypatch, folder, tmp_path, capsys):
    model = dl.load_model(folder)
    kind = (model.hf_model.config.model_type, model.info.n_layers, model.info.d_model)
    out, numbers = tmp_path / "e", tmp_path / "e.json"
    more = ("--sadr", "tuned", "--json", numbers)
    for wrong, words in (
        (("--sadr", "tuned"), "No gamma was tuned for rome on"),
        (("--sadr", "tuned", "--method", "rom"), "'rom'"),
        (("--sadr", "tunned"), "'tunned' is no gamma"),
    ):
        assert make_edit(monkeypatch, folder, out, *wrong) == 1
        assert words in capsys.readouterr().err
    monkeypatch.setitem(defaults.GAMMAS, kind, {"rome": 0.3})
    assert make_edit(monkeypatch, folder, out, *more) == 0
    (penalty,) = json.loads(numbers.read_text())["config"]["penalties"]
    assert (penalty["penalty"], penalty["gamma"]) == ("sadr", 0.3)
    capsys.readouterr()
    with pytest.warns(UserWarning, match="known to be good"):
        assert run(monkeypatch, "methods", "--model", folder) == 0
    shown = capsys.readouterr().out
    assert shown.count("SADR's gamma: 0.3") == 1
    assert shown.count("SADR's gamma: none is known") == len(METHODS) - 1


def test_drift_lists_heads_and_writes(monkeypatch, folder, edited, tmp_path, capsys):
    numbers, page = tmp_path / "d.json", tmp_path / "d.html"
    code = run(
        monkeypatch,
        *("drift", "--model", folder, "--edit", edited, "--prompt", PROMPT, "--top", 3),
        *("--json", numbers, "--html", page),
    )
    assert code == 0
    written = json.loads(numbers.read_text())
    assert len(written["original"]) == 3
    assert len(written["top_heads"]) == 3
    first = written["top_heads"][0]
    layer, head = (int(part) for part in first["name"][1:].split("H"))
    difference = written["edited"][layer][head] - written["original"][layer][head]
    assert first["drift"] == pytest.approx(difference)
    assert first["name"] in capsys.readouterr().out


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--layers", "1-2", "--queries", "all"],
        ["--heads", "L2H1,L1H0", "--exchange", "both"],
        ["--columns", "subject_last"],
        ["--columns", "0,1", "--direction", "contaminate"],
        ["--queries", "-1", "--exchange", "values"],
        ["--sweep"],
    ],
)
def test_patch(monkeypatch, folder, edited, tmp_path, capsys, options):
    numbers = tmp_path / "p.json"
    common = ("patch", "--model", folder, "--edit", edited, "--prompt", PROMPT)
    code = run(monkeypatch, *common, "--answer", "Paris", "--quiet", "--json", numbers, *options)
    assert code == 0
    rows = json.loads(numbers.read_text())
    assert {row["text"] for row in rows} == {"Paris", "Rome"}
    assert all(0 <= row["prob"] <= 1 for row in rows)
    assert "P(Paris)" in capsys.readouterr().out


def test_json_to_standard_output_is_only_json(monkeypatch, folder, edited, capsys):
    capsys.readouterr()
    common = ("drift", "--model", folder, "--edit", edited, "--prompt", PROMPT)
    assert run(monkeypatch, *common, "--json", "-") == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == PROMPT


def test_models_lists_and_inspects(monkeypatch, folder, capsys):
    assert run(monkeypatch, "models", "--json") == 0
    names = [entry["name"] for entry in json.loads(capsys.readouterr().out)]
    assert names == ["smollm2-135m", "gemma-3-270m"]
    assert run(monkeypatch, "models", folder, "--json") == 0
    info = json.loads(capsys.readouterr().out)
    assert (info["n_layers"], info["n_kv_heads"]) == (3, 2)
    assert info["down_projection"] == "model.layers.{layer}.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["models", "no such model"], "cannot be loaded"),
        (["drift", "--edit", "nowhere", "--prompt", "x"], "no edit in nowhere"),
        (["edit", "-p", "no slot", "-s", "a", "-t", "b", "-o", "{tmp}/o"], "0 slots"),
        (["edit", "-p", "{} is", "-s", "a", "-t", " ", "-o", "{tmp}/o"], "target_new is empty"),
        (["edit", "-p", "{} is", "-s", "a", "-t", "b", "-o", "{tmp}/o", "--sadr", "-1"], "gamma"),
        (["demo", "--json", "/no/such/folder/x.json"], "cannot be written"),
    ],
)
def test_bad_input_gives_one_line(monkeypatch, tmp_path, capsys, args, words):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code = run(monkeypatch, *(arg.replace("{tmp}", str(tmp_path)) for arg in args))
    error = capsys.readouterr().err
    assert code == 1
    assert words in error
    assert "Traceback" not in error
    assert error.strip().splitlines()[-1].startswith("Error: ")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--answer", "Paris", "--subject", "Big Ben"], "not in"),
        (["--answer", " "], "no answer"),
        (["--answer", "Paris", "--layers", "7"], "no layer 7"),
        (["--answer", "Paris", "--heads", "L1H99"], "no head L1H99"),
        (["--answer", "Paris", "--layers", "two"], "not understood"),
        (["--answer", "Paris", "--exchange", "keys"], "exchange"),
        (["--answer", "Paris", "--sweep", "--layers", "1"], "sweep"),
    ],
)
def test_bad_patches_give_one_line(monkeypatch, folder, edited, capsys, options, words):
    common = ("patch", "--model", folder, "--edit", edited, "--prompt", PROMPT)
    assert run(monkeypatch, *common, *options) == 1
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error


def test_an_edit_of_another_model_is_refused(monkeypatch, edited, tmp_path, capsys):
    other = tmp_path / "other"
    tiny.hf_model("llama", seed=1).save_pretrained(other)
    tiny.tokenizer().save_pretrained(other)
    assert run(monkeypatch, "drift", "--model", other, "--edit", edited, "--prompt", PROMPT) == 1
    assert "other weights" in capsys.readouterr().err


def test_a_full_disk_loses_no_numbers(monkeypatch, folder, edited, tmp_path, capsys):
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("driftlens.edits.write_atomically", full)
    common = ("drift", "--model", folder, "--edit", edited, "--prompt", PROMPT)
    assert run(monkeypatch, *common, "--json", tmp_path / "d.json") == 1
    captured = capsys.readouterr()
    assert "No space left" in captured.err
    assert json.loads(captured.out[captured.out.index("{") :])["prompt"] == PROMPT


def test_help_is_quick_and_teaches():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "driftlens.cli", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "driftlens demo" in done.stdout
    assert " torch\n" not in done.stderr
    for command in ("demo", "edit", "drift", "patch", "models"):
        assert command in done.stdout
