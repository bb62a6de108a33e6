"""The DC-Gen method and its models in pure torch: no ComfyUI, no diffusers, nothing done at import."""
