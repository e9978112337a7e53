"""Hyperparameters of every editor, each with its meaning and its range.

The field's name, type, default and the docstring's line about it are what ``driftlens methods``
lists, what TOML files hold (``driftlens.editing.config_files``), and what is checked.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Annotated, Any, Literal, TypeVar

import docstring_parser
import numpy as np
import pydantic

from driftlens.errors import RequestError


def _plain_int(value: Any) -> Any:
    """Whole numbers of numpy as Python's; anything else as it is."""
    return int(value) if isinstance(value, np.integer) else value


def _plain_list(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


Positive = Annotated[float, pydantic.Field(strict=True, gt=0, allow_inf_nan=False)]
Weight = Annotated[float, pydantic.Field(strict=True, ge=0, allow_inf_nan=False)]
Finite = Annotated[float, pydantic.Field(strict=True, allow_inf_nan=False)]
Whole = pydantic.BeforeValidator(_plain_int)
Count = Annotated[int, Whole, pydantic.Field(strict=True, ge=1)]
Switch = Annotated[bool, pydantic.Field(strict=True)]
# Whether layers are in range is checked where the model is known.
Layer = Annotated[int, Whole, pydantic.Field(strict=True)]
Several = pydantic.BeforeValidator(_plain_list)
Layers = Annotated[tuple[Layer, ...], Several, pydantic.Field(min_length=1)]
Lengths = Annotated[tuple[Count, ...], Several, pydantic.Field(min_length=1)]


@dataclass(frozen=True)
class EditConfig:
    """What every editor's configuration can tell."""

    @property
    def edited_layers(self) -> tuple[int, ...]:
        """The layers whose down-projections are edited, ascending."""
        given = getattr(self, "layers", None)
        return tuple(sorted(given)) if given is not None else (self.layer,)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class ValueSearch(EditConfig):
    """Hyperparameters of the search for a value.

    Args:
        steps: Forward passes; the last is not followed by an update, so there are at most
            ``steps - 1`` updates.
        lr: Learning rate of Adam.
        weight_decay: Weight of ``|delta| / |h_0|^2`` (the numerator is not squared).
        clamp_factor: Radius of the ball around 0 for delta, in units of ``|h_0|``.
        kl_factor: Weight of the KL term.
        kl_position: Where the KL term reads "{subject} is a": at the subject's last token, as
            all published code does, or at the last token.
        early_stop_loss: Stop once the total loss is below; a negative number never stops.
        context_lengths: Tokens of the sentences that the model writes before the prompt.
        contexts_per_word: Sentences for each length and each of five first words.
    """

    steps: Count = 20
    lr: Positive = 0.5
    weight_decay: Weight = 0.5
    clamp_factor: Positive = 4.0
    kl_factor: Weight = 0.0625
    kl_position: Literal["subject", "last"] = "subject"
    early_stop_loss: Finite = 0.05
    context_lengths: Lengths = (5, 10)
    contexts_per_word: Count = 2


@dataclass(frozen=True)
class RomeConfig(ValueSearch):
    """Hyperparameters of ROME and r-ROME.

    Args:
        layer: Whose down-projection is edited.
    """

    layer: Layer = field(kw_only=True)


@dataclass(frozen=True)
class SpreadSearch(ValueSearch):
    """Hyperparameters of editors that spread a change over several layers, as MEMIT has them.

    Args:
        layers: Whose down-projections share the change.
    """

    layers: Layers = field(kw_only=True)
    clamp_factor: Positive = 0.75
    context_lengths: Lengths = (10,)
    contexts_per_word: Count = 1


@dataclass(frozen=True)
class MemitConfig(SpreadSearch):
    """Hyperparameters of MEMIT.

    Args:
        cov_weight: lambda, the weight of the second moments of other keys (``mom2_update_weight``).
    """

    cov_weight: Positive = 15000.0


@dataclass(frozen=True)
class PmetConfig(MemitConfig):
    """Hyperparameters of PMET.

    Args:
        nll_factor: Weight of the likelihood term.
        greedy_nll_factor: What that weight is multiplied with at steps where greedy decoding
            gives the target in every context.
        greedy_stop_kl: At such a step the search stops if the weighted KL term is no larger.
    """

    nll_factor: Positive = 1.0
    greedy_nll_factor: Weight = 0.1
    greedy_stop_kl: Finite = 0.01


@dataclass(frozen=True)
class EmmetConfig(MemitConfig):
    """Hyperparameters of EMMET.

    Args:
        key_weight: lambda_e, which softens the equality constraint; 0 keeps it exact.
        identity_weight: Weight of the identity that is added to the second moments
            (``update_norm_lambda``).
    """

    key_weight: Weight = 0.1
    identity_weight: Weight = 0.0


@dataclass(frozen=True)
class AlphaEditConfig(SpreadSearch):
    """Hyperparameters of AlphaEdit.

    Args:
        nullspace_threshold: Directions of other keys whose second moment is smaller count as
            their null space, to which the change is confined.
        ridge: L2, the weight of the update's own size.
    """

    nullspace_threshold: Positive = 0.02
    ridge: Positive = 10.0


@dataclass(frozen=True)
class FtConfig(EditConfig):
    """Hyperparameters of constrained fine-tuning, FT-L and FT-M.

    Args:
        layer: Whose down-projection is trained.
        steps: Forward passes over all facts; the last is not followed by an update.
        lr: Learning rate of Adam.
        weight_decay: Weight of the trained parameters themselves in their gradient.
        norm_constraint: Largest change of any single weight; ``None`` for no limit.
        stop_loss: Stop once the likelihood term is below.
        train_bias: Whether the down-projection's bias, if it has one, is trained too.
    """

    layer: Layer = field(kw_only=True)
    steps: Count = 25
    lr: Positive = 5e-4
    weight_decay: Weight = 0.0
    norm_constraint: Positive | None = None
    stop_loss: Finite = 0.01
    train_bias: Switch = True


@dataclass(frozen=True)
class GraceConfig(EditConfig):
    """Hyperparameters of GRACE.

    Args:
        layer: Whose down-projection gets the adapter.
        steps: Forward passes of the value's training; the last is not followed by an update.
        lr: Learning rate of Adam.
        radius: Up to which distance from its key (Euclidean) the value answers.
        stop_loss: Stop once the likelihood term is below.
    """

    layer: Layer = field(kw_only=True)
    steps: Count = 100
    lr: Positive = 1.0
    radius: Positive = 1.0
    stop_loss: Finite = 0.05


Config = TypeVar("Config", bound=EditConfig)


def checked(kind: type[Config], values: Mapping[str, Any], method: str) -> Config:
    """A configuration of some kind from plain values.

    Raises:
        RequestError: On an unknown or missing field, a wrong type, or a value out of range.
    """
    known = [item.name for item in fields(kind)]
    for name in values:
        if name not in known:
            raise RequestError(
                f"{method} has no hyperparameter {name!r}.", f"It has {', '.join(known)}."
            )
    try:
        found: Config = _adapter(kind).validate_python(dict(values))  # type: ignore[arg-type]
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"][:1])) or "the configuration"
        if first["type"] == "missing" or where not in values:
            raise RequestError(f"{method} needs {where}.", "Give it a value.") from error
        raise RequestError(
            f"{where} is {values[where]!r}.", f"{first['msg'].replace('Input', 'It')}."
        ) from error
    layers = found.edited_layers
    if len(set(layers)) != len(layers):
        raise RequestError(f"layers are {list(layers)}.", "Name each layer once.")
    return found


@functools.cache
def _adapter(kind: type[Any]) -> pydantic.TypeAdapter[Any]:
    return pydantic.TypeAdapter(kind)


def describe(kind: type[Any]) -> list[dict[str, Any]]:
    """Name, type, default and meaning of each field; no default stands for one by model."""
    meanings: dict[str, str] = {}
    for parent in reversed(kind.__mro__):
        for param in docstring_parser.parse(parent.__doc__ or "").params:
            meanings[param.arg_name] = " ".join((param.description or "").split())
    return [
        {
            "name": item.name,
            "type": _type_name(item),
            "default": _default(item),
            "meaning": meanings.get(item.name, ""),
        }
        for item in fields(kind)
    ]


def _default(item: Field[Any]) -> Any:
    if item.default is MISSING:
        return None
    return list(item.default) if isinstance(item.default, tuple) else item.default


def _type_name(item: Field[Any]) -> str:
    names = {
        "Positive": "number > 0",
        "Weight": "number >= 0",
        "Finite": "number",
        "Count": "whole number >= 1",
        "Layer": "layer",
        "Layers": "layers",
        "Lengths": "whole numbers >= 1",
        "Switch": "true or false",
        "Positive | None": "number > 0, or none",
    }
    return names.get(str(item.type), str(item.type))
