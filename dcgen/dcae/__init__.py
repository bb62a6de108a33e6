"""DC-AE, the deep compression autoencoder: all published variants, both file formats, exact streaming."""

from .config import DCAEConfig, DCAEError
from .files import load_dcae, save_dcae
from .model import DCAE
from .variants import VARIANTS

__all__ = ["DCAE", "VARIANTS", "DCAEConfig", "DCAEError", "load_dcae", "save_dcae"]
