"""The page as a notebook widget that computes what the reader asks for.

The page itself holds finished numbers. Inside this widget it tells Python which head is open and
which are chosen, and a click on "Restore them now" patches exactly these heads and shows the
answer in the page. Needs the extra ``widget`` (anywidget) and a running kernel; everything else
of the page works without.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cache
from importlib import resources
from typing import Any

from driftlens.attention import head_name
from driftlens.comparison import Comparison
from driftlens.errors import DriftLensError, RequestError
from driftlens.models import LensModel
from driftlens.patching import PatchExperiment, PatchResult, resolve_heads


def widget(model: LensModel, comparison: Comparison, **options: Any) -> Any:
    """The page of a comparison, alive.

    Args:
        model: The unedited model that was compared.
        comparison: What :func:`driftlens.compare` returned.
        **options: Those of :meth:`driftlens.Comparison.page_data`.

    Returns:
        An ``anywidget.AnyWidget`` with the traits ``opened`` (name of the head that is open, empty
        if none is) and ``selected`` (names of the chosen heads), both as the reader last left them,
        and the method ``restore(heads)``, which patches and tells the page.

    Raises:
        RequestError: If anywidget is not installed, or the model is another one.
    """
    if model.info != comparison.info:
        raise RequestError(
            f"The comparison is of {comparison.info.name}, the model is {model.info.name}.",
            "Pass the model that was compared.",
        )
    return _widget_class()(model, comparison, **options)


@cache
def _widget_class() -> Any:
    """The class, made at the first use, because what it derives from is optional."""
    try:
        import anywidget
        import traitlets
    except ImportError as error:
        raise RequestError(
            "anywidget is not installed.", 'Run pip install "anywidget>=0.9" (the extra widget).'
        ) from error

    class LivePage(anywidget.AnyWidget):  # type: ignore[misc]
        """See :func:`widget`."""

        _esm = (resources.files("driftlens.viewer") / "widget.js").read_text(encoding="utf-8")
        document = traitlets.Unicode().tag(sync=True)
        opened = traitlets.Unicode().tag(sync=True)
        selected = traitlets.List(traitlets.Unicode()).tag(sync=True)

        def __init__(self, model: LensModel, comparison: Comparison, **options: Any) -> None:
            super().__init__(document=comparison.html(**options))
            self._model = model
            self._comparison = comparison
            self._experiment: PatchExperiment | None = None
            self.on_msg(self._asked)

        def restore(self, heads: Iterable[str | tuple[int, int]]) -> PatchResult:
            """Restore the original attention of these heads, and tell the page the answers.

            Args:
                heads: Such as ``["L9H6", "L10H2"]``.

            Raises:
                RequestError: If there is no head, or one does not exist.
            """
            found, places = self._comparison, resolve_heads(self._model, None, heads)
            if self._experiment is None:
                self._experiment = PatchExperiment(
                    self._model, found.edit, found.prompt, answer=found.answer
                )
            result = self._experiment.attention(heads=places)
            target = found.target_prob(result.patched)
            self.send(
                {
                    "kind": "restored",
                    "heads": [head_name(*place) for place in places],
                    "answer": result.patched.prob,
                    "target": None if math.isnan(target) else target,
                }
            )
            return result

        def _asked(self, _: Any, message: dict[str, Any], buffers: Sequence[Any]) -> None:
            """The page asks for the answers with some heads restored."""
            if message.get("kind") != "restore":
                return
            try:
                self.restore(message["heads"])
            except DriftLensError as error:
                self.send({"kind": "failed", "heads": message["heads"], "problem": str(error)})

    return LivePage
