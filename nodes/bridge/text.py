# B batch, T text tokens
"""The common part of all families' text encoders as CLIP. No code from a release folder is executed."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import comfy.sd
import folder_paths
from comfy.sd1_clip import SDTokenizer

from ...dcgen.jsons import read_object
from ...dcgen.tensors import Tensors

if TYPE_CHECKING:
    import transformers

LONGEST_PROMPT = 32768  # tokens; far more than any encoder here reads


class ReleaseCLIP(comfy.sd.CLIP):
    """Core's CLIP, but it always encodes with the model of its patcher.

    Core's own class keeps the first model even when a node replaces the patcher's (Set CLIP Hooks under dynamic VRAM,
    Select CLIP Device), so that the node has no effect.
    """

    @property
    def cond_stage_model(self) -> Any:
        return self.patcher.model if "patcher" in self.__dict__ else self.__dict__["_initial"]

    @cond_stage_model.setter
    def cond_stage_model(self, model: Any) -> None:
        self.__dict__["_initial"] = model  # set by the constructor, before there is a patcher

    def clone(self, *args: Any, **kwargs: Any) -> comfy.sd.CLIP:
        clone = super().clone(*args, **kwargs)
        clone.__class__ = ReleaseCLIP
        return clone


def new_clip(target: Any, weights: list[Tensors], disable_dynamic: bool) -> comfy.sd.CLIP:
    """A CLIP without its weights; `weights` are the files that will be loaded into it and give its size."""
    size = sum(tensor.numel() for files in weights for tensor in files.meta().values())
    kwargs = {"disable_dynamic": True} if disable_dynamic else {}
    return ReleaseCLIP(
        target, embedding_directory=folder_paths.get_folder_paths("embeddings"), parameters=size, **kwargs
    )


def load_tokenizer(folder: Path, entry: list[str] | None) -> transformers.PreTrainedTokenizerBase:
    """A tokenizer of the class that model_index.json names, as in diffusers; else of the class in the folder's config.

    A class may fail on a folder written by another version of transformers. tokenizer.json alone is then used.
    """
    import transformers  # takes a second, which the start of ComfyUI should not wait for

    kind: Any = getattr(transformers, entry[1], None) if entry and entry[0] == "transformers" else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedTokenizerBase)):
        kind = transformers.AutoTokenizer
    _check_files(folder)
    try:
        return kind.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # classes raise anything; there is no interrupt in here
        if not (folder / "tokenizer.json").is_file():
            raise ValueError(_unreadable(folder, error)) from error
        logging.info("DC-Gen: %s: %s failed (%s); tokenizer.json is read instead", folder, kind.__name__, error)
    try:
        return _plain_tokenizer(folder)
    except Exception as error:  # tokenizers raises no narrower kind
        raise ValueError(_unreadable(folder, error)) from error


def _check_files(folder: Path) -> None:
    """ValueError for a folder without vocabulary, from which transformers 5 makes an empty tokenizer."""
    files = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if not any(name.startswith(("tokenizer.", "vocab.", "spiece.")) for name in files):
        raise ValueError(
            f"{folder} has no tokenizer: found {', '.join(files) or 'nothing'}, expected tokenizer.json. "
            "Download the release again."
        )


def _plain_tokenizer(folder: Path) -> transformers.PreTrainedTokenizerFast:
    """tokenizer.json alone, with the special tokens and the length from tokenizer_config.json."""
    import transformers

    file = folder / "tokenizer_config.json"
    config = read_object(file) if file.is_file() else {}
    names = [f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]
    tokens = {name: config[name] for name in names if config.get(name)}
    settings = {name: token["content"] if isinstance(token, dict) else token for name, token in tokens.items()}
    settings |= {name: config[name] for name in ("model_max_length", "padding_side") if config.get(name)}
    return transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **settings)


def _unreadable(folder: Path, error: Exception) -> str:
    import transformers

    return (
        f"{folder}: transformers {transformers.__version__} cannot read the tokenizer there ({error}). A newer release "
        "may have written it: update transformers in ComfyUI's Python, as ComfyUI's requirements.txt says."
    )


def check_length(tokenizer: Any, folder: Path) -> None:
    """ValueError for a length that prompts cannot be padded to: transformers uses 1e30 when the file has none."""
    if not 1 <= tokenizer.model_max_length <= LONGEST_PROMPT:
        raise ValueError(
            f"{folder}: tokenizer_config.json gives model_max_length {tokenizer.model_max_length:g}, expected 1 to "
            f"{LONGEST_PROMPT}. The file is not the release's; download it again."
        )


class LoadedTokenizer(SDTokenizer):
    """ComfyUI's tokenizer around a loaded one; `limit` truncates the prompt as the release's pipeline does."""

    def __init__(self, tokenizer: Any, limit: int | None, **kwargs: Any):
        class Loaded:
            @staticmethod
            def from_pretrained(_path: str, **_kwargs: Any) -> Any:
                return tokenizer

        super().__init__("", tokenizer_class=Loaded, **kwargs)
        self.limit = limit

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **kwargs: Any) -> list:
        # A truncated prompt may end in half of an emoji (a lone surrogate), which tokenizers reject.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        batches = super().tokenize_with_weights(text, return_word_ids, **kwargs)
        if self.limit is None or len(batches[0]) <= self.limit:
            return batches
        logging.warning(
            "DC-Gen: the prompt has %d tokens; the text encoder reads the first %d", len(batches[0]), self.limit
        )
        end = next(token for token in reversed(batches[0]) if token[0] == self.end_token)
        return [[*batches[0][: self.limit - 1], end]]
