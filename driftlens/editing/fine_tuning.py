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
from jaxtyping import Float

from driftlens.editing.configs import FtConfig
from driftlens.editing.contexts import Context
from driftlens.editing.descent import Notes, Terms, descend
from driftlens.editing.outcome import VALUE_BUDGET, Outcome, Resources, bytes_of_row
from driftlens.editing.penalties import ESSENCE
from driftlens.editing.target import (
    Below,
    Observer,
    ValueProblem,
    build_problem,
    make_sites,
    read_at,
    terms_of_each,
)
from driftlens.facts import EditRequest
from driftlens.interventions import Hook, down_in_name, down_out_name
from driftlens.models import LensModel
from driftlens.precision import in_float32
from driftlens.reuse import (
    Engine,
    FullPass,
    SharedPasses,
    SuffixRunner,
    budget,
    choose_engine,
    in_batches,
)
from driftlens.scoring import log_probabilities
from driftlens.weights import Delta, DenseDelta


def ft_l(
    model: LensModel, requests: Sequence[EditRequest], config: FtConfig, resources: Resources
) -> Outcome:
    """FT-L for one fact or many at once.

    Raises:
        EditError: If the loss stops being a number.
    """
    return _fine_tune(model, [requests], config, resources, teacher_forced=False)[0]


def ft_m(
    model: LensModel, requests: Sequence[EditRequest], config: FtConfig, resources: Resources
) -> Outcome:
    """FT-M for one fact or many at once.

    Raises:
        EditError: If the loss stops being a number.
    """
    return _fine_tune(model, [requests], config, resources, teacher_forced=True)[0]


def ft_each(
    model: LensModel,
    requests: Sequence[EditRequest],
    config: FtConfig,
    resources: Resources,
    teacher_forced: bool,
) -> list[Outcome]:
    """FT-L, or FT-M if teacher-forced, for each of several facts on its own, in shared passes.

    Raises:
        EditError: If a loss stops being a number.
    """
    rows = [build_problem(model, request, [Context()]).rows for request in requests]
    width = max(len(row) for group in rows for row in group)
    trained = 16 * model.down_projection(config.layer).weight.numel()  # with gradient and moments
    each = trained + 2 * bytes_of_row(model, config.layer, width, config.layer)
    parts = in_batches(
        [[request] for request in requests], max(1, budget(model, VALUE_BUDGET) // each),
        lambda groups: _fine_tune(model, groups, config, resources, teacher_forced),
    )  # fmt: skip
    return [outcome for part in parts for outcome in part]


def _fine_tune(
    model: LensModel,
    groups: Sequence[Sequence[EditRequest]],
    config: FtConfig,
    resources: Resources,
    teacher_forced: bool,
) -> list[Outcome]:
    """One change for each group of facts."""
    engine = choose_engine(model, resources.engine)
    batches = [
        _Batch([build_problem(model, request, [Context()]) for request in group], teacher_forced)
        for group in groups
    ]
    passes = _passes(model, batches, config.layer, engine)
    tasks = [_Task(model, batch, config, resources, passes.width) for batch in batches]

    def evaluate(active: list[int]) -> list[tuple[Terms, Notes]]:
        chosen = [tasks[i] for i in active]
        adding = _beside(config.layer, [(task.n_rows, task.trained) for task in chosen])
        return terms_of_each(chosen, adding, lambda hooks, at: passes.run(active, hooks, at))

    traces = descend(
        model, [task.trained for task in tasks], evaluate, steps=config.steps, lr=config.lr,
        stops=Below("nll", config.stop_loss),
        confine=lambda i: tasks[i].confine(),
        decay=(lambda i: tasks[i].decay()) if config.weight_decay else None,
        description="fine-tuning", progress=resources.progress,
    )  # fmt: skip
    return [task.outcome(trace, engine) for task, trace in zip(tasks, traces, strict=True)]


class _Batch:
    """Facts that share a change: a row for each prompt with its target, then each essence."""

    def __init__(self, problems: Sequence[ValueProblem], teacher_forced: bool) -> None:
        self.problems = problems
        self.prompts = [problem.rows[0] for problem in problems]
        self.rows = [*self.prompts, *(problem.rows[1] for problem in problems)]
        self.predicting = [_predicting(problem, teacher_forced) for problem in problems]
        self._targets = torch.tensor([token for p in problems for token in p.target])

    def target_logprobs(
        self, logprobs: Float[torch.Tensor, "places d_vocab"]
    ) -> tuple[torch.Tensor, ...]:
        """Log-probability of each target token, of each fact."""
        targets = self._targets.to(logprobs.device)
        found = logprobs[: len(targets)].gather(-1, targets[:, None])[:, 0]
        return found.split([len(p.target) for p in self.problems])


def _passes(
    model: LensModel, batches: Sequence[_Batch], layer: int, engine: Engine
) -> SharedPasses:
    """Over the rows of all batches, from the edited layer on where that is exact."""
    runners: list[SuffixRunner] | None = None
    if engine == "suffix":
        base = FullPass(model, [row for batch in batches for row in batch.rows], [layer])
        runners, first = [], 0
        for batch in batches:
            own = range(first, first + len(batch.rows))
            first = own.stop
            runners.append(SuffixRunner(base, [0] * len(own), own))
    return SharedPasses(model, [batch.rows for batch in batches], runners, layer)


class _Task:
    """The training of one change: its parameters, and its loss from what its rows gave."""

    def __init__(
        self, model: LensModel, batch: _Batch, config: FtConfig, resources: Resources, width: int
    ) -> None:
        self.config, self.batch = config, batch
        self.down = model.down_projection(config.layer)
        self.device = self.down.weight.device
        # In the orientation [d_out, d_in], whatever the parameter's.
        weight = self.down.weight.T if self.down.input_first else self.down.weight
        self._held = [in_float32(weight.detach())]
        if self.down.bias is not None and config.train_bias:
            self._held.append(in_float32(model.weights.parameters[self.down.bias].detach()))
        self.trained = [torch.zeros_like(held, requires_grad=True) for held in self._held]
        n = len(batch.problems)
        self.n_rows = len(batch.rows)
        self.read = read_at([*batch.predicting, *([p.essence] for p in batch.problems)])
        # Penalties look at as many queries of each row: the last one is repeated.
        longest = max(map(len, batch.predicting))
        predicting = torch.tensor(
            [[*row, *row[-1:] * (longest - len(row))] for row in batch.predicting],
            device=model.device,
        )
        subjects = [problem.subject[0] for problem in batch.problems]
        sites = make_sites(model, predicting, subjects, batch.prompts, [0] * n, width, config.layer)
        self.observer = Observer(resources.penalties, sites)

    def terms(
        self, logits: Float[torch.Tensor, "places d_vocab"], now: dict[str, torch.Tensor]
    ) -> tuple[Terms, Notes]:
        """The terms of the loss, and what to note."""
        logprobs = log_probabilities(logits.to(self.device))
        now[ESSENCE] = logprobs[-len(self.batch.problems) :]
        self.observer.original(now)
        target = self.batch.target_logprobs(logprobs)
        penalties, notes = self.observer.terms(now, self.device)
        terms = {"nll": -torch.stack([row.mean() for row in target]).mean(), **penalties}
        sums = torch.stack([row.detach().sum() for row in target])
        notes["target_prob"] = float(sums.exp().mean())
        notes["delta_norm"] = float(self.trained[0].detach().norm())
        return terms, notes

    def decay(self) -> None:
        """Add the trained parameters themselves to their gradients."""
        for tensor, held in zip(self.trained, self._held, strict=True):
            assert tensor.grad is not None
            tensor.grad.add_(held + tensor.detach(), alpha=self.config.weight_decay)

    def confine(self) -> None:
        """Bring each single weight back to where it may be."""
        largest = self.config.norm_constraint
        if largest is not None:
            for tensor in self.trained:
                tensor.clamp_(-largest, largest)

    def outcome(self, trace: list[dict[str, Any]], engine: Engine) -> Outcome:
        """The change as found."""
        down, change = self.down, self.trained[0].detach()
        weight = change.T.contiguous() if down.input_first else change
        deltas: dict[str, Delta] = {down.name: DenseDelta(weight)}
        if len(self.trained) > 1 and down.bias is not None:
            deltas[down.bias] = DenseDelta(self.trained[1].detach())
        info = {
            "engine": engine,
            "stored": "dense",
            "update_norms": {str(self.config.layer): float(change.norm())},
            "largest_change": float(change.abs().max()),
        }
        return Outcome(deltas, trace, info)


def _predicting(problem: ValueProblem, teacher_forced: bool) -> list[int]:
    """Where each target token is read: from the token before it, or all from the prompt's last."""
    last = problem.last_prompt[0]
    return [last + i if teacher_forced else last for i in range(len(problem.target))]


def _beside(layer: int, tasks: Sequence[tuple[int, Sequence[torch.Tensor]]]) -> list[Hook]:
    """Hooks that add ``D k`` (and a bias) to the down-projection's output.

    Args:
        tasks: For each, its number of rows and what it trains.
    """
    seen: dict[str, torch.Tensor] = {}
    sizes = [rows for rows, _ in tasks]

    def see(keys: torch.Tensor, hook: Any) -> None:
        seen["keys"] = keys

    def add(out: torch.Tensor, hook: Any) -> torch.Tensor:
        keys = in_float32(seen["keys"]).split(sizes)
        said = [torch.nn.functional.linear(k, *t) for k, (_, t) in zip(keys, tasks, strict=True)]
        return out + torch.cat(said).to(out)

    return [(down_in_name(layer), see), (down_out_name(layer), add)]
