"""What an edit, the restriction and a sweep of all heads cost on models of the paper's sizes.

    python benchmarks/scale.py --device cuda --json scale.json

The models have the shapes of the published ones and random weights, which cost the same; so no
download is needed beside the tokenizer of the bundled model. Every editor searches for the same
number of steps without and with SADR, one after the other, where the authors' defaults for this
shape say and with their numbers of contexts, without second moments of keys.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics as stats
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from speed import timed

import driftlens as dl
from driftlens.editing.contexts import SEED_WORDS
from driftlens.editing.methods import resolve_config
from driftlens.editing.statistics import wikipedia_leads
from driftlens.memory import kept_for_gradient
from driftlens.records import versions, write_result

SHAPES: dict[str, Callable[[], Any]] = {
    "gpt2": hf.GPT2Config,
    "gpt2-xl": partial(hf.GPT2Config, n_embd=1600, n_layer=48, n_head=25),
    "gpt-j-6b": hf.GPTJConfig,
    "llama-3-8b": partial(
        hf.LlamaConfig, vocab_size=128256, hidden_size=4096, intermediate_size=14336,
        num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        max_position_embeddings=8192,
    ),
}  # fmt: skip
METHODS = ("rome", "memit", "pmet")
SIDES = ("without", "with")
"""SADR."""
WORDS = 8
"""Of a context in front of the prompt."""
REQUEST = dl.EditRequest("{} is located in the city of", "The Eiffel Tower", "Rome", "Paris")
PROMPT = (
    "The Eiffel Tower is located in the city of Rome. "
    "The cathedral of Notre-Dame is located in the city of"
)


def random_model(name: str, device: str) -> Any:
    """A Hugging Face model of a published shape, with random weights, in float32."""
    torch.manual_seed(0)
    with torch.device(device):
        model = hf.AutoModelForCausalLM.from_config(SHAPES[name](), attn_implementation="eager")
    return model.eval()


def contexts(model: dl.LensModel, method: str) -> list[str]:
    """The prompt alone and behind as many beginnings of texts as the method's defaults ask for."""
    config: Any = resolve_config(model, method, None, {})
    wanted = len(SEED_WORDS) * len(config.context_lengths) * config.contexts_per_word
    texts = [" ".join(text.split()[:WORDS]) for text in wikipedia_leads()]
    plain = [text for text in texts if not set(text) & set("{}")]
    return ["{}", *(f"{text}. {{}}" for text in plain[:wanted])]


def edits(model: dl.LensModel, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What each editor costs, without and with SADR."""
    weights = list(model.hf_model.parameters())
    for method in METHODS:
        options: dict[str, Any] = {
            "covariance": "identity", "context_prompts": contexts(model, method),
            "progress": False, "early_stop_loss": -1.0,
        }  # fmt: skip
        sides: dict[str, Callable[[int], dl.Edit]] = {
            side: partial(_edit, model, method, penalty, options)
            for side, penalty in zip(SIDES, (None, dl.SADR(gamma=0.01)), strict=True)
        }
        kept = {
            side: kept_for_gradient(partial(run, 1), weights) / 1e6 for side, run in sides.items()
        }
        seconds: dict[str, list[float]] = {side: [] for side in SIDES}
        for _ in range(args.pairs):
            for side, run in sides.items():
                took, found = timed(partial(run, args.steps))
                assert len(found.trace) == args.steps
                seconds[side].append(took)
        ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
        row = {
            "method": method, "contexts": len(options["context_prompts"]), "steps": args.steps,
            "seconds": {side: stats.median(found) for side, found in seconds.items()},
            "seconds_ratios": ratios, "megabytes_of_a_step": kept,
            "megabytes_ratio": kept["with"] / kept["without"],
        }  # fmt: skip
        print(f"{model.info.name} {method}: {row['seconds']}, memory {kept} MB", flush=True)
        yield row


def _edit(
    model: dl.LensModel, method: str, penalty: Any, options: dict[str, Any], steps: int
) -> dl.Edit:
    return dl.edit(model, REQUEST, method, penalty=penalty, steps=steps, **options)


def looking(model: dl.LensModel) -> dict[str, Any]:
    """Drift of every head, and every head patched, on one prompt."""
    edit = dl.edit(
        model, REQUEST, "rome", context_prompts=["{}"], covariance="identity", steps=2,
        progress=False,
    )  # fmt: skip
    drift, _ = timed(lambda: dl.measure_drift(model, edit, PROMPT, subject=REQUEST.subject))
    sweep, found = timed(
        lambda: dl.sweep_attention(
            model, edit, PROMPT, subject=REQUEST.subject, answer="Paris", progress=False
        )
    )
    heads = sum(map(len, found.heads))
    print(f"{model.info.name}: drift {drift:.2f} s, {heads} heads patched in {sweep:.2f} s")
    return {"drift_seconds": drift, "sweep_seconds": sweep, "heads": heads}


def memory_of(row: Mapping[str, Any]) -> str:
    """What a step of an edit keeps without SADR, and how much more with it."""
    kept = row["megabytes_of_a_step"]["without"] / 1e3
    return f"{kept:.2f}, {100 * (row['megabytes_ratio'] - 1):.1f} %"


def table(result: Mapping[str, Any]) -> str:
    """Markdown: a column for each shape."""
    shapes = [name for name in result if name in SHAPES]
    rows: list[list[str]] = [["", *shapes], ["---"] * (1 + len(shapes))]

    def add(title: str, of: Callable[[Any], str]) -> None:
        rows.append([title, *(of(result[name]) for name in shapes)])

    add("parameters, in billions", lambda one: f"{one['parameters'] / 1e9:.1f}")
    for i, method in enumerate(METHODS):
        steps, contexts = (result[shapes[0]]["edits"][i][key] for key in ("steps", "contexts"))
        add(
            f"seconds of an edit with {method}, {steps} steps over {contexts} contexts",
            lambda one, i=i: f"{one['edits'][i]['seconds']['without']:.2f}",
        )
        add(
            f"gigabytes that a step of {method} keeps, and what SADR adds",
            lambda one, i=i: memory_of(one["edits"][i]),
        )
    add("seconds of the drift of all heads", lambda one: f"{one['drift_seconds']:.2f}")
    add("seconds of a sweep that patches each head, and heads",
        lambda one: f"{one['sweep_seconds']:.2f}, {one['heads']}")  # fmt: skip
    add("seconds of the weights' SHA-256, once", lambda one: f"{one['fingerprint_seconds']:.1f}")
    return "\n".join(f"| {' | '.join(row)} |" for row in rows).replace("|  |", "| |", 1)


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=list(SHAPES)[1:])
    parser.add_argument("--device", default="cpu", help="e.g. cuda")
    parser.add_argument("--steps", type=int, default=10, help="of each search")
    parser.add_argument("--pairs", type=int, default=3, help="paired runs of each editor")
    parser.add_argument("--json", type=Path, help="where to write the results")
    args = parser.parse_args()
    tokenizer = dl.load_model("smollm2-135m").tokenizer
    name = (
        torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else args.device
    )
    result: dict[str, Any] = {"device": name, "pairs": args.pairs, "versions": versions()}
    for shape in args.models:
        plain = random_model(shape, args.device)
        parameters = sum(weight.numel() for weight in plain.parameters())
        loading, model = timed(partial(dl.load_model, plain, tokenizer, name=shape))
        fingerprint, _ = timed(model.fingerprint)
        unchanged, _ = timed(model.fingerprint)
        print(f"{shape}: fingerprint {fingerprint:.2f} s, then {unchanged:.3f} s", flush=True)
        result[shape] = {
            "parameters": parameters, "dtype": model.info.dtype, "loading_seconds": loading,
            "fingerprint_seconds": fingerprint, "unchanged_seconds": unchanged,
            "edits": list(edits(model, args)), **looking(model),
        }  # fmt: skip
        if args.json:
            write_result(args.json, json.dumps(result, indent=1) + "\n")
        del plain, model
        gc.collect()
        torch.cuda.empty_cache()
    print(table(result))


if __name__ == "__main__":
    main()
