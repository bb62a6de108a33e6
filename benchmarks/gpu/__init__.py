"""One script for a GPU: see __main__.py."""
