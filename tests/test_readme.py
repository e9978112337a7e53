"""The README's Python runs as it stands, and so does the quickstart that other tools rely on."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import numpy as np
import pytest
from documents import REPOSITORY, flowing, main_rates, result_rows, result_runs, run_python

import driftlens as dl
from driftlens.bench.results import ALLOWED
from driftlens.cases import METRICS
from driftlens.editing.defaults import GAMMAS
from driftlens.experiments import tables
from driftlens.experiments.paper import TABLE_3
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
    assert tables.main_markdown(result) in README
    least: dict[tuple[str, str], int] = {}
    for row in result["rows"]:
        if row["metric"] in METRICS:
            place = (row["data"], row["model"])
            least[place] = min(row["cases"], least.get(place, row["cases"]))
    assert len(least) == 4 and min(least.values()) >= 150


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
        "and on other questions about the subject the right answer is likelier than the new "
        f"target on {theirs('rome', 'RS'):.1f} % of the prompts, on "
        f"{theirs('unedited', 'RS'):.1f} % before the edit (RS)."
    ) in text
    assert f"(ES {theirs('rome', 'ES'):.1f}; greedy decoding" in text
    assert (
        f"from {theirs('unedited', 'NS'):.1f} (NS) to {theirs('unedited', 'DNS'):.1f} (DNS), ROME "
        f"then takes it to {theirs('rome', 'DNS'):.1f}."
    ) in text
    assert (
        "raises RS by {} % relative with ROME, {} % with MEMIT and {} % with PMET, and DNS by {}, "
        "{} and {} %, PMET's no clear differences; it costs ROME {} points of ES and {} of PS, "
        "MEMIT {} and {}, PMET {} and {}."
    ).format(*gains("RS"), *gains("DNS"), *(c for name in PAPERS for c in costs(name))) in text
    left = [value for (data, _, arm, metric), value in rate.items()
            if (data, metric) == ("shipped facts", "RS") and arm != "unedited"]  # fmt: skip
    added = [rate[place, model, f"{name} + sadr", "RS"] / rate[place, model, name, "RS"] - 1
             for place, model, name, metric in rate
             if (place, metric) == ("shipped facts", "RS") and name in PAPERS]  # fmt: skip
    assert f"RS is {min(left):.0f} to {max(left):.0f} after an edit" in text
    assert f"SADR at its tuned gamma adds at most {100 * max(added):.0f} % to it" in text
    strong, plain = "selected heads, gamma 3.2", "rome"
    success = {(row["arm"], row["metric"]): row["value"] for row in result_rows("fig6")
               if row["model"] == "smollm2-135m"}  # fmt: skip
    more = 100 * (success[strong, "RS"] / success[plain, "RS"] - 1)
    paid = [success[plain, metric] - success[strong, metric] for metric in ("ES", "PS")]
    assert (
        f"(with four times that gamma {more:.0f} % with ROME on SmolLM2, for {paid[0]:.1f} points "
        f"of ES and {paid[1]:.1f} of PS)"
    ) in text
    prob = {
        (run["model"]["name"], row["arm"]): row["value"]
        for run in result_runs("fig6")
        for row in run["probabilities"]
        if row["metric"] == "RS"
    }
    states = [prob[model, arm] for model in ("smollm2-135m", "gemma-3-270m")
              for arm in ("unedited", "rome", "selected heads, gamma 0.8")]  # fmt: skip
    assert (
        "P(answer) to these prompts falls from {0} to {1} with ROME on SmolLM2, and from {3} to "
        "{4} on Gemma; with SADR it is {2} and {5}."
    ).format(*(f"{state:.3f}" for state in states)) in text
    page = flowing((REPOSITORY / "docs/results.md").read_text(encoding="utf-8"))
    assert (
        "from {} to {}, with SADR {}, on SmolLM2; from {} to {}, with SADR {}, on Gemma"
    ).format(*(f"{state:.3f}" for state in states)) in page
    back = {
        f"{100 * (held - edited) / (before - edited):.0f}"
        for before, edited, held in (states[:3], states[3:])
    }
    assert back == {"5"} and "of which SADR gives back 5 %" in page
    known: dict[tuple[str, str], int] = {}
    for run in result_runs("table3"):
        if run["data"] == "shipped facts":
            model = run["model"]["name"]
            path = REPOSITORY / f"assets/results/known-{model}.json"
            facts = {fact["id"]: fact for fact in json.loads(path.read_text())["facts"]}
            for kind in ("relations", "neighbours"):
                own = [facts[case][kind] for case in run["cases"]]
                given, asked = (sum(one[part] for one in own) for part in ("known", "asked"))
                known[model, kind] = round(100 * given / asked)
    assert f"(greedy decoding gives {known['smollm2-135m', 'relations']} % of these" in text
    assert (
        "greedy decoding gives {} % of the relations' answers and {} % of the neighbours' on "
        "SmolLM2, {} and {} % on Gemma"
    ).format(
        *(known[model, kind] for model in ("smollm2-135m", "gemma-3-270m")
          for kind in ("relations", "neighbours"))
    ) in page  # fmt: skip
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
    drift = {(row["data"], row["model"], row["kind"]): f"{row['mean']:+.3f}"
             for row in result_rows("fig4") if row["drift"] == "max head"}  # fmt: skip
    moved = [drift["shipped facts", model, kind]
             for model in ("smollm2-135m", "gemma-3-270m") for kind in kinds]  # fmt: skip
    assert (
        "by {} on relations and {} on distract neighbourhoods on SmolLM2, by {} and {} on Gemma)"
    ).format(*moved) in text
    theirs = [drift["counterfact_wikidata_dev", "smollm2-135m", kind] for kind in kinds]
    assert "that attention changes by {} and {};".format(*theirs) in text
    values = [value for (data, *_, what), value in share.items()
              if (data, what) == ("shipped facts", "values")]  # fmt: skip
    assert f"*values* bring back {min(values):.0f} to {max(values):.0f} %" in text
    there = [share["counterfact_wikidata_dev", "smollm2-135m", kinds[1], what]
             for what in ("pattern", "values")]  # fmt: skip
    assert "patterns bring back {:.0f} % on distract neighbourhoods, values {:.0f} %;".format(
        *there
    ) in text  # fmt: skip
    (pattern, value), (other, others) = (
        [row for row in result_rows("fig5") if row["layers"] == "all"
         and (row["data"], row["model"]) == ("counterfact_wikidata_dev", model)
         and row["kind"] == kinds[0] and row["patched"] in ("pattern", "values")]
        for model in ("smollm2-135m", "gemma-3-270m")
    )  # fmt: skip
    assert (
        f"likelier than the new target on {pattern['likelier edited, %']:.0f} % of the prompts "
        f"after the edit, on {pattern['answer likelier, %']:.0f} % with original patterns, and on "
        f"{value['answer likelier, %']:.0f} % with original values "
        f"({pattern['likelier original, %']:.0f} % before the edit). On Gemma it is "
        f"{other['likelier edited, %']:.0f}, {other['answer likelier, %']:.0f}, "
        f"{others['answer likelier, %']:.0f} and {other['likelier original, %']:.0f} %."
    ) in text
    rate = {(row["arm"], row["metric"]): row["value"] for row in result_rows("fig6")
            if row["model"] == "smollm2-135m"}  # fmt: skip
    more = {metric: rate["all heads, gamma 0.2", metric] - rate["selected heads, gamma 0.8", metric]
            for metric in METRICS}  # fmt: skip
    assert more["ES"] == more["PS"] == 0
    assert f"keeps {more['RS']:.1f} points more of RS and {more['DNS']:.1f} more of DNS" in text


def test_readme_says_in_short_what_sadr_takes_off():
    off: dict[str, list[float]] = {}
    for row in result_rows("cure"):
        off.setdefault(row["measure"], []).append(row["taken off, %"])
    drift, rows, damage = (
        off[name] for name in ("drift, max head", "drift, row KL", "answers overtaken")
    )
    assert len(drift) == len(rows) == len(damage) == 2 * len(PAPERS)
    risen = [row for row in result_rows("cure") if row["measure"] == "rise of P(new target)"]
    rise = [row["taken off, %"] for row in risen if row["method"] != "pmet"]
    of_pmet = [row["high"] for row in risen if row["method"] == "pmet"]
    assert (
        f"it takes {min(drift):.0f} to {max(drift):.0f} % off the drift of the largest head and "
        f"{min(rows):.0f} to {max(rows):.0f} % off the divergence of whole rows, with ROME, MEMIT "
        f"and PMET; {min(damage):.0f} to {max(damage):.0f} % off the answers that the new target "
        f"overtakes; and {min(rise):.0f} to {max(rise):.0f} % off the rise of the new target "
        "elsewhere with ROME and MEMIT."
    ) in flowing(README)
    assert all(high < 10 for high in of_pmet)
    (about,) = (row for row in risen if (row["method"], row["kind"]) == ("pmet", "relation"))
    assert (
        f"more on relations, not less (by {about['with']:.4f} instead of {about['without']:.4f})."
    ) in flowing(README)
    overtaken = [row for row in result_rows("cure")
                 if (row["method"], row["measure"]) == ("pmet", "answers overtaken")]  # fmt: skip
    assert all(row["low"] < 0 < row["high"] for row in overtaken)


def test_readme_says_in_short_what_the_search_found():
    folder = REPOSITORY / "assets/results/tuning"
    checks = {
        name: json.loads((folder / f"sadr-{name}.json").read_text())["check"]
        for name in (
            *(f"smollm2-135m-{method}" for method in PAPERS),
            "gemma-3-270m-rome",
            "gemma-3-270m-memit",
        )
    }
    less = {}
    for name, check in checks.items():
        (told,) = check["settings"].values()
        less[name.removeprefix("smollm2-135m-")] = next(iter(told["less"].values()))  # own setting
    paid = {name: [-found[m]["value"] for m in ("ES", "PS")] for name, found in less.items()}
    gained = {name: found["RS"]["relative"].replace("+", "") for name, found in less.items()}
    rome = checks["smollm2-135m-rome"]
    asked = {row["metric"]: row["cases"] for row in rome["rows"]}
    es, ps = paid["rome"]
    assert es - ALLOWED["ES"] == pytest.approx(100 / asked["ES"]) and ps <= ALLOWED["PS"]
    assert all(paid["memit"][n] > ALLOWED[metric] for n, metric in enumerate(("ES", "PS")))
    assert all(less["pmet"][metric]["value"] < 0 for metric in ("RS", "DNS"))
    level = {(row["arm"], row["metric"], row["measure"]): row["value"]
             for row in rome["magnitudes"]}  # fmt: skip
    _, plain, held = (arm["name"] for arm in rome["arms"])
    assert (
        f"ended, for ROME, at one chosen for DNS that on held-back cases gained RS by "
        f"{gained['rome']} for {es:.1f} points of ES (up to "
        f"{-less['rome']['ES']['low']:.1f}) and {ps:.1f} of PS, one prompt of ES "
        f"above that price; for MEMIT at one that gained RS by {gained['memit']} for "
        f"{paid['memit'][0]:.1f} and {paid['memit'][1]:.1f}; for PMET at none that gained RS or "
        f"DNS. With ROME's, too, the price is higher by probability: P(new target) falls from "
        f"{level[plain, 'ES', 'prob']:.2f} to {level[held, 'ES', 'prob']:.2f}, and greedy decoding"
    ) in flowing(README)
    (es, ps), (more_es, more_ps) = (paid[f"gemma-3-270m-{m}"] for m in ("rome", "memit"))
    assert (
        f"ROME gains {gained['gemma-3-270m-rome']} of RS there, for {es:.1f} points of ES and "
        f"{ps:.1f} of PS, and with all heads held by the reverse divergence MEMIT gains "
        f"{gained['gemma-3-270m-memit']}, for {more_es:.1f} and {more_ps:.1f};"
    ) in flowing(README)
    tuned, found = GAMMAS["gemma3_text", 18, 640, 1]["rome"], checks["gemma-3-270m-rome"]
    (held,) = found["arms"][-1]["penalties"]
    assert held["gamma"] == 4 * tuned and held["heads"] == "max"
    assert (
        f"greedy decoding gives {level['unedited', 'RS', 'exact']:.1f} % of such answers before an "
        f"edit (of {asked['RS']} held-back cases)."
    ) in flowing(README)


def test_readme_sets_what_was_found_beside_what_the_paper_reports():
    """Each number of the table of claims, from the results."""
    lines = [[cell.strip() for cell in line.strip("| ").split("|")] for line in README.splitlines()
             if line.startswith("|")]  # fmt: skip
    rows = {line[0]: line[1:] for line in lines if len(line) == 5}
    rate = main_rates()
    places = [
        [(data, model) for model in ("smollm2-135m", "gemma-3-270m")]
        for data in ("counterfact_wikidata_dev", "shipped facts")
    ]
    gpt_j = {(row.editor, row.sadr): row for row in TABLE_3 if row.model == TABLE_3[0].model}

    def of(where: tuple[str, str], arm: str, metric: str) -> str:
        return f"{rate[(*where, arm, metric)]:.1f}"

    def of_paper(editor: str, sadr: bool, metric: str) -> str:
        return f"{getattr(gpt_j[editor, sadr], metric):.1f}"

    def each(tell: Callable[[tuple[str, str]], str]) -> list[str]:
        """Of the paper's data, and of the shipped facts: both models."""
        return ["; ".join(map(tell, both)) for both in places]

    def fall(metric: str) -> list[str]:
        here = each(lambda w: f"{of(w, 'unedited', metric)} to {of(w, 'rome', metric)}")
        paper = f"{of_paper('none', False, metric)} to {of_paper('rome', False, metric)}"
        return [f"{metric} {paper}", *here]

    assert rows["An edit breaks other relations of its subject"][:3] == fall("RS")
    assert rows["It breaks neighbours behind the edited sentence"][:3] == fall("DNS")
    kept = each(
        lambda w: ", ".join(
            f"{m} {of(w, 'rome', m)} to {of(w, 'rome + sadr', m)}" for m in ("RS", "DNS")
        )
    )
    paper = ", ".join(f"{m} {of_paper('rome', False, m)} to {of_paper('rome', True, m)}"
                      for m in ("RS", "DNS"))  # fmt: skip
    assert rows["SADR keeps more of both"][:3] == [paper, *kept]
    costs = each(
        lambda w: ", ".join(
            f"{m} {rate[(*w, 'rome + sadr', m)] - rate[(*w, 'rome', m)]:+.1f}" for m in ("ES", "PS")
        )
    )
    paper = ", ".join(
        f"{m} {getattr(gpt_j['rome', True], m) - getattr(gpt_j['rome', False], m):+.1f}"
        for m in ("ES", "PS")
    )
    assert rows["It costs the edit little"][:3] == [paper, *costs]
    found = {(row["data"], row["model"], row["kind"]): f"{row['pearson']:.2f}"
             for row in result_rows("fig4")
             if (row["drift"], row["damage"]) == ("max head", "rise of P(new target)")}  # fmt: skip
    kinds = ("relation", "distract neighbourhood")
    drift = each(lambda w: ", ".join(found[(*w, kind)] for kind in kinds))
    (told,) = (row for claim, row in rows.items() if claim.startswith("Attention drift"))
    assert told[1:3] == drift
    share = {(row["data"], row["model"]): f"{row['share, %']:.0f} %" for row in result_rows("fig5")
             if (row["layers"], row["patched"], row["kind"]) == ("all", "pattern", kinds[1])
             }  # fmt: skip
    told = rows["Original attention brings the answer back"]
    theirs, own = places
    assert (
        told[1] == f"{share[theirs[0]]} of the loss on distract neighbourhoods; {share[theirs[1]]}"
    )
    assert told[2] == "; ".join(share[where] for where in own)
