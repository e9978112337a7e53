"""The documentation's site builds without a warning, and its links lead somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import typer
from documents import DOCS, REPOSITORY

import driftlens as dl
import driftlens.bench
import driftlens.editing.statistics
import driftlens.generation
import driftlens.viewer
from driftlens.cli import app
from driftlens.editing.family import PENALTIES
from driftlens.editing.methods import METHODS


def build(source: Path, out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The documented command; whatever it tried to fetch would fail."""
    offline = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    command = ["-m", "sphinx", "-W", "--keep-going", "-b", "html"]
    return subprocess.run(
        [sys.executable, *command, str(source), str(out)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **offline, **environment},
        capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site, notebooks not executed."""
    out = tmp_path_factory.mktemp("site")
    done = build(DOCS, out, DRIFTLENS_DOCS_EXECUTE="0")
    assert done.returncode == 0, done.stderr[-5000:]
    return out


class Links(HTMLParser):
    """Where a page leads, what it needs to be shown, and where one can jump to in it."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.needed: list[str] = []
        self.anchors: set[str] = set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if "src" in values or (tag == "link" and "href" in values):
            self.needed.append(values.get("src") or values["href"])
        elif tag == "a" and "href" in values:
            self.targets.append(values["href"])


def test_links_of_the_site_lead_somewhere(site: Path) -> None:
    parsed = {page: Links(page) for page in site.rglob("*.html") if "_static" not in page.parts}
    checked = 0
    for page, links in parsed.items():
        for target in [*links.targets, *links.needed]:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            file = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            assert file.exists(), f"{page.name}: {target}"
            is_anchor = parts.fragment and file in parsed
            assert not is_anchor or unquote(parts.fragment) in parsed[file].anchors, (
                f"{page.name}: {target}"
            )
            checked += 1
    assert checked > 1000


def test_the_site_needs_no_network_to_be_shown(site: Path) -> None:
    for page in site.rglob("*.html"):
        for target in Links(page).needed:
            assert not urlsplit(target).netloc, f"{page.name}: {target}"


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    inventory = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    known = {line.split()[0] for line in zlib.decompress(inventory).decode().splitlines()}
    wanted = {f"driftlens.{name}" for name in dl.__all__}
    wanted |= {f"driftlens.bench.{name}" for name in driftlens.bench.__all__}
    wanted |= {f"driftlens.viewer.{name}" for name in driftlens.viewer.__all__}
    assert wanted <= known, wanted - known
    # By where they are defined, too, as signatures name them.
    classes = [*(method.config for method in METHODS.values()), *PENALTIES.values()]
    assert {f"{c.__module__}.{c.__qualname__}" for c in classes} <= known


def test_configurations_show_all_their_fields(site: Path) -> None:
    text = (site / "reference" / "configurations.html").read_text(encoding="utf-8")
    start = text.index('id="driftlens.MemitConfig"')
    memit = text[start : text.index('id="driftlens.PmetConfig"')]
    for name in ("layers", "clamp_factor", "cov_weight"):  # its own, and its parents'
        assert f"<strong>{name}</strong>" in memit
    assert "by model" in memit and "FieldInfo" not in text


def test_every_option_of_the_command_line_is_on_its_page(site: Path) -> None:
    text = (site / "reference" / "command-line.html").read_text(encoding="utf-8")
    found = 0
    for name, command in vars(typer.main.get_command(app))["commands"].items():
        assert f"driftlens {name}" in text
        for option in (o for p in command.params for o in p.opts if o.startswith("--")):
            assert re.search(rf">{option}[<,]", text), option
            found += 1
    assert found > 60
    assert "TOML with method, [config] and [[penalties]]." in text


def test_signatures_read_well(site: Path) -> None:
    for page in (site / "reference").glob("*.html"):
        text = page.read_text(encoding="utf-8")
        for ugly in ("TypeAliasForwardRef", "&lt;factory&gt;", "_known_good", "~typing"):
            assert ugly not in text, f"{page.name}: {ugly}"


def test_results_and_facts_are_on_the_site(site: Path) -> None:
    results = (site / "results.html").read_text(encoding="utf-8")
    for cell in ("restored: pattern, all rows", "less edited", "one ROME edit, over a padded loop"):
        assert f"<td><p>{cell}" in results or f'<th class="head"><p>{cell}' in results, cell
    facts = (site / "facts.html").read_text(encoding="utf-8")
    assert "Known limits" in facts and "Gemma 3 270M" in facts


def test_every_notebook_is_on_the_site(site: Path) -> None:
    notebooks = {path.stem for path in (REPOSITORY / "notebooks").glob("*.py")}
    assert notebooks
    assert {path.stem for path in (site / "notebooks").glob("*.html")} == notebooks
    listed = (site / "notebooks.html").read_text(encoding="utf-8")
    assert all(f'href="notebooks/{name}.html"' in listed for name in notebooks)


def test_the_first_page_shows_a_picture(site: Path) -> None:
    images = re.findall(r'<img [^>]*src="(_images/[^"]+)"', (site / "index.html").read_text())
    assert (site / images[0]).read_bytes() == (REPOSITORY / "assets" / "demo.png").read_bytes()


@pytest.mark.parametrize("executed", [False, True])
def test_notebooks_are_executed_on_demand(executed: bool, tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    (docs / "_static").mkdir(parents=True)
    (tmp_path / "notebooks").mkdir()
    (docs / "conf.py").write_text((DOCS / "conf.py").read_text())
    (docs / "_static" / "site.css").write_text("")
    (docs / "index.md").write_text("# Site\n\n```{toctree}\n:glob:\nnotebooks/*\n```\n")
    (tmp_path / "notebooks" / "one.py").write_text(
        "# %% [markdown]\n# # One\n\n# %%\nimport sys\nprint('made ' + 'here')\n"
        "print('a progress ' + 'bar', file=sys.stderr)\n\n# %%\n"
        "import plotly.graph_objects as go\ngo.Figure(go.Bar(y=[1, 2]))\n"
    )
    done = build(docs, tmp_path / "out", DRIFTLENS_DOCS_EXECUTE=str(int(executed)))
    assert done.returncode == 0, done.stderr[-5000:]
    text = (tmp_path / "out" / "notebooks" / "one.html").read_text(encoding="utf-8")
    assert ("made here" in text) == executed
    assert ("plotly-graph-div" in text) == executed
    assert "a progress bar" not in text
    # What a figure needs is on the page: nothing is fetched when it is shown.
    page = Links(tmp_path / "out" / "notebooks" / "one.html")
    assert not [target for target in page.needed if urlsplit(target).netloc]
    assert (len(text) > 2_000_000) == executed
