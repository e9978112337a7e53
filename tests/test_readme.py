"""The README's Python runs as it stands, and so does the quickstart that other tools rely on."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from documents import REPOSITORY, flowing, main_rates, result_rows, run_python

import driftlens as dl
from driftlens.bench.results import ALLOWED
from driftlens.cases import METRICS
from driftlens.experiments import tables
from driftlens.experiments.reproduce.editors import PAPERS

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


@pytest.mark.real
def test_readme_quickstart_runs():
    scope = run_python(REPOSITORY / "README.md")
    drift, sweep = scope["drift"], scope["sweep"]
    assert isinstance(drift, dl.Drift)
    assert isinstance(sweep, dl.AttentionSweep)
    # What the README claims in words: the edit takes the answer away, attention brings it back.
    assert sweep.original.prob > 0.8
    assert sweep.edited.prob < 0.2
    assert sweep.everything_share() > 0.5
    assert drift.max_head.max() > 0.3


@pytest.mark.real
def test_calls_that_other_tools_rely_on(smollm2: dl.LensModel):
    request = dl.EditRequest(
        prompt="{} is located in the city of",
        subject="The Eiffel Tower",
        target_new="Rome",
        target_true="Paris",
    )
    prompt = "The Eiffel Tower is famous. The Pyramids are located in"
    model = dl.load_model(smollm2.hf_model, tokenizer=smollm2.tokenizer)
    assert model.tokenizer is smollm2.tokenizer
    edit = dl.edit(
        model,
        request,
        method="rome",
        layer=8,
        context_prompts=["{}", "Yes. {}"],
        covariance="identity",
    )
    result = dl.patch_attention(model, edit, prompt, subject="The Eiffel Tower", answer="Egypt")
    for run in (result.original, result.edited, result.patched):
        assert 0 < run.prob <= 1
        assert run.logprob == pytest.approx(np.log(run.prob))
        assert run.rank >= 0
    assert result.original.rank == 0
    assert result.original.prob != result.edited.prob
    scores = dl.score(model, prompt, ["Egypt", "Rome"])
    assert scores["Egypt"] == pytest.approx(result.original.logprob, abs=1e-4)
    assert scores["Egypt"] > scores["Rome"]
    drift = dl.measure_drift(model, edit, prompt, subject="The Eiffel Tower")
    assert drift.difference.shape == (1, 30, 9)
    assert len(drift.plot().data) == 3
    sweep = dl.sweep_attention(model, edit, prompt, subject="The Eiffel Tower", answer="Egypt")
    assert sweep.everything.prob == pytest.approx(result.patched.prob, rel=1e-3)
    assert len(sweep.plot().data) >= 3


def test_readme_links_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", README) + re.findall(r'src="([^":]+)"', README):
        assert (REPOSITORY / target).exists(), target


def test_readme_names_the_tests_and_the_demo():
    assert "driftlens demo" in README
    assert "python -m pytest" in README


def test_readme_shows_the_main_table():
    result = json.loads((REPOSITORY / "assets/results/table3.json").read_text())
    assert tables.markdown(result) in README
    assert min(row["cases"] for row in result["rows"] if row["metric"] in METRICS) >= 150


def test_readme_says_in_short_what_was_measured():
    text = flowing(README)
    rate = main_rates()

    def theirs(arm: str, metric: str) -> float:
        return rate["counterfact_wikidata_dev", "smollm2-135m", arm, metric]

    def gains(metric: str) -> list[str]:
        pairs = [(theirs(f"{name} + sadr", metric), theirs(name, metric)) for name in PAPERS]
        return [f"{100 * (held / plain - 1):.0f}" for held, plain in pairs]

    def costs(name: str) -> list[str]:
        return [f"{theirs(name, metric) - theirs(f'{name} + sadr', metric):.1f}"
                for metric in ("ES", "PS")]  # fmt: skip

    assert (
        f"(ES {theirs('rome', 'ES'):.1f}), and of what it answered about the subject little is "
        f"left: RS falls from {theirs('unedited', 'RS'):.1f} to {theirs('rome', 'RS'):.1f}."
    ) in text
    assert (
        f"from {theirs('unedited', 'NS'):.1f} (NS) to {theirs('unedited', 'DNS'):.1f} (DNS), ROME "
        f"then takes it to {theirs('rome', 'DNS'):.1f}."
    ) in text
    assert (
        "raises RS by {} % relative with ROME, {} % with MEMIT and {} % with PMET, and DNS by {}, "
        "{} and {} %, the last no clear difference; it costs ROME {} points of ES and {} of PS, "
        "MEMIT {} and {}, PMET {} and {}."
    ).format(*gains("RS"), *gains("DNS"), *(c for name in PAPERS for c in costs(name))) in text
    left = [value for (data, _, arm, metric), value in rate.items()
            if (data, metric) == ("shipped facts", "RS") and arm != "unedited"]  # fmt: skip
    added = [rate[place, model, f"{name} + sadr", "RS"] / rate[place, model, name, "RS"] - 1
             for place, model, name, metric in rate
             if (place, metric) == ("shipped facts", "RS") and name in PAPERS]  # fmt: skip
    assert f"RS is {min(left):.0f} to {max(left):.0f} after an edit" in text
    assert f"SADR adds at most {100 * max(added):.0f} % to it" in text
    near = [f"{rate['shipped facts', 'gemma-3-270m', arm, 'NS']:.1f}"
            for arm in ("unedited", "rome", "pmet")]  # fmt: skip
    assert "falls from {} to {} and {}.".format(*near) in text


def test_readme_says_in_short_what_patching_and_ablation_show():
    text = flowing(README)
    kinds = ("relation", "distract neighbourhood")
    share = {(row["data"], row["model"], row["kind"], row["patched"]): row["share, %"]
             for row in result_rows("fig5") if row["layers"] == "all"}  # fmt: skip
    patterns = [round(share["shipped facts", model, kind, "pattern"])
                for model in ("smollm2-135m", "gemma-3-270m") for kind in kinds]  # fmt: skip
    assert (
        "brings back {} % (relation) and {} % (distract neighbourhood) of what P(answer) lost on "
        "SmolLM2, {} and {} % on Gemma;"
    ).format(*patterns) in text
    values = [value for (data, *_, what), value in share.items()
              if (data, what) == ("shipped facts", "values")]  # fmt: skip
    assert f"*values* bring back {min(values):.0f} to {max(values):.0f} %" in text
    there = [share["counterfact_wikidata_dev", "smollm2-135m", kinds[1], what]
             for what in ("pattern", "values")]  # fmt: skip
    assert "patterns bring back {:.0f} % on distract neighbourhoods, values {:.0f} %.".format(
        *there
    ) in text  # fmt: skip
    rate = {(row["arm"], row["metric"]): row["value"] for row in result_rows("fig6")
            if row["model"] == "smollm2-135m"}  # fmt: skip
    more = {metric: rate["all heads, gamma 0.2", metric] - rate["selected heads, gamma 0.8", metric]
            for metric in METRICS}  # fmt: skip
    assert more["ES"] == more["PS"] == 0
    assert f"keeps {more['RS']:.1f} points more of RS and {more['DNS']:.1f} more of DNS" in text


def test_readme_says_in_short_what_the_search_found():
    folder = REPOSITORY / "assets/results/tuning"
    cheap = {}
    for name in PAPERS:
        check = json.loads((folder / f"sadr-smollm2-135m-{name}.json").read_text())["check"]
        ((_, told),) = check["settings"].items()
        less = next(iter(told["less"].values()))
        gained = max(less[metric]["relative_value"] for metric in ("RS", "DNS"))
        paid = {metric: -less[metric]["value"] for metric in ("ES", "PS")}
        if gained >= 50 and all(paid[metric] <= ALLOWED[metric] for metric in paid):
            cheap[name] = gained, paid
    ((name, (gained, paid)),) = cheap.items()
    assert (
        f"found one for {name.upper()} (RS by {gained:.0f} % for {paid['ES']:.1f} points of ES and "
        f"{paid['PS']:.1f} of PS), and none for MEMIT and PMET."
    ) in flowing(README)
