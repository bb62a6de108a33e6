"""Safetensors on disk: atomic writes, tensor by tensor, and reads with errors that name the file."""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

# The format's names of dtypes. https://github.com/huggingface/safetensors
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# Dtypes that older PyTorch lacks; the scales of mxfp8 are E8M0.
NEWER = {"F8_E8M0": "float8_e8m0fnu", "U16": "uint16", "U32": "uint32", "U64": "uint64"}
DTYPES |= {name: getattr(torch, dtype) for name, dtype in NEWER.items() if hasattr(torch, dtype)}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
WRITE_BYTES = 64 << 20
SUFFIXES = (".safetensors", ".sft")
IN_USE = (5, 32, 33, 1224)  # of Windows: access denied, sharing violation, lock violation, mapped by a program
REPLACE_PAUSES = (0.1, 0.3, 1.0, 3.0)  # seconds; virus scanners hold a new file for that long
# One-byte floats lack reductions: dtype -> (mask without the sign bit, first pattern that is not finite).
_NARROW = {torch.float8_e4m3fn: (0x7F, 0x7F), torch.float8_e5m2: (0x7F, 0x7C)}
if hasattr(torch, "float8_e8m0fnu"):
    _NARROW[torch.float8_e8m0fnu] = (0xFF, 0xFF)


@dataclass(frozen=True)
class Entry:
    """Name, dtype and shape of a tensor that is not in memory."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def disk_state(path: str | os.PathLike[str]) -> str:
    """Name, size and time of a file, or of all files in a folder; changes when one of them is replaced."""
    path = Path(path)
    paths = sorted(path.rglob("*")) if path.is_dir() else [path]
    states = [(file, file.stat()) for file in paths if file.is_file()]
    return ";".join(f"{file}:{state.st_size}:{state.st_mtime_ns}" for file, state in states)


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Prepend `path` to the message of a ValueError that does not already name it or a file in it."""
    try:
        yield
    except ValueError as error:
        if f"{path}:" in str(error) or f"{Path(path)}{os.sep}" in str(error):
            raise
        raise ValueError(f"{path}: {error}") from error


@contextmanager
def naming_file(path: str | os.PathLike[str]) -> Iterator[None]:
    """Name `path` in an OSError that names no file, as that of a full disk does; its errno stays."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, by name, without hidden ones (macOS leaves `._NAME` files)."""
    return sorted(
        file for file in folder.iterdir() if file.suffix in SUFFIXES and file.is_file() and file.name[0] != "."
    )


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite, by one reduction without a copy."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.dtype in _NARROW:
        mask, limit = _NARROW[tensor.dtype]
        return int((tensor.view(torch.uint8) & mask).max()) < limit
    low, high = tensor.aminmax()  # any NaN makes both NaN
    return math.isfinite(low) and math.isfinite(high)


def check_finite(tensor: Tensor, name: str, path: str | os.PathLike[str]) -> Tensor:
    """The tensor; ValueError, naming file and tensor, when a value is NaN or infinite."""
    if not is_finite(tensor):
        raise ValueError(f"{path}: damaged, or from a diverged training run: values of {name} are NaN or infinite")
    return tensor


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path to write to; it replaces `path` when the block succeeds, and is deleted otherwise."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with naming_file(target):
            temporary.touch()
            mode = temporary.stat().st_mode  # by the user's umask; safetensors makes its files private
            yield temporary
            temporary.chmod(mode)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            replace(temporary, target)
            sync_folder(target.parent)
    except SafetensorError as error:  # safetensors raises this for a full disk
        raise OSError(f"{target} could not be written ({error}); is the disk full?") from error
    finally:
        temporary.unlink(missing_ok=True)


def replace(source: Path, target: Path) -> None:
    """os.replace; on Windows, where a file that a program has open or mapped cannot be replaced, tried for a while."""
    for pause in (*REPLACE_PAUSES, None):
        try:
            os.replace(source, target)
            return
        except OSError as error:
            if getattr(error, "winerror", None) not in IN_USE:
                raise
            if pause is None:
                raise OSError(
                    f"{target} is in use by another program ({error}), such as a ComfyUI that has loaded it: close "
                    "that program, or unload its models, and run the same command"
                ) from error
            time.sleep(pause)


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Flush a folder's entries to disk; otherwise a power failure may undo a rename.

    Windows has no such call, and some network file systems reject it.
    """
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Flush all files in a folder tree to disk, and the entries of its folders."""
    for file in sorted(folder.rglob("*")):
        if file.is_file() and not file.is_symlink():
            with open(file, "rb+") as handle:
                os.fsync(handle.fileno())
        elif file.is_dir():
            sync_folder(file)
    sync_folder(folder)


@contextmanager
def replacing_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """As replacing(), for a folder: an empty one to fill, which replaces an existing folder at `path` at the end."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        with naming_file(target):
            yield temporary
            sync_tree(temporary)
            if target.exists():
                shutil.rmtree(target)
            replace(temporary, target)
            sync_folder(target.parent)
    except SafetensorError as error:  # raised by save_pretrained for a full disk
        raise OSError(f"{target} could not be written ({error}); is the disk full?") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[safe_open]:
    """safe_open on the CPU; FileNotFoundError or ValueError name the file and the remedy."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    try:
        file = safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        hint = _what_it_is(path) or "it is truncated or damaged: download or copy it again"
        if path.suffix not in SUFFIXES:
            hint = "only .safetensors files are read"
        raise ValueError(f"{path}: not a readable safetensors file ({error}); {hint}") from error
    with file:
        yield file


def _what_it_is(path: Path) -> str:
    """What a file is that is often found in place of weights, and the remedy; "" if it is none of these."""
    with open(path, "rb") as file:
        start = file.read(200).lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer: run `git lfs pull` in its repository, or download the file itself"
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page (HTML): download the file itself, for example with `hf download`, signed in if it asks"
    return ""


def entries(file: safe_open) -> list[Entry]:
    """The entries of a file, without reading tensors; ValueError for a dtype that is not in DTYPES."""
    result = []
    for name in file.keys():  # noqa: SIM118
        view = file.get_slice(name)
        if view.get_dtype() not in DTYPES:
            raise ValueError(f"tensor {name} has type {view.get_dtype()}; known are {', '.join(DTYPES)}")
        result.append(Entry(name, DTYPES[view.get_dtype()], tuple(view.get_shape())))
    return result


def meta_tensors(entries: Iterable[Entry]) -> dict[str, Tensor]:
    """Entries as meta tensors, which have shapes but no memory."""
    return {entry.name: torch.empty(entry.shape, dtype=entry.dtype, device="meta") for entry in entries}


def write_stream(
    path: str | os.PathLike[str],
    announced: Iterable[Entry],
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file atomically, with only one tensor in memory at a time.

    announced: all tensors of the file; tensors: the same in any order, each read when it is written. ValueError, and no
    file, when a tensor is missing, repeated, or has another dtype or shape than announced.
    """
    table, start = {}, 0
    # Widest dtypes first, as in safetensors' own writer: every tensor is then aligned.
    for entry in sorted(announced, key=lambda entry: (-entry.dtype.itemsize, entry.name)):
        table[entry.name] = (entry, start)
        start += entry.nbytes
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    for name, (entry, begin) in table.items():
        header[name] = {
            "dtype": DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [begin, begin + entry.nbytes],
        }
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        base = file.tell()
        file.truncate(base + start)
        for name, tensor in tensors:
            if name not in table:
                raise ValueError(f"{path}: tensor {name} was not announced, or came twice")
            entry, begin = table.pop(name)
            if (tensor.dtype, tuple(tensor.shape)) != (entry.dtype, entry.shape):
                raise ValueError(f"{path}: tensor {name} is {tensor.dtype} {tuple(tensor.shape)}, announced {entry}")
            file.seek(base + begin)
            _write(file, tensor)
        if table:
            raise ValueError(f"{path}: {len(table)} announced tensors never came, first {next(iter(table))}")


def _write(file: object, tensor: Tensor) -> None:
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    for start in range(0, flat.numel(), WRITE_BYTES):
        file.write(flat[start : start + WRITE_BYTES].numpy().data)  # type: ignore[attr-defined]
