"""The checks of the convention audit: measured signals in, findings out. Pure functions.

Limits are set so that clean data pass: Tabletop, where commands are exact, and the BridgeData V2 and DROID recordings,
where robots lag, drift and cut corners. `tests/test_audit.py` holds them to both, and to planted faults.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Literal, get_args

import numpy as np

from prophet_gym.actions import Delta, Rotation
from prophet_gym.audit_signals import Signals, correlation, delays_at, explained, joined, latest_delay, moves
from prophet_gym.data.columns import actions_from_poses
from prophet_gym.data.episode import Episode

Level = Literal["fault", "warning", "note"]
AXES = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
_FASTEST, _FASTEST_TURN = 3.0, 10.0  # m/s and rad/s: more is no arm's
_SLOWEST = 1e-4  # m/s: a robot whose commands stay below stands still
_LEAST = (1e-5,) * 3 + (1e-4,) * 3 + (1e-2,)  # standard deviations below which a dimension is not used
_ROWS = 40  # steps below which a statistic says nothing
_LEAST_PREDICTED, _LEAST_SEEN = 0.002, 0.02  # standard deviations of the motion of `Signals` that count as motion


@dataclass(frozen=True)
class Finding:
    """One result of the audit.

    Attributes:
        level: ``"fault"``, ``"warning"`` or ``"note"``.
        check: Which check, e.g. ``"image delay"``.
        message: What was measured, what was expected, and the fix.
    """

    level: Level
    check: str
    message: str


def dimension_names(count: int) -> list[str]:
    """Return the names of the 7N numbers of a command."""
    return [axis if count == 1 else f"{axis} of end-effector {n}" for n in range(count) for axis in AXES]


def check_set(read: list[Episode]) -> list[Finding]:
    """What should be the same, or there, in all episodes."""
    found = []
    rates = sorted({episode.fps for episode in read})
    if len(rates) > 1:
        found.append(
            Finding(
                "warning", "frame rate", f"episodes run at {rates} Hz; one model learns one rate: split or resample"
            )
        )
    specs = {replace(episode.action_spec, control_hz=1.0) for episode in read}
    if len(specs) > 1:
        found.append(Finding("fault", "action spec", f"{len(specs)} action specs in one set; split it by spec"))
    silent = sum(not episode.instruction.strip() for episode in read)
    if silent:
        found.append(Finding("warning", "instruction", f"{silent} of {len(read)} episodes have no instruction"))
    blind = sum(episode.eef_pose is None for episode in read)
    if blind:
        found.append(
            Finding(
                "note", "poses", f"{blind} of {len(read)} episodes have no measured poses: axes are not checked there"
            )
        )
    return found


def check_steps(read: list[Episode], signals: list[Signals]) -> list[Finding]:
    """Frozen images, commands at their bounds, and the zero command that begins some recordings."""
    found = []
    moving = np.concatenate([np.linalg.norm(s.commands[..., :3], axis=-1).max(axis=1) for s in signals])
    same = np.concatenate([s.same_image for s in signals])
    busy = moving > np.median(moving) * 0.5
    frozen = float((same & busy).sum() / max(1, busy.sum()))
    if frozen > 0.02:
        level: Level = "fault" if frozen > 0.2 else "warning"
        found.append(
            Finding(
                level,
                "frozen images",
                f"{frozen:.0%} of the steps with motion repeat the image before; drop them, or check the camera's rate",
            )
        )
    for i, name in enumerate(dimension_names(read[0].action_spec.num_effectors)):
        if i % 7 == 6:
            continue  # a gripper rests at its ends
        column = np.concatenate([np.abs(episode.actions[:, i]) for episode in read])
        top = column.max()
        share = float((column > top * (1 - 1e-4)).mean())
        if top > 0 and share > 0.05 and len(column) >= _ROWS:
            found.append(
                Finding(
                    "warning",
                    "clipped commands",
                    f"{name}: {share:.0%} of the commands are at the largest value, {top:.4g}; the log clips them, and "
                    "the motion that followed was probably larger",
                )
            )
    idle = sum(not np.any(np.abs(episode.canonical_actions[0, :, :6]) > 1e-6) for episode in read)
    if idle > len(read) / 2:
        found.append(Finding("note", "first command", f"{idle} of {len(read)} episodes begin with a zero command"))
    return found


def check_units(read: list[Episode]) -> list[Finding]:
    """Speeds that no arm reaches, or that no task needs."""
    found = []
    speeds, turns = (
        np.concatenate([np.linalg.norm(e.canonical_actions[..., part], axis=-1).max(axis=1) * e.fps for e in read])
        for part in (slice(0, 3), slice(3, 6))
    )
    fast, turn = float(np.percentile(speeds, 95)), float(np.percentile(turns, 95))
    if fast > _FASTEST:
        found.append(
            Finding(
                "fault",
                "units",
                f"5 % of the commands move faster than {fast:.3g} m/s; expected at most {_FASTEST:g}. Millimetres or "
                "normalised numbers? Set position_scale of the action spec",
            )
        )
    elif fast < _SLOWEST:
        found.append(
            Finding(
                "fault",
                "units",
                f"95 % of the commands move slower than {fast:.3g} m/s: the robot stands still. Set position_scale",
            )
        )
    if turn > _FASTEST_TURN:
        found.append(
            Finding(
                "fault",
                "units",
                f"5 % of the commands turn faster than {turn:.3g} rad/s; expected at most {_FASTEST_TURN:g}. Degrees "
                f"for radians? Set rotation_scale={np.pi / 180:.7f}",
            )
        )
    return found


def check_images(
    signals: list[Signals],
) -> tuple[int | None, dict[int, float], np.ndarray | None, list[Finding]]:
    """Whether the image follows the translation commands, and after how many steps."""
    targets = [s.image_motion for s in signals]
    inputs = [s.commands.reshape(len(s.commands), -1) for s in signals]
    shifts = [np.concatenate([c[:, i : i + 3] for i in range(0, c.shape[1], 7)], axis=1) for c in inputs]
    fps = max(s.fps for s in signals)
    delays, latest = delays_at(fps), latest_delay(fps)
    pairs = {delay: joined(targets, shifts, delay, delays) for delay in delays}
    # A delay that leaves few steps of short episodes is not compared: it would win by chance.
    followed = {d: explained(*pair)[0] if len(pair[0]) >= _ROWS else 0.0 for d, pair in pairs.items()}
    rows = min(len(pairs[delay][0]) for delay in range(latest + 1))
    if rows < _ROWS:
        found = [Finding("note", "image delay", f"only {rows} steps; at least {_ROWS} are needed to say anything")]
        return None, followed, None, found
    best = max(followed, key=lambda delay: followed[delay])
    score = followed[best]
    if score < 0.1:
        message = (
            f"commands explain {max(score, 0):.0%} of the image's motion at any delay from {delays[0]} to "
            f"{delays[-1]} steps; expected far more than 10 %. Actions of other episodes, a camera that does not "
            "see the arm, or a wrong order?"
        )
        return None, followed, None, [Finding("fault", "image follows", message)]
    weights = explained(*joined(targets, inputs, best, delays))[1]
    message = f"images follow commands by {best} step(s), {best / fps:.2g} s, which explain {score:.0%} of their motion"
    if not 0 <= best <= latest:
        fix = "move the images earlier" if best > 0 else "move the images later"
        return (
            best,
            followed,
            weights,
            [Finding("fault", "image delay", f"{message}; expected 0 to {latest}. The video is shifted: {fix}")],
        )
    level: Level = "note" if best <= latest / 2 else "warning"
    return best, followed, weights, [Finding(level, "image delay", message)]


def check_calibration(signals: list[Signals]) -> list[Finding]:
    """Whether the end-effector is in front of the camera, and its projection moves the way the image does."""
    having = [s for s in signals if s.predicted is not None]
    if not having:
        return [
            Finding("note", "camera", "no calibrated camera: action frames cannot be drawn, nor axes checked by it")
        ]
    found = []
    if len(having) < len(signals):
        found.append(
            Finding(
                "warning",
                "camera",
                f"{len(signals) - len(having)} of {len(signals)} episodes have no calibrated camera or no poses, hence "
                "no action frames: calibrate them, or train without action frames",
            )
        )
    behind, images = sum(s.behind for s in having), sum(len(s.commands) + 1 for s in having)
    if behind:
        text = f"the gripper projects behind the camera in {behind} of {images} frames"
        if behind > images / 2:
            return [
                *found,
                Finding("fault", "camera", f"{text}; expected none. E may be inverted, or with OpenGL's axes"),
            ]
        found.append(Finding("warning", "camera", f"{text}: action frames show nothing there"))
    pairs = [_projected(having, delay) for delay in range(latest_delay(max(s.fps for s in having)) + 1)]
    if len(pairs[0][0]) < _ROWS:
        return found
    pairs = [pair for pair in pairs if len(pair[0]) >= _ROWS]
    predicted, seen = max(pairs, key=lambda pair: np.abs(correlation(*pair)).sum())
    table = correlation(predicted, seen)
    varies = _clearly(predicted, _LEAST_PREDICTED) & _clearly(seen, _LEAST_SEEN)
    wrong = [i for i in range(2) if table[i, i] < 0.2 and (varies[i] or abs(table[i]).max() > 0.2)]
    text = f"projected motion and image motion correlate by {table[0, 0]:.2f} (right) and {table[1, 1]:.2f} (down)"
    if wrong:
        message = (
            f"{text}; expected clearly positive. Poses' axes, K, E or the image are turned, or the camera is of "
            "another scene"
        )
        return [*found, Finding("fault", "camera", message)]
    return [*found, Finding("note", "camera", text)]


def _clearly(motion: np.ndarray, least: float) -> np.ndarray:
    """Whether motion (R, 2) varies along each axis (2,), and is no mere echo of the motion along the other."""
    spread = motion.std(axis=0)
    return spread > np.maximum(least, spread.max() / 4)


def _projected(signals: list[Signals], delay: int) -> tuple[np.ndarray, np.ndarray]:
    """Predicted motion and the image's motion `delay` steps later, (R, 2) each, where the former is known."""
    predicted = [s.predicted[: max(0, len(s.predicted) - delay)] for s in signals if s.predicted is not None]
    motion, seen = np.concatenate(predicted), np.concatenate([s.image_motion[delay:] for s in signals])
    known = np.isfinite(motion).all(axis=1)
    return motion[known], seen[known]


def check_poses(
    read: list[Episode], signals: list[Signals]
) -> tuple[tuple[list[float], list[float]] | None, list[Finding]]:
    """Per dimension: do measured poses move as commanded, at which sign and scale; and is the frame the right one?"""
    having = [s for s in signals if s.motion is not None]
    if not having or sum(len(s.commands) for s in having) < _ROWS:
        return None, []
    given = [s.commands.reshape(len(s.commands), -1) for s in having]
    moved = [s.motion.reshape(len(s.commands), -1) for s in having if s.motion is not None]
    count = read[0].action_spec.num_effectors
    body = [i for i in range(7 * count) if i % 7 < 6]
    scores, fps = {}, max(s.fps for s in having)
    for delay in range(latest_delay(fps) + 2):
        targets, inputs = joined(moved, given, delay, delays_at(fps))
        if delay and len(targets) < _ROWS:
            break  # a few steps of short episodes correlate by chance
        scores[delay] = np.abs(correlation(inputs[:, body], targets[:, body])).max(axis=1).mean()
    targets, inputs = joined(moved, given, max(scores, key=lambda delay: scores[delay]), delays_at(fps))
    table, names = correlation(inputs, targets), dimension_names(count)
    slopes, own, found = [], [], []
    for i, name in enumerate(names):
        power = float((inputs[:, i] ** 2).sum())
        slope = float((inputs[:, i] * targets[:, i]).sum() / power) if power > 0 else 0.0
        slopes.append(slope)
        own.append(float(table[i, i]))
        if i % 7 == 6 or not moves(inputs[:, i], _LEAST[i % 7]) or not moves(targets[:, i], _LEAST[i % 7] / 100):
            continue
        part = [j for j in body if j // 7 == i // 7 and (j % 7 < 3) == (i % 7 < 3)]
        other = max(part, key=lambda j: abs(table[i, j]))
        if other != i and abs(table[i, other]) > max(0.5, abs(table[i, i]) + 0.2):
            found.append(
                Finding(
                    "fault",
                    "axes",
                    f"commanded {name} moves measured {names[other]} (correlation {table[i, other]:.2f}), not {name} "
                    f"({table[i, i]:.2f}): axes are swapped",
                )
            )
        elif table[i, i] < -0.3:
            found.append(
                Finding(
                    "fault", "sign", f"commanded {name} moves measured {name} backwards ({table[i, i]:.2f}): flip it"
                )
            )
        elif table[i, i] > 0.5 and not 1 / 15 < slope < 15:
            unit = " Degrees for radians? Set rotation_scale." if i % 7 > 2 and 0.3 < slope * 180 / np.pi < 3 else ""
            unit = unit or (" Millimetres for metres? Set position_scale." if 0.3 < slope * 1000 < 3 else "")
            found.append(
                Finding(
                    "fault", "units", f"measured {name} moves {slope:.4g} of what is commanded; expected about 1.{unit}"
                )
            )
    return (slopes, own), found + _check_frame(read)


def _check_frame(read: list[Episode]) -> list[Finding]:
    """Whether another meaning of the deltas, frame or rotation, fits the measured poses much better."""
    spec, errors = read[0].action_spec, {}
    having = [episode for episode in read if episode.eef_pose is not None]
    for delta, rotation in product(get_args(Delta), get_args(Rotation)):
        if delta == "difference" and rotation != "euler_xyz":
            continue
        other, rest = replace(spec, delta=delta, rotation=rotation), []
        for episode in having:
            assert episode.eef_pose is not None and episode.gripper is not None
            moved = other.to_canonical(actions_from_poses(episode.eef_pose, episode.gripper, other))
            rest.append((moved - other.to_canonical(episode.actions))[..., :6].reshape(-1, 6))
        scale = np.maximum(np.concatenate(rest).std(axis=0), 1e-5)  # below: rounding
        errors[delta, rotation] = float(np.mean(np.log(scale)))
    best, own = min(errors, key=lambda meaning: errors[meaning]), errors[spec.delta, spec.rotation]
    # A mean log error lower by 0.7 is half the error. In small turns, most of these meanings are the same.
    if errors[best] < own - 0.7:
        return [
            Finding(
                "fault",
                "frame",
                f"measured poses follow the commands {np.exp(own - errors[best]):.1f} times closer when they are read "
                f"as {best} instead of {(spec.delta, spec.rotation)}: set delta={best[0]!r}, rotation={best[1]!r}",
            )
        ]
    return []


def check_gripper(read: list[Episode], signals: list[Signals]) -> list[Finding]:
    """Polarity: against the measured opening where there is one, else by how episodes begin."""
    found = []
    for n in range(read[0].action_spec.num_effectors):
        where = "" if read[0].action_spec.num_effectors == 1 else f" of end-effector {n}"
        having = [s for s in signals if s.motion is not None]
        commands = np.concatenate([s.commands[:, n, 6] for s in signals])
        if commands.min() < -0.02 or commands.max() > 1.02:
            span = f"{commands.min():.3g} to {commands.max():.3g}"
            found.append(
                Finding("fault", "gripper", f"open ratios{where} span {span}; expected 0 to 1: set gripper of the spec")
            )
        if having:
            given = np.concatenate([s.commands[:, n, 6] for s in having])[:, None]
            opened = np.concatenate([s.motion[:, n, 6] for s in having if s.motion is not None])[:, None]
            score = float(correlation(given, opened)[0, 0])
            if moves(given, 0.05) and moves(opened, 0.05) and len(given) >= _ROWS:
                if score < -0.3:
                    found.append(
                        Finding(
                            "fault",
                            "gripper",
                            f"the measured opening{where} falls when the command rises (correlation {score:.2f}): the "
                            "polarity of the commands, or of the state, is flipped",
                        )
                    )
                continue
        starts = np.array([episode.canonical_actions[0, n, 6] for episode in read])
        if len(read) >= 5 and moves(commands, 0.05) and np.mean(starts < 0.5) > 0.8:
            found.append(
                Finding(
                    "fault",
                    "gripper",
                    f"{np.mean(starts < 0.5):.0%} of the episodes begin with a closed gripper{where}, and no measured "
                    "opening contradicts it; most tasks begin open: the polarity is probably flipped",
                )
            )
    return found
