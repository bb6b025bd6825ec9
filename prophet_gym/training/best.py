"""The best weights of a run so far, kept as an adapter folder, and the rule that stops it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from ..atomic import atomic_text
from ..strict_json import to_json
from ..world_model.lora import save_adapter
from ..world_model.transformer import ProphetTransformer


class BestAdapter:
    """Keeps the adapter with the lowest error; ``best.json`` names it, so that a killed run finds it again.

    Attributes:
        record: step, error, memory gate and folder name of the best, and the step of the latest evaluation; empty
            before the first.
    """

    def __init__(self, run: Path, patience: int, *, resume: bool) -> None:
        """Go on from ``best.json`` in ``run``, or forget it.

        Args:
            run: run folder.
            patience: steps without a better error after which the run should stop.
            resume: the run continues.
        """
        self.run, self.patience = run, patience
        self.record: dict[str, Any] = json.loads((run / "best.json").read_text()) if resume else {}

    @property
    def folder(self) -> Path:
        """Folder of the best adapter."""
        return self.run / "adapters" / self.record["folder"]

    def offer(self, transformer: ProphetTransformer, step: int, error: float) -> bool:
        """Keep these weights if none were better, and say whether they were kept."""
        if self.record and not error < self.record["error"]:
            self._write({**self.record, "latest": step})
            return False
        name = f"step_{step:06d}"
        save_adapter(transformer, self.run / "adapters" / name, overwrite=True)
        gate = float(transformer.config.memory_gate)
        self._write({"step": step, "error": error, "memory_gate": gate, "folder": name, "latest": step})
        for other in (self.run / "adapters").iterdir():
            if other.name != name:
                shutil.rmtree(other)
        return True

    def exhausted(self) -> bool:
        """Whether the best is ``patience`` steps old."""
        return bool(self.record) and self.record.get("latest", 0) - self.record["step"] >= self.patience

    def _write(self, record: dict[str, Any]) -> None:
        self.record = record
        atomic_text(self.run / "best.json", to_json(record))
