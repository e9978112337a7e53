"""Every notebook runs from start to end, on the real model."""

from __future__ import annotations

from pathlib import Path

import jupytext
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.py"))


def test_there_are_notebooks_and_none_has_stored_outputs():
    assert NOTEBOOKS
    tracked = [p for p in NOTEBOOKS[0].parent.iterdir() if p.suffix == ".ipynb"]
    for path in tracked:
        assert '"outputs": []' in path.read_text(encoding="utf-8"), path


@pytest.mark.real
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path: Path):
    notebook = jupytext.read(path)
    client = NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": path.parent}}
    )
    client.execute()
    figures = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "application/vnd.plotly.v1+json" in output.get("data", {})
    ]
    assert len(figures) >= 3
