"""Convention audit: do images and poses answer to the commands as the action spec says? Before training, not after.

`audit` reads episodes and returns findings. A fault is something that no clean data set shows: the image ignores the
commands or follows them late, an axis moves another one, the gripper is upside down, units are off, an episode cannot
be read. A warning is legal but worth knowing; a note says what was measured, or what could not be. Without measured
poses only images and plausibility remain: swapped axes cannot be told from another camera then, and the audit says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np

from prophet_gym.audit_checks import (
    Finding,
    Level,
    check_calibration,
    check_gripper,
    check_images,
    check_poses,
    check_set,
    check_steps,
    check_units,
    dimension_names,
)
from prophet_gym.audit_signals import Signals, measure
from prophet_gym.data.episode import Episode


@dataclass(frozen=True)
class AuditReport:
    """What the audit found.

    Attributes:
        episodes: Episodes that could be read.
        findings: All findings, faults first.
        delay: Steps by which images follow commands, None where they do not.
        followed: Share of the image motion that the commands explain, by delay; 0 where too few steps are left.
        response: What each dimension does, by its name: the image's motion right and down per unit, a typical command
            (root mean square), and how measured poses answer (slope and correlation); None where they are unknown.
            Both are empty where the episodes' commands differ in width.
    """

    episodes: int
    findings: tuple[Finding, ...]
    delay: int | None
    followed: dict[int, float]
    response: dict[str, dict[str, Any]]

    @property
    def exit_code(self) -> int:
        """0 without faults, else 1."""
        return int(any(finding.level == "fault" for finding in self.findings))

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return {
            "episodes": self.episodes,
            "delay": self.delay,
            "followed": {str(key): value for key, value in self.followed.items()},
            "response": self.response,
            "findings": [vars(finding) for finding in self.findings],
        }


def audit(episodes: Sequence[Episode], *, limit: int | None = None) -> AuditReport:
    """Check a data set's conventions; every episode is decoded once.

    Args:
        episodes: Any sequence of episodes with one action spec, e.g. from `prophet_gym.data.open_dataset`.
        limit: How many, from the first; all by default.

    Raises:
        ValueError: If there is no episode to read, or none that can be read.
    """
    findings: list[Finding] = []
    read: list[Episode] = []
    signals: list[Signals] = []
    count = len(episodes) if limit is None else min(limit, len(episodes))
    if count < 1:
        raise ValueError(f"{count} episodes to audit; expected at least 1")
    for i in range(count):
        try:
            episode = episodes[i]
            signals.append(measure(episode))
        except ValueError as error:
            findings.append(Finding("fault", "unreadable episode", str(error)))
            continue
        # What is kept of it is small: images and labels go. A view of the images would keep all of them alive.
        pixel = np.zeros((len(episode) + 1, 1, 1, 3), np.uint8)
        read.append(replace(episode, images=pixel, camera=None, labels={}))
    if not read:
        raise ValueError(f"none of {count} episodes can be audited. The first: {findings[0].message}")
    findings += check_set(read)
    if len({episode.action_spec.num_effectors for episode in read}) > 1:  # told above; nothing below can be joined
        return AuditReport(len(read), _sorted(findings), None, {}, {})
    findings += check_steps(read, signals)
    findings += check_units(read)
    delay, followed, weights, found = check_images(signals)
    findings += found
    findings += check_calibration(signals)
    slopes, found = check_poses(read, signals)
    findings += found
    findings += check_gripper(read, signals)
    dimensions = dimension_names(read[0].action_spec.num_effectors)
    commands = np.concatenate([s.commands.reshape(len(s.commands), -1) for s in signals])
    response = {
        name: {
            "image": None if weights is None else [float(value) for value in weights[i]],
            "typical": float(np.sqrt(np.mean(commands[:, i] ** 2))),
            "slope": None if slopes is None else slopes[0][i],
            "correlation": None if slopes is None else slopes[1][i],
        }
        for i, name in enumerate(dimensions)
    }
    return AuditReport(len(read), _sorted(findings), delay, followed, response)


def _sorted(findings: list[Finding]) -> tuple[Finding, ...]:
    """Faults, then warnings, then notes."""
    order = get_args(Level)
    return tuple(sorted(findings, key=lambda finding: order.index(finding.level)))


def format_audit(report: AuditReport) -> str:
    """Return the report as text, faults first."""
    lines = [f"{report.episodes} episodes audited"]
    lines += [f"{finding.level.upper():8}{finding.check}: {finding.message}" for finding in report.findings]
    if not report.exit_code:
        lines.append("no faults found")
    return "\n".join(lines)
