"""One page about a benchmark run: what the edits did, with intervals, and where to see it.

1. The main table, the paired differences and the charts come from the folder of results alone.
2. The most telling prompts are those whose right answer lost most by the edit, and, where the same
   editor was run with a restriction, came back most with it.
3. With a model, these edits are made again, and each prompt gets the page of ``dl.compare``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from driftlens import figures
from driftlens.bench import UNEDITED, BenchResult, arm_from_dict
from driftlens.cases import ALL_METRICS, METRICS, Case, Metric, Probe
from driftlens.comparison import Comparison, compare
from driftlens.documents import Frame, Section, TableOf, document
from driftlens.editing.methods import edit
from driftlens.edits import Edit
from driftlens.errors import ModelError, RequestError
from driftlens.evaluation import Answer, Rate
from driftlens.intervals import with_interval
from driftlens.models import LensModel

ABOUT_THE_SUBJECT: tuple[Metric, ...] = ("DNS", "RS", "distractor", "distract-relation")
"""Prompts that hold the edited subject and should be answered as before."""


@dataclass(frozen=True)
class Telling:
    """A prompt that shows what an edit did.

    Args:
        case: The edit.
        probe: The prompt and its answers.
        arm: The editor.
        held: The same with a restriction, if it was run.
        before: Probability of the right answer on the unedited model.
        after: That after the edit.
        kept: That after the restricted edit; ``nan`` if there is none.
    """

    case: Case
    probe: Probe
    arm: str
    held: str | None
    before: float
    after: float
    kept: float

    @property
    def score(self) -> float:
        """How much was lost; with a restriction, the lesser of that and what it kept of it."""
        lost = self.before - self.after
        return lost if self.held is None else min(lost, self.kept - self.after)


def telling_prompts(
    result: BenchResult, n: int = 3, arm: str | None = None, held: str | None = None
) -> list[Telling]:
    """The prompts that show most plainly what an edit did, at most one of each case.

    Args:
        result: A run that has the unedited model.
        n: How many.
        arm: The editor to look at; by default the first one without a restriction.
        held: Its restricted counterpart; by default the first one of the same editor with the
            same configuration.

    Raises:
        RequestError: If there is no such arm, or none of the unedited model.
    """
    known = {one["name"]: one for one in result.plan["arms"]}
    for name in (UNEDITED, arm, held):
        if name is not None and name not in known:
            raise RequestError(f"There is no arm {name!r}.", f"There are {', '.join(known)}.")
    edited = [one for one in known.values() if one["method"] is not None]
    if not edited:
        raise RequestError("The run has no editor.", "Run some, e.g. --methods rome.")
    arm = arm or next((one["name"] for one in edited if not one["penalties"]), edited[0]["name"])
    if held is None:
        held = next((name for name, plain in result.pairs() if plain == arm), None)

    answers = {name: result.answers(name) for name in (UNEDITED, arm, held) if name is not None}
    found = []
    for case in result.cases.values():
        prompts = list(_prompts(result, case, arm, held, answers))
        found += [max(prompts, key=lambda prompt: prompt.score)] if prompts else []
    found = [prompt for prompt in found if prompt.score > 0]
    return sorted(found, key=lambda prompt: -prompt.score)[:n]


def look_into(model: LensModel, result: BenchResult, prompt: Telling) -> Comparison:
    """Everything about a prompt; its edits are made again, as in the run.

    Raises:
        ModelError: If the run was not one of this model, or it was loaded otherwise.
        DriftLensError: As :func:`~driftlens.compare`.
    """
    other = model.differences(result.plan["units"][0]["identity"])  # all are of one model
    if "model" in other:
        raise ModelError(
            f"The run was not one of {model.info.name} with these weights.",
            f"Load {result.plan['model']['name']}.",
        )
    if other:
        raise ModelError(
            f"The run's model differed from this one in {', '.join(other)}.",
            "Load it as for the run.",
        )
    arms = {one["name"]: one for one in result.plan["arms"]}
    seed = int(result.plan["setting"]["seed"])

    def again(name: str) -> Edit:
        return edit(model, prompt.case.request, **arm_from_dict(arms[name]).edit_options(seed))

    cured = None if prompt.held is None else again(prompt.held)
    return compare(
        model, again(prompt.arm), prompt.probe.prompt, prompt.probe.right, cured=cured,
        progress=False,
    )  # fmt: skip


def report(
    result: BenchResult, shown: Sequence[tuple[Telling, Comparison]] = (), title: str = ""
) -> str:
    """The page.

    Args:
        result: The run; it need not be complete, which the page then says.
        shown: Prompts to look into.
        title: By default the model's name.
    """
    info = result.plan["model"]
    finished = sum(map(len, result.records.values()))
    lead = [f"{len(result.cases)} cases, {len(result.arms)} conditions; {info['weights']}."]
    if not result.is_complete:
        missing = len(result.plan["units"]) - finished
        lead.append(
            f"The run is not complete: {missing} of {len(result.plan['units'])} are missing."
        )
    if result.failed:
        lead.append(f"{len(result.failed)} edits failed; they are listed below and not counted.")
    rows = result.table()
    sections = [
        _overall(result, rows), *_differences(result), *_magnitudes(result), *_controls(rows)
    ]  # fmt: skip
    if shown:
        sections.append(_prompts_shown(shown))
    sections.append(_provenance(result))
    return document(
        title or f"Knowledge edits of {info['name']}", lead, str(result.plan["command"]), sections
    )


# --- sections ---


def _overall(result: BenchResult, rows: pd.DataFrame) -> Section:
    charts = []
    metrics = result.main_metrics()
    if len(rows):
        asked = set(rows["metric"])
        shown = [m for m in (*metrics, "Avg. S") if m in asked]
        charts.append(figures.rate_bars(rows, shown, title="Success, with 95 % intervals"))
    kept = result.trade_off()
    if len(kept.dropna()):
        charts.append(figures.trade_off(kept.dropna(), title="What edits keep"))
    told = "; ".join(f"{name}, {ALL_METRICS[name]}" for name in metrics)
    texts = " what is told of texts," if result.plan["setting"].get("texts") else ""
    mean = " Avg. S is their harmonic mean." if set(METRICS) <= set(metrics) else ""
    return Section(
        "results",
        "Results",
        texts=[
            "Success in per cent: on how many prompts the right answer is likelier than the other, "
            f"with 95 % intervals by bootstrap over cases ({told}).{mean}"
        ],
        figures=charts,
        tables=[
            TableOf(f"Success (%),{texts} and seconds for each edit", _wide(result, rows)),
            TableOf("All metrics, a row each", rows, folded=True),
        ],
    )


def _wide(result: BenchResult, rows: pd.DataFrame) -> pd.DataFrame:
    """A row for each arm, with intervals, from a row for each arm and metric."""
    fields = list(Rate.__dataclass_fields__)
    wide = []
    for arm, own in rows.groupby("arm", sort=False):
        cells = {
            row["metric"]: str(Rate(*(row[name] for name in fields)))
            for row in own.to_dict("records")
        }
        first = {"Avg. S": cells.pop("Avg. S")} if "Avg. S" in cells else {}
        wide.append({"arm": arm, **first, **cells, "seconds": result.seconds(str(arm))})
    return pd.DataFrame(wide)


def _differences(result: BenchResult) -> list[Section]:
    """Each restricted editor less the plain one, and each editor less the unedited model."""
    rows = [
        {
            "arm": found["arm"], "less": found["less"], "metric": found["metric"],
            "difference": with_interval(found["value"], found["low"], found["high"], sign="+"),
            "effect size": found["effect"], "better": found["better"], "worse": found["worse"],
            "cases": found["cases"],
        }
        for found in result.differences()
    ]  # fmt: skip
    if not rows:
        return []
    text = (
        "Differences in percentage points, on the cases that both have (of texts in their own "
        "units, of the perplexity that of its logarithm). The effect size is Cohen's d of paired "
        "samples; better and worse count cases (of Avg. S, which no case has alone, jackknife "
        "pseudo-values)."
    )
    table = TableOf("Paired differences, with 95 % intervals", pd.DataFrame(rows))
    return [Section("differences", "Paired differences", texts=[text], tables=[table])]


def _magnitudes(result: BenchResult) -> list[Section]:
    rows = result.table("prob")
    if not len(rows):
        return []
    metrics = [m for m in ALL_METRICS if m in set(rows["metric"])]
    chart = figures.rate_bars(
        rows, metrics, title="Mean probability of the right answer", unit="probability", top=1.0
    )
    text = (
        "The same as magnitudes: the mean probability of the right answer, which moves long before "
        "another answer overtakes it."
    )
    tables = [TableOf("Mean probabilities", rows, folded=True)]
    return [Section("magnitudes", "Magnitudes", texts=[text], figures=[chart], tables=tables)]


def _controls(rows: pd.DataFrame) -> list[Section]:
    """What the context alone does to the unedited model."""
    of_unedited = rows[rows["arm"] == UNEDITED]
    found = dict(zip(of_unedited["metric"], of_unedited["value"], strict=True))
    parts = [
        f"{what}: {found[alone]:.1f} alone, {found[edited]:.1f} behind the edited sentence, "
        f"{found[lead]:.1f} behind an unrelated one"
        for what, alone, edited, lead in (
            ("neighbours", "NS", "DNS", "lead-neighbour"),
            ("relations", "RS", "distract-relation", "lead-relation"),
        )
        if {alone, edited, lead} <= set(found)
    ]
    if not parts:
        return []
    text = (
        f"Success of the unedited model in per cent. {'; '.join(parts)}. That much is due to the "
        "context, not to an edit."
    )
    return [Section("controls", "What the context alone does", texts=[text])]


def _prompts_shown(shown: Sequence[tuple[Telling, Comparison]]) -> Section:
    rows = [
        {
            "edit": f"{prompt.case.request.text} {prompt.case.request.target_new}",
            "prompt": prompt.probe.prompt, "answer": prompt.probe.right, "before": prompt.before,
            prompt.arm: prompt.after, **({prompt.held: prompt.kept} if prompt.held else {}),
        }
        for prompt, _ in shown
    ]  # fmt: skip
    frames = [
        Frame(f"{prompt.case.request.subject}: {prompt.probe.prompt}", comparison.html())
        for prompt, comparison in shown
    ]
    return Section(
        "prompts",
        "Prompts to look into",
        texts=["Chosen because they show the effect most plainly; averages stand above."],
        tables=[TableOf("Probability of the answer", pd.DataFrame(rows))],
        frames=frames,
    )


def _provenance(result: BenchResult) -> Section:
    plan = result.plan

    def listed(values: dict[str, Any]) -> pd.DataFrame:
        return pd.DataFrame([{"what": k, "value": str(v)} for k, v in values.items()])

    arms = [
        TableOf(f"Arm {one['name']}", listed({"method": one["method"], **one["config"]} | {
            f"penalty {i}": penalty for i, penalty in enumerate(one["penalties"], 1)}), folded=True)
        for one in plan["arms"]
        if one["method"] is not None
    ]  # fmt: skip
    failed = pd.DataFrame(result.failed, columns=["arm", "case", "reason"])
    return Section(
        "provenance",
        "How it was made",
        tables=[
            TableOf("Model", listed(plan["model"])),
            TableOf("Setting and versions", listed({**plan["setting"], **plan["versions"]})),
            *arms,
            *([TableOf("Edits that failed", failed)] if len(failed) else []),
            TableOf(
                "Cases", pd.DataFrame([c.summary() for c in result.cases.values()]), folded=True
            ),
        ],
    )


# --- prompts ---


def _prompts(
    result: BenchResult,
    case: Case,
    arm: str,
    held: str | None,
    answers: Mapping[str, Mapping[str, Sequence[Answer]]],
) -> Iterator[Telling]:
    """All prompts of a case that hold its subject, if all arms that are looked at have it."""
    if any(case.id not in of_arm for of_arm in answers.values()):
        return
    found = {name: of_arm[case.id] for name, of_arm in answers.items()}
    for i, probe in enumerate(result.probes(case)):
        if probe.metric in ABOUT_THE_SUBJECT:
            yield Telling(
                case, probe, arm, held,
                before=found[UNEDITED][i].right_prob,
                after=found[arm][i].right_prob,
                kept=found[held][i].right_prob if held else float("nan"),
            )  # fmt: skip
