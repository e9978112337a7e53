"""Second moments of the keys of one layer: C = E[k k^T], uncentred, over real text.

Locate-then-edit methods write to the direction C^-1 k, which disturbs other keys least
(ROME, section 3.1). Documents are tokenized one by one with BOS as the model was trained,
cut at the model's context or 1,024 tokens, and every real token counts. Products are formed in
float32 per batch and added up in float64.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from tqdm.auto import tqdm

from driftlens import bundled
from driftlens.disk import make_folder, write_atomically
from driftlens.errors import DataError, EditError
from driftlens.interventions import down_in_name
from driftlens.memory import is_out_of_memory
from driftlens.models import LensModel, recording
from driftlens.packing import ROW, Packed, pack, packing_is_exact, run_packed
from driftlens.reuse import Engine

DEFAULT_TOKENS = 100_000
TOKENS_PER_BATCH = 4096
LONGEST_DOCUMENT = 1024
TRIANGLE_BLOCKS = 4
"""The products are symmetric; so many blocks of rows are computed from the diagonal on."""
SECONDS_BETWEEN_SAVES = 20.0


@dataclass(frozen=True, eq=False)
class KeyCovariance:
    """Second moments of the inputs of one down-projection.

    Args:
        matrix: ``[d_mlp, d_mlp]``, symmetric; ``None`` stands for the identity.
        count: Tokens that it was averaged over; of a file that does not say, the largest integer.
        layer: Whose keys; ``None`` if unknown.
        source: Where it comes from, for the record.
        engine: How the text was run: ``"suffix"``, packed in full rows, or ``"plain"``, padded;
            ``None`` if that is not known.
    """

    matrix: Float[torch.Tensor, "d_mlp d_mlp"] | None
    count: int
    layer: int | None
    source: str
    engine: Engine | None = None
    _factors: dict[float, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def solve(self, key: Float[torch.Tensor, " d_mlp"]) -> Float[torch.Tensor, " d_mlp"]:
        """``C^-1 key`` in float64.

        Raises:
            EditError: If the sizes differ, or there were fewer tokens than dimensions, so
                that the matrix has no inverse.
        """
        return self.solve_scaled(key[:, None])[:, 0]

    def solve_with(
        self, keys: Float[torch.Tensor, "fact d_mlp"], weight: float
    ) -> Float[torch.Tensor, "d_mlp fact"]:
        """``(weight C + K K^T)^-1 K`` in float64, with K the keys as columns (MEMIT).

        Computed as ``X (I + K^T X)^-1`` with ``X = (weight C)^-1 K``, which is the same.

        Raises:
            EditError: As :meth:`solve`.
        """
        solved = self.solve_scaled(keys.T, weight)
        keys = keys.to(solved)
        inner = torch.eye(len(keys), dtype=solved.dtype, device=solved.device) + keys @ solved
        return torch.linalg.solve(inner, solved, left=False)

    def solve_scaled(
        self,
        columns: Float[torch.Tensor, "d_mlp fact"],
        weight: float = 1.0,
        identity: float = 0.0,
    ) -> Float[torch.Tensor, "d_mlp fact"]:
        """``(weight C + identity I)^-1 columns`` in float64; the factors are kept for next time.

        Raises:
            EditError: As :meth:`solve`.
        """
        device = columns.device
        if self.matrix is None:
            return columns.double() / (weight + identity)
        size = self.matrix.shape[0]
        if size != columns.shape[0]:
            raise EditError(
                f"The covariance ({self.source}) is of size {size}, the keys of "
                f"{columns.shape[0]}.",
                "It was made for another model.",
            )
        if not identity:
            self.check_enough_text()
        ratio = identity / weight
        try:
            if ratio not in self._factors:
                matrix = self.matrix.cpu().double()
                matrix = matrix + ratio * torch.eye(size, dtype=matrix.dtype)
                self._factors.clear()
                self._factors[ratio] = torch.linalg.lu_factor(matrix)
            columns = columns.cpu().double()
            solved = torch.linalg.lu_solve(*self._factors[ratio], columns) / weight
            finite = bool(torch.isfinite(solved).all())
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            finite = False
        if not finite:
            raise EditError(
                f"The covariance ({self.source}) is singular.",
                'Use more varied text, or covariance="identity".',
            )
        return solved.to(device)

    def check_enough_text(self) -> None:
        """Refuse statistics of so little text that some directions cannot have been seen.

        Raises:
            EditError: If there were fewer tokens than dimensions.
        """
        if self.matrix is not None and self.count < len(self.matrix):
            raise EditError(
                f"The covariance ({self.source}) was averaged over {self.count} tokens, fewer than "
                f"its {len(self.matrix)} dimensions, so it cannot be inverted, and tells of no "
                "null space.",
                'Use more text (ten times as many tokens is a start), or covariance="identity".',
            )

    def to_dict(self) -> dict[str, Any]:
        """What goes into an edit's record."""
        known = {"source": self.source, "tokens": self.count, "layer": self.layer}
        return known if self.engine is None else {**known, "engine": self.engine}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an ``.npz`` that :func:`load_covariance` reads."""
        if self.matrix is None:
            raise EditError("The identity needs no file.", 'Pass covariance="identity".')
        try:
            write_atomically(Path(path), _npz(self))
        except OSError as error:
            raise DataError(
                f"The covariance cannot be written to {path}: {error.strerror or error}.",
                "Choose a file that can be written.",
            ) from error


IDENTITY = KeyCovariance(None, 0, None, "identity")


def load_covariance(path: str | os.PathLike[str], layer: int | None = None) -> KeyCovariance:
    """Read second moments from an ``.npz`` file.

    Understands our own files, ``cov`` + ``count``, and the statistics that the ROME and MEMIT
    authors publish (``mom2.mom2`` is a sum, ``mom2.count`` its number of tokens).

    Raises:
        DataError: If the file is missing, damaged, or holds none of these.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            content = {key: file[key] for key in file.files}
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"The covariance {path} cannot be read: {error}.", "Give an .npz file."
        ) from error
    except Exception as error:  # zipfile and numpy raise types of their own on damaged files
        raise DataError(f"The covariance {path} is damaged: {error}.") from error
    try:
        if "mom2.mom2" in content:
            count = int(content["mom2.count"])
            matrix = content["mom2.mom2"] / count
        elif "cov" in content:
            matrix = content["cov"]
            count = int(content.get("count", np.iinfo(np.int64).max))
        else:
            raise KeyError("neither 'cov' nor 'mom2.mom2'")
        own_layer = int(content["layer"]) if "layer" in content else layer
        engine: Any = str(content["engine"]) if "engine" in content else None
    except (KeyError, ValueError, TypeError, ZeroDivisionError) as error:
        raise DataError(
            f"The covariance {path} holds {sorted(content)}, which cannot be used: {error}.",
            "Write it with KeyCovariance.save(), or use the ROME authors' statistics.",
        ) from error
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not np.isfinite(matrix).all():
        raise DataError(f"The covariance {path} is not a finite square matrix: {matrix.shape}.")
    if layer is not None and own_layer != layer:
        raise DataError(f"The covariance {path} is of layer {own_layer}, not of layer {layer}.")
    source = f"file {Path(path).name}"
    return KeyCovariance(torch.from_numpy(matrix), count, own_layer, source, engine)


def resolve_covariances(
    model: LensModel, layers: Sequence[int], given: Any = None, *, progress: bool = True
) -> dict[int, KeyCovariance]:
    """What a user gave as ``covariance``, as one :class:`KeyCovariance` for each layer.

    Args:
        given: ``None`` (100,000 tokens of the bundled Wikipedia leads), ``"identity"``, a
            path to an ``.npz``, a :class:`KeyCovariance`, any iterable of texts (its first
            100,000 tokens), or a mapping of layers to paths or :class:`KeyCovariance`.
        progress: Whether to show a bar while text is read.

    Raises:
        EditError: If something else was given, or it does not fit the layers.
        DataError: If a file cannot be read.
    """
    if isinstance(given, Mapping):
        missing = sorted(set(layers) - set(given))
        if missing:
            raise EditError(
                f"No covariance is given for layer {missing[0]}.",
                f"Give one for each of the layers {', '.join(map(str, layers))}.",
            )
        return {y: _one_covariance(given[y], y) for y in layers}
    if given is None:
        return key_covariances(model, layers, progress=progress)
    if isinstance(given, (str, os.PathLike, KeyCovariance)):
        if len(layers) > 1 and given != "identity":
            raise EditError(
                f"One covariance is given for the layers {', '.join(map(str, layers))}.",
                "Give a mapping of layers to covariances, or texts.",
            )
        return {y: _one_covariance(given, y) for y in layers}
    _refuse_bare_matrix(given)
    if isinstance(given, Iterable):
        return key_covariances(model, layers, given, source="given texts", progress=progress)
    raise EditError(
        f"covariance cannot be {type(given).__name__}.",
        'Give "identity", a path, a KeyCovariance, texts, or a mapping of layers to these.',
    )


def _one_covariance(given: Any, layer: int) -> KeyCovariance:
    if isinstance(given, KeyCovariance):
        if given.layer not in (None, layer):
            raise EditError(f"The covariance is of layer {given.layer}, not of layer {layer}.")
        return given
    if isinstance(given, str) and given == "identity":
        return IDENTITY
    if isinstance(given, (str, os.PathLike)):
        return load_covariance(given, layer)
    _refuse_bare_matrix(given)
    raise EditError(
        f"The covariance of layer {layer} cannot be {type(given).__name__}.",
        'Give "identity", a path or a KeyCovariance.',
    )


def _refuse_bare_matrix(given: Any) -> None:
    if isinstance(given, (torch.Tensor, np.ndarray)):
        raise EditError(
            f"The covariance is a bare {type(given).__name__}, which does not say over how many "
            "tokens it was taken.",
            "Wrap it: KeyCovariance(torch.as_tensor(matrix), count, layer, source).",
        )


def wikipedia_leads(seed: int = 1) -> list[str]:
    """First paragraphs of about ten thousand English Wikipedia articles, shuffled.

    Text under CC BY-SA 4.0, fetched at first use.
    """
    content = json.loads(bundled.fetch("wikipedia-leads").read_text(encoding="utf-8"))
    texts = [f"{item['extract']}" for item in content.values() if item.get("extract")]
    random.Random(seed).shuffle(texts)
    return texts


def key_covariance(
    model: LensModel,
    layer: int,
    texts: Iterable[str] | None = None,
    *,
    max_tokens: int = DEFAULT_TOKENS,
    source: str = "wikipedia-leads",
    progress: bool = True,
    cache: bool = True,
) -> KeyCovariance:
    """Second moments of one layer's keys over text; see :func:`key_covariances`."""
    return key_covariances(
        model, [layer], texts, max_tokens=max_tokens, source=source, progress=progress, cache=cache
    )[layer]


def key_covariances(
    model: LensModel,
    layers: Sequence[int],
    texts: Iterable[str] | None = None,
    *,
    max_tokens: int = DEFAULT_TOKENS,
    source: str = "wikipedia-leads",
    progress: bool = True,
    cache: bool = True,
) -> dict[int, KeyCovariance]:
    """Second moments of the keys of several layers, from one pass over the text.

    What is in the cache is not computed again. The cache is keyed by all that the result depends
    on: the unedited weights, configuration, precision, layer and tokens. An interrupted run goes
    on where it was last saved.

    Args:
        layers: Whose keys.
        texts: Documents; ``None`` for the bundled Wikipedia leads.
        max_tokens: Where to stop; the last document is cut there.
        source: Name of the texts, for the record.
        progress: Whether to show a bar.
        cache: Whether to read and write the cache.

    Raises:
        ModelError: If a layer is out of range or has no down-projection.
        EditError: If the model carries an edit now, there is no text, or a text is no string.
    """
    widths = {layer: model.down_projection(layer).d_mlp for layer in layers}
    if isinstance(texts, str):
        raise EditError("The texts are one text.", "Give a list of documents: [text].")
    if not isinstance(max_tokens, int) or max_tokens < 1:
        raise EditError(f"max_tokens is {max_tokens!r}.", "Give a whole number of at least 1.")
    if model.weights.is_edited:
        raise EditError(
            "The key covariance is that of the unedited model, but an edit is applied.",
            "Compute it outside of `with edit.applied(model)`.",
        )
    documents = _documents(model, wikipedia_leads() if texts is None else texts, max_tokens)
    if not documents:
        raise EditError("There is no text to take statistics from.", "Give some documents.")
    folder = bundled.cache_dir() / "covariance"
    digest = _cache_digest(model, documents)
    files = {layer: folder / f"{_cache_key(digest, layer)}.npz" for layer in layers}
    found: dict[int, KeyCovariance] = {}
    for layer, finished in files.items():
        if cache and finished.is_file():
            try:
                found[layer] = replace(load_covariance(finished, layer), source=source)
            except DataError:  # damaged: compute it again
                finished.unlink(missing_ok=True)
    missing = [layer for layer in sorted(widths) if layer not in found]
    engine: Engine = "suffix" if missing and packing_is_exact(model) else "plain"
    unfinished = f".{engine}.partial.npz"  # batches of the two ways hold different tokens
    sums = [
        _Sum(layer, widths[layer], files[layer].with_suffix(unfinished) if cache else None)
        for layer in missing
    ]
    if sums:
        _accumulate(model, documents, sums, engine, progress)
    count = sum(len(document) for document in documents)
    for part in sums:
        matrix = part.symmetric() / count
        result = KeyCovariance(matrix.float(), count, part.layer, source, engine)
        found[part.layer] = result
        if cache:
            try:
                _save_cached(files[part.layer], _npz(result))
                part.forget()
            except DataError as error:
                warnings.warn(f"{error} The covariance is used, but not kept.", stacklevel=3)
    return {layer: found[layer] for layer in layers}


def _documents(model: LensModel, texts: Iterable[str], max_tokens: int) -> list[list[int]]:
    """Token ids of the documents, cut so that there are at most ``max_tokens``."""
    longest = min(model.info.n_ctx, LONGEST_DOCUMENT)
    documents: list[list[int]] = []
    left = max_tokens
    for text in texts:
        if not isinstance(text, str):
            raise EditError(f"One of the texts is of type {type(text).__name__}.", "Give strings.")
        if not text.strip():
            continue
        ids = model.tokens.encode(text).ids[: min(longest, left)]
        documents.append(ids)
        left -= len(ids)
        if left <= 0:
            break
    return documents


def _cache_digest(model: LensModel, documents: Sequence[Sequence[int]]) -> Any:
    """Everything that the results depend on; token ids cover texts, tokenizer, BOS and cuts."""
    configuration = model.identity()["configuration"]
    head = f"{model.fingerprint()}:{configuration}:{model.info.dtype}:{TOKENS_PER_BATCH}:{ROW}:"
    digest = hashlib.sha256(head.encode())
    for document in documents:
        digest.update(np.asarray([*document, -1], dtype=np.int64).tobytes())
    return digest


def _cache_key(digest: Any, layer: int) -> str:
    of_layer = digest.copy()
    of_layer.update(f"layer {layer}".encode())
    return str(of_layer.hexdigest()[:32])


@dataclass(frozen=True)
class _Batch:
    """Sequences for one pass, and which of their positions are tokens of the text."""

    ids: Int[torch.Tensor, "row pos"]
    real: Bool[torch.Tensor, "row pos"]
    packed: Packed | None

    def keys(
        self, model: LensModel, names: Sequence[str]
    ) -> dict[str, Float[torch.Tensor, "token d_mlp"]]:
        """The keys of all tokens, by hook; the pass ends at the last of them, the topmost."""
        seen: dict[str, torch.Tensor] = {}
        hooks = recording(seen, names)
        with torch.no_grad():
            if self.packed is None:
                model.run(self.ids, hooks, stop_at=names[-1])
            else:
                run_packed(model, self.packed, hooks, stop_at=names[-1])
        return {name: seen[name][self.real.to(seen[name].device)] for name in names}


def _packed_batches(model: LensModel, documents: Sequence[list[int]]) -> list[_Batch]:
    """Documents side by side in full rows, none seeing another. Always the same order."""
    packed = pack(documents, model.tokens.pad_id, min(ROW, TOKENS_PER_BATCH), share=False)
    size = max(1, TOKENS_PER_BATCH // packed.ids.shape[1])
    parts = [packed.rows(start, start + size) for start in range(0, len(packed.used), size)]
    return [_Batch(part.ids, part.real, part) for part in parts]


def _padded_batches(model: LensModel, documents: Sequence[list[int]]) -> list[_Batch]:
    """Documents of like length together, so that little is padding. Always the same order."""
    ordered = sorted(documents, key=len, reverse=True)
    batches: list[_Batch] = []
    while ordered:
        size = max(1, TOKENS_PER_BATCH // len(ordered[0]))
        part, ordered = ordered[:size], ordered[size:]
        ids = model.tokens.pad(part)
        lengths = torch.tensor([len(document) for document in part])
        batches.append(_Batch(ids, torch.arange(ids.shape[1]) < lengths[:, None], None))
    return batches


class _Sum:
    """Sum of k k^T over the tokens of one layer, resumed from and saved to a file."""

    def __init__(self, layer: int, width: int, partial: Path | None) -> None:
        self.layer = layer
        self.partial = partial
        self.total, self.done = _load_partial(partial, width)

    def symmetric(self) -> Float[torch.Tensor, "d_mlp d_mlp"]:
        return self.total.triu() + self.total.triu(1).T

    def save(self) -> None:
        if self.partial is not None:
            with contextlib.suppress(DataError):  # then an interruption costs more
                _save_cached(
                    self.partial, _npz_of(total=self.total.numpy(), done=np.int64(self.done))
                )

    def forget(self) -> None:
        if self.partial is not None:
            self.partial.unlink(missing_ok=True)


def _accumulate(
    model: LensModel,
    documents: Sequence[list[int]],
    sums: Sequence[_Sum],
    engine: Engine,
    progress: bool,
) -> None:
    """Bring the sums to the end of the text."""
    make = _packed_batches if engine == "suffix" else _padded_batches
    batches = make(model, documents)
    tokens = [int(batch.real.sum()) for batch in batches]
    first = min(part.done for part in sums)
    layers = ", ".join(str(part.layer) for part in sums)
    bar = tqdm(
        total=sum(tokens),
        initial=sum(tokens[:first]),
        desc=f"key covariance, layer {layers}",
        unit="tok",
        unit_scale=True,
        disable=not progress,
    )
    saved = time.monotonic()
    with bar:
        for index in range(first, len(batches)):
            behind = {down_in_name(part.layer): part for part in sums if part.done <= index}
            for name, keys in batches[index].keys(model, list(behind)).items():
                add_products(behind[name].total, keys)
                behind[name].done = index + 1
            bar.update(tokens[index])
            if time.monotonic() - saved > SECONDS_BETWEEN_SAVES:
                for part in sums:
                    part.save()
                saved = time.monotonic()


def add_products(
    total: Float[torch.Tensor, "d_mlp d_mlp"], keys: Float[torch.Tensor, "token d_mlp"]
) -> None:
    """Add k k^T of all keys to the upper triangle; what stands below it means nothing."""
    keys = keys.float()
    width = keys.shape[1]
    block = -(-width // TRIANGLE_BLOCKS)
    for start in range(0, width, block):
        rows = keys[:, start : start + block]
        total[start : start + block, start:] += (rows.T @ keys[:, start:]).cpu()


def _load_partial(partial: Path | None, width: int) -> tuple[torch.Tensor, int]:
    """The sum so far and the number of batches in it; nothing if there is no usable file."""
    if partial is not None and partial.is_file():
        try:
            with np.load(partial, allow_pickle=False) as file:
                total, done = torch.from_numpy(file["total"]), int(file["done"])
            if total.shape == (width, width):
                return total.double(), done
        except Exception:  # a damaged remainder only costs time
            partial.unlink(missing_ok=True)
    return torch.zeros(width, width, dtype=torch.float64), 0


def _save_cached(path: Path, data: bytes) -> None:
    try:
        make_folder(path.parent)
        write_atomically(path, data)
    except OSError as error:
        raise DataError(
            f"The cache {path.parent} cannot be written to: {error.strerror or error}.",
            "Free some space, or set DRIFTLENS_CACHE to another folder.",
        ) from error


def _npz(covariance: KeyCovariance) -> bytes:
    assert covariance.matrix is not None
    return _npz_of(
        cov=covariance.matrix.cpu().numpy(),
        count=np.int64(covariance.count),
        **({} if covariance.layer is None else {"layer": np.int64(covariance.layer)}),
        **({} if covariance.engine is None else {"engine": np.str_(covariance.engine)}),
    )


def _npz_of(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()
