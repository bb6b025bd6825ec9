"""``GRPOTrainer``: collect rollouts, learn from them, log, evaluate, save; again. What these do is elsewhere.

All randomness of update u follows from (seed, u) and all environments are reset with seeds, so a resumed run ends with
the same bits on a CPU. Started by ``torchrun`` or ``accelerate launch``, each of W processes collects a W-th of the
rollouts, and gradients are added up (``gradients.py``).

A governor, if there is one, looks at rollouts before they are learned from: what it finds out is about the weights that
collected them, and these are kept if they are the best so far.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from accelerate.utils import broadcast_object_list
from gymnasium.vector import VectorEnv
from tqdm import tqdm

from prophet_gym.judges.calibration import wilson_interval
from prophet_gym.snapshot import SnapshotSet
from prophrl_agents.batch import RolloutBatch, Start
from prophrl_agents.config import TrainConfig, WorldConfig
from prophrl_agents.environments import make_environment
from prophrl_agents.evaluate import FIRST_SEED, SELECTION_SET, evaluate_policy, evaluate_starts
from prophrl_agents.governor import Governor, GovernorReport, SimulatorReference
from prophrl_agents.gradients import processes, sum_over_processes
from prophrl_agents.learner import Learner, TrainablePolicy
from prophrl_agents.policies.small import SmallFlowPolicy
from prophrl_agents.ray_workers import RayRollouts
from prophrl_agents.rollout import check_compatible, collect_groups
from prophrl_agents.run_folder import RunFolder
from prophrl_agents.update import update_policy

__all__ = ["Collector", "GRPOTrainer", "TrainResult", "run_train"]

Collector = Callable[..., RolloutBatch]
"""Collects as ``collect(starts, group_size, noise_seed=..., keep_frames=...)``, with the policy that learns."""


@dataclass
class _Progress:
    """Counters of a run, part of its checkpoints."""

    update: int = 0  # updates done
    first_evaluation: float | None = None
    best_evaluation: float | None = None
    evaluations_without_best: int = 0
    best_update: int = 0  # by evaluation, or by what the governor found
    successes: float = 0.0  # of the training rollouts since the last evaluation
    judged: float = 0.0
    stopped: str = ""


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        updates: updates done.
        first_evaluation: success rate before any update; None without evaluations.
        best_evaluation: highest success rate of an evaluation; None without.
        best_update: updates done by the policy in ``run/best``, which has the best evaluation, or, with a governor, the
            highest success that it found to be true.
        stopped: why the run ended early; empty if it did not.
    """

    updates: int
    first_evaluation: float | None
    best_evaluation: float | None
    best_update: int
    stopped: str


class GRPOTrainer:
    """Reinforces a policy in any vector environment with action chunks.

    Args:
        config: settings.
        policy: what learns, in place; default the one in ``config.policy``. What is saved is ``learner.result``, which
            with ``config.ema_decay`` is another object.
        env: where rollouts are rewarded, one environment or several; default those of ``config.env``.
        eval_env: where the policy is evaluated, one environment or several; default those of ``config.eval_env``, else
            ``env``.
        governor: compares the judge with a reference and may stop the run or roll it back; default one that replays in
            ``config.governor_env``, if that is given. It then decides, in place of the evaluations, which policy is
            the best.
        collectors: how rollouts are made for each of ``env``, such as ``RayRollouts(make_env, policy, ...).collect``;
            default in this process, or by ``config.ray_workers``. Evaluations are made in this process.

    Raises:
        ValueError: rollouts that cannot be divided among environments and processes, or a policy, an environment or
            collectors that do not fit.
    """

    def __init__(
        self,
        config: TrainConfig,
        policy: TrainablePolicy | None = None,
        env: VectorEnv | Sequence[VectorEnv] | None = None,
        eval_env: VectorEnv | Sequence[VectorEnv] | None = None,
        governor: Governor | None = None,
        collectors: Sequence[Collector] | None = None,
    ) -> None:
        self.config, self.governor, self.processes = config, governor, processes()
        policy = SmallFlowPolicy.from_pretrained(config.policy) if policy is None else policy
        self.learner = Learner.build(policy, config, self.processes.device)
        self._own: list[VectorEnv | RayRollouts] = []
        self.envs = self._environments(env, config.env)
        self.eval_envs = self._environments(eval_env, config.eval_env) or self.envs
        self.snapshots = [None if config.snapshots is None else SnapshotSet.load(config.snapshots)] * len(self.envs)
        for environment in {*self.envs, *self.eval_envs}:
            check_compatible(environment, policy)
        self._check_division()
        if config.ray_workers and (env is not None or collectors is not None):
            raise ValueError(
                f"ray_workers={config.ray_workers} makes environments from the ids in config.env, but env or "
                "collectors are given; set ray_workers=0, give collectors=[RayRollouts(make_env, policy, ...).collect]"
            )
        self.collectors = self._collectors() if collectors is None else list(collectors)
        if len(self.collectors) != len(self.envs):
            raise ValueError(f"{len(self.collectors)} collectors for {len(self.envs)} environments; expected one each")
        if self.governor is None and config.governor_env is not None:
            self.governor = Governor(SimulatorReference(self._simulator(config.governor_env)), config.governor)
        if config.snapshots is None and self.governor is not None:  # whoever replays a rollout must know where it began
            found = [getattr(env.unwrapped, "snapshots", None) for env in self.envs]
            self.snapshots = [SnapshotSet(snapshots) if snapshots else None for snapshots in found]
        if self.governor is not None and isinstance(self.governor.reference, SimulatorReference):
            self.governor.reference.require([one for snapshots in self.snapshots for one in snapshots or ()])
        self.folder = RunFolder(config.run)
        self.progress = _Progress()
        self._unjudged = 0  # updates in a row without a verdict

    def train(self) -> TrainResult:
        """Runs all updates, or goes on from the last checkpoint, and writes ``config.run``.

        Interrupted at any moment, or ended by an error, it can be resumed from the last checkpoint.

        Raises:
            ValueError: the run folder holds another run, or rollouts cannot be collected; or no rollout was judged in
                the first update, in two in a row, or in any evaluation so far.
            FloatingPointError: a loss or gradient is not finite; its mini-batch and the last checkpoint are saved.
        """
        try:
            self._open()
            progress, total, hidden = self.progress, self.config.updates, not self.processes.is_main_process
            with tqdm(total=total, initial=progress.update, desc="updates", disable=hidden) as bar:
                while progress.update < total and not progress.stopped:
                    line = self._one_update()
                    shown = [name for name in ("reward_mean", "success_rate", "eval_success_rate") if name in line]
                    bar.set_postfix({name: f"{line[name]:.2f}" for name in shown})
                    bar.update()
            self._save_policy("policy", self.learner.result)
        finally:
            self.folder.close()
            for environment in self._own:
                environment.close()
        return TrainResult(
            progress.update,
            progress.first_evaluation,
            progress.best_evaluation,
            progress.best_update,
            progress.stopped,
        )

    def starts(self, update: int) -> list[list[Start]]:
        """Returns where this process begins the groups of an update, by environment."""
        rng = np.random.default_rng([self.config.seed, update])
        count = self.config.rollouts_per_update // self.config.group_size
        seeds = rng.integers(FIRST_SEED, size=count)  # evaluations begin there
        sets = [self.snapshots[i // self.processes.num_processes % len(self.envs)] for i in range(count)]
        snapshots = [None if one is None else one.sample(rng) for one in sets]
        starts = [Start(int(seed), snapshot) for seed, snapshot in zip(seeds, snapshots, strict=True)]
        mine = starts[self.processes.process_index :: self.processes.num_processes]
        return [mine[i :: len(self.envs)] for i in range(len(self.envs))]

    def _open(self) -> None:
        state = self.folder.open(self.config)
        if state is not None:
            self.learner.load_state_dict(state["learner"])
            self.progress = _Progress(**state["progress"])
            if self.governor is not None and "governor" in state:
                self.governor.load_state_dict(state["governor"])
            return
        self.folder.save_best(self.learner.state_dict(), 0)
        if self.config.eval_every:
            self.folder.log({"step": 0, **self._evaluate()})
        self._save_last()

    def _one_update(self) -> dict[str, Any]:
        config, progress, update = self.config, self.progress, self.progress.update
        batch, line = self._collect(update)
        (judged,) = sum_over_processes([float(batch.valid.sum())])
        self._unjudged = 0 if judged else self._unjudged + 1  # a small update may abstain as a whole by chance
        if self._unjudged > 1 or (self._unjudged and update == 0):
            raise ValueError(_no_verdict(f"update {update}", batch))
        report = self._govern(batch, update)
        if report is not None:
            line["governor"] = report.to_dict()
        if report is None or report.action in ("continue", "warn"):
            line |= update_policy(self.learner, batch, config, update, failed_batch=self.folder.failed_batch)
            self.learner.note_update()
            judged = line["valid_share"] * config.rollouts_per_update
            progress.judged += judged
            progress.successes += judged * line.get("success_rate", 0.0)
        progress.update += 1
        last = progress.update == config.updates
        if config.eval_every and (progress.update % config.eval_every == 0 or last) and not progress.stopped:
            line |= self._evaluate()
        line = {"step": progress.update, **line}
        self.folder.log(line)
        if progress.update % config.save_every == 0 or last or progress.stopped:
            self._save_last()
        return line

    def _collect(self, update: int) -> tuple[RolloutBatch, dict[str, Any]]:
        config, began = self.config, time.perf_counter()
        film = config.videos_every > 0 and update % config.videos_every == 0
        govern = self.governor is not None and self.governor.due(update) and self.governor.needs_frames
        batches = [
            collect(starts, config.group_size, noise_seed=config.seed, keep_frames=film or govern)
            for collect, starts in zip(self.collectors, self.starts(update), strict=True)
        ]
        batch = RolloutBatch.cat(batches)
        seconds = time.perf_counter() - began
        if film:
            self.folder.save_videos(batch, update, float(self.envs[0].metadata.get("render_fps", 10)))
        everywhere = self.processes.num_processes
        return batch, {
            "seconds_collect": seconds,
            "seconds_policy": batch.seconds["policy"],
            "seconds_env": batch.seconds["env"],
            "rollouts_per_second": everywhere * len(batch) / seconds,
            "frames_per_second": everywhere * int(batch.mask.sum()) / seconds,
        }

    def _govern(self, batch: RolloutBatch, update: int) -> GovernorReport | None:
        """Asks the governor, when it is due, about rollouts of the present weights, and obeys."""
        if self.governor is None or not self.governor.due(update):
            return None
        reports = [self.governor.check(batch, update) if self.processes.is_main_process else None]
        report: GovernorReport = broadcast_object_list(reports)[0]
        if report.best:
            self._note_best()
        if report.action != "continue" and self.processes.is_main_process:
            tqdm.write(f"update {update}: governor says {report.action}: {report.reason}")
        if report.action == "rollback":
            self.processes.wait_for_everyone()
            self.learner.load_state_dict(self.folder.load_best(self.progress.best_update))
        elif report.action == "stop":
            self.progress.stopped = f"governor: {report.reason}"
        return report

    def _evaluate(self) -> dict[str, float]:
        """Evaluates, notes a new best, and decides about stopping."""
        began, progress = time.perf_counter(), self.progress
        starts = evaluate_starts(self.config.eval_starts, SELECTION_SET)
        mine = list(enumerate(starts))[self.processes.process_index :: self.processes.num_processes]
        snapshots = self.snapshots if self.eval_envs == self.envs else [None] * len(self.eval_envs)
        places = [
            (env, [start if own is None else replace(start, snapshot=own[i % len(own)]) for i, start in mine])
            for env, own in zip(self.eval_envs, snapshots, strict=True)
        ]
        hits = count = 0.0
        for env, here in places if mine else ():
            evaluation = evaluate_policy(self.learner.result, env, here)
            hits, count = hits + float(evaluation.success.sum()), count + float(evaluation.valid.sum())
        hits, count = sum_over_processes([hits, count])
        if not count and progress.best_evaluation is None:
            ask = partial(collect_groups, policy=self.learner.result, group_size=1, noise_seed=0, mode="ode")
            again = [ask(env, starts=here[:1]) for env, here in places if here]
            raise ValueError(_no_verdict(f"evaluation after {progress.update} updates", *again))
        rate = hits / count if count else math.nan
        low, high = wilson_interval(int(hits), int(count))
        if progress.first_evaluation is None:
            progress.first_evaluation = rate
        progress.evaluations_without_best += 1
        if count and (progress.best_evaluation is None or rate > progress.best_evaluation):
            progress.best_evaluation, progress.evaluations_without_best = rate, 0
            if self.governor is None:
                self._note_best()
        self._consider_stopping()
        progress.successes = progress.judged = 0.0
        return {
            "eval_success_rate": rate,
            "eval_success_low": low,
            "eval_success_high": high,
            "seconds_evaluate": time.perf_counter() - began,
        }

    def _consider_stopping(self) -> None:
        config, progress = self.config, self.progress
        reached = progress.successes / progress.judged if progress.judged else 0.0
        if config.stop_at_success is not None and reached >= config.stop_at_success:
            progress.stopped = f"{reached:.0%} of the training rollouts succeed"
        elif config.patience and progress.evaluations_without_best >= config.patience:
            progress.stopped = f"no better evaluation in the last {config.patience}"

    def _note_best(self) -> None:
        self.progress.best_update = self.progress.update
        self.folder.save_best(self.learner.state_dict(), self.progress.update)
        judged = self.learner.result if self.governor is None else self.learner.policy  # who made the replayed rollouts
        self._save_policy("best", judged)

    def _save_policy(self, name: str, policy: TrainablePolicy) -> None:
        if self.processes.is_main_process:
            policy.save_pretrained(self.config.run / name)

    def _save_last(self) -> None:
        state = {"learner": self.learner.state_dict(), "progress": asdict(self.progress)}
        if self.governor is not None:
            state["governor"] = self.governor.state_dict()
        self.folder.save_last(state, self.progress.best_update)

    def _environments(
        self, given: VectorEnv | Sequence[VectorEnv] | None, ids: Sequence[str], world: WorldConfig | None = None
    ) -> list[VectorEnv]:
        if given is not None:
            return list(given) if isinstance(given, Sequence) else [given]
        make = self._make_environment(str(self.processes.device), world)
        made = [make(name) for name in ids]
        self._own += made
        return made

    def _simulator(self, name: str) -> VectorEnv:
        """The governor's simulator: it looks as long as the world, whose commands it plays again."""
        world = self.config.world
        horizon = world.horizon or getattr(self.envs[0].unwrapped, "horizon", None)
        (env,) = self._environments(None, [name], replace(world, horizon=horizon))
        check_compatible(env, self.learner.policy)
        return env

    def _make_environment(self, device: str, world: WorldConfig | None = None) -> Callable[[str], VectorEnv]:
        policy = self.learner.policy
        return partial(
            make_environment,
            world=self.config.world if world is None else world,
            chunk_length=policy.chunk_length,
            image_size=policy.config.image_size if isinstance(policy, SmallFlowPolicy) else None,
            device=device,
        )

    def _collectors(self) -> list[Collector]:
        config, policy, kind = self.config, self.learner.policy, self.processes.device.type
        if not config.ray_workers:
            return [partial(collect_groups, env, policy) for env in self.envs]
        make = self._make_environment(kind)
        gpus = 1 if kind == "cuda" else 0
        crews = [
            RayRollouts(partial(make, name), policy, num_workers=config.ray_workers, num_gpus_per_worker=gpus)
            for name in config.env
        ]
        self._own += crews
        return [crew.collect for crew in crews]

    def _check_division(self) -> None:
        config, processes = self.config, self.processes.num_processes
        if not self.envs:
            raise ValueError("env is empty; expected one environment or several")
        unit = config.group_size * len(self.envs) * processes
        if config.rollouts_per_update % unit or config.mini_batch % (config.group_size * processes):
            raise ValueError(
                f"rollouts_per_update {config.rollouts_per_update} and mini_batch {config.mini_batch} do not divide "
                f"into groups of {config.group_size} for {len(self.envs)} environments and {processes} processes; "
                f"expected multiples of {unit} and {config.group_size * processes}"
            )


def _no_verdict(what: str, *batches: RolloutBatch) -> str:
    """What to say where no rollout was judged; ``batches`` hold some of them."""
    reasons = Counter(reason for batch in batches for reason in batch.reasons if reason)
    said = f" ({reasons.most_common(1)[0][0]})" if reasons else ""
    return (
        f"{what}: no rollout was judged{said}, so nothing can be learned; expected verdicts. Give the environment a "
        "judge that answers (judge=..., --world.judge FOLDER; prophet_gym.check_judge tries it). The last checkpoint "
        "is kept: resume=True goes on from there"
    )


def run_train(config: TrainConfig) -> str:
    """Trains (``prophrl train``) and returns a summary for people."""
    result = GRPOTrainer(config).train()
    lines = [f"{result.updates} updates" + (f", stopped: {result.stopped}" if result.stopped else "")]
    if result.first_evaluation is not None and result.best_evaluation is not None:
        before, best = result.first_evaluation, result.best_evaluation
        lines.append(f"success in evaluations: {before:.1%} before any update, {best:.1%} at the best")
    if config.governor_env is not None or result.best_evaluation is not None:
        said = "best policy" if config.governor_env is None else "best policy that the governor saw act"
        lines.append(f"{said}: {config.run / 'best'}, after update {result.best_update}")
    kind = "running mean of the weights" if config.ema_decay else "last policy"
    lines.append(f"{kind}: {config.run / 'policy'}")
    return "\n".join(lines)
