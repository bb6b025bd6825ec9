"""``Crew``: Ray actors that share out tasks, whoever is free first; the dead are replaced, their tasks done again."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any

from prophet_gym.errors import MissingExtraError

__all__ = ["Crew"]

_GRACE = 5.0  # seconds that actors have to close what they opened
_PATIENCE = 30.0  # seconds until Ray must have noticed that earlier actors are gone


class Crew:
    """Actors of one kind that share out tasks.

    Args:
        kind: class of the actors; has ``close``.
        arguments: of the class.
        num_workers: actors.
        resources: of each, as ``ray.remote`` takes them.
        max_restarts: actors that may die over one task.

    Attributes:
        num_workers: actors.

    Raises:
        MissingExtraError: Ray is not installed.
        ValueError: counts out of range, or more than is free in the cluster.
    """

    def __init__(
        self, kind: type, arguments: tuple, num_workers: int, resources: dict[str, float], max_restarts: int
    ) -> None:
        if num_workers < 1 or max_restarts < 0:
            raise ValueError(f"num_workers is {num_workers} and max_restarts {max_restarts}; expected at least 1 and 0")
        try:
            import ray
        except ImportError as error:
            raise MissingExtraError('Ray is not installed: pip install "prophet-gym[ray]"') from error
        if not ray.is_initialized():
            ray.init()
        _require(resources, num_workers)
        actor_class, shared = ray.remote(**resources)(kind), [ray.put(argument) for argument in arguments]
        self._start = lambda: actor_class.remote(*shared)
        self.num_workers, self._max_restarts = num_workers, max_restarts
        self._actors: list[Any] = [self._start() for _ in range(num_workers)]

    def run(self, method: str, tasks: Sequence[tuple], failed: Callable[[int, Exception], Any]) -> list[Any]:
        """Calls ``method`` of the actors with the arguments of every task; each is given to the first that is free.

        Args:
            method: of the actors.
            tasks: arguments of each call.
            failed: gives the result of a task, from its index and error, that raised on its actor or whose actors died
                more than ``max_restarts`` times. If it raises, :meth:`close` must follow.

        Returns:
            The results in the order of the tasks.
        """
        import ray
        from ray.exceptions import RayError, RayTaskError

        if not self._actors:
            raise ValueError("the workers are closed; make new ones")
        results: dict[int, Any] = {}
        deaths: Counter[int] = Counter()
        todo, free, running = deque(range(len(tasks))), deque(range(self.num_workers)), {}
        while len(results) < len(tasks):
            while todo and free:
                place, task = free.popleft(), todo.popleft()
                self._actors[place] = self._actors[place] or self._start()
                running[getattr(self._actors[place], method).remote(*tasks[task])] = place, task
            (answer, *_), _ = ray.wait(list(running))
            place, task = running.pop(answer)
            try:
                results[task] = ray.get(answer)
            except RayTaskError as error:
                results[task] = failed(task, error)
            except RayError as error:  # the actor or its machine is gone, or its answer is
                ray.kill(self._actors[place])
                self._actors[place] = None  # a new one is made when it has something to do
                deaths[task] += 1
                if deaths[task] > self._max_restarts:
                    results[task] = failed(task, _worn_out(deaths[task], error))
                else:
                    todo.appendleft(task)
            free.append(place)
        return [results[task] for task in range(len(tasks))]

    def close(self) -> None:
        """Lets actors close, for a while, and ends them."""
        import ray

        actors, self._actors = [actor for actor in self._actors if actor is not None], []
        if actors and ray.is_initialized():
            ray.wait([actor.close.remote() for actor in actors], num_returns=len(actors), timeout=_GRACE)
            for actor in actors:
                ray.kill(actor)


def _require(resources: dict[str, float], num_workers: int) -> None:
    """Requires that the cluster can hold the actors: Ray would wait for more machines, in silence."""
    import ray

    deadline = time.monotonic() + _PATIENCE
    for name, each in (("CPU", resources["num_cpus"]), ("GPU", resources["num_gpus"])):
        needed = each * num_workers
        present = ray.cluster_resources().get(name, 0.0)
        while (free := ray.available_resources().get(name, 0.0)) < needed:
            if needed > present or time.monotonic() > deadline:
                raise ValueError(
                    f"{num_workers} workers with {each:g} {name} each need {needed:g}, the Ray cluster has {present:g} "
                    f"and {free:g} free; take fewer workers, give each less, or add machines with 'ray start'"
                )
            time.sleep(0.1)


def _worn_out(deaths: int, last: Exception) -> RuntimeError:
    return RuntimeError(
        f"workers that died over this: {deaths}, the last with: {last}. Most often memory is short: take fewer slots "
        "per environment, fewer workers, or fewer groups per task; otherwise see the logs of Ray's workers"
    )
