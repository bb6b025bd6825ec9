"""The ``prophet`` command: each subcommand is a thin wrapper around one function of the library."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from tyro.conf import OmitArgPrefixes, OmitSubcommandPrefixes, Positional, subcommand

from .actions import ACTION_SPECS
from .atomic import atomic_folder, atomic_text
from .audit import audit as audit_episodes
from .audit import format_audit
from .audit_report import write_audit_page
from .command_line import run_commands
from .commands.data import convert
from .commands.judge import judge
from .commands.robot import adapt, calibrate, push
from .data.fitting import stretched
from .data.opening import open_dataset
from .data.sequence import EpisodeSequence
from .data.windows import EpisodeWindows
from .demo import DemoConfig, run_demo
from .errors import nearest
from .metrics.evaluate import evaluate_world_model
from .metrics.report import markdown
from .registration import SIMULATOR_ID, WORLDS, resolve_checkpoint
from .strict_json import to_json
from .training.plan import PlanConfig, format_plan, plan_pretraining
from .training.presets import VAE_SMOKE, VAE_TINY, WORLD_MODEL_SMOKE, WORLD_MODEL_TINY
from .training.pretrain import pretrain
from .training.pretrain_config import PretrainConfig
from .training.vae import VAEConfig, train_vae
from .training.world_model import WorldModelConfig, train_world_model
from .world_model.average import average_worlds
from .world_model.cosmos import world_from_cosmos
from .world_model.prophet import ProphetWorldModel

TrainingRun = (
    Annotated[VAEConfig, subcommand("vae", default=VAE_TINY)]
    | Annotated[VAEConfig, subcommand("vae-smoke", default=VAE_SMOKE)]
    | Annotated[WorldModelConfig, subcommand("world-model", default=WORLD_MODEL_TINY)]
    | Annotated[WorldModelConfig, subcommand("world-model-smoke", default=WORLD_MODEL_SMOKE)]
    | Annotated[PretrainConfig, subcommand("pretrain")]
)

Precision = Literal["float32", "bfloat16", "float16"]


def _load(checkpoint: str, device: str = "cpu", dtype: Precision = "float32") -> ProphetWorldModel:
    folder = resolve_checkpoint(WORLDS["Prophet-Tabletop-v0"], checkpoint)
    return ProphetWorldModel.from_pretrained(folder, device=device, dtype=getattr(torch, dtype))


def info(checkpoint: Positional[str] = "tabletop") -> None:
    """Show a checkpoint: size of its networks, conventions, training data; its README.md has the measured figures.

    Args:
        checkpoint: a folder, or the name of packaged weights.
    """
    world = _load(checkpoint)
    sizes = {"denoiser": world.transformer, "codec": world.codec.vae}
    rows: dict[str, Any] = {
        **{f"{name} parameters": f"{sum(p.numel() for p in net.parameters()):,}" for name, net in sizes.items()},
        **world.config.to_dict(),
    }
    print(to_json(rows), end="")


def record(
    out: Positional[Path],
    episodes: int = 1000,
    seed: int = 0,
    steps: int = 40,
    workers: int = 2,
    mix: dict[str, float] | None = None,
    env: str = "Tabletop-v0",
    task: str | None = None,
    image_size: int | None = None,
    look: Literal["first", "second"] = "first",
) -> None:
    """Record episodes: scripted successes and failures on Tabletop, smooth random motion in other simulators.

    Args:
        out: folder of the data set; episodes already there are kept and skipped.
        episodes: how many, with seeds from the first on.
        seed: seed of the first episode.
        steps: commands of an episode.
        workers: processes.
        mix: behaviours and their shares, for example `half_good 3 drop 1`; by default a third experts, a quarter
            half-good, the others failures and random motion.
        env: simulator; `prophrl record` records policies in it.
        task: of a simulator that has several (LIBERO, SimplerEnv); by default every episode draws one.
        image_size: side of its images, pixels.
        look: camera and colours; "second" is seen from the other side, in colours of its own.
    """
    from .data.record import DEFAULT_MIX, record_wandering, recorded  # needs MuJoCo
    from .data.record import record as record_episodes

    if env == SIMULATOR_ID:
        if task is not None or image_size is not None:
            raise ValueError(f"{env} has no --task and --image-size; they are for simulators with several tasks")
        made = record_episodes(
            out, episodes, seed=seed, steps=steps, workers=workers, mix=mix or DEFAULT_MIX, look=look
        )
    elif mix is not None or look != "first":
        raise ValueError(f"--mix and --look are Tabletop's; {env} has neither, only random motion")
    else:
        given: dict[str, Any] = {"task": task, "image_size": image_size}
        given = {name: value for name, value in given.items() if value is not None}
        made = record_wandering(out, episodes, seed, workers, steps, env_id=env, **given)
    print(recorded(out, made, steps))


def snapshots(out: Positional[Path], count: int = 64, seed: int = 2_000_000, overwrite: bool = False) -> None:
    """Save first images of fresh Tabletop scenes: places where rollouts can start, imagined or simulated.

    Args:
        out: folder of the snapshot set.
        count: scenes.
        seed: seed of the first scene; the packaged set has 64 from 2,000,000.
        overwrite: replace the set that is there.
    """
    from .data.record import record_snapshots  # needs MuJoCo

    if out.exists() and not overwrite:
        raise ValueError(f"{out} exists already; give another folder, or --overwrite to replace the set in it")
    print(f"{len(record_snapshots(out, count, seed, overwrite=overwrite))} snapshots in {out}")


def audit(
    data: Positional[Path],
    card: str | None = None,
    camera: str | None = None,
    episodes: int = 50,
    out: Path | None = None,
    page: Path | None = None,
) -> None:
    """Check a data set's conventions before training: delays, axes, signs, gripper, units, frozen or missing frames.

    The exit status is 1 if there is a fault, 2 if the set cannot be opened.

    Args:
        data: a folder of episodes, a LeRobot, RLDS or HDF5 data set.
        card: what the numbers mean, for formats that do not say: bridge, droid, libero, ..., or a TOML file
        camera: which camera; the card's or the first by default.
        episodes: how many, from the first; each is decoded once.
        out: JSON file for the findings.
        page: HTML file with findings and pictures; needs the extra `viz`.
    """
    opened = open_dataset(data, card=card, camera=camera)
    report = audit_episodes(opened, limit=episodes)
    print(format_audit(report))
    if out is not None:
        atomic_text(out, to_json(report.to_dict()))
    if page is not None:
        write_audit_page(report, opened, page, name=data.resolve().name)
    if report.exit_code:
        raise SystemExit(report.exit_code)


def check(
    env_id: Positional[str] = "Prophet-Tabletop-v0",
    interface: Literal["chunk", "flat", "simpler", "maniskill", "libero", "lerobot"] = "chunk",
    checkpoint: str | None = None,
    motion: bool = False,
    seed: int = 0,
) -> None:
    """Check that an environment keeps the contract of its interface; the exit status is 1 if it does not.

    Args:
        env_id: a world or Tabletop-v0.
        interface: whose contract: our own ("chunk", "flat"), or that of another project.
        checkpoint: weights of a world; the packaged ones by default.
        motion: also command every direction and the gripper, and see whether the picture follows.
        seed: of the starts.
    """
    from .compat.check import check_environment

    options = {} if checkpoint is None else {"checkpoint": checkpoint}
    report, holds = check_environment(env_id, interface, motion=motion, seed=seed, **options)
    print(report)
    if not holds:
        raise SystemExit(1)


def from_cosmos(
    source: Positional[str],
    out: Positional[Path],
    actions: str,
    image_size: tuple[int, int] = (256, 256),
    action_frames: Literal["none", "pooled", "spatial"] = "pooled",
    num_effectors: int = 2,
    history_frames: int = 60,
    num_inference_steps: int = 35,
    name: str = "cosmos-untrained",
    revision: str | None = None,
    dtype: Precision = "bfloat16",
    seed: int = 0,
) -> None:
    """Turn a Cosmos-Predict2 checkpoint into a Prophet one, to be trained: until then actions have no effect.

    Args:
        source: a folder in the layout of diffusers (transformer/, vae/), or a hub id.
        out: folder of the new checkpoint; one that is there is not replaced.
        actions: conventions of the commands: tabletop, bridge, libero, droid, agibot.
        image_size: height and width in pixels, multiples of 16.
        action_frames: how drawn actions reach the denoiser; all but none need calibrated cameras.
        num_effectors: end-effectors of the denoiser; commands of fewer are padded.
        history_frames: frames of the history.
        num_inference_steps: default number of denoising steps.
        name: of the checkpoint, for logs.
        revision: branch, tag or commit on the hub.
        dtype: of both networks.
        seed: of the new parameters that are not zero.
    """
    if actions not in ACTION_SPECS:
        raise ValueError(
            f"--actions {actions}: expected one of {', '.join(ACTION_SPECS)}.{nearest(actions, ACTION_SPECS)}"
        )
    with atomic_folder(out) as folder:
        world = world_from_cosmos(
            source,
            ACTION_SPECS[actions],
            image_size=image_size,
            history_frames=history_frames,
            num_inference_steps=num_inference_steps,
            name=name,
            revision=revision,
            dtype=getattr(torch, dtype),
            seed=seed,
            action_frames=action_frames,
            num_effectors=num_effectors,
        )
        world.save_pretrained(folder)
    parameters = sum(p.numel() for p in world.transformer.parameters())
    print(f"denoiser of {parameters:,} parameters in {dtype}, untrained on actions: {out}")


def train(what: TrainingRun) -> None:
    """Train the codec, or the denoiser on its latents: on one data set, or (``pretrain``) on a mixture of several.

    ``-smoke`` is a minute's run to try the pipeline.

    Args:
        what: what to train, and how.
    """
    if isinstance(what, VAEConfig):
        print(to_json(train_vae(what)), end="")
        print(f"codec: {what.run / 'vae'}")
    elif isinstance(what, PretrainConfig):
        print(f"checkpoint: {pretrain(what)}")
    else:
        train_world_model(what)
        print(f"checkpoint: {what.run / 'prophet'}")


def plan(config: PretrainConfig, machine: PlanConfig, out: Path | None = None) -> None:
    """Say what `prophet train pretrain` would take, without training: steps, operations, memory, hours, disk.

    Args:
        config: the run, with the flags of `prophet train pretrain`.
        machine: the GPUs to plan for.
        out: JSON file for the figures.
    """
    figures = plan_pretraining(config, machine)
    print(format_plan(figures))
    if out is not None:
        atomic_text(out, to_json(figures))


def evaluate(
    data: Positional[Path],
    checkpoint: str = "tabletop",
    out: Path = Path("runs/eval"),
    episodes: int = 100,
    steps: int = 40,
    stride: int | None = None,
    card: str | None = None,
    camera: str | None = None,
    num_inference_steps: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    device: str = "cpu",
    dtype: Precision = "float32",
) -> None:
    """Score open-loop rollouts on held-out episodes, beside the last-frame and shuffled-action baselines.

    Args:
        data: held-out episodes of any format; images are stretched to the checkpoint's size.
        checkpoint: a folder, or the name of packaged weights.
        out: where metrics.json, report.md, strips.png and rollouts.mp4 go.
        episodes: how many, from the first.
        steps: imagined frames of each.
        stride: cut recordings into windows of ``steps`` commands that begin so many commands apart, each an episode;
            by default a recording gives one, from its start.
        card: what the numbers mean, for formats that do not say: bridge, droid, libero, ..., or a TOML file
        camera: which camera; the card's or the first by default.
        num_inference_steps: denoising steps; the checkpoint's by default.
        batch_size: episodes imagined at once.
        seed: of the sampling noise and the bootstrap.
        device: of the networks, as in torch.
        dtype: of the networks.
    """
    if episodes < 2:
        raise ValueError(f"--episodes {episodes}: expected at least 2: each is also tried with the commands of another")
    world = _load(checkpoint, device, dtype)
    recorded: EpisodeSequence = open_dataset(data, card=card, camera=camera)
    if stride is not None:
        recorded = EpisodeWindows(recorded, steps, stride=stride, image_size=world.image_size)
    result = evaluate_world_model(
        world,
        [stretched(episode.with_poses(), world.image_size) for episode in recorded[:episodes]],
        steps,
        num_inference_steps,
        batch_size,
        seed,
        out,
        True,
    )
    print(markdown(result))
    print(f"written to {out}")


def average(
    out: Positional[Path],
    checkpoints: Positional[tuple[str, ...]],
    weights: tuple[float, ...] | None = None,
    trained_on: str | None = None,
    dtype: Precision = "float16",
) -> None:
    """Average the denoisers of checkpoints that were fine-tuned from one another; without judge and snapshots.

    Args:
        out: folder of the new checkpoint; one that is there is not replaced.
        checkpoints: folders, or names of packaged weights; codec and settings are those of the first.
        weights: of each, relative to one another; all the same by default.
        trained_on: one sentence on the data; default: those of the checkpoints.
        dtype: of both networks.
    """
    if out.exists():
        raise ValueError(f"{out} exists already; give another folder for the mean")
    folders = [resolve_checkpoint(WORLDS["Prophet-Tabletop-v0"], checkpoint) for checkpoint in checkpoints]
    world = average_worlds(folders, weights)
    if trained_on is not None:
        world.config = replace(world.config, trained_on=trained_on)
    for network in (world.transformer, world.codec.vae):
        torch.nn.Module.to(network, getattr(torch, dtype))  # that of diffusers warns
    with atomic_folder(out) as folder:
        world.save_pretrained(folder)
    print(f"mean of {len(folders)} checkpoints: {out}; give it a judge and snapshots, then measure them together")


def demo(config: DemoConfig) -> None:
    """Prophet-Tabletop beside Tabletop-v0 on the same commands: metrics, verdicts, an MP4 and a PNG.

    Args:
        config: size and place of the demonstration.
    """
    print(run_demo(config))


COMMANDS: dict[str, Callable[..., Any]] = {
    "demo": demo,
    "info": info,
    "record": record,
    "snapshots": snapshots,
    "convert": convert,
    "audit": audit,
    "calibrate": calibrate,
    "adapt": adapt,
    "push": push,
    "check": check,
    "from-cosmos": from_cosmos,
    "plan": plan,
    "train": train,
    "average": average,
    "eval": evaluate,
    "judge": judge,
}


def main() -> None:
    """Run the command line."""
    run_commands(
        COMMANDS,
        prog="prophet",
        description="Learned world models as environments for robot policies.",
        config=(OmitSubcommandPrefixes, OmitArgPrefixes),
    )


if __name__ == "__main__":
    main()
