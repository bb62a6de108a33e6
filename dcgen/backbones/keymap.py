"""Key maps between a model's diffusers names and its original names, as data that works in both directions.

A map is a list of rows. A row says: this original tensor is these diffusers tensors, concatenated along dim 0. Rows
only copy slices and never compute, so both directions are bit-exact. Every key must be used by exactly one row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..fields import shown

SUFFIXES = (".weight", ".bias")
MAX_BLOCKS = 1000  # of one kind; published models have at most 60
REST = -1
T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """One line of a map; `{i}` stands for the block number.

    original: original module (or, with suffixes ("",), tensor) name; parts: its diffusers names, in order;
    sizes: rows of each part in units of the model width, REST for the remainder; empty = equal parts;
    swap: the two halves along dim 0 are swapped; alias: another original name in some files;
    optional: name of a group of rows that a model has all or none of; "" = every model has this row;
    copied: one original tensor that diffusers repeats in every block (the parts are these equal copies).
    """

    original: str
    parts: tuple[str, ...]
    sizes: tuple[int, ...] = ()
    swap: bool = False
    suffixes: tuple[str, ...] = SUFFIXES
    alias: str | None = None
    optional: str = ""
    copied: bool = False


@dataclass(frozen=True)
class Rule:
    """A Row for one block and one suffix, with full key names."""

    original: str
    parts: tuple[str, ...]
    sizes: tuple[int, ...]
    swap: bool
    alias: str | None
    optional: str
    copied: bool

    def original_key(self, keys: Mapping[str, Any]) -> str:
        """The original key or its alias, whichever is in `keys` (the original key if neither is)."""
        return (
            self.alias if self.alias is not None and self.alias in keys and self.original not in keys else self.original
        )

    def join(self, get: Callable[[str], Tensor]) -> Tensor:
        """The original tensor from its diffusers parts."""
        if self.copied:
            return self._one_of_equals(get)
        tensors = [get(key) for key in self.parts]
        joined = tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim=0)
        return _swap_halves(joined, self.parts[0]) if self.swap else joined

    def split(self, tensor: Tensor, width: int) -> Iterator[tuple[str, Tensor]]:
        """(diffusers key, tensor) for each part of an original tensor; the tensors are views."""
        if self.swap:
            tensor = _swap_halves(tensor, self.original)
        if len(self.parts) == 1 or self.copied:
            yield from ((part, tensor) for part in self.parts)
            return
        yield from zip(self.parts, torch.split(tensor, self._rows(tensor.shape[0], width)), strict=True)

    def rows(self, total: int, width: int) -> list[tuple[str, int, int]]:
        """(diffusers key, first row, last row + 1) of each part in an original tensor of `total` rows; not for swap."""
        if self.copied:
            return [(key, 0, total) for key in self.parts]
        counts = [total] if len(self.parts) == 1 else self._rows(total, width)
        ends = [sum(counts[: i + 1]) for i in range(len(counts))]
        return [(key, end - count, end) for key, count, end in zip(self.parts, counts, ends, strict=True)]

    def _one_of_equals(self, get: Callable[[str], Tensor]) -> Tensor:
        first = get(self.parts[0])
        if first.device.type != "meta":
            different = [key for key in self.parts[1:] if not torch.equal(get(key), first)]
            if different:
                raise ValueError(
                    f"{self.original} is one tensor in the original format, but {different[0]} is not {self.parts[0]}"
                )
        return first

    def _rows(self, rows: int, width: int) -> list[int]:
        if not self.sizes:
            counts = [rows // len(self.parts)] * len(self.parts)
        else:
            fixed = [size * width for size in self.sizes if size != REST]
            counts = [rows - sum(fixed) if size == REST else size * width for size in self.sizes]
        if sum(counts) != rows or min(counts) < 1:
            raise ValueError(
                f"{self.original}: {rows} rows cannot be split into {', '.join(self.parts)} (width {width})"
            )
        return counts


@dataclass(frozen=True)
class KeyMap:
    """All rows of one model: `top` once, each entry of `blocks` once for every block of that kind."""

    model: str
    top: tuple[Row, ...]
    blocks: Mapping[str, tuple[Row, ...]]
    dropped: tuple[str, ...] = ()
    """Prefixes of original keys without a diffusers name (buffers that are recomputed)."""

    def rules(self, depths: Mapping[str, int]) -> list[Rule]:
        """The map of a model with depths[kind] blocks of each kind."""
        rules = [rule for row in self.top for rule in _rules(row, None)]
        for kind, rows in self.blocks.items():
            per_block = [row for row in rows if not row.copied]
            rules += [rule for i in range(depths[kind]) for row in per_block for rule in _rules(row, i)]
            rules += [rule for row in rows if row.copied for rule in _rules(row, None, range(depths[kind]))]
        return rules

    def original_plan(self, keys: Mapping[str, Any], depths: Mapping[str, int], *, partial: bool = False) -> list[Rule]:
        """The rules that turn these diffusers keys into original ones; ValueError names missing and unknown keys.

        partial: only some tensors of the model are given, but each original tensor is given whole or not at all.
        """
        return self._plan(keys, self.rules(depths), lambda rule: rule.parts, partial)

    def diffusers_plan(
        self, keys: Mapping[str, Any], depths: Mapping[str, int], *, partial: bool = False
    ) -> list[Rule]:
        """The rules that turn these original keys into diffusers ones; errors as in original_plan."""
        mapped = {key: value for key, value in keys.items() if not key.startswith(self.dropped or ("\0",))}
        return self._plan(mapped, self.rules(depths), lambda rule: (rule.original_key(keys),), partial)

    def to_original(
        self, state_dict: Mapping[str, Tensor], depths: Mapping[str, int], *, partial: bool = False
    ) -> dict[str, Tensor]:
        """Diffusers state dict -> original one."""
        plan = self.original_plan(state_dict, depths, partial=partial)
        return {rule.original: rule.join(state_dict.__getitem__) for rule in plan}

    def to_diffusers(
        self, state_dict: Mapping[str, Tensor], depths: Mapping[str, int], width: int, *, partial: bool = False
    ) -> dict[str, Tensor]:
        """Original state dict -> diffusers one; width is the model's hidden size."""
        plan = self.diffusers_plan(state_dict, depths, partial=partial)
        return {
            key: part for rule in plan for key, part in rule.split(state_dict[rule.original_key(state_dict)], width)
        }

    def _plan(
        self,
        keys: Mapping[str, Any],
        rules: list[Rule],
        sources: Callable[[Rule], tuple[str, ...]],
        partial: bool,
    ) -> list[Rule]:
        present = {rule.optional for rule in rules if any(key in keys for key in sources(rule))}
        plan: list[Rule] = []
        missing: list[str] = []
        known: set[str] = set()
        for rule in rules:
            absent = [key for key in sources(rule) if key not in keys]
            known.update(sources(rule))
            if not absent:
                plan.append(rule)
            elif len(absent) < len(sources(rule)) or not (partial or (rule.optional and rule.optional not in present)):
                missing += absent
        unknown = [key for key in keys if key not in known]
        if missing or unknown:
            raise ValueError(f"this is not a whole {self.model} state dict: {describe_keys(missing, unknown)}")
        return plan


def describe_keys(missing: list[str], unknown: list[str], limit: int = 8) -> str:
    """The missing and unknown keys in words, at most `limit` of each by name."""
    parts = []
    for label, keys in (("missing", missing), ("unknown", unknown)):
        if keys:
            names = ", ".join(key if len(key) < 200 else shown(key) for key in sorted(keys)[:limit])
            parts.append(f"{len(keys)} {label}: {names}{', ...' if len(keys) > limit else ''}")
    return "; ".join(parts)


def strip_prefix(state_dict: Mapping[str, T], prefixes: tuple[str, ...]) -> Mapping[str, T]:
    """Remove any of `prefixes` that all keys start with, repeatedly; the mapping itself if none applies."""
    for prefix in prefixes:
        if state_dict and all(key.startswith(prefix) for key in state_dict):
            return strip_prefix({key[len(prefix) :]: value for key, value in state_dict.items()}, prefixes)
    return state_dict


def count_blocks(keys: Mapping[str, Any], prefix: str) -> int:
    """Number of blocks named prefix0., prefix1., ...; ValueError names a gap in the numbers."""
    heads = {key[len(prefix) :].split(".")[0] for key in keys if key.startswith(prefix)}
    numbers = {head for head in heads if head.isascii() and head.isdecimal()}
    excessive = [head for head in numbers if len(head) > len(str(MAX_BLOCKS)) or int(head) >= MAX_BLOCKS]
    if excessive:
        raise ValueError(f"no model has a block {prefix}{shown(excessive[0])}: the file is damaged")
    indices = {int(head) for head in numbers}
    gaps = sorted(set(range(max(indices, default=-1) + 1)) - indices)
    if gaps:
        raise ValueError(
            f"blocks {prefix}{gaps[0]}. is absent though {prefix}{max(indices)}. is there: incomplete file"
        )
    return len(indices)


def _rules(row: Row, index: int | None, copies: range = range(0)) -> Iterator[Rule]:
    def name(template: str, i: int | None = index) -> str:
        return template if i is None else template.replace("{i}", str(i))

    for suffix in row.suffixes:
        parts = [name(part, i) for part in row.parts for i in (copies or [index])]
        yield Rule(
            original=name(row.original) + suffix,
            parts=tuple(part + suffix for part in parts),
            sizes=row.sizes,
            swap=row.swap,
            alias=None if row.alias is None else name(row.alias) + suffix,
            optional=row.optional,
            copied=row.copied,
        )


def _swap_halves(tensor: Tensor, key: str) -> Tensor:
    if tensor.shape[0] % 2:
        raise ValueError(f"{key}: {tensor.shape[0]} rows cannot be split into halves")
    first, second = tensor.chunk(2, dim=0)
    return torch.cat((second, first), dim=0)
