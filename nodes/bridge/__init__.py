"""The only folder that touches ComfyUI's internals. Nodes call it; dcgen knows nothing of it."""
