"""Configurations as TOML, and what `driftlens methods` tells."""

from __future__ import annotations

import json
import tomllib
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import driftlens as dl
from driftlens.cli import app
from driftlens.editing.configs import checked, describe
from driftlens.editing.family import PENALTIES
from driftlens.editing.methods import METHODS
from driftlens.errors import DataError, DriftLensError, RequestError


def any_config(method: str) -> Any:
    kind = METHODS[method].config
    where = {"layer": 1} if "layer" in {f.name for f in fields(kind)} else {"layers": (0, 1)}
    return checked(kind, where, method)


@pytest.mark.parametrize("method", METHODS)
def test_a_file_holds_everything(method: str, tmp_path: Path) -> None:
    config = any_config(method)
    penalties = [dl.SADR(0.3, ["L1H2"], layers=(1, 2)), dl.KeyDrift(0.5)]
    path = tmp_path / "config.toml"
    dl.write_config(path, method, config, penalties)
    plan = dl.read_config(path)
    assert plan.method == method
    assert checked(METHODS[method].config, plan.config, method) == config
    assert list(plan.penalties) == penalties


def test_no_value_is_written_as_none(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    dl.write_config(path, "ft-l", dl.FtConfig(layer=1))
    assert 'norm_constraint = "none"' in path.read_text()
    assert dl.read_config(path).config["norm_constraint"] is None


@given(
    st.integers(1, 500), st.floats(1e-9, 1e9), st.floats(0, 1e9),
    st.lists(st.integers(0, 90), min_size=1, unique=True),
)  # fmt: skip
def test_numbers_survive(steps: int, lr: float, decay: float, layers: list[int]) -> None:
    import tempfile

    config = dl.PmetConfig(layers=tuple(layers), steps=steps, lr=lr, weight_decay=decay)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.toml"
        dl.write_config(path, "pmet", config)
        assert checked(dl.PmetConfig, dl.read_config(path).config, "pmet") == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method = ", "is no TOML"),
        ("\xff", "is no TOML"),
        ("metod = 'rome'", "unknown entry 'metod'"),
        ("method = 3", "method in"),
        ("config = 3", "config in"),
        ("penalties = 3", "penalties in"),
        ("[[penalties]]\ngamma = 1", "no penalty None"),
        ("[[penalties]]\npenalty = 'sadr'\ngamma = -1", "gamma is -1"),
    ],
)
def test_bad_files_are_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(DriftLensError, match=message):
        dl.read_config(path)


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        dl.read_config(tmp_path / "none.toml")
    with pytest.raises(DataError, match="cannot be written"):
        dl.write_config(tmp_path / "no" / "config.toml", "rome", dl.RomeConfig(layer=1))


def test_numbers_of_numpy_are_numbers(tmp_path: Path) -> None:
    whole = np.int64(3)
    config = checked(
        dl.RomeConfig, {"layer": whole, "steps": np.int32(5), "lr": np.float64(0.25)}, "rome"
    )
    assert config == dl.RomeConfig(layer=3, steps=5, lr=0.25)
    assert type(config.layer) is int
    several = checked(
        dl.MemitConfig, {"layers": np.array([1, 2]), "context_lengths": [whole]}, "memit"
    )
    assert several == dl.MemitConfig(layers=(1, 2), context_lengths=(3,))
    held = dl.SADR(layers=np.array([1, 2]))  # type: ignore[arg-type]
    assert held == dl.SADR(layers=(1, 2))
    dl.write_config(tmp_path / "plan.toml", "memit", several, [held])
    assert dl.read_config(tmp_path / "plan.toml").penalties == (held,)
    for wrong in (np.bool_(True), np.float64(1.5), True):
        with pytest.raises(RequestError, match="layer is"):
            checked(dl.RomeConfig, {"layer": wrong}, "rome")


@given(st.text(max_size=60))
def test_no_text_crashes_the_reader(text: str) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.toml"
        path.write_text(text, encoding="utf-8")
        try:
            plan = dl.read_config(path)
        except DriftLensError:
            return
        content = tomllib.loads(text)
        assert (plan.method, plan.config) == (content.get("method"), content.get("config", {}))
        assert len(plan.penalties) == len(content.get("penalties", ()))


# --- what is documented ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", [m.config for m in METHODS.values()] + list(PENALTIES.values()))
def test_every_field_is_documented(kind: Any) -> None:
    listed = {item["name"]: item for item in describe(kind)}
    assert set(listed) == {item.name for item in fields(kind)}
    for item in fields(kind):
        assert len(listed[item.name]["meaning"]) > 10, item.name
        default = listed[item.name]["default"]
        expected = None if item.default is MISSING else item.default
        assert default == (list(expected) if isinstance(expected, tuple) else expected)


def test_methods_are_listed() -> None:
    shown = CliRunner().invoke(app, ["methods"])
    assert shown.exit_code == 0
    listing = json.loads(CliRunner().invoke(app, ["methods", "--json"]).stdout)
    assert set(listing["methods"]) == set(METHODS)
    assert set(listing["penalties"]) == set(PENALTIES)
    assert listing["methods"]["memit"]["several_facts_at_once"] is True
    for name in [*METHODS, *PENALTIES]:
        assert f"  {name}: " in shown.stdout
    steps = next(f for f in listing["methods"]["ft-l"]["fields"] if f["name"] == "steps")
    assert (steps["default"], steps["type"]) == (25, "whole number >= 1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny.hf_model("gpt2", 1).save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return path


REQUEST = ["--prompt", "{} is in the city of", "--subject", "The Louvre", "--target-new", "Rome"]


def test_the_command_line_takes_a_configuration(folder: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text(
        'method = "ft-m"\n[config]\nlayer = 1\nsteps = 3\n[[penalties]]\npenalty = "key-drift"\n'
    )
    arguments = ["edit", "--model", str(folder), *REQUEST, "--config", str(plan), "--quiet"]
    found = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "made")])
    assert found.exit_code == 0, found.output
    edit = dl.load_edit(tmp_path / "made")
    assert (edit.method, edit.config["steps"]) == ("ft-m", 3)
    assert [p["penalty"] for p in edit.config["penalties"]] == ["key-drift"]
    # Single options win, and --sadr is added.
    more = ["--steps", "2", "--sadr", "0.5", "--out", str(tmp_path / "more")]
    assert CliRunner().invoke(app, [*arguments, *more]).exit_code == 0
    edit = dl.load_edit(tmp_path / "more")
    assert edit.config["steps"] == 2
    assert [p["penalty"] for p in edit.config["penalties"]] == ["key-drift", "sadr"]
    with pytest.raises(RequestError, match="--method is rome"):
        app([*arguments, "--method", "rome", "--out", str(tmp_path / "x")], standalone_mode=False)


def test_the_command_line_spreads_over_layers(folder: Path, tmp_path: Path) -> None:
    options = ["--method", "memit", "--layers", "0-1", "--covariance", "identity", "--steps", "2"]
    out = tmp_path / "made"
    arguments = ["edit", "--model", str(folder), *REQUEST, *options, "--out", str(out), "--quiet"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert dl.load_edit(out).config["layers"] == [0, 1]


def test_methods_show_a_models_own_defaults(folder: Path) -> None:
    with pytest.warns(UserWarning, match="known to be good"):
        found = CliRunner().invoke(app, ["methods", "--json", "--model", str(folder)])
    fields_of = json.loads(found.stdout)["methods"]["memit"]["fields"]
    assert next(f for f in fields_of if f["name"] == "layers")["default"] == [0, 1]
