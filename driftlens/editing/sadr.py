"""SADR: selective attention drift restriction (paper section 4)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from numbers import Integral
from typing import Any, ClassVar, Literal, cast, get_args

import torch
from jaxtyping import Bool, Float

from driftlens.attention import (
    Divergence,
    HeadRule,
    head_name,
    over_attending_heads,
    parse_head,
    row_divergence,
)
from driftlens.editing.penalties import (
    Penalty,
    PenaltyTerm,
    Sites,
    check_layers,
    check_weight,
)
from driftlens.errors import RequestError, as_number, check_choice
from driftlens.interventions import pattern_name
from driftlens.models import LensModel
from driftlens.precision import in_float32

Queries = Literal["last_prompt", "target", "all"]


@dataclass(frozen=True)
class SADR(Penalty):
    """Selective attention drift restriction (paper section 4, equation 6).

    ``gamma * mean over contexts of the sum over layers and held heads of
    KL( original row || row now )``, for the row of the last prompt token. A head is held at a
    step if it then attends to the subject's last token more than the rule allows; which heads
    are held is decided anew at each step, and no gradient flows through the decision.

    Args:
        gamma: Weight of the summed divergence, in units of the loss (nats per nat). The
            released code's flag 100 for ROME on GPT-J is ``gamma=0.01`` here: it scales by 1e-4.
        heads: Which heads are held: a rule (``"max"``, the paper's; ``"all"``, its ablation of
            figure 6; ``"quantile"``, ``"mean_std"``, ``"drift"``: see
            :func:`driftlens.attention.over_attending_heads`), or a list of heads such as
            ``["L9H6", (12, 3)]``, which are then held at every step.
        threshold: What the rule compares with; ``None`` takes the rule's own
            (:data:`driftlens.attention.THRESHOLDS`).
        divergence: ``"kl"`` (the paper's), ``"reverse_kl"``, ``"js"`` or ``"l2"``: see
            :func:`driftlens.attention.row_divergence`.
        layers: Layers to restrict; ``None`` for all.
        queries: Rows to restrict: ``"last_prompt"`` (the paper's), ``"target"`` (every row
            that predicts a token of the target), ``"all"`` (every row). Which heads are held is
            decided at the last prompt token in any case; the rows of a head are summed.
    """

    kind: ClassVar[str] = "sadr"

    gamma: float = 0.01
    heads: HeadRule | Sequence[str | tuple[int, int]] = "max"
    threshold: float | None = None
    divergence: Divergence = "kl"
    layers: tuple[int, ...] | None = None
    queries: Queries = "last_prompt"

    def __post_init__(self) -> None:
        object.__setattr__(self, "gamma", check_weight("SADR's gamma", self.gamma))
        if isinstance(self.heads, str):
            check_choice("SADR's heads", self.heads, get_args(HeadRule))
        else:
            object.__setattr__(self, "heads", _parse_heads(self.heads))
        check_choice("SADR's divergence", self.divergence, get_args(Divergence))
        check_choice("SADR's queries", self.queries, get_args(Queries))
        object.__setattr__(self, "threshold", _checked_threshold(self.heads, self.threshold))
        object.__setattr__(self, "layers", check_layers("SADR", self.layers))

    def check(self, model: LensModel) -> None:
        """See :meth:`Penalty.check`."""
        super().check(model)
        for layer, head in () if isinstance(self.heads, str) else self._pairs():
            model.check_head(layer, head)

    def activations(self, sites: Sites) -> list[str]:
        """Attention patterns of the restricted layers that the edit can influence.

        Raises:
            RequestError: If there are none, or none with a head that is to be held.
        """
        chosen = sites.chosen(self.layers)
        if not isinstance(self.heads, str) and not {y for y, _ in self._pairs()} & set(chosen):
            names = ", ".join(head_name(*pair) for pair in self._pairs())
            raise RequestError(
                f"SADR cannot hold {names}: the search reaches none of the restricted layers that "
                f"they are in (it reaches {', '.join(map(str, sites.layers))}).",
                "Name other heads, or edit a lower layer.",
            )
        return [pattern_name(layer) for layer in chosen]

    def __call__(
        self, now: Mapping[str, torch.Tensor], original: Mapping[str, torch.Tensor], sites: Sites
    ) -> PenaltyTerm:
        """The loss, with the mean number of heads held per context as ``held_heads``."""
        total = torch.zeros((), device=sites.predicting.device)
        counts: list[torch.Tensor] = []
        for layers in _alike(sites.chosen(self.layers), now):
            patterns, before = (
                [of[pattern_name(layer)] for layer in layers] for of in (now, original)
            )
            rows, rows_before = (_last_rows(of, sites) for of in (patterns, before))
            mask = self._held(layers, rows.detach(), rows_before, sites)
            divergence = (
                row_divergence(rows_before, rows, self.divergence)
                if self.queries == "last_prompt"
                else self._of_several_rows(patterns, before, sites)
            )
            total = total + (divergence * mask).sum((0, -1)).mean().to(total.device)
            counts.append(mask.sum().to(total.device))
        # Read once, at the end: each reading lets a GPU run empty
        held = int(torch.stack(counts).sum()) / len(sites.predicting)
        return PenaltyTerm(self.gamma * total, {"held_heads": held})

    def to_dict(self) -> dict[str, Any]:
        """What goes into an edit's record, with heads by name."""
        heads = self.heads
        if not isinstance(heads, str):
            heads = [head_name(*pair) for pair in self._pairs()]
        return {"penalty": self.kind, **asdict(self), "heads": heads}

    def _pairs(self) -> list[tuple[int, int]]:
        return [(int(pair[0]), int(pair[1])) for pair in self.heads]

    def _held(
        self,
        layers: Sequence[int],
        now: Float[torch.Tensor, "layer context head key"],
        before: Float[torch.Tensor, "layer context head key"],
        sites: Sites,
    ) -> Bool[torch.Tensor, "layer context head"]:
        if not isinstance(self.heads, str):
            mask = torch.zeros(now.shape[:-1], dtype=torch.bool)
            for layer, head in self._pairs():
                if layer in layers:
                    mask[layers.index(layer), :, head] = True
            return mask.to(now.device)
        current, original = (_at_subject(rows, sites) for rows in (now, before))
        rule = cast("HeadRule", self.heads)
        return over_attending_heads(current, original, rule, self.threshold)

    def _of_several_rows(
        self, now: Sequence[torch.Tensor], before: Sequence[torch.Tensor], sites: Sites
    ) -> Float[torch.Tensor, "layer context head"]:
        """The divergence of each head, summed over the restricted rows."""
        n = len(sites.predicting)
        earlier, later = (
            in_float32(torch.stack([one[:n] for one in patterns])) for patterns in (before, now)
        )
        counted = _rows_of(self.queries, sites).to(later.device)[:, None]
        return torch.where(counted, row_divergence(earlier, later, self.divergence), 0.0).sum(-1)


def _alike(layers: Sequence[int], now: Mapping[str, torch.Tensor]) -> list[list[int]]:
    """The layers, those together whose rows can be computed with in one go: on one device, of one
    shape. Layer by layer, a GPU would be given many small pieces and wait for each. Whether heads
    have sinks is decided for all of them together, too."""
    found: dict[Any, list[int]] = {}
    for layer in layers:
        pattern = now[pattern_name(layer)]
        found.setdefault((pattern.device, pattern.shape), []).append(layer)
    return [*found.values()]


def _rows_of(queries: Queries, sites: Sites) -> Bool[torch.Tensor, "context pos"]:
    """Which query positions are restricted."""
    if queries == "all":
        return sites.real
    return torch.zeros_like(sites.real).scatter(1, sites.predicting, True)


def _last_rows(
    patterns: Sequence[Float[torch.Tensor, "batch head query key"]], sites: Sites
) -> Float[torch.Tensor, "layer context head key"]:
    """Attention rows of the last prompt tokens, in float32 or better."""
    return torch.stack([sites.at_last_prompt(one.transpose(1, 2)) for one in patterns])


def _at_subject(
    rows: Float[torch.Tensor, "layer context head key"], sites: Sites
) -> Float[torch.Tensor, "layer context head"]:
    """What each head attends to the subject's last token."""
    at = sites.subject.to(rows.device) % rows.shape[-1]
    index = at[None, :, None, None].expand(*rows.shape[:-1], 1)
    return rows.gather(-1, index)[..., 0]


def _parse_heads(heads: Any) -> tuple[tuple[int, int], ...]:
    """Heads as (layer, head) pairs."""
    found: list[tuple[int, int]] = []
    if not isinstance(heads, Iterable):
        raise RequestError(f"SADR's heads are {heads!r}.", "Name a rule, or give a list of heads.")
    for head in heads:
        if isinstance(head, str):
            found.append(parse_head(head))
        elif isinstance(head, (list, tuple)) and len(head) == 2 and all(map(_is_place, head)):
            found.append((int(head[0]), int(head[1])))
        else:
            raise RequestError(f"{head!r} is no head.", 'Write it like "L9H6" or (9, 6).')
    if not found:
        raise RequestError("SADR is given no head to hold.", "Name at least one, or a rule.")
    return tuple(sorted(set(found)))


def _is_place(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 0


def _checked_threshold(heads: Any, threshold: Any) -> float | None:
    if threshold is None:
        return None
    if heads not in ("quantile", "mean_std", "drift"):
        raise RequestError(
            f"SADR's threshold is {threshold!r}, but heads={heads!r} compares with none.",
            "Leave it out, or choose quantile, mean_std or drift.",
        )
    found = as_number("SADR's threshold", threshold)
    if found != found:
        raise RequestError(f"SADR's threshold is {threshold!r}.", "Give a number.")
    if heads == "quantile" and not 0 <= found <= 1:
        raise RequestError(f"The quantile {found} does not exist.", "Give one from 0 to 1.")
    return found
