"""Data flows one way: no module imports from one that stands below it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "driftlens"
ORDER = [
    "errors",
    "memory",
    "intervals",
    "precision",
    "equality",
    "attention",
    "facts",
    "disk",
    "journal",
    "tokens",
    "interventions",
    "digests",
    "codebook",
    "weights",
    "bundled",
    "assets",
    "parameters",
    "checkpoints",
    "models",
    "probing",
    "loading",
    "reuse",
    "packing",
    "scoring",
    "figures",
    "documents",
    "edits",
    "strength",
    "side_by_side",
    "records",
    "editing.configs",
    "editing.defaults",
    "editing.contexts",
    "editing.statistics",
    "editing.penalties",
    "editing.sadr",
    "editing.rivals",
    "editing.family",
    "editing.config_files",
    "editing.descent",
    "editing.target",
    "editing.outcome",
    "editing.spreading",
    "editing.rome",
    "editing.memit",
    "editing.pmet",
    "editing.emmet",
    "editing.alphaedit",
    "editing.fine_tuning",
    "editing.grace",
    "editing.methods",
    "drift",
    "patch_results",
    "patch_places",
    "patching",
    "viewer.page",
    "viewer",
    "comparison",
    "viewer.widget",
    "demo",
    "cases",
    "readers",
    "evaluation",
    "generation",
    "bench.arms",
    "bench.units",
    "bench.ray_executor",
    "bench.results",
    "bench.run",
    "bench",
    "report",
    "experiments.options",
    "experiments.paper",
    "experiments.survey",
    "experiments.tuning",
    "experiments.sadr_search",
    "experiments.many",
    "experiments.known",
    "experiments.paper_data",
    "experiments.reproduce.finding",
    "experiments.reproduce.editors",
    "experiments.reproduce.measuring",
    "experiments.reproduce.single_heads",
    "experiments.reproduce.inside",
    "experiments.reproduce.cure",
    "experiments.reproduce.cost",
    "experiments.reproduce.strength",
    "experiments.reproduce.sequential",
    "experiments.reproduce.page",
    "experiments.reproduce",
    "experiments.tables",
    "experiments.gather",
    "cli",
]


def modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


def imports(path: Path) -> set[str]:
    """Modules of the package that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            if node.module.startswith("driftlens."):
                found.add(node.module.removeprefix("driftlens."))
            elif node.module == "driftlens":
                found |= {alias.name for alias in node.names if not alias.name.startswith("__")}
        elif isinstance(node, ast.Import):
            found |= {
                alias.name.removeprefix("driftlens.")
                for alias in node.names
                if alias.name.startswith("driftlens.")
            }
    return found


def test_every_module_has_its_place():
    facades = {"__init__", "editing", "experiments"}
    assert set(modules()) - facades == set(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_a_module_imports_only_what_stands_above_it(name: str):
    above = set(ORDER[: ORDER.index(name)])
    assert imports(modules()[name]) <= above


def test_the_check_sees_imports():
    assert "errors" in imports(modules()["attention"]) or "errors" in imports(modules()["facts"])


def test_nobody_but_tokens_calls_the_tokenizer():
    for name, path in modules().items():
        if name in ("tokens",):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                text = ast.unparse(node.func)
                ends = (".tokenizer", "tokenizer.encode", "tokenizer.decode")
                assert not text.endswith(ends), f"{name}: {text}"


def test_public_names_exist_and_have_docstrings():
    import driftlens

    for name in driftlens.__all__:
        assert getattr(driftlens, name).__doc__, name
    assert set(driftlens.__all__) == set(driftlens._HOME)
