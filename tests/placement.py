"""Pretended devices: tensors that stand on the CPU and say that they stand elsewhere.

Inside :class:`Pretending` every tensor may carry the name of a device. Where tensors of
different devices meet, the error of real devices is raised; ``.to`` and ``device=`` change the
name only. So the placement of every tensor is tested without an accelerator. As on real ones,
indices may stand on the CPU, and so may tensors without dimensions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

CPU = torch.device("cpu")
FIRST, SECOND = torch.device("xpu:0"), torch.device("xpu:1")
INDEXING = (torch.Tensor.__getitem__, torch.Tensor.__setitem__)
MOVING = (torch.Tensor.to, torch.Tensor.cpu)


def place_of(tensor: torch.Tensor) -> torch.device:
    """Where a tensor pretends to be."""
    return getattr(tensor, "_place", CPU)


def put(tensor: torch.Tensor, place: torch.device) -> torch.Tensor:
    """Let a tensor pretend to be somewhere."""
    tensor._place = place  # type: ignore[attr-defined]
    return tensor


class Pretending(TorchFunctionMode):
    """Inside, tensors have the devices that they pretend to have.

    Args:
        float64: Whether devices other than the CPU have numbers of 64 bits; Apple's have none.
    """

    def __init__(self, float64: bool = True) -> None:
        super().__init__()
        self.float64 = float64

    def _checked(self, found: Any, place: torch.device) -> Any:
        if not self.float64 and place != CPU and getattr(found, "dtype", None) == torch.float64:
            raise TypeError(f"{place} has no float64.")
        return found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == torch.Tensor.device.__get__:
            return place_of(args[0])
        if func in MOVING:
            return self._move(func, args, kwargs)
        wanted = None
        if kwargs.get("device") is not None:
            wanted, kwargs = torch.device(kwargs["device"]), {**kwargs, "device": CPU}
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        if func in INDEXING:
            indices = [x for x in tree_flatten(args[1])[0] if isinstance(x, torch.Tensor)]
            on_cpu = {id(x) for x in indices if place_of(x) == CPU}
            tensors = [x for x in tensors if id(x) not in on_cpu]
        places = {place_of(x) for x in tensors if x.ndim} or {place_of(x) for x in tensors}
        if func is torch.Tensor.copy_:
            places = {place_of(args[0])}
        if len(places) > 1 and wanted is None:
            raise RuntimeError(
                "Expected all tensors to be on the same device, but "
                f"{getattr(func, '__name__', func)} got {sorted(map(str, places))}"
            )
        place = wanted or next(iter(places), CPU)
        given = {id(x) for x in tensors}
        return tree_map(
            lambda x: (
                self._checked(put(x, place), place)
                if isinstance(x, torch.Tensor) and id(x) not in given
                else x
            ),
            func(*args, **kwargs),
        )

    def _move(self, func: Any, args: Any, kwargs: dict[str, Any]) -> torch.Tensor:
        tensor, place = args[0], place_of(args[0])
        dtype = kwargs.get("dtype")
        if func is torch.Tensor.cpu:
            place = CPU
        for value in (*args[1:], kwargs.get("device"), kwargs.get("other")):
            if isinstance(value, torch.Tensor):
                place, dtype = place_of(value), value.dtype
            elif isinstance(value, (str, torch.device)):
                place = torch.device(value)
            elif isinstance(value, torch.dtype):
                dtype = value
        if place == place_of(tensor) and dtype in (None, tensor.dtype):
            return tensor
        moved = put(torch.ops.aten.alias(tensor.to(dtype or tensor.dtype)), place)
        return self._checked(moved, place)


def spread(model: Any, places: list[torch.device]) -> None:
    """Pretend that a model's blocks stand on these devices, in order.

    The embedding stands on the first and the head on the last one; what enters a module is
    moved to it, as accelerate's hooks do.
    """

    def home(name: str) -> torch.device:
        for layer, place in enumerate(places):
            if any(f"{stack}.{layer}." in name for stack in ("layers", "h", "blocks")):
                return place
        first = any(part in name for part in ("embed", "wte", "wpe", "rotary"))
        return places[0] if first else places[-1]

    # The bridge's own copies of parts of joint matrices first, then all others by their names.
    for name, parameter in model.bridge.named_parameters():
        put(parameter, home(name))
    for name, parameter in model.weights.parameters.items():
        put(parameter, home(name))
    for name, buffer in model.hf_model.named_buffers():
        put(buffer, home(name))

    def moving(place: torch.device) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> Any:
            return tree_map(
                lambda x: x.to(place) if isinstance(x, torch.Tensor) else x, (args, kwargs)
            )

        return hook

    for block, place in zip(model.bridge.blocks, places, strict=True):
        block.register_forward_pre_hook(moving(place), with_kwargs=True)
    model.bridge.ln_final.register_forward_pre_hook(moving(places[-1]), with_kwargs=True)
    # The unembedding may be the embedding, and then stands there.
    unembedding = place_of(model.hf_model.get_output_embeddings().weight)
    for module in torch.nn.Module.modules(model.bridge.unembed):
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                put(tensor, unembedding)
    model.bridge.unembed.register_forward_pre_hook(moving(unembedding), with_kwargs=True)
