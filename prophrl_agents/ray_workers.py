"""``RayRollouts``: rollouts from Ray actors, on one machine or many.

Data flow: starts -> tasks of whole groups -> free workers -> batches -> one :class:`RolloutBatch`, groups in the order
of the starts. A rollout depends on its start, its noise and the weights alone, so where it is made does not matter, nor
that it is made again because a worker died. The policy travels through Ray's object store when it has changed.

Needs the extra: ``pip install "prophet-gym[ray]"``. Without ``ray.init()`` before, Ray starts on this machine, or joins
the cluster that its environment variable RAY_ADDRESS names.
"""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from torch import Tensor, nn

from prophrl_agents.batch import RolloutBatch, Start
from prophrl_agents.policies.base import FlowPolicy, SampleMode
from prophrl_agents.ray_crew import Crew
from prophrl_agents.rollout import check_compatible, collect_groups

__all__ = ["RayRollouts"]


class RayRollouts:
    """Collects groups of rollouts with ``num_workers`` actors, each with an environment of its own.

    A worker that dies is replaced and its groups are collected again. Groups that fail for another reason, or whose
    workers keep dying, end the collection with an error that names their starts, and close all workers. Use it as a
    context manager, or call :meth:`close`.

    Args:
        make_env: makes a worker's environment, on the worker; Ray pickles it. On a cluster every machine needs what it
            reads and imports.
        policy: acts; may be changed in place, weights and settings, between two collections.
        num_workers: actors.
        num_cpus_per_worker: CPUs that Ray reserves for each; also the threads of torch.
        num_gpus_per_worker: GPUs that Ray reserves for each. With any, workers move their policy to "cuda";
            environments are placed by ``make_env``.
        groups_per_task: groups that a worker is given at a time; default as many as fit its slots at once.
        max_restarts: workers that may die over the same groups before it is an error.

    Raises:
        MissingExtraError: Ray is not installed.
        ValueError: counts out of range, more than is free in the cluster, or an environment that cannot be made or does
            not fit the policy.
    """

    def __init__(
        self,
        make_env: Callable[[], VectorEnv],
        policy: FlowPolicy,
        *,
        num_workers: int,
        num_cpus_per_worker: float = 1,
        num_gpus_per_worker: float = 0,
        groups_per_task: int | None = None,
        max_restarts: int = 3,
    ) -> None:
        if groups_per_task is not None and groups_per_task < 1:
            raise ValueError(f"groups_per_task is {groups_per_task}, expected at least 1, or None")
        self._policy, self._groups_per_task = policy, groups_per_task
        self._sent: tuple[str, list[Any]] = ("", [])
        device = "cuda" if num_gpus_per_worker else "cpu"
        resources = {"num_cpus": num_cpus_per_worker, "num_gpus": num_gpus_per_worker}
        self._crew = Crew(_RolloutWorker, (make_env, device), num_workers, resources, max_restarts)
        slots = self._run("prepare", [self._send_policy()] * num_workers, lambda task: "a worker's environment")
        self._num_envs = int(slots[0])

    def collect(
        self,
        starts: Sequence[Start],
        group_size: int,
        *,
        noise_seed: int,
        mode: SampleMode = "sde",
        keep_frames: bool = False,
    ) -> RolloutBatch:
        """Does what :func:`prophrl_agents.rollout.collect_groups` does, with these arguments and the same result.

        The same to the bit if tasks fill the slots as the passes of one process would (``group_size`` divides the
        number of slots, as many on both sides) and torch has as many threads; otherwise up to rounding.

        Returns:
            The batch; in ``seconds``, "policy" and "env" are added over the workers, "total" has passed here.

        Raises:
            ValueError: no starts, ``group_size`` below 1, closed workers, or what ``collect_groups`` refuses.
            RuntimeError: another error of environment or policy, or workers that die over the same groups again and
                again.
        """
        if not starts or group_size < 1:
            raise ValueError(f"{len(starts)} starts and group_size {group_size}; expected at least 1 of each")
        began = time.perf_counter()
        size = self._groups_per_task or max(1, self._num_envs // group_size)
        pieces = [list(starts[first : first + size]) for first in range(0, len(starts), size)]
        options = {"noise_seed": noise_seed, "mode": mode, "keep_frames": keep_frames}
        policy = self._send_policy()
        batches: list[RolloutBatch] = self._run(
            "collect",
            [(*policy, piece, group_size, options) for piece in pieces],
            lambda task: "the groups that start at " + ", ".join(_name(start) for start in pieces[task]),
        )
        batch = RolloutBatch.cat(batches)
        return replace(
            batch,
            starts=tuple(starts),
            frames=tuple(np.array(video) for video in batch.frames),  # Ray's arrays are read-only views of its store
            seconds={**batch.seconds, "total": time.perf_counter() - began},
        )

    def close(self) -> None:
        """Ends all workers."""
        self._crew.close()

    def __enter__(self) -> RayRollouts:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _send_policy(self) -> tuple[str, list[Any]]:
        """Puts the policy into the object store if it has changed; returns its digest and its reference."""
        import ray

        digest, packed = _pack(self._policy)
        if digest != self._sent[0]:
            self._sent = digest, [ray.put(packed)]
        return self._sent

    def _run(self, method: str, tasks: Sequence[tuple], what: Callable[[int], str]) -> list[Any]:
        """Runs tasks to their ends; at the first that fails, or when interrupted, closes the workers."""

        def fail(task: int, error: Exception) -> NoReturn:
            cause = getattr(error, "cause", error)  # an error raised on the worker comes wrapped, with its traceback
            kind = ValueError if isinstance(cause, ValueError) else RuntimeError
            raise kind(f"{what(task)}: {type(cause).__name__}: {cause}") from error

        try:
            return self._crew.run(method, tasks, fail)
        except BaseException:
            self.close()
            raise


class _RolloutWorker:
    """The actor of :class:`RayRollouts`: an environment, and the policy as it was last sent."""

    def __init__(self, make_env: Callable[[], VectorEnv], device: str) -> None:
        self.make_env, self.device = make_env, device
        self.env: Any = None
        self.digest = ""

    def prepare(self, digest: str, policy: list[Any]) -> int:
        """Makes the environment and loads the policy, if they are not there; returns the number of slots."""
        import ray

        if self.env is None:
            self.env = self.make_env()
        if digest != self.digest:
            structure, values = ray.get(policy[0])
            self.policy, self.digest = _unpack(structure, values, self.device), digest
        check_compatible(self.env, self.policy)
        return self.env.num_envs

    def collect(
        self, digest: str, policy: list[Any], starts: list[Start], group_size: int, options: dict[str, Any]
    ) -> RolloutBatch:
        self.prepare(digest, policy)
        return collect_groups(self.env, self.policy, starts, group_size, **options)

    def close(self) -> None:
        if self.env is not None:
            self.env.close()


def _pack(policy: FlowPolicy) -> tuple[str, tuple[bytes, list[np.ndarray]]]:
    """Returns a digest, and the policy pickled without its tensors beside the bytes of these, which Ray shares.

    All of it, not its weights alone: settings such as the noise level are not among them.
    """
    from ray import cloudpickle

    tensors = _tensors(policy)
    structure = cloudpickle.dumps(copy.deepcopy(policy, {id(old): _like(old, old.to("meta")) for old in tensors}))
    values = [tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy() for tensor in tensors]
    digest = hashlib.sha256(structure)
    for value in values:
        digest.update(value.data)
    return digest.hexdigest(), (structure, values)


def _unpack(structure: bytes, values: list[np.ndarray], device: str) -> FlowPolicy:
    """Returns the policy that was packed, on ``device``."""
    from ray import cloudpickle

    policy = cloudpickle.loads(structure)
    tensors = _tensors(policy)
    bytes_ = [torch.from_numpy(value.copy()) for value in values]
    real = [data.view(old.dtype).reshape(old.shape).to(device) for old, data in zip(tensors, bytes_, strict=True)]
    return copy.deepcopy(policy, {id(old): _like(old, new) for old, new in zip(tensors, real, strict=True)})


def _tensors(policy: Any) -> list[Tensor]:
    return [*policy.parameters(), *policy.buffers()] if isinstance(policy, nn.Module) else []


def _like(old: Tensor, new: Tensor) -> Tensor:
    """Returns ``new`` as the parameter or buffer that ``old`` is."""
    return nn.Parameter(new.detach(), old.requires_grad) if isinstance(old, nn.Parameter) else new


def _name(start: Start) -> str:
    return f"seed {start.seed}" + ("" if start.snapshot is None else f" (snapshot {start.snapshot.name!r})")
