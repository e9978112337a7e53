"""The README and the pages of the documentation: their code and their commands."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import typer

REPOSITORY = Path(__file__).parent.parent
DOCS = REPOSITORY / "docs"
BUILT = {"_build", "jupyter_execute", "notebooks", ".jupyter_cache"}
"""Folders in docs/ that hold no pages."""


def pages() -> list[Path]:
    """Every page that was written by hand."""
    found = DOCS.rglob("*.md")
    return sorted(p for p in found if not BUILT & set(p.relative_to(DOCS).parts))


def fences(path: Path) -> list[tuple[str, str, int]]:
    """Each fenced block of a page: its first line without the fence, its text, and its line."""
    text = path.read_text(encoding="utf-8")
    found = re.finditer(r"^```(\S[^\n]*)\n(.*?)^```$", text, flags=re.S | re.M)
    return [(m[1].strip(), m[2], text.count("\n", 0, m.start(2)) + 1) for m in found]


def python_blocks(path: Path) -> list[tuple[str, int]]:
    """The Python of a page that is run, block by block, with its line."""
    return [(text, line) for kind, text, line in fences(path) if kind == "python"]


def run_python(path: Path) -> dict[str, Any]:
    """Run a page's Python from top to bottom; what it defined."""
    scope: dict[str, Any] = {"__name__": path.stem}
    for text, line in python_blocks(path):
        # Blank lines in front, so that a traceback names the line of the page.
        exec(compile("\n" * (line - 1) + text, str(path), "exec", dont_inherit=True), scope)
    return scope


def commands(path: Path) -> list[list[str]]:
    """The arguments of every `driftlens` command in a page's shell and indented blocks."""
    text = path.read_text(encoding="utf-8")
    shell = [block for kind, block, _ in fences(path) if kind == "bash"]
    outside = re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M)
    indented = re.findall(r"(?:^    .+\n)+", outside, flags=re.M)
    lines = "\n".join([*shell, *indented]).replace("\\\n", " ").splitlines()
    parts = [part.strip() for line in lines for part in line.split("&&")]
    own = [part for part in parts if part.startswith("driftlens ")]
    return [shlex.split(part, comments=True)[1:] for part in own]


def check_command(arguments: list[str]) -> None:
    """Parse a command without running it.

    Raises:
        Exception: Typer's, if there is no such command or option, or one is missing.
    """
    from driftlens.cli import app

    group: Any = typer.main.get_command(app)
    for command in group.commands.values():
        command.callback = lambda **options: None
    group.main(list(arguments), prog_name="driftlens", standalone_mode=False)


def result_rows(name: str) -> list[dict[str, Any]]:
    """The rows of a file in assets/results."""
    path = REPOSITORY / f"assets/results/{name}.json"
    return list(json.loads(path.read_text(encoding="utf-8"))["rows"])


def result_runs(name: str) -> list[dict[str, Any]]:
    """The runs of a file in assets/results."""
    path = REPOSITORY / f"assets/results/{name}.json"
    return list(json.loads(path.read_text(encoding="utf-8"))["runs"])


def main_rates() -> dict[tuple[str, str, str, str], float]:
    """Rates of the main table, by data, model, arm and metric."""
    return {
        (row["data"], row["model"], row["arm"], row["metric"]): row["value"]
        for row in result_rows("table3")
    }


def flowing(text: str) -> str:
    """A text on one line."""
    return " ".join(text.split())
