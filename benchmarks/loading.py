"""Memory while a Cosmos-Predict2 checkpoint is loaded: ``python benchmarks/loading.py``.

Writes a sharded checkpoint with random weights through diffusers, then loads it in fresh processes and reads each one's
peak resident set (``VmHWM``: pages of mapped files count; ``ru_maxrss`` would start at the parent's peak). What the
imports alone take is measured the same way and subtracted. The defaults are a backbone of 0.2 B parameters, under a
minute on two cores; ``--num-layers 28 --num-attention-heads 16 --file-dtypes bfloat16 --shard-size 1GB`` is the size of
the 2B model and takes 4 GB of disk for the while.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from diffusers import CosmosTransformer3DModel

from prophet_gym.strict_json import to_json
from prophet_gym.world_model import from_cosmos

Precision = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Config:
    """What is written, and how it is loaded."""

    num_layers: int = 10
    """Blocks of the backbone."""
    num_attention_heads: int = 8
    """Heads of 128 channels."""
    file_dtypes: tuple[Precision, ...] = ("bfloat16", "float32")
    """Number formats of the files."""
    dtype: Precision = "bfloat16"
    """Number format in memory."""
    shard_size: str = "100MB"
    """Largest file."""
    out: Path = Path("runs/bench/loading.json")
    """Result file."""


def write_checkpoint(folder: Path, config: Config, file_dtype: Precision) -> int:
    """Write a backbone of random weights; returns the number of files."""
    torch.set_default_dtype(getattr(torch, file_dtype))
    network = CosmosTransformer3DModel(
        in_channels=17,
        out_channels=16,
        num_attention_heads=config.num_attention_heads,
        num_layers=config.num_layers,
        rope_scale=(1.0, 3.0, 3.0),
        extra_pos_embed_type=None,
    )
    network.save_pretrained(folder, max_shard_size=config.shard_size)
    return len(list(folder.glob("*.safetensors")))


def measure(load: Callable[[], torch.nn.Module] | None) -> dict[str, float]:
    """Load in this process, which is a fresh one; size and peak in bytes."""
    start = time.perf_counter()
    network = load() if load is not None else None
    seconds = time.perf_counter() - start
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    weights = list(network.parameters()) if network is not None else []
    return {
        "parameters": sum(p.numel() for p in weights),
        "size": sum(p.nbytes for p in weights),
        "peak": 1024 * int(status["VmHWM"].split()[0]),
        "seconds": seconds,
    }


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def main(config: Config) -> None:
    """Measure, print, write."""
    dtype = getattr(torch, config.dtype)
    imports = apart(measure, None)["peak"]
    rows: list[dict[str, Any]] = []
    print(f"imports alone: {imports / 1e6:.0f} MB")
    size = f"MB in {config.dtype}"
    print(f"{'files':>16}{'parameters':>16}{size:>16}{'peak MB':>9}{'above imports / size':>22}{'s':>7}")
    for file_dtype in config.file_dtypes:
        with tempfile.TemporaryDirectory() as folder:
            files = apart(write_checkpoint, Path(folder), config, file_dtype)
            loaded = apart(measure, partial(from_cosmos, folder, dtype=dtype))
        row = {"file_dtype": file_dtype, "files": files, **loaded}
        row["ratio"] = (row["peak"] - imports) / row["size"]
        rows.append(row)
        print(
            f"{files:>5} {file_dtype:>10}{row['parameters']:>16,}{row['size'] / 1e6:>16.0f}{row['peak'] / 1e6:>9.0f}"
            f"{row['ratio']:>22.3f}{row['seconds']:>7.1f}"
        )
    config.out.parent.mkdir(parents=True, exist_ok=True)
    config.out.write_text(to_json({"imports": imports, "torch": torch.__version__, "rows": rows}))
    print(f"written to {config.out}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
