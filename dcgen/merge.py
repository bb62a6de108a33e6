"""A base with an adapter merged into it, tensor by tensor: whole, or split into blocks and ends.

The split form is for loaders that know the base but not DC-Gen: the blocks are a file of the base's own shape, which
they read, and an adapter without LoRA has the ends.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from .adapter import Adapter, check_model, merge_tensor
from .backbones.keymap import Rule
from .files import Entry
from .release import Model


@dataclass(kw_only=True)
class MergedModel(Model):
    """base + adapter as one model on the adapter's latent; a tensor is merged when it is read."""

    base: Model
    adapter: Adapter
    strength: float

    @property
    def entries(self) -> dict[str, Entry]:
        """All tensors by diffusers name, each of the dtype of the base's; new ones of the base's most common dtype."""
        entries, tensors = self.base.entries, self.adapter.tensors
        if not tensors:
            return entries
        ends = self.backbone.ends(self.base.config).prefixes
        dtypes = {key: entries[key].dtype if key in entries else self.tensors.dtype for key in tensors}
        kept = {key: entry for key, entry in entries.items() if not key.startswith(ends)}
        return kept | {key: Entry(key, dtypes[key], tuple(tensor.shape)) for key, tensor in tensors.items()}

    def get(self, key: str) -> Tensor:
        """One tensor by diffusers name: the adapter's own, or the base's with the LoRA at `strength`."""
        if key in self.adapter.tensors:
            return self.adapter.tensors[key].to(self.entries[key].dtype)
        return merge_tensor(key, self.base.get(key), self.adapter, self.strength)

    def get_original(self, rule: Rule) -> Tensor:
        """The original tensor of a rule, joined from merged ones."""
        return rule.join(self.get)

    def check_values(self) -> None:
        """As for any model; the adapter's values were checked when it was read."""
        self.base.check_values()


def merged_model(base: Model, adapter: Adapter, strength: float = 1.0) -> MergedModel:
    """base + adapter, not yet computed. ValueError when the adapter is for another base."""
    if adapter.backbone != base.backbone.name:
        raise ValueError(f"this is a {adapter.backbone} adapter, {base.tensors.path} is a {base.backbone.name} model")
    check_model(adapter, base)
    config = base.backbone.config_with_latent(base.config, adapter.latent.channels, adapter.patch_size)
    return MergedModel(
        base.tensors,
        base.backbone,
        config,
        adapter.latent,
        adapter.schedule,
        base=base,
        adapter=adapter,
        strength=strength,
    )


def split(merged: MergedModel) -> tuple[MergedModel, Adapter]:
    """(blocks, ends): the base with the LoRA merged but its own embedder and head, and the adapter without LoRA for it.

    The ends applied to the blocks are the merged model. On the base itself they are refused: they know its identity.
    """
    base, adapter = merged.base, merged.adapter
    lora = replace(adapter, tensors={})
    blocks = MergedModel(
        base.tensors,
        base.backbone,
        base.config,
        base.latent,
        base.schedule,
        base=base,
        adapter=lora,
        strength=merged.strength,
    )
    ends = replace(
        adapter,
        lora={},
        base_weights=blocks.identity(),
        unmerged_weights=base.identity(),
        base_latent=adapter.base_latent or base.latent,
    )
    return blocks, ends
