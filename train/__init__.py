"""Training of DC-Gen models: `python -m train.run RECIPE`. Imports dcgen, never comfy."""
