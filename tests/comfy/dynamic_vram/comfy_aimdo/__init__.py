"""A stand-in for comfy-aimdo (as of 0.4.13) without a card; see ../vram_simulation.py. Only what core calls.

It shows which weights core holds as meta or None, faults in, patches and casts at use, and drops. It cannot show: what
stays in real video memory and what it costs; CUDA errors and out-of-memory; pinned memory; streams, prefetch, graphs;
reading files straight to the card. A call that would need these raises RuntimeError.
"""
