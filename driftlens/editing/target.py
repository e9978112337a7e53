"""The optimisation of a value: what the edited layer should say about the subject.

Shared by all locate-then-edit methods. Find the vector delta which, added at the subject's
last token, makes the model answer the new target in every context::

    L(delta) = mean over contexts of -log P(target) per token
             + kl_factor * KL( P_delta || P_0 )         at the subject in "{subject} is a"
             + weight_decay * |delta| / |h_0|^2
             + penalties

by Adam from delta = 0, with delta kept inside a ball of radius clamp_factor * |h_0|. The KL
term keeps the essence of the subject (ROME, section 3.1, equation 4). Nothing below the
edited layer and nothing left of the subject's last token depends on delta, so that part is
computed once (``driftlens.reuse``) instead of at every step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from tqdm.auto import tqdm

from driftlens.editing.contexts import Context
from driftlens.editing.penalties import Penalty, Sites
from driftlens.errors import EditError
from driftlens.facts import EditRequest, split_template
from driftlens.interventions import Hook, block_in_name, down_in_name, down_out_name
from driftlens.models import LensModel, recording
from driftlens.reuse import Engine, FullPass, SuffixRunner, choose_engine
from driftlens.scoring import log_probabilities

ESSENCE_SUFFIX = " is a"
"""What follows the subject in the prompt of the KL term."""


@dataclass(frozen=True)
class ValueSearch:
    """Hyperparameters of the optimisation.

    Args:
        steps: Forward passes; the last is not followed by an update, so there are at most
            ``steps - 1`` updates.
        lr: Learning rate of Adam.
        weight_decay: Weight of ``|delta| / |h_0|^2`` (the numerator is not squared).
        clamp_factor: Radius of the ball around 0 for delta, in units of ``|h_0|``.
        kl_factor: Weight of the KL term.
        early_stop_loss: Stop once the total loss is below; a negative number never stops.
    """

    steps: int = 20
    lr: float = 0.5
    weight_decay: float = 0.5
    clamp_factor: float = 4.0
    kl_factor: float = 0.0625
    early_stop_loss: float = 0.05


@dataclass(frozen=True)
class ValueProblem:
    """One request as a batch: a row for each context, and last the row of the KL term.

    Args:
        rows: Token ids of each row, not padded.
        subject: Position of the subject's last token in each row.
        last_prompt: For each context, the position of the last prompt token.
        target: Ids of the target.
    """

    rows: list[list[int]]
    subject: list[int]
    last_prompt: list[int]
    target: list[int]


@dataclass(frozen=True)
class Value:
    """The optimised value.

    Args:
        delta: What is to be added at the subject.
        trace: One record per step: ``loss`` and its terms ``nll``, ``kl``, ``decay`` and the
            penalties' (all weighted, nats), ``target_prob`` (mean over contexts of the
            target's probability), ``delta_norm``, and the penalties' notes.
        engine: How the passes were run.
    """

    delta: Float[torch.Tensor, " d_model"]
    trace: list[dict[str, Any]]
    engine: Engine


def build_problem(
    model: LensModel, request: EditRequest, contexts: Sequence[Context]
) -> ValueProblem:
    """Tokenize a request in its contexts.

    Raises:
        TokenError: If the subject cannot be located or the target is empty.
    """
    target = model.tokens.target_ids(request.target_new)
    located = [subject_in_context(model, request, context) for context in contexts]
    essence = model.tokens.encode(request.subject + ESSENCE_SUFFIX)
    essence_subject = model.tokens.span_of_characters(essence, 0, len(request.subject)).last
    return ValueProblem(
        rows=[*([*ids, *target[:-1]] for ids, _ in located), essence.ids],
        subject=[*(subject for _, subject in located), essence_subject],
        last_prompt=[len(ids) - 1 for ids, _ in located],
        target=target,
    )


def subject_in_context(
    model: LensModel, request: EditRequest, context: Context
) -> tuple[list[int], int]:
    """Ids of the filled-in prompt in a context, and the position of the subject's last token."""
    before, _ = split_template(request.prompt, "prompt")
    start = len(context.before) + len(before)
    text = context.before + request.text + context.after
    encoded = model.tokens.encode_prompt(text)
    span = model.tokens.span_of_characters(encoded, start, start + len(request.subject))
    return encoded.ids, span.last


@dataclass(frozen=True)
class Start:
    """What is known before the optimisation.

    Args:
        model: The model.
        layer: Whose down-projection's output delta is added to.
        problem: The request in its contexts.
        plain_key: Input of the down-projection at the subject of the plain prompt.
        plain_output: h_0, its output there.
        keys: Its inputs at the subject in each context.
        enters: Lowest layer that depends on delta.
        base: The whole pass that later ones reuse; ``None`` if they run whole sequences.
    """

    model: LensModel
    layer: int
    problem: ValueProblem
    plain_key: Float[torch.Tensor, " d_mlp"]
    plain_output: Float[torch.Tensor, " d_model"]
    keys: Float[torch.Tensor, "context d_mlp"]
    enters: int
    base: FullPass | None

    @property
    def engine(self) -> Engine:
        """How passes are run."""
        return "plain" if self.base is None else "suffix"


def start(
    model: LensModel,
    request: EditRequest,
    contexts: Sequence[Context],
    layer: int,
    engine: Engine | None = None,
) -> Start:
    """One pass over all contexts, for keys, outputs and whatever later passes can reuse.

    Args:
        engine: ``None`` takes the fast one wherever it is exact.

    Raises:
        TokenError: If the subject cannot be located or the target is empty.
    """
    problem = build_problem(model, request, contexts)
    plain_ids, plain_subject = subject_in_context(model, request, Context())
    rows, subjects = [*problem.rows, plain_ids], [*problem.subject, plain_subject]
    names = [down_in_name(layer), down_out_name(layer)]
    direct = layer in model.writes_directly and layer + 1 < model.info.n_layers
    enters = layer + 1 if direct else layer
    base: FullPass | None = None
    if choose_engine(model, engine) == "suffix":
        # The row of the KL term is read at the subject, so nothing behind it matters.
        rows[-2] = rows[-2][: subjects[-2] + 1]
        seen: dict[str, torch.Tensor] = {}
        base = FullPass(model, rows, [enters], hooks=recording(seen, names))
    else:
        seen = model.record(model.tokens.pad(rows), names, stop_at=names[-1])
    at = torch.arange(len(rows)), torch.tensor(subjects)
    keys, outputs = (_wide(seen[name][tuple(i.to(seen[name].device) for i in at)])
                     for name in names)  # fmt: skip
    n = len(problem.last_prompt)
    return Start(model, layer, problem, keys[-1], outputs[-1], keys[:n], enters, base)


class _PlainRunner:
    """Whole sequences, padded on the right: the reference that the fast way is tested against."""

    def __init__(self, start: Start) -> None:
        problem = start.problem
        self.model, self.layer = start.model, start.layer
        self.ids = self.model.tokens.pad(problem.rows, self.model.device)
        self.query_shift = [0] * len(problem.rows)
        self.subject_key = [position - self.ids.shape[1] for position in problem.subject]
        self.subject = torch.tensor(problem.subject, device=self.model.device)

    def run(
        self, delta: Float[torch.Tensor, " d_model"], hooks: Sequence[Hook], at: torch.Tensor
    ) -> torch.Tensor:
        added = _add_at(down_out_name(self.layer), self.subject, delta)
        return self.model.run(self.ids, [added, *hooks], at=at)


class _ReusingRunner:
    """From the edited layer and the subject's last token on."""

    def __init__(self, start: Start) -> None:
        problem, model, base = start.problem, start.model, start.base
        assert base is not None
        self.runner = SuffixRunner(base, problem.subject, range(len(problem.rows)))
        self.query_shift = [-subject for subject in problem.subject]
        self.subject_key = [-self.runner.width] * len(problem.rows)
        self.subject = torch.zeros(len(problem.rows), dtype=torch.long, device=model.device)
        # Where a layer's MLP adds its output to the residual stream as it is, so does delta.
        direct = start.enters > start.layer
        self.name = block_in_name(start.enters) if direct else down_out_name(start.layer)
        self.enters = start.enters

    def run(
        self, delta: Float[torch.Tensor, " d_model"], hooks: Sequence[Hook], at: torch.Tensor
    ) -> torch.Tensor:
        added = _add_at(self.name, self.subject, delta)
        return self.runner.run([added, *hooks], at, joins=[self.enters])


def _predicting(
    model: LensModel, problem: ValueProblem, shift: Sequence[int]
) -> Int[torch.Tensor, "row target"]:
    """Where each row is read: contexts where the target is predicted, the last at the subject."""
    n = len(problem.target)
    rows = [[last + i for i in range(n)] for last in problem.last_prompt]
    rows.append([problem.subject[-1]] * n)
    return (
        torch.tensor(rows, device=model.device) + torch.tensor(shift, device=model.device)[:, None]
    )


def optimise_value(
    start: Start,
    search: ValueSearch,
    penalties: Sequence[Penalty] = (),
    progress: bool = True,
) -> Value:
    """Find delta for the output of the down-projection.

    Raises:
        EditError: If the loss stops being a number.
    """
    model, problem, initial = start.model, start.problem, start.plain_output
    n_contexts = len(problem.last_prompt)
    runner = (_PlainRunner if start.base is None else _ReusingRunner)(start)
    at = _predicting(model, problem, runner.query_shift)
    sites = Sites(
        last_prompt=at[:n_contexts, 0],
        subject=torch.tensor(runner.subject_key[:n_contexts], device=initial.device),
        layers=tuple(range(start.layer + 1, model.info.n_layers)),
    )
    target_ids = torch.tensor(problem.target, device=initial.device)
    target_ids = target_ids.expand(n_contexts, -1)[..., None]
    watched = sorted({name for p in penalties for name in p.activations(sites)})
    delta = torch.zeros_like(initial, requires_grad=True)
    optimiser = torch.optim.Adam([delta], lr=search.lr)
    radius = search.clamp_factor * float(initial.norm())
    original: dict[str, torch.Tensor] = {}
    essence: torch.Tensor | None = None
    trace: list[dict[str, Any]] = []
    bar = tqdm(total=search.steps, desc="optimising the value", disable=not progress, leave=False)
    with model.frozen(), bar, torch.enable_grad():
        for step in range(search.steps):
            now: dict[str, torch.Tensor] = {}
            logits = runner.run(delta, recording(now, watched), at)
            logprobs = log_probabilities(logits.to(delta.device))  # of several devices, one
            if step == 0:
                original = {name: tensor.detach() for name, tensor in now.items()}
                essence = logprobs[-1, 0].detach()
            assert essence is not None
            target = logprobs[:-1].gather(-1, target_ids)[..., 0]
            terms = {
                "nll": -target.mean(),
                "kl": search.kl_factor
                * (logprobs[-1, 0].exp() * (logprobs[-1, 0] - essence)).sum(),
                "decay": search.weight_decay * delta.norm() / initial.norm() ** 2,
            }
            notes: dict[str, float] = {}
            for penalty in penalties:
                term = penalty(now, original, sites)
                terms[penalty.name] = terms.get(penalty.name, 0) + term.loss.to(delta.device)
                notes.update(term.notes)
            loss = torch.stack(list(terms.values())).sum()
            trace.append(
                {
                    "step": step,
                    "loss": float(loss.detach()),
                    **{name: float(value.detach()) for name, value in terms.items()},
                    "target_prob": float(target.detach().sum(-1).exp().mean()),
                    "delta_norm": float(delta.detach().norm()),
                    **notes,
                }
            )
            bar.update()
            total = trace[-1]["loss"]
            bar.set_postfix(loss=f"{total:.3f}", p=f"{trace[-1]['target_prob']:.3f}", refresh=False)
            if not math.isfinite(total):
                raise EditError(
                    f"The loss became {total} at step {step}.",
                    "Lower lr or clamp_factor, or load the model in float32.",
                )
            if total < search.early_stop_loss or step == search.steps - 1:
                break
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            with torch.no_grad():
                norm = float(delta.norm())
                if norm > radius:
                    delta.mul_(radius / norm)
    return Value(delta.detach(), trace, start.engine)


def _add_at(
    name: str, position: Int[torch.Tensor, " row"], delta: Float[torch.Tensor, " d_model"]
) -> Hook:
    """A hook that adds delta at one position of each row of an activation."""

    def add(out: Float[torch.Tensor, "row pos d_model"], hook: Any) -> torch.Tensor:
        rows = torch.arange(out.shape[0], device=out.device)
        added = torch.zeros_like(out)
        added[rows, position.to(out.device)] = delta.to(out)
        return out + added

    return name, add


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """In float32 or better."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
