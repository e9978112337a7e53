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
computed once (``driftlens.suffix``) instead of at every step.
"""

from __future__ import annotations

import math
import warnings
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
from driftlens.interventions import Hook, down_in_name, down_out_name
from driftlens.models import LensModel, recording, relative_tolerance
from driftlens.suffix import Engine, SuffixRunner

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


def keys_and_outputs(
    model: LensModel, request: EditRequest, contexts: Sequence[Context], layer: int
) -> tuple[Float[torch.Tensor, "context d_mlp"], Float[torch.Tensor, "context d_model"]]:
    """Input and output of the down-projection at the subject's last token, without target."""
    located = [subject_in_context(model, request, context) for context in contexts]
    ids = model.tokens.pad([row for row, _ in located])
    names = [down_in_name(layer), down_out_name(layer)]
    seen = model.record(ids, names, stop_after=layer)
    rows = torch.arange(len(located))
    at = torch.tensor([subject for _, subject in located])
    keys, outputs = (seen[name][rows, at] for name in names)
    return _wide(keys), _wide(outputs)


class _PlainRunner:
    """Whole sequences, padded on the right: the reference that the fast way is tested against."""

    def __init__(self, model: LensModel, problem: ValueProblem, layer: int) -> None:
        self.model = model
        self.ids = model.tokens.pad(problem.rows, model.device)
        self.query_shift = [0] * len(problem.rows)
        self.subject_key = [position - self.ids.shape[1] for position in problem.subject]

    def run(self, hooks: Sequence[Hook], at: torch.Tensor) -> torch.Tensor:
        return self.model.run(self.ids, hooks, at=at)


class _SuffixRunner(SuffixRunner):
    """From the edited layer and the subject's last token on."""

    def __init__(self, model: LensModel, problem: ValueProblem, layer: int) -> None:
        # The row of the KL term is read at the subject, so nothing behind it matters.
        rows = [*problem.rows[:-1], problem.rows[-1][: problem.subject[-1] + 1]]
        super().__init__(model, rows, problem.subject, layer)
        self.query_shift = [-start for start in problem.subject]
        self.subject_key = [self.key_position] * len(rows)


def choose_engine(model: LensModel, problem: ValueProblem, layer: int) -> Engine:
    """``suffix`` if it gives this model's own logits, shown once for each model."""
    if "suffix engine" not in model.memo:
        found: list[torch.Tensor] = []
        try:
            for kind in (_PlainRunner, _SuffixRunner):
                with torch.no_grad():
                    runner = kind(model, problem, layer)
                    found.append(runner.run([], _predicting(model, problem, runner.query_shift)))
            tolerance = relative_tolerance(found[0].dtype) * float(found[0].abs().max())
            agrees = torch.allclose(found[0], found[1], atol=tolerance, rtol=0)
            reason = f"its logits differ by {float((found[0] - found[1]).abs().max()):.2g}"
        except Exception as error:
            agrees, reason = False, f"{type(error).__name__}: {error}"
        if not agrees:
            warnings.warn(
                f"{model.info.name} cannot reuse cached prefixes ({reason}); editing runs whole "
                "sequences, which is slower and gives the same result.",
                stacklevel=4,
            )
        model.memo["suffix engine"] = agrees
    return "suffix" if model.memo["suffix engine"] else "plain"


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
    model: LensModel,
    problem: ValueProblem,
    layer: int,
    initial: Float[torch.Tensor, " d_model"],
    search: ValueSearch,
    penalties: Sequence[Penalty] = (),
    progress: bool = True,
    engine: Engine | None = None,
) -> Value:
    """Find delta for the output of ``layer``'s down-projection.

    Args:
        initial: h_0, the clean output at the subject of the plain prompt.
        engine: ``None`` takes the fast one wherever it is exact.

    Raises:
        EditError: If the loss stops being a number.
    """
    used = engine or choose_engine(model, problem, layer)
    n_contexts = len(problem.last_prompt)
    device = model.device
    with model.frozen():
        runner = (_SuffixRunner if used == "suffix" else _PlainRunner)(model, problem, layer)
    at = _predicting(model, problem, runner.query_shift)
    injected = torch.tensor(
        [s + shift for s, shift in zip(problem.subject, runner.query_shift, strict=True)],
        device=device,
    )
    sites = Sites(
        last_prompt=at[:n_contexts, 0],
        subject=torch.tensor(runner.subject_key[:n_contexts], device=device),
        layers=tuple(range(layer + 1, model.info.n_layers)),
    )
    target_ids = torch.tensor(problem.target, device=device).expand(n_contexts, -1)[..., None]
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
            hooks = [_add_at(layer, injected, delta), *recording(now, watched)]
            logprobs = _wide(runner.run(hooks, at)).log_softmax(-1)
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
    return Value(delta.detach(), trace, used)


def _add_at(
    layer: int, position: Int[torch.Tensor, " row"], delta: Float[torch.Tensor, " d_model"]
) -> Hook:
    """A hook that adds delta at one position of each row of the down-projection's output."""

    def add(out: Float[torch.Tensor, "row pos d_model"], hook: Any) -> torch.Tensor:
        rows = torch.arange(out.shape[0], device=out.device)
        added = torch.zeros_like(out)
        added[rows, position.to(out.device)] = delta.to(out)
        return out + added

    return down_out_name(layer), add


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """In float32 or better."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
