"""The main job on one chosen example: edit, see the drift, prove it by patching, cure it.

:func:`run_demo` is the whole path in one function. The example was *chosen* for
SmolLM2-135M, as one that the model clearly knows and on which the effect is plain; the averages
over all facts that were looked at stand beside it
(``driftlens.experiments.survey``).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from driftlens.assets import survey_result
from driftlens.comparison import Comparison, compare
from driftlens.editing.defaults import sadr_gamma
from driftlens.editing.methods import edit as make_an_edit
from driftlens.editing.sadr import SADR
from driftlens.facts import EditRequest
from driftlens.intervals import with_interval
from driftlens.models import LensModel
from driftlens.patch_results import Readout
from driftlens.records import plain, versions
from driftlens.viewer import Table

HEADS_SHOWN = 12


@dataclass(frozen=True)
class Example:
    """A fact, and a prompt whose answer its edit must not change."""

    request: EditRequest
    prompt: str
    answer: str


EIFFEL = Example(
    EditRequest("{} is located in the city of", "The Eiffel Tower", "Rome", "Paris"),
    "The Eiffel Tower is located in the city of Rome. "
    "The cathedral of Notre-Dame is located in the city of",
    "Paris",
)
"""A distract-neighbourhood prompt: the unedited model is not misled by the false sentence."""

EXAMPLES = {"smollm2-135m": EIFFEL}
"""Examples that were chosen, by model. Other models get the first one, and the page says so."""


@dataclass(frozen=True)
class Demo:
    """Everything that the demo found.

    Args:
        model: What was edited.
        example: The fact and the prompt.
        gamma: SADR's strength.
        comparison: The edit, its drift, what brings the answer back, and the restricted edit.
        seconds: Duration of all of it.
    """

    model: LensModel
    example: Example
    gamma: float
    comparison: Comparison
    seconds: float


def run_demo(
    model: LensModel,
    example: Example,
    *,
    gamma: float | None = None,
    covariance: Any = None,
    progress: bool = True,
) -> Demo:
    """The whole path.

    Args:
        model: Any model.
        example: A fact, a prompt, and the answer that it must keep.
        gamma: Of SADR; by default the one for this model.
        covariance: As in :func:`driftlens.edit`.
        progress: Whether to show bars.
    """
    started = time.monotonic()
    gamma = sadr_gamma(model, "rome") if gamma is None else gamma
    request = example.request

    # The fact is edited, without and with the restriction, with the same number of steps at most.
    edit = make_an_edit(model, request, covariance=covariance, progress=progress)
    cured = make_an_edit(
        model, request, penalty=SADR(gamma=gamma), covariance=covariance, progress=progress
    )
    # Which heads drift, what brings the answer back, and does the restricted edit keep it?
    comparison = compare(
        model, edit, example.prompt, example.answer, cured=cured, progress=progress
    )
    return Demo(model, example, gamma, comparison, seconds=time.monotonic() - started)


def demo_json(demo: Demo) -> dict[str, Any]:
    """The demo's numbers, JSON-ready."""
    found, new = demo.comparison, demo.example.request.target_new
    assert found.sweep is not None
    assert found.cured_readout is not None

    def pair(readout: Readout) -> dict[str, float]:
        return {"answer": readout.prob, "target_new": readout[new].prob}

    pattern = found.restored["attention pattern"]
    success = {state.lower(): value for state, value in found.edit_success.items()}
    return {
        "model": demo.model.info.to_dict(),
        "request": demo.example.request.to_dict(),
        "distractor": {"prompt": demo.example.prompt, "answer": demo.example.answer},
        "chosen": _how_chosen(demo.model.info.name),
        "probabilities": {
            "original": pair(pattern.original),
            "edited": pair(pattern.edited),
            "restored": pair(pattern.patched),
            "sadr": pair(found.cured_readout),
        },
        "restored": {
            name: {**pair(result.patched), "recovered_share": plain(result.recovered_share)}
            for name, result in found.restored.items()
        },
        "edit_success": success,
        "top_heads": [
            {"name": h.name, "drift": h.drift, "original": h.original, "edited": h.edited,
             "kl": h.kl}
            for h in found.drift.top_heads(HEADS_SHOWN)
        ],
        "best_single_heads": [
            {"name": name, "change_of_answer": change}
            for name, change in found.sweep.top_heads(HEADS_SHOWN)
        ],
        "gamma": demo.gamma,
        "config": {k: v for k, v in found.edit.config.items() if k != "contexts"},
        "averages": averages(demo.model),
        "seconds": demo.seconds,
        "versions": versions(),
    }  # fmt: skip


def _how_chosen(name: str) -> str:
    if name in EXAMPLES:
        return (
            "This example was chosen as one on which the effect is plain, while looking over the "
            "shipped facts; the averages over all facts that were looked at are the evidence."
        )
    return (
        f"This example was chosen for {next(iter(EXAMPLES))}, not for this model; here it shows "
        "what it shows."
    )


def demo_page(demo: Demo) -> str:
    """The demo as one self-contained HTML page."""
    name = demo.model.info.name
    return demo.comparison.html(
        notes=[_how_chosen(name)], tables=survey_tables(averages(demo.model))
    )


def averages(model: LensModel) -> dict[str, Any] | None:
    """What was measured over many facts of a model with these weights; ``None`` if nothing was."""
    found = survey_result(model.info.name)
    return found if found is not None and found["fingerprint"] == model.fingerprint() else None


def survey_tables(survey: dict[str, Any] | None) -> list[Table]:
    """Averages over many facts as tables; none if this model was not surveyed."""
    if survey is None:
        return []
    tables = []
    for kind, content in survey["kinds"].items():
        rows = [
            [of_sadr(state, survey), *(_mean(values, m) for m in ("answer", "target_new")),
             _mean(values, "beats_target_new")]
            for state, values in content["states"].items()
        ]  # fmt: skip
        tables.append(
            Table(
                f"Averages: {kind} prompts ({content['prompts']} prompts about {content['facts']} "
                f"of {survey['facts']} facts, those that the original model answers; 95 % "
                "intervals by bootstrap over facts)",
                ["state", "P(answer)", "P(new target)", "answer beats new target"],
                rows,
            )
        )
    return tables


def of_sadr(state: str, survey: dict[str, Any]) -> str:
    """A state's name, with SADR's strength in the survey, which the demo's need not be."""
    return f"sadr, gamma {survey['gamma']:g}" if state == "sadr" else state


def _mean(values: dict[str, Any], measure: str) -> str:
    return with_interval(values[measure], *values[f"{measure}_interval"], digits=3)
