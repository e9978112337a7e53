"""Parameters of a model, wrapped or not, by Hugging Face's names, and their precision; the matrices
of its MLPs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformer_lens.model_bridge import TransformerBridge


@dataclass(frozen=True)
class DownProjection:
    """The MLP matrix of one layer that turns keys into values.

    Args:
        name: Parameter name.
        weight: ``[d_model, d_mlp]``, or ``[d_mlp, d_model]`` if ``input_first``.
        input_first: Whether rows are inputs (GPT-2's ``Conv1D``) rather than outputs.
        bias: Name of its bias, if it has one.
    """

    name: str
    weight: torch.nn.Parameter
    input_first: bool
    bias: str | None = None

    @property
    def d_mlp(self) -> int:
        """Width of the keys."""
        return int(self.weight.shape[0 if self.input_first else 1])


def cast(hf_model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Put what a checkpoint holds into another precision, as ``from_pretrained(dtype=...)`` does.

    What is computed beside it keeps its own: the frequencies of a rotation are float32 beside
    weights of any precision; in bfloat16 they would turn what stands at position 1000 by up to
    0.4 radians too much. So does what the architecture says stays in float32.
    """
    kept = getattr(hf_model, "_keep_in_fp32_modules_strict", None) or ()
    for name, tensor in hf_model.state_dict(keep_vars=True).items():
        name = name.replace("_original_component.", "")
        if tensor.is_floating_point() and not any(part in name for part in kept):
            tensor.data = tensor.data.to(dtype)


def named_parameters(
    hf_model: torch.nn.Module, aliases: bool = False
) -> dict[str, torch.nn.Parameter]:
    """Parameters under Hugging Face's names, whether or not a bridge is around the modules.

    Args:
        aliases: Whether a tied parameter is listed under each of its names, or only the first.
    """
    found: dict[str, torch.nn.Parameter] = {}
    seen: set[int] = set()

    def walk(module: torch.nn.Module, prefix: str) -> None:
        # A bridge holds the module that it wraps, and beside it parts of its own, which may be
        # copies (the split of a joint query-key-value matrix). Only the former has HF's names.
        inner = module._modules.get("_original_component")
        if inner is not None:
            walk(inner, prefix)
            return
        for name, parameter in module._parameters.items():
            if parameter is not None and (aliases or id(parameter) not in seen):
                seen.add(id(parameter))
                found[prefix + name] = parameter
        for name, child in module._modules.items():
            if child is not None:
                walk(child, f"{prefix}{name}.")

    walk(hf_model, "")
    return found


def unused_parameters(
    bridge: TransformerBridge, parameters: dict[str, torch.nn.Parameter]
) -> set[str]:
    """Joint query-key-value parameters that the bridge has copied apart and no longer reads."""
    unused: set[str] = set()
    for block in bridge.blocks:
        attn = getattr(block, "attn", None)
        joint, query = (getattr(attn, name, None) for name in ("qkv", "q"))
        for kind in ("weight", "bias"):
            whole, part = (
                getattr(getattr(x, "original_component", None), kind, None) for x in (joint, query)
            )
            if whole is None or part is None:
                continue
            if whole.untyped_storage().data_ptr() != part.untyped_storage().data_ptr():
                unused |= {name for name, p in parameters.items() if p is whole}
    return unused


def find_down_projection(
    bridge: TransformerBridge, parameters: dict[str, torch.nn.Parameter], layer: int
) -> DownProjection | str:
    """The down-projection of a layer, or the reason why there is none."""
    from transformers.pytorch_utils import Conv1D

    out = getattr(getattr(bridge.blocks[layer], "mlp", None), "out", None)
    linear = getattr(out, "original_component", None)
    if linear is None:
        return "its MLP is not one pair of matrices (a mixture of experts?)"
    weight = getattr(linear, "weight", None)
    names = [name for name, parameter in parameters.items() if parameter is weight]
    if not names or weight is None or weight.ndim != 2:
        return "its weight is no plain matrix (quantised in memory?)"
    if not weight.is_floating_point():
        return f"its weight is stored as {weight.dtype}"
    bias = getattr(linear, "bias", None)
    biases = [name for name, parameter in parameters.items() if parameter is bias]
    return DownProjection(names[0], weight, isinstance(linear, Conv1D), *biases[:1])
