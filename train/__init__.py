"""Training of DC-Gen models: `python -m train.run RECIPE`. Imports dcgen, never comfy."""

import importlib.util
import sys

_NEEDED = ("torch", "safetensors", "einops", "numpy", "pydantic", "yaml", "diffusers", "transformers", "peft")
_missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
if _missing:
    _message = (
        f"{sys.executable} lacks {', '.join(_missing)}, which the training needs. `python setup_env.py` in the "
        "repository's folder makes an environment with everything: use its Python, .venv/bin/python (Windows: "
        ".venv\\Scripts\\python). In an environment of your own: install torch, then -r train/requirements.txt."
    )
    if sys.argv[0] == "-m":  # python -m train.run: a user, to whom a traceback says nothing
        sys.exit(f"error: {_message}")
    raise ModuleNotFoundError(_message, name=_missing[0])
