"""Recording of training sets in simulators: behaviours in, a folder of episodes out.

On Tabletop, scripted ones; in other simulators smooth random motion, or a policy (``prophrl record``). An episode is a
pure function of its seed and the mix, so a set can be stopped and resumed, extended, or split over machines. Its images
are rendered from the states that the commands led to; poses are the simulator's ``eef_pose``: the commanded ones on
Tabletop, as the world model sees them, and measured ones elsewhere. An episode of 40 commands on Tabletop costs about
110 ms of CPU time with software rendering.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from prophet_gym.data.episode import Episode
from prophet_gym.data.folder import write_episode
from prophet_gym.errors import nearest
from prophet_gym.sims.expert import BEHAVIOURS, FAILURES, ScriptedExpert, sample_config
from prophet_gym.sims.looks import LOOKS
from prophet_gym.sims.simulator import Simulator
from prophet_gym.sims.tabletop import TabletopSim
from prophet_gym.sims.wander import Wanderer
from prophet_gym.simulators import make_simulator
from prophet_gym.snapshot import SnapshotSet

DEFAULT_MIX: Mapping[str, float] = {
    "expert": 0.35,
    "half_good": 0.25,
    **{behaviour: 0.30 / len(FAILURES) for behaviour in FAILURES},
    "random": 0.10,
}
"""Share of each behaviour: success and failure, so that a world model learns both."""

_BATCH = 8  # episodes per task of a worker


def episode_name(seed: int) -> str:
    """Folder name of the episode with this seed; names sort by seed."""
    return f"episode_{seed:09d}"


def record_episode(sim: TabletopSim, seed: int, *, steps: int = 40, behaviour: str = "expert") -> Episode:
    """Play one scripted episode.

    Args:
        sim: The simulator; it is reset.
        seed: Seed of the scene, the script's parameters and its noise.
        steps: Commands to play; the episode has one image more.
        behaviour: One of ``prophet_gym.sims.expert.BEHAVIOURS``.

    Returns:
        The episode, with labels ``block_px`` and ``distractor_px`` (T+1, 2) pixels, the latter NaN where there is no
        second block, ``block_visible`` (T+1,) pixel count, ``block_pos`` (T+1, 3) metres and ``success`` (T+1,) bool;
        ``Episode.success`` is that of the last image.

    Raises:
        ValueError: Unknown behaviour.
    """
    rng = np.random.default_rng((seed, 1))
    expert = ScriptedExpert(sample_config(behaviour, rng), seed=int(rng.integers(2**31)))
    sim.reset(seed=seed)
    return play(sim, seed, expert.act, steps=steps, behaviour=behaviour)


def play(sim: Any, seed: int, act: Callable[[Any], np.ndarray], *, steps: int, behaviour: str) -> Episode:
    """Play an episode from the simulator's present state.

    Args:
        sim: A :class:`prophet_gym.sims.simulator.Simulator`, at the start of the episode.
        seed: Names the episode.
        act: Gives the next native command (7,).
        steps: Commands to play.
        behaviour: What is acting, for the episode's metadata.

    Returns:
        The episode, with the simulator's labels and ``success`` (T+1,) bool.
    """
    start = sim.get_state()
    commands, rows = [], [_observe(sim)]
    for _ in range(steps):
        commands.append(act(sim))
        sim.step(commands[-1])
        rows.append(_observe(sim))
    metadata = {"behaviour": behaviour, "task": sim.task, "seed": seed, "sim": sim.name}
    if isinstance(sim, TabletopSim) and sim.look.name != "first":  # recordings of earlier versions do not name it
        metadata["look"] = sim.look.name
    columns = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
    frames, poses, gripper = (columns.pop(key) for key in ("frame", "eef_pose", "gripper"))
    return Episode(
        images=frames,
        actions=np.stack(commands),
        action_spec=sim.action_spec,
        instruction=sim.instruction,
        fps=sim.action_spec.control_hz,
        camera=sim.camera,
        eef_pose=poses,
        gripper=gripper,
        success=bool(columns["success"][-1]),
        labels=columns,
        name=episode_name(seed),
        simulator_state=start,
        metadata=metadata,
    )


def record(
    out: str | os.PathLike[str],
    episodes: int,
    seed: int = 0,
    workers: int = 2,
    steps: int = 40,
    mix: Mapping[str, float] = DEFAULT_MIX,
    progress: bool = True,
    look: str = "first",
) -> int:
    """Record scripted episodes with seeds ``seed`` to ``seed + episodes - 1``; those already there are skipped.

    Args:
        out: Folder of the set, made if absent.
        episodes: Size of the complete set.
        seed: Seed of the first episode. Sets are disjoint when their seed ranges are.
        workers: Processes; 0 records in this one.
        steps: Commands per episode.
        mix: Share of each behaviour; the shares are normalised.
        progress: Show a progress bar with the remaining time.
        look: Camera and colours: a key of ``prophet_gym.sims.looks.LOOKS``.

    Returns:
        Number of episodes recorded now.

    Raises:
        ValueError: Counts are out of range, the mix names an unknown behaviour or has no positive share, the look is
            unknown, or the folder holds episodes of another look.
    """
    unknown = sorted(set(mix) - set(BEHAVIOURS))
    if unknown or min(mix.values(), default=0) < 0 or sum(mix.values()) <= 0:
        raise ValueError(
            f"The mix is {dict(mix)}. Give non-negative shares with a positive sum, of behaviours from "
            f"{', '.join(BEHAVIOURS)}."
        )
    if steps < 1:
        raise ValueError(f"record() got steps={steps}; expected at least 1.")
    _require_one_look(Path(out), look)
    simulator = partial(TabletopSim, look=look)
    return record_set(out, episodes, seed, partial(_scripted, steps=steps, mix=dict(mix)), workers, progress, simulator)


def record_set(
    out: str | os.PathLike[str],
    episodes: int,
    seed: int,
    make: Callable[[Any, int], Episode],
    workers: int = 2,
    progress: bool = True,
    simulator: Callable[[], Simulator] = TabletopSim,
) -> int:
    """Write the episodes that ``make`` plays for ``episodes`` seeds from ``seed``; those already there are skipped.

    Args:
        out: Folder of the set, made if absent.
        episodes: Size of the complete set.
        seed: Seed of the first episode.
        make: Maps a simulator and a seed to an episode; it is pickled to the workers.
        workers: Processes; 0 records in this one.
        progress: Show a progress bar with the remaining time.
        simulator: Makes the simulator of a process; it is pickled to the workers.

    Returns:
        Number of episodes recorded now.

    Raises:
        ValueError: Counts are out of range, or the folder holds episodes of another simulator, image size or task.
    """
    if episodes < 1 or workers < 0 or seed < 0:
        raise ValueError(
            f"record got episodes={episodes}, workers={workers}, seed={seed}; expected episodes of at least 1, workers "
            "and seed of at least 0."
        )
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    _require_one_set(folder, simulator)
    missing = [s for s in range(seed, seed + episodes) if not (folder / episode_name(s) / "meta.json").exists()]
    batches = [missing[start : start + _BATCH] for start in range(0, len(missing), _BATCH)]
    quiet = None if progress else True  # None: quiet unless there is a terminal
    with tqdm(total=len(missing), desc=f"recording {folder.name}", unit="episode", disable=quiet) as bar:
        if workers == 0:
            for batch in batches:
                bar.update(_record_batch(folder, batch, make, simulator))
            return len(missing)
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            tasks = [pool.submit(_record_batch, folder, batch, make, simulator) for batch in batches]
            try:
                for task in as_completed(tasks):
                    bar.update(task.result())
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    return len(missing)


def recorded(out: str | os.PathLike[str], made: int, steps: int) -> str:
    """What a person wants to know after a recording: how many episodes are new, how many there are, and what differs.

    Args:
        out: Folder of the set.
        made: Episodes recorded now.
        steps: Commands asked for; episodes that were kept may have another number.
    """
    metas = [path for path in Path(out).glob("*/meta.json") if not path.parent.name.startswith(".")]
    frames = [json.loads(path.read_text(encoding="utf-8")).get("num_frames", steps + 1) for path in metas]
    text, other = f"{made} episodes recorded, {len(metas)} in {out}", sum(count != steps + 1 for count in frames)
    if other:
        text += (
            f"\n{other} of them are not {steps} commands long: episodes that are there stay as they are; give another "
            "folder for a set of one length"
        )
    return text


def record_snapshots(out: str | os.PathLike[str], count: int, seed: int = 0, *, overwrite: bool = False) -> SnapshotSet:
    """Save the first image of ``count`` fresh scenes, with poses, camera and simulator state, as a snapshot set.

    Args:
        out: Folder of the set.
        count: Number of scenes; scene i has seed ``seed + i``, and so shows what episode ``seed + i`` starts from.
        seed: Seed of the first scene.
        overwrite: Replace the set that is there.

    Raises:
        ValueError: Counts are out of range, or the folder holds a set and ``overwrite`` is off.
    """
    if count < 1 or seed < 0:
        raise ValueError(f"record_snapshots() got count={count}, seed={seed}; expected at least 1 and at least 0.")
    sim, snapshots = TabletopSim(), []
    for i in range(seed, seed + count):
        sim.reset(seed=i)
        snapshots.append(sim.snapshot(f"tabletop_{i}"))
    sim.close()
    taken = SnapshotSet(snapshots)
    taken.save(out, overwrite=overwrite)
    return taken


def choose_behaviour(seed: int, mix: Mapping[str, float]) -> str:
    """Behaviour of the episode with this seed: a draw from the mix that depends on nothing else."""
    names = [name for name in BEHAVIOURS if mix.get(name, 0) > 0]
    shares = np.array([mix[name] for name in names])
    return str(np.random.default_rng((seed, 2)).choice(names, p=shares / shares.sum()))


def _observe(sim: Simulator) -> dict[str, np.ndarray]:
    return {
        "frame": sim.render(),
        "eef_pose": sim.eef_pose.copy(),
        "gripper": sim.gripper.copy(),
        **sim.labels(),
        "success": np.asarray(sim.is_success(), bool),
    }


def record_wandering(
    out: str | os.PathLike[str],
    episodes: int,
    seed: int = 0,
    workers: int = 2,
    steps: int = 40,
    *,
    env_id: str,
    progress: bool = True,
    **options: Any,
) -> int:
    """Record smooth random motion in any registered simulator; episodes already there are skipped.

    Args:
        out: Folder of the set, made if absent.
        episodes: Size of the complete set.
        seed: Seed of the first episode.
        workers: Processes; 0 records in this one.
        steps: Commands per episode.
        env_id: A key of ``prophet_gym.simulators.SIMULATORS``.
        progress: Show a progress bar with the remaining time.
        options: Of the simulator, such as ``task`` and ``image_size``.

    Returns:
        Number of episodes recorded now.

    Raises:
        MissingExtraError: The simulator's project is not installed, or lacks assets.
        ValueError: Counts are out of range, an unknown simulator or option, or the folder holds episodes of another
            simulator, image size or task.
    """
    if steps < 1:
        raise ValueError(f"record_wandering() got steps={steps}; expected at least 1.")
    make = partial(_wandering, steps=steps)
    simulator = partial(open_simulator, env_id, **options)
    return record_set(out, episodes, seed, make, workers, progress, simulator)


def open_simulator(env_id: str, **options: Any) -> Simulator:
    """Makes the simulator behind an environment id."""
    env: Any = make_simulator(env_id, **options)
    simulator: Simulator = env.sim
    return simulator


def _wandering(sim: Simulator, seed: int, steps: int) -> Episode:
    sim.reset(seed=seed)
    return play(sim, seed, Wanderer(sim.action_spec, seed).act, steps=steps, behaviour="random")


def _scripted(sim: TabletopSim, seed: int, steps: int, mix: Mapping[str, float]) -> Episode:
    return record_episode(sim, seed, steps=steps, behaviour=choose_behaviour(seed, mix))


def _require_one_look(folder: Path, look: str) -> None:
    if look not in LOOKS:
        raise ValueError(f"look={look!r}: expected one of {sorted(LOOKS)}.{nearest(look, LOOKS)}")
    there = next(folder.glob("episode_*/meta.json"), None)
    found = look if there is None else json.loads(there.read_text())["metadata"].get("look", "first")
    if found != look:
        raise ValueError(
            f"{folder} holds episodes of look={found!r}, expected {look!r}; give each look a folder of its own"
        )


def _require_one_set(folder: Path, simulator: Callable[[], Simulator]) -> None:
    """Episodes that are there are what the simulator makes: its name, its image size, the task that a seed draws."""
    metas = {path.parent.name: json.loads(path.read_text()) for path in sorted(folder.glob("episode_*/meta.json"))}
    if not metas:
        return
    sim = simulator()
    try:
        for name, meta in metas.items():
            found = meta["metadata"].get("sim", sim.name)
            if found != sim.name:
                raise ValueError(
                    f"{folder} holds episodes of {found}, expected {sim.name}; give each simulator a folder of its own"
                )
            size = (meta.get("height", sim.image_size[0]), meta.get("width", sim.image_size[1]))
            if size != tuple(sim.image_size):
                raise ValueError(
                    f"{folder} holds images of {size[0]}x{size[1]} pixels ({name}), expected {sim.image_size[0]}x"
                    f"{sim.image_size[1]}; give each size a folder of its own"
                )
        seeded = [(name, meta["metadata"]) for name, meta in metas.items() if {"seed", "task"} <= set(meta["metadata"])]
        if seeded:  # one is enough: setting a scene takes some simulators seconds
            name, about = seeded[0]
            sim.reset(seed=about["seed"])
            if sim.task != about["task"]:
                raise ValueError(
                    f"{folder} holds episodes of task {about['task']!r} ({name}), expected {sim.task!r}, which this "
                    "recording plays with that seed; give each task, or choice of tasks, a folder of its own"
                )
    finally:
        sim.close()


_worker_sims: dict[str, Simulator] = {}  # one simulator and one OpenGL context per process


def _record_batch(
    folder: Path, seeds: Sequence[int], make: Callable[[Any, int], Episode], simulator: Callable[[], Simulator]
) -> int:
    wanted = repr(simulator)
    if wanted not in _worker_sims:
        for other in _worker_sims.values():
            other.close()
        _worker_sims.clear()
        _worker_sims[wanted] = simulator()
    for seed in seeds:
        episode = make(_worker_sims[wanted], seed)
        write_episode(folder / episode.name, episode)
    return len(seeds)
