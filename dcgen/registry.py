"""Registers all modules in a package's folder, so that no list has to be maintained."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable
from types import ModuleType


def modules_with(attribute: str, package: str, path: Iterable[str]) -> list[ModuleType]:
    """The modules (or packages) in the folders `path` of a package that have the attribute, sorted by name.

    package: its import name, which ComfyUI derives from the folder's path.
    """
    names = sorted(module.name for module in pkgutil.iter_modules(path) if not module.name.startswith("_"))
    modules = [importlib.import_module(f"{package}.{name}") for name in names]
    return [module for module in modules if hasattr(module, attribute)]
