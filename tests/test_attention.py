"""The maths of attention rows, against closed forms and plain loops."""

from __future__ import annotations

import math
from inspect import unwrap
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import kl_div

from driftlens.attention import (
    EPSILON,
    head_name,
    mix_heads,
    over_attending_heads,
    restore_columns,
    row_divergence,
    row_kl,
)
from driftlens.errors import RequestError

seeds = st.integers(0, 10_000)


def rows(seed: int, *shape: int, sharpness: float = 3.0) -> torch.Tensor:
    """Random probability rows."""
    generator = torch.Generator().manual_seed(seed)
    return (sharpness * torch.randn(*shape, generator=generator)).softmax(-1)


# --- row_kl --------------------------------------------------------------------------------


def test_kl_of_two_keys_in_closed_form() -> None:
    p, q = torch.tensor([0.9, 0.1]).double(), torch.tensor([0.5, 0.5]).double()
    expected = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    assert float(row_kl(p, q)) == pytest.approx(expected, abs=1e-6)


def test_kl_is_in_nats_and_from_original_to_edited() -> None:
    sure, undecided = torch.tensor([1.0, 0.0]).double(), torch.tensor([0.5, 0.5]).double()
    assert float(row_kl(sure, undecided)) == pytest.approx(math.log(2), abs=1e-6)
    # The reverse is not infinite, because the constant stands in for the zero.
    reverse = 0.5 * math.log(0.5) + 0.5 * math.log(0.5 / EPSILON)
    assert float(row_kl(undecided, sure)) == pytest.approx(reverse, abs=1e-6)


@settings(max_examples=40)
@given(seed=seeds)
def test_kl_is_torchs_kl_div_of_the_shifted_rows(seed: int) -> None:
    p, q = rows(seed, 2, 3, 7).double(), rows(seed + 1, 2, 3, 7).double()
    expected = kl_div((q + 1e-8).log(), p + 1e-8, reduction="none").sum(-1)
    torch.testing.assert_close(row_kl(p, q), expected, atol=1e-12, rtol=0)


@settings(max_examples=40)
@given(seed=seeds, sharpness=st.sampled_from([0.1, 3.0, 40.0]))
def test_kl_is_not_negative_and_zero_for_equal_rows(seed: int, sharpness: float) -> None:
    p = rows(seed, 5, 9, sharpness=sharpness).double()
    q = rows(seed + 1, 5, 9, sharpness=sharpness).double()
    # Gibbs: not negative, up to the rounding of the rows' totals.
    assert (row_kl(p, q) >= -1e-6).all()
    assert torch.equal(row_kl(p, p), torch.zeros(5).double())


def test_keys_that_are_masked_in_both_rows_contribute_nothing() -> None:
    p, q = rows(0, 4).double(), rows(1, 4).double()
    masked = torch.zeros(3).double()
    assert float(row_kl(torch.cat([p, masked]), torch.cat([q, masked]))) == float(row_kl(p, q))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_kl_is_finite_in_half_precision(dtype: torch.dtype) -> None:
    p = torch.tensor([1.0, 0.0], dtype=dtype)
    assert torch.isfinite(row_kl(p, p.flip(0)))
    assert float(row_kl(p, p)) == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["kl", "reverse_kl", "js", "l2"])
def test_rows_in_half_precision_are_compared_in_float32(kind: Any, dtype: torch.dtype) -> None:
    p = rows(0, 200, sharpness=1.0)
    q = (p.log() + 0.02 * torch.randn(200, generator=torch.Generator().manual_seed(1))).softmax(-1)
    p, q = p.to(dtype), q.to(dtype)
    found, expected = row_divergence(p, q, kind), row_divergence(p.float(), q.float(), kind)
    assert found.dtype == torch.float32
    assert float(found) == float(expected) > 0


def test_kl_has_a_gradient_that_points_back() -> None:
    original = rows(0, 6).double()
    scores = torch.zeros(6, dtype=torch.double, requires_grad=True)
    row_kl(original, scores.softmax(-1)).backward()
    # d KL(p || softmax(s)) / ds = softmax(s) - p
    torch.testing.assert_close(scores.grad, torch.full_like(original, 1 / 6) - original,
                               atol=1e-6, rtol=0)  # fmt: skip


def test_unknown_divergences_and_rules_are_refused() -> None:
    row = torch.tensor([0.5, 0.5])
    with pytest.raises(RequestError, match="kind is 'KL'. Choose one of kl, reverse_kl, js, l2."):
        unwrap(row_divergence)(row, row, "KL")  # as without the type checks of these tests
    with pytest.raises(RequestError, match="rule is 'median'. Choose one of max, all, quantile, "):
        unwrap(over_attending_heads)(row, row, "median")


# --- over_attending_heads ------------------------------------------------------------------


def test_heads_over_attend_only_above_the_layers_largest_original() -> None:
    original = torch.tensor([0.1, 0.5, 0.2])
    now = torch.tensor([0.45, 0.51, 0.5])
    # The first rose most and the third equals the maximum, but neither exceeds it.
    assert over_attending_heads(now, original).tolist() == [False, True, False]


def test_unchanged_attention_holds_no_head() -> None:
    original = rows(0, 5, 4)
    assert not over_attending_heads(original, original).any()


def test_each_layer_has_a_threshold_of_its_own() -> None:
    original = torch.tensor([[0.1, 0.2], [0.7, 0.8]])
    now = torch.full((2, 2), 0.5)
    assert over_attending_heads(now, original).tolist() == [[True, True], [False, False]]


def test_the_rule_all_holds_every_head() -> None:
    original = torch.tensor([[0.9, 0.8]])
    held = over_attending_heads(torch.zeros(1, 2), original, "all")
    assert held.dtype == torch.bool
    assert held.all()


# --- restore_columns -----------------------------------------------------------------------


@settings(max_examples=60)
@given(seed=seeds, chosen=st.sets(st.integers(0, 7), min_size=1, max_size=7))
def test_restored_columns_are_exact_and_the_rest_keeps_its_proportions(
    seed: int, chosen: set[int]
) -> None:
    row, original = rows(seed, 2, 3, 8).double(), rows(seed + 1, 2, 3, 8).double()
    row, original = row / row.sum(-1, keepdim=True), original / original.sum(-1, keepdim=True)
    columns = torch.tensor([key in chosen for key in range(8)])
    restored = restore_columns(row, original, columns)
    assert torch.equal(restored[..., columns], original[..., columns])
    torch.testing.assert_close(restored.sum(-1), row.sum(-1), atol=1e-12, rtol=0)
    assert (restored >= 0).all()
    rest = restored[..., ~columns]
    kept = row[..., ~columns]
    torch.testing.assert_close(rest / rest.sum(-1, keepdim=True), kept / kept.sum(-1, keepdim=True))


def test_rows_whose_totals_differ_in_the_last_bits_get_no_negative_attention() -> None:
    row, original = torch.tensor([0.5, 0.4999999]), torch.tensor([1.0, 0.0])
    restored = restore_columns(row, original, torch.tensor([True, False]))
    assert restored.tolist() == [1.0, 0.0]


def test_a_sinks_share_is_one_more_key() -> None:
    before, after = torch.tensor([0.3, 0.1]).double(), torch.tensor([0.6, 0.2]).double()
    p, q = torch.tensor([0.3, 0.1, 0.6]).double(), torch.tensor([0.6, 0.2, 0.2]).double()
    expected = float((p * (p / q).log()).sum())
    assert float(row_kl(before, after)) == pytest.approx(expected, abs=1e-6)
    assert expected > 0 > float((before * (before / after).log()).sum())
    for kind in ("reverse_kl", "js", "l2"):
        whole = row_divergence(p, q, kind)
        torch.testing.assert_close(row_divergence(before, after, kind), whole, atol=1e-6, rtol=0)
    # One row of many has a sink: all are looked at alike.
    rows_of_both = torch.stack([before, torch.tensor([0.5, 0.5]).double()])
    assert float(row_kl(rows_of_both, rows_of_both).abs().max()) == 0


def test_a_sink_keeps_its_proportion_where_columns_are_restored() -> None:
    row, original = torch.tensor([0.1, 0.1, 0.05]), torch.tensor([0.6, 0.1, 0.05])
    restored = restore_columns(row, original, torch.tensor([True, False, False]))
    # 0.9 of the row, 0.75 of it the sink's, are scaled to 0.4.
    torch.testing.assert_close(restored, torch.tensor([0.6, 0.1 * 4 / 9, 0.05 * 4 / 9]))


def test_restoring_columns_in_numbers() -> None:
    row, original = torch.tensor([0.6, 0.3, 0.1]), torch.tensor([0.2, 0.1, 0.7])
    restored = restore_columns(row, original, torch.tensor([True, False, False]))
    torch.testing.assert_close(restored, torch.tensor([0.2, 0.6, 0.2]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_columns_are_restored_in_half_precision(dtype: torch.dtype) -> None:
    row = torch.tensor([[1.0, 3e-6, 0.0], [0.5, 0.25, 0.25]], dtype=dtype)
    original = torch.tensor([[0.5, 0.5, 0.0], [0.25, 0.5, 0.25]], dtype=dtype)
    restored = restore_columns(row, original, torch.tensor([True, False, False]))
    assert restored.dtype == dtype
    assert restored.tolist() == [[0.5, 0.5, 0.0], [0.25, 0.375, 0.375]]


def test_restoring_a_row_from_itself_changes_nothing() -> None:
    row = rows(3, 4, 6).double()
    columns = torch.tensor([False, True, True, False, False, True])
    torch.testing.assert_close(restore_columns(row, row, columns), row, atol=1e-15, rtol=0)


def test_restoring_every_column_gives_the_original() -> None:
    row, original = rows(0, 3, 5), rows(1, 3, 5)
    assert torch.equal(restore_columns(row, original, torch.ones(5, dtype=torch.bool)), original)


def test_restoring_no_column_changes_nothing() -> None:
    row, original = rows(0, 3, 5).double(), rows(1, 3, 5).double()
    unchanged = restore_columns(row, original, torch.zeros(5, dtype=torch.bool))
    torch.testing.assert_close(unchanged, row, atol=1e-15, rtol=0)


def test_masked_keys_stay_masked() -> None:
    row = torch.tensor([0.25, 0.75, 0.0])
    original = torch.tensor([0.5, 0.5, 0.0])
    restored = restore_columns(row, original, torch.tensor([True, False, True]))
    assert restored.tolist() == [0.5, 0.5, 0.0]


def test_a_row_with_nothing_left_to_scale_takes_the_originals_other_columns() -> None:
    row = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]])
    original = torch.tensor([[0.2, 0.5, 0.3], [0.2, 0.5, 0.3]])
    restored = restore_columns(row, original, torch.tensor([True, False, False]))
    torch.testing.assert_close(restored, torch.tensor([[0.2, 0.5, 0.3], [0.2, 0.8, 0.0]]))


def test_columns_may_differ_between_rows() -> None:
    row, original = torch.tensor([[0.6, 0.4]] * 2), torch.tensor([[0.1, 0.9]] * 2)
    columns = torch.tensor([[True, False], [False, False]])
    restored = restore_columns(row, original, columns)
    torch.testing.assert_close(restored, torch.tensor([[0.1, 0.9], [0.6, 0.4]]))


# --- mix_heads -----------------------------------------------------------------------------


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
def test_mixing_is_a_plain_weighted_sum_of_the_heads_own_values(kv_heads: int) -> None:
    pattern = rows(0, 2, 6, 4, 5).double()
    values = torch.randn(2, 5, kv_heads, 3, generator=torch.Generator().manual_seed(1)).double()
    expected = torch.zeros(2, 4, 6, 3).double()
    for batch in range(2):
        for head in range(6):
            kv_head = head * kv_heads // 6
            for query in range(4):
                for key in range(5):
                    weight = pattern[batch, head, query, key]
                    expected[batch, query, head] += weight * values[batch, key, kv_head]
    torch.testing.assert_close(mix_heads(pattern, values), expected)


def test_mixing_takes_the_values_precision() -> None:
    pattern, values = rows(0, 1, 2, 3, 3), torch.randn(1, 3, 2, 4).bfloat16()
    assert mix_heads(pattern, values).dtype == torch.bfloat16


def test_head_names() -> None:
    assert head_name(9, 6) == "L9H6"
    assert head_name(0, 11) == "L0H11"
