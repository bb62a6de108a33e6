"""Finding the modules of a package: what is registered is what lies in the folder, and no list has to be kept."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable
from types import ModuleType


def modules_with(attribute: str, package: str, path: Iterable[str]) -> list[ModuleType]:
    """The modules (or packages) in the folders `path` of a package that have the attribute, by name.

    package: its import name, which in ComfyUI is made from the folder's path.
    """
    names = sorted(found.name for found in pkgutil.iter_modules(path) if not found.name.startswith("_"))
    modules = [importlib.import_module(f"{package}.{name}") for name in names]
    return [module for module in modules if hasattr(module, attribute)]
