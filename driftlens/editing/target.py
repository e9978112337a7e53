"""The optimisation of a value: what the edited layer should say about the subject.

Shared by all locate-then-edit methods. Find the vector delta which, added at the subject's
last token, makes the model answer the new target in every context::

    L(delta) = mean over contexts of -log P(target) per token
             + kl_factor * KL( P_delta || P_0 )         at the subject in "{subject} is a"
             + weight_decay * |delta| / |h_0|^2
             + penalties

by Adam from delta = 0, with delta kept inside a ball of radius clamp_factor * |h_0|. The KL
term keeps the essence of the subject (ROME, section 3.1, equation 4). Nothing below the
edited layer depends on delta, so no gradient goes there.
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
from driftlens.interventions import Hook, down_in_name, down_out_name
from driftlens.models import LensModel, recording

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
        ids: ``[context + 1, pos]``, padded on the right.
        subject: Position of the subject's last token in each row.
        predicting: Positions at which the target's tokens are predicted, for each context.
        target: Ids of the target.
    """

    ids: Int[torch.Tensor, "row pos"]
    subject: Int[torch.Tensor, " row"]
    predicting: Int[torch.Tensor, "context target"]
    target: Int[torch.Tensor, " target"]


@dataclass(frozen=True)
class Value:
    """The optimised value.

    Args:
        delta: What is to be added at the subject.
        trace: One record per step: ``loss`` and its terms ``nll``, ``kl``, ``decay`` and the
            penalties' (all weighted, nats), ``target_prob`` (mean over contexts of the
            target's probability), ``delta_norm``, and the penalties' notes.
    """

    delta: Float[torch.Tensor, " d_model"]
    trace: list[dict[str, Any]]


def build_problem(
    model: LensModel, request: EditRequest, contexts: Sequence[Context]
) -> ValueProblem:
    """Tokenize a request in its contexts.

    Raises:
        TokenError: If the subject cannot be located or the target is empty.
    """
    target = model.tokens.target_ids(request.target_new)
    rows: list[list[int]] = []
    subjects: list[int] = []
    predicting: list[list[int]] = []
    for ids, subject in (subject_in_context(model, request, c) for c in contexts):
        predicting.append([len(ids) - 1 + i for i in range(len(target))])
        rows.append([*ids, *target[:-1]])
        subjects.append(subject)
    essence = model.tokens.encode(request.subject + ESSENCE_SUFFIX)
    rows.append(essence.ids)
    subjects.append(model.tokens.span_of_characters(essence, 0, len(request.subject)).last)
    device = model.device
    return ValueProblem(
        model.tokens.pad(rows, device),
        torch.tensor(subjects, device=device),
        torch.tensor(predicting, device=device),
        torch.tensor(target, device=device),
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


def optimise_value(
    model: LensModel,
    problem: ValueProblem,
    layer: int,
    initial: Float[torch.Tensor, " d_model"],
    search: ValueSearch,
    penalties: Sequence[Penalty] = (),
    progress: bool = True,
) -> Value:
    """Find delta for the output of ``layer``'s down-projection.

    Args:
        initial: h_0, the clean output at the subject of the plain prompt.

    Raises:
        EditError: If the loss stops being a number.
    """
    n_contexts, n_target = problem.predicting.shape
    sites = Sites(
        last_prompt=problem.predicting[:, 0],
        subject=problem.subject[:n_contexts],
        layers=tuple(range(layer + 1, model.info.n_layers)),
    )
    watched = sorted({name for p in penalties for name in p.activations(sites)})
    at = torch.cat([problem.predicting, problem.subject[-1:, None].expand(1, n_target)])
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
            hooks = [_add_at(layer, problem.subject, delta), *recording(now, watched)]
            logprobs = _wide(model.run(problem.ids, hooks, at=at)).log_softmax(-1)
            if step == 0:
                original = {name: tensor.detach() for name, tensor in now.items()}
                essence = logprobs[-1, 0].detach()
            assert essence is not None
            target = logprobs[:-1].gather(
                -1, problem.target.expand(n_contexts, -1).unsqueeze(-1)
            )[..., 0]
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
    return Value(delta.detach(), trace)


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
