"""How fast the package is, against plain versions that recompute everything each time.

    python benchmarks/speed.py --model smollm2-135m --json speed.json

Each item is timed in pairs, plain and fast one after the other in this process, and the results
of the two are compared. The plain versions are those of ``tests/oracles.py``: whole padded
sequences and all logits, on the unwrapped Hugging Face model. ``floor_share`` is the time that
the arithmetic which is needed would take at this machine's measured rate of matrix products,
over the time that the package takes.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics as stats
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import oracles  # noqa: E402

import driftlens as dl  # noqa: E402
from driftlens.assets import asset  # noqa: E402
from driftlens.cases import BEGINNINGS  # noqa: E402
from driftlens.editing.configs import RomeConfig  # noqa: E402
from driftlens.editing.contexts import sample_contexts  # noqa: E402
from driftlens.editing.methods import resolve_config  # noqa: E402
from driftlens.editing.outcome import Resources, descent_of  # noqa: E402
from driftlens.editing.rome import rome  # noqa: E402
from driftlens.editing.statistics import IDENTITY, wikipedia_leads  # noqa: E402
from driftlens.editing.target import (  # noqa: E402
    Start,
    build_problem,
    down_projection_out,
    optimise_value,
    start,
)
from driftlens.generation import generate, generate_each  # noqa: E402
from driftlens.interventions import down_in_name  # noqa: E402
from driftlens.memory import kept_for_gradient  # noqa: E402
from driftlens.scoring import ask, score_questions  # noqa: E402

ITEMS = (
    "rome_edit", "sadr_overhead", "restrictions", "sweep", "scoring", "texts", "covariance",
    "memory",
)  # fmt: skip
RESTRICTIONS = {
    "SADR, as in the paper": dl.SADR(),
    "SADR, all heads": dl.SADR(heads="all"),
    "SADR, heads by drift": dl.SADR(heads="drift"),
    "SADR, reverse KL": dl.SADR(divergence="reverse_kl"),
    "SADR, JS": dl.SADR(divergence="js"),
    "SADR, all rows": dl.SADR(queries="all"),
    "KeyDrift": dl.KeyDrift(),
    "HiddenDrift": dl.HiddenDrift(),
    "EssenceKL": dl.EssenceKL(),
}
"""What a search can be held by."""
SWEEP = (
    "The Eiffel Tower is famous. Many people visit it every year. "
    "The Great Sphinx of Giza is located in the country of",
    "Egypt",
)
"""A prompt of 24 or so tokens, and its answer."""


class Bench:
    """A model twice, wrapped and not, and what is measured on it."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.model = dl.load_model(args.model)
        self.plain = unwrapped(self.model)
        self.facts = [json.loads(line) for line in asset("facts.jsonl").read_text().splitlines()]
        self.rate = matrix_rate()
        cfg = self.plain.config
        self.block = sum(p.numel() for p in self.plain.model.layers[0].parameters() if p.ndim == 2)
        self.unembedding = cfg.vocab_size * cfg.hidden_size
        self.n_layers = cfg.num_hidden_layers
        self.attention = 2 * cfg.num_attention_heads * self.model.info.d_head

    # --- floating-point operations ---

    def layer_ops(self, tokens: float, pairs: float) -> float:
        """Of one layer: matrices on tokens, and attention over (query, key) pairs."""
        return 2 * (self.block * tokens + self.attention * pairs)

    def unembed_ops(self, positions: float) -> float:
        """Of the unembedding."""
        return 2 * self.unembedding * positions

    def share(self, ops: float, seconds: float) -> float:
        """Of the time taken, what the arithmetic alone would take."""
        return ops / self.rate / seconds

    # --- items ---

    def requests(self) -> list[dl.EditRequest]:
        """Facts of the package, spread over its categories."""
        chosen = self.facts[:: max(1, len(self.facts) // self.args.pairs)][: self.args.pairs]
        return [
            dl.EditRequest(f["prompt"], f["subject"], f["target_new"], f["target_true"])
            for f in chosen
        ]

    def rome_edit(self) -> dict[str, Any]:
        """One whole edit: keys, value, update; the covariance is given to both."""
        search = self._search()
        contexts = sample_contexts(self.model)
        down = plain_down(self.plain, search.layer)
        pairs, errors, floors = [], [], []
        for request in self.requests():
            task = task_of(self.model, request, contexts)
            begun = self._begun(request, contexts, search)
            initial, key = begun.initial[0], begun.plain[down_in_name(search.layer)]

            def plain(
                search: RomeConfig = search,
                batch: int | None = None,
                task: Any = task,
                initial: Any = initial,
            ) -> torch.Tensor:
                return oracles.plain_value(
                    self.plain, down, task, initial, batch=batch, **numbers(search)
                )

            def fast(search: RomeConfig = search, request: dl.EditRequest = request) -> Any:
                resources = Resources(contexts, {search.layer: IDENTITY}, progress=False)
                (delta,) = rome(self.model, request, search, resources).deltas.values()
                return delta

            (before, expected), (after, made) = timed(plain), timed(fast)
            pairs.append((before, after))
            found = made.left @ (made.right.T @ key)  # what the update says about the plain key
            errors.append(float((found - expected).norm() / expected.norm()))
            floors.append(self.share(self._edit_ops(task, search), after))
            report("rome_edit", before, after, f"relative error {errors[-1]:.1e}")
        short = replace(search, steps=2)
        one_at_a_time = timed(lambda: plain(short, batch=1))[0] / timed(lambda: plain(short))[0]
        return {
            "ratio": stats.median(a / b for a, b in pairs),
            "ratios": [a / b for a, b in pairs],
            "plain_one_context_at_a_time_over_plain": one_at_a_time,
            "seconds": {"plain": [a for a, _ in pairs], "fast": [b for _, b in pairs]},
            "relative_error": max(errors),
            "equal": max(errors) <= 1e-5,
            "floor_share": stats.median(floors),
            "steps": search.steps,
            "contexts": len(contexts),
            "layer": search.layer,
            "profile": {
                "fast": where_time_goes(lambda: fast(short)),
                "plain": where_time_goes(lambda: plain(short)),
            },
        }

    def sadr_overhead(self) -> dict[str, Any]:
        """The same search with and without SADR."""
        search = self._search()
        contexts = sample_contexts(self.model)
        gamma, ratios, shares = 0.01, [], []
        descent = descent_of(search)
        for request in self.requests():
            begun = self._begun(request, contexts, search)
            penalty = (dl.SADR(gamma=gamma),)
            without, _ = timed(partial(optimise_value, begun, descent, (), False))
            with_it, value = timed(partial(optimise_value, begun, descent, penalty, False))
            ratios.append(with_it / without)
            task = task_of(self.model, request, contexts)
            shares.append(self.share(self._edit_ops(task, search), with_it))
            report("sadr_overhead", without, with_it, f"{with_it / without - 1:+.1%}")
        expected = oracles.plain_value(
            self.plain, plain_down(self.plain, search.layer), task, begun.initial[0],
            gamma=gamma, **numbers(search),
        )  # fmt: skip
        error = float((value.delta - expected).norm() / expected.norm())
        return {
            "ratio": stats.median(ratios),
            "ratios": ratios,
            "relative_error": error,
            "equal": error <= 1e-5,
            "floor_share": stats.median(shares),
        }

    def restrictions(self) -> dict[str, Any]:
        """The same search under each restriction, over without, one after another."""
        search = self._search()
        contexts = sample_contexts(self.model)
        descent = descent_of(search)
        ratios: dict[str, list[float]] = {name: [] for name in RESTRICTIONS}
        for request in self.requests():
            begun = self._begun(request, contexts, search)
            without, _ = timed(partial(optimise_value, begun, descent, (), False))
            for name, penalty in RESTRICTIONS.items():
                with_it, _ = timed(partial(optimise_value, begun, descent, (penalty,), False))
                ratios[name].append(with_it / without)
                report(f"restrictions: {name}", with_it, without, f"{search.steps} steps")
        medians = {name: stats.median(found) for name, found in ratios.items()}
        return {
            "ratio": max(medians.values()),
            "steps": search.steps,
            "medians": medians,
            "ratios": ratios,
            "equal": None,
            "floor_share": None,
        }

    def sweep(self) -> dict[str, Any]:
        """Every head of every layer; the plain one is timed on a sample of the patches.

        The sweep also patches every layer, every window of layers, and everything; each of its
        patches is compared with one pass over the whole sequence.
        """
        edit = self._edit()
        prompt, answer = SWEEP
        ids = self.model.tokens.encode(prompt).ids
        info = self.model.info
        token = self.model.tokens.target_ids(answer)[0]
        source = oracles.last_rows(self.plain, ids)
        places = [(y, x) for y in range(info.n_layers) for x in range(info.n_heads)]
        sample = places[:: max(1, len(places) // 12)]
        experiment = dl.PatchExperiment(self.model, edit, prompt, answer=answer, compare=[])
        ((name, delta),) = edit.deltas.items()
        weight = dict(self.plain.named_parameters())[name]
        original = weight.detach().clone()
        ratios, times, errors = [], [], []
        with torch.no_grad():
            weight.add_(delta.dense())
        try:
            for _ in range(self.args.pairs):
                before, rows = timed(
                    lambda: [
                        float(oracles.plain_patch(self.plain, ids, source, y, x)[token])
                        for y, x in sample
                    ]
                )
                after, found = timed(lambda: experiment.sweep(progress=False))
                per_patch = before / len(sample)
                patches = len(places) + info.n_layers + len(found.windows) + 1
                ratios.append(per_patch * patches / after)
                times.append(after)
                errors += [
                    abs(found.heads[y][x].logprob - row)
                    for (y, x), row in zip(sample, rows, strict=True)
                ]
                report("sweep", per_patch * patches, after, f"error {max(errors):.1e} nats")
        finally:
            with torch.no_grad():
                weight.copy_(original)
        lowest = [y for y, _ in places] + list(range(info.n_layers)) + [a for a, _ in found.windows]
        layers = sum(info.n_layers - y for y in [*lowest, 0])
        ops = self.layer_ops(layers, layers * len(ids)) + self.unembed_ops(len(lowest) + 1)
        return {
            "ratio": stats.median(ratios),
            "ratios": ratios,
            "patches": patches,
            "tokens": len(ids),
            "plain_patches_timed": len(sample),
            "largest_error_nats": max(errors),
            "equal": max(errors) <= 1e-4,
            "floor_share": self.share(ops, stats.median(times)),
            "profile": {
                "fast": where_time_goes(lambda: experiment.sweep(progress=False)),
                "plain": where_time_goes(
                    lambda: oracles.plain_patch(self.plain, ids, source, *places[0])
                ),
            },
        }

    def scoring(self) -> dict[str, Any]:
        """All prompts of one case, both targets."""
        ratios, errors, shares, sizes = [], [], [], []
        cases = self._cases()
        for groups in cases:
            questions = {
                name: [ask(self.model, prompt, target) for prompt in prompts for target in targets]
                for name, (prompts, targets) in groups.items()
            }
            flat = [q for group in questions.values() for q in group]

            def plain(questions: Any = questions) -> list[list[float]]:
                return [
                    row
                    for group in questions.values()
                    for row in oracles.plain_scores(
                        self.plain, [(q.prompt, q.target) for q in group]
                    )
                ]

            def fast(flat: Any = flat) -> Any:
                return score_questions(self.model, flat)

            fast()
            (before, expected), (after, found) = timed(plain), timed(fast)
            ratios.append(before / after)
            errors.append(
                max(
                    abs(a - b)
                    for row, score in zip(expected, found, strict=True)
                    for a, b in zip(row, score.token_logprobs, strict=True)
                )
            )
            nodes, depths = trie_of([q.ids for q in flat])
            predicted = len({(tuple(q.ids[: p + 1])) for q in flat for p in q.predicting})
            ops = self.layer_ops(nodes, depths) * self.n_layers + self.unembed_ops(predicted)
            shares.append(self.share(ops, after))
            sizes.append(len(flat))
            report("scoring", before, after, f"error {errors[-1]:.1e} nats, {len(flat)} pairs")
        return {
            "ratio": stats.median(ratios),
            "ratios": ratios,
            "pairs_per_case": sizes,
            "cases": "given file" if self.args.cases else "facts of the package",
            "largest_error_nats": max(errors),
            "equal": max(errors) <= 1e-4,
            "floor_share": stats.median(shares),
            "profile": {"fast": where_time_goes(fast), "plain": where_time_goes(plain)},
        }

    def texts(self) -> dict[str, Any]:
        """Texts of eight facts, each under its own edit, side by side, over one after another."""
        options: dict[str, Any] = {"covariance": "identity", "progress": False, "steps": 2}
        facts = self.facts[:: len(self.facts) // 8][:8]
        edits = [
            dl.edit(
                self.model, dl.EditRequest(f["prompt"], f["subject"], f["target_new"]), **options
            )
            for f in facts
        ]
        groups = [[words.format(f["subject"]) for words in BEGINNINGS] for f in facts]
        length = self.args.text_length

        def plain() -> list[list[str]]:
            found = []
            for edit, group in zip(edits, groups, strict=True):
                with edit.applied(self.model):
                    found.append(generate(self.model, group, length))
            return found

        def fast() -> list[list[str]]:
            return generate_each(self.model, groups, edits, length)

        ratios = []
        for _ in range(self.args.pairs):
            (before, expected), (after, found) = timed(plain), timed(fast)
            ratios.append(before / after)
            report("texts", before, after, f"{len(edits)} x {len(BEGINNINGS)} texts")
        return {
            "ratio": stats.median(ratios),
            "ratios": ratios,
            "facts": len(edits),
            "texts_of_a_fact": len(BEGINNINGS),
            "length": length,
            "equal": found == expected,
            "floor_share": None,
        }

    def covariance(self) -> dict[str, Any]:
        """Tokens per second, over those of a forward pass that stops after the same layer."""
        search = self._search()
        layer = self.plain.model.layers[search.layer]
        texts = wikipedia_leads()[: self.args.documents]
        documents = [self.model.tokens.encode(text).ids[:1024] for text in texts]
        tokens = sum(map(len, documents))

        def bare() -> None:
            oracles.bare_forward(self.plain, layer, documents, 4096)

        def fast() -> Any:
            return dl.key_covariance(
                self.model, search.layer, texts, cache=False, progress=False, max_tokens=tokens
            )

        self.model.fingerprint()
        ratios, times = [], []
        for _ in range(self.args.pairs):
            before, _ = timed(bare)
            after, found = timed(fast)
            ratios.append(before / after)
            times.append(after)
            report("covariance", before, after, f"{tokens / after:.0f} tokens/s")
        few = documents[:20]
        expected, _ = oracles.plain_covariance(
            self.plain, plain_down(self.plain, search.layer), few
        )
        found = dl.key_covariance(self.model, search.layer, texts[:20], cache=False, progress=False)
        assert found.matrix is not None
        error = float((found.matrix.double() - expected).norm() / expected.norm())
        width = self.model.down_projection(search.layer).d_mlp
        hidden = self.plain.config.hidden_size
        pairs = sum(len(d) * (len(d) + 1) / 2 for d in documents)
        ops = (
            self.layer_ops(tokens, pairs) * (search.layer + 1)
            - 2 * width * hidden * tokens  # the last down-projection is not needed
            + width * (width + 1) * tokens
        )
        return {
            "ratio": stats.median(ratios),
            "ratios": ratios,
            "tokens": tokens,
            "tokens_per_second": tokens / stats.median(times),
            "layer": search.layer,
            "relative_error": error,
            "equal": error <= 1e-5,
            "floor_share": self.share(ops, stats.median(times)),
            "profile": {"fast": where_time_goes(fast), "plain": where_time_goes(bare)},
        }

    def memory(self) -> dict[str, Any]:
        """Measured in a process of its own; see :func:`measure_memory`."""
        command = [sys.executable, __file__, "--model", self.args.model, "--measure-memory"]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        result: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
        print(f"memory: {result}", flush=True)
        return result

    # --- parts ---

    def _search(self) -> RomeConfig:
        overrides = {"steps": self.args.steps, "early_stop_loss": -1.0}
        return resolve_config(self.model, "rome", None, overrides)

    def _begun(self, request: dl.EditRequest, contexts: Any, search: RomeConfig) -> Start:
        """What is known before the search."""
        place = down_projection_out(self.model, search.layer)
        record = [down_in_name(search.layer)]
        problem = build_problem(self.model, request, contexts)
        return start(self.model, request, problem, search.layer, [place], record)

    def _edit_ops(self, task: oracles.ValueTask, search: RomeConfig) -> float:
        """One whole pass for what is kept, then the layers above, suffixes only, both ways."""
        rows = list(zip(task.rows, task.subject, strict=True))
        whole = sum(len(row) for row, _ in rows)
        whole_pairs = sum(len(row) * (len(row) + 1) / 2 for row, _ in rows)
        suffix = sum(len(row) - at for row, at in rows)
        pairs = sum(len(row) * (len(row) + 1) / 2 - at * (at + 1) / 2 for row, at in rows)
        above = self.n_layers - search.layer - 1
        scored = len(task.last_prompt) * len(task.target) + 1
        step = self.layer_ops(suffix, pairs) * above + self.unembed_ops(scored)
        return self.layer_ops(whole, whole_pairs) * self.n_layers + (2 * search.steps - 1) * step

    def _edit(self) -> dl.Edit:
        fact = next(f for f in self.facts if f["id"] == "eiffel-tower-city")
        request = dl.EditRequest(fact["prompt"], fact["subject"], fact["target_new"])
        options: dict[str, Any] = {"covariance": "identity", "progress": False}
        return dl.edit(self.model, request, **options)

    def _cases(self) -> list[dict[str, tuple[list[str], list[str]]]]:
        """Prompts and both targets, by group."""
        if self.args.cases:
            records = json.loads(Path(self.args.cases).read_text())
            chosen = [r for r in records if "l-neighbor" in r][: self.args.pairs]
            return [case_of_record(record) for record in chosen]
        step = max(1, len(self.facts) // self.args.pairs)
        return [case_of_fact(fact) for fact in self.facts[::step][: self.args.pairs]]


def case_of_fact(fact: dict[str, Any]) -> dict[str, tuple[list[str], list[str]]]:
    """The paper's groups for one of the package's facts."""
    targets = [fact["target_new"], fact["target_true"]]
    edit = fact["prompt"].replace("{}", fact["subject"])
    near = [n["prompt"] for n in fact["neighbors"]]
    return {
        "edit": ([edit], targets),
        "paraphrases": (fact["paraphrases"], targets),
        "neighbours": (near, targets),
        "distract neighbours": ([f"{edit} {fact['target_new']}. {p}" for p in near], targets),
        "relation": ([r["prompt"] for r in fact["relations"]], targets),
    }


def case_of_record(record: dict[str, Any]) -> dict[str, tuple[list[str], list[str]]]:
    """The same for a record of the paper's benchmark data; it has no relation prompts."""
    rewrite = record["requested_rewrite"]
    targets = [rewrite["target_new"], rewrite["target_true"]]
    edit, near = rewrite["prompt"].strip(), [p.strip() for p in record["l-neighbor"]["prompts"]]
    return {
        "edit": ([edit], targets),
        "paraphrases": ([p.strip() for p in record["p-paraphrase"]["prompts"]], targets),
        "neighbours": (near, targets),
        "distract neighbours": ([f"{edit} {targets[0]}. {p}" for p in near], targets),
    }


def trie_of(rows: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Distinct prefixes of the rows, and the sum of their lengths."""
    nodes = {tuple(row[: i + 1]) for row in rows for i in range(len(row))}
    return len(nodes), sum(map(len, nodes))


def task_of(model: dl.LensModel, request: dl.EditRequest, contexts: Any) -> oracles.ValueTask:
    """The oracle's task: the same tokens and positions."""
    p = build_problem(model, request, contexts)
    return oracles.ValueTask(p.rows, p.subject, p.last_prompt, p.target)


def numbers(search: RomeConfig) -> dict[str, Any]:
    """Hyperparameters that the oracle takes."""
    names = ("steps", "lr", "weight_decay", "clamp_factor", "kl_factor")
    return {name: getattr(search, name) for name in names}


def plain_down(plain: Any, layer: int) -> torch.nn.Module:
    """The edited matrix of the unwrapped model."""
    module: torch.nn.Module = plain.model.layers[layer].mlp.down_proj
    return module


def unwrapped(model: dl.LensModel) -> Any:
    """A second copy of the same weights, which TransformerLens never touched."""
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_config(
        model.hf_model.config, attn_implementation="eager"
    ).eval()
    ours = model.weights.parameters
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(ours[name])
    return plain


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what came out."""
    gc.collect()
    finish()
    begun = time.perf_counter()
    found = run()
    finish()
    return time.perf_counter() - begun, found


def finish() -> None:
    """Wait for what a GPU was given, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def report(item: str, plain: float, fast: float, more: str) -> None:
    print(f"{item}: {plain:.2f} s, {fast:.2f} s, ratio {plain / fast:.2f}; {more}", flush=True)


def matrix_rate() -> float:
    """Floating-point operations per second of large float32 matrix products, at their best."""
    size = 1536
    a, b = torch.randn(size, size), torch.randn(size, size)
    torch.mm(a, b)
    return max(2 * size**3 / timed(lambda: torch.mm(a, b))[0] for _ in range(30))


def where_time_goes(run: Callable[[], Any]) -> dict[str, float]:
    """Shares of one run's time, under torch's profiler."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        seconds, _ = timed(run)
    products = others = 0.0
    for event in seen.key_averages():
        if event.key in ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm"):
            products += event.self_cpu_time_total / 1e6
        elif event.key.startswith("aten::"):
            others += event.self_cpu_time_total / 1e6
    return {
        "matrix products": products / seconds,
        "other tensor operations": others / seconds,
        "Python, autograd and hooks": max(0.0, 1 - (products + others) / seconds),
    }


# --- memory --------------------------------------------------------------------------------


def measure_memory(name: str) -> dict[str, Any]:
    """Peak resident memory of editing and comparing, over the model and its activations.

    Activations are what is kept of the first pass (keys and values, what enters) and what one
    step of the value search keeps for its gradient, counted with
    ``torch.autograd.graph.saved_tensors_hooks``, parameters left out.
    """
    model = dl.load_model(name)
    parameters = list(model.hf_model.parameters())
    model_bytes = sum(p.numel() * p.element_size() for p in parameters)
    contexts = sample_contexts(model)
    facts = [json.loads(line) for line in asset("facts.jsonl").read_text().splitlines()]
    fact = next(f for f in facts if f["id"] == "eiffel-tower-city")
    request = dl.EditRequest(fact["prompt"], fact["subject"], fact["target_new"])
    for parameter in parameters:
        float(parameter.detach().sum())  # read every page of the weights once
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    loaded = memory_of("VmRSS")
    config = resolve_config(model, "rome", None, {"early_stop_loss": -1.0, "steps": 3})
    edit = dl.edit(model, request, config=config, penalty=dl.SADR(), covariance="identity",
                   progress=False)  # fmt: skip
    prompt = fact["distractors"][0]["prompt"]
    answer = fact["distractors"][0]["answer"]
    dl.measure_drift(model, edit, [prompt])
    dl.sweep_attention(model, edit, prompt, answer=answer, progress=False)
    dl.score(model, prompt, [answer])
    with edit.applied(model):
        dl.score(model, prompt, [answer])
    peak = memory_of("VmHWM")
    # Only now: looking at what is saved keeps it alive for longer.
    begun = start(model, request, build_problem(model, request, contexts), config.layer,
                  [down_projection_out(model, config.layer)])  # fmt: skip
    one_step = descent_of(resolve_config(model, "rome", config, {"steps": 1}))
    assert begun.reused is not None
    plain, held = (
        kept_for_gradient(partial(optimise_value, begun, one_step, penalties, False), parameters)
        for penalties in ((), (dl.SADR(),))
    )
    activations = plain + begun.reused.kept_bytes
    del begun
    ratio = (model_bytes + peak - loaded) / (model_bytes + activations)
    return {
        "ratio": ratio,
        "model_bytes": model_bytes,
        "activation_bytes": activations,
        "extra_bytes": peak - loaded,
        "step_bytes": {"none": plain, "sadr": held},
        "equal": None,
        "floor_share": None,
    }


def memory_of(field: str) -> int:
    """Bytes of this process, from the kernel (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"The kernel does not tell {field}.")


ROWS = {
    "rome_edit": "one ROME edit, over a padded loop",
    "sadr_overhead": "the same search with SADR, over without",
    "sweep": "a sweep over heads and layers, over a pass for each patch",
    "scoring": "scoring the prompts of one fact, over a padded batch for each group",
    "texts": "texts of eight facts side by side, over one fact after another",
    "covariance": "tokens per second of a key covariance, over a bare forward pass",
    "memory": "peak memory of editing and comparing, over model and activations",
}


def table(results: Sequence[dict[str, Any]]) -> str:
    """Results of several models as Markdown: ratio, and share of the floor in brackets."""
    names = [result["model"]["name"] for result in results]
    lines = [f"| | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    steps = " | ".join(str(result["rome_edit"]["steps"]) for result in results)
    lines.append(f"| steps of the edits below | {steps} |")
    for item, words in ROWS.items():
        cells = []
        for result in results:
            found = result[item]
            share = found["floor_share"]
            cells.append(f"{found['ratio']:.2f}" + (f" ({share:.0%})" if share else ""))
        lines.append(f"| {words} | {' | '.join(cells)} |")
    return "\n".join(lines)


def restrictions_table(results: Sequence[dict[str, Any]]) -> str:
    """Time of a search under each restriction, over without, as Markdown."""
    names = [result["model"]["name"] for result in results]
    lines = [f"| restriction | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for restriction in RESTRICTIONS:
        cells = [f"{result['restrictions']['medians'][restriction]:.2f}" for result in results]
        lines.append(f"| {restriction} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default="smollm2-135m", help="a bundled name or a folder")
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--pairs", type=int, default=5, help="paired runs of each item")
    parser.add_argument("--steps", type=int, default=20, help="steps of a value search")
    parser.add_argument("--text-length", type=int, default=30, help="tokens of a text")
    parser.add_argument("--documents", type=int, default=120, help="texts for the covariance")
    parser.add_argument("--cases", help="the paper's benchmark file, for scoring")
    parser.add_argument("--only", nargs="+", choices=ITEMS, default=list(ITEMS))
    parser.add_argument("--measure-memory", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure_memory:
        print(json.dumps(measure_memory(args.model)))
        return
    bench = Bench(args)
    result: dict[str, Any] = {
        "model": bench.model.info.to_dict(),
        "torch": torch.__version__,
        "matrix_product_rate": bench.rate,
        "pairs": args.pairs,
    }
    if args.json and args.json.is_file():
        result = {**json.loads(args.json.read_text()), **result}
    for item in args.only:
        # Other users of a shared machine may have slowed it before: the best rate counts.
        bench.rate = result["matrix_product_rate"] = max(bench.rate, matrix_rate())
        result[item] = {**getattr(bench, item)(), "threads": torch.get_num_threads()}
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(result, indent=1) + "\n")
    for item in args.only:
        found = result[item]
        share = f"{found['floor_share']:.0%}" if found["floor_share"] else "-"
        print(f"{item}: ratio {found['ratio']:.2f}, equal {found['equal']}, floor share {share}")
        if "profile" in found:
            parts = ", ".join(f"{k} {v:.0%}" for k, v in found["profile"]["fast"].items())
            print(f"  of its time: {parts}")


if __name__ == "__main__":
    main()
