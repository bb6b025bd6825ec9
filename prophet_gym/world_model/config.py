"""``ProphetConfig``: what ``prophet.json`` holds."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from ..actions import ActionSpec


@dataclass(frozen=True)
class ProphetConfig:
    """What ``prophet.json`` holds beside the networks' own configurations.

    Attributes:
        name: of the checkpoint, for logs and ``info["checkpoint"]``.
        trained_on: one sentence on the data.
        image_size: (H, W) in pixels, multiples of 16.
        history_frames: T_h, frames of the history; a multiple of 4.
        num_inference_steps: default number of denoising steps.
        schedule: "flow" (uniform, shifted) or "karras" (Cosmos-Predict2).
        schedule_shift: shift of the "flow" schedule.
        solver: "euler" or "ab2".
        action_spec: conventions of the commands.
        still_below: change in grey levels up to which a pixel keeps its value of the chunk's start frame
            (:mod:`.still`); 0 shows every pixel as decoded.
    """

    name: str = "untrained"
    trained_on: str = "nothing"
    image_size: tuple[int, int] = (64, 64)
    history_frames: int = 60
    num_inference_steps: int = 4
    schedule: str = "flow"
    schedule_shift: float = 1.0
    solver: str = "euler"
    action_spec: ActionSpec = field(default_factory=ActionSpec)
    still_below: float = 0.0

    def __post_init__(self) -> None:
        if self.history_frames % 4 or self.history_frames < 4:
            raise ValueError(f"history_frames={self.history_frames}: expected a positive multiple of 4")
        if self.schedule not in ("flow", "karras"):
            raise ValueError(f'schedule={self.schedule!r}: expected "flow" or "karras"')
        if self.solver not in ("euler", "ab2"):
            raise ValueError(f'solver={self.solver!r}: expected "euler" or "ab2"')
        if self.num_inference_steps < 1 or self.schedule_shift <= 0:
            raise ValueError(
                f"num_inference_steps={self.num_inference_steps}, schedule_shift={self.schedule_shift}: expected at "
                "least 1 step and a positive shift"
            )
        if not 0 <= self.still_below < 255:
            raise ValueError(f"still_below={self.still_below}: expected 0 to 255 grey levels; 0 keeps nothing still")
        if any(side % 16 for side in self.image_size):
            raise ValueError(f"image_size={self.image_size}: expected multiples of 16 pixels")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "action_spec": self.action_spec.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ProphetConfig:
        """Inverse of :meth:`to_dict`.

        Raises:
            ValueError: an unknown or missing key; conventions are never guessed.
        """
        names = {f.name for f in fields(cls)}
        if set(values) != names:
            raise ValueError(
                f"prophet.json: unknown keys {sorted(set(values) - names)}, missing {sorted(names - set(values))}; "
                "written by another version?"
            )
        spec, size = ActionSpec.from_dict(values["action_spec"]), tuple(values["image_size"])
        return cls(**{**values, "action_spec": spec, "image_size": size})
