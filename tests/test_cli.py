"""The command line, on a tiny local model: results, files, and one clear line for each error."""

from __future__ import annotations

import functools
import json
import math
import os
import signal
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


def run_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an exit."""
    monkeypatch.setattr(sys, "argv", ["driftlens"])
    cli.main()


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
    kind = (model.hf_model.config.model_type, model.info.n_layers, model.info.d_model,
            model.info.n_kv_heads)  # fmt: skip
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
    ("options", "same"),
    [
        ([], {}),
        (["--layers", "1-2", "--queries", "all"], {"layers": [1, 2], "queries": "all"}),
        (
            ["--heads", "L2H1,L1H0", "--exchange", "both"],
            {"heads": ["L2H1", "L1H0"], "exchange": "both"},
        ),
        (["--columns", "subject_last"], {"columns": "subject_last"}),
        (
            ["--columns", "0,1", "--direction", "contaminate"],
            {"columns": [0, 1], "direction": "contaminate"},
        ),
        (["--queries", "1,-1", "--exchange", "values"], {"queries": [1, -1], "exchange": "values"}),
        (["--sweep"], None),
    ],
)
def test_patch(monkeypatch, folder, edited, tmp_path, capsys, options, same):
    numbers = tmp_path / "p.json"
    common = ("patch", "--model", folder, "--edit", edited, "--prompt", PROMPT)
    code = run(monkeypatch, *common, "--answer", "Paris", "--quiet", "--json", numbers, *options)
    assert code == 0
    rows = json.loads(numbers.read_text())
    assert {row["text"] for row in rows} == {"Paris", "Rome"}
    assert "P(Paris)" in capsys.readouterr().out
    model, made = dl.load_model(str(folder)), dl.load_edit(edited)
    if same is None:
        found = dl.sweep_attention(model, made, PROMPT, answer="Paris", progress=False)
    else:
        found = dl.patch_attention(model, made, PROMPT, answer="Paris", **same)
    expected = found.to_dataframe()
    assert len(rows) == len(expected)
    assert [row["prob"] for row in rows] == pytest.approx(list(expected["prob"]), rel=1e-5)


def test_demo(monkeypatch, folder, tmp_path, capsys):
    from driftlens import demo

    run_demo = functools.partial(demo.run_demo, covariance="identity")
    monkeypatch.setattr(demo, "run_demo", run_demo)
    numbers, page = tmp_path / "d.json", tmp_path / "d.html"
    common = ("demo", "--model", folder, "--quiet", "--gamma", 0.3)
    assert run(monkeypatch, *common, "--json", numbers, "--html", page) == 0
    found, told = json.loads(numbers.read_text()), capsys.readouterr().out
    assert found["gamma"] == 0.3
    for state in ("original", "edited", "sadr"):
        pair = found["probabilities"][state]
        assert f"{pair['answer']:8.3f} {pair['target_new']:8.3f}" in told
    assert "Notre-Dame" in page.read_text() and f"wrote {page}" in told
    assert run(monkeypatch, *common, "--json", "-") == 0
    assert json.loads(capsys.readouterr().out)["gamma"] == 0.3


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


def test_the_weights_may_be_loaded_in_another_precision(
    monkeypatch, folder, edited, tmp_path, capsys
):
    assert run(monkeypatch, "models", folder, "--json", "--dtype", "bfloat16") == 0
    assert json.loads(capsys.readouterr().out)["dtype"] == "bfloat16"
    half = tmp_path / "half"
    assert make_edit(monkeypatch, folder, half, "--dtype", "bfloat16") == 0
    prompt = ("--prompt", "The Eiffel Tower is in the city of")
    common = ("--model", folder, *prompt)
    assert run(monkeypatch, "drift", *common, "--edit", half, "--dtype", "bfloat16") == 0
    capsys.readouterr()
    # An edit of other weights is refused, and a name that torch has for something else.
    assert run(monkeypatch, "drift", *common, "--edit", edited, "--dtype", "bfloat16") == 1
    assert "was made for other weights" in capsys.readouterr().err
    for wrong in ("half precision", "nn"):
        assert run(monkeypatch, "drift", *common, "--edit", edited, "--dtype", wrong) == 1
        assert f"There is no dtype '{wrong}'. Choose float32" in capsys.readouterr().err


def test_a_warning_is_a_line(folder):
    command = [sys.executable, "-m", "driftlens.cli", "methods", "--model", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    lines = done.stderr.splitlines()
    assert any(line.startswith("Warning: No layers are known to be good for") for line in lines)
    assert "UserWarning" not in done.stderr and "warnings.warn" not in done.stderr


def test_sadr_is_not_given_twice(monkeypatch, folder, tmp_path, capsys):
    plan = tmp_path / "plan.toml"
    plan.write_text('method = "rome"\n[[penalties]]\npenalty = "sadr"\ngamma = 0.2\n')
    for gamma in ("0.3", "tuned"):
        assert (
            make_edit(monkeypatch, folder, tmp_path / "e", "--config", plan, "--sadr", gamma) == 1
        )
        assert "plan.toml holds SADR already. Leave --sadr out." in capsys.readouterr().err
    assert make_edit(monkeypatch, folder, tmp_path / "e", "--config", plan) == 0


def test_the_device_is_that_of_the_model(monkeypatch, folder, edited, tmp_path, capsys):
    prompt = ("--prompt", "The Eiffel Tower is in the city of")
    commands = {
        "drift": ("--edit", edited, "--model", folder, *prompt),
        "patch": ("--edit", edited, "--model", folder, *prompt, "--answer", "Paris", "--quiet"),
        "models": (folder,),
        "demo": ("--model", folder),
    }
    for name, options in commands.items():
        assert run(monkeypatch, name, *options, "--device", "nowhere") == 1
        assert "There is no device 'nowhere' here" in capsys.readouterr().err
    assert make_edit(monkeypatch, folder, tmp_path / "e", "--device", "nowhere") == 1
    assert run(monkeypatch, "drift", *commands["drift"], "--device", "cpu", "--top", "2") == 0
    assert run(monkeypatch, "drift", *commands["drift"], "--top", "-3") == 1
    assert "--top is -3. Give 0 or more." in capsys.readouterr().err


@pytest.mark.parametrize("command", ["bench", "reproduce"])
def test_bad_records_are_told_with_the_options_of_the_command(
    monkeypatch, tmp_path, capsys, command
):
    options = ["fig3"] if command == "reproduce" else []
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "x", "subject": "y", "target_new": "z"}\n')
    more = (*options, "--data", data, "--out", tmp_path / "o")
    assert run(monkeypatch, command, *more) == 1
    assert "is unknown. Name it: --format one of counterfact, " in capsys.readouterr().err
    assert run(monkeypatch, command, *more, "--format", "driftlens") == 1
    said = capsys.readouterr().err
    assert "Record 0, prompt: The prompt 'x' has 0 slots" in said
    assert said.strip().endswith("Mend it, or leave such out with --skip-bad.")
    assert run(monkeypatch, command, *more, "--format", "driftlens", "--skip-bad") == 1
    assert "is a case" in capsys.readouterr().err


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

    monkeypatch.setattr("driftlens.disk.write_atomically", full)
    common = ("drift", "--model", folder, "--edit", edited, "--prompt", PROMPT)
    assert run(monkeypatch, *common, "--json", tmp_path / "d.json") == 1
    captured = capsys.readouterr()
    assert "No space left" in captured.err
    assert json.loads(captured.out[captured.out.index("{") :])["prompt"] == PROMPT
    for option, name in (("--json", "d.txt"), ("--html", "d.html")):  # numbers, whatever the name
        assert run(monkeypatch, *common, option, tmp_path / name) == 1
        captured = capsys.readouterr()
        assert ("were printed instead" in captured.err) == ('"prompt"' in captured.out)
        assert ('"prompt"' in captured.out) == (option == "--json")


def test_ranges_go_up(monkeypatch, folder, edited, capsys):
    common = ("patch", "--model", folder, "--edit", edited, "--prompt", PROMPT, "--answer", "Paris")
    for text in ("2-1", "2-1,2", "1-x"):
        assert run(monkeypatch, *common, "--layers", text) == 1
        assert f"--layers '{text}' is not understood" in capsys.readouterr().err


def test_small_probabilities_are_written_whole(monkeypatch, folder, edited, tmp_path):
    common = ("patch", "--model", folder, "--edit", edited, "--prompt", PROMPT)
    answer = "Rome Paris Rome Paris Rome"
    assert run(monkeypatch, *common, "--answer", answer, "--json", tmp_path / "p.json") == 0
    rows = json.loads((tmp_path / "p.json").read_text())
    own = [row for row in rows if row["text"] == answer]
    assert own and all(0 < row["prob"] < 1e-10 for row in own)
    assert all(row["prob"] == pytest.approx(math.exp(row["logprob"])) for row in own)


def test_a_seed_out_of_range_is_refused(monkeypatch, folder, tmp_path, capsys):
    for seed in (-1, 2**70):
        assert make_edit(monkeypatch, folder, tmp_path / "e", "--seed", seed) == 2
        assert "--seed" in capsys.readouterr().err
    assert not (tmp_path / "e").exists()


def test_ctrl_c_ends_with_a_word(monkeypatch, capsys):
    def interrupt(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("driftlens.editing.configs.describe", interrupt)  # inside a command
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert run(monkeypatch, "methods") == 130
        assert "Interrupted; what was finished is kept." in capsys.readouterr().err
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell has it for what runs behind
        monkeypatch.setattr(cli, "app", interrupt)
        assert run_through(monkeypatch) is None
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


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
