"""The latent spaces of the published autoencoders, by name."""

from __future__ import annotations

from .dcae.variants import VARIANTS
from .latent import LatentSpace

# DC-AEs are from dcae/variants.py, without those that have no published scaling factor.
# Scaling and shift of the others are from vae/config.json of FLUX.1, SD and FLUX.2.
SPACES: dict[str, LatentSpace] = {
    space.name: space
    for space in (
        LatentSpace("flux-f8c16", 16, 8, 0.3611, 0.1159),
        LatentSpace("sd-f8c4", 4, 8, 0.18215),
        LatentSpace("flux2-f16c128", 128, 16, 1.0, packing=2),  # f8 with 32 channels, packed 2x2
        *(
            LatentSpace(ae.name, ae.latent_channels, ae.spatial_factor, ae.scaling_factor)
            for ae in VARIANTS.values()
            if ae.scaling_factor is not None
        ),
    )
}
