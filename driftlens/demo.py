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

import numpy as np

from driftlens import __version__
from driftlens.assets import survey_result
from driftlens.drift import Drift, attention_patterns, measure_drift
from driftlens.editing.defaults import sadr_gamma
from driftlens.editing.methods import edit as make_an_edit
from driftlens.editing.sadr import SADR
from driftlens.edits import Edit
from driftlens.facts import EditRequest
from driftlens.models import LensModel
from driftlens.patching import AttentionSweep, PatchExperiment, PatchResult, Readout
from driftlens.records import versions
from driftlens.scoring import score_details
from driftlens.viewer import PageData, State, Sweep, Table, page

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
        edit: ROME.
        cured: ROME with SADR, at equal steps.
        drift: Of ``edit``.
        cured_drift: Of ``cured``.
        sweep: Which heads, restored, bring the answer back.
        restored: Larger restorations, by what was restored.
        sadr: Readout of ``cured`` on the prompt.
        edit_success: Probability of the new target on the edit prompt, by state.
        patterns: Token-to-token attention of the heads that drifted most, by head and state.
        seconds: Duration.
    """

    model: LensModel
    example: Example
    gamma: float
    edit: Edit
    cured: Edit
    drift: Drift
    cured_drift: Drift
    sweep: AttentionSweep
    restored: dict[str, PatchResult]
    sadr: Readout
    edit_success: dict[str, float]
    patterns: dict[str, dict[str, np.ndarray]]
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
    request, prompt, answer = example.request, example.prompt, example.answer

    # 1. The fact is edited, without and with the restriction, at equal steps.
    edit = make_an_edit(model, request, covariance=covariance, progress=progress)
    cured = make_an_edit(
        model, request, penalty=SADR(gamma=gamma), covariance=covariance, progress=progress
    )

    # 2. Which heads drift to the edited subject?
    drift = measure_drift(model, edit, prompt)
    cured_drift = measure_drift(model, cured, prompt, label="edited with SADR")

    # 3. Does the original attention, put back, bring the answer back? Which head does?
    experiment = PatchExperiment(model, edit, prompt, request.subject, answer)
    restored = {
        "attention pattern": experiment.attention(),
        "attention pattern of all tokens": experiment.attention(queries="all"),
        "attention values": experiment.attention(exchange="values"),
        "attention pattern and values": experiment.attention(exchange="both"),
        "MLP output": experiment.activation("mlp_out"),
    }
    sweep = experiment.sweep(progress=progress)

    # 4. Does the restricted edit keep the answer, and the edit?
    new = request.target_new
    with cured.applied(model):
        scores = score_details(model, prompt, [answer, new])
    success = {"original": _prob(model, request), "edited": _prob(model, request, edit)}
    success["sadr"] = _prob(model, request, cured)

    heads = [(h.layer, h.head) for h in drift.top_heads(HEADS_SHOWN)]
    by_state = {
        "original": attention_patterns(model, prompt, heads),
        "edited": attention_patterns(model, prompt, heads, edit),
        "sadr": attention_patterns(model, prompt, heads, cured),
    }
    names = list(by_state["original"])
    return Demo(
        model=model,
        example=example,
        gamma=gamma,
        edit=edit,
        cured=cured,
        drift=drift,
        cured_drift=cured_drift,
        sweep=sweep,
        restored=restored,
        sadr=Readout(answer, scores),
        edit_success=success,
        patterns={n: {state: by_state[state][n] for state in by_state} for n in names},
        seconds=time.monotonic() - started,
    )


def _prob(model: LensModel, request: EditRequest, edit: Edit | None = None) -> float:
    if edit is not None:
        with edit.applied(model):
            return _prob(model, request)
    return score_details(model, request.text, [request.target_new])[request.target_new].prob


def demo_json(demo: Demo) -> dict[str, Any]:
    """The demo's numbers, JSON-ready."""
    new = demo.example.request.target_new

    def pair(readout: Readout) -> dict[str, float]:
        return {"answer": readout.prob, "target_new": readout[new].prob}

    pattern = demo.restored["attention pattern"]
    return {
        "model": demo.model.info.to_dict(),
        "request": demo.example.request.to_dict(),
        "distractor": {"prompt": demo.example.prompt, "answer": demo.example.answer},
        "chosen": _how_chosen(demo.model.info.name),
        "probabilities": {
            "original": pair(pattern.original),
            "edited": pair(pattern.edited),
            "restored": pair(pattern.patched),
            "sadr": pair(demo.sadr),
        },
        "restored": {
            name: {**pair(result.patched), "recovered_share": _number(result.recovered_share)}
            for name, result in demo.restored.items()
        },
        "edit_success": demo.edit_success,
        "top_heads": [
            {"name": h.name, "drift": h.drift, "original": h.original, "edited": h.edited,
             "kl": h.kl}
            for h in demo.drift.top_heads(HEADS_SHOWN)
        ],
        "best_single_heads": [
            {"name": name, "change_of_answer": change}
            for name, change in demo.sweep.top_heads(HEADS_SHOWN)
        ],
        "gamma": demo.gamma,
        "config": {k: v for k, v in demo.edit.config.items() if k != "contexts"},
        "averages": survey_result(demo.model.info.name),
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
    info, example = demo.model.info, demo.example
    request, prompt_drift = example.request, demo.drift.prompts[0]
    states = {"original": demo.drift.original, "edited": demo.drift.edited}
    attention = {name: array[0] for name, array in states.items()}
    attention["sadr"] = demo.cured_drift.edited[0]
    pattern = demo.restored["attention pattern"]
    new = request.target_new
    probabilities = [
        ("original model", pattern.original),
        ("edited", pattern.edited),
        *((f"edited, original {what} restored", r.patched) for what, r in demo.restored.items()),
        ("edited with SADR", demo.sadr),
    ]
    data = PageData(
        title="Attention drift of one knowledge edit",
        subtitle=f"{request.text} … {request.target_true or '?'} → {new}",
        tokens=prompt_drift.labels,
        bos=info.prepends_bos,
        subject_span=(prompt_drift.subject.start, prompt_drift.subject.end),
        query=prompt_drift.query,
        states=[
            State("original", "Original"), State("edited", "Edited"), State("sadr", "SADR"),
        ],
        attention=attention,
        kl={
            "edited": demo.drift.kl[0].clip(0),
            "sadr": demo.cured_drift.kl[0].clip(0),
        },
        patterns=demo.patterns,
        sweep=Sweep(
            heads=demo.sweep.head_shares(),
            layers=demo.sweep.layer_shares(),
            windows=[
                (first, last + 1, float(share))
                for (first, last), share in zip(
                    demo.sweep.windows, demo.sweep.window_shares(), strict=True
                )
            ],
            caption=f"Edited model with the original attention rows of the last token restored; "
            f"recovered share of the lost probability of {example.answer!r}.",
        ),
        summary=_summary(demo),
        facts=[
            ("Model", f"{info.name} ({info.n_layers} layers × {info.n_heads} heads)"),
            ("Weights", info.weights),
            ("Edit", f"ROME, layer {demo.edit.config['layer']}, {demo.edit.config['steps']} steps"),
            ("SADR", f"gamma {demo.gamma}, equal steps"),
            ("Fact", f"{request.text} → {new}"),
            ("Prompt", example.prompt),
            ("P(new target) on the edit prompt", ", ".join(
                f"{name} {value:.3f}" for name, value in demo.edit_success.items())),
            ("Duration", f"{demo.seconds:.0f} s"),
            ("DriftLens", __version__),
        ],
        answer=example.answer,
        target_new=new,
        probabilities=[(label, r.prob, r[new].prob) for label, r in probabilities],
        tables=[*_head_tables(demo), *survey_tables(survey_result(info.name))],
    )  # fmt: skip
    return page(data)


def _summary(demo: Demo) -> list[str]:
    """What happened, in words computed from the numbers."""
    example, new = demo.example, demo.example.request.target_new
    result = demo.restored["attention pattern"]
    before, after, back = result.original, result.edited, result.patched
    best = max(demo.restored.items(), key=lambda item: item[1].patched.prob)
    strongest = ", ".join(f"{h.name} ({h.drift:+.2f})" for h in demo.drift.top_heads(3))
    lines = [
        f"The model was edited to answer {new!r} to {demo.example.request.text!r}. Nothing was "
        f"said about {example.prompt!r}, whose answer is {example.answer!r}: its probability goes "
        f"from {before.prob:.3f} to {after.prob:.3f}, that of {new!r} from "
        f"{before[new].prob:.3f} to {after[new].prob:.3f}.",
        f"The heads whose attention to the subject grew most: {strongest}.",
        f"With the original attention rows of the last token restored in the edited model, the "
        f"answer's probability is {back.prob:.3f} ({_share_in_words(result)}), and that of "
        f"{new!r} {back[new].prob:.3f}. Of all restorations tried, {best[0]} brings back most: "
        f"{best[1].patched.prob:.3f}.",
        f"Edited with SADR instead, at equal steps, the answer's probability is "
        f"{demo.sadr.prob:.3f}, while the edit itself has {demo.edit_success['sadr']:.3f} "
        f"(without SADR {demo.edit_success['edited']:.3f}).",
        _how_chosen(demo.model.info.name),
    ]
    return lines


def _share_in_words(result: PatchResult) -> str:
    share = result.recovered_share
    return "nothing was lost" if np.isnan(share) else f"{share:.0%} of what was lost"


def _head_tables(demo: Demo) -> list[Table]:
    return [
        Table(
            "Heads whose attention to the subject's last token grew most",
            ["head", "original", "edited", "drift", "KL (nats)"],
            [[h.name, h.original, h.edited, h.drift, h.kl] for h in demo.drift.top_heads(12)],
        ),
        Table(
            f"Heads that alone, restored, raise P({demo.example.answer}) most",
            ["head", "change of P(answer)"],
            [[name, change] for name, change in demo.sweep.top_heads(12)],
        ),
    ]


def survey_tables(survey: dict[str, Any] | None) -> list[Table]:
    """Averages over many facts as tables; none if this model was not surveyed."""
    if survey is None:
        return []
    tables = []
    for kind, content in survey["kinds"].items():
        rows = [
            [state, *(_with_interval(values, m) for m in ("answer", "target_new")),
             _with_interval(values, "beats_target_new")]
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


def _with_interval(values: dict[str, Any], measure: str) -> str:
    low, high = values[f"{measure}_interval"]
    return f"{values[measure]:.3f} [{low:.3f}, {high:.3f}]"


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return None if np.isnan(value) else float(value)
