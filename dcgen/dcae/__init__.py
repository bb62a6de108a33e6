"""DC-AE, the deep compression autoencoder: all published variants, both file formats, exact streaming."""

from .config import DCAEConfig, DCAEError
from .files import DCAESource, load_dcae, open_dcae, save_dcae
from .memory import choose_strip, peak_bytes
from .model import DCAE
from .plan import Strip, free_memory
from .variants import VARIANTS

__all__ = [
    "DCAE",
    "VARIANTS",
    "DCAEConfig",
    "DCAEError",
    "DCAESource",
    "Strip",
    "choose_strip",
    "free_memory",
    "load_dcae",
    "open_dcae",
    "peak_bytes",
    "save_dcae",
]
