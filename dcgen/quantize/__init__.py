"""Quantizes models for ComfyUI, GGUF and nunchaku: python -m dcgen.quantize --help."""
