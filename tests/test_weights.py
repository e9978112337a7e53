"""Weights are changed in place and come back to the bit, whatever happens in between."""

from __future__ import annotations

import errno
import json
import os
import random
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.utils.hooks import RemovableHandle

import driftlens as dl
from driftlens import digests, models, weights
from driftlens.codebook import Codebook
from driftlens.digests import WORDS, device_sums, fingerprint, quick_digest, tensor_digest
from driftlens.edits import RECORD_FILE, WEIGHTS_FILE
from driftlens.errors import DataError, DriftLensError, EditError
from driftlens.journal import CHECKSUM, digest
from driftlens.weights import DenseDelta, LowRankDelta, WeightStack

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same bytes as integers, so that -0.0 is not 0.0 and a NaN equals itself."""
    return tensor.detach().clone().contiguous().view(INTEGERS[tensor.element_size()])


def snapshot(parameters: dict[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    return {name: bits(parameter) for name, parameter in parameters.items()}


def assert_same_bits(
    parameters: dict[str, torch.nn.Parameter], before: dict[str, torch.Tensor]
) -> None:
    assert parameters.keys() == before.keys()
    changed = [name for name, p in parameters.items() if not torch.equal(bits(p), before[name])]
    assert not changed


@cache
def lens(architecture: str = "gpt2", seed: int = 0) -> dl.LensModel:
    """Shared; every test must leave it as it was."""
    return fresh(architecture, seed)


def fresh(architecture: str = "gpt2", seed: int = 0) -> dl.LensModel:
    return dl.load_model(
        tiny.hf_model(architecture, seed), tiny.tokenizer(), name=f"tiny {architecture}"
    )


def down(layer: int) -> str:
    return f"transformer.h.{layer}.mlp.c_proj.weight"


TIED = "transformer.wte.weight"
IDS = torch.tensor([[5, 70, 33, 8, 121]])


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.run(IDS) if isinstance(model, dl.LensModel) else model(IDS).logits


# --- the stack ------------------------------------------------------------------------------


def odd_parameters(dtype: torch.dtype) -> dict[str, torch.nn.Parameter]:
    """Weights with every kind of number in them: -0.0, subnormal, huge, infinite, NaN."""
    generator = torch.Generator().manual_seed(3)
    found: dict[str, torch.nn.Parameter] = {}
    for name, shape in {"a": (4, 6), "b": (5, 3), "bias": (7,), "scale": ()}.items():
        tensor = torch.randn(shape, generator=generator).to(dtype)
        if tensor.ndim == 2:
            tiny_number = torch.finfo(dtype).smallest_normal / 4
            odd = [-0.0, 0.0, tiny_number, -tiny_number, torch.finfo(dtype).max]
            tensor[0, :3] = torch.tensor(odd[:3], dtype=dtype)
            tensor[1, :2] = torch.tensor(odd[3:], dtype=dtype)
            tensor[2, :2] = torch.tensor([float("inf"), float("-inf")], dtype=dtype)
            integers = INTEGERS[tensor.element_size()]
            nan = torch.tensor(float("nan"), dtype=dtype).view(integers)
            tensor[3, :2] = torch.stack([nan | 1, nan]).view(dtype)
        found[name] = torch.nn.Parameter(tensor)
    # Two layouts in memory that are not contiguous.
    found["transposed"] = torch.nn.Parameter(torch.randn(3, 8, generator=generator).to(dtype).T)
    return found


def random_delta(shape: torch.Size, generator: random.Random, dtype: torch.dtype) -> Any:
    seeded = torch.Generator().manual_seed(generator.getrandbits(32))
    if len(shape) == 2 and generator.random() < 0.6:
        rank = generator.choice([1, 1, 2, 3])
        left = torch.randn(shape[0], rank, generator=seeded).to(dtype)
        return LowRankDelta(left, torch.randn(shape[1], rank, generator=seeded).to(dtype))
    return DenseDelta(torch.randn(shape, generator=seeded).to(dtype))


def random_deltas(
    parameters: dict[str, torch.nn.Parameter], generator: random.Random
) -> dict[str, Any]:
    names = generator.sample(sorted(parameters), k=generator.randint(1, min(3, len(parameters))))
    return {
        name: random_delta(parameters[name].shape, generator, generator.choice(DTYPES))
        for name in names
    }


def expected_bits(original: torch.Tensor, active: list[Any]) -> torch.Tensor:
    """Original plus deltas in the order in which they were switched on, rounded once."""
    if not active:
        return bits(original)
    total = original.float()
    for delta in active:
        total = total + delta.dense().float()
    return bits(total.to(original.dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=40)
@given(seed=st.integers(0, 2**32))
def test_any_order_of_switching_restores_every_bit(dtype: torch.dtype, seed: int) -> None:
    parameters = odd_parameters(dtype)
    places = {name: (id(p), p.data_ptr()) for name, p in parameters.items()}
    originals = {name: p.detach().clone() for name, p in parameters.items()}
    before = snapshot(parameters)
    stack = WeightStack(parameters)
    generator = random.Random(seed)
    active: dict[int, dict[str, Any]] = {}
    for _ in range(generator.randint(1, 12)):
        if active and generator.random() < 0.45:
            ticket = generator.choice(sorted(active))
            stack.pop(ticket)
            del active[ticket]
        else:
            deltas = random_deltas(parameters, generator)
            active[stack.push(deltas)] = deltas
        assert stack.is_edited is bool(active)
        for name, parameter in parameters.items():
            now = [deltas[name] for deltas in active.values() if name in deltas]
            assert torch.equal(bits(parameter), expected_bits(originals[name], now))
            assert torch.equal(bits(stack.original(name)), before[name])
    for ticket in generator.sample(sorted(active), k=len(active)):
        stack.pop(ticket)
    assert_same_bits(parameters, before)
    assert not stack.is_edited
    assert places == {name: (id(p), p.data_ptr()) for name, p in parameters.items()}
    assert all(p.grad is None and p.requires_grad for p in parameters.values())


def test_delta_is_added_in_float32_and_rounded_once() -> None:
    # In bfloat16 1 + 2^-9 is 1; two such deltas together are a step of 2^-8... and 2^-7 shows.
    weight = torch.nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))
    stack = WeightStack({"w": weight})
    small = DenseDelta(torch.full((2, 2), 2.0**-8))
    tickets = [stack.push({"w": small}) for _ in range(2)]
    assert torch.equal(weight, torch.full((2, 2), 1 + 2.0**-7, dtype=torch.bfloat16))
    for ticket in tickets:
        stack.pop(ticket)
    assert torch.equal(weight, torch.ones(2, 2, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_factors_are_multiplied_in_float32(dtype: torch.dtype) -> None:
    # In float16 the product of two numbers of 1e-4 is 0, and of two of 1e3 infinite.
    for size in (1e-4, 1e3):
        left, right = (torch.full((n, 1), size, dtype=dtype) for n in (2, 3))
        expected = torch.full((2, 3), float(left[0, 0]) ** 2)
        assert torch.equal(LowRankDelta(left, right).dense(), expected)
    weight = torch.nn.Parameter(torch.zeros(2, 3))
    small = torch.full((3, 1), 1e-4, dtype=dtype)
    WeightStack({"w": weight}).push({"w": LowRankDelta(small[:2], small)})
    assert torch.equal(weight, torch.full((2, 3), float(small[0, 0]) ** 2))


def test_a_delta_that_half_precision_cannot_hold_is_refused() -> None:
    model = dl.load_model(tiny.hf_model("gpt2").half(), tiny.tokenizer(), probe=False)
    before = snapshot(model.weights.parameters)
    left, right = (torch.full((n, 1), 1e3) for n in (128, 32))
    for delta in (LowRankDelta(left, right), LowRankDelta(left.half(), right.half())):
        with pytest.raises(EditError, match="not finite in torch.float16"):
            dl.Edit.from_deltas(model, {down(1): delta})
    assert_same_bits(model.weights.parameters, before)


def test_double_precision_is_kept() -> None:
    weight = torch.nn.Parameter(torch.ones(2, 2, dtype=torch.float64))
    stack = WeightStack({"w": weight})
    ticket = stack.push({"w": DenseDelta(torch.full((2, 2), 1e-12, dtype=torch.float64))})
    assert float(weight[0, 0]) == 1 + 1e-12
    stack.pop(ticket)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_suspended_deltas_come_back_to_the_bit(dtype: torch.dtype) -> None:
    generator = random.Random(0)
    parameters = odd_parameters(dtype)
    originals = snapshot(parameters)
    stack = WeightStack(parameters)
    tickets = [stack.push(random_deltas(parameters, generator)) for _ in range(3)]
    active, edited = stack.active, snapshot(parameters)
    with stack.suspended():
        assert not stack.is_edited
        assert_same_bits(parameters, originals)
    assert stack.active == active
    assert_same_bits(parameters, edited)
    for ticket in tickets:  # they are the same as before
        stack.pop(ticket)
    assert_same_bits(parameters, originals)


def test_ticket_that_is_off_already_is_ignored() -> None:
    parameters = odd_parameters(torch.float32)
    before = snapshot(parameters)
    stack = WeightStack(parameters)
    ticket = stack.push({"bias": DenseDelta(torch.ones(7))})
    for _ in range(3):
        stack.pop(ticket)
        assert_same_bits(parameters, before)
    stack.pop(12345)
    assert_same_bits(parameters, before)


@pytest.mark.parametrize(
    ("deltas", "message"),
    [
        ({"bias": DenseDelta(torch.ones(7)), "c": DenseDelta(torch.ones(7))}, "no parameter 'c'"),
        ({"bias": DenseDelta(torch.ones(7)), "a": DenseDelta(torch.ones(6, 4))}, "has shape"),
        ({"a": LowRankDelta(torch.ones(6, 1), torch.ones(4, 1))}, "has shape"),
        ({"bias": DenseDelta(torch.ones(1))}, "has shape"),
        ({"scale": DenseDelta(torch.ones(1))}, "has shape"),
    ],
)
def test_delta_that_does_not_fit_changes_nothing(deltas: dict[str, Any], message: str) -> None:
    parameters = odd_parameters(torch.float32)
    before = snapshot(parameters)
    stack = WeightStack(parameters)
    with pytest.raises(EditError, match=message):
        stack.push(deltas)
    assert_same_bits(parameters, before)
    assert not stack.is_edited


class Failing(DenseDelta):
    """A delta that cannot be formed, as when memory runs out."""

    def dense(self) -> torch.Tensor:
        raise MemoryError


@pytest.mark.parametrize("others", [0, 1])
def test_delta_that_cannot_be_formed_leaves_the_others(others: int) -> None:
    parameters = odd_parameters(torch.float32)
    before = snapshot(parameters)
    stack = WeightStack(parameters)
    tickets = [stack.push({"bias": DenseDelta(torch.ones(7))}) for _ in range(others)]
    inside = snapshot(parameters)
    with pytest.raises(MemoryError):
        stack.push(
            {
                "a": LowRankDelta(torch.ones(4, 1), torch.ones(6, 1)),
                "bias": Failing(torch.ones(7)),
                "b": DenseDelta(torch.ones(5, 3)),
            }
        )
    assert_same_bits(parameters, inside)
    for ticket in tickets:
        stack.pop(ticket)
    assert_same_bits(parameters, before)


# --- interruptions --------------------------------------------------------------------------


class Stop(BaseException):
    """Not an Exception, like KeyboardInterrupt."""


@contextmanager
def stopped(*at: int) -> Iterator[None]:
    """Inside, the writes into weights with these numbers, from 0, leave something else."""
    copy, calls = torch.Tensor.copy_, count()

    def copy_(self: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        if next(calls) in at:
            self.fill_(7)
            raise Stop
        return copy(self, source)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "copy_", copy_)
        yield


TWO = {"a": DenseDelta(torch.ones(4, 6)), "b": DenseDelta(torch.ones(5, 3))}


@pytest.mark.parametrize("at", [0, 1])
def test_a_stop_while_weights_are_written_back_is_handed_on_when_they_are(at: int) -> None:
    parameters = odd_parameters(torch.float32)
    before = snapshot(parameters)
    stack = WeightStack(parameters)
    ticket = stack.push(TWO)
    with stopped(at), pytest.raises(Stop):
        stack.pop(ticket)
    assert not stack.is_edited
    assert_same_bits(parameters, before)


@pytest.mark.parametrize("use", ["parameters", "push", "pop", "suspended", "reset"])
def test_what_two_stops_left_undone_is_known_and_done_by_the_next_use(use: str) -> None:
    parameters = odd_parameters(torch.float32)
    before = snapshot(parameters)
    stack = WeightStack(parameters)
    ticket = stack.push(TWO)
    with stopped(0, 1), pytest.raises(Stop):
        stack.pop(ticket)
    assert stack.is_edited and not stack.active
    assert not torch.equal(bits(parameters["a"]), before["a"])
    assert torch.equal(bits(stack.original("a")), before["a"])
    if use == "parameters":
        assert_same_bits(stack.parameters, before)
    elif use == "push":
        other = stack.push({"bias": DenseDelta(torch.ones(7))})
        assert torch.equal(bits(parameters["a"]), before["a"])
        stack.pop(other)
    elif use == "suspended":
        with stack.suspended():
            assert_same_bits(parameters, before)
    else:
        stack.pop(ticket) if use == "pop" else stack.reset()
    assert not stack.is_edited
    assert_same_bits(parameters, before)


@pytest.mark.parametrize("seed", range(20))
def test_stops_at_any_write_lose_no_bit(seed: int) -> None:
    generator = random.Random(seed)
    parameters = odd_parameters(torch.float32)
    originals = {name: p.detach().clone() for name, p in parameters.items()}
    before = snapshot(parameters)
    stack = WeightStack(parameters)
    active: dict[int, dict[str, Any]] = {}
    for _ in range(12):
        deltas = random_deltas(parameters, generator)
        with stopped(*generator.sample(range(8), k=3)):
            try:
                if active and generator.random() < 0.4:
                    ticket = generator.choice(sorted(active))
                    del active[ticket]  # also if it is stopped
                    stack.pop(ticket)
                elif generator.random() < 0.3:
                    with stack.suspended():
                        pass
                else:
                    active[stack.push(deltas)] = deltas
            except Stop:
                pass
        stack.settle()
        for name, parameter in parameters.items():
            now = [deltas[name] for deltas in active.values() if name in deltas]
            assert torch.equal(bits(parameter), expected_bits(originals[name], now))
    stack.reset()
    assert not stack.is_edited
    assert_same_bits(parameters, before)
    for ticket in active:  # those from before are ignored
        stack.pop(ticket)
    assert_same_bits(parameters, before)


def test_suspending_that_is_stopped_leaves_the_edits_on() -> None:
    parameters = odd_parameters(torch.float32)
    stack = WeightStack(parameters)
    ticket, other = stack.push({"a": TWO["a"]}), stack.push({"b": TWO["b"]})
    inside, active = snapshot(parameters), stack.active
    for at in (0, 1, 2, 3):  # on the way in and on the way out
        with stopped(at), pytest.raises(Stop), stack.suspended():
            pass
        assert stack.active == active
        assert_same_bits(stack.parameters, inside)
    stack.pop(ticket)
    stack.pop(other)
    assert not stack.is_edited


def test_deltas_of_nothing_are_switched_on_and_off() -> None:
    stack = WeightStack(odd_parameters(torch.float32))
    stack.pop(stack.push({}))
    assert not stack.is_edited


def test_no_pass_meets_weights_that_a_stop_left_edited() -> None:
    model = fresh()
    edit = dl.Edit.from_deltas(model, {down(1): torch.ones(128, 32)})
    before, bits_before = logits_of(model), snapshot(model.weights.parameters)
    with stopped(1, 2), pytest.raises(Stop), edit.applied(model):
        pass
    assert model.weights.is_edited
    assert torch.equal(logits_of(model), before)
    assert not model.weights.is_edited
    assert_same_bits(model.weights.parameters, bits_before)


def test_adapters_that_a_stop_left_are_taken_away(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh("llama")
    site = model.down_projection(1)
    keys = torch.zeros(1, site.d_mlp)
    book = Codebook(keys, torch.ones(1, 32), torch.full((1,), 1e9), ("a",))
    edit = dl.Edit.from_deltas(model, {site.name: book})
    before = logits_of(model)
    remove, calls = RemovableHandle.remove, count()

    def stopping(self: RemovableHandle) -> None:
        if next(calls) < 2:
            raise Stop
        remove(self)

    applied = edit.applied(model)
    applied.__enter__()
    assert not torch.equal(logits_of(model), before)
    monkeypatch.setattr(RemovableHandle, "remove", stopping)
    with pytest.raises(Stop):
        applied.__exit__(None, None, None)
    assert model.weights.is_edited
    assert torch.equal(logits_of(model), before)
    assert not model.weights.is_edited


def test_an_edit_that_was_left_on_is_named_with_the_remedy() -> None:
    model = fresh()
    edit = dl.Edit.from_deltas(model, {down(1): torch.ones(128, 32)})
    before = snapshot(model.weights.parameters)
    model.weights.push(edit.deltas)  # nobody holds its ticket
    with pytest.raises(EditError, match=r"model\.weights\.reset\(\) switches it off"):
        edit.check_not_active(model)
    with pytest.raises(EditError, match=r"model\.weights\.reset\(\) switches it off"):
        dl.Edit.from_checkpoint(model, tiny.hf_model("gpt2"))
    model.weights.reset()
    assert_same_bits(model.weights.parameters, before)
    edit.check_not_active(model)


# --- digests --------------------------------------------------------------------------------


def test_digest_sees_every_bit_the_shape_and_the_dtype() -> None:
    base = torch.zeros(2, 3)
    seen = {tensor_digest(base)}
    for other in (
        torch.full((2, 3), -0.0),
        torch.zeros(3, 2),
        torch.zeros(6),
        torch.zeros(2, 3, dtype=torch.int32),
        torch.zeros(2, 3, dtype=torch.bfloat16),
        torch.zeros(2, 3, dtype=torch.float16),
    ):
        assert tensor_digest(other) not in seen
        seen.add(tensor_digest(other))
    assert tensor_digest(torch.zeros(3, 2).T) == tensor_digest(base)
    assert tensor_digest(torch.zeros(2, 3, requires_grad=True)) == tensor_digest(base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 3, 8, 1000, 2 * WORDS + 5])
def test_sums_on_the_device_see_every_change(size: int, dtype: torch.dtype) -> None:
    """Of any one value, of two that change places, and of a bit that no comparison sees."""
    whole = torch.randn(size + 1, generator=torch.Generator().manual_seed(size)).to(dtype)
    values = whole[1:]  # 64-bit words do not begin here
    found = device_sums(values)
    assert found == device_sums(values.clone()) and device_sums(whole) != found
    for at in {0, size // 2, size - 1}:
        kept = values[at].clone()
        for other in (kept + 1, -kept, torch.nextafter(kept, kept + 1)):
            values[at] = other
            assert device_sums(values) != found
        values[at] = kept
    assert device_sums(values) == found
    if size > 3:
        for start, step in ((1, 2), (0, 2), (2, 4), (3, 8), (0, 1)):  # as a column or a row of them
            for factor in (-1, 2, 0.5, -2):
                other = values.clone()
                other[start::step] *= factor
                assert device_sums(other) != found or torch.equal(other, values)
        assert device_sums(values.flip(0)) != found
        assert device_sums(values.roll(4)) != found
    assert device_sums(torch.zeros(size, dtype=dtype)) != device_sums(
        -torch.zeros(size, dtype=dtype)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_on_the_device_see_what_happens_to_few_values(dtype: torch.dtype) -> None:
    """Two to eight of them, of which only the highest bits change."""
    values = torch.randn(4096, generator=torch.Generator().manual_seed(0)).to(dtype)
    found, chance = device_sums(values), random.Random(0)
    for _ in range(500):
        at = chance.sample(range(chance.randrange(4), 4096, 4), chance.randrange(2, 9))
        other = values.clone()
        other[at] *= chance.choice([-1, 2, 0.25])
        assert device_sums(other) != found


def test_tensors_elsewhere_are_not_copied_to_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "SUMMED", {"meta"})
    monkeypatch.setattr(digests, "_bytes_of", lambda _: pytest.fail("copied"))
    monkeypatch.setattr(digests, "device_sums", lambda tensor: bytes(str(tensor.shape), "ascii"))
    far = {"w": torch.ones(2, 3, device="meta")}
    assert quick_digest(far) == quick_digest(far) != quick_digest({"v": far["w"]})
    with pytest.raises(pytest.fail.Exception, match="copied"):
        quick_digest({"w": torch.ones(2, 3)})


def test_fingerprint_sees_names_and_not_their_order() -> None:
    one, two = torch.ones(2), torch.zeros(2)
    assert fingerprint({"a": one, "b": two}) == fingerprint({"b": two, "a": one})
    assert fingerprint({"a": one, "b": two}) != fingerprint({"a": two, "b": one})
    assert fingerprint({"a": one}) != fingerprint({"b": one})


# --- edits on a model -----------------------------------------------------------------------


def random_edit(model: dl.LensModel, generator: random.Random) -> dl.Edit:
    names = [down(1), down(2), TIED, "transformer.ln_f.bias", "transformer.wpe.weight"]
    chosen = generator.sample(names, k=generator.randint(1, 3))
    parameters = model.weights.parameters
    return dl.Edit.from_deltas(
        model,
        {n: random_delta(parameters[n].shape, generator, torch.float32) for n in chosen},
    )


def random_nesting(
    model: dl.LensModel, edits: list[dl.Edit], generator: random.Random, depth: int
) -> None:
    """Edits in one another, after one another, with themselves, left by an exception."""
    for _ in range(generator.randint(1, 2)):
        edit = generator.choice(edits)
        failing = generator.random() < 0.3
        inside = snapshot(model.weights.parameters)
        try:
            with edit.applied(model) as same:
                assert same is model
                if depth:
                    random_nesting(model, edits, generator, depth - 1)
                if failing:
                    raise generator.choice([ValueError, Stop])
        except (ValueError, Stop):
            assert failing
        assert_same_bits(model.weights.parameters, inside)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_edits_in_any_nesting_restore_every_bit(architecture: str, dtype: torch.dtype) -> None:
    hf_model = tiny.hf_model(architecture).to(dtype)
    model = dl.load_model(hf_model, tiny.tokenizer(), probe=False)
    parameters = model.weights.parameters
    assert {p.dtype for p in parameters.values()} == {dtype}
    matrices = [name for name, p in parameters.items() if p.ndim == 2]
    generator = random.Random(7)
    edits = []
    for _ in range(4):
        norm = next(name for name in parameters if "norm" in name or "ln_" in name)
        chosen = [*generator.sample(matrices, k=2), norm]
        deltas = {n: random_delta(parameters[n].shape, generator, dtype) for n in chosen}
        edits.append(dl.Edit.from_deltas(model, deltas))
    objects = {name: (id(p), p.data_ptr()) for name, p in hf_model.named_parameters()}
    flags = {name: p.requires_grad for name, p in hf_model.named_parameters()}
    before, buffers = snapshot(parameters), snapshot(dict(hf_model.named_buffers()))
    for _ in range(8):
        random_nesting(model, edits, generator, depth=3)
        assert_same_bits(parameters, before)
    assert objects == {name: (id(p), p.data_ptr()) for name, p in hf_model.named_parameters()}
    assert flags == {name: p.requires_grad for name, p in hf_model.named_parameters()}
    assert_same_bits(dict(hf_model.named_buffers()), buffers)


@pytest.mark.parametrize("seed", range(4))
def test_edits_left_in_any_order_restore_every_bit(seed: int) -> None:
    model = lens()
    generator = random.Random(seed)
    edits = [random_edit(model, generator) for _ in range(4)]
    before = snapshot(model.weights.parameters)
    contexts = [edit.applied(model) for edit in edits]
    for context in contexts:
        context.__enter__()
    assert model.weights.is_edited
    for context in generator.sample(contexts, k=len(contexts)):
        context.__exit__(None, None, None)
    assert not model.weights.is_edited
    assert_same_bits(model.weights.parameters, before)


def test_inside_the_weight_is_the_original_plus_the_deltas() -> None:
    model = lens()
    generator = random.Random(1)
    name = down(1)
    shape = model.weights.parameters[name].shape
    deltas = [random_delta(shape, generator, torch.float32) for _ in range(3)]
    edits = [dl.Edit.from_deltas(model, {name: delta}) for delta in deltas]
    original = model.weights.parameters[name].detach().clone()
    with ExitStack() as stack:
        for count, edit in enumerate(edits, start=1):
            stack.enter_context(edit.applied(model))
            now = model.weights.parameters[name].detach()
            assert torch.equal(bits(now), expected_bits(original, deltas[:count]))
            total = original.double() + sum(d.dense().double() for d in deltas[:count])
            torch.testing.assert_close(now.double(), total, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_applied_edit_acts_in_the_parameters_orientation(architecture: str) -> None:
    # GPT-2's Conv1D has [in, out], nn.Linear [out, in]; both must compute x W' + b.
    model, plain = fresh(architecture), tiny.hf_model(architecture)
    site = model.down_projection(1)
    assert site.input_first is (architecture == "gpt2")
    generator = random.Random(2)
    delta = random_delta(site.weight.shape, generator, torch.float32)
    edit = dl.Edit.from_deltas(model, {site.name: delta})
    with torch.no_grad():
        dict(plain.named_parameters())[site.name].add_(delta.dense())
    before = logits_of(model)
    with edit.applied(model):
        inside = logits_of(model)
    torch.testing.assert_close(inside, logits_of(plain), rtol=1e-5, atol=1e-4)
    assert not torch.allclose(inside, before, atol=1e-2)
    assert torch.equal(logits_of(model), before)


def test_tied_weights_change_together() -> None:
    model = lens()
    head, embedding = model.hf_model.get_output_embeddings(), model.hf_model.get_input_embeddings()
    assert head.weight is embedding.weight
    assert [n for n, p in model.weights.parameters.items() if p is head.weight] == [TIED]
    delta = torch.randn(embedding.weight.shape, generator=torch.Generator().manual_seed(0))
    edit = dl.Edit.from_deltas(model, {TIED: delta})
    original = embedding.weight.detach().clone()
    with edit.applied(model):
        assert torch.equal(embedding.weight, original + delta)
        assert head.weight is embedding.weight
    assert torch.equal(embedding.weight, original)


def by_optimizer(weight: torch.nn.Parameter) -> None:
    weight.grad = torch.ones_like(weight)
    torch.optim.Adam([weight], lr=0.1).step()
    weight.grad = None


def by_new_memory(weight: torch.nn.Parameter) -> None:
    weight.data = weight.data * 2


COUNTED: dict[str, Callable[[torch.nn.Parameter], Any]] = {
    "in place": torch.no_grad()(lambda weight: weight.mul_(2)),
    "a row": torch.no_grad()(lambda weight: weight[1].zero_()),
    "detached": lambda weight: weight.detach().mul_(2),
    "optimizer": by_optimizer,
    "new memory": by_new_memory,
}
UNCOUNTED: dict[str, Callable[[torch.nn.Parameter], Any]] = {
    "data": lambda weight: weight.data.mul_(2),
    "numpy": lambda weight: weight.detach().numpy().fill(1.0),
}
OTHER = "transformer.h.0.attn.c_attn.weight"


@pytest.mark.parametrize("how", COUNTED)
@pytest.mark.parametrize("made_by", ["an editor", "a file"])
def test_a_change_of_what_an_edit_does_not_touch_is_noticed(
    how: str, made_by: str, tmp_path: Path
) -> None:
    model = fresh()
    edit = some_edit(model)
    if made_by == "a file":
        edit.save(tmp_path)
        edit = dl.load_edit(tmp_path, model)
    weight = model.weights.parameters[OTHER]
    before = weight.detach().clone()
    with edit.applied(model):
        pass
    COUNTED[how](weight)
    for _ in range(2):
        with pytest.raises(EditError, match="with other weights"), edit.applied(model):
            pass
    weight.data.copy_(before)
    with edit.applied(model):  # and so is that it was undone
        pass


@pytest.mark.parametrize("how", [*COUNTED, *UNCOUNTED])
def test_a_change_of_what_an_edit_touches_is_noticed(how: str) -> None:
    model = fresh()
    edit = some_edit(model)
    with edit.applied(model):
        pass
    {**COUNTED, **UNCOUNTED}[how](model.weights.parameters[down(1)])
    with pytest.raises(EditError, match="other weights"), edit.applied(model):
        pass


def test_all_weights_are_read_once_whatever_is_switched(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh()
    edits = [random_edit(model, random.Random(seed)) for seed in range(3)]
    monkeypatch.setattr(models, "quick_digest", lambda _: pytest.fail("read again"))
    for edit in (*edits, *edits):
        with edit.applied(model), edits[0].applied(model), model.weights.suspended():
            pass
    with pytest.raises(pytest.fail.Exception, match="read again"):
        model.fingerprint()


def test_a_digest_is_computed_once_and_anew_for_other_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.nn.Parameter(torch.ones(2, 3))
    stack = WeightStack({"w": weight})
    hashed: list[torch.Tensor] = []
    monkeypatch.setattr(weights, "tensor_digest", lambda t: hashed.append(t) or tensor_digest(t))
    for _ in range(3):
        assert [*stack.digests("w")] == [tensor_digest(weight)]
    assert len(hashed) == 1
    ticket = stack.push({"w": DenseDelta(torch.ones(2, 3))})
    for _ in range(3):
        assert [*stack.digests("w")] == [tensor_digest(torch.ones(2, 3)), tensor_digest(weight)]
    assert len(hashed) == 2
    stack.pop(ticket)
    for number, change in enumerate(
        (lambda: weight.data.mul_(2), lambda: weight.detach().numpy().fill(-0.0)), start=3
    ):
        change()
        assert [*stack.digests("w")] == [tensor_digest(weight)]
        assert len(hashed) == number


def test_a_model_made_in_inference_mode_can_be_edited_in_it() -> None:
    with torch.inference_mode():
        model = dl.load_model(tiny.hf_model("llama"), tiny.tokenizer(), probe=False)
        name = model.down_projection(1).name
        weight = model.weights.parameters[name]
        assert weight.is_inference()
        edit, before = dl.Edit.from_deltas(model, {name: torch.ones(32, 64)}), weight.clone()
        with edit.applied(model):
            assert torch.equal(weight, before + 1)
        assert torch.equal(weight, before)


def test_edit_on_top_of_another_needs_it() -> None:
    model = lens()
    generator = random.Random(5)
    name = down(1)
    shape = model.weights.parameters[name].shape
    first, second = ({name: random_delta(shape, generator, torch.float32)} for _ in range(2))
    lower = dl.Edit.from_deltas(model, first)
    with lower.applied(model):
        upper = dl.Edit.from_deltas(model, second)
    assert upper.fingerprint == lower.fingerprint == model.fingerprint()
    before = snapshot(model.weights.parameters)
    with pytest.raises(EditError, match="other weights"), upper.applied(model):
        pass
    assert_same_bits(model.weights.parameters, before)
    with lower.applied(model), upper.applied(model):
        both = bits(model.weights.parameters[name])
    original = model.weights.parameters[name].detach()
    assert torch.equal(both, expected_bits(original, [first[name], second[name]]))
    assert_same_bits(model.weights.parameters, before)


# --- from outside ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("deltas", "message"),
    [
        (lambda w: {}, "no weight delta"),
        (lambda w: {"nothing.weight": torch.ones(2)}, "no parameter"),
        (lambda w: {down(1): torch.ones(2, 2)}, "has shape"),
        (lambda w: {down(1): torch.ones_like(w).T}, "has shape"),
        (lambda w: {down(1): torch.full_like(w, float("nan"))}, "not finite"),
        (lambda w: {down(1): torch.full_like(w, float("inf"))}, "not finite"),
        (
            lambda w: {
                down(1): LowRankDelta(
                    torch.full((w.shape[0], 1), 1e30), torch.full((w.shape[1], 1), 1e30)
                )
            },
            "not finite",
        ),
    ],
)
def test_deltas_that_make_no_edit_are_refused(
    deltas: Callable[[torch.Tensor], dict[str, Any]], message: str
) -> None:
    model = lens()
    before = snapshot(model.weights.parameters)
    with pytest.raises(EditError, match=message):
        dl.Edit.from_deltas(model, deltas(model.weights.parameters[down(1)].detach()))
    assert_same_bits(model.weights.parameters, before)
    assert not model.weights.is_edited


def test_deltas_are_described() -> None:
    model = lens()
    left, right = torch.randn(128, 2), torch.randn(32, 2)
    request = dl.EditRequest("{} is in", "Rome", "France")
    edit = dl.Edit.from_deltas(
        model, {down(1): LowRankDelta(left, right)}, request=request, method="mine"
    )
    assert (edit.method, edit.request, edit.rank) == ("mine", request, 2)
    assert "Rome is in" in repr(edit)
    assert f"changes {down(1)} (rank 2))" in repr(edit)
    dense = dl.Edit.from_deltas(model, {down(1): left @ right.T}, request=[request, request])
    assert (dense.rank, dense.request, len(dense.requests)) == (2, None, 2)
    many = dl.Edit.from_deltas(model, {down(y): left @ right.T for y in range(3)} | {
        other: torch.ones_like(p) for other, p in [*model.weights.parameters.items()][:2]
    })  # fmt: skip
    named = "; ".join(f"{down(y)} (dense)" for y in range(3))
    assert repr(many).endswith(f"changes {named}; and 2 more)")


# TransformerLens splits the joint query-key-value matrix of these under names of its own.
FUSED = ["gpt2", "gpt_neox"]


@pytest.mark.parametrize("architecture", [*FUSED, "gptj", "llama", "gemma3", "opt"])
def test_parameters_have_their_hugging_face_names(architecture: str) -> None:
    expected = {n: tuple(p.shape) for n, p in tiny.hf_model(architecture).named_parameters()}
    found = {n: tuple(p.shape) for n, p in lens(architecture).weights.parameters.items()}
    assert found == expected


@pytest.mark.parametrize("architecture", [*FUSED, "gemma3", "llama"])
def test_delta_of_any_parameter_acts_as_in_the_plain_model_or_is_refused(
    architecture: str,
) -> None:
    model, plain = lens(architecture), tiny.hf_model(architecture)
    wrong, refused = [], 0
    for name, parameter in plain.named_parameters():
        delta = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        original = parameter.detach().clone()
        with torch.no_grad():
            parameter.add_(delta)
        expected = logits_of(plain)
        with torch.no_grad():
            parameter.copy_(original)
        try:
            edit = dl.Edit.from_deltas(model, {name: delta})
        except EditError:
            refused += 1
            continue
        with edit.applied(model):
            if not torch.allclose(logits_of(model), expected, rtol=1e-4, atol=1e-4):
                wrong.append(name)
    assert not wrong
    # Six copied parameters (three layers, weight and bias) cannot be edited.
    assert refused == (6 if architecture == "gpt_neox" else 0)


def second_checkpoint(architecture: str) -> tuple[Any, set[str]]:
    """A plain model with some weights of the tiny model changed."""
    other = tiny.hf_model(architecture)
    parameters = dict(other.named_parameters())
    names = {lens(architecture).down_projection(1).name, next(iter(parameters))}
    names |= {[name for name, p in parameters.items() if p.ndim == 1][-1]}
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name in sorted(names):
            parameters[name].add_(torch.randn(parameters[name].shape, generator=generator))
    return other, names


@pytest.mark.parametrize("architecture", ["gpt2", "gemma3", "llama"])
@pytest.mark.parametrize("form", ["model", "state dict", "wrapped model", "folder", "path text"])
def test_edit_from_checkpoint_gives_its_logits(
    architecture: str, form: str, tmp_path: Path
) -> None:
    model = lens(architecture)
    other, names = second_checkpoint(architecture)
    expected = logits_of(other)
    given_as: Any = other
    if form == "state dict":
        given_as = other.state_dict()
    elif form == "wrapped model":
        given_as = dl.load_model(other, tiny.tokenizer(), probe=False).hf_model
    elif form in ("folder", "path text"):
        other.save_pretrained(tmp_path / "other")
        given_as = tmp_path / "other" if form == "folder" else str(tmp_path / "other")
    edit = dl.Edit.from_checkpoint(model, given_as)
    assert set(edit.deltas) == names
    assert edit.method == "checkpoint"
    before = logits_of(model)
    with edit.applied(model):
        found = logits_of(model)
    scale = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * max(scale, 1.0))
    assert not torch.allclose(before, expected, atol=1e-2 * scale)
    assert torch.equal(logits_of(model), before)


def test_checkpoint_without_a_difference_is_refused() -> None:
    with pytest.raises(EditError, match="same weights"):
        dl.Edit.from_checkpoint(lens("gemma3"), tiny.hf_model("gemma3"))


GEMMA_DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop(GEMMA_DOWN), "has no parameter"),
        (lambda state: state.update({GEMMA_DOWN: torch.zeros(3, 3)}), "another shape"),
        (lambda state: state.update({GEMMA_DOWN: state[GEMMA_DOWN] * float("nan")}), "not finite"),
    ],
)
def test_checkpoint_of_another_model_is_refused(
    change: Callable[[dict[str, torch.Tensor]], Any], message: str
) -> None:
    state = dict(tiny.hf_model("gemma3").state_dict())
    change(state)
    with pytest.raises(EditError, match=message):
        dl.Edit.from_checkpoint(lens("gemma3"), state)


def test_checkpoint_with_an_unembedding_of_its_own_is_refused() -> None:
    # The model ties its unembedding to the embedding, so there is no such edit of it.
    state = dict(tiny.hf_model("gemma3").state_dict())
    state["lm_head.weight"] = state["lm_head.weight"] + 1.0
    state[GEMMA_DOWN] = state[GEMMA_DOWN] + 0.1
    with pytest.raises(EditError):
        dl.Edit.from_checkpoint(lens("gemma3"), state)


def test_no_edit_from_checkpoint_inside_another_edit() -> None:
    model = lens("gemma3")
    other, _ = second_checkpoint("gemma3")
    ones = torch.ones_like(model.weights.parameters[GEMMA_DOWN])
    with (
        dl.Edit.from_deltas(model, {GEMMA_DOWN: ones}).applied(model),
        pytest.raises(EditError, match="An edit is applied to the model now"),
    ):
        dl.Edit.from_checkpoint(model, other)


def test_a_checkpoint_with_more_weights_is_refused(tmp_path: Path) -> None:
    state = dict(tiny.hf_model("llama").state_dict())
    down = "model.layers.1.mlp.down_proj"
    state[f"{down}.weight"] = state[f"{down}.weight"] + 0.1
    model = lens("llama")
    wrong: tuple[tuple[str, Any], ...] = (("epoch", 3), ("note", "hello"), ("_extra_state", None))
    for name, value in wrong:
        with pytest.raises(EditError, match=f"'{name}' in the second checkpoint is .*, no tensor"):
            dl.Edit.from_checkpoint(model, {**state, name: value})
    for more in (f"{down}.bias", f"{down}.lora_A.weight", "lm_head.bias"):
        found = {**state, more: torch.ones(3)}
        with pytest.raises(EditError, match=f"has '{re.escape(more)}', which .* does not have"):
            dl.Edit.from_checkpoint(model, found)
        tiny.hf_model("llama").save_pretrained(tmp_path / more)
        file = tmp_path / more / "model.safetensors"
        save_file({**load_file(file), more: torch.ones(3)}, file, {"format": "pt"})
        with pytest.raises(EditError, match=f"has '{re.escape(more)}', which"):
            dl.Edit.from_checkpoint(model, tmp_path / more)


@pytest.mark.parametrize(
    ("architecture", "computed"),
    [
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"),
        ("llama", "model.rotary_emb.inv_freq"),
        ("gpt2", "transformer.h.0.attn.bias"),
        ("gpt2", "transformer.h.1.attn.masked_bias"),
        ("gptj", "transformer.h.0.attn.bias"),
        ("gptj", "transformer.h.0.attn.masked_bias"),
        ("gpt_neox", "gpt_neox.layers.0.attention.masked_bias"),
        ("opt", "model.decoder.version"),
        ("gemma3", "model.embed_tokens.embed_scale"),
    ],
)
def test_what_older_checkpoints_hold_beside_weights(
    architecture: str, computed: str, tmp_path: Path
) -> None:
    model = lens(architecture)
    name = model.down_projection(0).name
    other = tiny.hf_model(architecture)
    state = {key: tensor.clone() for key, tensor in other.state_dict().items()}
    state[name] += 0.25
    found = dl.Edit.from_checkpoint(model, {**state, computed: torch.ones(3)})
    assert found.deltas.keys() == {name}
    other.load_state_dict(state)
    other.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({**load_file(file), computed: torch.ones(3)}, file, {"format": "pt"})
    assert dl.Edit.from_checkpoint(model, tmp_path).deltas == found.deltas


def test_an_adapter_is_in_no_checkpoint() -> None:
    model, other = lens("llama"), fresh("llama")
    request = dl.EditRequest("{} is in", "The Eiffel Tower", "Rome")
    edit = dl.edit(other, request, "grace", layer=1, steps=1, progress=False)
    with edit.applied(other), pytest.raises(EditError, match="An adapter is applied to the second"):
        dl.Edit.from_checkpoint(model, other)


def test_a_checkpoint_without_a_weight_or_damaged_is_refused(tmp_path: Path) -> None:
    tiny.hf_model("llama").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(
        EditError, match="lacks 1 of the model's .* that its config.json describes.$"
    ):
        dl.Edit.from_checkpoint(lens("llama"), tmp_path)
    file.write_bytes(whole[:-100])
    with pytest.raises(EditError, match="cannot be loaded"):
        dl.Edit.from_checkpoint(lens("llama"), tmp_path)


def test_an_edit_from_a_loaded_model_and_from_numpy() -> None:
    other = tiny.hf_model("llama")
    name = "model.layers.1.mlp.down_proj.weight"
    with torch.no_grad():
        dict(other.named_parameters())[name].add_(0.5)
    state = {key: value.numpy() for key, value in other.state_dict().items()}
    edited = dl.load_model(other, tiny.tokenizer())
    model = lens("llama")
    for source in (state, edited):
        found = dl.Edit.from_checkpoint(model, source)
        assert found.deltas.keys() == {name}
        torch.testing.assert_close(found.deltas[name].dense(), torch.full((32, 64), 0.5))


def test_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EditError, match="cannot be loaded"):
        dl.Edit.from_checkpoint(lens("gemma3"), tmp_path)


# --- on disk --------------------------------------------------------------------------------


def some_edit(model: dl.LensModel, seed: int = 0) -> dl.Edit:
    generator = random.Random(seed)
    parameters = model.weights.parameters
    bias = "transformer.h.1.mlp.c_proj.bias"
    left, right = torch.randn(128, 1), torch.randn(32, 1)
    made = dl.Edit.from_deltas(
        model,
        {
            down(1): LowRankDelta(left, right),
            TIED: random_delta(parameters[TIED].shape, generator, torch.bfloat16),
            bias: DenseDelta(torch.tensor([-0.0, 1e-45] * 16)),
        },
        request=[
            dl.EditRequest("{} is in", "Tōkyō {0}", "東京", "Paris"),
            dl.EditRequest("{}", "b", "c"),
        ],
    )
    made.config.update(lr=0.1, layer=1, contexts=[["", ""], ['{0} {} }{ "ü"', ""]])
    made.trace.extend([{"step": 0, "loss": 1 / 3}, {"step": 1, "loss": 2.5e-11}])
    made.info.update(seconds=1.25)
    return made


def assert_same_edit(found: dl.Edit, expected: dl.Edit) -> None:
    for name in ("method", "model_name", "fingerprint", "base_digests", "requests"):
        assert getattr(found, name) == getattr(expected, name)
    for name in ("config", "trace", "info"):
        assert getattr(found, name) == getattr(expected, name)
    assert list(found.deltas) == list(expected.deltas)
    for name, delta in expected.deltas.items():
        other = found.deltas[name]
        assert type(other) is type(delta)
        fields = ("left", "right") if isinstance(delta, LowRankDelta) else ("tensor",)
        for field in fields:
            one, two = getattr(delta, field), getattr(other, field)
            assert one.dtype == two.dtype
            assert torch.equal(bits(one), bits(two))


@pytest.mark.parametrize("with_model", [False, True])
def test_saved_edit_comes_back(with_model: bool, tmp_path: Path) -> None:
    model = lens()
    edit = some_edit(model)
    folder = tmp_path / "new" / "folder"
    assert edit.save(folder) == folder
    assert sorted(path.name for path in folder.iterdir()) == [RECORD_FILE, WEIGHTS_FILE]
    loaded = dl.load_edit(folder, model if with_model else None)
    assert_same_edit(loaded, edit)
    with edit.applied(model):
        inside = snapshot(model.weights.parameters)
    with loaded.applied(model):
        assert_same_bits(model.weights.parameters, inside)


def test_saving_twice_replaces(tmp_path: Path) -> None:
    model = lens()
    some_edit(model, 1).save(tmp_path)
    second = some_edit(model, 2)
    second.save(str(tmp_path))
    assert_same_edit(dl.load_edit(str(tmp_path)), second)


def test_loaded_edit_fits_another_copy_of_the_model(tmp_path: Path) -> None:
    some_edit(lens()).save(tmp_path)
    copy = fresh()
    before = snapshot(copy.weights.parameters)
    with dl.load_edit(tmp_path).applied(copy):
        assert copy.weights.is_edited
    assert_same_bits(copy.weights.parameters, before)


@pytest.mark.parametrize(("architecture", "seed"), [("gpt2", 1), ("llama", 0)])
def test_other_model_is_refused(architecture: str, seed: int, tmp_path: Path) -> None:
    edit = some_edit(lens())
    other = lens(architecture, seed)
    before = snapshot(other.weights.parameters)
    with pytest.raises(EditError, match="made for"), edit.applied(other):
        pass
    edit.save(tmp_path)
    with pytest.raises(EditError, match="made for"):
        dl.load_edit(tmp_path, other)
    assert_same_bits(other.weights.parameters, before)


@pytest.mark.parametrize(
    "name", ["transformer.wpe.weight", "transformer.h.0.ln_1.bias", "transformer.ln_f.weight", TIED]
)
def test_model_with_one_other_number_anywhere_is_refused(name: str, tmp_path: Path) -> None:
    # Also where the edit itself changes nothing.
    edit = some_edit(lens())
    edit.save(tmp_path)
    hf_model = tiny.hf_model("gpt2")
    with torch.no_grad():
        flat = dict(hf_model.named_parameters())[name].reshape(-1)
        flat[-1] = torch.nextafter(flat[-1], torch.tensor(1e9))
    other = dl.load_model(hf_model, tiny.tokenizer(), probe=False)
    for candidate in (edit, dl.load_edit(tmp_path)):
        with pytest.raises(EditError, match="other weights"), candidate.applied(other):
            pass
        assert not other.weights.is_edited


def test_sign_of_zero_counts(tmp_path: Path) -> None:
    edit = some_edit(lens())
    hf_model = tiny.hf_model("gpt2")
    with torch.no_grad():
        hf_model.transformer.h[0].ln_1.bias[3] = -0.0
    other = dl.load_model(hf_model, tiny.tokenizer(), probe=False)
    with pytest.raises(EditError, match="other weights"), edit.applied(other):
        pass


@pytest.mark.parametrize("missing", [RECORD_FILE, WEIGHTS_FILE])
def test_missing_file_is_named(missing: str, tmp_path: Path) -> None:
    some_edit(lens()).save(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(DataError, match="no edit in"):
        dl.load_edit(tmp_path)


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no edit in"):
        dl.load_edit(tmp_path / "absent")


def test_every_flipped_byte_of_the_tensors_is_noticed(tmp_path: Path) -> None:
    some_edit(lens()).save(tmp_path)
    path = tmp_path / WEIGHTS_FILE
    data = bytearray(path.read_bytes())
    for position in [0, 7, 8, 40, len(data) // 2, len(data) - 1]:
        damaged = bytearray(data)
        damaged[position] ^= 0x40
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="damaged"):
            dl.load_edit(tmp_path)
    path.write_bytes(data[:-1])
    with pytest.raises(DataError, match="damaged"):
        dl.load_edit(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["", "{", "null", "[]", "3", '"edit"', "{}", '{"format": 2}', '{"format": 1}', "\x00"],
)
def test_record_that_is_no_edit_is_refused(text: str, tmp_path: Path) -> None:
    some_edit(lens()).save(tmp_path)
    (tmp_path / RECORD_FILE).write_text(text, encoding="utf-8")
    with pytest.raises(DataError):
        dl.load_edit(tmp_path)


def test_record_that_is_no_text_is_refused(tmp_path: Path) -> None:
    some_edit(lens()).save(tmp_path)
    (tmp_path / RECORD_FILE).write_bytes(b'{"format": 1, "method": "\xff\xfe"}')
    with pytest.raises(DataError, match="damaged"):
        dl.load_edit(tmp_path)


def write_record(path: Path, record: dict[str, Any]) -> None:
    """A record as if it had been saved so."""
    record.pop(CHECKSUM)
    path.write_text(json.dumps({**record, CHECKSUM: digest(record)}), encoding="utf-8")


def test_a_record_that_was_changed_is_refused(tmp_path: Path) -> None:
    some_edit(lens()).save(tmp_path)
    path = tmp_path / RECORD_FILE
    saved = path.read_text("utf-8")
    for changed in (saved.replace("external", "externak"), saved.replace(f'"{CHECKSUM}"', '"x"')):
        assert changed != saved
        path.write_text(changed, encoding="utf-8")
        with pytest.raises(DataError, match="is not what was saved"):
            dl.load_edit(tmp_path)
    path.write_text("[" * 100_000, encoding="utf-8")
    with pytest.raises(DataError, match="is damaged"):
        dl.load_edit(tmp_path)


FIELDS = ["method", "model_name", "fingerprint", "base_digests", "deltas", "requests", "config"]


@pytest.mark.parametrize("field", [*FIELDS, "trace", "info"])
def test_record_without_a_field_is_refused(field: str, tmp_path: Path) -> None:
    some_edit(lens()).save(tmp_path)
    path = tmp_path / RECORD_FILE
    record = json.loads(path.read_text("utf-8"))
    del record[field]
    write_record(path, record)
    with pytest.raises(DataError, match=field):
        dl.load_edit(tmp_path)


@pytest.mark.parametrize("field", ["base_digests", "deltas", "requests"])
@pytest.mark.parametrize("value", [3, "text", None, ["x"]])
def test_record_with_a_field_of_another_type_is_refused(
    field: str, value: Any, tmp_path: Path
) -> None:
    some_edit(lens()).save(tmp_path)
    path = tmp_path / RECORD_FILE
    record = json.loads(path.read_text("utf-8"))
    record[field] = value
    write_record(path, record)
    with pytest.raises(DriftLensError), dl.load_edit(tmp_path).applied(lens()):
        pass


def test_flipped_byte_of_the_record_is_an_error_or_harmless(tmp_path: Path) -> None:
    model = lens()
    edit = some_edit(model)
    edit.save(tmp_path)
    path = tmp_path / RECORD_FILE
    data = path.read_bytes()
    generator = random.Random(0)
    refused = 0
    for position in generator.sample(range(len(data)), k=60):
        damaged = bytearray(data)
        damaged[position] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        try:
            assert_same_edit(dl.load_edit(tmp_path, model), edit)  # white space was hit
        except DriftLensError:
            refused += 1
    assert refused > 30


FullDisk = Callable[[int], None]


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> FullDisk:
    """Makes the n-th call from now on, and all after it, fail for lack of space."""

    def fill(after: int) -> None:
        real, calls = os.replace, iter(range(10**6))

        def replace(*args: Any, **kwargs: Any) -> None:
            if next(calls) >= after:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(*args, **kwargs)

        monkeypatch.setattr(os, "replace", replace)

    return fill


@pytest.mark.parametrize("after", [0, 1], ids=["first file", "second file"])
def test_full_disk_leaves_an_earlier_edit_whole(
    after: int, full_disk: FullDisk, tmp_path: Path
) -> None:
    model = lens()
    earlier = some_edit(model, 1)
    earlier.save(tmp_path)
    full_disk(after)
    with pytest.raises(EditError, match=r"cannot be written.*No space left"):
        some_edit(model, 2).save(tmp_path)
    assert_same_edit(dl.load_edit(tmp_path), earlier)
    assert sorted(path.name for path in tmp_path.iterdir()) == [RECORD_FILE, WEIGHTS_FILE]


def test_disk_that_fills_while_writing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = lens()
    earlier = some_edit(model, 1)
    earlier.save(tmp_path)

    def fsync(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(EditError, match="No space left"):
        some_edit(model, 2).save(tmp_path)
    assert_same_edit(dl.load_edit(tmp_path), earlier)
    assert sorted(path.name for path in tmp_path.iterdir()) == [RECORD_FILE, WEIGHTS_FILE]


def test_record_that_is_no_json_leaves_an_earlier_edit_whole(tmp_path: Path) -> None:
    model = lens()
    earlier = some_edit(model, 1)
    earlier.save(tmp_path)
    second = some_edit(model, 2)
    second.info["tensor"] = torch.ones(2)
    with pytest.raises((EditError, TypeError)):
        second.save(tmp_path)
    assert_same_edit(dl.load_edit(tmp_path), earlier)


def test_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("kept")
    with pytest.raises(EditError, match="cannot be written"):
        some_edit(lens()).save(path)
    assert path.read_text() == "kept"


# --- what other code bases keep ------------------------------------------------------------------


def test_deltas_may_be_numpy_arrays() -> None:
    model = dl.load_model(tiny.hf_model("llama"), tiny.tokenizer())
    name = model.down_projection(1).name
    change = torch.randn(model.weights.parameters[name].shape)
    found = dl.Edit.from_deltas(model, {name: change.numpy()})
    assert found.deltas == {name: DenseDelta(change)}


def test_deltas_are_copied_and_may_share_memory(tmp_path: Path) -> None:
    model = lens("llama")
    names = [model.down_projection(layer).name for layer in (0, 1)]
    given = np.ones((32, 64), dtype=np.float32)
    tensor = torch.ones(32, 64)
    u, v = torch.ones(32, 1), torch.ones(64, 1)
    for source, change in (
        (given, given), (tensor, tensor), (DenseDelta(tensor), tensor), (LowRankDelta(u, v), u)
    ):  # fmt: skip
        found = dl.Edit.from_deltas(model, dict.fromkeys(names, source))
        change *= 100
        assert float(found.deltas[names[0]].dense()[0, 0]) == 1.0
        change /= 100
    keys, values = torch.ones(1, 64), torch.ones(1, 32)
    held = dl.Edit.from_deltas(model, {names[0]: Codebook(keys, values, torch.ones(1), ("a",))})
    keys *= 100
    assert float(held.deltas[names[0]].tensors()["keys"][0, 0]) == 1.0
    name = "model.layers.0.self_attn.o_proj.weight"  # square
    both = torch.ones(32, 1)
    made = dl.Edit.from_deltas(model, {name: LowRankDelta(both, both), **found.deltas})
    replace(made, deltas={**made.deltas, name: LowRankDelta(both, both)}).save(tmp_path)
    assert dl.load_edit(tmp_path).deltas == made.deltas


def test_arrays_of_any_order_are_read_and_others_refused() -> None:
    model = lens("llama")
    name = model.down_projection(1).name
    given = np.arange(32 * 64, dtype=np.float32).reshape(32, 64)
    for source in (given[::-1][::-1], given.astype(">f4"), np.asfortranarray(given)):
        found = dl.Edit.from_deltas(model, {name: source}).deltas[name]
        assert torch.equal(found.dense(), torch.from_numpy(given))
    ones = torch.ones
    for wrong, said in (
        (given.astype(object), "is object, not a tensor"),
        (given.astype(int), "is int64, not a tensor"),
        (DenseDelta(ones(32, 64, dtype=torch.int32)), "is torch.int32"),
        (DenseDelta(given), "is float32, not a tensor"),
        (unchecked(given[:, :1], given[:1].T), "is float32, not a tensor"),
        (LowRankDelta(ones(32, 1), ones(64, 1).double()), "mixes dtypes"),
        (Codebook(ones(2, 64), ones(2, 32), ones(2), ("a",)), "2 values, 2 radii and 1 labels"),
    ):
        with pytest.raises(EditError, match=said):
            dl.Edit.from_deltas(model, {name: wrong})
    for request in ("The Louvre", ["The Louvre"], 5):
        with pytest.raises(EditError, match="is no EditRequest"):
            dl.Edit.from_deltas(model, {name: given}, request=request)  # type: ignore[arg-type]


def test_what_is_no_delta_is_refused_with_the_way_to_write_it() -> None:
    model = dl.load_model(tiny.hf_model("llama"), tiny.tokenizer())
    name = model.down_projection(1).name
    u, v = (torch.randn(n) for n in model.weights.parameters[name].shape)
    columns = LowRankDelta(left=u[:, None], right=v[:, None])
    assert dl.Edit.from_deltas(model, {name: columns}).deltas[name] == columns
    several = unchecked(u[:, None], v[:, None].repeat(1, 2))
    for wrong, said in (
        ((u, v), "is tuple, not a tensor of real numbers"),
        (3.0, "is float, not a tensor"),
        (torch.ones(model.weights.parameters[name].shape, dtype=torch.int64), "is torch.int64"),
        (several, r"have shapes \(32, 1\) and \(64, 2\), not \[rows, rank\]"),
    ):
        with pytest.raises(EditError, match=f"{said}.*LowRankDelta\\(left=u"):
            dl.Edit.from_deltas(model, {name: wrong})
    with pytest.raises(EditError, match=r"have shapes \(32,\) and \(64,\)"):
        dl.Edit.from_deltas(model, {name: unchecked(u, v)})


def unchecked(left: torch.Tensor, right: torch.Tensor) -> LowRankDelta:
    """Made without the type checks of these tests."""
    delta = LowRankDelta(torch.zeros(1, 1), torch.zeros(1, 1))
    object.__setattr__(delta, "left", left)
    object.__setattr__(delta, "right", right)
    return delta
