"""The DC-Gen method and its models in pure torch, without ComfyUI, diffusers or side effects at import."""
