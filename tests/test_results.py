"""What the page on results says in words, and the pages that it leads to, is what was measured."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import pytest
from documents import REPOSITORY, flowing, main_rates, result_rows, result_runs

from driftlens.assets import asset, survey_result
from driftlens.bench.results import ALLOWED
from driftlens.cases import METRICS
from driftlens.editing.methods import METHODS
from driftlens.experiments import gather, many, sadr_search
from driftlens.experiments.paper import TABLE_3
from driftlens.experiments.reproduce import EXPERIMENTS
from driftlens.experiments.reproduce.editors import PAPERS
from driftlens.experiments.survey import markdown, paired_markdown
from driftlens.intervals import with_interval
from driftlens.journal import digest
from driftlens.readers import read_cases

DATA = REPOSITORY.parent / "shared/data/counterfact_wikidata_dev.json"
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
PAGE = (REPOSITORY / "docs/results.md").read_text(encoding="utf-8")


def test_page_shows_the_measured_averages():
    result = survey_result("smollm2-135m")
    assert result is not None
    assert markdown(result) in PAGE
    assert paired_markdown(result) in PAGE
    assert result["command"] in PAGE


def test_page_says_of_paired_differences_what_was_measured():
    result = survey_result("smollm2-135m")
    assert result is not None
    kinds = result["kinds"]
    found = {kind: content["less_edited"] for kind, content in kinds.items()}
    clear = {(kind, s) for kind, own in found.items() for s in own if own[s]["low"] > 0}
    assert {kind for kind, state in clear if state == "sadr"} == {"relation"}
    wanted = {"relation", "distractor"}
    assert {kind for kind, state in clear if state == "restored: pattern"} == wanted
    lost = {k: c["states"]["original"]["answer"] - c["states"]["edited"]["answer"]
            for k, c in kinds.items()}  # fmt: skip
    shares = {s: [round(100 * own[s]["value"] / lost[kind]) for kind, own in found.items()]
              for s in ("restored: pattern", "restored: values", "sadr")}  # fmt: skip
    assert "11 % (relation), 31 % (distractor) and 7 %" in flowing(PAGE)
    assert shares["restored: pattern"] == [11, 31, 7]
    assert "brings back 80 to 101 %" in flowing(PAGE)
    assert (min(shares["restored: values"]), max(shares["restored: values"])) == (80, 101)
    assert "prevents 9 to 10 %" in flowing(PAGE)
    assert (min(shares["sadr"]), max(shares["sadr"])) == (9, 10)


def test_page_says_of_the_main_table_what_was_measured():
    rows = json.loads((REPOSITORY / "assets/results/table3.json").read_text())["rows"]
    found = {(row["data"], row["model"], row["arm"], row["metric"]): row["value"] for row in rows}

    def change(metric: str, method: str, place: tuple[str, str]) -> tuple[float, int]:
        """What SADR adds, in points, and in per cent of what there was."""
        before, after = (found[(*place, arm, metric)] for arm in (method, f"{method} + sadr"))
        return after - before, round(100 * (after - before) / before)

    theirs = "counterfact_wikidata_dev", "smollm2-135m"
    small, large = (("shipped facts", name) for name in ("smollm2-135m", "gemma-3-270m"))
    page = " ".join(PAGE.split())
    rs, dns = ([change(metric, method, theirs)[1] for method in PAPERS] for metric in ("RS", "DNS"))
    assert (
        f"SADR raises RS by {rs[0]} % relative for ROME, {rs[1]} % for MEMIT and {rs[2]} % for "
        f"PMET, and DNS by {dns[0]}, {dns[1]} and {dns[2]} %, PMET's no clear differences."
    ) in page
    run = run_of("table3", *theirs[::-1])
    likely = {row["arm"]: row["value"] for row in run["probabilities"] if row["metric"] == "ES"}
    plain, held = ([likely[f"{method}{end}"] for method in PAPERS] for end in ("", " + sadr"))
    fall = (
        f"P(new target) on the edited prompt falls from {plain[0]:.3f} to {held[0]:.3f} with ROME "
        f"and to {held[1]:.3f} with MEMIT"
    )
    assert f"{plain[1]:.3f}" == f"{plain[0]:.3f}"
    assert fall in page and fall in flowing(README)
    greedy = {row["arm"]: row["value"] for row in run["greedy"] if row["metric"] == "ES"}
    (rome, memit, pmet), held_greedy = (
        [greedy[f"{method}{end}"] for method in PAPERS] for end in ("", " + sadr")
    )
    assert (
        f"{held_greedy[0]:.1f} % of the edited prompts instead of {rome:.1f} (ROME) and on "
        f"{held_greedy[1]:.1f} instead of {memit:.1f} (MEMIT)."
    ) in page
    assert f"by greedy decoding {pmet:.1f} to {held_greedy[2]:.1f} %." in page
    assert f"P(new target) {plain[2]:.3f} to {held[2]:.3f}, by greedy" in page
    assert f"it rises, from {plain[2]:.3f} to {held[2]:.3f}" in flowing(README)
    es, ps = ([-change(metric, method, theirs)[0] for method in PAPERS] for metric in ("ES", "PS"))
    assert (
        f"ROME loses {es[0]:.1f} points of ES and {ps[0]:.1f} of PS, MEMIT {es[1]:.1f} and "
        f"{ps[1]:.1f}. PMET has the low price ({es[2]:.1f} and {ps[2]:.1f}, neither"
    ) in page
    prices = [-change("PS", method, place)[0] for method in PAPERS for place in (small, large)]
    assert (
        f"costs {min(prices):.1f} to {max(prices):.1f} points of PS, with ROME clearly "
        f"({prices[0]:.1f} on SmolLM2, {prices[1]:.1f} on Gemma)"
    ) in page
    assert (
        f"clearly in two cells ({-change('NS', 'memit', small)[0]:.1f} points with MEMIT on "
        f"SmolLM2, {-change('NS', 'pmet', large)[0]:.1f} with PMET on Gemma)"
    ) in page
    gains = {
        (metric, method): [change(metric, method, place)[1] for place in (small, large)]
        for metric in ("RS", "DNS")
        for method in PAPERS
    }
    assert (
        f"RS by {gains['RS', 'rome'][0]} % relative and DNS by {gains['DNS', 'rome'][0]} % on "
        f"SmolLM2, by {gains['RS', 'rome'][1]} and {gains['DNS', 'rome'][1]} % on Gemma; with "
        f"MEMIT RS only, by {gains['RS', 'memit'][0]} and {gains['RS', 'memit'][1]} % (DNS "
        f"{gains['DNS', 'memit'][0]} and {gains['DNS', 'memit'][1]} %, hardly a difference); with "
        f"PMET there is none ({gains['RS', 'pmet'][0]} %, and DNS less by "
        f"{-change('DNS', 'pmet', large)[0]:.0f} points on Gemma)"
    ) in page
    assert gains["RS", "pmet"] == [0, 0]


def test_what_was_gathered_stands_in_the_texts():
    results = REPOSITORY / "assets/results"
    shown = []
    for path in (REPOSITORY / "README.md", REPOSITORY / "docs/results.md"):
        text = path.read_text(encoding="utf-8")
        assert gather.fill(text, results) == text, path
        shown += [match[2] for match in gather.BLOCK.finditer(text)]
    there = [name for name in EXPERIMENTS if (results / f"{name}.json").is_file()]
    assert set(there) == EXPERIMENTS.keys()
    assert sorted(shown) == sorted(there)


def test_pictures_are_of_these_results():
    drawn = json.loads((REPOSITORY / "assets/figures/digests.json").read_text())
    assert drawn.keys() - {"heads-gemma", "table3-gemma"} == EXPERIMENTS.keys()
    for name, of in drawn.items():
        experiment, *other = name.split("-")
        runs = result_runs(experiment)
        shown = [r for r in runs if r["model"]["name"].startswith(*other)] if other else runs[:1]
        assert other or shown[0]["model"]["name"].startswith("smollm2")
        drawings = [digest(run["figure"]) for run in shown]
        assert of in drawings, f"python assets/make_pictures.py ({name})"
        picture = f"assets/figures/{name}.png"
        assert (REPOSITORY / picture).is_file()
        assert f"]({picture})" in README or f"](../{picture})" in PAGE


@pytest.mark.parametrize("name", sorted(EXPERIMENTS))
def test_results_are_of_150_cases_without_failures(name: str):
    path = REPOSITORY / f"assets/results/{name}.json"
    for run in json.loads(path.read_text())["runs"]:
        assert not run["failed"]
        assert len(run["cases"]) >= (30 if name == "cost" else 150)  # seconds differ less


def test_page_says_of_patterns_and_values_what_was_measured():
    whole = {(row["data"], row["model"], row["kind"], row["patched"]): row
             for row in result_rows("fig5") if row["layers"] == "all"}  # fmt: skip
    kinds, text = ("relation", "distract neighbourhood"), flowing(PAGE)
    shares = {model: [round(whole["shipped facts", model, kind, "pattern"]["share, %"])
                      for kind in kinds] for model in ("smollm2-135m", "gemma-3-270m")}  # fmt: skip
    assert shares == {"smollm2-135m": [6, 1], "gemma-3-270m": [0, -3]}
    assert "brings back 6 % (relation) and 1 % (distract neighbourhood)" in text
    assert "and 0 and -3 % on Gemma" in text
    values = [round(row["share, %"]) for (data, *_, what), row in whole.items()
              if (data, what) == ("shipped facts", "values")]  # fmt: skip
    assert (len(values), min(values), max(values)) == (4, 97, 107)
    assert "brings back 97 to 107 %" in text
    theirs = {kind: [whole["counterfact_wikidata_dev", "smollm2-135m", kind, what]
                     for what in ("pattern", "values")] for kind in kinds}  # fmt: skip
    likelier = {
        kind: [round(pattern[f"likelier {state}, %"]) for state in ("original", "edited")]
        + [round(row["answer likelier, %"]) for row in (pattern, value)]
        for kind, (pattern, value) in theirs.items()
    }
    assert likelier == {"relation": [70, 10, 46, 68], "distract neighbourhood": [54, 20, 28, 61]}
    pattern = theirs["relation"][0]
    before, after, restored = (
        pattern[name]
        for name in ("likelier original, %", "likelier edited, %", "answer likelier, %")
    )
    back = 100 * (restored - after) / (before - after)
    other = whole["counterfact_wikidata_dev, edits of pmet", "smollm2-135m", "relation", "pattern"]
    of_pmet = other["answer likelier, %"] - other["likelier edited, %"]
    of_pmet *= 100 / (other["likelier original, %"] - other["likelier edited, %"])
    assert (
        f"ROME's with its original patterns has {back:.0f} % of these back, and PMET's "
        f"{of_pmet:.0f} %"
    ) in text
    for said in (
        "on 70 % of the prompts before the edit, on 10 % after it, and on 46 %",
        "on distract neighbourhoods on 54, 20 and 28 %",
        "(68 and 61 % of the prompts, instead of 46 and 28)",
    ):
        assert said in text
    windows = [row for row in result_rows("fig5")
               if row["kind"] == kinds[1] and row["data"] == "counterfact_wikidata_dev"
               and row["patched"] == "pattern" and row["layers"] != "all"]  # fmt: skip
    best = max(windows, key=lambda row: row["change of P(answer)"])
    rise = 100 * best["change of P(answer)"] / best["P(answer) unpatched"]
    pattern = theirs[kinds[1]][0]
    assert (
        f"patterns bring back {pattern['share, %']:.0f} % and those of layers "
        f"{best['layers'].replace('-', ' to ')} alone {best['share, %']:.0f} %, a rise of "
        f"P(answer) by {rise:.1f} % relative"
    ) in text


def test_page_says_that_pmet_is_no_different_inside():
    share, likelier, text = {}, {}, flowing(PAGE)
    for method, data in (("rome", ""), ("pmet", ", edits of pmet")):
        for row in result_rows("fig5"):
            if (row["data"], row["model"], row["patched"]) != (
                f"counterfact_wikidata_dev{data}", "smollm2-135m", "pattern"
            ):  # fmt: skip
                continue
            if row["layers"] == "all" and row["kind"] == "distract neighbourhood":
                share[method] = f"{row['share, %']:.0f} %"
            if row["layers"] == "all" and row["kind"] == "relation":
                states = row["answer likelier, %"], row["likelier edited, %"]
                likelier[method] = [f"{state:.0f}" for state in states]
    assert (
        f"bring back {share['pmet']} of what P(answer) lost on distract neighbourhoods (ROME: "
        f"{share['rome']}), and make the answer likelier than the new target on "
        "{} % of the prompts instead of {} % on relations (ROME: {} instead of {} %)."
    ).format(*likelier["pmet"], *likelier["rome"]) in text


def test_page_says_what_drift_and_patterns_do_in_gemma_on_the_papers_data():
    place = {"data": "counterfact_wikidata_dev", "model": "gemma-3-270m"}

    def rows(name: str, **of: str) -> list[dict[str, Any]]:
        return [row for row in result_rows(name)
                if all(row[key] == value for key, value in (place | of).items())]  # fmt: skip

    text, kinds = flowing(PAGE), ("relation", "distract neighbourhood")
    drift = {(row["damage"], row["kind"]): row for row in rows("fig4", drift="max head")}
    moved = [f"{drift['fall of P(answer)', kind]['mean']:+.3f}" for kind in kinds]
    assert "There is drift ({} on relations and {} on distract".format(*moved) in text
    (about, read), (near, near_read) = (
        [row for what in ("pattern", "values")
         for row in rows("fig5", kind=kind, layers="all", patched=what)]
        for kind in kinds
    )  # fmt: skip
    assert (
        f"on {about['answer likelier, %']:.0f} % of the prompts about relations, on "
        f"{about['likelier edited, %']:.0f} % without them ({about['likelier original, %']:.0f} % "
        f"before the edit, {read['answer likelier, %']:.0f} % with original values)."
    ) in text
    share = with_interval(
        *(near[f"share{end}"] for end in (", %", " low", " high")), digits=0, unit=" %"
    )
    assert (
        f"({near['answer likelier, %']:.0f} % of the prompts instead of "
        f"{near['likelier edited, %']:.0f}; {share} of what P(answer) lost)"
    ) in text
    assert near_read["share, %"] > 100
    rises = [
        with_interval(row["pearson"], row["pearson_low"], row["pearson_high"], digits=2)
        for row in (drift["rise of P(new target)", kind] for kind in kinds)
    ]
    falls = [f"{drift['fall of P(answer)', kind]['pearson']:.2f}" for kind in kinds]
    assert (
        "at {} and {}, and not with the fall of P(answer) ({} and {}).".format(*rises, *falls)
        in text
    )
    undone = []
    for what in ("pattern", "values"):
        for model in ("smollm2-135m", "gemma-3-270m"):
            (row,) = rows("fig5", model=model, kind="relation", layers="all", patched=what)
            before, after = row["likelier original, %"], row["likelier edited, %"]
            undone.append(round(100 * (row["answer likelier, %"] - after) / (before - after)))
    assert "looks undoes {} and {} % of what".format(*undone[:2]) in text
    assert "what it reads undoes {} and {} %.".format(*undone[2:]) in text


def heads_of(model: str, data: str) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """The run of single heads, and its rows by kind of prompts."""
    own = {
        kind: [
            row
            for row in result_rows("heads")
            if (row["model"], row["data"], row["kind"]) == (model, data, kind)
        ]
        for kind in ("distract neighbourhood", "relation")
    }
    assert {len(rows) for rows in own.values()} == {270 if model == "smollm2-135m" else 72}
    return run_of("heads", model, data), own


def best_heads(rows: list[dict[str, Any]], what: str) -> list[tuple[str, float]]:
    ordered = sorted(rows, key=lambda row: row[what], reverse=True)
    return [(f"L{row['layer']}H{row['head']}", row[what]) for row in ordered]


def test_page_and_readme_say_what_equal_steps_change():
    (run,) = json.loads((REPOSITORY / "assets/results/steps.json").read_text())["runs"]
    assert (run["data"], run["model"]["name"]) == ("counterfact_wikidata_dev", "smollm2-135m")
    less = {(one["arm"], one["less"], one["metric"]): one for one in run["differences"]}
    rate = {(row["arm"], row["metric"]): row["value"] for row in result_rows("steps")}
    level = {(row["arm"], row["metric"]): row["value"] for row in run["probabilities"]}
    greedy = {(row["arm"], row["metric"]): row["value"] for row in run["greedy"]}
    taken = {arm["name"]: arm.get("steps_per_edit") for arm in run["arms"]}
    text = flowing(PAGE)

    def gain(method: str, metric: str) -> str:
        one = less[f"{method} + sadr, all steps", f"{method}, all steps", metric]
        return f"{metric} " + with_interval(one["value"], one["low"], one["high"], sign="+")

    def relative(metric: str) -> int:
        before = rate["pmet, all steps", metric]
        return round(100 * (rate["pmet + sadr, all steps", metric] - before) / before)

    for method in ("rome", "memit"):
        for metric in METRICS:
            change = rate[f"{method}, all steps", metric] - rate[method, metric]
            assert f"{change:z.1f}" == ("-0.2" if metric == "DNS" else "0.0")
    gains = [gain(m, metric) for m in ("rome", "memit") for metric in ("RS", "DNS")]
    assert "{} and {} with ROME, {} and {} with MEMIT, paired".format(*gains) in text
    assert {one["cases"] for (_, _, metric), one in less.items() if metric in ("RS", "DNS")} == {75}
    costs = [-less["pmet + sadr, all steps", "pmet, all steps", m]["value"] for m in ("ES", "PS")]
    assert (
        f"{gain('pmet', 'DNS')} ({relative('DNS')} % relative) and {gain('pmet', 'RS')} "
        "({} %, not clearly), for {:.1f} points of ES and {:.1f} of PS."
    ).format(relative("RS"), *costs) in text
    assert (
        f"SADR gains {relative('DNS')} % of DNS with PMET, and {relative('RS')} % of RS, not "
        "clearly, for {:.1f} points of ES and {:.1f} of PS; of {} cases.)"
    ).format(*costs, len(run["cases"])) in flowing(README)
    assert (taken["pmet"], taken["pmet, all steps"]) == (10, 20)
    alone, whole, held = ("pmet", "pmet, all steps", "pmet + sadr, all steps")
    assert (
        f"(P(new target) on the edited prompt {level[whole, 'ES']:.3f} instead of "
        f"{level[alone, 'ES']:.3f}) and breaks more, RS "
    ) in text
    (told,) = (p for p in run["points"] if p.startswith("pmet, all steps less pmet:"))
    more = re.findall(r"(?:RS|DNS) -[\d.]+ \[.+?\]", told)
    assert "breaks more, {} and {}.".format(*more) in text
    assert (
        f"(RS {rate[held, 'RS']:.1f} beside {rate[alone, 'RS']:.1f}, DNS {rate[held, 'DNS']:.1f} "
        f"beside {rate[alone, 'DNS']:.1f}), with a new target that is a little likelier "
        f"({level[held, 'ES']:.3f})."
    ) in text
    assert (
        f"{level[held, 'ES']:.3f} is less than {level[whole, 'ES']:.3f}, and greedy decoding gives "
        f"the new target on {greedy[held, 'ES']:.1f} % of the edited prompts instead of "
        f"{greedy[whole, 'ES']:.1f}."
    ) in text


def test_page_and_readme_say_that_one_head_carries_half_of_the_loss_by_its_values():
    text, short, models = flowing(PAGE), flowing(README), ("smollm2-135m", "gemma-3-270m")
    brought, shares, halves, patterns, on_others = {}, {}, [], {}, []
    correlated: dict[tuple[str, str, str], str] = {}
    drifting, by_value = {}, {}
    for model in models:
        run, own = heads_of(model, "shipped facts")
        for kind in ("relation", "distract neighbourhood"):
            rows, place = own[kind], (model, kind)
            lost = rows[0]["lost P(answer)"]
            (head, most), *_ = by_value[place] = best_heads(rows, "values")
            brought[place] = (head, f"{100 * most:.2f}", f"{100 * lost:.2f}")
            shares[place] = round(100 * most / lost)
            patterns[place] = best_heads(rows, "pattern")[0][1]
            drifting[place] = best_heads(rows, "drift")

            def chosen(what: str, told=run["points"], kind=kind) -> list[tuple[str, str]]:
                (point,) = (p for p in told if p.startswith(f"{kind}, {what}, chosen on half"))
                return re.findall(r"(L\d+H\d+) (\S+ \[.+?\])", point)

            (again, half), *_ = chosen("values")
            assert again == head
            halves.append(half.replace("+", ""))
            on_others += [float(value.split()[0]) for _, value in chosen("pattern")]
            for measure in ("Pearson", "Spearman"):
                (point,) = (p for p in run["points"]
                            if p.startswith(f"{kind}: over heads") and measure in p)  # fmt: skip
                (found,) = re.findall(r"values (-?[\d.]+ \[.+?\])", point)
                correlated[model, kind, measure] = found
    about, near = (("smollm2-135m", kind) for kind in ("relation", "distract neighbourhood"))
    gemma_about, gemma_near = (("gemma-3-270m", kind) for _, kind in (about, near))
    assert brought[about][0] == brought[near][0] == "L23H4"
    assert brought[gemma_about][0] == brought[gemma_near][0] == "L12H2"
    assert (
        "With its original values alone {} brings back {} of the {} points that SmolLM2 lost on "
        "relations ({} %), and {} of {} on distract neighbourhoods ({} %); on Gemma {} brings back "
        "{} of {} ({} %) and {} of {} ({} %)."
    ).format(
        *brought[about], shares[about], *brought[near][1:], shares[near],
        *brought[gemma_about], shares[gemma_about], *brought[gemma_near][1:], shares[gemma_near],
    ) in text  # fmt: skip
    assert "brings back {}, {}, {} and {} on the other half.".format(*halves) in text
    assert (
        "that one head's brings back is {:.2f} and {:.2f} points on SmolLM2, {:.2f} and ".format(
            *(100 * patterns[place] for place in (about, near, gemma_about))
        )
        in text
    )
    assert f"and {100 * patterns[gemma_near]:.2f} on Gemma, and of the five" in text
    assert f"none brings back more than {max(on_others):.2f} on the other." in text
    assert {name for name, _ in by_value[near][:2]} == {name for name, _ in drifting[near][:2]}
    (one, much), (two, less), *_ = drifting[near]
    (alone, gemmas), *_ = drifting[gemma_near]
    assert alone == brought[gemma_near][0]
    assert (
        f"{one} and {two}, the two whose values bring back most, are the two that drift most on "
        f"SmolLM2 ({much:+.3f} and {less:+.3f}), and {alone} is the one on Gemma ({gemmas:+.3f})."
    ) in text
    for place in (about, gemma_about):
        assert brought[place][0] not in [name for name, _ in drifting[place][:5]]
    told = [correlated[*place, measure] for measure in ("Pearson", "Spearman")
            for place in (near, gemma_near)]  # fmt: skip
    assert (
        "at {} on SmolLM2 and at {} on Gemma (Pearson, which is that of these few; by rank {} and "
        "{})."
    ).format(*told) in text
    told = [correlated[*place, "Pearson"] for place in (about, gemma_about)]
    assert "the two go together at {} and {}.".format(*told) in text
    least = {model: max(100 * most / heads_of(model, "shipped facts")[1][kind][0]["lost P(answer)"]
                        for (own, kind), most in patterns.items() if own == model)
             for model in models}  # fmt: skip
    assert (
        "the original values of {} alone bring back {} % of what P(answer) lost on relations and "
        "{} % on distract neighbourhoods on SmolLM2, those of {} {} and {} % on Gemma; the "
        "original pattern of any one head at most {:.0f} and {:.0f} %."
    ).format(
        brought[about][0], shares[about], shares[near],
        brought[gemma_about][0], shares[gemma_about], shares[gemma_near], *least.values(),
    ) in short  # fmt: skip


def test_page_and_readme_say_which_heads_bring_answers_back():
    run, own = heads_of("smollm2-135m", "counterfact_wikidata_dev")
    near, about = own.values()
    (first, most), (second, more), (_, next_most), *_ = best_heads(near, "pattern")
    drifting = [name for name, _ in best_heads(near, "drift")[:3]]
    assert (first, second) == ("L23H4", "L23H5")
    assert drifting == ["L21H6", second, first]
    text, lost = flowing(PAGE), 100 * near[0]["lost P(answer)"]
    assert (
        f"By its pattern {first} alone brings back {100 * most:.2f} of the {lost:.2f} points that "
        f"P(answer) lost, {second} {100 * more:.2f}, and the next head {100 * next_most:.2f}."
    ) in text
    assert (
        f"which drifts most, brings back {100 * dict(best_heads(near, 'pattern'))['L21H6']:.2f}."
        in text
    )
    told = {}
    for measure in ("Pearson", "Spearman"):
        (point,) = (p for p in run["points"]
                    if "distract neighbourhood: over heads" in p and measure in p)  # fmt: skip
        told[measure] = re.findall(r"(?:pattern|values) (-?[\d.]+ \[.+?\])", point)
    (pattern, values), by_rank = told["Pearson"], told["Spearman"]
    assert (
        f"patterns bring back at {pattern} (Pearson), and with what values do at {values}." in text
    )
    assert "(Spearman {}, values {})".format(*by_rank) in text
    (point,) = (p for p in run["points"]
                if p.startswith("distract neighbourhood, pattern, chosen on half"))  # fmt: skip
    halves = re.findall(rf"({first}|{second}) \+([\d.]+) \[\+([\d.]+), \+([\d.]+)\]", point)
    assert [name for name, *_ in halves] == [first, second]
    told_halves = [f"{value} [{low}, {high}]" for _, value, low, high in halves]
    assert "bring back {} and {} on the other half".format(*told_halves) in text
    lost_about = with_interval(
        *(100 * about[0][name] for name in ("lost P(answer)", "lost low", "lost high")),
        digits=2, unit=" points",
    )  # fmt: skip
    assert f"next to nothing ({lost_about}), and no head" in text
    assert f"more than {100 * best_heads(about, 'pattern')[0][1]:.2f} by its pattern." in text
    assert (
        f"the original pattern of {first} alone brings back {100 * most:.2f} of the {lost:.2f} "
        f"points of P(answer) that SmolLM2 lost, that of {second} {100 * more:.2f}, that of any "
        f"other at most {100 * next_most:.2f}; chosen on half of the cases, they bring back "
        "{} and {} on the other half.".format(*(value for _, value, *_ in halves))
    ) in flowing(README)


def test_page_says_of_substitution_and_drift_what_was_measured():
    text = flowing(PAGE)
    worst: dict[tuple[str, str, str], float] = {}
    of_paper: dict[tuple[str, str], float] = {}
    for row in result_rows("fig3"):
        place = row["model"], row["kind"], row["patched"]
        kept, key = (worst, place) if row["data"] == "shipped facts" else (of_paper, place[1:])
        kept[key] = min(kept.get(key, 0.0), row["change of P(answer)"])  # type: ignore[index]
    near = [of_paper["distract neighbourhood", what] for what in ("attn_out", "mlp_out", "resid")]
    told = "5.26): {:.1f}, {:.1f} and {:.1f} points.".format(*(-100 * cost for cost in near))
    assert told in text
    assert f"is in the attention output, too ({100 * near[0] / near[2]:.0f} %)." in text
    about = [-100 * cost for (kind, _), cost in of_paper.items() if kind == "relation"]
    assert f"loses {max(about):.1f} points at most" in text
    assert all(cost < 2 * of_paper[place[1:]] for place, cost in worst.items())
    shares = {what: [round(100 * cost / worst[model, kind, "resid"])
                     for (model, kind, found), cost in worst.items() if found == what]
              for what in ("attn_out", "mlp_out")}  # fmt: skip
    ends = [f"{min(own)} to {max(own)} %" for own in shares.values()]
    assert f"costs the original model {ends[0]} of what" in text
    assert f"what its MLPs write, {ends[1]}." in text
    correlated = {
        (row["data"], row["model"], row["damage"], row["kind"], row["drift"]): row
        for row in result_rows("fig4")
    }
    found = {place: round(row["pearson"], 2) for (data, *place_), row in correlated.items()
             if data == "shipped facts" and (place := tuple(place_))}  # fmt: skip
    kinds, models = ("relation", "distract neighbourhood"), ("smollm2-135m", "gemma-3-270m")
    fall, rise = ([found[model, damage, kind, "max head"] for model in models for kind in kinds]
                  for damage in ("fall of P(answer)", "rise of P(new target)"))  # fmt: skip
    assert (
        "correlates with the fall of P(answer) at {} and {} on SmolLM2 and at {} and {} on Gemma, "
        "and with the rise of P(new target) at {} and {}, {} and {}."
    ).format(*fall, *rise) in text
    rows = {kind: sorted(found[model, damage, kind, "row KL"] for model in models
                         for damage in ("fall of P(answer)", "rise of P(new target)"))
            for kind in kinds}  # fmt: skip
    ends = [f"({rows[kind][0]:.2f} to {rows[kind][-1]:.2f})" for kind in reversed(kinds)]
    ranks = {kind: sorted(row["spearman"] for (data, _, _, of, name), row in correlated.items()
                          if (data, of, name) == ("shipped facts", kind, "row KL"))
             for kind in kinds}  # fmt: skip
    by_rank = [f"by rank {ranks[kind][0]:.2f} to {ranks[kind][-1]:.2f}" for kind in kinds]
    assert (
        f"on distract neighbourhoods {ends[0][:-1]}, {by_rank[1]}); on relations weakly {ends[1]}, "
        f"{by_rank[0]}."
    ) in text
    sizes = {(data, kind): row["mean"] for (data, model, _, kind, name), row in correlated.items()
             if name == "row KL" and model == models[0]}  # fmt: skip
    here = [row["mean"] for (data, *_, name), row in correlated.items()
            if (data, name) == ("shipped facts", "row KL")]  # fmt: skip
    there = [f"{sizes['counterfact_wikidata_dev', kind]:.3f} ({kind})" for kind in reversed(kinds)]
    assert (
        f"{min(here):.3f} to {max(here):.3f} nats in the mean over heads, on the paper's data "
        f"{there[0]} and {there[1]}."
    ) in text
    drift = {(data, model, kind): f"{row['mean']:+.3f}"
             for (data, model, _, kind, name), row in correlated.items()
             if name == "max head"}  # fmt: skip
    assert (
        "by {} (relation) and {} (distract neighbourhood) on SmolLM2, and by {} and {} on Gemma."
    ).format(*(drift["shipped facts", model, kind] for model in models for kind in kinds)) in text
    theirs = "counterfact_wikidata_dev", models[0]
    there = [drift[(*theirs, kind)] for kind in kinds]
    assert (
        "there is drift ({} on relations and {} on distract neighbourhoods)".format(*there) in text
    )
    falls, rises = (
        [f"{correlated[(*theirs, damage, kind, 'max head')]['pearson']:.2f}" for kind in kinds]
        for damage in ("fall of P(answer)", "rise of P(new target)")
    )
    assert (
        "with what P(answer) loses ({}, and on distract neighbourhoods clearly the other way, {})"
    ).format(*falls) in text
    near = correlated[(*theirs, "fall of P(answer)", kinds[1], "max head")]
    assert near["pearson_high"] < 0
    assert "({1}), not on relations ({0})".format(*rises) in text


def test_page_says_what_sadr_saves_of_what_is_lost():
    rate = main_rates()
    saved = []
    for place in (
        ("shipped facts", "smollm2-135m"),
        ("counterfact_wikidata_dev", "smollm2-135m"),
        ("shipped facts", "gemma-3-270m"),
    ):
        for metric in ("RS", "DNS"):
            before, plain, held = (rate[(*place, arm, metric)]
                                   for arm in ("unedited", "rome", "rome + sadr"))  # fmt: skip
            saved.append(f"{100 * (held - plain) / (before - plain):.0f}")
    assert (
        "SADR saves {} % (RS) and {} % (DNS) on SmolLM2 and the shipped facts, {} and {} % on "
        "SmolLM2 and the paper's data, {} and {} % on Gemma and the shipped facts."
    ).format(*saved) in flowing(PAGE)


def test_page_says_what_the_context_alone_costs():
    rate = main_rates()

    def told(arm: str, metric: str) -> float:
        return rate["counterfact_wikidata_dev", "smollm2-135m", arm, metric]

    text = flowing(PAGE)
    before, behind = told("unedited", "NS"), told("unedited", "DNS")
    assert (
        f"takes the *unedited* SmolLM2 from {before:.1f} (NS) to {behind:.1f} (DNS), an unrelated "
        f"sentence leaves it at {told('unedited', 'lead-neighbour'):.1f}; ROME then takes it to "
        f"{told('rome', 'DNS'):.1f}. Of these {before - told('rome', 'DNS'):.1f} points the "
        f"sentence alone costs {before - behind:.1f}."
    ) in text
    before, behind = told("unedited", "RS"), told("unedited", "distract-relation")
    assert (
        f"In front of relations it costs {before - behind:.1f} ({before:.1f} to {behind:.1f}; "
        f"behind an unrelated one {told('unedited', 'lead-relation'):.1f}), but RS, which ROME "
        f"takes from {before:.1f} to {told('rome', 'RS'):.1f}, has no sentence in front"
    ) in text
    costs = [rate["shipped facts", model, "unedited", before]
             - rate["shipped facts", model, "unedited", behind]
             for model in ("smollm2-135m", "gemma-3-270m")
             for before, behind in (("NS", "DNS"), ("RS", "distract-relation"))]  # fmt: skip
    assert f"the sentence costs {min(costs):.1f} to {max(costs):.1f} points" in text


def test_page_says_what_else_was_asked():
    rate = {
        (row["arm"], row["metric"]): row["value"]
        for row in result_rows("table3")
        if (row["data"], row["model"]) == ("counterfact_wikidata_dev", "smollm2-135m")
    }

    def ends(metric: str, end: str = "") -> str:
        values = [rate[f"{method}{end}", metric] for method in PAPERS]
        return f"{min(values):.1f} to {max(values):.1f}"

    drawn = [rate[f"{m}{end}", "reasoning"] for m in PAPERS for end in ("", " + sadr")]
    sensible = [rate[f"{m}{end}", "commonsense"] for m in PAPERS for end in ("", " + sadr")]
    assert (
        f"in {ends('alias')} % after an edit ({rate['unedited', 'alias']:.1f} before) and in "
        f"{ends('alias', ' + sadr')} with SADR; what follows from the new fact is likelier "
        f"than the old answer in {min(drawn):.1f} to {max(drawn):.1f} % "
        f"({rate['unedited', 'reasoning']:.1f} before); and which of two ways to go on makes "
        f"sense is not touched: {min(sensible):.1f} to {max(sensible):.1f} % right after an "
        f"edit, {rate['unedited', 'commonsense']:.1f} before."
    ) in flowing(PAGE)


def test_page_says_what_else_was_asked_of_the_shipped_facts():
    asked = ("alias", "reasoning", "commonsense")
    rate: dict[str, dict[tuple[str, str], float]] = {"smollm2-135m": {}, "gemma-3-270m": {}}
    for row in result_rows("table3"):
        if row["data"] == "shipped facts" and row["metric"] in asked:
            assert row["cases"] == 32
            rate[row["model"]][row["arm"], row["metric"]] = row["value"]

    def ends(model: str, metric: str) -> str:
        found = rate[model]
        values = [found[method, metric] for method in PAPERS]
        return f"{min(values):.1f} to {max(values):.1f} % ({found['unedited', metric]:.1f} before)"

    text = flowing(PAGE)
    small, gemma = rate.values()
    alias = [small[method, "alias"] for method in (*PAPERS, "unedited")]
    assert (
        "SmolLM2 finds the new target likelier behind another name in {:.1f} % after ROME's edit, "
        "{:.1f} after MEMIT's and {:.1f} after PMET's ({:.1f} before), finds what follows"
    ).format(*alias) in text
    assert f"the old answer in {ends('smollm2-135m', 'reasoning')}, and chooses" in text
    assert f"chooses sense in {ends('smollm2-135m', 'commonsense')}. Gemma finds" in text
    assert gemma["rome", "alias"] == gemma["pmet", "alias"]
    alias = [gemma[method, "alias"] for method in ("rome", "memit", "unedited")]
    assert (
        "Gemma finds the new target likelier behind another name in {:.1f} % after ROME's and "
        "PMET's edits and {:.1f} after MEMIT's ({:.1f} before), finds what follows"
    ).format(*alias) in text
    assert f"finds what follows likelier in {ends('gemma-3-270m', 'reasoning')}, and" in text
    (sense,) = {gemma[arm, metric] for arm, metric in gemma if metric == "commonsense"}
    assert f"chooses sense in {sense:.1f} %, before and after." in text
    moved = [
        abs(found[f"{m} + sadr", metric] - found[m, metric])
        for found in rate.values()
        for m in PAPERS
        for metric in asked
    ]
    assert max(moved) == 100 / 32
    assert f"SADR moves none of these by more than {max(moved):.1f} points, one answer of" in text


def test_page_says_what_sadr_costs_by_probability():
    told: dict[str, list[str]] = {}
    steps: dict[str, dict[str, float]] = {}
    for model in ("smollm2-135m", "gemma-3-270m"):
        run = run_of("table3", model)
        prob = {row["arm"]: row["value"] for row in run["probabilities"] if row["metric"] == "ES"}
        assert prob["pmet + sadr"] > prob["pmet"]
        told[model] = [f"from {prob[m]:.3f} to {prob[f'{m} + sadr']:.3f}" for m in PAPERS]
        steps[model] = {arm["name"]: arm["steps_per_edit"] for arm in run["arms"]}
    small, gemma = told.values()
    assert (
        f"falls with SADR {small[0]} (ROME) and {small[1]} (MEMIT) on SmolLM2, {gemma[0]} and "
        f"{gemma[1]} on Gemma, and not with PMET ({small[2]} and {gemma[2]}), which stops after 4 "
        "steps in the median (after 5 with SADR on Gemma)."
    ) in flowing(PAGE)
    assert [(found["pmet"], found["pmet + sadr"]) for found in steps.values()] == [(4, 4), (4, 5)]


def test_what_is_said_of_the_shipped_facts_in_the_page_on_metrics():
    text = flowing((REPOSITORY / "docs/concepts/metrics.md").read_text(encoding="utf-8"))
    facts = {case.id: case for case in read_cases(asset("facts.jsonl"))}
    asked = [facts[name] for name in run_of("table3", "smollm2-135m")["cases"]]
    near = [neighbour.prompt for case in asked for neighbour in case.neighbours]
    subjects = {case.request.subject for case in asked}
    assert f"({len(set(near))} different ones among the {len(near)} of the 150" in text
    assert f"{len(subjects)} subjects come in them" in text
    rate = {metric: value for (*place, metric), value in main_rates().items()
            if place == ["counterfact_wikidata_dev", "smollm2-135m", "unedited"]}  # fmt: skip
    assert f"has an NS of {rate['NS']:.1f} and a DNS of {rate['DNS']:.1f}" in text


def search_of(model: str, method: str) -> dict[str, Any]:
    """The record of the search for SADR's settings."""
    found: dict[str, Any] = json.loads(
        (REPOSITORY / f"assets/results/tuning/sadr-{model}-{method}.json").read_text()
    )
    return found


@pytest.mark.parametrize(
    ("model", "method", "parts", "gains"),
    [
        (
            "smollm2-135m",
            "rome",
            ("search", "check"),
            {"RS": "56 % [25, 110]", "DNS": "4 % [-8, 19]"},
        ),
        ("smollm2-135m", "memit", ("check",), {"RS": "103 % [43, 253]", "DNS": "54 % [25, 106]"}),
        ("gemma-3-270m", "rome", ("check",), {"RS": "167 % [90, 320]", "DNS": "31 % [11, 57]"}),
        ("gemma-3-270m", "memit", ("check",), {"RS": "93 % [59, 146]", "DNS": "17 % [1, 36]"}),
        ("gemma-3-270m", "pmet", ("check",), {"RS": "12 % [-17, 53]", "DNS": "2 % [-13, 17]"}),
        ("smollm2-135m", "pmet", ("check",), {"RS": "-10 % [-45, 35]", "DNS": "-12 % [-23, 1]"}),
    ],
)
def test_the_search_for_the_settings_of_sadr_is_the_result_file(
    model: str, method: str, parts: tuple[str, ...], gains: dict[str, str]
):
    text = (REPOSITORY / "docs/concepts/sadr.md").read_text(encoding="utf-8")
    result = search_of(model, method)
    assert sadr_search.markdown(result, parts) in text
    assert result["command"] in flowing(text.replace("\\\n", " "))
    searched, checked = result["search"], result["check"]
    assert not set(searched["cases"]) & set(checked["cases"])
    settings = searched["settings"]
    merits = {name: (-told["beyond what is allowed"], told["gained"])
              for name, told in settings.items()}  # fmt: skip
    assert merits[searched["best"]] == max(merits.values())
    ((best, told),) = checked["settings"].items()
    assert best == searched["best"]
    less = next(iter(told["less"].values()))  # the editor's own setting
    for page in (text, PAGE):
        page = flowing(page.replace("+", ""))
        for metric, share in gains.items():
            assert less[metric]["relative"].replace("+", "") == share
            assert share in page
        kept, cost = (less[metric]["value"] for metric in ("ES", "PS"))
        told_costs = (
            f"{-kept:.1f} points of ES and {-cost:.1f} of PS"
            if kept < 0
            else f"gains {kept:.1f} points of ES and costs {-cost:.1f} of PS"
        )
        assert told_costs in page
    penalty = checked["arms"][-1]["penalties"][0]
    shown = f'SADR(gamma={penalty["gamma"]:g}, heads="{penalty["heads"]}"'
    shown += f', divergence="{penalty["divergence"]}"' * (penalty["divergence"] != "kl")
    layers = penalty["layers"]
    assert layers is None or layers == [*range(len(layers))]
    shown += f", layers=range({len(layers)})" if layers else ""
    assert f"`{shown})`" in flowing(PAGE)


@pytest.mark.skipif(not DATA.is_file(), reason="the paper's file is not beside the project")
def test_page_says_how_much_tuning_and_report_share():
    results, tuned = REPOSITORY / "assets/results", set()
    for path in results.glob("tuning/tuning-*.jsonl"):
        for line in path.read_text().splitlines():
            tuned |= set(json.loads(line)["unit"]["cases"])
    for path in results.glob("tuning/sadr-*.json"):
        tuned |= set(json.loads(path.read_text())["search"]["cases"])
    subject = {case.id: case.request.subject for case in read_cases(DATA)}
    runs = json.loads((results / "table3.json").read_text())["runs"]
    reported, of_gemma = (r["cases"] for r in runs if r["data"] == "counterfact_wikidata_dev")
    assert of_gemma == reported
    assert not tuned & set(reported)
    shared = [name for name in reported if subject[name] in {subject[one] for one in tuned}]
    assert (
        f"({len(shared)} of the {len(reported)} of table 3 have a subject that one of the "
        f"{len(tuned)} tuning cases has, too)"
    ) in flowing(PAGE)


def test_what_success_hides_in_the_search():
    check = search_of("smollm2-135m", "rome")["check"]
    unedited, plain, held = (arm["name"] for arm in check["arms"])
    level = {(row["arm"], row["metric"], row["measure"]): row["value"]
             for row in check["magnitudes"]}  # fmt: skip
    (told,) = check["settings"].values()
    less = told["less"][plain]

    def change(metric: str, measure: str, digits: int, sign: int = 1) -> tuple[str, str]:
        ends = [sign * less[metric][measure][name] for name in ("value", "low", "high")]
        low, value, high = sorted(ends)
        return f"{value:.{digits}f}", f"[{low:.{digits}f}, {high:.{digits}f}]"

    fall = " ".join(change("ES", "prob", 3))
    ends = [f"{level[arm, 'ES', 'prob']:.3f}" for arm in (plain, held)]
    assert "falls from {} to {} ({})".format(*ends, fall) in flowing(PAGE)
    (edited, of_edited), (points, interval) = (
        change(metric, "exact", 1, -1) for metric in ("ES", "PS")
    )
    assert (
        f"new target on {edited} points {of_edited} fewer edited prompts and on {points} points "
        f"{interval} fewer paraphrases."
    ) in flowing(PAGE)
    assert f"on {edited} points {of_edited} fewer prompts." in flowing(README)
    whole = f"{level[plain, 'ES', 'exact']:.1f}"
    of = {row["metric"]: row["cases"] for row in check["rows"]}
    assert f"gives it on {whole} % of {of['ES']} held-back cases)" in flowing(README)
    near, behind = (f"{level[unedited, metric, 'exact']:.1f}" for metric in ("NS", "DNS"))
    assert (
        f"greedy decoding gives {near} % of the neighbours' answers without the sentence and "
        f"{behind} % behind it (of {of['NS']} held-back cases)"
    ) in flowing(PAGE)
    known = [level[arm, "RS", "exact"] for arm in (unedited, plain)]
    assert known[1] == 0
    assert f"gives {known[0]:.1f} % of the answers about the subject, and none" in flowing(PAGE)
    probs = [level[arm, "RS", "prob"] for arm in (unedited, plain)]
    assert f"P(answer) falls from {probs[0]:.3f} to less than 0.001." in flowing(PAGE)
    assert probs[1] < 0.001
    assert f"RS and DNS are of {of['RS']} of the {of['ES']} cases each." in flowing(PAGE)
    assert of["RS"] == of["DNS"]
    text = flowing((REPOSITORY / "docs/concepts/sadr.md").read_text(encoding="utf-8"))
    ends += [f"{level[arm, 'PS', 'prob']:.3f}" for arm in (plain, held)]
    assert "from {} to {} on the edited prompt, from {} to {} on paraphrases.".format(*ends) in text


def test_what_the_searches_gained_is_told_by_greedy_decoding_too():
    for method, model in (("memit", "smollm2-135m"), ("memit", "gemma-3-270m"),
                          ("rome", "gemma-3-270m"), ("pmet", "smollm2-135m"),
                          ("pmet", "gemma-3-270m")):  # fmt: skip
        check = search_of(model, method)["check"]
        _, plain, *_, held = (arm["name"] for arm in check["arms"])
        level = {(row["arm"], row["metric"], row["measure"]): row["value"]
                 for row in check["magnitudes"]}  # fmt: skip
        (told,) = check["settings"].values()
        less = told["less"][plain]
        given = [f"{level[arm, 'ES', 'exact']:.1f}" for arm in (held, plain)]
        probs = [f"{level[arm, 'ES', 'prob']:.3f}" for arm in (held, plain)]
        sadr = (REPOSITORY / "docs/concepts/sadr.md").read_text(encoding="utf-8")
        for text in (flowing(PAGE), flowing(sadr)):
            if method != "pmet":
                said = text.replace(f"{given[1]} %, P(", f"{given[1]}, and P(")
                assert (
                    "gives the new target on {} % of the edited prompts instead of {}, and "
                    "P(new target) there is {} instead of {}."
                ).format(*given, *probs) in said
                continue
            greedy, near = less["ES"]["exact"], less["NS"]
            sign, word = (1, "more") if greedy["value"] > 0 else (-1, "fewer")
            low, value, high = sorted(sign * greedy[end] for end in ("low", "value", "high"))
            assert (
                f"gives the new target on {value:.1f} points [{low:.1f}, {high:.1f}] {word} of the "
                "edited prompts"
            ) in text
            assert all(less[m]["low"] < 0 < less[m]["high"] for m in ("RS", "DNS"))
            if model == "smollm2-135m":
                lost = f"{-near['value']:.1f} points [{-near['high']:.1f}, {-near['low']:.1f}]"
                assert f"NS falls by {lost}" in text
            else:
                assert near["low"] < 0 < near["high"]


def test_page_sums_up_at_what_price_gains_of_half_were_found():
    excess, risen = [], []
    for model, method in (("smollm2-135m", "rome"), ("smollm2-135m", "memit"),
                          ("gemma-3-270m", "rome"), ("gemma-3-270m", "memit")):  # fmt: skip
        check = search_of(model, method)["check"]
        rate = {(row["arm"], row["metric"]): row for row in check["rows"]}
        _, plain, held = (arm["name"] for arm in check["arms"])
        before, after = (rate[arm, "RS"]["value"] for arm in (plain, held))
        assert after >= 1.5 * before
        assert f"({before:.1f} to {after:.1f})" in flowing(PAGE)
        es = [rate[arm, "ES"] for arm in (plain, held)]
        excess.append(es[0]["value"] - es[1]["value"] - ALLOWED["ES"])
        risen.append(100 / es[0]["cases"])
    assert excess[0] == pytest.approx(risen[0])  # one prompt
    assert (
        "for ROME on SmolLM2 by one prompt, otherwise by "
        f"{min(excess[1:]):.1f} to {max(excess[1:]):.1f} points."
    ) in flowing(PAGE)


def test_page_says_that_the_context_makes_answers_likelier_too():
    levels = []
    for model in ("smollm2-135m", "gemma-3-270m"):
        prob = {row["metric"]: f"{row['value']:.3f}"
                for row in run_of("table3", model)["probabilities"]
                if row["arm"] == "unedited"}  # fmt: skip
        levels.append([prob[m] for m in ("NS", "DNS", "RS", "distract-relation")])
    small, gemma = levels
    assert (
        "that of neighbours rises from {} to {} on SmolLM2 and the shipped facts and from {} to {} "
        "on Gemma, that of relations from {} to {} and from {} to {};"
    ).format(*small[:2], *gemma[:2], *small[2:], *gemma[2:]) in flowing(PAGE)


def test_what_is_said_of_the_search_for_pmet():
    text = flowing((REPOSITORY / "docs/concepts/sadr.md").read_text(encoding="utf-8"))
    record = search_of("smollm2-135m", "pmet")
    searched, checked = record["search"], record["check"]
    assert len(searched["settings"]) == 12 and "(twelve settings, `assets/results" in text
    (told,) = checked["settings"].values()
    own, longer = told["less"].values()
    for less in (own, longer):
        assert all(less[metric]["low"] < 0 < less[metric]["high"] for metric in ("RS", "DNS"))
    rs, dns = (longer[metric]["relative"].replace("[+", "[").replace(", +", ", ")
               for metric in ("RS", "DNS"))  # fmt: skip
    assert f"it is RS {rs} and DNS {dns}." in text
    rate = {(part, row["arm"], row["metric"]): f"{row['value']:.1f}"
            for part in ("search", "check") for row in record[part]["rows"]}  # fmt: skip
    assert f"RS of PMET is {rate['search', 'pmet, 20 steps, lr 0.5', 'RS']} on" in text
    assert f"RS falls to {rate['check', 'pmet, 30 steps, lr 1', 'RS']} on the held-back" in text
    strong = "pmet, 30 steps, lr 1, gamma 3.2, heads max, kl"
    found = [rate["search", strong, metric] for metric in ("RS", "DNS", "ES")]
    assert "gamma 3.2 had RS {} and DNS {} on the tuning cases, and ES {}.".format(*found) in text


def test_longer_searches_pay_for_dns_with_rs():
    text = (REPOSITORY / "docs/concepts/sadr.md").read_text(encoding="utf-8")
    settings = search_of("smollm2-135m", "memit")["search"]["settings"]
    longer = settings["memit, 30 steps, lr 1, gamma 0.8, heads max, kl"]
    less = longer["less"]["memit, 20 steps, lr 0.5"]
    gained, lost = (round(sign * less[metric]["relative_value"])
                    for metric, sign in (("DNS", 1), ("RS", -1)))  # fmt: skip
    assert f"30 steps gain {gained} % of DNS and lose {lost} % of RS" in flowing(text)


def test_page_says_what_each_editor_breaks():
    runs = {
        run["model"]["name"]: run
        for run in json.loads((REPOSITORY / "assets/results/table1.json").read_text())["runs"]
    }
    text = flowing(PAGE)
    losses = {
        model: {(one["metric"], one["arm"]): -one["value"]
                for one in run["differences"] if one["less"] == "unedited"}
        for model, run in runs.items()
    }  # fmt: skip
    wanted = [
        ("smollm2-135m", "RS", "pmet", "rome"), ("smollm2-135m", "DNS", "pmet", "ft-l"),
        ("gemma-3-270m", "RS", "memit", "grace"), ("gemma-3-270m", "DNS", "memit", "ft-l"),
    ]  # fmt: skip
    for model, metric, least, most in wanted:
        own = {arm: value for (of, arm), value in losses[model].items()
               if of == metric and (model, arm) != ("smollm2-135m", "grace")}  # fmt: skip
        assert (min(own, key=lambda a: own[a]), max(own, key=lambda a: own[a])) == (least, most)
        verb, unit = ("RS falls by ", "points ") if metric == "RS" else ("DNS by ", "")
        said = f"{verb}{own[least]:.1f} ({least.upper()}) to {own[most]:.1f} {unit}({most.upper()})"
        assert said in text
    lost = losses["smollm2-135m"]
    grace = [f"{abs(lost[metric, 'grace']):.1f}" for metric in ("RS", "DNS", "NS")]
    assert "({} and {}, but {} of NS)".format(*grace) in text
    lost = losses["gemma-3-270m"]
    near = [f"{lost['NS', arm]:.1f}" for arm in ("memit", "alphaedit", "rome", "pmet")]
    assert "({} and {} points of NS), ROME and PMET take {} and {}.".format(*near) in text
    for run, said in (
        ("smollm2-135m", "changes RS by -1.2 points and NS by -1.3"),
        ("gemma-3-270m", "the context alone changes RS by -0.8 and NS by -0.7"),
    ):
        told = runs[run]["points"][-1]
        change = {metric: re.search(rf"{metric} by ([-+.\d]+) \[[^]]*\] behind the edited", told)
                  for metric in ("RS", "NS")}  # fmt: skip
        for metric, found in change.items():
            assert found is not None and f"{metric} by {found[1]}" in said
        assert said in text
    rate = {
        (row["model"], row["arm"], row["metric"]): row["value"] for row in result_rows("table1")
    }
    broken = [f"{rate['gemma-3-270m', arm, 'NS']:.1f}" for arm in ("ft-l", "ft-m", "grace")]
    assert "nearly everywhere (NS {}, {} and {})".format(*broken) in text
    short = []
    for own in losses.values():
        paper = [own["RS", arm] for arm in PAPERS]
        short += [f"{min(paper):.1f}", f"{max(paper):.1f}"]
    assert (
        "ROME, MEMIT and PMET take {} to {} points of RS on SmolLM2, and {} to {} on Gemma."
    ).format(*short) in flowing(README)


def test_no_setting_of_three_editors_teaches_gemma_paraphrases_and_spares_neighbours():
    for name in ("ft-l", "ft-m", "grace"):
        path = REPOSITORY / f"assets/results/tuning/tuning-gemma-3-270m-{name}.jsonl"
        for line in path.read_text().splitlines():
            trial = json.loads(line)["rates"]
            assert trial["PS"] < 90 or trial["NS"] < 15


def test_what_is_said_of_selected_and_all_heads():
    run = run_of("fig6", "smollm2-135m")
    rate = {(row["arm"], row["metric"]): row["value"] for row in result_rows("fig6")
            if row["model"] == "smollm2-135m"}  # fmt: skip
    text = flowing(PAGE)
    selected, blanket = ("selected heads, gamma {}", "all heads, gamma {}")

    def less(one: str, other: str, metric: str) -> str:
        return f"{abs(rate[one, metric] - rate[other, metric]):.1f}"

    strong = (selected.format("3.2"), blanket.format("3.2"))
    lost, kept = ([less(*strong, metric) for metric in metrics]
                  for metrics in (("ES", "PS"), ("RS", "DNS")))  # fmt: skip
    assert all(rate[strong[0], m] > rate[strong[1], m] for m in ("ES", "PS"))
    assert all(rate[strong[0], m] < rate[strong[1], m] for m in ("RS", "DNS"))
    assert "(at 3.2, {} points of ES and {} of PS more)".format(*lost) in text
    assert "(RS {} points, DNS {})".format(*kept) in text
    fine, cheap = (selected.format("0.8"), blanket.format("0.2"))
    assert [f"{rate[fine, m]:.1f}" for m in ("ES", "PS")] == ["100.0", "93.7"]
    assert [rate[cheap, m] for m in ("ES", "PS")] == [rate[fine, m] for m in ("ES", "PS")]
    assert "selected heads at 0.8 (100.0 and 93.7)" in text
    (told,) = (p for p in run["points"] if p.startswith(f"{cheap} less {fine}"))
    for metric in ("NS", "RS", "DNS"):
        found = re.search(rf"{metric} \+[\d.]+ \[\+[\d.]+, \+[\d.]+\]", told)
        assert found is not None and found[0] in text
    prob = {row["arm"]: row["value"] for row in run["probabilities"] if row["metric"] == "ES"}
    assert f"(P(new target) on the edited prompt {prob[cheap]:.3f} and {prob[fine]:.3f})" in text
    pairs = [point for point in run["points"] if " less selected heads" in point]
    assert len(pairs) == 3 and "(of three pairs of settings at like price" in flowing(README)


def test_page_says_how_many_steps_searches_take():
    text = flowing(PAGE)
    steps = {arm["name"]: arm["steps_per_edit"] for arm in run_of("fig6", "smollm2-135m")["arms"]}
    assert (
        f"({steps['rome']:g} steps in the median without SADR and "
        f"{steps['selected heads, gamma 0.8']:g} with it,"
    ) in text
    check = search_of("smollm2-135m", "pmet")["check"]
    held, plain = check["arms"][-1], check["arms"][-2]
    assert held["config"] == plain["config"]
    prob = {row["arm"]: row["value"] for row in check["magnitudes"]
            if (row["measure"], row["metric"]) == ("prob", "ES")}  # fmt: skip
    assert (
        f"in the check below {plain['steps_per_edit']:g} without and {held['steps_per_edit']:g} "
        f"with it (of {held['config']['steps']})"
    ) in text
    assert f"{prob[plain['name']]:.3f} without and {prob[held['name']]:.3f} with SADR)" in text


def test_what_is_said_of_selected_and_all_heads_on_gemma():
    run = run_of("fig6", "gemma-3-270m")
    rate = {(row["arm"], row["metric"]): row["value"] for row in result_rows("fig6")
            if row["model"] == "gemma-3-270m"}  # fmt: skip
    (told,) = (point for point in run["points"] if point.startswith("At gamma 0.8: "))
    found = dict(re.findall(r"(\w+) ([-+.\d]+) \[", told))
    text, short = flowing(PAGE), flowing(README)
    assert (
        f"(at 0.8, RS {-float(found['RS']):.1f} points and DNS {-float(found['DNS']):.1f}, for "
        f"{float(found['PS']):.1f} of PS)."
    ) in text
    fine, cheap = "selected heads, gamma 3.2", "all heads, gamma 0.05"
    dear = [arm for arm, metric in rate if metric == "ES" and arm.startswith("all heads")
            and any(rate[arm, m] < rate[fine, m] - 1e-9 for m in ("ES", "PS"))]  # fmt: skip
    assert dear == [f"all heads, gamma {gamma}" for gamma in ("0.2", "0.8", "3.2")]
    _, value, low, high = less_than(run, fine)[cheap, "RS"]
    _, ns, ns_low, ns_high = less_than(run, fine)[cheap, "NS"]
    assert (
        f"{-value:.1f} points less of RS [{-high:.1f}, {-low:.1f}] and {-ns:.1f} less of NS "
        f"[{-ns_high:.1f}, {-ns_low:.1f}] than at 3.2."
    ) in text
    near = [less_than(run, f"selected heads, gamma {gamma}")[cheap, "DNS"]
            for gamma in ("0.05", "0.2", "0.8")]  # fmt: skip
    (_, first, *one), (_, second, *two), (_, _, *none) = near
    assert (
        f"they keep {first:.1f} points more of DNS [{one[0]:.1f}, {one[1]:.1f}] than selected "
        f"heads at 0.05 and {second:.1f} [{two[0]:.1f}, {two[1]:.1f}] than at 0.2 (hardly a "
        "difference), show no clear difference from 0.8, and"
    ) in text
    assert two[0] == pytest.approx(0, abs=0.05)
    assert none[0] < 0 < none[1]
    assert (
        f"all heads keep {first:.1f} and {second:.1f} points more of DNS in two of four, selected "
        f"heads {-value:.1f} points more of RS in one,"
    ) in short
    less = {metric: rate["all heads, gamma 0.8", metric] - rate[fine, metric]
            for metric in ("ES", "PS", "RS", "DNS")}  # fmt: skip
    assert less["ES"] == 0 and round(less["PS"] * 3) == -2  # of 300 prompts
    assert (
        f"all heads at 0.8 cost {-less['PS']:.1f} points of PS more than selected heads at 3.2, "
        f"and keep {less['RS']:.1f} more of RS and {less['DNS']:.1f} of DNS."
    ) in text
    assert (
        f"but {less['RS']:.1f} less than all heads that cost {-less['PS']:.1f} points of PS more."
    ) in short


def test_what_is_said_of_what_sadr_takes_off():
    text = flowing(PAGE)
    off = {(row["measure"], row["kind"], row["method"]): row for row in result_rows("cure")}
    near, relation = "distract neighbourhood", "relation"

    def ends(measure: str, *kinds: str, methods: Sequence[str] = PAPERS) -> str:
        own = [off[measure, kind, name]["taken off, %"] for kind in kinds for name in methods]
        return f"{min(own):.0f} to {max(own):.0f} %"

    assert f"it takes {ends('drift, max head', near, relation)} off that of the largest" in text
    assert (
        f"SADR takes {ends('fall of P(answer)', near)} off what P(answer) loses and "
        f"{ends('answers overtaken', near)} off the overtaken answers."
    ) in text
    assert (
        f"On relations SADR takes {ends('answers overtaken', relation)} off the overtaken answers,"
    ) in text
    rise = "rise of P(new target)"
    others = ends(rise, near, relation, methods=("rome", "memit"))
    assert f"the new target rises less elsewhere, by {others};" in text
    pmet = off[rise, near, "pmet"]
    assert pmet["low"] < 0 < pmet["high"]
    pmet = off[rise, relation, "pmet"]
    assert pmet["high"] < 0
    assert f"hardly anything ({pmet['without']:.4f}), it becomes {pmet['with']:.4f}." in text


def test_what_is_said_of_rules():
    run = run_of("rules", "smollm2-135m")
    text = flowing(PAGE)
    less = less_than(run, "max (the paper's)")

    def points(arm: str, *metrics: str) -> list[str]:
        return [f"{abs(less[arm, metric][1]):.1f}" for metric in metrics]

    assert "cost {} points of PS and keep {} of RS and {} of DNS more".format(
        *points("all heads", "PS", "RS", "DNS")
    ) in text  # fmt: skip
    assert "cost {} and keep {} and {}.".format(*points("quantile 0.5", "PS", "RS", "DNS")) in text
    for arm in ("all heads", "quantile 0.5"):
        assert less[arm, "PS"][3] < 0 < less[arm, "RS"][2]
    tenth, above = "quantile 0.9", "mean + 1 std"
    assert points(tenth, "PS") == points(above, "PS") == ["1.3"]
    assert all(less[arm, "PS"][2] < 0 < less[arm, "PS"][3] for arm in (tenth, above))
    assert all(less[arm, "DNS"][2] > 0 for arm in (tenth, above))
    dns = (*points(tenth, "DNS"), *points(above, "DNS"))
    assert "cost 1.3 each, no clear difference, and keep {} and {} of DNS.".format(*dns) in text
    alike = [abs(less[arm, metric][1]) for arm in ("mean + 2 std", "drift 0.05", "drift 0.01")
             for metric in ("RS", "DNS")]  # fmt: skip
    assert f"are within {max(alike):.1f} points of RS and DNS of it." in text
    assert points("all rows", "ES", "PS") == ["0.7", "0.7"]
    assert "costs 0.7 of ES and of PS, neither clear, and keeps {} of RS and {} of DNS.".format(
        *points("all rows", "RS", "DNS")
    ) in text  # fmt: skip
    assert less["all rows", "ES"][3] >= 0 and less["all rows", "PS"][3] > 0
    assert f"it changes nothing ({less['reverse KL', 'RS'][0]})" in text
    assert "loses {} of RS".format(*points("JS", "RS")) in text
    assert less["JS", "RS"][3] < 0


def test_what_is_said_of_a_sequence():
    rate = {
        (row["arm"], row["metric"]): row for row in result_rows("sequential") if row["facts"] == 150
    }
    text, short = flowing(PAGE), flowing(README)
    methods = ("rome", "memit", "alphaedit")
    arms = [arm for arm, metric in rate if metric == "ES" and arm != "unedited"]

    def told(metric: str, *chosen: str) -> list[str]:
        return [f"{rate[arm, metric]['value']:.1f}" for arm in chosen]

    def ends(metric: str, chosen: Sequence[str]) -> str:
        values = [rate[arm, metric]["value"] for arm in chosen]
        return f"{min(values):.1f} to {max(values):.1f}"

    assert f"after 150 of them (ES {ends('ES', arms)})" in text
    alone = {
        row["arm"]: row["value"]
        for row in result_rows("table1")
        if (row["model"], row["metric"]) == ("smollm2-135m", "RS")
    }
    assert (
        f"as after each edit alone (RS {ends('RS', methods)} without SADR; alone, and on a few "
        f"more prompts, {alone['rome']:.1f} with ROME, {alone['memit']:.1f} with MEMIT and "
        f"{alone['alphaedit']:.1f} with AlphaEdit)."
    ) in text
    facts = {case.id: case for case in read_cases(asset("facts.jsonl"))}
    whole = sum(
        len(facts[name].neighbours) for name in run_of("sequential", "smollm2-135m")["cases"]
    )
    asked = rate["rome", "NS"]["prompts"]
    assert f"of the {whole} prompts about neighbours of all 150 facts, {asked} are asked." in text
    assert "NS falls from {} to {} (ROME), {} (MEMIT) and {} (AlphaEdit)".format(
        *told("NS", "unedited", *methods)
    ) in text  # fmt: skip
    assert "DNS from {} to {}, {} and {}.".format(*told("DNS", "unedited", *methods)) in text
    more = {
        (arm, metric): rate[f"{arm} + sadr", metric]["value"] - rate[arm, metric]["value"]
        for arm in methods
        for metric in METRICS
    }
    assert (
        "adds to ROME and MEMIT {:.1f} and {:.1f} points of RS and {:.1f} and {:.1f} of DNS, and "
        "costs {:.1f} and {:.1f} of ES and {:.1f} and {:.1f} of PS;"
    ).format(
        *(sign * more[arm, metric]
          for metric, sign in (("RS", 1), ("DNS", 1), ("ES", -1), ("PS", -1))
          for arm in ("rome", "memit"))
    ) in text  # fmt: skip
    assert (
        f"adds {more['alphaedit', 'RS']:.1f} of RS and {more['alphaedit', 'DNS']:.1f} of DNS, and "
        f"costs {-more['alphaedit', 'NS']:.1f} of NS."
    ) in text
    for arm, metric in more:  # as the page says, the two intervals overlap
        plain, held = rate[arm, metric], rate[f"{arm} + sadr", metric]
        assert plain["low"] <= held["high"] and held["low"] <= plain["high"]
    for metric in ("ES", "NS"):
        best = sorted(arms, key=lambda arm: -rate[arm, metric]["value"])[:2]
        assert {"alphaedit", "alphaedit + sadr"} == set(best)
    assert (
        "NS is {1} with ROME, {2} with MEMIT and {3} with AlphaEdit ({0} before), RS "
        f"{ends('RS', methods)}; SADR adds {min(more[arm, 'RS'] for arm in methods):.1f} to "
        f"{max(more[arm, 'RS'] for arm in methods):.1f} points to RS, and costs up to "
        f"{-min(more[arm, 'ES'] for arm in methods):.1f} of ES and "
        f"{-min(more[arm, 'PS'] for arm in methods):.1f} of PS"
    ).format(*told("NS", "unedited", *methods)) in short


def test_the_table_of_editors_is_the_result_file():
    text = (REPOSITORY / "docs" / "editors.md").read_text(encoding="utf-8")
    result = json.loads((REPOSITORY / "assets/results/editors-smollm2-135m.json").read_text())
    shown = {cells[0]: cells for line in text.splitlines() if len(cells := table_cells(line)) == 8}
    columns = ["Avg. S", "ES", "PS", "NS", "RS", "DNS"]
    assert list(shown["arm"][1:7]) == columns
    table: dict[str, dict[str, str]] = {}
    for row in result["table"]:
        cell = "{value:.1f} [{low:.1f}, {high:.1f}]".format(**row)
        table.setdefault(row["arm"], {})[row["metric"]] = cell
    assert len(table) == 1 + 2 * len(METHODS)
    for arm, cells in table.items():
        assert shown[arm][1:7] == [cells[column] for column in columns]


def test_the_table_of_many_facts_is_the_result_file():
    text = (REPOSITORY / "docs" / "editors.md").read_text(encoding="utf-8")
    result = json.loads((REPOSITORY / "assets/results/many-smollm2-135m.json").read_text())
    ways = [("batch", "sequence") if m.takes_several else ("sequence",) for m in METHODS.values()]
    wanted = [("unedited", "unedited")]
    wanted += [(name, way) for name, own in zip(METHODS, ways, strict=True) for way in own]
    assert [(row["arm"], row["way"]) for row in result["rows"]] == wanted
    assert many.markdown(result) in text
    assert result["command"] in " ".join(text.replace("\\\n", " ").split())


def run_of(name: str, model: str, data: str = "shipped facts") -> dict[str, Any]:
    """The run of an experiment on a model and some data."""
    runs = result_runs(name)
    (run,) = (run for run in runs if (run["model"]["name"], run["data"]) == (model, data))
    return run


def less_than(run: dict[str, Any], other: str) -> dict[tuple[str, str], Any]:
    """What a run's points say of arms less another, by arm and metric: in words, and the value
    with the ends of its interval."""
    less: dict[tuple[str, str], Any] = {}
    for point in run["points"]:
        arm, _, rest = point.partition(f" less {other}: ")
        for found in re.finditer(r"(\w+) ([-+.\d]+) \[([-+.\d]+), ([-+.\d]+)\]", rest):
            less[arm, found[1]] = (found[0], *map(float, found.groups()[1:]))
    return less


def table_cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []


def rates_of(name: str, model: str) -> dict[tuple[str, str], float]:
    return {
        (row["arm"], row["metric"]): row["value"]
        for row in result_rows(name)
        if row["model"] == model
    }


def test_what_is_said_of_trade_offs():
    run = run_of("fig7", "smollm2-135m")
    text, short = flowing(PAGE), flowing(README)
    rate = rates_of("fig7", "smollm2-135m")
    prob = {(row["arm"], row["metric"]): row["value"] for row in run["probabilities"]}
    gain: dict[str, Any] = {}
    for method, strong, tuned in (("rome", "3.2", "0.8"), ("memit", "0.8", "0.2")):
        steps, gamma = f"{method}, steps 10", f"{method}, gamma {strong}"
        less = less_than(run, gamma)
        told = [less[steps, metric][0] for metric in ("NS", "RS", "DNS")]
        assert f"{told[0]}, {told[1]} and {told[2]} with {method.upper()}" in text
        assert less[steps, "NS"][2] > 0 > less[steps, "RS"][2]
        assert less[steps, "ES"][1] >= -0.7 and less[steps, "PS"][1] >= 0  # one of 150 prompts
        (best,) = (point for point in run["points"] if point.startswith(f"{method} (ES"))
        gain[method] = dict(re.findall(r"(gamma|steps|lr|KL) [\d.]+ \(of \d\) \+([\d.]+)", best))
        most = max(gain[method], key=lambda kind: float(gain[method][kind]))
        assert most == ("steps" if method == "rome" else "lr")
        gain[method, "KL"] = -less_than(run, f"{method}, gamma {tuned}")[f"{method}, KL 1", "RS"][1]
    less = less_than(run, "memit, gamma 0.8")
    assert less["memit, steps 10", "DNS"][2] > 0
    assert less_than(run, "rome, gamma 3.2")["rome, steps 10", "DNS"][2] < 0
    gained = {m: rate["rome, lr 0.2", m] - rate["rome", m] for m in METRICS}
    dear = sum(gained[metric] for metric in ("NS", "RS", "DNS")) / 3
    assert gained["ES"] == 0 and -4 - 100 / 300 <= gained["PS"] < -4  # of 300 prompts
    assert (
        f"10 steps gain most with ROME ({gain['rome']['steps']} points in the mean of NS, RS and "
        f"DNS; gamma {gain['rome']['gamma']}; the learning rate of 0.2 gains {dear:.1f}, and "
        "misses the price by one prompt), and a learning rate of 0.2 with MEMIT "
        f"({gain['memit']['lr']}; gamma {gain['memit']['gamma']})."
    ) in text
    assert (
        f"at 1 it keeps {gain['rome', 'KL']:.1f} (ROME) and {gain['memit', 'KL']:.1f} (MEMIT) "
        "points of RS less"
    ) in text
    same = (rate[arm, "RS"] for arm in ("rome", "rome, gamma 0.8", "memit", "memit, gamma 0.2"))
    assert "raises RS from {:.1f} to {:.1f} (ROME) and from {:.1f} to {:.1f} (MEMIT)".format(
        *same
    ) in text  # fmt: skip
    five = [rate[f"{method}, steps 5", "ES"] for method in ("rome", "memit")]
    assert f"(ES {five[0]:.1f} and {five[1]:.1f})." in text
    arms = [f"rome, {name}" for name in ("steps 10", "lr 0.2", "gamma 3.2", "gamma 0.8")]
    edit, kept = ([f"{prob[arm, m]:.3f}" for arm in ("rome", *arms)] for m in ("ES", "RS"))
    assert (
        "P(new target) on the edited prompt falls from {} to {} with 10 steps and to {} at the "
        "lower learning rate, to {} with four times the gamma and to {} with the tuned one; "
    ).format(*edit) + "P(answer) of RS rises from {} to {}, {}, {} and {}.".format(*kept) in text
    more = [f"{less['memit, steps 10', metric][1]:.1f}" for metric in ("NS", "DNS")]
    assert "and {} points more of NS and {} more of DNS with MEMIT;".format(*more) in short
    assert (
        f"falls from {edit[0]} to {edit[1]} with 10 steps, and to {edit[3]} with that gamma (ROME)."
    ) in short


def test_what_is_said_of_trade_offs_on_gemma():
    run = run_of("fig7", "gemma-3-270m")
    text, short = flowing(PAGE), flowing(README)
    rate = rates_of("fig7", "gemma-3-270m")
    prob = {(row["arm"], row["metric"]): row["value"] for row in run["probabilities"]}
    best: dict[str, str] = {}
    more: dict[tuple[str, str], tuple[float, str]] = {}
    for method in ("rome", "memit"):
        (point,) = (point for point in run["points"] if point.startswith(f"{method} (ES"))
        gains, compared = point.split(" Gamma's less that of ")
        (best[method],) = re.findall(r"gamma 3\.2 \(of 2\) \+([.\d]+)", gains)
        for kind, value, ends in re.findall(r"(steps|lr|KL) ([-+.\d]+) (\[[^]]*\])", compared):
            more[method, kind] = float(value), f"{abs(float(value))} {ends}"
    assert [value > 0 for value, _ in more.values()] == [True, True, False, True, True]
    gained = [
        f"{best[method]} {{}} (by {more[method, 'steps'][1]} and {more[method, 'lr'][1]} more)"
        for method in ("rome", "memit")
    ]
    mean = "points in the mean of NS, RS and DNS with ROME"
    assert ", ".join(gained).format(mean, "with MEMIT") + ", each at four times" in text
    less = less_than(run, "rome, gamma 0.8")
    dns, ns = (
        "{1:.1f} points [{2:+.1f}, {3:+.1f}] of DNS".format(*less["rome, KL 1", "DNS"]),
        "{1:.1f} [{2:+.1f}, {3:+.1f}] of NS".format(*less["rome, KL 1", "NS"]),
    )
    assert f"at 1 it keeps {dns} and {ns} more than SADR at the tuned gamma" in text
    assert all(less["rome, KL 1", metric][1] >= 0 for metric in ("ES", "PS"))
    arms = ("rome, KL 1", "rome, gamma 3.2", "rome")
    assert "({:.3f} and {:.3f}, from {:.3f})".format(*(prob[arm, "ES"] for arm in arms)) in text
    price = [rate["memit", metric] - rate["memit, KL 1", metric] for metric in ("ES", "PS")]
    assert "({:.1f} points of ES and {:.1f} of PS)".format(*price) in text
    left = [v for (arm, metric), v in rate.items() if arm.startswith("rome") and metric == "NS"]
    assert len(left) == 7 and max(left) < 56
    assert f"NS stays below 56, of {rate['unedited', 'NS']:.1f} before." in text
    assert (
        f"keeps {more['rome', 'steps'][0]} (ROME) and {more['memit', 'steps'][0]} points (MEMIT) "
        "more than fewer steps in the mean of NS, RS and DNS, but "
        f"{-more['rome', 'KL'][0]} less than more of ROME's own KL term."
    ) in short


def test_what_is_said_of_rivals():
    run = run_of("rivals", "smollm2-135m")
    text = flowing(PAGE)
    less = less_than(run, "SADR")
    for arm, said in (("keys 0.003", "keys at 0.003"), ("hidden state 0.1", "hidden state at 0.1")):
        assert f"{said} less SADR" in text
        assert all(less[arm, metric][0] in text for metric in ("PS", "NS", "RS", "DNS"))
        # No dearer, and as much kept, but for NS.
        assert less[arm, "ES"][1] == 0 <= less[arm, "PS"][2]
        clear = [m for m in ("NS", "RS", "DNS") if less[arm, m][2] * less[arm, m][3] > 0]
        assert clear == ["NS"] and less[arm, "NS"][2] > 0
    strong = [f"{abs(less['keys 0.01', metric][1]):.1f}" for metric in ("PS", "RS", "NS", "DNS")]
    assert (
        "keys at 0.01 cost {} points of PS more than SADR, and keep {} of RS, {} of NS and {} of "
        "DNS more."
    ).format(*strong) in text
    _, own, _, most = less["essence KL 1", "RS"]
    assert f"at 1.0 it keeps {-own:.1f} points of RS less than SADR." in text
    assert most < 0
    assert "keys 0.003 keeps most (chosen on the same cases)" in run["text"]
    assert "`KeyDrift(0.003)`" in README


def test_page_says_what_is_left_at_equal_strength():
    rows = {
        (row["method"], row["compared"], row["metric"]): row
        for row in result_rows("strength")
        if row["data"] == "counterfact_wikidata_dev"
    }
    page, readme = flowing(PAGE), flowing(README)
    equal = "at equal strength"

    def less(method: str, metric: str) -> str:
        row = rows[method, equal, metric]
        return with_interval(row["value"], row["low"], row["high"], sign="+")

    def prob_less(method: str, metric: str) -> str:
        row = rows[method, equal, metric]
        ends = (row[f"P {end}"] for end in ("value", "low", "high"))
        return with_interval(*ends, digits=4, sign="+")

    def is_clear(method: str, metric: str, prefix: str = "") -> bool:
        row = rows[method, equal, metric]
        return row[f"{prefix}low"] > 0 or row[f"{prefix}high"] < 0

    left = 100 * rows["rome", equal, "ES"]["left without"]
    assert (
        f"ROME's own edits with {left:.0f} % of their change are as strong as SADR's; against them "
        f"SADR's edits have RS {less('rome', 'RS')}, DNS {less('rome', 'DNS')} and NS "
        f"{less('rome', 'NS')}, with no clear difference in ES and PS ({less('rome', 'ES')} and "
        f"{less('rome', 'PS')})."
    ) in page
    assert [m for m in METRICS if is_clear("rome", m)] == ["NS", "RS", "DNS"]
    for method in ("memit", "pmet"):
        told = f"RS {less(method, 'RS')} and DNS {less(method, 'DNS')} with {method.upper()}"
        assert told in page
        assert not is_clear(method, "RS") and not is_clear(method, "DNS")
    by_prob = {(method, metric): prob_less(method, metric)
               for method in PAPERS for metric in ("RS", "DNS")}  # fmt: skip
    assert (
        f"none with ROME (RS {by_prob['rome', 'RS']}, DNS {by_prob['rome', 'DNS']}) and MEMIT (RS "
        f"{by_prob['memit', 'RS']}, DNS {by_prob['memit', 'DNS']}), and with PMET a small gain of "
        f"RS ({by_prob['pmet', 'RS']}; DNS {by_prob['pmet', 'DNS']}, not clear)."
    ) in page
    assert [place for place in by_prob if is_clear(*place, prefix="P ")] == [("pmet", "RS")]

    def behind(method: str, metric: str, name: str, digits: int) -> str:
        row = rows[method, "as made", metric]
        assert row["cases"] == 75
        return " and ".join(f"{row[name.format(side)]:.{digits}f}" for side in ("without", "with"))

    new, given = ("P(new target) {}", 3), ("new target given {}, %", 1)
    for method, name in (("rome", "On those of RS P(new target) is"), ("memit", "MEMIT:")):
        assert f"{name} {behind(method, 'RS', *new)}" in page
    assert f"gives the new target on {behind('rome', 'RS', *given)} % of them" in page
    for method in PAPERS[1:]:
        told = f"{behind(method, 'RS', *new)}, {behind(method, 'RS', *given)} %"
        assert told in page
    assert (
        f"it is {behind('rome', 'DNS', *new)} for ROME, and {behind('rome', 'DNS', *given)} % "
        f"(MEMIT: {behind('memit', 'DNS', *new)}, {behind('memit', 'DNS', *given)} %)."
    ) in page

    def drifts_less(method: str, kind: str) -> str:
        row = rows[method, equal, f"drift, max head: {kind}"]
        assert row["high"] < 0
        return with_interval(-row["value"], -row["high"], -row["low"], digits=3)

    one, two, three = (
        [drifts_less(method, kind) for kind in ("relation", "distract neighbourhood")]
        for method in PAPERS
    )
    assert (
        f"by {one[0]} (relation) and {one[1]} (distract neighbourhood) with ROME, by {two[0]} and "
        f"{two[1]} with MEMIT and by {three[0]} and {three[1]} with PMET"
    ) in page
    kept = {
        metric: "{:.1f} points more of {} [{:.1f}, {:.1f}]".format(
            -rows["rome", equal, metric]["value"], metric, -rows["rome", equal, metric]["high"],
            -rows["rome", equal, metric]["low"],
        )
        for metric in ("RS", "DNS")
    }  # fmt: skip
    row = rows["rome", "as made", "RS"]
    assert f"scaled down to {left:.0f} % of their change" in readme
    assert f"keep {kept['RS']} and {kept['DNS'].replace('points more ', '')}, of 75" in readme
    assert (
        f"gives the new target on {row['new target given with, %']:.1f} % of them with ROME, on "
        f"{row['new target given without, %']:.1f} without SADR."
    ) in readme


def test_page_says_of_fluency_what_was_measured() -> None:
    page = flowing(PAGE)
    found = {(row["model"], row["arm"]): row["value"] for row in result_rows("fluency")}
    less = {
        (run["model"]["name"], arm, other): tuple(map(float, values))
        for run in result_runs("fluency")
        for point in run["points"]
        for arm, other, *values in re.findall(
            r"^(.+) less (.+): FL ([-+.\d]+) \[([-+.\d]+), ([-+.\d]+)\]\.$", point
        )
    }
    assert len(less) == 12
    small, large = ("smollm2-135m", "gemma-3-270m")
    loss = {(model, m): less[model, m, "unedited"] for model in (small, large) for m in PAPERS}
    held = [less[model, f"{m} + sadr", m] for model in (small, large) for m in PAPERS]
    assert all(low < 0 < high for _, low, high in held)  # nowhere clearly
    assert all(loss[small, m][1] < 0 < loss[small, m][2] for m in PAPERS)
    assert all(loss[large, m][2] < 0 for m in PAPERS)
    assert all(-less[0] <= 0.01 * found[model, "unedited"] for (model, _), less in loss.items())
    told = "edits cost at most 1 % of it here, and SADR changes it nowhere clearly"
    assert told in flowing(README)
    most = max(-loss[small, m][0] for m in PAPERS)
    rome, memit, pmet = (
        f"{-value:.1f} [{-high:.1f}, {-low:.1f}]"
        for value, low, high in (loss[large, m] for m in PAPERS)
    )
    assert (
        f"On SmolLM2 ({found[small, 'unedited']:.1f} before an edit) no editor's loss is clear "
        f"({most:.1f} at most); on Gemma ({found[large, 'unedited']:.1f}) each one's is, of at "
        f"most 1 %: {rome} with ROME, {memit} with MEMIT, {pmet} with PMET."
    ) in page
    paper = {(row.model, row.editor, row.sadr): row.FL for row in TABLE_3}

    def lost(model: str, editor: str) -> float:
        return paper[model, "none", False] - paper[model, editor, False]

    gpt_j, llama = (max(lost(model, m) for m in PAPERS) for model in ("GPT-J 6B", "Llama-3 8B"))
    neox = "GPT-NeoX 20B"
    back = [paper[neox, m, True] - paper[neox, m, False] for m in ("rome", "pmet")]
    assert (
        f"GPT-J loses at most {gpt_j:.1f} and Llama-3 at most {llama:.1f}, but GPT-NeoX "
        f"{lost(neox, 'rome'):.1f} with ROME and {lost(neox, 'pmet'):.1f} with PMET, of which SADR "
        f"gives back {back[0]:.1f} and {back[1]:.1f};"
    ) in page


def test_page_and_readme_say_what_sadr_does_on_gemma_and_the_papers_data() -> None:
    where = ("counterfact_wikidata_dev", "gemma-3-270m")
    run = run_of("table3", *where[::-1])
    rate = {place[2:]: value for place, value in main_rates().items() if place[:2] == where}
    prob, greedy = (
        {row["arm"]: row["value"] for row in run[name] if row["metric"] == "ES"}
        for name in ("probabilities", "greedy")
    )
    points = {point.partition(" + sadr less ")[0]: point for point in run["points"]}
    relative = r"\S+ \[\S+ \S+, ([-+]\d+) % \[([-+]\d+), ([-+]\d+)\]"
    told = {
        (method, metric): re.search(f"{metric} {relative}", points[method])
        for method in PAPERS
        for metric in ("RS", "DNS")
    }
    grown = {place: [int(n) for n in found.groups()] for place, found in told.items() if found}
    clear = {place for place, (_, low, high) in grown.items() if low > 0 or high < 0}
    assert clear == {("rome", "DNS")}
    assert len(grown) == 6

    page, readme = flowing(PAGE), flowing(README)
    cost = [
        f"{rate[method, metric] - rate[f'{method} + sadr', metric]:.1f}"
        for method in PAPERS
        for metric in ("ES", "PS")
    ]
    (dns, dns_low, dns_high), (rs, rs_low, rs_high) = grown["rome", "DNS"], grown["rome", "RS"]
    gained = f"it raises DNS by {dns} % relative [{dns_low}, {dns_high}]"
    unclear = f"RS by {rs} % [{rs_low}, {rs_high}]"
    paid = f"for {cost[0]} points of ES and {cost[1]} of PS"
    assert f"with ROME {gained} and {unclear}, no clear difference, {paid}." in page
    assert f"On Gemma {gained} with ROME, and nothing else clearly ({unclear}), {paid};" in readme
    gains = [grown[method, metric][0] for method in PAPERS[1:] for metric in ("RS", "DNS")]
    assert (
        "With MEMIT RS gains {} % and DNS {} % for {} and {} points, with PMET RS gains {} % and "
        "DNS {} % for {} and {}; none of these four gains is clear."
    ).format(*gains[:2], *cost[2:4], *gains[2:], *cost[4:]) in page
    held = {name: f"from {prob[name]:.3f} to {prob[f'{name} + sadr']:.3f}" for name in PAPERS}
    fall = f"prompt falls {held['rome']} with ROME and {held['memit']} with MEMIT"
    assert fall in page and fall in readme
    assert f"(not with PMET: {held['pmet'].removeprefix('from ')})" in page
    given = {name: (f"{greedy[f'{name} + sadr']:.1f}", f"{greedy[name]:.1f}") for name in PAPERS}
    assert (
        "the new target on {} % of the edited prompts instead of {}, on {} instead of {} and on {} "
        "instead of {}."
    ).format(*(part for name in PAPERS for part in given[name])) in page
    assert (
        f"RS is {rate['unedited', 'RS']:.1f} before an edit, {rate['rome', 'RS']:.1f} after ROME's "
        f"and {rate['rome + sadr', 'RS']:.1f} after ROME's with SADR."
    ) in page
    assert (
        f"(Gemma: from {rate['unedited', 'NS']:.1f} to {rate['unedited', 'DNS']:.1f}, an unrelated "
        f"one leaves it at {rate['unedited', 'lead-neighbour']:.1f}; ROME then takes it to "
        f"{rate['rome', 'DNS']:.1f}.)"
    ) in page


def test_page_says_what_sadr_costs() -> None:
    models = ("smollm2-135m", "gemma-3-270m")
    of = {(row["model"], row["method"], row["quantity"]): row["value"]
          for row in result_rows("cost")}  # fmt: skip
    edit, step, memory = (
        [[of[model, method, f"{what} of {one}"] for method in PAPERS] for model in models]
        for what, one in (("time", "an edit"), ("time", "a step"), ("memory", "a step"))
    )
    more = [{f"{value:.1f}" for value in own} for own in memory]
    assert more == [{"0.5"}, {"0.1"}]
    steps = {
        (model, arm["name"]): f"{arm['steps_per_edit']:g}"
        for model in models
        for arm in run_of("table3", model, "counterfact_wikidata_dev")["arms"][1:]
    }
    time = [f"{min(own):.1f} to {max(own):.1f} %" for own in edit]
    of_step = [f"{min(own):+.1f} to {max(own):+.1f} %" for own in step]
    every, kept = ([value for own in both for value in own] for both in (edit, memory))
    assert (
        f"takes {min(every):.1f} to {max(every):.1f} % longer with it, and a step of its search "
        f"keeps {min(kept):.1f} to {max(kept):.1f} % more;"
    ) in flowing(README)
    text = flowing(PAGE)
    assert f"SADR adds {time[0]} to the time of an edit on SmolLM2 and {time[1]} on Gemma" in text
    assert f"about as long ({of_step[0]} and {of_step[1]}; least" in text
    assert "A step keeps 0.5 % more on SmolLM2 and 0.1 % more on Gemma." in text
    (first, second) = ([steps[model, arm] for arm in ("pmet", "pmet + sadr")] for model in models)
    assert (
        f"take {first[0]} steps without SADR and {first[1]} with it on SmolLM2, {second[0]} and "
        f"{second[1]} on Gemma"
    ) in text
