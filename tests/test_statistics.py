"""Second moments of keys against a sum over single tokens, and their cache."""

from __future__ import annotations

import errno
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

import driftlens as dl
from driftlens.editing import statistics
from driftlens.editing.statistics import (
    KeyCovariance,
    key_covariance,
    load_covariance,
    resolve_covariances,
)
from driftlens.errors import DataError, EditError, ModelError

TEXTS = [
    *tiny.TEXT,
    "Paris",
    "The mother tongue of Ada Lovelace is English, and the Louvre is a museum in Paris. " * 2,
    "東京 🗼 Tōkyō",
    "A\nb\n\nc {} %s",
    "The capital of France.",
    "Ada Lovelace, who was English, wrote about Charles Babbage in the city of London.",
    "Rome is the capital of Italy, and the mother tongue of most who live there is Italian.",
]
LAYER = 1


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DRIFTLENS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "covariance"


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several batches, of several documents each, from few tokens."""
    monkeypatch.setattr(statistics, "TOKENS_PER_BATCH", 40)


@cache
def lens(architecture: str = "gpt2", bos: bool = False, seed: int = 0) -> dl.LensModel:
    tokenizer = tiny.bos_tokenizer() if bos else tiny.tokenizer()
    model = tiny.hf_model(architecture, seed)
    return dl.load_model(model, tokenizer, name=f"tiny {architecture}", probe=False)


@cache
def plain_model(architecture: str) -> Any:
    return tiny.hf_model(architecture).double()


def down_of(model: Any, layer: int) -> Any:
    layers = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    mlp = layers[layer].mlp
    return next(getattr(mlp, n) for n in ("c_proj", "fc_out", "down_proj") if hasattr(mlp, n))


def brute_force(
    architecture: str, documents: list[list[int]], layer: int = LAYER
) -> tuple[np.ndarray, int]:
    """Mean of k k^T, one document and one token at a time, in float64."""
    model = plain_model(architecture)
    down = down_of(model, layer)
    total, count = np.zeros(0), 0
    seen: list[torch.Tensor] = []
    handle = down.register_forward_hook(lambda m, args, out: seen.append(args[0].detach()))
    try:
        for document in documents:
            seen.clear()
            with torch.no_grad():
                model(torch.tensor([document]))
            (keys,) = seen
            for key in keys[0].numpy():
                total = total + np.outer(key, key) if count else np.outer(key, key)
                count += 1
    finally:
        handle.remove()
    return total / count, count


def ids_of(texts: list[str], bos: bool = False) -> list[list[int]]:
    tokenizer = tiny.bos_tokenizer() if bos else tiny.tokenizer()
    return [list(tokenizer(text)["input_ids"]) for text in texts]


def computed(model: dl.LensModel, texts: Any = None, layer: int = LAYER, **more: Any) -> Any:
    options: dict[str, Any] = {"progress": False, **more}
    return key_covariance(model, layer, TEXTS if texts is None else texts, **options)


def assert_close(found: KeyCovariance, expected: tuple[np.ndarray, int]) -> None:
    matrix, count = expected
    assert found.count == count
    assert found.matrix is not None
    error = np.linalg.norm(found.matrix.double().numpy() - matrix) / np.linalg.norm(matrix)
    assert error < 1e-6


def stored(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


class Passes:
    """Counts passes over text; the ``stop_at``-th raises instead of running."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, model: dl.LensModel) -> None:
        self.count = 0
        self.stop_at = 0
        self.tokens: list[int] = []
        run = model.run

        def counting(ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if not str(kwargs.get("stop_at")).endswith("mlp.out.hook_in"):
                return run(ids, *args, **kwargs)  # no text, but a look at the model
            self.count += 1
            if self.count == self.stop_at:
                raise KeyboardInterrupt
            self.tokens.append(ids.numel())
            return run(ids, *args, **kwargs)

        monkeypatch.setattr(model, "run", counting)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Passes:
    return Passes(monkeypatch, lens())


# --- the numbers ----------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("architecture", ["gpt2", "gptj", "llama", "gemma3"])
def test_covariance_is_the_sum_over_single_tokens(architecture: str, layer: int) -> None:
    found = computed(lens(architecture), layer=layer)
    assert_close(found, brute_force(architecture, ids_of(TEXTS), layer))
    assert found.layer == layer


def test_bos_counts_as_the_model_was_trained_with_it() -> None:
    found = computed(lens(bos=True))
    assert_close(found, brute_force("gpt2", ids_of(TEXTS, bos=True)))
    assert found.count == computed(lens()).count + len(TEXTS)


@pytest.mark.parametrize("batch", [1, 50, 120, 10_000])
def test_batches_and_padding_do_not_count(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "TOKENS_PER_BATCH", batch)
    assert_close(computed(lens(), cache=False), brute_force("gpt2", ids_of(TEXTS)))


def test_pad_token_inside_a_text_counts() -> None:
    # What is padding is decided by the length, not by the id.
    texts = ["The city </s> of Paris </s>", "Paris is the capital of France."]
    documents = ids_of(texts)
    assert lens().tokens.pad_id in documents[0]
    assert_close(computed(lens(), texts), brute_force("gpt2", documents))


LENGTHS = [len(document) for document in ids_of(TEXTS)]


@pytest.mark.parametrize(
    "tokens",
    [1, 5, LENGTHS[0] - 1, LENGTHS[0], LENGTHS[0] + 1, sum(LENGTHS) - 1, sum(LENGTHS), 10**6],
)
def test_truncation_is_exact(tokens: int) -> None:
    documents, left = [], tokens
    for document in ids_of(TEXTS):
        if left > 0:
            documents.append(document[:left])
            left -= len(documents[-1])
    found = computed(lens(), max_tokens=tokens)
    assert found.count == min(tokens, sum(LENGTHS))
    assert_close(found, brute_force("gpt2", documents))


def test_documents_are_cut_at_the_models_context() -> None:
    text = " ".join(TEXTS)
    document = ids_of([text])[0]
    limit = lens().info.n_ctx
    assert len(document) > limit == 128
    found = computed(lens(), [text, "Paris"])
    assert_close(found, brute_force("gpt2", [document[:limit], *ids_of(["Paris"])]))


def test_empty_texts_are_skipped() -> None:
    found = computed(lens(), ["", " \n", *TEXTS, ""])
    assert_close(found, brute_force("gpt2", ids_of(TEXTS)))


@pytest.mark.parametrize("kind", [list, tuple, iter])
def test_any_iterable_of_texts_will_do(kind: Any) -> None:
    assert_close(computed(lens(), kind(TEXTS)), brute_force("gpt2", ids_of(TEXTS)))


@pytest.mark.parametrize("texts", [[], ["", "  "]])
def test_no_text_is_refused(texts: list[str]) -> None:
    with pytest.raises(EditError, match="no text"):
        computed(lens(), texts)


def test_single_text_is_not_taken_for_a_list_of_characters() -> None:
    text = "The mother tongue of Ada Lovelace"
    with pytest.raises(EditError, match="The texts are one text"):
        computed(lens(), text)


@pytest.mark.parametrize("tokens", [0, -1, -5])
def test_no_tokens_are_refused(tokens: int) -> None:
    with pytest.raises(dl.DriftLensError):
        computed(lens(), max_tokens=tokens)


def test_applied_edit_is_refused() -> None:
    model = lens()
    name = model.down_projection(LAYER).name
    ones = torch.ones_like(model.weights.parameters[name])
    with dl.Edit.from_deltas(model, {name: ones}).applied(model), pytest.raises(EditError):
        computed(model)


def test_layer_out_of_range_is_refused() -> None:
    with pytest.raises(ModelError, match="no layer 3"):
        computed(lens(), layer=3)


def test_model_is_left_alone() -> None:
    model = lens()
    before = model.fingerprint()
    computed(model)
    assert model.fingerprint() == before
    assert all(p.grad is None and p.requires_grad for p in model.hf_model.parameters())


# --- the cache ------------------------------------------------------------------------------


def test_second_time_is_read_and_not_computed(passes: Passes, cache_folder: Path) -> None:
    first = computed(lens())
    assert passes.count > 2
    assert len(stored(cache_folder)) == 1
    done = passes.count
    second = computed(lens())
    assert passes.count == done
    assert torch.equal(second.matrix, first.matrix)
    assert (second.count, second.layer, second.source) == (first.count, first.layer, first.source)


def test_cache_can_be_left_out(passes: Passes, cache_folder: Path) -> None:
    first = computed(lens(), cache=False)
    done = passes.count
    second = computed(lens(), cache=False)
    assert passes.count == 2 * done
    assert torch.equal(first.matrix, second.matrix)
    assert stored(cache_folder) == []


def test_everything_that_matters_has_a_file_of_its_own(cache_folder: Path) -> None:
    with_bos_by_hand = dl.load_model(
        tiny.hf_model("gpt2"), tiny.tokenizer(), prepend_bos=True, probe=False
    )
    changed = tiny.hf_model("gpt2")
    with torch.no_grad():
        changed.transformer.ln_f.bias[0] = 1e-3
    other_weight = dl.load_model(changed, tiny.tokenizer(), probe=False)
    half = dl.load_model(tiny.hf_model("gpt2").bfloat16(), tiny.tokenizer(), probe=False)
    variants: list[tuple[dl.LensModel, dict[str, Any]]] = [
        (lens(), {}),
        (lens(), {"layer": 2}),
        (lens(), {"texts": TEXTS[:-1]}),
        (lens(), {"texts": [*TEXTS[:-1], TEXTS[-1] + "."]}),
        (lens(), {"texts": TEXTS[::-1]}),
        (lens(), {"max_tokens": 50}),
        (lens(seed=1), {}),
        (lens(bos=True), {}),
        (with_bos_by_hand, {"max_tokens": 60}),
        (other_weight, {}),
        (half, {}),
    ]
    for number, (model, options) in enumerate(variants, start=1):
        computed(model, **options)
        assert len(stored(cache_folder)) == number


def test_joined_documents_are_other_documents(cache_folder: Path) -> None:
    computed(lens(), ["Paris", " Rome"])
    computed(lens(), ["Paris Rome"])
    assert len(stored(cache_folder)) == 2


def test_another_copy_of_the_model_uses_the_same_file(cache_folder: Path) -> None:
    computed(lens())
    copy = dl.load_model(tiny.hf_model("gpt2"), tiny.tokenizer(), probe=False)
    computed(copy)
    assert len(stored(cache_folder)) == 1


def interrupted(passes: Passes) -> KeyCovariance:
    """What the whole text gives, after a run over it that was stopped at its third pass."""
    whole = computed(lens(), cache=False)
    passes.count, passes.stop_at = 0, 3
    with pytest.raises(KeyboardInterrupt):
        computed(lens())
    passes.stop_at = 0
    return whole


@pytest.mark.parametrize("stop_at", [1, 2, 3])
def test_interrupted_run_goes_on_where_it_was(
    stop_at: int, passes: Passes, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "SECONDS_BETWEEN_SAVES", -1.0)
    whole = computed(lens(), cache=False)
    needed, passes.count = passes.count, 0
    assert needed > 3

    passes.stop_at = stop_at
    with pytest.raises(KeyboardInterrupt):
        computed(lens())
    names = stored(cache_folder)
    assert len(names) == min(stop_at - 1, 1)
    assert all(name.endswith(".partial.npz") for name in names)

    passes.count, passes.stop_at = 0, 0
    resumed = computed(lens())
    assert passes.count == needed - (stop_at - 1)
    assert torch.equal(resumed.matrix, whole.matrix)
    assert resumed.count == whole.count
    (name,) = stored(cache_folder)
    assert not name.endswith(".partial.npz")


def test_remainder_of_another_way_of_batching_is_not_used(
    passes: Passes, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "SECONDS_BETWEEN_SAVES", -1.0)
    whole = interrupted(passes)
    (left,) = stored(cache_folder)
    packs = statistics.packing_is_exact(lens())
    monkeypatch.setattr(statistics, "packing_is_exact", lambda model: not packs)
    other = computed(lens())
    assert other.engine != whole.engine
    assert torch.allclose(other.matrix, whole.matrix, rtol=1e-4, atol=1e-6)
    assert left in stored(cache_folder)


def test_remainder_of_another_run_is_not_used(
    passes: Passes, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "SECONDS_BETWEEN_SAVES", -1.0)
    passes.stop_at = 3
    with pytest.raises(KeyboardInterrupt):
        computed(lens())
    passes.stop_at = 0
    other = computed(lens(), TEXTS[1:])
    assert_close(other, brute_force("gpt2", ids_of(TEXTS[1:])))


def test_remainder_with_other_batches_is_not_used(
    passes: Passes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "SECONDS_BETWEEN_SAVES", -1.0)
    monkeypatch.setattr(statistics, "TOKENS_PER_BATCH", 120)
    passes.stop_at = 3
    with pytest.raises(KeyboardInterrupt):
        computed(lens())
    passes.stop_at = 0
    monkeypatch.setattr(statistics, "TOKENS_PER_BATCH", 40)
    assert_close(computed(lens()), brute_force("gpt2", ids_of(TEXTS)))


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "text", "other shape", "no sum"])
def test_damaged_remainder_only_costs_time(
    damage: str, passes: Passes, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "SECONDS_BETWEEN_SAVES", -1.0)
    whole = interrupted(passes)
    (path,) = cache_folder.iterdir()
    spoil(path, damage, total=np.zeros((3, 3)), done=2)
    resumed = computed(lens())
    assert torch.equal(resumed.matrix, whole.matrix)
    assert resumed.count == whole.count


def spoil(path: Path, damage: str, **other: Any) -> None:
    """Damage an .npz file in one of several ways."""
    data = path.read_bytes()
    if damage == "empty":
        path.write_bytes(b"")
    elif damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        middle = len(data) // 2
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 0x10]) + data[middle + 1 :])
    elif damage == "text":
        path.write_text("not at all")
    elif damage == "other shape":
        np.savez(path, **other)
    elif damage == "no sum":
        np.savez(path, something=np.zeros(3))


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "text", "no sum"])
def test_damaged_cache_is_computed_again(damage: str, cache_folder: Path) -> None:
    whole = computed(lens())
    (path,) = cache_folder.iterdir()
    spoil(path, damage)
    again = computed(lens())
    assert torch.equal(again.matrix, whole.matrix)


# --- a full disk ----------------------------------------------------------------------------


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def replace(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", replace)


@pytest.mark.usefixtures("full_disk")
def test_full_disk_costs_only_the_cache(cache_folder: Path) -> None:
    with pytest.warns(UserWarning, match=r"cannot be written.*No space left.*not kept"):
        assert_close(computed(lens()), brute_force("gpt2", ids_of(TEXTS)))
    assert stored(cache_folder) == []
    assert_close(computed(lens(), cache=False), brute_force("gpt2", ids_of(TEXTS)))


def test_cache_folder_that_is_a_file_costs_only_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("kept")
    monkeypatch.setenv("DRIFTLENS_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot be written"):
        assert_close(computed(lens()), brute_force("gpt2", ids_of(TEXTS)))


@pytest.mark.usefixtures("full_disk")
def test_full_disk_while_saving_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        KeyCovariance(torch.eye(3), 10, 1, "test").save(tmp_path / "c.npz")


# --- files ----------------------------------------------------------------------------------


def test_saved_covariance_comes_back(tmp_path: Path) -> None:
    original = computed(lens(), cache=False)
    path = tmp_path / "covariance.npz"
    original.save(path)
    found = load_covariance(path)
    assert torch.equal(found.matrix, original.matrix)
    assert (found.count, found.layer) == (original.count, LAYER)
    assert load_covariance(str(path), LAYER).layer == LAYER
    with pytest.raises(DataError, match="of layer 1, not of layer 2"):
        load_covariance(path, 2)


@pytest.mark.parametrize("layer", [None, 5])
def test_mean_and_count(layer: int | None, tmp_path: Path) -> None:
    matrix = np.array([[2.0, 0.5], [0.5, 1.0]])
    np.savez(tmp_path / "c.npz", cov=matrix, count=np.int64(123))
    found = load_covariance(tmp_path / "c.npz", layer)
    assert found.matrix.tolist() == matrix.tolist()
    assert (found.count, found.layer) == (123, layer)


def test_mean_without_a_count_can_be_inverted(tmp_path: Path) -> None:
    np.savez(tmp_path / "c.npz", cov=np.diag([2.0, 4.0]))
    solved = load_covariance(tmp_path / "c.npz").solve(torch.tensor([2.0, 2.0]))
    assert solved.tolist() == [1.0, 0.5]


def test_statistics_of_the_rome_authors_are_sums(tmp_path: Path) -> None:
    total = np.array([[200.0, 50.0], [50.0, 100.0]], dtype=np.float32)
    np.savez(
        tmp_path / "c.npz",
        **{"mom2.mom2": total, "mom2.count": np.int64(50), "mom2.constructor": "x"},
    )
    found = load_covariance(tmp_path / "c.npz", 3)
    assert found.matrix.tolist() == [[4.0, 1.0], [1.0, 2.0]]
    assert (found.count, found.layer) == (50, 3)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param({"something": np.eye(2)}, id="nothing known"),
        pytest.param({"cov": np.ones((2, 3)), "count": 9}, id="not square"),
        pytest.param({"cov": np.ones(4), "count": 9}, id="not a matrix"),
        pytest.param({"cov": np.full((2, 2), np.nan), "count": 9}, id="NaN"),
        pytest.param({"cov": np.full((2, 2), np.inf), "count": 9}, id="infinite"),
        pytest.param({"mom2.mom2": np.eye(2), "mom2.count": 0}, id="count of zero"),
        pytest.param({"mom2.mom2": np.eye(2)}, id="no count"),
        pytest.param({"cov": np.eye(2), "count": 9, "layer": "five"}, id="layer of text"),
        pytest.param({"cov": np.array([[{}]], dtype=object), "count": 9}, id="objects"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*divide by zero", "ignore:.*invalid value")
def test_file_with_other_content_is_refused(content: dict[str, Any], tmp_path: Path) -> None:
    np.savez(tmp_path / "c.npz", **content)
    with pytest.raises(DataError):
        load_covariance(tmp_path / "c.npz")


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "text"])
def test_damaged_file_is_refused(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "c.npz"
    np.savez(path, cov=np.random.default_rng(0).standard_normal((30, 30)), count=np.int64(99))
    spoil(path, damage)
    with pytest.raises(DataError, match=r"c\.npz"):
        load_covariance(path)


def test_missing_file_folder_and_plain_array_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "c.npy", np.eye(2))
    for path in (tmp_path / "absent.npz", tmp_path, tmp_path / "c.npy"):
        with pytest.raises(DataError):
            load_covariance(path)


# --- use ------------------------------------------------------------------------------------


def test_solution_solves() -> None:
    matrix = torch.from_numpy(np.cov(np.random.default_rng(0).standard_normal((6, 90))))
    key = torch.arange(6.0)
    solved = KeyCovariance(matrix, 90, None, "test").solve(key)
    assert solved.dtype == torch.float64
    torch.testing.assert_close(matrix @ solved, key.double(), rtol=1e-10, atol=1e-10)
    assert torch.equal(statistics.IDENTITY.solve(key), key.double())


def test_too_few_tokens_are_refused() -> None:
    model = lens()
    found = computed(model, max_tokens=20)
    width = model.down_projection(LAYER).d_mlp
    with pytest.raises(EditError, match=f"20 tokens, fewer than its {width}"):
        found.solve(torch.ones(width))
    request = dl.EditRequest("{} is", "Paris", "Rome")
    with pytest.raises(EditError, match="fewer than"):
        dl.edit(
            model,
            request,
            layer=LAYER,
            steps=1,
            context_prompts=["{}"],
            covariance=found,
            progress=False,
        )


def test_what_a_user_may_give(tmp_path: Path) -> None:
    model = lens()
    found = computed(model)
    found.save(tmp_path / "c.npz")

    def resolved(given: Any, layer: int = LAYER) -> dl.KeyCovariance:
        return resolve_covariances(model, [layer], given, progress=False)[layer]

    assert resolved("identity").matrix is None
    assert resolved(found) is found
    assert resolved({LAYER: found, 2: "identity"}) is found
    for given in (tmp_path / "c.npz", str(tmp_path / "c.npz"), TEXTS, tuple(TEXTS), iter(TEXTS)):
        assert torch.equal(resolved(given).matrix, found.matrix)
    with pytest.raises(EditError, match="of layer 1, not of layer 2"):
        resolved(found, 2)
    with pytest.raises(EditError, match="cannot be int"):
        resolved(3)
    with pytest.raises(EditError, match="layer 1 cannot be int"):
        resolved({LAYER: 3})


def test_several_layers_in_one_pass(passes: Passes) -> None:
    model = lens()
    layers = [2, 0, 1]
    together = dl.key_covariances(model, layers, TEXTS, progress=False, cache=False)
    assert list(together) == layers
    of_all = passes.count
    for layer in layers:
        alone = dl.key_covariance(model, layer, TEXTS, progress=False, cache=False)
        assert torch.equal(alone.matrix, together[layer].matrix)
        assert (alone.count, alone.layer) == (together[layer].count, layer)
        assert alone.engine == together[layer].engine == "suffix"
    assert passes.count - of_all == 3 * of_all


def test_only_missing_layers_are_computed(passes: Passes, cache_folder: Path) -> None:
    model = lens()
    first = dl.key_covariance(model, 1, TEXTS, progress=False)
    before = passes.count
    both = dl.key_covariances(model, [0, 1], TEXTS, progress=False)
    assert torch.equal(both[1].matrix, first.matrix)
    after = passes.count
    assert after > before
    again = dl.key_covariances(model, [1, 0], TEXTS, progress=False)
    assert passes.count == after
    assert all(torch.equal(again[y].matrix, both[y].matrix) for y in (0, 1))
    assert again[0].engine == "suffix"
    assert again[0].to_dict()["engine"] == "suffix"


def test_layers_that_were_interrupted_at_different_places(
    passes: Passes, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lens()
    expected = dl.key_covariances(model, [0, 1], TEXTS, progress=False, cache=False)
    monkeypatch.setattr(statistics, "SECONDS_BETWEEN_SAVES", -1.0)
    for layer, stop in ((0, 2), (1, 3)):
        passes.count, passes.stop_at = 0, stop
        with pytest.raises(KeyboardInterrupt):
            dl.key_covariance(model, layer, TEXTS, progress=False)
    passes.stop_at = 0
    found = dl.key_covariances(model, [0, 1], TEXTS, progress=False)
    assert all(torch.equal(found[y].matrix, expected[y].matrix) for y in (0, 1))


def test_identity_needs_no_file(tmp_path: Path) -> None:
    with pytest.raises(EditError, match="identity"):
        statistics.IDENTITY.save(tmp_path / "c.npz")
