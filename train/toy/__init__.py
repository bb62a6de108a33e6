"""The toy: a small captioned picture set, and the models that the whole project runs on without a download."""
