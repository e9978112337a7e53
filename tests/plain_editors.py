"""MEMIT, PMET, AlphaEdit and fine-tuning as plain as can be, written from their papers.

Nothing of the package is used: an unwrapped Hugging Face model, its raw tokenizer, forward
hooks, torch.optim.Adam, explicit inverses, one context at a time, whole sequences. What they
return are changes ``[d_model, d_mlp]`` by layer, in float64.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from scipy.optimize import brentq


@dataclass(frozen=True)
class Fact:
    """One fact to edit."""

    prompt: str
    subject: str
    target: str

    @property
    def text(self) -> str:
        return self.prompt.replace("{}", self.subject)


@dataclass(frozen=True)
class Search:
    """Hyperparameters of a value search."""

    steps: int
    lr: float
    weight_decay: float
    clamp_factor: float
    kl_factor: float
    pmet: bool = False
    nll_factor: float = 1.0
    early_stop_loss: float = -1.0


def layers_of(model: Any) -> Any:
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def down_of(model: Any, layer: int) -> Any:
    mlp = layers_of(model)[layer].mlp
    return next(getattr(mlp, n) for n in ("c_proj", "fc_out", "down_proj") if hasattr(mlp, n))


def attention_of(model: Any, layer: int) -> Any:
    block = layers_of(model)[layer]
    return block.attn if hasattr(block, "attn") else block.self_attn


def first(out: Any) -> torch.Tensor:
    return out[0] if isinstance(out, tuple) else out


@contextmanager
def hooked(module: Any, function: Any) -> Any:
    handle = module.register_forward_hook(function)
    try:
        yield
    finally:
        handle.remove()


class Texts:
    """Token ids and the position of the subject's last token."""

    def __init__(self, tokenizer: Any, subject: str) -> None:
        self.tokenizer, self.subject = tokenizer, subject

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text)["input_ids"])

    def position(self, text: str) -> int:
        upto = text[: text.rindex(self.subject) + len(self.subject)]
        return len(self.ids(upto)) - 1


def read(model: Any, module: Any, ids: list[int], at: int, inputs: bool = False) -> torch.Tensor:
    """What goes into or comes out of a module at one position."""
    seen = {}

    def look(_: Any, args: Any, out: Any) -> None:
        seen["it"] = (args[0] if inputs else first(out))[0, at].detach().clone()

    with torch.no_grad(), hooked(module, look):
        model(torch.tensor([ids]))
    return seen["it"]


def search_vectors(
    model: Any,
    tokenizer: Any,
    fact: Fact,
    templates: Sequence[str],
    modules: Sequence[Any],
    search: Search,
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[dict[str, float]]]:
    """h_0 and delta for each module, and the trace."""
    texts = Texts(tokenizer, fact.subject)
    bare = texts.ids(fact.text)
    target = texts.ids(f"{fact.text} {fact.target}")[len(bare) :]
    initial = [read(model, module, bare, texts.position(fact.text)) for module in modules]
    deltas = [torch.zeros_like(vector, requires_grad=True) for vector in initial]
    adam = torch.optim.Adam(deltas, lr=search.lr)

    def logprobs(ids: list[int], at: int) -> torch.Tensor:
        def adding(delta: torch.Tensor) -> Any:
            def add(_: Any, args: Any, out: Any) -> Any:
                new = first(out).clone()
                new[0, at] = new[0, at] + delta
                return (new, *out[1:]) if isinstance(out, tuple) else new

            return add

        with ExitStack() as stack:
            for module, delta in zip(modules, deltas, strict=True):
                stack.enter_context(hooked(module, adding(delta)))
            return torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)

    essence = f"{fact.subject} is a"
    before: torch.Tensor | None = None
    trace = []
    for step in range(search.steps):
        nll, greedy = torch.zeros((), dtype=torch.float64), True
        for template in templates:
            text = template.replace("{}", fact.text)
            ids = texts.ids(text)
            rows = logprobs([*ids, *target[:-1]], texts.position(text))
            for i, token in enumerate(target):
                row = rows[len(ids) - 1 + i]
                nll = nll - row[token] / len(target) / len(templates)
                greedy = greedy and bool(row[token] >= row.max())
        now = logprobs(texts.ids(essence), texts.position(essence))[texts.position(essence)]
        before = now.detach() if before is None else before
        kl = search.kl_factor * (now.exp() * (now - before)).sum()
        ratio = sum(d.norm() / h.norm() ** 2 for d, h in zip(deltas, initial, strict=True))
        factor = search.nll_factor * (0.1 if search.pmet and greedy else 1.0)
        loss = factor * nll + kl + search.weight_decay * ratio
        trace.append({"loss": float(loss.detach()), "greedy": float(greedy)})
        if step == search.steps - 1 or float(loss.detach()) < search.early_stop_loss:
            break
        if search.pmet and greedy and float(kl.detach()) <= 0.01:
            break
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            for d, h in zip(deltas, initial, strict=True):
                limit = search.clamp_factor * h.norm()
                if d.norm() > limit:
                    d.mul_(limit / d.norm())
    return initial, [d.detach() for d in deltas], trace


def mean_key(
    model: Any, tokenizer: Any, fact: Fact, templates: Sequence[str], layer: int
) -> torch.Tensor:
    """Half of the prompt alone, half of the mean over the other contexts."""
    texts = Texts(tokenizer, fact.subject)
    plain, others = [], []
    for template in templates:
        text = template.replace("{}", fact.text)
        key = read(model, down_of(model, layer), texts.ids(text), texts.position(text), inputs=True)
        (plain if template == "{}" else others).append(key)
    return (torch.stack(plain).mean(0) + torch.stack(others).mean(0)) / 2


def add_change(model: Any, layer: int, change: torch.Tensor) -> None:
    """Change a down-projection for good."""
    weight = down_of(model, layer).weight
    with torch.no_grad():
        weight.add_((change.T if weight.shape != change.shape else change).to(weight.dtype))


class Stream:
    """The residual stream after a layer, with a norm before it or none (MEMIT, AlphaEdit)."""

    def __init__(self, model: Any, tokenizer: Any, facts: Sequence[Fact], top: int) -> None:
        self.model, self.top = model, top
        self.read = lambda module: _now(model, tokenizer, facts, module).double()
        self.norm = getattr(layers_of(model)[top], "post_feedforward_layernorm", None)
        self.searched = layers_of(model)[top] if self.norm is None else down_of(model, top)

    def aim(self, wanted: torch.Tensor) -> torch.Tensor:
        """What the stream is to be, given what was searched, facts as columns."""
        if self.norm is None:
            return wanted.double()
        now, said = self.read(layers_of(self.model)[self.top]), self.read(self.searched)
        norm = copy.deepcopy(self.norm).double()
        return now - norm(said.T).T + norm(wanted.double().T).T

    def write(self, layer: int, aim: torch.Tensor, share: float) -> torch.Tensor:
        """What a layer's down-projection is to say more, facts as columns."""
        residual = (aim - self.read(layers_of(self.model)[self.top])) / share
        norm = getattr(layers_of(self.model)[layer], "post_feedforward_layernorm", None)
        if norm is None:
            return residual
        said = self.read(down_of(self.model, layer))
        norm = copy.deepcopy(norm).double()
        gain = norm(torch.ones(1, len(said), dtype=torch.float64))[0]
        target = norm(said.T).T + residual
        found = []
        for t, before in zip(target.T, said.T, strict=True):

            def direction(m: float, t: torch.Tensor = t) -> torch.Tensor:
                return gain * t / (gain**2 + m)

            def surplus(m: float) -> float:
                return float(direction(m).square().mean()) - 1

            m = brentq(surplus, 0, 1e6, xtol=1e-15) if surplus(0) > 0 else 0.0
            found.append(direction(m) / direction(m).norm() * before.norm() - before)
        return torch.stack(found, 1)


def plain_memit(
    model: Any,
    tokenizer: Any,
    facts: Sequence[Fact],
    templates: Sequence[str],
    layers: Sequence[int],
    covariances: dict[int, torch.Tensor],
    weight: float,
    search: Search,
) -> dict[int, torch.Tensor]:
    """MEMIT; PMET if ``search.pmet``."""
    model = copy.deepcopy(model)
    top = layers[-1]
    stream = Stream(model, tokenizer, facts, top)
    said = down_of(model, top) if search.pmet else stream.searched
    modules = [said, *([attention_of(model, top)] if search.pmet else [])]
    wanted = []
    for fact in facts:
        initial, deltas, _ = search_vectors(model, tokenizer, fact, templates, modules, search)
        wanted.append(initial[0] + deltas[0])
    values = torch.stack(wanted, 1)
    aim = values if search.pmet else stream.aim(values)
    changes = {}
    for index, layer in enumerate(layers):
        keys = torch.stack([mean_key(model, tokenizer, f, templates, layer) for f in facts], 1)
        left = len(layers) - index
        if search.pmet:
            residual = (aim - _now(model, tokenizer, facts, said)) / math.sqrt(left)
        else:
            residual = stream.write(layer, aim, left)
        keys, residual = keys.double(), residual.double()
        inverse = torch.linalg.inv(weight * covariances[layer] + keys @ keys.T)
        changes[layer] = residual @ keys.T @ inverse
        add_change(model, layer, changes[layer])
    return changes


def plain_alphaedit(
    model: Any,
    tokenizer: Any,
    batches: Sequence[Sequence[Fact]],
    templates: Sequence[str],
    layers: Sequence[int],
    covariances: dict[int, torch.Tensor],
    threshold: float,
    ridge: float,
    search: Search,
) -> list[dict[int, torch.Tensor]]:
    """AlphaEdit's own, unsymmetric system, for one batch of facts after another."""
    model = copy.deepcopy(model)
    projections, sums = {}, {}
    for layer in layers:
        u, s, _ = torch.linalg.svd(covariances[layer].double())
        projections[layer] = u[:, s < threshold] @ u[:, s < threshold].T
        sums[layer] = torch.zeros_like(projections[layer])
    found = []
    for facts in batches:
        stream = Stream(model, tokenizer, facts, layers[-1])
        place = [stream.searched]
        wanted = []
        for fact in facts:
            initial, deltas, _ = search_vectors(model, tokenizer, fact, templates, place, search)
            wanted.append(initial[0] + deltas[0])
        aim = stream.aim(torch.stack(wanted, 1))
        changes = {}
        for index, layer in enumerate(layers):
            keys = torch.stack([mean_key(model, tokenizer, f, templates, layer) for f in facts], 1)
            residual = stream.write(layer, aim, len(layers) - index)
            keys, p = keys.double(), projections[layer]
            eye = torch.eye(len(p), dtype=torch.float64)
            system = p @ (keys @ keys.T + sums[layer]) + ridge * eye
            changes[layer] = torch.linalg.solve(system, p @ keys @ residual.T).T
            add_change(model, layer, changes[layer])
        for layer in layers:
            keys = torch.stack([mean_key(model, tokenizer, f, templates, layer) for f in facts], 1)
            sums[layer] += keys.double() @ keys.double().T
        found.append(changes)
    return found


def _now(model: Any, tokenizer: Any, facts: Sequence[Fact], module: Any) -> torch.Tensor:
    """What a module says at the subjects, facts as columns."""
    found = []
    for fact in facts:
        texts = Texts(tokenizer, fact.subject)
        found.append(read(model, module, texts.ids(fact.text), texts.position(fact.text)))
    return torch.stack(found, 1)


def plain_fine_tuning(
    model: Any,
    tokenizer: Any,
    facts: Sequence[Fact],
    layer: int,
    steps: int,
    lr: float,
    teacher_forced: bool,
    norm_constraint: float | None,
    stop_loss: float,
    weight_decay: float = 0.0,
) -> list[torch.Tensor]:
    """New minus old of the weight (and bias) of one down-projection, trained in place."""
    model = copy.deepcopy(model)
    down = down_of(model, layer)
    trained = [down.weight, *([down.bias] if getattr(down, "bias", None) is not None else [])]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    old = [p.detach().clone() for p in trained]
    adam = torch.optim.Adam(trained, lr=lr, weight_decay=weight_decay)
    for step in range(steps):
        losses = []
        for fact in facts:
            texts = Texts(tokenizer, fact.subject)
            ids = texts.ids(fact.text)
            target = texts.ids(f"{fact.text} {fact.target}")[len(ids) :]
            rows = torch.log_softmax(model(torch.tensor([[*ids, *target[:-1]]])).logits[0], -1)
            at = [len(ids) - 1 + (i if teacher_forced else 0) for i in range(len(target))]
            losses.append(-sum(rows[p, t] for p, t in zip(at, target, strict=True)) / len(target))
        loss = sum(losses) / len(losses)
        if step == steps - 1 or float(loss.detach()) < stop_loss:
            break
        adam.zero_grad()
        loss.backward()
        adam.step()
        if norm_constraint is not None:
            with torch.no_grad():
                for parameter, start in zip(trained, old, strict=True):
                    parameter.copy_(
                        parameter.clamp(min=start - norm_constraint, max=start + norm_constraint)
                    )
    return [p.detach() - o for p, o in zip(trained, old, strict=True)]
