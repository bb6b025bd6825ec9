"""``make demo``: a policy that succeeds sometimes gets better inside Prophet, and proves it in the simulator.

First Prophet imagines what the simulator then shows (:mod:`prophet_gym.demo`). Then the packaged imitation policy is
reinforced in Prophet alone, with the judge's reward, and measured in the simulator before and after: same scenes, same
noise. The governor replays some rollouts in the simulator, for the curve of what was true; it changes nothing. All of
it ends in one page, ``report.html``.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path

from prophet_gym.demo import DemoConfig as WorldDemoConfig
from prophet_gym.demo import run_demo as run_world_demo
from prophet_gym.devices import fast_dtype
from prophrl_agents.config import TABLETOP, TrainConfig, WorldConfig
from prophrl_agents.demo_report import DemoResult, write_report
from prophrl_agents.environments import make_environment
from prophrl_agents.evaluate import Evaluation, compare, evaluate_policy, evaluate_starts
from prophrl_agents.evaluation_report import write_grid, write_json
from prophrl_agents.governor import GovernorRules
from prophrl_agents.policies.small import SmallFlowPolicy
from prophrl_agents.run_folder import RunFolder
from prophrl_agents.trainer import GRPOTrainer

__all__ = ["DemoConfig", "run_demo"]

SIMULATOR, _SHOWN = "Tabletop-v0", 12  # scenes in the videos


@dataclass(frozen=True)
class DemoConfig:
    """Size and place of the demonstration."""

    out: Path = Path("runs/demo")
    """Folder of the results. An interrupted demonstration goes on, a finished one is made anew."""
    policy: str = "tabletop-sft"
    """The imitation policy: packaged name or folder."""
    checkpoint: str | None = None
    """Folder of the world model; the packaged one by default."""
    updates: int = 24
    """Updates."""
    rollouts: int = TABLETOP.rollouts_per_update
    """Imagined rollouts of each update."""
    starts: int = 200
    """Simulated scenes of each evaluation."""
    imagined: int = 24
    """Episodes imagined beside the simulator in the first part."""
    seed: int = 0
    """Of everything drawn."""

    def __post_init__(self) -> None:
        """Checks the counts."""
        for name, least in (("updates", 1), ("starts", 1), ("imagined", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least {least}")


def run_demo(config: DemoConfig) -> str:
    """Runs the demonstration, writes ``report.html`` and returns the summary.

    Raises:
        MissingCheckpointError: no weights under that name.
        RenderingUnavailableError: no OpenGL that renders without a screen; the message holds the line to run.
        ValueError: no policy under that name.
    """
    began, train = time.perf_counter(), config.out / "train"
    _training(config, train)  # settings that do not fit are refused before anything is made
    policies = {"before": SmallFlowPolicy.from_pretrained(config.policy)}
    if (config.out / "report.html").exists():
        (config.out / "report.html").unlink()
        shutil.rmtree(train, ignore_errors=True)
    world_demo = WorldDemoConfig(config.out, config.imagined, config.checkpoint or "tabletop", config.seed)
    world_summary = run_world_demo(world_demo)
    print(world_summary, flush=True)
    print(
        f"\nreinforcing {config.policy} inside Prophet: {config.updates} updates of {config.rollouts} rollouts",
        flush=True,
    )
    GRPOTrainer(_training(config, train)).train()
    policies["after"] = SmallFlowPolicy.from_pretrained(train / "policy")
    evaluations = _evaluate(policies, config)
    comparison = compare(evaluations["before"], evaluations["after"])
    result = DemoResult(
        config=config,
        evaluations=evaluations,
        comparison=comparison,
        metrics=RunFolder(train).read_metrics(),
        world_summary=world_summary,
        seconds=time.perf_counter() - began,
    )
    figures = {
        "evaluations": {name: evaluation.to_dict() for name, evaluation in evaluations.items()},
        "comparison": comparison.to_dict(),
        "seconds": result.seconds,
    }
    write_json(figures, config.out / "reinforcement.json")
    return write_report(result)


def _training(config: DemoConfig, run: Path) -> TrainConfig:
    return replace(
        TABLETOP,
        policy=Path(config.policy),
        run=run,
        resume=(run / "checkpoints").exists(),
        seed=config.seed,
        updates=config.updates,
        ema_decay=0.0,  # so short a run is all ascent: a running mean would lag behind its last weights
        rollouts_per_update=config.rollouts,
        mini_batch=min(TABLETOP.mini_batch, config.rollouts),
        world=WorldConfig(checkpoint=config.checkpoint, dtype=fast_dtype("cpu")),
        eval_env=(),
        eval_every=0,
        videos_every=0,
        governor_env=SIMULATOR,
        governor=GovernorRules(every=6, rollouts=64, reaction="warn"),
    )


def _evaluate(policies: dict[str, SmallFlowPolicy], config: DemoConfig) -> dict[str, Evaluation]:
    """Plays the same scenes with every policy in the simulator, and films some."""
    env = make_environment(
        SIMULATOR, WorldConfig(num_envs=min(50, config.starts)), chunk_length=policies["before"].chunk_length
    )
    starts, evaluations = evaluate_starts(config.starts, config.seed), {}
    for name, policy in policies.items():
        print(f"measuring the policy in {SIMULATOR} on {config.starts} scenes: {name}", flush=True)
        evaluation = evaluate_policy(policy, env, starts, keep_frames=_SHOWN)
        write_grid(
            evaluation.frames[:_SHOWN],
            config.out / f"{name}.mp4",
            success=evaluation.success[:_SHOWN],
            columns=4,
        )
        evaluations[name] = replace(evaluation, frames=())
    env.close()
    return evaluations
