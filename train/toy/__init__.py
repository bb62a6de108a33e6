"""The toy: a small captioned image set, and the models that the whole project runs on without a download."""
