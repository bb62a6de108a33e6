"""The loaders whose MODELs take an adapter. A new one is a module here with a HOST."""

from __future__ import annotations

from ....dcgen.registry import modules_with
from ..host import Host, Patcher

HOSTS: list[Host] = sorted(
    (module.HOST for module in modules_with("HOST", __name__, __path__)), key=lambda host: host.order, reverse=True
)


def host_of(model: Patcher) -> Host:
    """Who loaded a MODEL."""
    return next(host for host in HOSTS if host.recognises(model))
