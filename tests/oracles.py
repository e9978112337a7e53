"""Plain versions of what the package does fast, on an unwrapped Hugging Face model.

They use nothing of the package and recompute everything each time: whole sequences, padded,
with all logits. Batches are as the published editors form them. They are what results are
compared with, and what ``benchmarks/speed.py`` measures speed against.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

Ids = Sequence[int]


# --- attention -----------------------------------------------------------------------------


@dataclass
class Attention:
    """What one pass saw, by layer: ``[batch, head, query, key]`` and values per head."""

    patterns: list[torch.Tensor] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)


@contextmanager
def watched_attention(seen: Attention, change: Callable[..., Any] | None) -> Iterator[None]:
    """Hugging Face's eager attention, with ``change(layer, pattern, values, own output)``.

    The matrix product that follows a softmax is that of pattern and values.
    """
    softmax, matmul = torch.nn.functional.softmax, torch.matmul
    waiting = False

    def our_softmax(*args: Any, **options: Any) -> torch.Tensor:
        nonlocal waiting
        waiting = True
        return softmax(*args, **options)

    def our_matmul(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        nonlocal waiting
        if not waiting:
            return matmul(left, right)
        waiting = False
        seen.patterns.append(left.clone())
        seen.values.append(right.clone())
        own = matmul(left, right)
        return own if change is None else change(len(seen.patterns) - 1, left, right, own)

    torch.nn.functional.softmax, torch.matmul = our_softmax, our_matmul
    try:
        yield
    finally:
        torch.nn.functional.softmax, torch.matmul = softmax, matmul


def padded(rows: Sequence[Ids]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask, padded on the right."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return ids, mask


# --- editing -------------------------------------------------------------------------------


@dataclass(frozen=True)
class ValueTask:
    """One request in its contexts; the last row is that of the KL term.

    Args:
        rows: Ids of each row, the target but for its last token included.
        subject: Position of the subject's last token in each row.
        last_prompt: Position of the last prompt token, in all rows but the last.
        target: Ids of the target.
    """

    rows: list[list[int]]
    subject: list[int]
    last_prompt: list[int]
    target: list[int]


def plain_value(
    model: Any,
    down: torch.nn.Module,
    task: ValueTask,
    initial: torch.Tensor,
    *,
    steps: int,
    lr: float,
    weight_decay: float,
    clamp_factor: float,
    kl_factor: float,
    gamma: float | None = None,
    batch: int | None = None,
) -> torch.Tensor:
    """The value that ROME looks for, by whole padded passes with all logits.

    Args:
        down: The edited layer's down-projection.
        initial: h_0.
        gamma: Of SADR; ``None`` for none.
        batch: Rows per pass, 1 for one context at a time; ``None`` for all at once.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    n, count = len(task.last_prompt), len(task.rows)
    size = batch or count
    delta = torch.zeros_like(initial, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=lr)
    first_essence: torch.Tensor | None = None
    first_attention: dict[int, list[torch.Tensor]] = {}
    subject = torch.tensor(task.subject)

    def add(positions: torch.Tensor) -> Callable[..., torch.Tensor]:
        def hook(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
            out = out.clone()
            rows = torch.arange(len(positions))
            out[rows, positions] = out[rows, positions] + delta
            return out

        return hook

    for step in range(steps):
        loss = weight_decay * delta.norm() / initial.norm() ** 2
        for start in range(0, count, size):
            rows = range(start, min(start + size, count))
            ids, mask = padded([task.rows[row] for row in rows])
            handle = down.register_forward_hook(add(subject[list(rows)]))
            try:
                out = model(input_ids=ids, attention_mask=mask, use_cache=False,
                            output_attentions=gamma is not None)  # fmt: skip
            finally:
                handle.remove()
            logprobs = out.logits.log_softmax(-1)
            contexts = [(i, row) for i, row in enumerate(rows) if row < n]
            for i, row in contexts:
                at = torch.arange(len(task.target)) + task.last_prompt[row]
                own = logprobs[i, at, torch.tensor(task.target)]
                loss = loss - own.mean() / n
            if rows[-1] == count - 1:
                essence = logprobs[-1, task.subject[-1]]
                if first_essence is None:
                    first_essence = essence.detach()
                loss = loss + kl_factor * (essence.exp() * (essence - first_essence)).sum()
            if gamma is None or not contexts:
                continue
            index = torch.tensor([i for i, _ in contexts])
            last = torch.tensor([task.last_prompt[row] for _, row in contexts])
            key = subject[[row for _, row in contexts]]
            now = [a[index, :, last] for a in out.attentions]
            if step == 0:
                first_attention[start] = [a.detach() for a in now]
            for rows_now, before in zip(now, first_attention[start], strict=True):
                own_key = before[torch.arange(len(index)), :, key]
                held = rows_now[torch.arange(len(index)), :, key] > own_key.amax(1, keepdim=True)
                p, q = before + 1e-8, rows_now + 1e-8
                divergence = (p * (p.log() - q.log())).sum(-1)
                loss = loss + gamma * (divergence * held).sum() / n
        if step == steps - 1:
            break
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            limit = clamp_factor * initial.norm()
            if delta.norm() > limit:
                delta.mul_(limit / delta.norm())
    return delta.detach()


# --- patching ------------------------------------------------------------------------------


@torch.no_grad()
def last_rows(model: Any, ids: Ids) -> list[torch.Tensor]:
    """The last token's attention, ``[head, key]``, in each layer."""
    seen = Attention()
    with watched_attention(seen, None):
        model(torch.tensor([list(ids)]), use_cache=False)
    return [pattern[0, :, -1] for pattern in seen.patterns]


@torch.no_grad()
def plain_patch(
    model: Any, ids: Ids, source: Sequence[torch.Tensor], layer: int, head: int
) -> torch.Tensor:
    """Log-probabilities of the next token if one head's last row is the source's."""

    def change(
        y: int, pattern: torch.Tensor, values: torch.Tensor, own: torch.Tensor
    ) -> torch.Tensor:
        if y == layer:
            own = own.clone()
            own[0, head, -1] = source[layer][head] @ values[0, head]
        return own

    with watched_attention(Attention(), change):
        logits = model(torch.tensor([list(ids)]), use_cache=False).logits
    return logits[0, -1].log_softmax(-1)


# --- scoring -------------------------------------------------------------------------------


@torch.no_grad()
def plain_scores(model: Any, pairs: Sequence[tuple[Ids, Ids]]) -> list[list[float]]:
    """Log-probabilities of the tokens of targets behind prompts: one padded batch, all logits."""
    ids, mask = padded([[*prompt, *target] for prompt, target in pairs])
    logprobs = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.log_softmax(-1)
    return [
        [float(logprobs[row, len(prompt) - 1 + i, token]) for i, token in enumerate(target)]
        for row, (prompt, target) in enumerate(pairs)
    ]


# --- statistics ----------------------------------------------------------------------------


class _Enough(Exception):
    pass


@torch.no_grad()
def bare_forward(
    model: Any, layer: torch.nn.Module, documents: Sequence[Ids], per_batch: int
) -> None:
    """Forward passes up to and including one decoder layer, without any statistics.

    Documents of like length are batched, so that little is padding.
    """

    def stop(module: Any, args: Any, out: Any) -> None:
        raise _Enough

    handle = layer.register_forward_hook(stop)
    ordered = sorted(documents, key=len, reverse=True)
    try:
        while ordered:
            size = max(1, per_batch // len(ordered[0]))
            ids, mask = padded(ordered[:size])
            ordered = ordered[size:]
            try:
                model(input_ids=ids, attention_mask=mask, use_cache=False)
            except _Enough:
                continue
    finally:
        handle.remove()


@torch.no_grad()
def plain_covariance(
    model: Any, down: torch.nn.Module, documents: Sequence[Ids]
) -> tuple[torch.Tensor, int]:
    """Mean of k k^T over all tokens in float64, one document at a time."""
    total: torch.Tensor | None = None
    count = 0
    seen: list[torch.Tensor] = []
    handle = down.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    try:
        for document in documents:
            seen.clear()
            model(torch.tensor([list(document)]), use_cache=False)
            keys = seen[0][0].double()
            total = keys.T @ keys if total is None else total + keys.T @ keys
            count += len(document)
    finally:
        handle.remove()
    assert total is not None
    return total / count, count
