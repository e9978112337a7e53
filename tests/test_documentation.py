"""What pages of the documentation show runs, and their commands exist."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import documents
import numpy as np
import pytest
import tiny
from documents import DOCS, REPOSITORY

import driftlens as dl
import driftlens.bench
import driftlens.editing.statistics
import driftlens.generation
import driftlens.viewer
from driftlens import cli
from driftlens.assets import asset
from driftlens.bundled import BUNDLED_MODELS
from driftlens.editing.defaults import KNOWN
from driftlens.editing.family import PENALTIES
from driftlens.editing.methods import METHODS
from driftlens.experiments.reproduce import EXPERIMENTS

PAGES = {str(path.relative_to(DOCS)): path for path in documents.pages()}
FILES = "reference/files.md"
"""Run by a test of its own."""
RUN = [name for name, path in PAGES.items() if documents.python_blocks(path) and name != FILES]

NOT_RUN = {
    "howto/bring-an-edit.md": 1,  # a checkpoint of the reader's
    "howto/load-a-model.md": 1,  # hub names, files of the reader's, a GPU
    "howto/reproduce.md": 1,  # hours
    "howto/run-on-ray.md": 1,  # a cluster
    "large-models.md": 1,  # a GPU
}
"""How many blocks of Python each page shows without their being run."""


@pytest.fixture(scope="module")
def tiny_smollm2() -> Any:
    """A tiny random model with SmolLM2-135M's layers and heads, which pages name."""
    return tiny.hf_model(
        "llama", scale=5.0, noise=0.1, hidden_size=36, intermediate_size=40,
        num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
    )  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all pages keep their key statistics."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def stand_in(
    tiny_smollm2: Any, cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The tiny model under the real one's name, few steps, and a few texts for Wikipedia."""
    load, lines = dl.load_model, asset("facts.jsonl").read_text(encoding="utf-8").splitlines()
    leads = [line[:150] for line in lines[:8]]  # a token for each character

    def load_stand_in(source: Any, tokenizer: Any = None, **options: Any) -> dl.LensModel:
        if source == "smollm2-135m":
            return load(tiny_smollm2, tiny.tokenizer(), name=source, **options)
        return load(source, tokenizer, **options)

    quick = {name: {**values, "steps": 2} for name, values in KNOWN["llama", 30, 576, 3].items()}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DRIFTLENS_CACHE", str(cache))
    monkeypatch.setitem(KNOWN, ("llama", 30, 36, 3), quick)
    monkeypatch.setattr(dl, "load_model", load_stand_in)
    monkeypatch.setattr(driftlens.editing.statistics, "wikipedia_leads", lambda: leads)


@pytest.mark.parametrize("name", RUN)
def test_the_python_of_a_page_runs(name: str, stand_in: None) -> None:
    documents.run_python(PAGES[name])


@pytest.mark.real
def test_the_quickstart_runs_on_the_real_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    scope = documents.run_python(PAGES["quickstart.md"])
    assert scope["before"]["Paris"] > scope["before"]["Rome"]
    assert scope["after"]["Rome"] > scope["after"]["Paris"]
    assert scope["restored"].recovered_share > 0.5
    assert "L23H4" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_every_block_is_run_or_says_that_it_is_not() -> None:
    found: dict[str, int] = {}
    for name, path in PAGES.items():
        for kind, text, line in documents.fences(path):
            if kind == "{code-block} python":
                assert text.startswith(":class: not-run\n"), f"{name}, line {line}"
                compile(text.removeprefix(":class: not-run\n"), name, "exec")
                found[name] = found.get(name, 0) + 1
            else:
                known = ("python", "bash", "{eval-rst}", "{toctree}", "{image}", "{include}")
                assert kind.startswith(known), f"{name}, line {line}: {kind}"
                assert kind == "python" or not kind.startswith("py"), f"{name}, line {line}"
    assert found == NOT_RUN


@pytest.mark.parametrize("name", ["README.md", *PAGES])
def test_commands_exist_with_their_options(name: str) -> None:
    path = PAGES.get(name, REPOSITORY / name)
    for arguments in documents.commands(path):
        documents.check_command(arguments)


def test_commands_are_found_and_wrong_ones_noticed() -> None:
    found = documents.commands(REPOSITORY / "README.md")
    assert len(found) >= 8
    assert found[0][0] == "demo"
    assert {arguments[0] for arguments in found} >= {"edit", "drift", "patch", "bench", "reproduce"}
    for wrong, reason in (
        (["nothing"], "No such command"),
        (["drift", "--edit", "x"], "prompt"),
        (["bench", "--out", "x", "--colour", "y"], "No such option"),
    ):
        with pytest.raises(Exception, match=reason):
            documents.check_command(wrong)


def test_each_page_says_at_its_top_what_it_answers() -> None:
    for name, path in PAGES.items():
        if name in ("editors.md", "changelog.md", "contributing.md"):
            continue
        title, second = path.read_text(encoding="utf-8").split("\n\n")[:2]
        assert re.fullmatch(r"# [^\n]+", title), name
        assert re.fullmatch(r"\*[^*].*[^*]\*", second, flags=re.S), name


def test_links_in_pages_are_not_to_places_outside_the_repository() -> None:
    for name, path in PAGES.items():
        text = path.read_text(encoding="utf-8")
        assert "/work" not in text and "/tmp" not in text, name


def test_every_experiment_is_in_the_reference() -> None:
    page = PAGES["reference/experiments.md"].read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `(\w+)` \|", page, flags=re.M))
    folder = REPOSITORY / "driftlens" / "experiments"
    there = {path.stem for path in folder.iterdir() if not path.stem.startswith("_")}
    assert listed == there - {"options"}


def test_every_reproduced_experiment_is_named_where_they_are_listed() -> None:
    """In the command's help, the README and the how-to, where "fig3 to fig7" names five."""
    help_text = inspect.getsource(cli.reproduce)
    listed = help_text[help_text.index('help="table1') : help_text.index("out: ")]
    listed = re.sub(r"\bfig3 to fig7\b", "fig3 fig4 fig5 fig6 fig7", listed.replace('"\n', ""))
    assert {*EXPERIMENTS, "all"} <= set(re.findall(r"\w+", listed))
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert EXPERIMENTS.keys() <= set(re.findall(r"`(\w+)`", readme))
    howto = PAGES["howto/reproduce.md"].read_text(encoding="utf-8")
    assert list(EXPERIMENTS) == re.findall(r"^\| `(\w+)` \|", howto, flags=re.M)


def test_penalties_are_listed_with_their_strengths() -> None:
    page = PAGES["reference/restrictions.md"].read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w-]+)` \| [^|]+ \| `(\w+)` \| ([\d.]+) \|", page, flags=re.M)
    assert [name for name, _, _ in rows] == list(PENALTIES)
    for name, strength, default in rows:
        assert getattr(PENALTIES[name](), strength) == float(default)


def test_every_command_is_named_where_commands_are_listed() -> None:
    commands = {command.callback.__name__ for command in cli.app.registered_commands}
    listing = r"driftlens (demo(?: \|\s+\w+)+)"
    changes = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    for text in (str(cli.__doc__), changes):
        found = re.search(listing, text)
        assert found is not None
        assert set(re.split(r" \|\s+", found[1])) == commands


def test_what_files_hold_is_in_the_reference(
    stand_in: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scope = documents.run_python(PAGES[FILES])
    page = PAGES[FILES].read_text(encoding="utf-8")
    with np.load("drift.npz") as file:
        prompts = scope["prompts"][0]
        arrays = {key.replace("_0", "_i") for key in file.files}
    keys = {
        *json.loads(Path("my-edit/edit.json").read_text()), *arrays, *prompts, *scope["plan"],
        *scope["plan"]["units"][0], *scope["plan"]["arms"][0], *scope["plan"]["setting"],
        *(key for one in scope["found"] for key in one), *scope["found"][0]["answers"][0],
        *scope["cases"][0].request.to_dict(),
        *(path.name for folder in ("my-edit", "my-bench") for path in Path(folder).iterdir()),
    }  # fmt: skip
    assert not {key for key in keys if f"`{key}`" not in page}


def test_bundled_models_are_listed_with_their_licences() -> None:
    page = PAGES["howto/load-a-model.md"].read_text(encoding="utf-8")
    rows = {cells[1].strip(" `"): cells for line in page.splitlines()
            if line.startswith("| `") and (cells := line.split("|"))}  # fmt: skip
    assert list(rows) == list(BUNDLED_MODELS)
    for name, file in BUNDLED_MODELS.items():
        _, _, what, source, licence, _ = rows[name]
        assert f"{file.size / 1e6:.0f} MB" in what
        for package in file.packages[:1]:
            assert all(part in source for part in package.split("=="))
        assert file.licence.partition(" (")[0] in licence


def test_every_editor_is_linked_to_its_paper() -> None:
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    linked = dict(re.findall(r"\[`([\w-]+)`\]\((https://arxiv.org/abs/[\d.]+)\)", readme))
    assert list(linked) == list(METHODS)
    page = PAGES["editors.md"].read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w-]+)` .*\[([^]]+)\]\(([^)]+)\) \|$", page, flags=re.M)
    assert {name: address for name, _, address in rows} == linked
    for name, title, _ in rows:
        assert f"({title})" in METHODS[name].title


def test_the_citation_is_of_this_version() -> None:
    text = (REPOSITORY / "CITATION.cff").read_text(encoding="utf-8")
    assert f"version: {dl.__version__}\n" in text
    assert "https://arxiv.org/abs/2502.14838" in text
