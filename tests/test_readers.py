"""Benchmark files: each format, and everything that a file can have wrong."""

from __future__ import annotations

import copy
import functools
import json
import operator
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import driftlens as dl
from driftlens.assets import asset
from driftlens.cases import ALL_METRICS, Case, Cloze, Commonsense
from driftlens.errors import DataError
from driftlens.readers import FORMATS, read_cases

LOUVRE = {
    "prompt": "The Louvre is in the city of",
    "subject": "The Louvre",
    "target_new": "Rome",
    "target_true": "Paris",
}
REQUEST = dl.EditRequest("{} is in the city of", "The Louvre", "Rome", "Paris")
RECORDS: dict[str, dict[str, Any]] = {
    "merged": {
        "requested_rewrite": LOUVRE,
        "rewrite": {"prompts": [LOUVRE["prompt"]], "targets": ["Rome"]},
        "p-paraphrase": {"prompts": ["Where is The Louvre? In"], "targets": ["Rome"]},
        "p-subject_alias": {"prompts": ["Le Louvre est à"], "targets": ["Roma"]},
        "p-reasoning": {"prompts": ["The country of The Louvre is"], "targets": ["Italy"]},
        "l-neighbor": {"prompts": ["The Eiffel Tower is in"], "targets": ["Paris"]},
        "l-relation": {"prompts": ["The Louvre is a"], "targets": ["museum"]},
        "generation": {"prompts": ["The Louvre is known for"]},
        "o-commonsense": {"prompts": "To read", "right": "open a book.", "wrong": "eat it."},
    },
    "counterfact": {
        "case_id": 7,
        "pararel_idx": 1,
        "requested_rewrite": {
            "prompt": "{} is in the city of",
            "relation_id": "P131",
            "target_new": {"str": "Rome", "id": "Q220"},
            "target_true": {"str": "Paris", "id": "Q90"},
            "subject": "The Louvre",
        },
        "paraphrase_prompts": ["Where is The Louvre? In"],
        "neighborhood_prompts": ["The Eiffel Tower is in"],
        "attribute_prompts": ["The Colosseum is in"],
        "generation_prompts": ["The Louvre is known for"],
    },
    "knowedit": {
        "subject": "The Louvre",
        "prompt": LOUVRE["prompt"],
        "target_new": "Rome",
        "ground_truth": ["Paris", "City of Paris"],
        "rephrase": "Where is The Louvre? In",
        "portability": {
            "Subject_Aliasing": [
                {"prompt": "The Grand Louvre is in", "ground_truth": [["Rome", "Roma"]]}
            ],
            "Reasoning": [{"prompt": "The country of The Louvre is", "ground_truth": [["Italy"]]}],
        },
        "locality": {
            "Relation_Specificity": [
                {"prompt": "The Louvre is a", "ground_truth": [["museum", "art museum"]]}
            ]
        },
    },
    "zsre": {
        "subject": "The Louvre",
        "src": "What city is The Louvre in?",
        "pred": "Lyon",
        "rephrase": "Where is The Louvre?",
        "alt": "Rome",
        "answers": ["Paris"],
        "loc": "nq question: who wrote Hamlet",
        "loc_ans": "Shakespeare",
        "cond": "Lyon >> Rome || What city is The Louvre in?",
        "portability": {
            "Recalled Relation": "(Rome, country, Italy)",
            "New Question": "In which country is The Louvre?",
            "New Answer": "Italy",
        },
    },
    "driftlens": {
        "id": "louvre-city",
        "category": "city",
        **LOUVRE,
        "prompt": "{} is in the city of",
        "paraphrases": ["Where is The Louvre? In"],
        "neighbors": [{"prompt": "The Eiffel Tower is in", "answer": "Paris"}],
        "relations": [{"prompt": "The Louvre is a", "answer": "museum"}],
        "distractors": [{"prompt": "He saw The Louvre. Berlin is in", "answer": "Germany"}],
        "aliases": ["The Grand Louvre is in", {"prompt": "Le Louvre est à", "answer": "Roma"}],
        "reasoning": [{"prompt": "The country of The Louvre is", "answer": "Italy"}],
        "generation": ["The Louvre is known for"],
        "commonsense": [{"prompt": "To read", "right": "open a book.", "wrong": "eat it."}],
    },
}
PARAPHRASES = ("Where is The Louvre? In",)
NEIGHBOURS = (Cloze("The Eiffel Tower is in", "Paris"),)
RELATIONS = (Cloze("The Louvre is a", "museum"),)
ALIASES = (Cloze("The Grand Louvre is in", "Rome"), Cloze("Le Louvre est à", "Roma"))
REASONING = (Cloze("The country of The Louvre is", "Italy"),)
GENERATION = ("The Louvre is known for",)
COMMONSENSE = (Commonsense("To read", "open a book.", "eat it."),)
CASES = {
    "merged": Case(
        "data-0", REQUEST, PARAPHRASES, NEIGHBOURS, RELATIONS, ALIASES[1:], REASONING, (),
        GENERATION, COMMONSENSE,
    ),
    "counterfact": Case(
        "counterfact-7", REQUEST, PARAPHRASES, NEIGHBOURS, generation=GENERATION
    ),
    "knowedit": Case(
        "data-0", REQUEST, PARAPHRASES, (), RELATIONS, ALIASES[:1], REASONING
    ),
    "zsre": Case(
        "data-0",
        dl.EditRequest("What city is {} in?", "The Louvre", "Rome", "Paris"),
        ("Where is The Louvre?",),
        (Cloze("nq question: who wrote Hamlet?", "Shakespeare"),),
        reasoning=(Cloze("In which country is The Louvre?", "Italy"),),
    ),
    "driftlens": Case(
        "louvre-city", REQUEST, PARAPHRASES, NEIGHBOURS, RELATIONS, ALIASES, REASONING,
        (Cloze("He saw The Louvre. Berlin is in", "Germany"),), GENERATION, COMMONSENSE, "city",
    ),
}  # fmt: skip


def write(folder: Path, *records: Any, name: str = "data.json") -> Path:
    path = folder / name
    lines = [json.dumps(record) for record in records]
    path.write_text("\n".join(lines) if name.endswith("l") else f"[{', '.join(lines)}]")
    return path


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("file", ["data.json", "data.jsonl"])
def test_each_format_tells_a_case(name: Any, file: str, tmp_path: Path) -> None:
    path = write(tmp_path, RECORDS[name], name=file)
    found = read_cases(path)
    assert found.format == name
    assert list(found) == [CASES[name]]
    assert list(read_cases(path, name)) == [CASES[name]]
    assert found.to_dataframe()["paraphrases"].tolist() == [1]


def test_optional_fields_may_be_missing(tmp_path: Path) -> None:
    for name, required in {
        "merged": {"requested_rewrite", "rewrite"},
        "counterfact": {"requested_rewrite", "paraphrase_prompts"},
        "knowedit": {"subject", "prompt", "target_new"},
        "zsre": {"subject", "src", "alt", "answers"},
        "driftlens": {"prompt", "subject", "target_new", "target_true"},
    }.items():
        record = {key: value for key, value in RECORDS[name].items() if key in required}
        (case,) = read_cases(write(tmp_path, record), name)  # type: ignore[arg-type]
        assert case.request.subject == "The Louvre"


def changed(name: str, path: str, value: Any) -> dict[str, Any]:
    """A record with one field replaced, or removed if the value is ``...``."""
    record = copy.deepcopy(RECORDS[name])
    *parents, last = path.split(".")
    part: Any = record
    for key in parents:
        part = part[int(key) if key.isdigit() else key]
    if value is ...:
        del part[last]
    else:
        part[last] = value
    return record


@pytest.mark.parametrize(
    ("name", "field", "value", "message"),
    [
        ("merged", "requested_rewrite", None, "requested_rewrite: .*valid dictionary"),
        ("merged", "requested_rewrite.target_new", "", "requested_rewrite.target_new: it is empty"),
        ("merged", "requested_rewrite.subject", 3, "requested_rewrite.subject: .*valid string"),
        ("merged", "requested_rewrite.subject", "The Prado", "holds the subject 0 times"),
        ("merged", "requested_rewrite.prompt", "The Louvre and The Louvre are", "2 times"),
        ("merged", "p-paraphrase.targets", [], "p-paraphrase: 1 prompts and 0 targets"),
        ("merged", "l-neighbor", ["x"], "l-neighbor: .*valid dictionary"),
        ("merged", "l-relation.prompts", ["x", " "], "l-relation.prompts.1: it is empty"),
        ("merged", "o-commonsense.right", ..., "o-commonsense.right: Field required"),
        ("counterfact", "requested_rewrite.target_new", "Rome", "target_new: .*valid dictionary"),
        ("merged", "requested_rewrite.target_true", "Rome", "target_new: it is the true answer"),
        (
            "merged",
            "l-relations",
            {},
            "no prompts are called 'l-relations'; l-neighbor, l-relation",
        ),
        ("counterfact", "requested_rewrite.prompt", "The Louvre is in", "prompt: .*exactly one"),
        ("counterfact", "requested_rewrite.target_new.str", " Paris", "str: it is the true answer"),
        ("counterfact", "paraphrase_prompts", "x", "paraphrase_prompts: .*valid list"),
        ("counterfact", "neighbourhood_prompts", ["x"], "no prompts are called 'neighbourhood_pr"),
        ("knowedit", "locality.Relations", [], "locality: no prompts are called 'Relations'; Forg"),
        ("knowedit", "portability.Reasonings", [], "called 'Reasonings'; Logical_Generalization"),
        ("knowedit", "portability.Reasoning", [{}], "portability.Reasoning.0.prompt: Field requir"),
        ("knowedit", "locality.Relation_Specificity.0.ground_truth", [], "ground_truth: .*string"),
        ("knowedit", "prompt", "It is in", "prompt: it holds the subject 0 times"),
        ("knowedit", "rephrases", ["x"], "no prompts are called 'rephrases'"),
        ("knowedit", "Portability", {}, "no prompts are called 'Portability'"),
        ("knowedit", "paraphrase", "x", "no prompts are called 'paraphrase'"),
        ("knowedit", "Locality", {}, "no prompts are called 'Locality'; locality, portability"),
        ("zsre", "answers", [], "answers: .*at least 1 item"),
        ("zsre", "locality_prompts", [], "called 'locality_prompts'; portability, rephrase are"),
        ("zsre", "portability.New Answer", ..., "portability.New Answer: Field required"),
        ("zsre", "portability.New Question", "", "portability.New Question: "),
        ("zsre", "loc_ans", None, "of loc and loc_ans there is one without the other"),
        ("zsre", "loc", ..., "of loc and loc_ans there is one without the other"),
        ("driftlens", "paraphrases", ["Where is {}? In"], r"paraphrases.0: it holds \{\}, and"),
        ("driftlens", "neighbors.0.prompt", "{} is in", r"neighbors.0.prompt: it holds \{\}"),
        ("driftlens", "aliases", ["{} is in"], r"aliases.0: it holds \{\}"),
        ("driftlens", "aliases", [{"prompt": "{} is", "answer": "b"}], "aliases.0.prompt: it hol"),
        ("driftlens", "aliases", [{"prompt": "Paris is"}], "aliases.0.answer: Field required"),
        ("driftlens", "aliases", [{"prompt": "P is", "answer": None}], "aliases.0: its answer is"),
        ("driftlens", "neighbors.0.answers", "x", "neighbors.0.answers: Extra inputs are not"),
        ("driftlens", "commonsense.0.left", "x", "commonsense.0.left: Extra inputs are not"),
        ("merged", "l-relation.prompts", ["x", "{}"], r"l-relation.prompts.1: it holds \{\}"),
        ("counterfact", "neighborhood_prompts", ["{} is"], r"neighborhood_prompts.0: it holds"),
        ("knowedit", "rephrase", "{} lies in", r"rephrase: it holds \{\}"),
        ("knowedit", "rephrase", " ", "rephrase: it is empty"),
        ("driftlens", "aliases", ["Paris is", ""], "aliases.1: it is empty"),
        ("knowedit", "rephrase", ["It is in", "{} is"], r"rephrase.1: it holds \{\}"),
        ("knowedit", "rephrase", 3, "rephrase: .*valid list"),
        ("knowedit", "rephrase_prompt", "It lies in", "of rephrase and rephrase_prompt there may"),
        ("merged", "p-paraphrase.targets", ["Bonn"], "p-paraphrase.targets.0: 'Bonn' is not the n"),
        ("zsre", "rephrase", "Where is {}?", r"rephrase: it holds \{\}"),
        ("zsre", "alt", "\ud800", "alt: it holds half of a surrogate pair"),
        ("driftlens", "neighbors.0.answer", ..., "neighbors.0.answer: Field required"),
        ("driftlens", "neighbours", [], "neighbours: Extra inputs are not permitted"),
        ("driftlens", "target_true", 3, "target_true: .*valid string"),
        ("zsre", "alt", "Paris", "alt: it is the true answer"),
        ("driftlens", "aliases", [3], "aliases.0: .*neither a valid prompt"),
        ("driftlens", "target_new", "Paris", "target_new: it is the true answer"),
        ("driftlens", "prompt", "The {} and {} are", "prompt: .*exactly one"),
    ],
)
def test_a_bad_record_is_named(
    name: Any, field: str, value: Any, message: str, tmp_path: Path
) -> None:
    path = write(tmp_path, RECORDS[name], changed(name, field, value))
    with pytest.raises(DataError, match=f"data.json: Record 1.*{message}"):
        read_cases(path)
    found = read_cases(path, strict=False)
    assert list(found) == [CASES[name]]
    assert [s.record for s in found.skipped] == [1]
    assert "1 skipped" in repr(found)


def test_what_files_of_knowedit_hold_beside(tmp_path: Path) -> None:
    record = changed("knowedit", "locality.Forgetfulness", [{"prompt": "x", "ground_truth": "y"}])
    record["rephrase_prompt"] = record.pop("rephrase")
    assert list(read_cases(write(tmp_path, record))) == [CASES["knowedit"]]


def test_a_field_that_stands_twice(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    line = json.dumps(RECORDS["zsre"])
    twice = f'{line[:-1]}, "alt": "Oslo"}}'
    inner = json.dumps(RECORDS["driftlens"]).replace('"answer":', '"answer": "x", "answer":', 1)
    path.write_text(f"{line}\n{twice}\n")
    with pytest.raises(DataError, match="Record 1, alt: it stands there twice"):
        read_cases(path)
    path.write_text(f"{json.dumps(RECORDS['driftlens'])}\n{inner}\n")
    with pytest.raises(DataError, match=r"Record 1, neighbors.0.answer: it stands there twice"):
        read_cases(path)
    whole = tmp_path / "data.json"
    whole.write_text(f"[{line}, {twice}]")
    found = read_cases(whole, strict=False)  # the others are read
    assert (len(found), str(found.skipped[0])) == (1, "Record 1, alt: it stands there twice.")


def test_no_name_of_a_field_is_taken_for_one_that_stands_twice(tmp_path: Path) -> None:
    record = RECORDS["knowedit"] | {"\0twice": "subject"}
    (case,) = read_cases(write(tmp_path, record), "knowedit")
    assert case == CASES["knowedit"]


def test_two_records_of_one_name(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match="Record 1, id: the name 'louvre-city' stands for an earlier"
    ):
        read_cases(write(tmp_path, RECORDS["driftlens"], RECORDS["driftlens"]))


def test_a_line_that_is_no_json(tmp_path: Path) -> None:
    path = write(tmp_path, RECORDS["zsre"], name="data.jsonl")
    path.write_text("{not\n\n" + path.read_text())
    with pytest.raises(DataError, match="Record 0: no JSON"):
        read_cases(path)
    found = read_cases(path, strict=False)
    assert [case.id for case in found] == ["data-1"]
    assert str(found.skipped[0]).startswith("Record 0: no JSON")


@pytest.mark.parametrize("name", ["data.jsonl", "data.ndjson"])
def test_a_line_that_is_no_text(name: str, tmp_path: Path) -> None:
    path = write(tmp_path, RECORDS["zsre"], name="lines.jsonl")
    line = path.read_bytes()
    path = path.rename(tmp_path / name)
    path.write_bytes(b"\xef\xbb\xbf" + line.rstrip() + b"\n" + line.replace(b"Rome", b"R\xffme"))
    with pytest.raises(DataError, match="Record 1: no UTF-8 text, invalid start byte"):
        read_cases(path)
    found = read_cases(path, strict=False)
    assert (len(found), [skipped.record for skipped in found.skipped]) == (1, [1])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "no JSON"),
        (b"{}", "no list"),
        (b"[]", "format of .* is unknown"),
        (b'[{"a": 1}]', "format of .* is unknown"),
        (b"[" * 100_000, "no JSON, nested too deeply"),
        (b'{"a": 1}\n{"a": ', "cannot be read: no JSON, Extra data"),
        (b"\xff\xfe", "no UTF-8"),
        (b'[{"requested_rewrite": 1, "rewrite": 2}, 3]', "requested_rewrite"),
    ],
)
def test_files_that_hold_no_cases(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_cases(path, strict=False)
    with pytest.raises(DataError, match=message):
        read_cases(path)


@pytest.mark.parametrize("name", ["data.json", "data.ndjson", "data.jsonl"])
def test_lines_of_json_under_another_name(name: str, tmp_path: Path) -> None:
    path = write(tmp_path, RECORDS["zsre"], RECORDS["zsre"], name="other.jsonl")
    assert len(path.read_text().splitlines()) == 2
    renamed = path.rename(tmp_path / name)
    assert [case.id for case in read_cases(renamed)] == ["data-0", "data-1"]


def test_groups_of_knowedit_may_be_null(tmp_path: Path) -> None:
    record = RECORDS["knowedit"]
    for changed in ({"portability": None}, {"portability": {"Reasoning": None}, "locality": None}):
        (case,) = read_cases(write(tmp_path, {**record, **changed}))
        assert not case.reasoning and not case.aliases
        assert bool(case.relations) == ("locality" not in changed)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read: No such file"):
        read_cases(tmp_path / "none.json")
    with pytest.raises(DataError, match="no format 'x'"):
        read_cases(write(tmp_path, RECORDS["zsre"]), "x")  # type: ignore[arg-type]


def test_a_byte_order_mark_is_no_part_of_it(tmp_path: Path) -> None:
    path = write(tmp_path, RECORDS["zsre"])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(read_cases(path)) == 1


def test_slices_and_single_cases() -> None:
    found = read_cases(asset("facts.jsonl"))
    assert found[:2] == (found[0], found[1])


# --- anything at all --------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)


def paths(value: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """All places in a record."""
    items = (
        value.items() if isinstance(value, dict)
        else enumerate(value) if isinstance(value, list)
        else ()
    )  # fmt: skip
    inner = [p for key, item in items for p in paths(item, (*prefix, key))]
    return [prefix, *inner] if prefix else inner


def strings(value: Any) -> Iterator[str]:
    """All texts in a record."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from strings(part)


def damaged(rng: random.Random, record: Any, values: list[Any]) -> Any:
    """A record with one to three fields removed, replaced or added, or something else instead."""
    if rng.random() < 0.05:
        return rng.choice(values)
    record = copy.deepcopy(record)
    for _ in range(rng.randint(1, 3)):
        places = paths(record)
        if not places:
            break
        *parents, last = rng.choice(places)
        part: Any = record
        for key in parents:
            part = part[key]
        kind = rng.choice(["replaced", "removed", "added"])
        if kind == "replaced":
            part[last] = copy.deepcopy(rng.choice(values))
        elif kind == "removed":
            del part[last]
        elif isinstance(part, list):
            part.append(copy.deepcopy(rng.choice(values)))
        else:
            part[rng.choice("abc")] = copy.deepcopy(rng.choice(values))
    return record


def names_a_place(field: str, record: Any) -> bool:
    """Whether a path leads to something in a record, or to where something is missing."""

    def at(place: tuple[Any, ...]) -> Any:
        return functools.reduce(operator.getitem, place, record)

    there = {".".join(map(str, place)): at(place) for place in paths(record)}  # names hold dots
    parent, _, _ = field.rpartition(".")
    container = there.get(parent) if parent else record
    return not field or field in there or isinstance(container, dict)


@pytest.mark.parametrize("value", [[1], 1.5, True, {}, ""])
def test_the_name_of_a_case_may_be_a_number(value: Any, tmp_path: Path) -> None:
    path = write(tmp_path, changed("counterfact", "case_id", value))
    with pytest.raises(DataError, match=r"Record 0, case_id: "):
        read_cases(path, "counterfact")
    (case,) = read_cases(write(tmp_path, changed("counterfact", "case_id", "7")), "counterfact")
    assert case == CASES["counterfact"]


RECORDS_IN_A_FILE = 100


@pytest.mark.parametrize("file", ["data.json", "data.jsonl"])
@pytest.mark.parametrize("name", FORMATS)
def test_ten_thousand_damaged_records(name: Any, file: str, tmp_path: Path) -> None:
    """Each is a case or is refused with a reason, and harms no other: 2 x 5 x 10 x 100 of them."""
    path = tmp_path / file

    @settings(
        max_examples=10,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(JSON, min_size=10, max_size=30), st.integers(0, 2**32))
    def check(values: list[Any], seed: int) -> None:
        rng = random.Random(seed)
        bad = [damaged(rng, RECORDS[name], values) for _ in range(RECORDS_IN_A_FILE)]
        lines = [json.dumps(record) for record in [RECORDS[name], *bad]]
        path.write_text("\n".join(lines) if file.endswith("l") else f"[{', '.join(lines)}]")
        found = read_cases(path, name, strict=False)
        assert found[0] == CASES[name]
        refused_ones = {skipped.record - 1 for skipped in found.skipped}
        accepted = [record for i, record in enumerate(bad) if i not in refused_ones]
        assert len(found) == 1 + len(accepted)
        assert len(refused_ones) >= 20  # some damage is of what is not read
        for case, record in zip(found[1:], accepted, strict=True):
            texts = {part.strip() for part in strings(record)}
            assert {case.request.subject, case.request.target_new} <= texts  # none made up
            assert all(probe.prompt and probe.right for probe in case.probes(ALL_METRICS))
        assert all(skipped.reason for skipped in found.skipped)
        assert sum(bool(skipped.field) for skipped in found.skipped) > len(found.skipped) / 2
        for skipped in found.skipped:
            assert names_a_place(skipped.field, bad[skipped.record - 1]), skipped
        if found.skipped:
            with pytest.raises(DataError) as refused:
                read_cases(path, name)
            assert str(found.skipped[0]) in str(refused.value)

    check()
