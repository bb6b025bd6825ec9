"""Safetensors of a network's folder: listed by their headers alone, then read one tensor at a time.

Reads what diffusers' ``save_pretrained`` writes: one file, or shards with an index. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

__all__ = ["StoredTensor", "check_tensors", "list_tensors", "read_tensor"]

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is.

    Attributes:
        file: the safetensors file that holds it.
        shape: its shape.
        dtype: its number format in the words of safetensors, for example "BF16".
    """

    file: Path
    shape: tuple[int, ...]
    dtype: str


def list_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a network's folder by name; reads headers, no weights.

    Args:
        folder: holds ``diffusion_pytorch_model.safetensors``, or shards and their ``.index.json``.

    Raises:
        ValueError: no safetensors (pickles are not read), a missing or damaged file, or an index that contradicts its
            shards.
    """
    index = _read_index(folder)
    found: dict[str, StoredTensor] = {}
    for file in sorted({folder / name for name in index.values()}) if index else [folder / WEIGHTS]:
        with _opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                view = tensors.get_slice(name)
                if name in found:
                    raise ValueError(
                        f"{file}: tensor {name!r} is in {found[name].file.name}, too; save the network again"
                    )
                found[name] = StoredTensor(file, tuple(view.get_shape()), view.get_dtype())
    held = {name: stored.file.name for name, stored in found.items()}
    wrong = sorted(name for name in {*index, *held} if index.get(name) != held.get(name)) if index else []
    if wrong:
        raise ValueError(f"{folder / INDEX}: it contradicts its shards on {_some(wrong)}; download or save it again")
    return found


def check_tensors(stored: Mapping[str, StoredTensor], expected: Mapping[str, tuple[int, ...]], folder: Path) -> None:
    """Raise ValueError unless ``stored`` holds exactly ``expected`` (shape by name), in floating point.

    The message lists the first missing and unexpected tensors and those of another shape, each with its file.
    """
    shared = sorted(stored.keys() & expected.keys())
    groups = {
        "missing": sorted(expected.keys() - stored.keys()),
        "unexpected": [f"{name} in {stored[name].file.name}" for name in sorted(stored.keys() - expected.keys())],
        "of another shape": [
            f"{name} {stored[name].shape} in {stored[name].file.name}, expected {tuple(expected[name])}"
            for name in shared
            if stored[name].shape != tuple(expected[name])
        ],
        "not in floating point": [
            f"{name} {stored[name].dtype} in {stored[name].file.name}, expected one of {', '.join(FLOATS)}"
            for name in shared
            if stored[name].dtype not in FLOATS
        ],
    }
    wrong = [f"{len(names)} {what}: {_some(names)}" for what, names in groups.items() if names]
    if wrong:
        raise ValueError(
            f"{folder}: the weights do not fit the network of its config.json; {'; '.join(wrong)}. "
            "Use the configuration and the weights of one checkpoint, unquantised"
        )


def read_tensor(name: str, stored: StoredTensor, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Return a tensor in memory of its own.

    The file is opened for this tensor alone: pages of an open file stay in the process's resident set, and one that
    stayed open would count as a second copy of the weights by the end.
    """
    with _opened(stored.file) as tensors:
        return torch.empty(stored.shape, dtype=dtype, device=device).copy_(tensors.get_tensor(name))


def _read_index(folder: Path) -> dict[str, str]:
    """File name by tensor name; empty for a single file. The files are there."""
    index, single = folder / INDEX, folder / WEIGHTS
    if index.is_file() and single.is_file():
        raise ValueError(f"{folder}: both {WEIGHTS} and {INDEX}; expected one of them: remove what is out of date")
    if single.is_file():
        return {}
    if not index.is_file():
        pickles = sorted(path.name for path in folder.glob("*") if path.suffix in PICKLES)
        if pickles:
            raise ValueError(
                f"{folder}: only pickled weights ({_some(pickles)}), which can run code when they are opened and are "
                "not read; convert them where you trust them: save_pretrained(..., safe_serialization=True)"
            )
        raise ValueError(f"{folder}: no weights; expected {WEIGHTS}, or shards and {INDEX}")
    try:
        files = json.loads(index.read_text())["weight_map"]
        sound = files and all(isinstance(name, str) and Path(name).name == name for name in files.values())
    except (ValueError, KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise ValueError(f'{index}: expected JSON with "weight_map": names of files in this folder; download it again')
    absent = sorted(name for name in set(files.values()) if not (folder / name).is_file())
    if absent:
        raise ValueError(f"{index}: shards missing beside it: {_some(absent)}; download them")
    return files


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: not a whole safetensors file ({error}); download it again") from error


def _some(names: list[str], count: int = 5) -> str:
    """The first names, and how many are left out."""
    rest = len(names) - count
    return ", ".join(names[:count]) + (f" and {rest} more" if rest > 0 else "")
