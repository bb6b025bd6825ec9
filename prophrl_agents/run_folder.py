"""The folder of a training run: configuration, metrics, checkpoints, videos. Only the main process writes.

``config.json``, ``metrics.jsonl`` (one line per update), ``tensorboard/``, ``checkpoints/last.pt`` and
``checkpoints/best-N.pt`` (the one that ``last.pt`` names), ``videos/``, ``policy/`` and ``best/``. Checkpoints are
replaced in one step, so that a run killed at any moment can be resumed.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.tracking import TensorBoardTracker

from prophet_gym.data.video import write_video
from prophet_gym.strict_json import to_json
from prophet_gym.training.loop import atomic_save, forget_after, load_checkpoint, prepare_run
from prophrl_agents.batch import RolloutBatch
from prophrl_agents.config import TrainConfig
from prophrl_agents.gradients import processes

__all__ = ["RunFolder"]


class RunFolder:
    """Reads and writes the folder of one run.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.checkpoints, self.metrics = path, path / "checkpoints", path / "metrics.jsonl"
        self.processes = processes()
        self.tensorboard = TensorBoardTracker("tensorboard", path)

    @property
    def policy(self) -> Path:
        """Where the last policy goes, or the running mean up to it."""
        return self.path / "policy"

    @property
    def best(self) -> Path:
        """Where the best policy goes."""
        return self.path / "best"

    @property
    def failed_batch(self) -> Path:
        """Where a mini-batch goes whose loss is not finite."""
        rank = self.processes.process_index
        return self.path / ("failed_batch.safetensors" if rank == 0 else f"failed_batch_{rank}.safetensors")

    def open(self, config: TrainConfig) -> dict[str, Any] | None:
        """Prepares the folder; returns the checkpoint to go on from, None for a new run.

        Raises:
            ValueError: it holds a run and ``resume`` is off, it holds another run or something else, its checkpoint is
                damaged, or there is nothing to resume.
        """
        if self.processes.is_main_process:
            prepare_run(self.path, _settings(config), config.resume)
        self.processes.wait_for_everyone()
        self.tensorboard.start()
        last = self.checkpoints / "last.pt"
        state = load_checkpoint(last) if config.resume and last.exists() else None
        if self.processes.is_main_process and self.metrics.exists():
            forget_after(self.metrics, -1 if state is None else state["progress"]["update"])
        return state

    def require(self, config: TrainConfig) -> None:
        """Requires that the run in the folder, finished or not, has these settings.

        Raises:
            ValueError: it has others, which are named, or there is none.
        """
        prepare_run(self.path, _settings(config), True)

    def log(self, line: dict[str, Any]) -> None:
        """Appends a line to metrics.jsonl and gives its numbers to the trackers."""
        if self.processes.is_main_process:
            with self.metrics.open("a") as stream:
                stream.write(to_json(line, indent=None))
            flat = {**line, **{f"governor/{name}": value for name, value in line.get("governor", {}).items()}}
            numbers = {name: value for name, value in flat.items() if isinstance(value, int | float) and name != "step"}
            self.tensorboard.log(numbers, step=line["step"])

    def close(self) -> None:
        """Closes what :meth:`open` opened; does nothing if it did not get that far."""
        if hasattr(self.tensorboard, "writer"):
            self.tensorboard.finish()

    def save_last(self, state: dict[str, Any], best_update: int) -> None:
        """Writes ``last.pt``, then removes the best checkpoints that it does not name."""
        if self.processes.is_main_process:
            atomic_save(state, self.checkpoints / "last.pt")
            for path in self.checkpoints.glob("best-*.pt"):
                if path != self._best_path(best_update):
                    path.unlink()

    def save_best(self, state: dict[str, Any], update: int) -> None:
        """Writes the checkpoint to roll back to."""
        if self.processes.is_main_process:
            atomic_save(state, self._best_path(update))

    def load_best(self, update: int) -> dict[str, Any]:
        """Returns what :meth:`save_best` wrote.

        Raises:
            ValueError: the file is missing or damaged.
        """
        return load_checkpoint(self._best_path(update))

    def save_videos(self, batch: RolloutBatch, update: int, fps: float) -> None:
        """Writes the rollouts of the highest and the lowest reward, ties broken by the judge's score."""
        if self.processes.is_main_process:
            (self.path / "videos").mkdir(exist_ok=True)
            order = np.lexsort((np.nan_to_num(batch.scores.numpy()), batch.rewards.numpy()))
            order = order[batch.valid.numpy()[order]]
            for name, b in (("good", order[-1]), ("bad", order[0])) if len(order) else ():
                frames = batch.frames[b]
                even = not (frames.shape[1] % 2 or frames.shape[2] % 2)
                path = self.path / "videos" / f"update_{update:04d}_{name}.mp4"
                write_video(path, frames, fps, lossless=not even)

    def read_metrics(self) -> list[dict[str, Any]]:
        """Returns the lines of metrics.jsonl."""
        return [json.loads(line) for line in self.metrics.read_text().splitlines()]

    def _best_path(self, update: int) -> Path:
        return self.checkpoints / f"best-{update}.pt"


def _settings(config: TrainConfig) -> dict[str, Any]:
    return {name: value for name, value in asdict(config).items() if name != "resume"}
