"""Run by test_pretrain.py under torchrun: pretraining as replicas, and as shards that are killed and go on."""

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import PartialState
from torch.distributed.tensor import DTensor

from prophet_gym.training import loop
from prophet_gym.training.pretrain import pretrain
from prophet_gym.training.pretrain_config import PretrainConfig


def mixture_config(folder: Path, processes: int) -> PretrainConfig:
    """The same global batch of four chunks and two micro-batches, however many processes share it."""
    return PretrainConfig(
        mixture=folder / "mixture.toml", vae=folder / "codec" / "vae", run=folder / "run", cache=folder / "cache",
        num_attention_heads=1, num_layers=2, adaln_lora_dim=4, epochs=4.0, batch_size=4 // processes, accumulation=2,
        learning_rate=1e-3, warmup_steps=1, ema_decay=0.9, mixed_precision="no", log_every=1, save_every=2,
    )  # fmt: skip


def note_layout(file: Path) -> None:
    """Write down what the parameters are when the training loop has wrapped them."""
    build = loop.build_optimizers

    def noting(model, config):
        state = PartialState()
        kinds = {"DTensor" if isinstance(p, DTensor) else "Tensor" for p in model.parameters()}
        held = sum((p.to_local() if isinstance(p, DTensor) else p).nbytes for p in model.parameters())
        layout = {"processes": state.num_processes, "kinds": sorted(kinds), "bytes": held}
        file.with_suffix(f".{state.process_index}.json").write_text(json.dumps(layout))
        return build(model, config)

    loop.build_optimizers = noting


def kill_after(step: int) -> None:
    """Die, as by the system's hand, right after the checkpoint of a step is written."""
    save = loop.atomic_save

    def save_and_die(values, path):
        save(values, path)
        if values["step"] == step:
            os.kill(os.getpid(), signal.SIGKILL)

    loop.atomic_save = save_and_die


def main(folder: Path, parallel: str, what: str) -> None:
    if what == "killed":
        kill_after(2)
    note_layout(folder / parallel)
    config = replace(mixture_config(folder, 2), run=folder / parallel, parallel=parallel)
    pretrain(replace(config, resume=what == "resumed"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), *sys.argv[2:])
