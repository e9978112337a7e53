"""What patching finds: answers in three runs, and what of a lost one is back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from jaxtyping import Float

from driftlens import figures
from driftlens.attention import head_name
from driftlens.errors import check_choice, check_count
from driftlens.reuse import Engine
from driftlens.scoring import ContinuationScore

Direction = Literal["restore", "contaminate"]
Exchange = Literal["pattern", "values", "both"]
Measure = Literal["prob", "logprob"]


@dataclass(frozen=True)
class Readout:
    """How likely a model finds the answer, and what it is compared with.

    Args:
        answer: The answer under study.
        scores: Score of each text that was asked for, the answer among them.
    """

    answer: str
    scores: dict[str, ContinuationScore]

    def __getitem__(self, text: str) -> ContinuationScore:
        return self.scores[text]

    @property
    def prob(self) -> float:
        """Probability of the whole answer."""
        return self.scores[self.answer].prob

    @property
    def logprob(self) -> float:
        """Log-probability of the whole answer, in nats."""
        return self.scores[self.answer].logprob

    @property
    def rank(self) -> int:
        """0 exactly if greedy decoding gives the answer."""
        return self.scores[self.answer].rank

    def __repr__(self) -> str:
        told = ", ".join(f"P({text!r}) {score.prob:.4f}" for text, score in self.scores.items())
        return f"Readout({told}; rank of {self.answer!r}: {self.rank})"


ROUNDING = 1e-5
"""A fall of less than this (relative, or in nats) is rounding, not loss."""


def recovered_share(original: float, edited: float, patched: float, noise: float) -> float:
    """Where a patched run lies between the edited (0) and the original (1) one.

    NaN where the edit lost no more than ``noise``, so that there was nothing to recover.
    """
    lost = original - edited
    return (patched - edited) / lost if lost > noise else float("nan")


def _share(original: Readout, edited: Readout, patched: Readout, measure: Measure) -> float:
    check_choice("measure", measure, get_args(Measure))
    before, after, now = (float(getattr(run, measure)) for run in (original, edited, patched))
    noise = ROUNDING * (before if measure == "prob" else 1.0)
    return recovered_share(before, after, now, noise)


@dataclass(frozen=True)
class PatchResult:
    """One patching experiment.

    Args:
        original: The unedited model.
        edited: The edited model.
        patched: The patched run.
        direction: ``"restore"``: the edited model with the original's activations;
            ``"contaminate"``: the reverse.
        prompt: The prompt.
        what: What was exchanged, in words.
        engine: ``"suffix"``: the patched pass ran only what the patch can change; ``"plain"``:
            the whole sequence.
    """

    original: Readout
    edited: Readout
    patched: Readout
    direction: Direction
    prompt: str
    what: str
    engine: Engine = "plain"

    @property
    def recovered_share(self) -> float:
        """Share of the answer's lost probability that the patched run has.

        0: the patched run is like the edited model, 1: like the original. When restoring, it
        is the share that comes back; when contaminating, one minus it is the share that the
        patch alone loses. NaN where the edit lost nothing.
        """
        return _share(self.original, self.edited, self.patched, "prob")

    @property
    def recovered_share_logprob(self) -> float:
        """The same in log-probability."""
        return _share(self.original, self.edited, self.patched, "logprob")

    def to_dataframe(self) -> pd.DataFrame:
        """One row per run and text."""
        return pd.DataFrame(
            [
                {
                    "run": run,
                    "text": text,
                    "prob": score.prob,
                    "logprob": score.logprob,
                    "rank": score.rank,
                }
                for run in ("original", "edited", "patched")
                for text, score in getattr(self, run).scores.items()
            ]
        )

    def plot(self) -> go.Figure:
        """Bars of the answers' probabilities in the three runs."""
        return figures.probability_bars(
            {
                run: {text: s.prob for text, s in getattr(self, run).scores.items()}
                for run in ("original", "edited", "patched")
            },
            title=self.prompt,
            subtitle=f"{self.direction}: {self.what}",
        )

    def __repr__(self) -> str:
        runs = ", ".join(
            f"{run} {getattr(self, run).prob:.4f}" for run in ("original", "edited", "patched")
        )
        return (
            f"PatchResult(P({self.original.answer!r}): {runs}; recovered share "
            f"{self.recovered_share:.2f}; {self.direction} {self.what})"
        )


@dataclass(frozen=True)
class AttentionSweep:
    """One patch for each head, each layer, each window of layers, and all at once.

    Args:
        original: The unedited model.
        edited: The edited model.
        heads: Readouts ``[layer][head]``.
        layers: Readouts ``[layer]``.
        windows: Readouts by (first layer, last layer), inclusive.
        everything: All layers and heads at once.
        direction: As in :class:`PatchResult`.
        exchange: What was exchanged.
        prompt: The prompt.
        engine: ``"suffix"``: each patch ran only what it can change; ``"plain"``: each was a
            pass over the whole sequence.
    """

    original: Readout
    edited: Readout
    heads: list[list[Readout]]
    layers: list[Readout]
    windows: dict[tuple[int, int], Readout]
    everything: Readout
    direction: Direction
    exchange: Exchange
    prompt: str
    engine: Engine = "plain"

    def _share(self, patched: Readout, measure: Measure) -> float:
        return _share(self.original, self.edited, patched, measure)

    def head_shares(self, measure: Measure = "prob") -> Float[np.ndarray, "layer head"]:
        """Recovered share of the answer's lost probability, for each head."""
        return np.array([[self._share(r, measure) for r in row] for row in self.heads])

    def layer_shares(self, measure: Measure = "prob") -> Float[np.ndarray, " layer"]:
        """The same for each layer."""
        return np.array([self._share(r, measure) for r in self.layers])

    def window_shares(self, measure: Measure = "prob") -> Float[np.ndarray, " window"]:
        """The same for each window."""
        return np.array([self._share(r, measure) for r in self.windows.values()])

    def everything_share(self, measure: Measure = "prob") -> float:
        """The same with all layers and heads at once."""
        return self._share(self.everything, measure)

    def top_heads(self, k: int = 10) -> list[tuple[str, float]]:
        """The ``k`` heads that alone bring most of the answer's probability back.

        Pairs of name and change of P(answer) against the run that was patched.

        Raises:
            RequestError: If ``k`` is negative.
        """
        check_count("k", k)
        start = self.edited.prob if self.direction == "restore" else self.original.prob
        sign = 1.0 if self.direction == "restore" else -1.0
        changes = [
            (head_name(y, x), readout.prob - start)
            for y, row in enumerate(self.heads)
            for x, readout in enumerate(row)
        ]
        return sorted(changes, key=lambda pair: -sign * pair[1])[:k]

    def to_dataframe(self) -> pd.DataFrame:
        """One row per patch and text; ``kind`` is original, edited, head, layer,
        window or everything."""
        rows: list[dict[str, Any]] = []

        def add(kind: str, first: Any, last: Any, head: Any, readout: Readout) -> None:
            for text, s in readout.scores.items():
                share = self._share(readout, "prob") if text == readout.answer else float("nan")
                rows.append(
                    {
                        "kind": kind,
                        "first_layer": first,
                        "last_layer": last,
                        "head": head,
                        "text": text,
                        "prob": s.prob,
                        "logprob": s.logprob,
                        "rank": s.rank,
                        "recovered_share": share,
                    }
                )

        add("original", None, None, None, self.original)
        add("edited", None, None, None, self.edited)
        for y, row in enumerate(self.heads):
            for x, readout in enumerate(row):
                add("head", y, y, x, readout)
        for y, readout in enumerate(self.layers):
            add("layer", y, y, None, readout)
        for (first, last), readout in self.windows.items():
            add("window", first, last, None, readout)
        add("everything", 0, len(self.layers) - 1, None, self.everything)
        return pd.DataFrame(rows)

    def plot(self) -> go.Figure:
        """Change of P(answer) by head (map), by layer and by window (lines)."""
        start = self.edited.prob if self.direction == "restore" else self.original.prob
        answer = self.original.answer
        return figures.sweep_chart(
            np.array([[r.prob - start for r in row] for row in self.heads]),
            np.array([r.prob - start for r in self.layers]),
            list(self.windows),
            np.array([r.prob - start for r in self.windows.values()]),
            everything=self.everything.prob - start,
            title=f"{self.direction.capitalize()} attention ({self.exchange}): {self.prompt}",
            subtitle=f"P({answer}): original {self.original.prob:.4f}, edited "
            f"{self.edited.prob:.4f}, all layers patched {self.everything.prob:.4f}",
            unit=f"change of P({answer})",
        )

    def __repr__(self) -> str:
        best = ", ".join(f"{name} {change:+.4f}" for name, change in self.top_heads(3))
        return (
            f"AttentionSweep({self.direction} {self.exchange}: P({self.original.answer!r}) "
            f"original {self.original.prob:.4f}, edited {self.edited.prob:.4f}, everything patched "
            f"{self.everything.prob:.4f}; best heads {best})"
        )
