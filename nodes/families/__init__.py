"""Nodes for one family only, as modules with NODES; most families need none."""

from __future__ import annotations

from comfy_api.latest import io

from ...dcgen.registry import modules_with

NODES: list[type[io.ComfyNode]] = [
    node for module in modules_with("NODES", __name__, __path__) for node in module.NODES
]
