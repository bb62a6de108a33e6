"""The loaders whose MODELs take an adapter. To add one, add a module with a HOST to this folder."""

from __future__ import annotations

from ....dcgen.registry import modules_with
from ..host import Host, Patcher

HOSTS: list[Host] = sorted(
    (module.HOST for module in modules_with("HOST", __name__, __path__)), key=lambda host: host.order, reverse=True
)


def host_of(model: Patcher) -> Host:
    """The host of a MODEL."""
    return next(host for host in HOSTS if host.recognises(model))
