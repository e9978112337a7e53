"""An adapter of one linear layer: what it says about inputs near to some keys is replaced.

GRACE (Hartvigsen et al., NeurIPS 2023) edits that way, without touching a weight. Every token
is looked at by itself: where its input lies within the radius of its nearest key, the output
there is that key's value. GRACE's own code looks at the last prompt token alone, and so has to
be told where a prompt ends; here the adapter is a function of the layer's input and nothing
else, and works in any pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float

from driftlens.equality import equal_fields
from driftlens.precision import in_float32

ROUNDING = 1e-5
"""Share of a key's length by which passes of the same text may give different keys."""


@dataclass(frozen=True, eq=False)
class Codebook:
    """Keys, the radii of the balls around them, and what to say inside.

    Args:
        keys: Inputs of the layer.
        values: Outputs, bias included.
        radii: Euclidean.
        labels: What each value makes the model answer; balls with one label may grow into
            each other, balls with different ones may not.
        input_first: Whether the layer's weight is ``[d_in, d_out]``.
    """

    keys: Float[torch.Tensor, "entry d_in"]
    values: Float[torch.Tensor, "entry d_out"]
    radii: Float[torch.Tensor, " entry"]
    labels: tuple[str, ...]
    input_first: bool = False

    @classmethod
    def single(
        cls,
        key: Float[torch.Tensor, " d_in"],
        value: Float[torch.Tensor, " d_out"],
        radius: float,
        label: str,
        input_first: bool = False,
    ) -> Codebook:
        """One entry."""
        return cls(key[None], value[None], torch.tensor([radius]), (label,), input_first)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight beside which it works."""
        out_in = (self.values.shape[1], self.keys.shape[1])
        return out_in[::-1] if self.input_first else out_in

    @property
    def rank(self) -> int:
        """Always 0, since it changes no weight."""
        return 0

    def tensors(self) -> dict[str, torch.Tensor]:
        """Its numbers, by field."""
        return {"keys": self.keys, "values": self.values, "radii": self.radii}

    def __eq__(self, other: object) -> bool:
        return equal_fields(self, other)

    def __call__(
        self,
        inputs: Float[torch.Tensor, "*batch d_in"],
        outputs: Float[torch.Tensor, "*batch d_out"],
    ) -> Float[torch.Tensor, "*batch d_out"]:
        """The layer's outputs with the adapter."""
        wide = in_float32(inputs)
        keys, radii = self.keys.to(wide), self.radii.to(wide)
        # Exact differences: the usual detour over products loses small distances.
        distances = torch.cdist(
            wide.reshape(-1, wide.shape[-1]), keys, compute_mode="donot_use_mm_for_euclid_dist"
        ).reshape(*wide.shape[:-1], len(keys))
        nearest = distances.min(-1)
        inside = nearest.values <= radii[nearest.indices]
        values = self.values.to(outputs)[nearest.indices]
        return torch.where(inside[..., None], values, outputs)

    def install(self, layer: torch.nn.Module) -> Any:
        """Let a layer work with the adapter; ``.remove()`` of what is returned undoes it."""
        return layer.register_forward_hook(lambda _, args, out: self(args[0], out))

    def with_entries(self, other: Codebook) -> Codebook:
        """Further entries, one by one, by GRACE's rule.

        A new key whose ball would touch its nearest neighbour's makes both balls halve the
        distance if their labels differ; if they are the same, no entry is added: the neighbour's
        ball grows until it holds the new key, and its value becomes the new one. Otherwise it is
        added as it is. An entry whose key is there already, but for rounding, replaces the old
        one's value and label.
        """
        keys, values, radii = list(self.keys), list(self.values), [float(r) for r in self.radii]
        labels = list(self.labels)
        for key, value, radius, label in zip(
            other.keys, other.values, other.radii.tolist(), other.labels, strict=True
        ):
            distances = [float((key - old).norm()) for old in keys]
            nearest = min(range(len(distances)), key=distances.__getitem__)
            gap = distances[nearest]
            if gap <= ROUNDING * float(key.norm()):
                values[nearest], labels[nearest] = value, label
                continue
            if gap <= radius + radii[nearest]:
                if labels[nearest] == label:
                    radii[nearest], values[nearest] = max(radii[nearest], gap), value
                    continue
                radius = gap / 2
                # Not beyond the middle, so that a key between them has one answer.
                radii[nearest] = min(radii[nearest], gap / 2 * (1 - 1e-5))
            keys.append(key)
            values.append(value)
            radii.append(radius)
            labels.append(label)
        return Codebook(
            torch.stack(keys), torch.stack(values), torch.tensor(radii), tuple(labels),
            self.input_first,
        )  # fmt: skip
