"""``RayJudge``: verdicts from Ray actors, each with a copy of a judge.

Needs the extra: ``pip install "prophet-gym[ray]"``. Where Ray runs is said in ``ray_workers.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from prophet_gym.judges.base import Verdict, as_judge, check_rollouts
from prophet_gym.judging import ask_judge
from prophrl_agents.ray_crew import Crew

__all__ = ["RayJudge"]


class RayJudge:
    """A judge whose rollouts are judged by ``num_workers`` copies of it, each an actor.

    A worker that dies is replaced and its rollouts are judged again. Where the judge raises, or keeps killing its
    workers, it abstains with the reason. Use it as a context manager, or call :meth:`close`.

    Args:
        judge: a judge, or any callable that :func:`prophet_gym.judges.as_judge` takes; Ray pickles it.
        num_workers: actors.
        num_cpus_per_worker: CPUs that Ray reserves for each; also the threads of torch.
        num_gpus_per_worker: GPUs that Ray reserves for each; a judge moves itself there.
        max_restarts: workers that may die over the same rollouts before the judge abstains on them.

    Attributes:
        deterministic: False if the judge says so of itself.

    Raises:
        MissingExtraError: Ray is not installed.
        ValueError: no judge, counts out of range, or more than is free in the cluster.
    """

    def __init__(
        self,
        judge: Any,
        num_workers: int,
        *,
        num_cpus_per_worker: float = 1,
        num_gpus_per_worker: float = 0,
        max_restarts: int = 3,
    ) -> None:
        self.deterministic = bool(getattr(judge, "deterministic", True))
        resources = {"num_cpus": num_cpus_per_worker, "num_gpus": num_gpus_per_worker}
        self._crew = Crew(_JudgeWorker, (as_judge(judge),), num_workers, resources, max_restarts)

    def __call__(self, frames: np.ndarray, instruction: str) -> Verdict:
        """Judges one rollout: frames (T, H, W, 3) uint8, snapshot first."""
        return self.judge_batch([frames], [instruction])[0]

    def judge_batch(self, frames: Sequence[np.ndarray], instructions: Sequence[str]) -> list[Verdict]:
        """Judges rollouts, an equal share on each worker.

        Raises:
            ValueError: frames or instructions that are none, or closed workers.
        """
        check_rollouts(frames, instructions)
        size = max(1, math.ceil(len(frames) / self._crew.num_workers))
        pieces = [slice(first, first + size) for first in range(0, len(frames), size)]
        tasks = [(list(frames[piece]), list(instructions[piece])) for piece in pieces]

        def abstain(task: int, error: Exception) -> list[Verdict]:
            return [Verdict.abstain(f"{type(error).__name__}: {error}")] * len(tasks[task][0])

        return sum(self._crew.run("judge", tasks, abstain), [])

    def close(self) -> None:
        """Ends all workers."""
        self._crew.close()

    def __enter__(self) -> RayJudge:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _JudgeWorker:
    """The actor of :class:`RayJudge`."""

    def __init__(self, judge: Any) -> None:
        self.judge_here, self.told = judge, set[str]()

    def judge(self, frames: list[np.ndarray], instructions: list[str]) -> list[Verdict]:
        return ask_judge(self.judge_here, frames, instructions, self.told)

    def close(self) -> None:
        pass
