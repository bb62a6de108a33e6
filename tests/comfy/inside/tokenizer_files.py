"""Tokenizer folders as the release loader reads them."""

import importlib
from pathlib import Path


def load(pack, _tensors, params):
    """Per folder: token ids of the texts and what the tokenizer says of itself, or the error."""
    text = importlib.import_module(f"{pack}.nodes.bridge.text")
    found = {}
    for name, (folder, entry) in params["folders"].items():
        try:
            tokenizer = text.load_tokenizer(Path(folder), entry)
        except ValueError as error:
            found[name] = {"error": str(error)}
            continue
        names = ("model_max_length", "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")
        ids = [tokenizer(line).input_ids for line in params["texts"]]
        found[name] = {"ids": ids, "len": len(tokenizer), **{key: getattr(tokenizer, key) for key in names}}
    return {}, found
