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
from driftlens.patch_places import resolve_heads
from driftlens.patch_results import PatchResult
from driftlens.patching import PatchExperiment


def widget(model: LensModel, comparison: Comparison, **options: Any) -> Any:
    """The page of a comparison, alive.

    Args:
        model: The unedited model that was compared; it may be from elsewhere or on another device.
        comparison: What :func:`driftlens.compare` returned; without its sweep, the page has no
            place to choose heads, and ``restore`` answers in Python only.
        **options: Those of :meth:`driftlens.Comparison.page_data`.

    Returns:
        An ``anywidget.AnyWidget`` with the traits ``opened`` (name of the head that is open, empty
        if none is) and ``selected`` (names of the chosen heads), both as the reader last left them,
        ``answers`` (what was restored since, with the answers), and the method ``restore(heads)``,
        which patches and lets the page show it.

    Raises:
        RequestError: If anywidget is not installed, or the model is another one.
    """
    other = model.differences(comparison.identity)
    if other:
        what = ", ".join("weights" if name == "model" else name for name in other)
        raise RequestError(
            f"The model {model.info.name} differs from the one that was compared, "
            f"{comparison.info.name}, in {what}.",
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
        answers = traitlets.List(traitlets.Dict()).tag(sync=True)

        def __init__(self, model: LensModel, comparison: Comparison, **options: Any) -> None:
            super().__init__(document=comparison.html(**options))
            self._model = model
            self._comparison = comparison
            self._experiment: PatchExperiment | None = None
            self._around: Any = None
            self.on_msg(self._asked)

        def restore(self, heads: Iterable[str | tuple[int, int]]) -> PatchResult:
            """Restore the original attention of these heads, and let the page show the answers.

            Args:
                heads: Such as ``["L9H6", "L10H2"]``.

            Raises:
                RequestError: If there is no head, one does not exist, or the model is not as it was
                    when it was compared.
            """
            result = self._restored(heads)
            self.selected = self.answers[-1]["heads"]  # for a page that is shown later
            self.send({"kind": "choose", "heads": self.selected})
            return result

        def _restored(self, heads: Iterable[str | tuple[int, int]]) -> PatchResult:
            """The same, for a page that has chosen the heads itself."""
            found, places = self._comparison, resolve_heads(self._model, None, heads)
            result = self._experiment_now().attention(heads=places)
            target = found.target_prob(result.patched)
            answer = {
                "heads": [head_name(*place) for place in places],
                "answer": result.patched.prob,
                "target": None if math.isnan(target) else target,
            }
            others = [one for one in self.answers if one["heads"] != answer["heads"]]
            self.answers = [*others, answer]
            return result

        def _experiment_now(self) -> PatchExperiment:
            """The experiment whose numbers the page shows, on the model as it is now."""
            found, around = self._comparison, self._model.weights.active
            if self._experiment is None or around != self._around:
                made = PatchExperiment(
                    self._model, found.edit, found.prompt, found.subject, found.answer
                )
                readouts = found.readouts()
                for before, now in (
                    (readouts["original model"], made.original),
                    (readouts["edited"], made.edited),
                ):
                    if not math.isclose(before.prob, now.prob, rel_tol=1e-3, abs_tol=1e-9):
                        raise RequestError(
                            "The model is not as it was when it was compared: the answer has "
                            f"{now.prob:.4g} instead of {before.prob:.4g}.",
                            "Have the same edits applied to it as then (mostly none).",
                        )
                self._experiment, self._around = made, around
            return self._experiment

        def _asked(self, _: Any, message: dict[str, Any], buffers: Sequence[Any]) -> None:
            """The page asks for the answers with some heads restored."""
            if message.get("kind") != "restore":
                return
            try:
                self._restored(message["heads"])
            except BaseException as error:  # the page waits for an answer, whatever happened
                problem = str(error) or type(error).__name__
                self.send({"kind": "failed", "heads": message["heads"], "problem": problem})
                if not isinstance(error, DriftLensError):
                    raise

    return LivePage
