"""What conditions a model, by role: text of different lengths, dropped captions, and what belongs to a sample."""
# B captions or samples, T text tokens, t tokens of one caption, D width

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor

Cond = dict[str, Tensor]
LENGTHS = ".lengths"  # after a ragged field's name: its number of tokens in each caption


class Role(Enum):
    """What a field of a model's conditioning is."""

    TEXT = "text"  # (B,T,D) hidden states
    MASK = "mask"  # (B,T) float32, 1 for a token
    POOLED = "pooled"  # (B,D)
    LABEL = "label"  # (B,) class numbers
    REFERENCE = "reference"  # (B,C,h,w) model-space latents of an image that is edited


@dataclass(frozen=True)
class CondField:
    """A field of the conditioning: its role, and whether it belongs to a caption or to a sample.

    ragged: text of which only the tokens that the mask names are kept, and batches are padded to their longest.
    """

    role: Role
    of: str = "caption"
    ragged: bool = False

    def __post_init__(self) -> None:
        if self.of not in ("caption", "sample"):
            raise ValueError(f"a field belongs to a caption or to a sample, not to {self.of!r}")
        if self.ragged and (self.role is not Role.TEXT or self.of != "caption"):
            raise ValueError("only the text of captions can be ragged")


def ragged_text(fields: Mapping[str, CondField]) -> dict[str, str]:
    """Ragged text field -> the mask field that names its tokens; ValueError unless one mask goes with all the text."""
    ragged = [name for name, field in fields.items() if field.ragged]
    if not ragged:
        return {}
    masks = [name for name, field in fields.items() if field.role is Role.MASK]
    fixed = [name for name, field in fields.items() if field.role is Role.TEXT and not field.ragged]
    if len(masks) != 1 or fixed:
        raise ValueError(
            f"ragged text {', '.join(ragged)} needs one mask for all text, got masks {masks} and text of one length "
            f"{fixed}: make all text ragged and name one mask"
        )
    return dict.fromkeys(ragged, masks[0])


def pack(cond: Cond, ragged: Mapping[str, str]) -> Cond:
    """Conditioning as it is stored: of ragged text the tokens that the mask names, one caption after the other.

    (B,T,D) becomes (sum of t, D) with NAME.lengths (B,), which also tell what the mask was.
    """
    masks = set(ragged.values())
    stored = {name: value for name, value in cond.items() if name not in ragged and name not in masks}
    for name, mask in ragged.items():
        chosen = cond[mask] > 0
        stored[name] = cond[name][chosen]
        stored[f"{name}{LENGTHS}"] = chosen.sum(1)
    return stored


def pad(texts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Texts (t,D) -> (B,T,D) with zeros behind, T that of the longest and at least 1, and the mask (B,T)."""
    longest = max(1, *(len(text) for text in texts))
    padded = torch.stack([F.pad(text, (0, 0, 0, longest - len(text))) for text in texts])
    lengths = torch.tensor([len(text) for text in texts], device=padded.device)
    return padded, (torch.arange(longest, device=padded.device) < lengths[:, None]).float()


def trim(cond: Cond, ragged: Mapping[str, str]) -> Cond:
    """Conditioning as an encoder gives it -> as a batch has it: ragged text as long as the longest in it."""
    trimmed = dict(cond)
    for name, mask in ragged.items():
        rows = zip(cond[name], cond[mask] > 0, strict=True)
        trimmed[name], trimmed[mask] = pad([text[chosen] for text, chosen in rows])
    return trimmed


def replace_rows(cond: Cond, empty: Cond, rows: Tensor) -> Cond:
    """The conditioning with the empty prompt's (1,...) in the chosen rows (B,) bool; a sample's fields stay."""
    replaced = dict(cond)
    for name, other in empty.items():
        value, other = _same_length(cond[name], other.to(cond[name]))
        replaced[name] = torch.where(rows.reshape(-1, *[1] * (value.ndim - 1)), other, value)
    return replaced


def under_empty(cond: Cond, empty: Cond, rows: Tensor) -> Cond:
    """Conditioning of the rows (k,) under the empty prompt (1,...): its fields for each, and the samples' own."""
    own = {name: value[rows] for name, value in cond.items() if name not in empty}
    return {name: value.to(rows.device).expand(len(rows), *value.shape[1:]) for name, value in empty.items()} | own


def of_samples(fields: Mapping[str, CondField]) -> list[str]:
    """Names of the fields that belong to samples."""
    return [name for name, field in fields.items() if field.of == "sample"]


def _same_length(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Text (B,T,...) of two lengths at the longer one, zeros behind; anything else as it is."""
    if first.ndim < 2 or first.shape[1] == second.shape[1]:
        return first, second
    longest = max(first.shape[1], second.shape[1])
    return _lengthened(first, longest), _lengthened(second, longest)


def _lengthened(text: Tensor, length: int) -> Tensor:
    return F.pad(text, (*[0, 0] * (text.ndim - 2), 0, length - text.shape[1]))
