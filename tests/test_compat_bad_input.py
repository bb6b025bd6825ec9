"""What users get wrong behind the borrowed interfaces is a ValueError that names what came and what was expected."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from prophet_gym.compat import lerobot, libero, maniskill, sb3, simpler

ID = "Prophet-Tabletop-v0"
NUMBERS = {"simpler": (7,), "maniskill": (2, 7), "libero": (7,), "lerobot": (2, 7), "flat": (28,), "sb3": (2, 28)}
"""Shape of an action in each interface, of two slots where there are several."""


def made(interface: str, checkpoint: Path, env_id: str = ID, **options: Any) -> Any:
    given = {"checkpoint": str(checkpoint), "chunk_length": 4, "horizon": 8, **options}
    slots = given.pop("slots", 2)
    if interface == "simpler":
        return simpler.make("widowx_carrot_on_plate", env_id=env_id, **given)
    if interface == "maniskill":
        return maniskill.make("PutCarrotOnPlateInScene-v1", num_envs=slots, env_id=env_id, **given)
    if interface == "libero":
        return libero.OffScreenRenderEnv("task.bddl", env_id=env_id, **given)
    if interface == "lerobot":
        return lerobot.make_env(slots, env_id=env_id, **given)[env_id][0]
    if interface == "sb3":
        return sb3.make_vec_env(env_id, slots, env_kwargs=given)
    return gymnasium.make(env_id, interface="flat", **given)


@pytest.mark.parametrize("interface", NUMBERS)
def test_actions_of_another_shape_or_without_value(interface: str, tiny_checkpoint: Path) -> None:
    env = made(interface, tiny_checkpoint)
    shape = NUMBERS[interface]
    with pytest.raises(ValueError, match=r"reset\(\)"):
        env.step(np.zeros(shape, np.float32))
    env.reset()
    for wrong in ((*shape[:-1], shape[-1] - 1), (3, *shape), ()):
        with pytest.raises(ValueError, match=r"of shape \(.*expected .*\("):
            env.step(np.zeros(wrong, np.float32))
    with pytest.raises(ValueError, match="finite"):
        env.step(np.full(shape, np.nan, np.float32))
    assert env.step(np.zeros(shape, np.float32))  # nothing of it was executed
    env.close()


@pytest.mark.parametrize("interface", [name for name in NUMBERS if name != "flat"])  # gym.make has an error of its own
def test_worlds_misspelt(interface: str, tiny_checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=r"Did you mean:? ['`]Prophet-Tabletop"):
        made(interface, tiny_checkpoint, env_id="Prophet-Tabletp-v0")


@pytest.mark.parametrize("interface", ["maniskill", "lerobot", "sb3"])
@pytest.mark.parametrize("slots", [0, -1])
def test_no_slots(interface: str, slots: int, tiny_checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=rf"={slots}: expected an integer at least 1"):
        made(interface, tiny_checkpoint, slots=slots)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: simpler.make("widowx_carrot_on_plates"), "Did you mean 'widowx_carrot_on_plate'"),
        (lambda: maniskill.make("PutCarrotOnPlateInScene-v2"), "Did you mean 'PutCarrotOnPlateInScene-v1'"),
        (lambda: libero.OffScreenRenderEnv("libero_spatal/x.bddl"), "Did you mean 'libero_spatial'"),
        (lambda: lerobot.make_env(action_buffer="chunks"), "Did you mean 'chunk'"),
        (lambda: gymnasium.make(ID, interface="simplr"), "Did you mean 'simpler'"),
        (lambda: gymnasium.make_vec("Tabletop-v0", num_envs=0), "num_envs=0"),
    ],
)
def test_names_misspelt(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_sizes_of_zero_are_no_default(tiny_checkpoint: Path) -> None:
    options = {"env_id": ID, "checkpoint": str(tiny_checkpoint)}
    for size in ("camera_heights", "camera_widths"):
        with pytest.raises(ValueError, match=f"{size}=0: expected an integer at least 1"):
            libero.OffScreenRenderEnv("task.bddl", **{size: 0}, **options)


@pytest.mark.parametrize("interface", ["simpler", "maniskill", "libero"])
def test_the_goal_is_known_after_reset(interface: str, tiny_checkpoint: Path) -> None:
    env = made(interface, tiny_checkpoint)

    def goal() -> Any:
        return env.language_instruction if interface == "libero" else env.get_language_instruction()

    with pytest.raises(ValueError, match=r"call reset\(\) first"):
        goal()
    env.reset()
    assert "plate" in str(goal())


@pytest.mark.parametrize("interface", ["lerobot", "simpler", "maniskill"])
def test_reset_options_misspelt(interface: str, tiny_checkpoint: Path) -> None:
    env = made(interface, tiny_checkpoint)
    wrong, meant = {"lerobot": ("snapshot", "snapshots")}.get(interface, ("obj_init_option", "obj_init_options"))
    with pytest.raises(ValueError, match=f"Did you mean '{meant}'"):
        env.reset(options={wrong: []})
