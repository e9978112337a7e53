"""That the tests check shapes."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import jaxtyping
import pytest
import torch
import typechecking

MODULE = """
from __future__ import annotations
from dataclasses import dataclass
from jaxtyping import Float
from torch import Tensor

def square(x: Float[Tensor, "n n"], shift: int = 0) -> Float[Tensor, "n n"]:
    return x[shift:]

def plain(x: int) -> int:
    return x

class Holder:
    @property
    def wrong(self) -> Float[Tensor, "2"]:
        return self.made()

    @staticmethod
    def made():
        import torch
        return torch.zeros(3)

@dataclass(frozen=True)
class Pair:
    a: Float[Tensor, "n"]
    b: Float[Tensor, "n"]
"""


def test_shapes_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shapes_example.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    typechecking.install("shapes_example")
    found = importlib.import_module("shapes_example")
    good, bad = torch.zeros(2, 2), torch.zeros(2, 3)
    assert found.square(good).shape == (2, 2)
    for call in (
        lambda: found.square(bad), lambda: found.square(good, 1), lambda: found.Holder().wrong,
        lambda: found.Pair(good[0], bad[0]),
    ):  # fmt: skip
        with pytest.raises(jaxtyping.TypeCheckError):
            call()
    assert found.plain("text") == "text"  # the package's own errors speak here
    assert found.Pair(good[0], good[1]).a.shape == (2,)


def test_the_package_is_checked() -> None:
    from driftlens import drift

    original = vars(drift.Drift)["original"].fget
    assert is_checked(drift.attention_patterns)
    assert is_checked(original)
    assert not is_checked(drift.load_drift)


def is_checked(what: object) -> bool:
    code = getattr(what, "__code__", None)
    return code is not None and "jaxtyping" in code.co_filename
