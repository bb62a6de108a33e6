"""DC-AE, the deep compression autoencoder: all published variants, both file formats, exact streaming."""

from .config import DCAEConfig, DCAEError
from .files import load_dcae, save_dcae
from .model import DCAE
from .plan import Strip, choose_strip, free_memory, peak_bytes
from .variants import VARIANTS

__all__ = [
    "DCAE",
    "VARIANTS",
    "DCAEConfig",
    "DCAEError",
    "Strip",
    "choose_strip",
    "free_memory",
    "load_dcae",
    "peak_bytes",
    "save_dcae",
]
