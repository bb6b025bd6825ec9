"""The `prophrl` command. Functions live where their subject lives; this file only wires and prints."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import inspect
from collections.abc import Callable, Container
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from tyro.conf import OmitArgPrefixes, OmitSubcommandPrefixes, Positional, subcommand

from prophet_gym.atomic import atomic_folder
from prophet_gym.command_line import run_commands
from prophrl_agents.advantages import group_advantages
from prophrl_agents.config import PAPER, SMOKE, TABLETOP, TrainConfig
from prophrl_agents.demo import DemoConfig, run_demo
from prophrl_agents.evaluation_report import EvalConfig, run_eval
from prophrl_agents.flow_sde import LastStep, schedule
from prophrl_agents.flowscale import flowscale_weights
from prophrl_agents.losses import fa_grpo_loss
from prophrl_agents.policies.average import average_policies
from prophrl_agents.policies.small import SmallFlowPolicyConfig
from prophrl_agents.sft import SFT_PAPER, SFT_SMOKE, SFT_TABLETOP, SFTConfig, run_sft
from prophrl_agents.trainer import run_train

__all__ = ["COMMANDS", "average", "demo", "evaluate", "info", "main", "record", "sft", "train"]

Imitation = (
    Annotated[SFTConfig, subcommand("tabletop", default=SFT_TABLETOP)]
    | Annotated[SFTConfig, subcommand("smoke", default=SFT_SMOKE)]
    | Annotated[SFTConfig, subcommand("paper", default=SFT_PAPER)]
)
Reinforcement = (
    Annotated[TrainConfig, subcommand("tabletop", default=TABLETOP)]
    | Annotated[TrainConfig, subcommand("smoke", default=SMOKE)]
    | Annotated[TrainConfig, subcommand("paper", default=PAPER)]
)


def sft(what: OmitArgPrefixes[Imitation]) -> None:
    """Teach a policy by imitation of recorded episodes; the simulator measures it on the way.

    Args:
        what: preset, and what to change of it.
    """
    print(run_sft(what))


def train(what: Reinforcement) -> None:
    """Reinforce a policy in a world model or a simulator.

    Args:
        what: preset, and what to change of it.
    """
    print(run_train(what))


def evaluate(config: OmitArgPrefixes[EvalConfig]) -> None:
    """Success rates with intervals, in the world model and in the simulator, from the same snapshots.

    Args:
        config: what is evaluated, and where.
    """
    print(run_eval(config))


def demo(config: OmitArgPrefixes[DemoConfig]) -> None:
    """Reinforce the packaged policy inside Prophet, measure it in the simulator, and write a page about it.

    Args:
        config: size and place.
    """
    print(run_demo(config))


def record(
    out: Positional[Path],
    policy: Path,
    episodes: int = 1000,
    seed: int = 4_000_000,
    steps: int = 40,
    noisy_share: float = 0.5,
    noise_level: float = 0.5,
    workers: int = 2,
    env: str = "Tabletop-v0",
    task: str | None = None,
    world: str | None = None,
    checkpoint: str | None = None,
) -> None:
    """Record what a policy does in a simulator or on imagined frames, to train a world model and its judge.

    Args:
        out: folder of the data set; episodes already there are kept and skipped.
        policy: folder of the policy.
        episodes: how many, with seeds from the first on.
        seed: seed of the first episode; sets are disjoint when their seed ranges are.
        steps: commands of an episode.
        noisy_share: share of the episodes in which the policy explores as it does while it learns.
        noise_level: noise a of the flow SDE in those.
        workers: processes.
        env: simulator.
        task: of a simulator that has several (LIBERO, SimplerEnv); by default every episode draws one.
        world: world model that the policy sees instead (Prophet-Tabletop-v0); the simulator plays its commands.
        checkpoint: weights of that world model; the packaged ones by default.
    """
    from prophet_gym.data.record import recorded  # needs MuJoCo
    from prophrl_agents.record import record_policy

    given: dict[str, Any] = {} if task is None else {"task": task}
    made = record_policy(
        out,
        policy,
        episodes,
        seed,
        steps=steps,
        noisy_share=noisy_share,
        noise_level=noise_level,
        workers=workers,
        env_id=env,
        world=world,
        checkpoint=checkpoint,
        **given,
    )
    print(recorded(out, made, steps))


def average(
    out: Positional[Path],
    policies: Positional[tuple[str, ...]],
    weights: tuple[float, ...] | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
) -> None:
    """Average the weights of policies that were reinforced from the same one, for example by runs of several seeds.

    Args:
        out: folder of the new policy; one that is there is not replaced.
        policies: folders, or names of packaged policies.
        weights: of each, relative to one another; all the same by default.
        dtype: of the stored weights.
    """
    if out.exists():
        raise ValueError(f"{out} exists already; give another folder for the mean")
    policy = average_policies(policies, weights)
    with atomic_folder(out) as folder:
        policy.save_pretrained(folder, dtype=getattr(torch, dtype))
    print(f"mean of {len(policies)} policies: {out}; measure it with prophrl eval")


def info(
    num_flow_steps: int = SmallFlowPolicyConfig.num_flow_steps,
    noise_level: float = SmallFlowPolicyConfig.noise_level,
    last_step: LastStep = SmallFlowPolicyConfig.last_step,
) -> None:
    """Print the version, the defaults of the learning maths, and the flow schedule with its FlowScale weights.

    Args:
        num_flow_steps: flow steps K of the action head.
        noise_level: noise a of the flow SDE.
        last_step: whether the last flow step is noisy ("sde") or not ("ode").
    """
    table = schedule_table(num_flow_steps, noise_level, last_step)
    print(f"prophrl {_version()}\n")
    print(defaults_table())
    print(f"\nflow schedule, K = {num_flow_steps}, noise level = {noise_level:g}, last step = {last_step}")
    print(table)


def defaults_table() -> str:
    """Returns the defaults, read from the signatures of the functions that use them."""
    rows: list[tuple[str, ...]] = [("where", "parameter", "default")]
    for function in (group_advantages, flowscale_weights, fa_grpo_loss):
        for name, parameter in inspect.signature(function).parameters.items():
            if parameter.default is not inspect.Parameter.empty:
                rows.append((function.__name__, name, str(parameter.default)))
    for field in dataclasses.fields(SmallFlowPolicyConfig):
        if field.default is not dataclasses.MISSING:
            rows.append((SmallFlowPolicyConfig.__name__, field.name, str(field.default)))
    return _format(rows, right=())


def schedule_table(num_flow_steps: int, noise_level: float, last_step: LastStep) -> str:
    """Returns one line per flow step.

    ``score`` is the root mean square of the gradient of the step's log-probability by its velocity, |c_v| / std: what
    FlowScale evens out.
    """
    flow = schedule(num_flow_steps, noise_level, last_step=last_step)
    weights = flowscale_weights(flow.std)
    rows: list[tuple[str, ...]] = [("k", "t", "dt", "std", "score", "weight", "weight*score")]
    for k, (t, dt, std, c_v, w) in enumerate(zip(flow.t, flow.dt, flow.std, flow.c_v, weights, strict=False), start=1):
        score = float(-c_v / std) if std > 0 else 0.0
        rows.append((str(k), *(f"{float(number):.4f}" for number in (t, dt, std, score, w, w * score))))
    return _format(rows, right=range(7))


def _format(rows: list[tuple[str, ...]], right: Container[int]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = (
            cell.rjust(n) if i in right else cell.ljust(n) for i, (cell, n) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * n for n in widths))
    return "\n".join(lines)


def _version() -> str:
    try:
        return importlib.metadata.version("prophet-gym")
    except importlib.metadata.PackageNotFoundError:
        return "(source tree, not installed)"


COMMANDS: dict[str, Callable[..., Any]] = {
    "sft": sft,
    "train": train,
    "eval": evaluate,
    "record": record,
    "average": average,
    "demo": demo,
    "info": info,
}


def main() -> None:
    """Run the command line."""
    run_commands(
        COMMANDS,
        prog="prophrl",
        description="Reinforce flow-head robot policies in a world model or a simulator.",
        config=(OmitSubcommandPrefixes,),
    )


if __name__ == "__main__":
    main()
