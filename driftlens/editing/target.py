"""The optimisation of values: what an edited layer should say about the subject.

Shared by all locate-then-edit methods. Find the vector delta which, added at the subject's
last token, makes the model answer the new target in every context::

    L(delta) = mean over contexts of -log P(target) per token
             + kl_factor * KL( P_delta || P_0 )         at the subject in "{subject} is a"
             + weight_decay * |delta| / |h_0|^2
             + penalties

by Adam from delta = 0, with delta kept inside a ball of radius clamp_factor * |h_0|. The KL
term keeps the essence of the subject (ROME, section 3.1, equation 4). Where delta is added is
the method's business (:class:`Place`): ROME adds it to the output of one down-projection,
MEMIT to the residual stream after the last edited layer, PMET one vector to the attention's
output and one to the MLP's, at once. Nothing below and nothing left of such a place depends
on delta, so that part is computed once (``driftlens.reuse``) instead of at every step.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from jaxtyping import Float, Int

from driftlens.editing.contexts import Context
from driftlens.editing.descent import Notes, Terms, descend
from driftlens.editing.penalties import ESSENCE, Penalty, Sites
from driftlens.facts import EditRequest, split_template
from driftlens.interventions import (
    Hook,
    attention_out_name,
    block_in_name,
    block_out_name,
    down_out_name,
)
from driftlens.models import LensModel, Places, recording
from driftlens.precision import in_float32
from driftlens.reuse import Engine, FullPass, SharedPasses, SuffixRunner, choose_engine
from driftlens.scoring import log_probabilities

ESSENCE_SUFFIX = " is a"
"""What follows the subject in the prompt of the KL term."""

Token = Literal["subject", "last_prompt"]
KlPosition = Literal["subject", "last"]


@dataclass(frozen=True)
class ValueProblem:
    """One request as a batch: a row for each context, and last the row of the KL term.

    Args:
        rows: Token ids of each row, not padded.
        subject: Position of the subject's last token in each row.
        last_prompt: For each context, the position of the last prompt token.
        target: Ids of the target.
        essence: Where the row of the KL term is read.
    """

    rows: list[list[int]]
    subject: list[int]
    last_prompt: list[int]
    target: list[int]
    essence: int


def build_problem(
    model: LensModel,
    request: EditRequest,
    contexts: Sequence[Context],
    kl_position: KlPosition = "subject",
) -> ValueProblem:
    """Tokenize a request in its contexts.

    Raises:
        TokenError: If the subject cannot be located or the target is empty.
        RequestError: If a prompt with its target is longer than the model's context.
    """
    target = model.tokens.target_ids(request.target_new)
    located = [subject_in_context(model, request, context) for context in contexts]
    essence = model.tokens.encode(request.subject + ESSENCE_SUFFIX)
    essence_subject = model.tokens.span_of_characters(essence, 0, len(request.subject)).last
    for ids, _ in located:
        model.check_length(len(ids) + len(target) - 1, request.text)
    read = essence_subject if kl_position == "subject" else len(essence.ids) - 1
    return ValueProblem(
        # Nothing behind the position that is read matters.
        rows=[*([*ids, *target[:-1]] for ids, _ in located), essence.ids[: read + 1]],
        subject=[*(subject for _, subject in located), essence_subject],
        last_prompt=[len(ids) - 1 for ids, _ in located],
        target=target,
        essence=read,
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
    model.check_length(len(encoded), text)
    return encoded.ids, span.last


# --- where a vector is added ---------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """The output of a module, to which a vector can be added.

    Args:
        name: Hook of the output; h_0 is read and, over whole sequences, delta is added there.
        enters: Lowest layer that depends on delta.
        shortcut: Hook further up where delta arrives as it is, if there is one.
    """

    name: str
    enters: int
    shortcut: str | None = None


def down_projection_out(model: LensModel, layer: int) -> Place:
    """The output of a layer's down-projection, bias included (ROME)."""
    above = layer + 1
    if layer in model.writes_directly and above < model.info.n_layers:
        return Place(down_out_name(layer), above, block_in_name(above))
    return Place(down_out_name(layer), layer)


def block_out(model: LensModel, layer: int) -> Place:
    """The residual stream after a layer (MEMIT)."""
    above = layer + 1
    if above < model.info.n_layers:
        return Place(block_out_name(layer), above, block_in_name(above))
    return Place(block_out_name(layer), layer)


def attention_out(model: LensModel, layer: int) -> Place:
    """The output of a layer's attention (PMET)."""
    return Place(attention_out_name(layer), layer)


def entered(places: Sequence[Place]) -> int:
    """The lowest layer that depends on vectors at these places."""
    return min(place.enters for place in places)


@dataclass(frozen=True)
class Start:
    """What is known before the optimisation.

    Args:
        model: The model.
        layer: The lowest layer to whose outputs a vector is added.
        places: Where vectors are added.
        problem: The request in its contexts.
        positions: Where in each row they are added; ``None`` in a row without any.
        contexts: Activations by hook name, at these positions of each context.
        plain: The same, for the prompt alone.
        reused: Passes from the entered layer on, over what was kept of the first one; ``None``
            if all run whole sequences.
    """

    model: LensModel
    layer: int
    places: tuple[Place, ...]
    problem: ValueProblem
    positions: list[int | None]
    contexts: dict[str, Float[torch.Tensor, "context width"]]
    plain: dict[str, Float[torch.Tensor, " width"]]
    reused: SuffixRunner | None

    @property
    def enters(self) -> int:
        """Lowest layer that depends on the vectors."""
        return entered(self.places)

    @property
    def engine(self) -> Engine:
        """How passes are run."""
        return "plain" if self.reused is None else "suffix"

    @property
    def starts(self) -> list[int]:
        """The first position of each row that depends on the vectors, or is read."""
        return [
            subject if position is None else position
            for subject, position in zip(self.problem.subject, self.positions, strict=True)
        ]

    @property
    def initial(self) -> list[Float[torch.Tensor, " d_model"]]:
        """h_0 of each place: its output for the prompt alone."""
        return [self.plain[place.name] for place in self.places]


def start(
    model: LensModel,
    request: EditRequest,
    problem: ValueProblem,
    layer: int,
    places: Sequence[Place],
    record: Sequence[str] = (),
    token: Token = "subject",
    engine: Engine | None = None,
) -> Start:
    """One pass over all contexts, for activations and whatever later passes can reuse.

    Args:
        problem: The request in its contexts.
        layer: The lowest layer to whose outputs a vector is added.
        places: Where vectors are added.
        record: Further hooks whose activations are wanted at the same positions.
        token: Whether vectors are added at the subject's last token (in the row of the KL term
            too), or at the last prompt token (and not in the row of the KL term).
        engine: ``None`` takes the fast one wherever it is exact.
    """
    plain_ids, plain_subject = subject_in_context(model, request, Context())
    n = len(problem.last_prompt)
    at_subject = token == "subject"
    chosen = problem.subject[:n] if at_subject else problem.last_prompt
    last = plain_subject if at_subject else len(plain_ids) - 1
    positions = [*chosen, problem.subject[-1] if at_subject else None]
    rows, seen_at = [*problem.rows, plain_ids], [*chosen, problem.subject[-1], last]
    names = sorted({*record, *(place.name for place in places)})
    reused: SuffixRunner | None = None
    if choose_engine(model, engine) == "suffix":
        seen: dict[str, torch.Tensor] = {}
        base = FullPass(model, rows, [entered(places)], hooks=recording(seen, names))
        reused = SuffixRunner(base, [*chosen, problem.subject[-1]], range(n + 1))
    else:
        seen = model.record(model.tokens.pad(rows), names)
    at = torch.arange(len(rows)), torch.tensor(seen_at)
    found = {
        name: in_float32(tensor[tuple(i.to(tensor.device) for i in at)])
        for name, tensor in seen.items()
    }
    return Start(
        model,
        layer,
        tuple(places),
        problem,
        positions,
        {name: tensor[:n] for name, tensor in found.items()},
        {name: tensor[-1] for name, tensor in found.items()},
        reused,
    )


class _Runner:
    """Passes over the rows of several facts, one fact after another."""

    def __init__(self, starts: Sequence[Start]) -> None:
        self.model = starts[0].model
        runners = [s.reused for s in starts if s.reused is not None]
        self._reused = bool(runners)
        enters = starts[0].enters
        self._passes = SharedPasses(
            self.model, [s.problem.rows for s in starts], runners or None, enters
        )
        self.width = self._passes.width
        self.run = self._passes.run
        self.hooks = [
            # Where an output reaches the entered layer as it is, so does what is added to it.
            place.shortcut if runners and place.shortcut and place.enters == enters else place.name
            for place in starts[0].places
        ]

    def shift(self, start: Start) -> list[int]:
        """What to add to a position to have that of a pass."""
        return [-first for first in start.starts] if self._reused else [0] * len(start.starts)


# --- the search ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Below:
    """Stop once a term of the trace is below a limit."""

    term: str
    limit: float

    def __call__(self, record: Mapping[str, Any]) -> bool:
        """Whether it is."""
        return bool(record[self.term] < self.limit)


@dataclass(frozen=True)
class Descent:
    """How values are searched; the fields of configurations of the same names say more.

    Two that are equal search alike, so the functions are dataclasses, too.

    Args:
        stops: When to stop, given a record of the trace.
        nll_weight: Weight of the likelihood term, given whether greedy decoding would give the
            target in every context; ``None``: 1.
    """

    steps: int
    lr: float
    weight_decay: float
    clamp_factor: float
    kl_factor: float
    stops: Callable[[dict[str, Any]], bool]
    nll_weight: Callable[[bool], float] | None = None


@dataclass(frozen=True)
class Value:
    """The optimised values.

    Args:
        deltas: What is to be added at each place.
        trace: One record per step: ``loss`` and its terms ``nll``, ``kl``, ``decay`` and the
            penalties' (all weighted, nats), ``target_prob`` (mean over contexts of the
            target's probability), ``delta_norm`` (of all deltas as one vector), and the
            penalties' notes.
        engine: How the passes were run.
        seconds: The fact's share of the time that the search took.
    """

    deltas: list[Float[torch.Tensor, " d_model"]]
    trace: list[dict[str, Any]]
    engine: Engine
    seconds: float = 0.0

    @property
    def delta(self) -> Float[torch.Tensor, " d_model"]:
        """The first one."""
        return self.deltas[0]


def optimise_value(
    start: Start,
    search: Descent,
    penalties: Sequence[Penalty] = (),
    progress: bool = True,
) -> Value:
    """Find what to add at each place, for one fact.

    Raises:
        EditError: If the loss stops being a number.
    """
    return optimise_values([start], search, penalties, progress)[0]


def optimise_values(
    starts: Sequence[Start],
    search: Descent,
    penalties: Sequence[Penalty] = (),
    progress: bool = True,
) -> list[Value]:
    """The same for several facts, each on its own but in shared passes.

    Args:
        starts: Of one model, at the same places.

    Raises:
        EditError: If a loss stops being a number.
    """
    runner = _Runner(starts)
    tasks = [_Task(start, search, penalties, runner) for start in starts]

    def evaluate(active: list[int]) -> list[tuple[Terms, Notes]]:
        chosen = [tasks[i] for i in active]
        adding = [_add_at(name, [(t.positions, t.deltas[k]) for t in chosen])
                  for k, name in enumerate(runner.hooks)]  # fmt: skip
        return terms_of_each(chosen, adding, lambda hooks, at: runner.run(active, hooks, at))

    traces = descend(
        runner.model, [task.deltas for task in tasks], evaluate, steps=search.steps, lr=search.lr,
        stops=search.stops, confine=lambda i: tasks[i].confine(),
        description="optimising the value", progress=progress,
    )  # fmt: skip
    return [
        Value([delta.detach() for delta in task.deltas], trace, task.start.engine)
        for task, trace in zip(tasks, traces, strict=True)
    ]


class Task(Protocol):
    """Something that is optimised in passes shared with others: how many rows it has there,
    where they are read, what its penalties look at, and its loss."""

    n_rows: int
    read: Places
    observer: Observer

    def terms(
        self, logits: Float[torch.Tensor, "places d_vocab"], now: dict[str, torch.Tensor]
    ) -> tuple[Terms, Notes]:
        """The terms of the loss, and what to note, from what its own rows gave."""
        ...


def terms_of_each(
    tasks: Sequence[Task],
    adding: Sequence[Hook],
    run: Callable[[Sequence[Hook], Places], torch.Tensor],
) -> list[tuple[Terms, Notes]]:
    """One pass over the rows of several tasks, one task after another, and each one's terms.

    Args:
        tasks: With penalties of the same kinds.
        adding: Hooks that put the tasks' parameters into the pass.
        run: The pass, given hooks and where its rows are read.
    """
    starts = list(itertools.accumulate((task.n_rows for task in tasks), initial=0))
    reading = Places(
        torch.cat([task.read.rows + start for task, start in zip(tasks, starts, strict=False)]),
        torch.cat([task.read.positions for task in tasks]),
    )
    now: dict[str, torch.Tensor] = {}
    logits = run([*adding, *recording(now, tasks[0].observer.names)], reading)[0]
    found = []
    for task, start, own_logits in zip(
        tasks, starts, logits.split([len(task.read.rows) for task in tasks]), strict=False
    ):
        own = {name: tensor[start : start + task.n_rows] for name, tensor in now.items()}
        found.append(task.terms(own_logits, own))
    return found


class _Task:
    """The search of one fact: its vectors, and its loss from what its rows gave."""

    def __init__(
        self, start: Start, search: Descent, penalties: Sequence[Penalty], runner: _Runner
    ) -> None:
        problem, shift = start.problem, runner.shift(start)
        n_contexts = len(problem.last_prompt)
        self.start, self.search = start, search
        self.deltas = [torch.zeros_like(vector, requires_grad=True) for vector in start.initial]
        predicting = _predicting(start.model, problem, shift)
        self.positions = [
            None if p is None else p + s for p, s in zip(start.positions, shift, strict=True)
        ]
        rows = problem.rows[:n_contexts]
        subjects = [p + s for p, s in zip(problem.subject, shift, strict=True)]
        sites = make_sites(start.model, predicting, subjects, rows, shift, runner.width,
                           start.layer)  # fmt: skip
        # Contexts where the target is predicted; then the prompt of the KL, at one position.
        self.n_rows = len(problem.rows)
        self.read = read_at([*predicting.tolist(), [problem.essence + shift[-1]]])
        self.observer = Observer(penalties, sites)
        target = torch.tensor(problem.target, device=start.initial[0].device)
        self._target = target.repeat(n_contexts)[:, None]

    def terms(
        self, logits: Float[torch.Tensor, "places d_vocab"], now: dict[str, torch.Tensor]
    ) -> tuple[Terms, Notes]:
        """The terms of the loss, and what to note."""
        search, initial = self.search, self.start.initial
        device = initial[0].device
        logprobs = log_probabilities(logits.to(device))  # of several devices, one
        now[ESSENCE] = logprobs[-1:]
        original = self.observer.original(now)[ESSENCE]
        target = logprobs[:-1].gather(-1, self._target)
        is_greedy = bool((target[:, 0] >= logprobs[:-1].amax(-1)).all())
        target = target.view(-1, len(self.start.problem.target))
        weight = 1.0 if search.nll_weight is None else search.nll_weight(is_greedy)
        divergence = (now[ESSENCE].exp() * (now[ESSENCE] - original)).sum()
        ratios = [d.norm() / h.norm() ** 2 for d, h in zip(self.deltas, initial, strict=True)]
        penalty_terms, notes = self.observer.terms(now, device)
        terms = {
            "nll": -weight * target.mean(),
            "kl": search.kl_factor * divergence,
            "decay": search.weight_decay * torch.stack(ratios).sum(),
            **penalty_terms,
        }
        norms = torch.stack([delta.detach().norm() for delta in self.deltas])
        return terms, {
            "target_prob": float(target.detach().sum(-1).exp().mean()),
            "target_is_greedy": float(is_greedy),
            "delta_norm": float(norms.norm()),
            **notes,
        }

    def confine(self) -> None:
        """Bring the vectors back into their balls."""
        for delta, vector in zip(self.deltas, self.start.initial, strict=True):
            radius, norm = self.search.clamp_factor * float(vector.norm()), float(delta.norm())
            if norm > radius:
                delta.mul_(radius / norm)


class Observer:
    """Records what the penalties look at, before the first step and now, and adds them up."""

    def __init__(self, penalties: Sequence[Penalty], sites: Sites) -> None:
        self.penalties = penalties
        self.sites = sites
        self.names = sorted({name for p in penalties for name in p.activations(sites)})
        self._original: dict[str, torch.Tensor] = {}

    def original(self, now: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """The activations of the first evaluation, in which nothing has changed yet."""
        if not self._original:
            self._original = {name: tensor.detach() for name, tensor in now.items()}
        return self._original

    def terms(
        self, now: Mapping[str, torch.Tensor], device: torch.device
    ) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        """The loss of each kind of penalty under its name, and their notes; equals add up."""
        terms: dict[str, torch.Tensor] = {}
        notes: dict[str, float] = {}
        for penalty in self.penalties:
            term = penalty(now, self.original(now), self.sites)
            terms[penalty.kind] = terms.get(penalty.kind, 0) + term.loss.to(device)
            for name, value in term.notes.items():
                notes[name] = notes.get(name, 0.0) + value
        return terms, notes


def make_sites(
    model: LensModel,
    predicting: Int[torch.Tensor, "context target"],
    subjects: Sequence[int],
    rows: Sequence[Sequence[int]],
    shift: Sequence[int],
    width: int,
    layer: int,
) -> Sites:
    """Where penalties look, in the coordinates of a pass.

    Args:
        predicting: Query positions in the pass.
        subjects: Positions in the pass of the subjects' last tokens, negative if cached.
        rows: Token ids of the contexts.
        shift: What to add to a position to have that of the pass.
        width: Of the pass.
        layer: The edited one, or the topmost of them.
    """
    device = predicting.device
    n = len(rows)
    ends = torch.tensor([len(row) + s for row, s in zip(rows, shift, strict=False)])
    real = torch.arange(width)[None] < ends[:, None]
    layers = tuple(range(layer + 1, model.info.n_layers))
    return Sites(
        predicting=predicting,
        subject=torch.tensor([p - width for p in subjects[:n]], device=device),
        real=real.to(device),
        layers=layers,
        key_hooks={y: model.key_hook(y) for y in layers},
    )


def read_at(positions: Sequence[Sequence[int]]) -> Places:
    """Where each row is read, row by row."""
    return Places(
        torch.tensor([row for row, of_row in enumerate(positions) for _ in of_row]),
        torch.tensor([position for of_row in positions for position in of_row]),
    )


def _predicting(
    model: LensModel, problem: ValueProblem, shift: Sequence[int]
) -> Int[torch.Tensor, "context target"]:
    """Where the target's tokens are predicted in each context, in the coordinates of a pass."""
    n = len(problem.target)
    rows = [
        [last + i + s for i in range(n)]
        for last, s in zip(problem.last_prompt, shift, strict=False)
    ]
    return torch.tensor(rows, device=model.device)


def _add_at(
    name: str,
    vectors: Sequence[tuple[Sequence[int | None], Float[torch.Tensor, " d_model"]]],
) -> Hook:
    """A hook that adds vectors to an activation.

    Args:
        vectors: For each fact, at which position of each of its rows (or at none), and what.
    """
    places, first = [], 0
    for positions, vector in vectors:
        rows = [first + row for row, p in enumerate(positions) if p is not None]
        columns = [p for p in positions if p is not None]
        places.append((torch.tensor(rows), torch.tensor(columns), vector))
        first += len(positions)

    def add(out: Float[torch.Tensor, "row pos d_model"], hook: Any) -> torch.Tensor:
        added = torch.zeros_like(out)
        for rows, columns, vector in places:
            added[rows.to(out.device), columns.to(out.device)] = vector.to(out)
        return out + added

    return name, add
