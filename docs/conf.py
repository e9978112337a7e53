"""The documentation site: ``python -m sphinx -W --keep-going -b html docs docs/_build``.

Nothing is fetched while it is built. The notebooks are taken from ``notebooks/`` as they are, and
executed only with ``DRIFTLENS_DOCS_EXECUTE=1``, since that takes minutes of model time. What was
executed is kept in ``docs/.jupyter_cache`` until a notebook's code changes.
"""

from __future__ import annotations

import os
import re
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import jupytext
import typer
from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util.logging import getLogger

import driftlens
from driftlens import cli
from driftlens.editing.configs import EditConfig, describe
from driftlens.experiments import gather

HERE = Path(__file__).parent

project = "DriftLens"
author = "the DriftLens contributors"
copyright = "the DriftLens contributors, Apache-2.0"
release = version = driftlens.__version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "myst_nb"]
exclude_patterns = ["_build", ".jupyter_cache", "jupyter_execute"]

html_theme = "furo"
html_math_renderer = "mathml"
html_title = f"DriftLens {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False

myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_type_aliases = {
    "Metric": "driftlens.cases.Metric",
    "TextMetric": "driftlens.cases.TextMetric",
    "Delta": "driftlens.weights.Delta",
    "Found": "driftlens.editing.outcome.Found",
    "FloatArray": "numpy.ndarray",
}
python_maximum_signature_line_length = 88
python_display_short_literal_types = True
default_role = "literal"  # `name` in docstrings
nitpicky = True  # a reference that leads nowhere is a warning
nitpick_ignore_regex = [
    ("py:.*", r"(torch|numpy|np|pandas|pd|plotly|go|jaxtyping|collections|pathlib|os|typing)\..*"),
    ("py:class", "Tensor|ndarray|driftlens.editing.outcome.Found"),
]
napoleon_numpy_docstring = False
napoleon_use_rtype = False

nb_execution_mode = "cache" if os.environ.get("DRIFTLENS_DOCS_EXECUTE") == "1" else "off"
nb_execution_cache_path = str(HERE / ".jupyter_cache")
nb_execution_timeout = 900
nb_output_stderr = "remove"  # progress bars
nb_execution_raise_on_error = True
os.environ.setdefault("PLOTLY_RENDERER", "notebook")  # figures bring plotly.js with them


def copy_notebooks(source: Path, target: Path) -> None:
    """Put every notebook beside the pages, in the form that Sphinx reads; unchanged ones stay."""
    target.mkdir(exist_ok=True)
    wanted = {path.with_suffix(".ipynb").name: path for path in source.glob("*.py")}
    for old in target.glob("*.ipynb"):
        if old.name not in wanted:
            old.unlink()
    for name, path in wanted.items():
        notebook = jupytext.read(path)
        notebook.metadata.setdefault("language_info", {"name": "python"})  # to colour its code
        text = jupytext.writes(notebook, fmt="ipynb")
        file = target / name
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            file.write_text(text, encoding="utf-8")


def mend_signature(
    app: Any, what: str, name: str, obj: Any, options: Any, signature: str | None, returns: Any
) -> tuple[str | None, Any] | None:
    """Signatures as one would write them: aliases by name, dataclasses without private fields,
    configurations of editors without types, which stand in the list of their fields."""
    if what == "class" and issubclass(obj, EditConfig):
        required = [item.name for item in fields(obj) if item.default is MISSING]
        others = [f"{f.name}={f.default!r}" for f in fields(obj) if f.default is not MISSING]
        return f"(*, {', '.join([*required, *others])})" if required else "", returns
    return _plain(signature), _plain(returns)


def _plain(signature: str | None) -> str | None:
    if signature is None:
        return None
    signature = re.sub(r"TypeAliasForwardRef\('([^']+)'\)", r"\1", signature)
    # As short as the other names.
    signature = re.sub(r"(?<!~)\bdriftlens\.(cases|weights)\.", r"~driftlens.\1.", signature)
    signature = re.sub(r", _\w+: [^=]+=\s*<factory>", "", signature)
    return signature.replace("<factory>", "...")


def list_fields(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """All fields of an editor's configuration, its parents' too, as ``driftlens methods`` does."""
    if what != "class" or not issubclass(obj, EditConfig) or not fields(obj):
        return
    lines[:] = [*lines[: lines.index("Args:")], "Args:"]
    for item, told in zip(fields(obj), describe(obj), strict=True):
        default = "by model" if item.default is MISSING else f"``{item.default!r}``"
        lines.append(f"    {item.name}: {told['meaning']} (``{told['type']}``, default {default})")
    lines.append("")


def show_math(writer: Any, node: nodes.math | nodes.math_block) -> None:
    """Formulas as MathML, which browsers show by themselves; MathJax would be fetched."""
    is_block = isinstance(node, nodes.math_block)
    try:
        formula = tex2mathml(node.astext(), as_block=is_block)
    except MathError as error:
        getLogger(__name__).warning("%s In: %s", error, node.astext(), location=node)
        raise nodes.SkipNode from error
    writer.body.append(f'<div class="formula">{formula}</div>' if is_block else formula)
    raise nodes.SkipNode


def leave_mathjax_out(
    app: Any, page: str, template: str, context: dict[str, Any], doctree: Any
) -> None:
    """Plotly's notebook figures would fetch MathJax, which none of ours needs."""
    if "body" in context:
        context["body"] = re.sub(
            r'<script src="https://[^"]*/mathjax/[^"]*"></script>', "", context["body"]
        )


def write_evidence(app: Any, exception: Exception | None) -> None:
    """The page of all experiments, beside those of the site."""
    results = HERE.parent / "assets" / "results"
    if exception is None and app.builder.format == "html" and results.is_dir():
        text = gather.page(results, "python -m driftlens.experiments.gather --page evidence.html")
        (Path(app.outdir) / "evidence.html").write_text(text, encoding="utf-8")


def list_commands(app: Any, page: str, source: list[str]) -> None:
    """The command line's own help, where a page asks for it."""
    if (mark := "<!-- commands -->") in source[0]:
        source[0] = source[0].replace(mark, _commands())


def _commands() -> str:
    parts = []
    for name, command in vars(typer.main.get_command(cli.app))["commands"].items():
        shown = [p for p in command.params if not getattr(p, "hidden", False)]
        lines = [_row(parameter) for parameter in shown]
        table = ["| option | default | meaning |", "|---|---|---|", *lines] if lines else []
        parts.append("\n".join([f"## driftlens {name}", "", command.help, "", *table, ""]))
    return "\n".join(parts)


def _row(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        names = parameter.name.upper()
    else:
        names = ", ".join([*parameter.opts, *parameter.secondary_opts])
    default = None if parameter.default is False else parameter.default
    shown = "needed" if parameter.required else "" if default is None else f"`{default}`"
    told = str(parameter.help or "").replace("\\[", "[").replace("|", "\\|")
    return f"| `{names}` | {shown} | {told} |"


def setup(app: Any) -> None:
    """Sphinx calls this."""
    app.add_html_math_renderer("mathml", (show_math, None), (show_math, None))
    copy_notebooks(HERE.parent / "notebooks", HERE / "notebooks")
    app.connect("source-read", list_commands)
    app.connect("build-finished", write_evidence)
    app.connect("html-page-context", leave_mathjax_out)
    app.connect("autodoc-process-signature", mend_signature)
    app.connect("autodoc-process-docstring", list_fields, priority=400)  # before napoleon
