"""Results of a benchmark, read from its folder."""

from __future__ import annotations

import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from driftlens.bench.arms import UNEDITED
from driftlens.cases import METRICS, TEXT_METRICS, Case, Metric, Probe, TextMetric
from driftlens.errors import DataError, RequestError, check_choice
from driftlens.evaluation import (
    Answer,
    Difference,
    Growth,
    Measure,
    Rate,
    average,
    combined,
    compare,
    compare_combined,
    difference,
    growth,
    harmonic_mean,
    rates,
    with_failures,
)
from driftlens.generation import PERPLEXITY_TEXTS
from driftlens.intervals import bootstrap_interval
from driftlens.journal import Journal, total
from driftlens.readers import read_cases
from driftlens.records import plain, write_result

KEPT: dict[str, tuple[Metric, ...]] = {"edit": ("ES", "PS"), "others": ("NS", "RS", "DNS")}
"""What an edit should do, and what it should leave alone."""

ALLOWED: dict[Metric, float] = {"ES": 1.0, "PS": 4.0}
"""Points that a restriction may cost the edit."""

PLAN, CASES, UNITS = "bench.json", "cases.jsonl", "units.jsonl"


def difference_rows(arm: str, other: str, found: Mapping[Any, Difference]) -> list[dict[str, Any]]:
    """Paired differences of two arms, by metric; a row for each, JSON-ready."""
    return [
        plain({"arm": arm, "less": other, "metric": metric, **asdict(one)})
        for metric, one in found.items()
    ]


@dataclass
class BenchResult:
    """A folder of results.

    Args:
        folder: That :func:`run_bench` wrote to.

    Attributes:
        plan: What was asked for.
        cases: By id.
        records: By arm and case; what is not finished is missing.

    Raises:
        DataError: If the folder holds no results, or they are damaged.
    """

    folder: Path
    plan: dict[str, Any] = field(init=False, repr=False)
    cases: dict[str, Case] = field(init=False, repr=False)
    records: dict[str, dict[str, dict[str, Any]]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.folder = Path(self.folder)
        try:
            self.plan = json.loads((self.folder / PLAN).read_text("utf-8"))
            units = [(u["arm"], u["case"], u["identity"]) for u in self.plan["units"]]
            self.records = {arm["name"]: {} for arm in self.plan["arms"]}
            if {arm for arm, _, _ in units} - set(self.records):
                raise ValueError("a unit of no arm")
            for name in ("command", "model", "versions"):
                self.plan[name]
            self.plan["setting"]["metrics"]
        except OSError as error:
            raise DataError(
                f"{self.folder} holds no results: {error.strerror or error}.",
                "Give the folder that `driftlens bench --out` wrote.",
            ) from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(
                f"{self.folder / PLAN} is damaged.", "Run the same command again: units are kept."
            ) from error
        self.cases = {case.id: case for case in read_cases(self.folder / CASES, "driftlens")}
        journal = Journal(self.folder / UNITS)
        for arm, case, identity in units:
            if case not in self.cases:
                raise DataError(
                    f"{self.folder / CASES} is not of this run: {case} is missing.",
                    "Run the same command again: units are kept.",
                )
            if identity in journal:
                self.records[arm][case] = journal[identity]

    @property
    def arms(self) -> list[str]:
        """Names of the arms."""
        return list(self.records)

    @property
    def failed(self) -> list[tuple[str, str, str]]:
        """Arm, case and reason of each unit that failed, or whose texts did."""
        return [
            (arm, case, record["error"])
            for arm, records in self.records.items()
            for case, record in records.items()
            if "error" in record
        ]

    def left_out(self, arm: str) -> list[str]:
        """Cases that failed under an arm, so that its rates are without them; not those of which
        only texts could not be written.

        Raises:
            RequestError: If there is no such arm.
        """
        return [
            case
            for case, record in self._of(arm).items()
            if "error" in record and not record.get("answers")
        ]

    @property
    def is_complete(self) -> bool:
        """Whether every unit is finished."""
        return sum(map(len, self.records.values())) == len(self.plan["units"])

    def answers(self, arm: str) -> dict[str, list[Answer]]:
        """What was answered under an arm, by case; without cases that failed.

        Raises:
            RequestError: If there is no such arm.
        """
        return {
            case: [Answer(**a) for a in record["answers"]]
            for case, record in self._of(arm).items()
            if "answers" in record
        }

    def _of(self, arm: str) -> dict[str, dict[str, Any]]:
        """An arm's records, by case.

        Raises:
            RequestError: If there is no such arm.
        """
        if arm not in self.records:
            raise RequestError(f"There is no arm {arm!r}.", f"There are {', '.join(self.arms)}.")
        return self.records[arm]

    def rates(
        self, arm: str, measure: Measure = "success", by: Literal["prompt", "case"] = "prompt"
    ) -> dict[Metric, Rate]:
        """A measure of each metric under an arm, with 95 % intervals by bootstrap over cases."""
        return rates(self.answers(arm).values(), measure, by)

    def text_rates(self, arm: str) -> dict[TextMetric, Rate]:
        """What is told of texts under an arm: means over cases, with intervals like the others.

        The mean perplexity is geometric: that of the logarithms.
        """
        found: dict[TextMetric, Rate] = {}
        told = {
            case: record["texts"] for case, record in self._of(arm).items() if "texts" in record
        }
        for metric in TEXT_METRICS:
            own = {case: texts[metric] for case, texts in told.items() if metric in texts}
            values = np.array([*own.values()], dtype=float)
            if not len(values):
                continue
            written = sum(
                PERPLEXITY_TEXTS if metric == "perplexity" else len(self.cases[case].generation)
                for case in own
            )
            is_geometric = metric == "perplexity"
            values = np.log(values) if is_geometric else values
            ends = [values.mean(), *bootstrap_interval(values, np.ones_like(values))]
            mean, low, high = (float(np.exp(v) if is_geometric else v) for v in ends)
            found[metric] = Rate(mean, low, high, written, len(values))
        return found

    def compare(
        self,
        arm: str,
        other: str,
        measure: Measure = "success",
        by: Literal["prompt", "case"] = "prompt",
    ) -> dict[Metric, Difference]:
        """Paired differences: an arm less another, over the cases that both have."""
        return compare(self.answers(arm), self.answers(other), measure, by=by)

    def compare_average(
        self, arm: str, other: str, by: Literal["prompt", "case"] = "prompt"
    ) -> Difference | None:
        """The paired difference of Avg. S; ``None`` if one of its metrics was not asked. Effect
        size, better and worse are of jackknife pseudo-values, since no case has an Avg. S."""
        return compare_combined(
            self.answers(arm), self.answers(other), METRICS, mean=harmonic_mean, by=by
        )

    def compare_texts(self, arm: str, other: str) -> dict[TextMetric, Difference]:
        """Paired differences of what is told of texts, over the cases that both have; of the
        perplexity that of its logarithms."""
        told = [
            {case: record["texts"] for case, record in self._of(name).items() if "texts" in record}
            for name in (arm, other)
        ]  # fmt: skip
        found: dict[TextMetric, Difference] = {}
        for metric in TEXT_METRICS:
            common = [case for case in told[0] if all(metric in own.get(case, ()) for own in told)]
            if not common:
                continue
            values = np.array([[own[case][metric] for case in common] for own in told], dtype=float)
            values = np.log(values) if metric == "perplexity" else values
            found[metric] = difference(values[0] - values[1], np.ones(len(common)))
        return found

    def growth(
        self, arm: str, other: str, metric: Metric, measure: Measure = "success"
    ) -> Growth | None:
        """What an arm gives more than another, in per cent, over the cases that both have;
        ``None`` if the other gives nothing."""
        return growth(self.answers(arm), self.answers(other), metric, measure)

    def compare_kept(self, arm: str, other: str) -> Difference | None:
        """The paired difference of the mean of NS, RS and DNS, as far as these were asked;
        ``None`` if none was."""
        asked = [metric for metric in KEPT["others"] if metric in self.rates(arm)]
        if not asked:
            return None
        return compare_combined(self.answers(arm), self.answers(other), asked)

    def excess(self, arm: str, other: str, allowed: Mapping[Metric, float] = ALLOWED) -> float:
        """Points of some metrics that an arm has less than another, beyond what is allowed; one
        prompt is allowed in any case.

        Args:
            allowed: Points, for each metric that counts.
        """
        found, asked = self.compare(arm, other), self.rates(arm)
        return sum(
            max(0.0, -found[metric].value - max(points, 100.0 / asked[metric].prompts) - 1e-9)
            for metric, points in allowed.items()
            if metric in found
        )

    def pairs(self) -> list[tuple[str, str]]:
        """What is compared with what: each restricted arm with the same editor without, each
        other editor with the unedited model."""
        known = {one["name"]: one for one in self.plan["arms"]}
        found = []
        for name, one in known.items():
            if one["method"] is None:
                continue
            twins = [
                other
                for other, plain in known.items()
                if not plain["penalties"]
                and (plain["method"], plain["config"]) == (one["method"], one["config"])
            ]
            if one["penalties"] and twins:
                found += [(name, twin) for twin in twins]
            elif UNEDITED in known:
                found.append((name, UNEDITED))
        return found

    def differences(self, measure: Measure = "success") -> list[dict[str, Any]]:
        """Paired differences in a measure of all :meth:`pairs`, by metric, JSON-ready; beside
        success those of ``Avg. S`` and of what is told of texts (:meth:`compare_texts`), too."""
        rows = []
        for arm, other in self.pairs():
            found: dict[Any, Difference] = dict(self.compare(arm, other, measure))
            if measure == "success":
                whole = self.compare_average(arm, other)
                found |= {} if whole is None else {"Avg. S": whole}
                found |= self.compare_texts(arm, other)
            rows += difference_rows(arm, other, found)
        return rows

    def table(
        self, measure: Measure = "success", by: Literal["prompt", "case"] = "prompt"
    ) -> pd.DataFrame:
        """A row for each arm and metric: value, interval, prompts, cases; ``Avg. S`` and what
        is told of texts too."""
        rows = []
        for arm in self.arms:
            found: dict[str, Rate] = dict(self.rates(arm, measure, by))  # type: ignore[arg-type]
            if measure == "success":
                whole = average(self.answers(arm).values(), by)
                found |= {} if whole is None else {"Avg. S": whole}
                found |= dict(self.text_rates(arm))  # type: ignore[arg-type]
            rows += [{"arm": arm, "metric": metric, **asdict(r)} for metric, r in found.items()]
        return pd.DataFrame(rows, columns=["arm", "metric", *(f.name for f in fields(Rate))])

    def trade_off(self) -> pd.DataFrame:
        """What each editor keeps: columns ``arm``, ``edit`` (mean success of ES and PS, %) and
        ``others`` (that of NS, RS and DNS), each with its 95 % interval ``_low``, ``_high`` and
        ``_of``, the metrics that were asked. ``nan`` where none was; the unedited model is left
        out."""
        rows: list[dict[str, Any]] = []
        for arm in self.plan["arms"]:
            if arm["method"] is None:
                continue
            groups = list(self.answers(arm["name"]).values())
            asked = {answer.metric for group in groups for answer in group}
            if not asked:
                continue
            row: dict[str, Any] = {"arm": arm["name"]}
            for name, metrics in KEPT.items():
                chosen = [metric for metric in metrics if metric in asked]
                found = combined(groups, chosen) if chosen else None
                if found is not None:
                    row |= {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}
                    row[f"{name}_of"] = ", ".join(chosen)
            rows.append(row)
        ends = ("", "_low", "_high", "_of")
        columns = ["arm", *(f"{name}{end}" for name in KEPT for end in ends)]
        return pd.DataFrame(rows, columns=columns)

    def seconds(self, arm: str) -> float:
        """Median seconds of an edit; ``nan`` for the unedited model."""
        return _median(r["seconds"] for r in self._of(arm).values() if "seconds" in r)

    def seconds_in_all(self) -> float | None:
        """What all units took one after another, in this run or earlier ones; ``None`` if that is
        not known of some."""
        return total((r for own in self.records.values() for r in own.values()), "spent")

    def steps(self, arm: str) -> float:
        """Median steps of an edit's search, less than asked for where it stops early; ``nan`` for
        the unedited model."""
        return _median(r["steps"] for r in self._of(arm).values() if "steps" in r)

    def probes(self, case: Case) -> list[Probe]:
        """What the run asked about a case, in the order of its answers."""
        of_all = self.plan["units"][0]["identity"]  # all are of one model
        return case.probes(self.plan["setting"]["metrics"], of_all["separator"])

    def to_dataframe(self) -> pd.DataFrame:
        """A row for each prompt of each unit: arm, case, metric, texts, and what was answered."""
        rows: list[dict[str, Any]] = []
        for arm in self.arms:
            for name, found in self.answers(arm).items():
                case = self.cases[name]
                for probe, answer in zip(self.probes(case), found, strict=True):
                    rows.append(
                        {
                            "arm": arm,
                            "case": name,
                            "category": case.category,
                            "prompt": probe.prompt,
                            "right_text": probe.right,
                            "wrong_text": probe.wrong,
                            "success": answer.success,
                            **answer.to_dict(),
                        }
                    )
        return pd.DataFrame(rows)

    def units_dataframe(self) -> pd.DataFrame:
        """A row for each finished unit: ``arm``, ``case``, ``category``; ``error``, why it failed;
        ``seconds`` and ``steps`` of its edit; ``spent``, all seconds that it took; and what is told
        of its texts (`TEXT_METRICS`). Nothing where that is not known or was not asked."""
        names = ("error", "seconds", "steps", "spent")
        rows = [
            {
                "arm": arm,
                "case": case,
                "category": self.cases[case].category,
                **{name: record.get(name) for name in names},
                **{metric: record.get("texts", {}).get(metric) for metric in TEXT_METRICS},
            }
            for arm, records in self.records.items()
            for case, record in records.items()
        ]
        columns = ["arm", "case", "category", *names, *TEXT_METRICS]
        return pd.DataFrame(rows, columns=columns)

    def to_parquet(
        self, path: str | os.PathLike[str], of: Literal["prompts", "units"] = "prompts"
    ) -> None:
        """Write :meth:`to_dataframe`, or :meth:`units_dataframe`, to a Parquet file, atomically.

        Args:
            path: Of the file.
            of: A row for each of these.

        Raises:
            RequestError: If ``of`` is neither.
            DataError: If it cannot be written.
        """
        check_choice("of", of, ("prompts", "units"))
        rows = self.to_dataframe() if of == "prompts" else self.units_dataframe()
        buffer = io.BytesIO()
        rows.to_parquet(buffer, index=False)
        write_result(Path(path), buffer.getvalue())

    def conditions(self) -> list[dict[str, Any]]:
        """Each arm with its configuration, the number of its finished cases, and the median
        seconds and steps of its edits, JSON-ready."""
        return [
            plain(
                {
                    **arm,
                    "finished": len(self.records[arm["name"]]),
                    "seconds_per_edit": self.seconds(arm["name"]),
                    "steps_per_edit": self.steps(arm["name"]),
                }
            )
            for arm in self.plan["arms"]
        ]

    def summary(self) -> dict[str, Any]:
        """Everything but single answers, JSON-ready: how it was made, success pooled over prompts
        (``table``) and averaged by case, magnitudes, and paired differences in all of these."""
        magnitudes: tuple[Measure, ...] = ("exact", "prob", "margin")
        failed = [{"arm": a, "case": c, "reason": reason} for a, c, reason in self.failed]
        return {
            **{name: self.plan[name] for name in ("command", "model", "versions", "setting")},
            "cases": list(self.cases),
            "arms": self.conditions(),
            "failed": failed,
            "table": plain(self.table().to_dict("records")),
            "table by case": plain(self.table(by="case").to_dict("records")),
            "magnitudes": {name: plain(self.table(name).to_dict("records")) for name in magnitudes},
            "differences": self.differences(),
            "differences in magnitude": {name: self.differences(name) for name in magnitudes},
        }

    def main_metrics(self) -> list[Metric]:
        """Those of the paper's table, if all of them were asked; else whatever was."""
        asked: list[Metric] = self.plan["setting"]["metrics"]
        return list(METRICS) if set(METRICS) <= set(asked) else asked

    def to_markdown(self, metrics: Sequence[Metric] | None = None) -> str:
        """The main table: success in per cent with 95 % intervals, what is told of texts, and
        seconds for each edit.

        Args:
            metrics: Which; by default :meth:`main_metrics`. Avg. S is shown if all that it is a
                mean of are among them.
        """
        metrics = self.main_metrics() if metrics is None else metrics
        texts: list[TextMetric] = self.plan["setting"].get("texts", [])
        has_mean = set(METRICS) <= set(metrics)
        head = ["arm", *["Avg. S"] * has_mean, *metrics, *texts, "seconds"]
        lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        failed = Counter(arm for arm, _, _ in self.failed)
        for arm in self.arms:
            found, told = self.rates(arm), self.text_rates(arm)
            cells = [str(average(self.answers(arm).values()) or "-")] if has_mean else []
            cells += [str(found[m]) if m in found else "-" for m in metrics]
            cells += [str(told[m]) if m in told else "-" for m in texts]
            seconds = self.seconds(arm)
            cells.append("-" if np.isnan(seconds) else f"{seconds:.1f}")
            left_out = len(self.left_out(arm))
            name = with_failures(arm, left_out, failed[arm] - left_out)
            lines.append(f"| {' | '.join([name, *cells])} |")
        return "\n".join(lines)


def _median(values: Iterable[float]) -> float:
    found = list(values)
    return float(np.median(found)) if found else float("nan")
