"""Models on disk: read from the hub, folders and GGUF files, written for transformers to load."""

from __future__ import annotations

import copy
import os
import secrets
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import xxhash

from driftlens import bundled
from driftlens.errors import ModelError, first_line
from driftlens.parameters import cast, named_parameters

QUANTISATION_FILE = "gguf_quantisation.txt"


def read(source: str, dtype: torch.dtype | None, revision: str | None) -> tuple[Any, Any, str]:
    """Model, tokenizer and a word on the weights, from a name or a path."""
    if source in bundled.BUNDLED_MODELS:
        return _read_gguf(bundled.fetch(source), dtype)
    if is_hub_name(source):
        return _read_hub_or_folder(source, False, dtype, revision)
    path = bundled.expanded(source)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(
                f"{source} is a file, but no .gguf file.",
                "Give the folder with the safetensors and config.json, or a .gguf file.",
            )
        return _read_gguf(path, dtype)
    if path.is_dir():
        ggufs = sorted(path.glob("*.gguf"))
        if len(ggufs) > 1:
            raise ModelError(f"{source} holds {len(ggufs)} .gguf files.", "Give one of them.")
        if ggufs:
            return _read_gguf(ggufs[0], dtype)
        if not (path / "config.json").is_file():
            raise ModelError(
                f"{source} is no model folder: it has neither config.json nor a .gguf file."
            )
    return _read_hub_or_folder(str(path), True, dtype, revision)


def is_hub_name(source: Any) -> bool:
    if not isinstance(source, str) or source in bundled.BUNDLED_MODELS:
        return False
    try:
        return not bundled.expanded(source).exists()
    except OSError:  # too long for a path
        return True


def _read_hub_or_folder(
    source: str, local: bool, dtype: torch.dtype | None, revision: str | None
) -> tuple[Any, Any, str]:
    from transformers import AutoTokenizer

    options: dict[str, Any] = {"local_files_only": local}
    if revision is not None:
        options["revision"] = revision
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        model, _ = read_weights(source, dtype=dtype or "auto", **options)
    except ModelError:
        raise
    except Exception as error:  # damaged files make the readers raise errors of many types
        raise ModelError(
            f"The model {source!r} cannot be loaded: {first_line(error)}",
            f"Bundled names are {', '.join(bundled.BUNDLED_MODELS)}; otherwise give a hub name "
            "(with network) or a local folder with model and tokenizer.",
        ) from error
    return model, tokenizer, f"{'folder' if local else 'hub'} {source}"


def read_weights(source: str, **options: Any) -> tuple[Any, list[str]]:
    """A Hugging Face model with all of its weights, and the names of what a checkpoint holds
    beside them.

    Args:
        source: A hub name or a folder.
        options: Of ``from_pretrained``, which raises errors of many types.

    Raises:
        ModelError: If weights are missing, in whose place there would be random numbers.
    """
    from transformers import AutoModelForCausalLM

    model, found = AutoModelForCausalLM.from_pretrained(
        source, attn_implementation="eager", output_loading_info=True, **options
    )
    missing = sorted(found["missing_keys"])
    if missing:
        raise ModelError(
            f"{source} lacks {len(missing)} of the model's weights, the first {missing[0]!r}.",
            "Give a complete checkpoint of the model that its config.json describes.",
        )
    return model, sorted(found["unexpected_keys"])


def _read_gguf(path: Path, dtype: torch.dtype | None) -> tuple[Any, Any, str]:
    """Model and tokenizer of a GGUF file.

    Reading a GGUF file takes transformers most of a minute, so what it gives is kept in the
    cache as a folder with float32 safetensors, which holds the same bits.
    """
    from transformers import AutoTokenizer

    try:
        key = f"{path.stem}-{_content_digest(path)}"
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}.") from error
    folder = bundled.cache_dir() / "dequantised" / key
    try:
        if folder.is_dir():
            kind = (folder / QUANTISATION_FILE).read_text(encoding="utf-8")
            model, _ = read_weights(str(folder), dtype=torch.float32, local_files_only=True)
            tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        else:
            kind = _gguf_quantisation(path)
            model, _ = read_weights(
                str(path.parent), gguf_file=path.name, dtype=torch.float32, local_files_only=True
            )
            tokenizer = AutoTokenizer.from_pretrained(
                str(path.parent), gguf_file=path.name, local_files_only=True
            )
            _keep_dequantised(folder, model, tokenizer, kind)
    except Exception as error:  # a damaged file makes the reader raise errors of many types
        raise ModelError(
            f"The GGUF file {path} cannot be loaded: {error}",
            "Check that it is complete and that transformers reads its architecture; "
            f"remove {folder} if it exists.",
        ) from error
    if dtype is not None:
        cast(model, dtype)
    return model, tokenizer, f"GGUF {kind}, dequantised to {str(model.dtype).split('.')[-1]}"


def _content_digest(path: Path) -> str:
    """Of a file: 128 bits, read at the speed of the disk; not cryptographic."""
    found = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            found.update(block)
    return found.hexdigest()


def _gguf_quantisation(path: Path) -> str:
    """The file's own word for its quantisation, e.g. ``Q4_1``."""
    from gguf import GGUFReader, LlamaFileType

    field = GGUFReader(str(path)).get_field("general.file_type")
    if field is None:
        return "of unstated quantisation"
    return LlamaFileType(int(field.contents())).name.removeprefix("MOSTLY_").removeprefix("ALL_")


def _keep_dequantised(folder: Path, model: Any, tokenizer: Any, kind: str) -> None:
    """Put a folder that transformers can load into the cache, whole or not at all."""
    parameters = named_parameters(model)
    # The cache only saves time: a full or read-only disk must not stop the work, and another
    # process may have put the same folder there first.
    with suppress(Exception):
        write_checkpoint(folder, parameters, model, tokenizer, {QUANTISATION_FILE: kind})


def write_checkpoint(
    folder: Path,
    parameters: Mapping[str, torch.Tensor],
    model: Any,
    tokenizer: Any,
    more: Mapping[str, str] | None = None,
) -> None:
    """A folder that transformers can load, whole or not at all.

    Args:
        folder: That is not there yet, or empty.
        parameters: By Hugging Face name.
        model: Whose configuration it is.
        tokenizer: Of the model.
        more: Further files, by name.
    """
    from safetensors.torch import save_file

    staging = folder.with_name(f".{folder.name}.{os.getpid()}-{secrets.token_hex(4)}")
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.architectures = [type(model).__name__]
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in parameters.items()}
    config.dtype = next(iter(tensors.values())).dtype
    try:
        staging.mkdir(parents=True)
        save_file(tensors, str(staging / "model.safetensors"), metadata={"format": "pt"})
        config.save_pretrained(str(staging))
        tokenizer.save_pretrained(str(staging))
        for name, text in (more or {}).items():
            (staging / name).write_text(text, encoding="utf-8")
        staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
