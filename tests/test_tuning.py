"""The defaults of the small models are what the recorded searches found."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from driftlens.assets import asset
from driftlens.editing.defaults import (
    _SHARES,
    GAMMAS,
    KNOWN,
    SADR_GAMMA,
    by_depth,
    defaults,
    is_known,
    sadr_gamma,
)
from driftlens.editing.methods import METHODS
from driftlens.experiments.tuning import TUNED, Search, value_of

FOLDER = Path(__file__).parent.parent / "assets" / "results" / "tuning"
CASES = {"smollm2-135m": 24, "gemma-3-270m": 16}
LIKE = {"gemma-3-270m": "smollm2-135m"}
"""Whose values a search began with."""


class Replay(Search):
    """A search that finds every trial in its journal."""

    def trial(self, config: Any, gamma: float | None = None, whole: bool = False) -> dict[str, Any]:
        wanted = {**asdict(config), "gamma": gamma}
        wanted = {k: list(v) if isinstance(v, tuple) else v for k, v in wanted.items()}
        of_all = CASES[self.model.info.name]
        of_size = of_all if whole else of_all // 2
        found = [
            record
            for record in self.journal
            if {**record["unit"]["config"], "gamma": record["unit"]["gamma"]} == wanted
            and len(record["unit"]["cases"]) == of_size
        ]
        assert len(found) == 1, (self.method, wanted, whole)
        return found[0]

    def _of(self, method: str) -> Search:
        return Replay(self.model, method, self.cases, self.out, like=self.like)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", TUNED)
def test_defaults_are_what_the_search_found(name: str, method: str) -> None:
    kind = TUNED[name]
    model: Any = SimpleNamespace(info=SimpleNamespace(name=name, n_layers=kind[1]))
    like = KNOWN[TUNED[LIKE[name]]] if name in LIKE else None
    search = Replay(model, method, [], FOLDER, like=like)
    best = search.best()
    known = KNOWN[kind].get(method, KNOWN[kind].get(_SHARES.get(method, "")))
    assert METHODS[method].config(**known) == best
    assert GAMMAS[kind][method] == search.best_gamma(best)


@pytest.mark.parametrize("name", TUNED)
def test_tuned_models_are_known_by_their_shape(name: str) -> None:
    info = json.loads(asset(f"results/known-{name}.json").read_text("utf-8"))["model"]
    assert TUNED[name][1:] == (info["n_layers"], info["d_model"], info["n_kv_heads"])


def of_shape(model_type: str, n_layers: int, d_model: int, n_kv_heads: int) -> Any:
    return SimpleNamespace(
        hf_model=SimpleNamespace(config=SimpleNamespace(model_type=model_type)),
        info=SimpleNamespace(n_layers=n_layers, d_model=d_model, n_kv_heads=n_kv_heads),
    )


@pytest.mark.parametrize("kind", KNOWN)
def test_another_width_is_another_model(kind: tuple[str, int, int, int]) -> None:
    model_type, n_layers, d_model, n_kv_heads = kind
    known, other = of_shape(*kind), of_shape(model_type, n_layers, d_model // 2, n_kv_heads)
    for method in KNOWN[kind].keys() - {"ft"}:
        assert is_known(known, method)
        assert not is_known(other, method)
        assert defaults(other, method) == by_depth(n_layers, method)
        assert sadr_gamma(known, method) == GAMMAS.get(kind, {}).get(method, SADR_GAMMA)
        assert sadr_gamma(other, method) == SADR_GAMMA


def test_layers_by_depth() -> None:
    assert by_depth(12, "rome") == by_depth(12, "r-rome") == {"layer": 3}
    assert by_depth(12, "memit") == by_depth(12, "alphaedit") == {"layers": (2, 3, 4)}
    assert by_depth(12, "emmet") == {"layers": (3,)}
    assert by_depth(12, "ft-m") == by_depth(12, "ft-l") == {"layer": 8}
    assert by_depth(12, "grace") == {"layer": 10}


def test_llama_2_and_3_have_values_of_their_own() -> None:
    second, third = (of_shape("llama", 32, 4096, n_kv_heads) for n_kv_heads in (32, 8))
    found = {
        name: [METHODS[name].config(**defaults(model, name)) for model in (second, third)]
        for name in ("rome", "memit", "pmet")
    }
    told = {
        name: [(one.steps, one.clamp_factor, one.weight_decay) for one in both]
        for name, both in found.items()
    }
    assert told == {
        "rome": [(25, 4.0, 1e-3), (25, 4.0, 1e-3)],
        "memit": [(25, 4.0, 1e-3), (20, 4.0, 1e-3)],
        "pmet": [(20, 1.0, 0.5), (20, 4.0, 0.5)],
    }
    assert [is_known(model, "emmet") for model in (second, third)] == [True, False]
    assert [is_known(model, "alphaedit") for model in (second, third)] == [False, True]


def trial(**rates: float) -> dict[str, Any]:
    return {"rates": {"ES": 100.0, "PS": 100.0, "NS": 50.0, "RS": 50.0, "DNS": 50.0} | rates}


def test_what_trials_are_compared_by() -> None:
    in_order = [
        {"error": "no such case"},
        trial(ES=50.0, NS=90.0, RS=90.0, DNS=90.0),
        trial(ES=98.9),
        trial(PS=45.0),  # 50 points short: as bad as losing everything else
        trial(PS=90.0),
        trial(PS=94.9, NS=80.0, RS=80.0, DNS=80.0),
        trial(NS=0.0, RS=0.0, DNS=0.0),
        trial(NS=90.0, RS=30.0, DNS=29.0),
        trial(PS=95.0),
        trial(NS=53.0),
    ]
    values = [value_of(one) for one in in_order]
    assert values == sorted(values)
    assert value_of(trial(PS=95.0))[-1] == value_of(trial())[-1] == 50.0
    # Without paraphrases, or with nothing but the edit.
    assert value_of({"rates": {"ES": 99.0, "RS": 40.0}}) == (True, True, 40)
    assert value_of({"rates": {"ES": 90.0}}) == (False, False, -9.0)
