"""Constrained fine-tuning: FT-L and FT-M, gradient descent on one down-projection.

Adam on the change of the weight (and bias) of one layer's down-projection, from zero; after
each step no single weight may have changed by more than ``norm_constraint``.

- FT-L (Meng et al., 2022) scores all target tokens at the last prompt token:
  loss = mean over target tokens of -log P(o_t | prompt).
- FT-M (Zhang et al., 2024, "A comprehensive study") scores each target token given those
  before it, as language models are trained.

The change is trained beside the weight, ``W k + D k``, in float32 whatever the model's dtype,
and the layers below are run once. Adam mixes the gradients' rows, so D has no low rank and is
stored as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int

from driftlens.editing.configs import FtConfig
from driftlens.editing.contexts import Context
from driftlens.editing.descent import Notes, Terms, descend
from driftlens.editing.outcome import Outcome, Resources
from driftlens.editing.penalties import ESSENCE
from driftlens.editing.target import Observer, ValueProblem, build_problem, make_sites
from driftlens.facts import EditRequest
from driftlens.interventions import Hook, down_in_name, down_out_name
from driftlens.models import DownProjection, LensModel, recording
from driftlens.precision import in_float32
from driftlens.reuse import FullPass, SuffixRunner, choose_engine
from driftlens.scoring import log_probabilities
from driftlens.weights import Delta, DenseDelta


def ft_l(
    model: LensModel, requests: Sequence[EditRequest], config: FtConfig, resources: Resources
) -> Outcome:
    """FT-L for one fact or many at once.

    Raises:
        EditError: If the loss stops being a number.
    """
    return _fine_tune(model, requests, config, resources, teacher_forced=False)


def ft_m(
    model: LensModel, requests: Sequence[EditRequest], config: FtConfig, resources: Resources
) -> Outcome:
    """FT-M for one fact or many at once.

    Raises:
        EditError: If the loss stops being a number.
    """
    return _fine_tune(model, requests, config, resources, teacher_forced=True)


def _fine_tune(
    model: LensModel,
    requests: Sequence[EditRequest],
    config: FtConfig,
    resources: Resources,
    teacher_forced: bool,
) -> Outcome:
    batch = _Batch(model, requests, config, resources, teacher_forced)
    down = model.down_projection(config.layer)
    device = down.weight.device
    # In the orientation [d_out, d_in], whatever the parameter's.
    original = in_float32((down.weight.T if down.input_first else down.weight).detach())
    change = torch.zeros_like(original, requires_grad=True)
    trained, held = [change], [original]
    if down.bias is not None and config.train_bias:
        bias = in_float32(model.weights.parameters[down.bias].detach())
        trained, held = [*trained, torch.zeros_like(bias, requires_grad=True)], [*held, bias]
    adding = _beside(down, config.layer, trained)
    observer = Observer(resources.penalties, batch.sites)

    def evaluate(step: int, active: list[int]) -> list[tuple[Terms, Notes]]:
        now: dict[str, torch.Tensor] = {}
        logits = batch.run([*adding, *recording(now, observer.names)])
        logprobs = log_probabilities(logits.to(device))
        now[ESSENCE] = logprobs[len(requests) :, 0]
        observer.original(now)
        target = batch.target_logprobs(logprobs)
        penalties, notes = observer.terms(now, device)
        terms = {"nll": -batch.mean_per_fact(target).mean(), **penalties}
        sums = torch.stack([x.detach().sum() for x in batch.per_fact(target)])
        notes["target_prob"] = float(sums.exp().mean())
        notes["delta_norm"] = float(change.detach().norm())
        return [(terms, notes)]

    def decay(task: int) -> None:
        for tensor, start in zip(trained, held, strict=True):
            assert tensor.grad is not None
            tensor.grad.add_(start + tensor.detach(), alpha=config.weight_decay)

    def confine(task: int) -> None:
        if config.norm_constraint is not None:
            for tensor in trained:
                tensor.clamp_(-config.norm_constraint, config.norm_constraint)

    (trace,) = descend(
        model, [trained], evaluate, steps=config.steps, lr=config.lr,
        stops=lambda record: record["nll"] < config.stop_loss, confine=confine,
        decay=decay if config.weight_decay else None,
        description="fine-tuning", progress=resources.progress,
    )  # fmt: skip
    weight = change.detach().T.contiguous() if down.input_first else change.detach()
    deltas: dict[str, Delta] = {down.name: DenseDelta(weight)}
    if len(trained) > 1 and down.bias is not None:
        deltas[down.bias] = DenseDelta(trained[1].detach())
    info = {
        "engine": batch.engine,
        "stored": "dense",
        "update_norms": {str(config.layer): float(change.detach().norm())},
        "largest_change": float(change.detach().abs().max()),
    }
    return Outcome(deltas, trace, info)


class _Batch:
    """All facts as one batch: a row for each prompt with its target, then one for each essence."""

    def __init__(
        self,
        model: LensModel,
        requests: Sequence[EditRequest],
        config: FtConfig,
        resources: Resources,
        teacher_forced: bool,
    ) -> None:
        self.problems = [build_problem(model, request, [Context()]) for request in requests]
        prompts = [problem.rows[0] for problem in self.problems]
        rows = [*prompts, *(problem.rows[1] for problem in self.problems)]
        subjects = [problem.subject[0] for problem in self.problems]
        self.model = model
        self.engine = choose_engine(model, resources.engine)
        self.ids = model.tokens.pad(rows, model.device)
        self._layer = config.layer
        self._runner: SuffixRunner | None = None
        if self.engine == "suffix":
            base = FullPass(model, rows, [config.layer])
            self._runner = SuffixRunner(base, [0] * len(rows))
        self._at = _read_at(self.problems, teacher_forced).to(model.device)
        n = len(requests)
        self.sites = make_sites(model, self._at[:n], subjects, prompts, [0] * n,
                                self.ids.shape[1], config.layer)  # fmt: skip
        longest = self._at.shape[1]
        self._targets = torch.tensor(
            [[*p.target, *[0] * (longest - len(p.target))] for p in self.problems]
        )

    def run(self, hooks: Sequence[Hook]) -> torch.Tensor:
        """Logits where something is read."""
        if self._runner is not None:
            return self._runner.run(hooks, self._at, joins=[self._layer])
        return self.model.run(self.ids, hooks, at=self._at)

    def target_logprobs(
        self, logprobs: Float[torch.Tensor, "row target d_vocab"]
    ) -> Float[torch.Tensor, "fact target"]:
        """Log-probability of each target token, padded on the right."""
        targets = self._targets.to(logprobs.device)
        return logprobs[: len(self.problems)].gather(-1, targets[..., None])[..., 0]

    def per_fact(self, padded: Float[torch.Tensor, "fact target"]) -> list[torch.Tensor]:
        """Without padding."""
        return [row[: len(p.target)] for row, p in zip(padded, self.problems, strict=True)]

    def mean_per_fact(
        self, padded: Float[torch.Tensor, "fact target"]
    ) -> Float[torch.Tensor, " fact"]:
        """Each fact's mean over its target tokens."""
        return torch.stack([row.mean() for row in self.per_fact(padded)])


def _read_at(
    problems: Sequence[ValueProblem], teacher_forced: bool
) -> Int[torch.Tensor, "row target"]:
    """Where each row is read; the last position repeated as padding."""
    longest = max(len(problem.target) for problem in problems)
    rows = []
    for problem in problems:
        last = problem.last_prompt[0]
        steps = [min(i, len(problem.target) - 1) if teacher_forced else 0 for i in range(longest)]
        rows.append([last + step for step in steps])
    rows += [[problem.essence] * longest for problem in problems]
    return torch.tensor(rows)


def _beside(down: DownProjection, layer: int, trained: Sequence[torch.Tensor]) -> list[Hook]:
    """Hooks that add ``D k`` (and a bias) to the down-projection's output."""
    seen: dict[str, torch.Tensor] = {}

    def see(keys: torch.Tensor, hook: Any) -> None:
        seen["keys"] = keys

    def add(out: torch.Tensor, hook: Any) -> torch.Tensor:
        said = torch.nn.functional.linear(in_float32(seen["keys"]), *trained)
        return out + said.to(out)

    return [(down_in_name(layer), see), (down_out_name(layer), add)]
