"""Drift, recomputed from the attention of two Hugging Face models that were never wrapped."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

import driftlens as dl
from driftlens import drift as drift_module
from driftlens import figures
from driftlens.drift import resolve_query, subjects_of
from driftlens.tokens import Span

PROMPT = "The Eiffel Tower is in"
SUBJECT = "Eiffel Tower"
REQUEST = dl.EditRequest("The {} is in", SUBJECT, "Rome", "Paris")
PROMPTS = [
    "The Eiffel Tower is in",
    "In the city of Paris, the Eiffel Tower",
    "Ada wrote about the Eiffel Tower, the Louvre, and the city of",
]

architectures = pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)


# --- two models, with and without the package -------------------------------------------------


@cache
def lens(architecture: str) -> dl.LensModel:
    return dl.load_model(tiny.hf_model(architecture, scale=12.0, noise=0.1), tiny.tokenizer())


@cache
def reference(architecture: str, edited: bool) -> Any:
    """An unwrapped model; if ``edited``, the delta is added to its weight by hand."""
    model = tiny.hf_model(architecture, scale=12.0, noise=0.1)
    if edited:
        name, left, right = factors(architecture)
        with torch.no_grad():
            dict(model.named_parameters())[name].add_(left @ right.T)
    return model


def factors(architecture: str) -> tuple[str, torch.Tensor, torch.Tensor]:
    """A rank-two change, larger than the weight itself, of layer 0's down-projection."""
    down = lens(architecture).down_projection(0)
    generator = torch.Generator().manual_seed(5)
    rows, columns = down.weight.shape
    left = torch.randn(rows, 2, generator=generator)
    right = torch.randn(columns, 2, generator=generator)
    size = 1.5 * float(down.weight.detach().norm() / (left @ right.T).norm())
    return down.name, size * left, right


@cache
def an_edit(architecture: str) -> dl.Edit:
    name, left, right = factors(architecture)
    delta = dl.LowRankDelta(left, right)
    return dl.Edit.from_deltas(lens(architecture), {name: delta}, request=REQUEST)


@torch.no_grad()
def attention(architecture: str, text: str, edited: bool, query: int = -1) -> np.ndarray:
    """``[layer, head, key]`` from Hugging Face's own ``output_attentions``."""
    ids = torch.tensor([tiny.tokenizer()(text)["input_ids"]])
    seen = reference(architecture, edited)(ids, output_attentions=True).attentions
    return torch.stack([layer[0, :, query] for layer in seen]).numpy()


def positions(text: str, subject: str) -> tuple[int, int]:
    """First and last token of the subject, from the lengths of the decoded pieces."""
    pieces = [tiny.tokenizer().decode([i]) for i in tiny.tokenizer()(text)["input_ids"]]
    assert "".join(pieces) == text
    ends = np.cumsum([len(piece) for piece in pieces])
    start = text.index(subject)
    first = int(np.searchsorted(ends, start, side="right"))
    last = int(np.searchsorted(ends, start + len(subject), side="left"))
    return first, last


def weights_of(model: dl.LensModel) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.weights.parameters.items()}


# --- the numbers -----------------------------------------------------------------------------


@architectures
def test_rows_are_hugging_faces_in_both_models(architecture: str) -> None:
    drift = dl.measure_drift(lens(architecture), an_edit(architecture), PROMPT)
    (found,) = drift.prompts
    before = attention(architecture, PROMPT, edited=False)
    after = attention(architecture, PROMPT, edited=True)
    np.testing.assert_allclose(found.original, before, atol=2e-6)
    np.testing.assert_allclose(found.edited, after, atol=2e-6)
    first, last = positions(PROMPT, SUBJECT)
    assert (found.subject.start, found.subject.last) == (first, last)
    assert found.query == before.shape[-1] - 1
    np.testing.assert_allclose(drift.original[0], before[:, :, last], atol=2e-6)
    np.testing.assert_allclose(drift.edited[0], after[:, :, last], atol=2e-6)
    # The edit of layer 0's MLP acts from layer 1 on, and by a lot.
    assert np.array_equal(found.original[0], found.edited[0])
    assert np.abs(before - after)[1:].max() > 0.02


@architectures
def test_many_prompts_at_once_are_as_each_alone(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, edit = lens(architecture), an_edit(architecture)
    together = dl.measure_drift(model, edit, PROMPTS)
    monkeypatch.setattr(drift_module, "PROMPTS_PER_BATCH", 2)
    in_two_batches = dl.measure_drift(model, edit, PROMPTS)
    assert len({p.original.shape for p in together.prompts}) == 3
    for index, text in enumerate(PROMPTS):
        for many in (together, in_two_batches):
            found = many.prompts[index]
            assert found.prompt == text
            np.testing.assert_allclose(
                found.original, attention(architecture, text, edited=False), atol=5e-6
            )
            np.testing.assert_allclose(
                found.edited, attention(architecture, text, edited=True), atol=5e-6
            )


@pytest.mark.parametrize("architecture", ["gptj", "llama", "gemma3"])
@pytest.mark.parametrize("query", [-1, -2, 10, 11])
def test_any_query_that_sees_the_subject(architecture: str, query: int) -> None:
    drift = dl.measure_drift(lens(architecture), an_edit(architecture), PROMPT, query=query)
    expected = attention(architecture, PROMPT, edited=True, query=query)
    np.testing.assert_allclose(drift.prompts[0].edited, expected, atol=2e-6)
    assert drift.prompts[0].query == query % expected.shape[-1]


def test_derived_quantities_follow_from_the_rows() -> None:
    drift = dl.measure_drift(lens("llama"), an_edit("llama"), PROMPTS)
    n_layers, n_heads = 3, 4
    assert drift.original.shape == (3, n_layers, n_heads)
    for i, text in enumerate(PROMPTS):
        first, last = positions(text, SUBJECT)
        before = attention("llama", text, edited=False).astype(float)
        after = attention("llama", text, edited=True).astype(float)
        for y in range(n_layers):
            for x in range(n_heads):
                p, q = before[y, x], after[y, x]
                change = q[last] - p[last]
                assert drift.difference[i, y, x] == pytest.approx(change, abs=5e-6)
                assert drift.original_subject[i, y, x] == pytest.approx(
                    sum(p[first : last + 1]), abs=5e-6
                )
                assert drift.edited_subject[i, y, x] == pytest.approx(
                    sum(q[first : last + 1]), abs=5e-6
                )
                kl = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
                assert drift.kl[i, y, x] == pytest.approx(kl, abs=1e-4)
            largest = max(after[y, :, last]) - max(before[y, :, last])
            assert drift.max_head[i, y] == pytest.approx(largest, abs=5e-6)
            mean = sum(after[y, :, last] - before[y, :, last]) / n_heads
            assert drift.mean_head[i, y] == pytest.approx(mean, abs=5e-6)
    assert drift.kl[:, 1:].max() > 0.1
    assert not drift.kl[:, 0].any()
    # The largest head's change is not the largest change of a head.
    assert np.abs(drift.max_head - drift.difference.max(-1)).max() > 1e-3


def test_an_edit_that_changes_nothing_drifts_nowhere() -> None:
    model = lens("gptj")
    down = model.down_projection(1)
    edit = dl.Edit.from_deltas(model, {down.name: torch.zeros_like(down.weight)})
    drift = dl.measure_drift(model, edit, PROMPTS, SUBJECT)
    assert not drift.difference.any()
    assert not drift.kl.any()


def test_top_heads_are_those_that_grew_most_on_average() -> None:
    drift = dl.measure_drift(lens("gptj"), an_edit("gptj"), PROMPTS)
    everything = [(drift.difference[:, y, x].mean(), y, x) for y in range(3) for x in range(4)]
    expected = sorted(everything, key=lambda item: -item[0])[:4]
    found = drift.top_heads(4)
    assert [h.name for h in found] == [f"L{y}H{x}" for _, y, x in expected]
    for head, (change, y, x) in zip(found, expected, strict=True):
        assert head.drift == pytest.approx(change, abs=1e-6)
        assert head.edited == pytest.approx(drift.edited[:, y, x].mean(), abs=1e-6)
        assert head.kl == pytest.approx(drift.kl[:, y, x].mean(), abs=1e-6)
    assert found[0].drift > 0
    assert len(drift.top_heads(100)) == 12


# --- prompts and subjects ----------------------------------------------------------------------


def test_a_negative_number_of_heads_is_refused() -> None:
    drift = dl.measure_drift(lens("llama"), an_edit("llama"), PROMPTS)
    assert drift.top_heads(0) == []
    with pytest.raises(dl.RequestError, match="k is -3. Give 0 or more."):
        drift.top_heads(-3)


def test_each_prompt_may_have_its_own_subject() -> None:
    model, edit = lens("llama"), an_edit("llama")
    texts = ["The Louvre is in", "The Eiffel Tower is in"]
    drift = dl.measure_drift(model, edit, texts, ["Louvre", "Eiffel"])
    for i, (text, subject) in enumerate(zip(texts, ["Louvre", "Eiffel"], strict=True)):
        _, last = positions(text, subject)
        expected = attention("llama", text, edited=True)[:, :, last]
        np.testing.assert_allclose(drift.edited[i], expected, atol=5e-6)


def test_the_occurrence_of_the_subject_can_be_chosen() -> None:
    model, edit = lens("llama"), an_edit("llama")
    text = "Paris is Paris in"
    first, second = (
        dl.measure_drift(model, edit, text, "Paris", occurrence=n).prompts[0].subject
        for n in (0, 1)
    )
    assert first.last < second.start
    assert dl.measure_drift(model, edit, text, "Paris", occurrence=-1).prompts[0].subject == second


def test_labels_show_the_text() -> None:
    drift = dl.measure_drift(lens("llama"), an_edit("llama"), PROMPT)
    found = drift.prompts[0]
    assert "".join(found.labels) == PROMPT
    inside = "".join(found.labels[found.subject.start : found.subject.end])
    assert inside.strip() == SUBJECT


def test_bos_is_a_position_like_any_other() -> None:
    inner = tiny.hf_model("llama", scale=12.0, noise=0.1)
    model = dl.load_model(inner, tiny.bos_tokenizer())
    name, left, right = factors("llama")
    edit = dl.Edit.from_deltas(model, {name: dl.LowRankDelta(left, right)}, request=REQUEST)
    drift = dl.measure_drift(model, edit, PROMPT)
    ids = torch.tensor([[0, *tiny.tokenizer()(PROMPT)["input_ids"]]])
    with torch.no_grad():
        seen = reference("llama", True)(ids, output_attentions=True).attentions
    expected = torch.stack([layer[0, :, -1] for layer in seen]).numpy()
    np.testing.assert_allclose(drift.prompts[0].edited, expected, atol=2e-6)
    assert drift.prompts[0].subject.last == positions(PROMPT, SUBJECT)[1] + 1
    assert drift.prompts[0].labels[0] == "<s>"


def test_what_cannot_be_measured_is_refused() -> None:
    model, edit = lens("llama"), an_edit("llama")
    nameless = dl.Edit.from_deltas(model, edit.deltas)
    with pytest.raises(dl.TokenError, match="'Eiffel Tower' is not in 'The Louvre is in'"):
        dl.measure_drift(model, edit, "The Louvre is in")
    with pytest.raises(dl.TokenError, match="occurs 1 time"):
        dl.measure_drift(model, edit, PROMPT, occurrence=1)
    with pytest.raises(dl.RequestError, match=r"does not say which subject.*Pass subject"):
        dl.measure_drift(model, nameless, PROMPT)
    with pytest.raises(dl.RequestError, match="There is no prompt"):
        dl.measure_drift(model, edit, [])
    with pytest.raises(dl.RequestError, match="2 prompts, but 1 subjects"):
        dl.measure_drift(model, edit, PROMPTS[:2], [SUBJECT])
    with pytest.raises(dl.RequestError, match="no position 99"):
        dl.measure_drift(model, edit, PROMPT, query=99)
    with pytest.raises(dl.RequestError, match=r"before the subject's last token.*later"):
        dl.measure_drift(model, edit, PROMPT, query=9)
    with pytest.raises(dl.EditError, match="made for"):
        dl.measure_drift(lens("gptj"), edit, PROMPT)


def test_a_prompt_that_is_too_long_is_refused() -> None:
    with pytest.raises(dl.DriftLensError, match="128"):
        dl.measure_drift(lens("gpt2"), an_edit("gpt2"), PROMPT + " in Rome" * 60)


def test_an_edit_that_is_applied_already_is_refused() -> None:
    model, edit = lens("llama"), an_edit("llama")
    with edit.applied(model), pytest.raises(dl.DriftLensError):
        dl.measure_drift(model, edit, PROMPT)


def test_small_decisions() -> None:
    edit = an_edit("llama")
    assert subjects_of(edit, None, 2) == [SUBJECT] * 2
    assert subjects_of(edit, ("a", "b"), 2) == ["a", "b"]
    encoded = lens("llama").tokens.encode(PROMPT)
    assert resolve_query(encoded, -1, Span(1, 3)) == len(encoded) - 1
    assert resolve_query(encoded, 2, Span(1, 3)) == 2
    with pytest.raises(dl.RequestError):
        resolve_query(encoded, 1, Span(1, 3))


# --- the model stays as it was -----------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["gpt2", "gptj", "llama"])
@pytest.mark.parametrize("failing_pass", [None, 1, 2])
def test_weights_are_untouched_also_when_a_pass_fails(
    architecture: str, failing_pass: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, edit = lens(architecture), an_edit(architecture)
    before = weights_of(model)
    passes = 0
    run = dl.LensModel.run

    def counted(self: dl.LensModel, *args: Any, **options: Any) -> torch.Tensor:
        nonlocal passes
        passes += 1
        if passes == failing_pass:
            raise ArithmeticError("on purpose")
        return run(self, *args, **options)

    monkeypatch.setattr(dl.LensModel, "run", counted)
    if failing_pass is None:
        dl.measure_drift(model, edit, PROMPT)
    else:
        with pytest.raises(ArithmeticError, match="on purpose"):
            dl.measure_drift(model, edit, PROMPT)
    assert passes == (failing_pass or 2)
    assert not model.weights.is_edited
    for name, parameter in model.weights.parameters.items():
        assert torch.equal(parameter, before[name]), name


# --- tables, files, figures ----------------------------------------------------------------------


def test_the_table_has_one_row_for_each_prompt_layer_and_head() -> None:
    drift = dl.measure_drift(lens("llama"), an_edit("llama"), PROMPTS[:2])
    table = drift.to_dataframe()
    assert len(table) == 2 * 3 * 4
    row = table[(table.prompt == PROMPTS[1]) & (table.layer == 2) & (table["head"] == 1)]
    assert row["name"].tolist() == ["L2H1"]
    for column in ("original", "edited", "difference", "original_subject", "edited_subject", "kl"):
        assert row[column].item() == pytest.approx(float(getattr(drift, column)[1, 2, 1]))


def test_a_drift_survives_the_disk(tmp_path: Path) -> None:
    drift = dl.measure_drift(lens("llama"), an_edit("llama"), PROMPTS, label="mine")
    path = drift.save(tmp_path / "deep" / "drift.npz")
    assert [p.name for p in path.parent.iterdir()] == ["drift.npz"]
    back = dl.load_drift(path)
    assert (back.model_name, back.edit_label) == (drift.model_name, "mine")
    assert back.engine == drift.engine == "suffix"
    for old, new in zip(drift.prompts, back.prompts, strict=True):
        assert (old.prompt, old.labels, old.subject, old.query) == (
            new.prompt, new.labels, new.subject, new.query,
        )  # fmt: skip
        assert np.array_equal(old.original, new.original)
        assert np.array_equal(old.edited, new.edited)
    assert np.array_equal(drift.kl, back.kl)


def test_drifts_are_compared_by_their_numbers(tmp_path: Path) -> None:
    drift = dl.measure_drift(lens("llama"), an_edit("llama"), PROMPTS)
    again = dl.load_drift(drift.save(tmp_path / "drift.npz"))
    assert again == drift
    first = again.prompts[0]
    edited = first.edited.copy()
    edited[0, 0, 0] += 1e-3
    assert replace(again, prompts=(replace(first, edited=edited), *again.prompts[1:])) != drift
    assert replace(first, query=first.query - 1) != first
    assert first != "a drift"


def test_drifts_of_different_prompts_are_not_subtracted() -> None:
    drift = dl.measure_drift(lens("llama"), an_edit("llama"), PROMPTS)
    last = drift.prompts[2]
    for what, change in (
        ("of different prompts", {"prompt": "Another"}),
        ("of different subjects", {"subject": replace(last.subject, start=last.subject.start - 1)}),
        ("of different rows of the prompts", {"query": last.query - 1}),
        ("begin from different attention", {"original": 1 - last.original}),
    ):
        other = replace(drift, prompts=(*drift.prompts[:2], replace(last, **change)))
        with pytest.raises(dl.RequestError, match=f"{what}. Measure both"):
            drift.plot(cured=other)
    with pytest.raises(dl.RequestError, match="of different models"):
        drift.plot(cured=replace(drift, model_name="another"))
    fewer = tuple(replace(p, original=p.original[:1], edited=p.edited[:1]) for p in drift.prompts)
    with pytest.raises(dl.RequestError, match="begin from different attention"):
        drift.plot(cured=replace(drift, prompts=fewer))
    assert drift.plot(cured=replace(drift, edit_label="again")).data


def test_a_map_of_another_row_says_so() -> None:
    model, edit = lens("llama"), an_edit("llama")
    title = dl.measure_drift(model, edit, PROMPTS[0]).plot().layout.title.text
    assert "from token" not in title
    earlier = dl.measure_drift(model, edit, PROMPTS[0], query=-2)
    row = earlier.prompts[0].query
    assert f"(from token {row})" in earlier.plot().layout.title.text.replace("<br>", " ")
    several = dl.measure_drift(model, edit, [PROMPTS[0]] * 2, query=-2).plot().layout.title.text
    assert "(from other tokens)" in several.replace("<br>", " ")


def test_patterns_of_heads_and_prompts_that_do_not_exist_are_refused() -> None:
    model = lens("llama")
    for head, error, said in (
        ((0, -1), dl.RequestError, "has no head L0H-1"),
        ((0, 99), dl.RequestError, "has no head L0H99"),
        ((99, 0), dl.ModelError, "There is no layer 99"),
    ):
        with pytest.raises(error, match=said):
            drift_module.attention_patterns(model, "The Eiffel Tower", [head])
    with pytest.raises(dl.RequestError, match="more than the 128"):
        drift_module.attention_patterns(lens("gpt2"), " in Rome" * 60, [(0, 0)])


def test_a_drift_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    drift = dl.measure_drift(lens("llama"), an_edit("llama"), PROMPT)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(dl.DataError, match="cannot be written"):
        drift.save(tmp_path / "file" / "drift.npz")
    assert (tmp_path / "file").read_text() == "in the way"


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    drift = dl.measure_drift(lens("llama"), an_edit("llama"), PROMPT)
    path = drift.save(tmp_path / "drift.npz")
    data = path.read_bytes()
    with pytest.raises(dl.DataError, match="no drift in"):
        dl.load_drift(tmp_path / "absent.npz")
    for damaged in (b"", b"nonsense", data[: len(data) // 2], data[:-30]):
        path.write_bytes(damaged)
        with pytest.raises(dl.DataError, match="no drift in"):
            dl.load_drift(path)
    np.savez(path, something=np.zeros(3))
    with pytest.raises(dl.DataError, match="no drift in"):
        dl.load_drift(path)


@pytest.mark.parametrize("lost", ["model_name", "edit_label", "prompts"])
def test_files_that_lack_a_field_are_refused(lost: str, tmp_path: Path) -> None:
    drift = dl.measure_drift(lens("llama"), an_edit("llama"), PROMPT)
    path = drift.save(tmp_path / "drift.npz")
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    record = json.loads(str(arrays.pop("record")))
    del record[lost]
    np.savez(path, record=np.array(json.dumps(record)), **arrays)
    with pytest.raises(dl.DataError):
        dl.load_drift(path)


def test_the_figure_shows_the_arrays() -> None:
    drift = dl.measure_drift(lens("llama"), an_edit("llama"), PROMPTS)
    figure = drift.plot()
    maps = [trace for trace in figure.data if trace.type == "heatmap"]
    shown = [drift.original, drift.edited, drift.difference]
    assert len(maps) == 3
    for trace, array in zip(maps, shown, strict=True):
        np.testing.assert_allclose(np.asarray(trace.z, dtype=float), array.mean(0), atol=1e-7)
    assert [list(row) for row in maps[0].text][2][1] == "L2H1"
    # Before and after share one scale; the difference has one of its own, symmetric around 0.
    assert maps[0].coloraxis == maps[1].coloraxis != maps[2].coloraxis
    scale = figure.layout[maps[2].coloraxis]
    assert scale.cmin == -scale.cmax
    assert scale.cmax == pytest.approx(np.abs(drift.difference.mean(0)).max())
    assert figure.layout[maps[0].coloraxis].cmin == 0


def test_a_cured_edit_is_shown_beside() -> None:
    model, edit = lens("llama"), an_edit("llama")
    name, left, right = factors("llama")
    half = dl.Edit.from_deltas(model, {name: dl.LowRankDelta(left / 2, right)}, request=REQUEST)
    drift = dl.measure_drift(model, edit, PROMPT)
    cured = dl.measure_drift(model, half, PROMPT, label="half as much")
    figure = drift.plot(cured)
    maps = {
        annotation.text: trace
        for annotation, trace in zip(figure.layout.annotations, figure.data, strict=True)
    }
    np.testing.assert_allclose(maps["half as much"].z, cured.edited[0], atol=1e-7)
    np.testing.assert_allclose(maps["half as much - original"].z, cured.difference[0], atol=1e-7)
    assert len(figure.data) == 5


def test_figures_have_no_cloud_button(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    figure = figures.probability_bars({"before": {"Paris": 0.5}}, title="T")
    shown: list[dict[str, Any]] = []
    monkeypatch.setattr(figures.pio, "show", lambda *_, **options: shown.append(options))
    figure._ipython_display_()
    figure.show(renderer="json")
    assert [options["config"]["showSendToCloud"] for options in shown] == [False, False]
    figure.write_html(tmp_path / "figure.html", include_plotlyjs=False)
    for text in (figure.to_html(include_plotlyjs=False), (tmp_path / "figure.html").read_text()):
        assert '"showSendToCloud": false' in text
    assert '"displaylogo": true' in figure.to_html({"displaylogo": True})
    assert figures.CONFIG["plotlyServerURL"] == ""  # plotly takes it out of what it is given


def test_a_query_is_a_whole_number_of_any_type(tmp_path: Path) -> None:
    model, edit = lens("llama"), an_edit("llama")
    found = dl.measure_drift(model, edit, PROMPT, query=np.int64(-1))
    found.save(tmp_path / "drift.npz")
    assert dl.load_drift(tmp_path / "drift.npz") == dl.measure_drift(model, edit, PROMPT)
    with pytest.raises(dl.DriftLensError, match=r"query is -1.0. Give a whole number"):
        dl.measure_drift(model, edit, PROMPT, query=-1.0)  # type: ignore[arg-type]
