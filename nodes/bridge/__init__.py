"""The only package that uses ComfyUI's internals. The nodes import it; dcgen does not."""
