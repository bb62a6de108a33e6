"""`python -m train.evaluate`: the paper's tables and its human evaluation. See docs/evaluation.md."""
