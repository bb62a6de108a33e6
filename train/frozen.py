"""Frozen linear layers that take less memory: weights in int8, or on the CPU until they are used ("block swap").

Their weights are no parameters: the optimizer, FSDP2 and peft see layers in which only what is added to them trains.
"""
# O output features, I input features

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

INT8 = 127


class FrozenLinear(nn.Linear):
    """A linear layer of a frozen network: y = x W^T + b, with W int8 times a float32 scale for each row, or as it was.

    Products are computed in the type that W had. A W that was made or copied for a product is not kept for the backward
    pass, which makes it again.
    """

    def __init__(self, layer: nn.Linear, *, int8: bool, offload: bool) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.register_parameter("weight", None)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.data, persistent=False)
        self.computed, self.offload = layer.weight.dtype, offload
        codes, scale = quantize(layer.weight.data) if int8 else (layer.weight.data, None)
        self.register_buffer("scale", scale, persistent=False)
        if offload:  # no buffer, which would go to the device with the module
            self.codes = codes.cpu().pin_memory() if torch.cuda.is_available() else codes.cpu()
        else:
            self.register_buffer("codes", codes, persistent=False)
        self.fetched: tuple[Tensor, Any] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.offload:
            product = _Offloaded.apply(x, self)
        else:
            product = _Resident.apply(x, self.codes, self.scale, self.bias, self.computed)
        return cast(Tensor, product)

    def fetch(self, device: torch.device) -> None:
        """Begin to copy an offloaded W to a GPU, beside what that computes."""
        if self.offload and device.type == "cuda" and self.fetched is None:
            stream = _copy_stream(device)
            with torch.cuda.stream(stream):
                self.fetched = self.codes.to(device, non_blocking=True), stream.record_event()

    def take(self, device: torch.device) -> Tensor:
        """The stored W (O,I) on the device: what was fetched, or a copy."""
        if self.fetched is None:
            return self.codes.to(device, non_blocking=True)
        (codes, arrived), self.fetched = self.fetched, None
        torch.cuda.current_stream(device).wait_event(arrived)
        codes.record_stream(torch.cuda.current_stream(device))
        return codes


class _Resident(torch.autograd.Function):
    """x W^T + b for a W that is stored on the device."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, codes: Tensor, scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(codes, scale)
        ctx.dtype, ctx.given = dtype, x.dtype
        return _product(x, _weight(codes, scale, dtype), bias, dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        codes, scale = ctx.saved_tensors
        return _back(gradient, _weight(codes, scale, ctx.dtype), ctx.given), None, None, None, None


class _Offloaded(torch.autograd.Function):
    """x W^T + b for a W that is stored on the CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenLinear) -> Tensor:
        ctx.layer, ctx.given = layer, x.dtype
        return _product(x, _weight(layer.take(x.device), layer.scale, layer.computed), layer.bias, layer.computed)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        layer = ctx.layer
        return _back(gradient, _weight(layer.take(gradient.device), layer.scale, layer.computed), ctx.given), None


def _weight(codes: Tensor, scale: Any, dtype: torch.dtype) -> Tensor:
    return codes if scale is None else (codes.float() * scale).to(dtype)


def _product(x: Tensor, weight: Tensor, bias: Any, dtype: torch.dtype) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return linear(x.to(dtype), weight, None if bias is None else bias.to(dtype))


def _back(gradient: Tensor, weight: Tensor, given: torch.dtype) -> Tensor:
    with torch.autocast(gradient.device.type, enabled=False):
        return (gradient.to(weight.dtype) @ weight).to(given)


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(O,I) -> int8 codes (O,I) and float32 scales (O,1): the largest value of each row becomes 127."""
    scale = weight.float().abs().amax(1, keepdim=True).clamp_min(1e-12) / INT8
    return (weight.float() / scale).round().clamp(-INT8, INT8).to(torch.int8), scale


def freeze_linears(blocks: Sequence[nn.Module], *, int8: bool, offloaded: int) -> None:
    """Replace the linear layers of blocks that do not train, in place: all in int8, those of the last blocks in RAM.

    Call it after a LoRA was added, which looks at the weights.
    """
    for number, block in enumerate(blocks):
        offload = number >= len(blocks) - offloaded
        for path, layer in list(block.named_modules()):
            if isinstance(layer, nn.Linear) and not layer.weight.requires_grad and (int8 or offload):
                parent, _, name = path.rpartition(".")
                setattr(block.get_submodule(parent), name, FrozenLinear(layer, int8=int8, offload=offload))


def fetch_ahead(blocks: Sequence[nn.Module], device: torch.device) -> None:
    """Let each block that is entered begin to fetch the offloaded layers of the block after it.

    In the backward pass, where recomputation enters blocks in reverse, of the one before it.
    """
    layers = [[m for m in block.modules() if isinstance(m, FrozenLinear) and m.offload] for block in blocks]
    for number, block in enumerate(blocks):
        before = layers[number - 1] if number else []
        after = layers[number + 1] if number + 1 < len(blocks) else []

        def entered(_: nn.Module, __: Any, before: Any = before, after: Any = after) -> None:
            in_backward = torch._C._current_graph_task_id() != -1
            for layer in before if in_backward else after:
                layer.fetch(device)

        if before or after:
            block.register_forward_pre_hook(entered)


_STREAMS: dict[torch.device, Any] = {}


def _copy_stream(device: torch.device) -> Any:
    """The stream of a GPU on which weights are copied."""
    if device not in _STREAMS:
        _STREAMS[device] = torch.cuda.Stream(device)
    return _STREAMS[device]
