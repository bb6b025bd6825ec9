"""Dataset cards: what the numbers and images of a public data set mean, one row each.

A card states facts and says so where there are none: a field is None where neither the paper nor our measurements state
it, and `DatasetCard.unknown` lists those fields. Readers refuse a card that lacks what they need; complete it with
``dataclasses.replace(CARDS["bc_z"], action_spec=...)``.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from prophet_gym.actions import ACTION_SPECS, ActionSpec, Gripper
from prophet_gym.data.columns import StateLayout
from prophet_gym.errors import nearest

Fit = Literal["stretch", "pad_or_crop"]


@dataclass(frozen=True)
class DatasetCard:
    """Conventions of one data set; None means unknown.

    Attributes:
        name: Name of the set.
        action_spec: Meaning of the actions that episodes are read with: frame of the deltas, rotation, gripper, units.
        resolution: (height, width) in pixels that the paper trains at (4.1.1).
        fit: How recorded images come to that size: ``"stretch"`` resizes both axes; ``"pad_or_crop"`` resizes to the
            height, then pads black borders left and right, or crops the middle.
        control_hz: Rows per second where the format does not say.
        action_frames: Whether the paper conditions on action frames, which need calibrated cameras (4.2.1).
        cameras: Names of the cameras in the files, the preferred one first.
        actions_from: ``"commands"``: the logged actions; ``"poses"``: derived from measured poses (paper 3.2.1).
        action_keys: Columns that make a command, joined in this order; empty: the format's usual name.
        state_keys: The same for measured state.
        state: Pose and gripper of each end-effector in the state.
        source: Where these facts come from.
        notes: What else one should know.

    Raises:
        ValueError: If the fields contradict each other.
    """

    name: str
    action_spec: ActionSpec | None = None
    resolution: tuple[int, int] | None = None
    fit: Fit | None = None
    control_hz: float | None = None
    action_frames: bool | None = None
    cameras: tuple[str, ...] | None = None
    actions_from: Literal["commands", "poses"] = "commands"
    action_keys: tuple[str, ...] = ()
    state_keys: tuple[str, ...] = ()
    state: tuple[StateLayout, ...] | None = None
    source: str = ""
    notes: str = ""

    def __post_init__(self) -> None:
        """Check the fields against each other."""
        if self.actions_from not in ("commands", "poses"):
            raise ValueError(f"actions_from is {self.actions_from!r}; expected 'commands' or 'poses'")
        if self.fit not in (None, "stretch", "pad_or_crop"):
            raise ValueError(f"fit is {self.fit!r}; expected 'stretch', 'pad_or_crop' or None")
        if self.state is not None and self.action_spec is not None:
            count = self.action_spec.num_effectors
            if len(self.state) != count:
                raise ValueError(
                    f"card {self.name!r} lays out {len(self.state)} end-effector(s) in the state but its action spec "
                    f"drives {count}; expected one StateLayout for each"
                )

    @property
    def gripper(self) -> Gripper | None:
        """Convention of the gripper in the actions, None where unknown. Read episodes always hold open ratios."""
        return None if self.action_spec is None else self.action_spec.gripper

    @property
    def frame(self) -> Literal["end-effector", "base"] | None:
        """Frame that the motion is expressed in, None where unknown."""
        if self.action_spec is None:
            return None
        return "end-effector" if self.action_spec.delta == "local" else "base"

    @property
    def unknown(self) -> tuple[str, ...]:
        """Names of the fields that no source states."""
        return tuple(field.name for field in fields(self) if getattr(self, field.name) is None)

    def require_action_spec(self) -> ActionSpec:
        """Return the action spec.

        Raises:
            ValueError: If it is unknown.
        """
        if self.action_spec is None:
            raise ValueError(
                f"card {self.name!r} states no action_spec, because no source does. Give it: "
                f"dataclasses.replace(CARDS[{self.name!r}], action_spec=ActionSpec(...))"
            )
        return self.action_spec

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DatasetCard:
        """Build a card from `to_dict`'s result.

        Raises:
            ValueError: If a key is unknown.
        """
        names = [field.name for field in fields(cls)]
        unknown = sorted(set(values) - set(names))
        if unknown:
            raise ValueError(f"card has unknown key(s) {unknown}; expected {names}.{nearest(unknown[0], names)}")
        values = dict(values)
        for key in ("resolution", "cameras", "action_keys", "state_keys"):
            if values.get(key) is not None:
                values[key] = tuple(values[key])
        if values.get("action_spec") is not None:
            values["action_spec"] = ActionSpec.from_dict(values["action_spec"])
        if values.get("state") is not None:
            values["state"] = tuple(StateLayout(**layout) for layout in values["state"])
        return cls(**values)


_PAPER = "ProphRL paper, 4.1.1 and 4.2.1"


def _open_x(name: str) -> DatasetCard:
    """A subset of Open-X: the paper states the image size and the absence of reliable cameras, and nothing else."""
    return DatasetCard(
        name,
        resolution=(240, 320),
        fit="pad_or_crop",
        action_frames=False,
        source=_PAPER,
        notes="Open-X subset, scalar actions only. In the paper's mixture actions are local deltas (3.2.1, Eq. 3) of "
        "unified poses; the conventions of the logged numbers are not stated.",
    )


_CARDS = (
    DatasetCard(
        "agibot",
        action_spec=ACTION_SPECS["agibot"],
        resolution=(240, 320),
        action_frames=True,
        actions_from="poses",
        source=_PAPER + " and 3.2.1",
        notes="Two end-effectors. The rate, the cameras' names and the layout of the state are not stated; the image's "
        "way to 240 x 320 neither. Copies in LeRobot's format are read; their states are often in the columns "
        "observation.state.end.position (left xyz, right xyz), .end.orientation (xyzw each) and .effector.position. "
        "AgiBot World's own layout (proprio_stats.h5 beside videos) is not read: public sources disagree on unit and "
        "polarity of the measured gripper.",
    ),
    DatasetCard(
        "droid",
        action_spec=ACTION_SPECS["droid"],
        resolution=(240, 416),
        action_frames=True,
        cameras=("exterior_1", "exterior_2", "wrist"),
        actions_from="poses",
        state=(StateLayout(closed=1.0, open=0.0),),
        source=_PAPER + "; conventions measured on 19 recordings (forward kinematics)",
        notes="State [xyz, Euler x-y-z, gripper 1 = closed]; actions are derived from it. Samples measured here ran at "
        "4 and 5 Hz; the rate of the original is not stated.",
    ),
    DatasetCard(
        "libero",
        action_spec=ACTION_SPECS["libero"],
        resolution=(256, 256),
        control_hz=20.0,
        action_frames=True,
        cameras=("agentview_rgb", "eye_in_hand_rgb"),
        state=(StateLayout(rotation_kind="axis_angle", gripper=(6, 7), closed=0.0, open=0.04),),
        source=_PAPER + "; LIBERO's own recorder, robosuite 1.4.1",
        notes="OSC_POSE servo commands, -1 opens and +1 closes. Images are stored upside down, and row t was taken "
        "after command t. A Panda finger opens 0.04 m.",
    ),
    DatasetCard(
        "bridge",
        action_spec=ACTION_SPECS["bridge"],
        resolution=(256, 256),
        control_hz=5.0,
        cameras=("image_0", "image_1", "image_2", "image_3"),
        state=(StateLayout(),),
        source=_PAPER + " and 3.2.1; conventions measured on 28 recordings",
        notes="State [xyz, Euler x-y-z, gripper 1 = open]; actions are commanded differences, which the images follow "
        "by 1 to 2 steps (integration drifts 13 mm over 61 mm). Our recordings have no calibration.",
    ),
    *map(
        _open_x,
        (
            "austin_sailor",
            "dlr_wheelchair_shared_control",
            "bc_z",
            "cmu_stretch",
            "stanford_hydra",
            "usc_jaco_play",
            "furniture_bench",
            "nyu_franka_play",
            "rt_1",
        ),
    ),
)
CARDS: dict[str, DatasetCard] = {card.name: card for card in _CARDS}
"""Cards of the data sets of paper 4.1.1, by name."""


def get_card(card: str | DatasetCard) -> DatasetCard:
    """Return a card: by name, from a TOML file, or as given.

    Raises:
        ValueError: If there is no card of this name (a near one is suggested), or as `read_card`.
    """
    if isinstance(card, DatasetCard):
        return card
    if is_card_file(card):
        return read_card(card)
    if card not in CARDS:
        raise ValueError(
            f"no dataset card {card!r}; expected one of {list(CARDS)}, a .toml file or a DatasetCard."
            f"{nearest(card, CARDS)}"
        )
    return CARDS[card]


def is_card_file(card: str) -> bool:
    """Whether a card is given as a file."""
    return card.endswith(".toml")


def read_card(file: str | Path) -> DatasetCard:
    """Read a card from a TOML file with the fields of `DatasetCard`: ``[action_spec]`` and ``[[state]]`` are tables.

    A spec has to state ``delta``, ``rotation`` and ``gripper``; its other fields are `ActionSpec`'s defaults where the
    file says nothing. The name is the file's where it gives none.

    Raises:
        ValueError: If the file is unreadable, a key unknown, or a value of the wrong kind; the message names the file.
    """
    file = Path(file)
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{file}: cannot be read as a card in TOML ({error})") from error
    try:
        for key, value in values.items():
            if key in _KINDS and not isinstance(value, _KINDS[key]):
                raise ValueError(f"{key}={value!r}; expected {_KINDS[key].__name__}")
        spec = values.get("action_spec")
        if spec is not None:
            lacking = [key for key in ("delta", "rotation", "gripper") if key not in spec]
            if lacking:
                raise ValueError(f"[action_spec] lacks {lacking}; conventions are not guessed")
            values["action_spec"] = {**{field.name: field.default for field in fields(ActionSpec)}, **spec}
        return DatasetCard.from_dict({"name": file.stem, **values})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error


_KINDS: dict[str, type] = {
    **{"name": str, "fit": str, "actions_from": str, "source": str, "notes": str, "action_frames": bool},
    **{"resolution": list, "cameras": list, "action_keys": list, "state_keys": list, "state": list},
    "action_spec": dict,
}
