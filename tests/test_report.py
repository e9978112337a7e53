"""The page about a benchmark run: its numbers, its prompts, its size, and that text stays text."""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import tiny
from browsing import Browser, browser, chromium  # noqa: F401

import driftlens as dl
from driftlens import cli
from driftlens.assets import asset
from driftlens.bench import UNEDITED, Arm, BenchResult, Job, Setting, arm_from_dict, run_bench
from driftlens.cases import ALL_METRICS, Case, Cloze
from driftlens.documents import Section, TableOf, document
from driftlens.errors import ModelError, RequestError, TokenError
from driftlens.readers import read_cases
from driftlens.report import ABOUT_THE_SUBJECT, look_into, report, telling_prompts
from driftlens.scoring import score_details

QUICK = dl.FtConfig(layer=1, steps=3, lr=1e-2)
ARMS = [
    Arm(UNEDITED),
    Arm("ft", "ft-m", QUICK),
    Arm("ft + sadr", "ft-m", QUICK, (dl.SADR(gamma=50.0, heads="all", layers=(2,)),)),
]
HOSTILE = "</script><script>document.title = 'taken'</script><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def model() -> dl.LensModel:
    return dl.load_model(tiny.hf_model("gpt2", 1), tiny.tokenizer(), name="tiny")


@pytest.fixture(scope="module")
def result(model: dl.LensModel, tmp_path_factory: pytest.TempPathFactory) -> BenchResult:
    first, *others = read_cases(asset("facts.jsonl"))[:4]
    strange = replace(first, relations=(*first.relations, Cloze(f"{HOSTILE} is", "art")))
    folder = tmp_path_factory.mktemp("bench")
    return run_bench(model, [strange, *others], ARMS, folder, progress=False)


def test_arms_come_back_from_the_plan(result: BenchResult) -> None:
    assert [arm_from_dict(one) for one in result.plan["arms"]] == ARMS
    with pytest.raises(RequestError, match="no editor"):
        arm_from_dict({**result.plan["arms"][1], "method": "magic"})


def test_the_page_holds_the_tables(result: BenchResult) -> None:
    shown = report(result)
    for arm in ("ft", "ft + sadr"):
        for rate in result.rates(arm).values():
            assert f"<td>{rate.value:.1f} [{rate.low:.1f}, {rate.high:.1f}]</td>" in shown
    for metric, found in result.compare("ft + sadr", "ft").items():
        row = rf"<td>ft \+ sadr</td><td>ft</td><td>{metric}</td><td>{re.escape(str(found))}</td>"
        assert re.search(row, shown)
    assert "not complete" not in shown
    prob = result.rates("ft", "prob")["DNS"]
    assert f"<td>ft</td><td>DNS</td><td>{prob.value:.3f}</td>" in shown


def test_what_is_missing_or_failed_is_said(
    model: dl.LensModel, result: BenchResult, tmp_path: Path
) -> None:
    class Half:
        device = "cpu"

        def run(
            self, jobs: Iterable[Job], setting: Setting
        ) -> Iterator[tuple[Job, Case, dict[str, Any]]]:
            job = next(iter(jobs))
            yield job, job.cases[0], {"error": "EditError: no <such> thing"}

    cases = list(result.cases.values())
    half = run_bench(model, cases, ARMS, tmp_path, executor=Half(), progress=False)
    shown = report(half)
    assert "11 of 12 are missing" in shown
    assert "1 edits failed" in shown and "no &lt;such&gt; thing" in shown


@pytest.mark.parametrize(
    ("metrics", "charts"), [(("distractor",), 1), (("ES", "PS"), 1), (("ES", "RS"), 2)]
)
def test_a_run_of_few_metrics_shows_these(
    metrics: Any, charts: int, model: dl.LensModel, tmp_path: Path
) -> None:
    cases = read_cases(asset("facts.jsonl"))[:4]
    setting = Setting(metrics=metrics)
    found = run_bench(model, cases, ARMS, tmp_path, setting=setting, progress=False)
    shown = report(found)
    assert len(re.findall(r"newPlot\(\s*\"results-", shown)) == charts
    assert f"({'; '.join(f'{name}, {ALL_METRICS[name]}' for name in metrics)})." in shown
    assert "harmonic mean" not in shown
    head, _, first, *_ = found.to_markdown().splitlines()
    assert head == f"| arm | {' | '.join(metrics)} | seconds |"
    assert first.startswith(f"| unedited | {found.rates('unedited')[metrics[0]]} |")


def test_telling_prompts_lost_most_and_came_back(result: BenchResult) -> None:
    found = telling_prompts(result, 10)
    frame = result.to_dataframe()
    wide = frame[frame["metric"].isin(ABOUT_THE_SUBJECT)].pivot_table(
        index=["case", "prompt", "right_text"], columns="arm", values="right_prob"
    )
    kept = wide["ft + sadr"] - wide["ft"]
    score = np.minimum(wide[UNEDITED] - wide["ft"], kept).groupby("case").max()
    expected = score[score > 0].sort_values(ascending=False)
    assert [prompt.case.id for prompt in found] == list(expected.index)
    assert [prompt.score for prompt in found] == pytest.approx(list(expected))
    assert telling_prompts(result, 1) == found[:1]
    assert {(prompt.arm, prompt.held) for prompt in found} == {("ft", "ft + sadr")}
    alone = telling_prompts(result, 10, arm="ft + sadr")
    assert all(prompt.held is None and np.isnan(prompt.kept) for prompt in alone)
    with pytest.raises(RequestError, match="no arm 'rome'"):
        telling_prompts(result, arm="rome")


def test_a_restriction_of_another_configuration_is_not_what_came_back(
    model: dl.LensModel, result: BenchResult, tmp_path: Path
) -> None:
    unedited, plain, held = ARMS
    assert held.config is not None
    other = replace(held, config=replace(held.config, steps=held.config.steps + 1))
    cases = list(result.cases.values())[:2]
    found = run_bench(model, cases, [unedited, plain, other], tmp_path, progress=False)
    assert {prompt.held for prompt in telling_prompts(found, 10)} == {None}


def test_edits_made_again_give_what_the_run_measured(
    model: dl.LensModel, result: BenchResult
) -> None:
    prompt = telling_prompts(result, 1)[0]
    comparison = look_into(model, result, prompt)
    read = comparison.readouts()
    assert read["original model"].prob == pytest.approx(prompt.before, rel=1e-4)
    assert read["edited"].prob == pytest.approx(prompt.after, rel=1e-4)
    assert read["edited with SADR"].prob == pytest.approx(prompt.kept, rel=1e-4)
    asked = score_details(model, prompt.probe.prompt, [prompt.probe.right])
    assert asked[prompt.probe.right].prob == pytest.approx(prompt.before, rel=1e-4)
    other = dl.load_model(tiny.hf_model("gpt2", 2), tiny.tokenizer(), name="other")
    with pytest.raises(ModelError, match="Load tiny"):
        look_into(other, result, prompt)
    inner = copy.deepcopy(model.hf_model)
    otherwise = dl.load_model(inner, model.tokenizer, separator="", name="tiny")
    with pytest.raises(ModelError, match=r"differed from this one in separator\. Load it as"):
        look_into(otherwise, result, prompt)


@pytest.mark.browser
def test_the_page_in_a_browser(
    model: dl.LensModel,
    result: BenchResult,
    browser: Browser,  # noqa: F811
) -> None:
    found = telling_prompts(result, 1)[0]
    hostile = replace(found, probe=replace(found.probe, prompt=HOSTILE))
    browser.open_html(report(result, [(hostile, look_into(model, result, found))]))
    assert browser.js("return document.title") == "Knowledge edits of tiny"
    assert len(browser.all(".js-plotly-plot .main-svg")) >= 6  # two in each of three charts
    assert HOSTILE in browser.text("#prompts")
    assert not browser.all("img, script[src]")
    frame = browser.find("details.frame iframe")
    assert not frame.get_attribute("srcdoc")
    browser.js("arguments[0].click()", browser.find("details.frame summary"))
    browser.driver.switch_to.frame(frame)
    browser.driver.implicitly_wait(10)
    assert browser.find("#overview-map .cell")
    browser.js("arguments[0].click()", browser.find("#stored button"))
    browser.driver.implicitly_wait(0)
    browser.driver.switch_to.default_content()
    assert browser.js("return document.title") == "Knowledge edits of tiny"
    browser.js("document.body.style.width = '360px'")


@pytest.mark.browser
def test_charts_can_be_saved(result: BenchResult, browser: Browser, tmp_path: Path) -> None:  # noqa: F811
    browser.driver.execute_cdp_cmd(
        "Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)}
    )
    browser.open_html(report(result))
    buttons = browser.all("#results button[data-chart]")
    assert [button.text for button in buttons] == ["PNG", "SVG"] * 2
    for button in buttons[:2]:
        browser.js("arguments[0].click()", button)
    png, svg = tmp_path / "results-0.png", tmp_path / "results-0.svg"
    browser.wait(lambda: png.exists() and svg.exists())
    assert png.read_bytes().startswith(b"\x89PNG")
    drawn = ElementTree.fromstring(svg.read_text("utf-8"))
    assert drawn.tag == "{http://www.w3.org/2000/svg}svg"
    told = " ".join("".join(text.itertext()) for text in drawn.iter(f"{drawn.tag[:-3]}text"))
    assert "Success, with 95 % intervals" in told and "ft + sadr" in told


@pytest.mark.browser
def test_tall_charts_are_shown_whole(browser: Browser) -> None:  # noqa: F811
    figure = go.Figure(go.Bar(x=["a"], y=[1]), layout={"height": 900})
    browser.open_html(document("A", [], "c", [Section("s", "S", figures=[figure])]))
    [hidden] = browser.js(
        "return [...document.querySelectorAll('.chart')].map(c => c.scrollHeight - c.clientHeight)"
    )
    assert hidden <= 1


class Chance:
    """Answers by chance, as many as a real run would have."""

    device = "cpu"

    def run(
        self, jobs: Iterable[Job], setting: Setting
    ) -> Iterator[tuple[Job, Case, dict[str, Any]]]:
        rng = np.random.default_rng(0)
        for job in jobs:
            for case in job.cases:
                told = [
                    {
                        "metric": probe.metric,
                        **{name: float(rng.uniform()) for name in ("right", "wrong", "right_prob")},
                        "wrong_prob": float(rng.uniform()),
                        "exact": bool(rng.integers(2)),
                    }
                    for probe in case.probes(list(ALL_METRICS))
                ]
                yield job, case, {"answers": told, "seconds": 1.0}


@pytest.mark.browser
def test_a_run_of_200_cases_is_one_page(
    model: dl.LensModel,
    result: BenchResult,
    tmp_path: Path,
    browser: Browser,  # noqa: F811
) -> None:
    cases = list(read_cases(asset("facts.jsonl")))
    cases += [replace(case, id=f"{case.id} again") for case in cases[: 200 - len(cases)]]
    arms = [replace(arm, name=f"{arm.name}{i or ''}") for i in range(2) for arm in ARMS]
    large = run_bench(model, cases, arms, tmp_path, executor=Chance(), progress=False)
    prompt = telling_prompts(result, 1)[0]
    frames = [(prompt, look_into(model, result, prompt))] * 3
    shown = report(large, frames)
    assert len(shown.encode()) < 15e6
    browser.open_html(shown)
    assert len(browser.all(".js-plotly-plot .main-svg")) >= 6  # two in each of three charts
    prompts = browser.all("details.frame iframe")
    assert len(prompts) == 3
    assert not any(frame.get_attribute("srcdoc") for frame in prompts)  # filled when opened


def test_numbers_are_rounded_and_gaps_are_empty() -> None:
    rows = pd.DataFrame({"a": [1.23456, float("nan")], "b": ["<x>", None], "c": [1, 2]})
    shown = document("T", ["lead"], "", [Section("s", "S", tables=[TableOf("cap", rows)])])
    assert "<td>1.235</td><td>&lt;x&gt;</td><td>1</td>" in shown
    assert "<td></td><td></td><td>2</td>" in shown
    assert "Plotly" not in shown and "<nav" not in shown


def test_the_command(
    model: dl.LensModel, result: BenchResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def run(*arguments: object) -> Any:
        monkeypatch.setattr(sys, "argv", ["driftlens", "report", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code

    page = tmp_path / "page.html"
    assert run(result.folder, "-o", page, "--shown", 0) in (0, None)
    assert page.read_text() == report(result)
    assert f"wrote {page}" in capsys.readouterr().out
    assert "holds no results" in str(run(tmp_path, "-o", page))
    assert "--shown is -1" in str(run(result.folder, "-o", page, "--shown", -1))

    def fails(*_: object) -> None:
        raise TokenError("The subject is not there.")

    monkeypatch.setattr(cli, "_load", lambda *_: model)
    assert run(result.folder, "-o", page, "--shown", 1) in (0, None)
    (prompt,) = telling_prompts(result, 1)
    shown = capsys.readouterr().out
    assert f"looking into: {prompt.probe.prompt}" in shown and "left out" not in shown
    assert page.read_text().count("<iframe") == 1
    monkeypatch.setattr("driftlens.report.look_into", fails)
    assert run(result.folder, "-o", page, "--shown", 1) in (0, None)
    assert "left out: The subject is not there." in capsys.readouterr().out
    assert page.read_text() == report(result)
