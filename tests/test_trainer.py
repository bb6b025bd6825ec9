"""The training loop, end to end on a small real environment: it learns, resumes to the bit, stops when it should."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from gymnasium.vector import AutoresetMode
from reach import Reach, make_reach, make_reach_policy
from small_policy import make_policy

from prophet_gym import ProphetVectorEnv, ProphetWorldModel, Snapshot, SnapshotSet, Verdict
from prophet_gym.sims.vector import make_sync_vector_env
from prophrl_agents import SmallFlowPolicy
from prophrl_agents.config import PAPER, SMOKE, TABLETOP, FlowScaleConfig, TrainConfig, WorldConfig
from prophrl_agents.environments import make_environment
from prophrl_agents.evaluate import FIRST_SEED, compare, evaluate_policy, evaluate_starts
from prophrl_agents.governor import Governor, GovernorRules, SimulatorReference
from prophrl_agents.trainer import GRPOTrainer

QUICK = TrainConfig(
    updates=2, rollouts_per_update=16, group_size=4, mini_batch=8, learning_rate=2e-3,
    eval_every=0, eval_starts=8, videos_every=0, log_grad_every=0,
)  # fmt: skip
RECIPE = dataclasses.replace(
    QUICK, updates=20, rollouts_per_update=128, group_size=8, mini_batch=64, epochs=2, eval_every=10, eval_starts=20
)


def weights_of(policy):
    return torch.cat([parameter.detach().flatten() for parameter in policy.parameters()])


def lines_of(run):
    def refuse(name):
        raise ValueError(name)

    text = (run / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def without_times(lines):
    return [{k: v for k, v in line.items() if not k.startswith("seconds") and "per_second" not in k} for line in lines]


def improvement(run, **options):
    """Trains with the recipe; compares before and after in the true environment, same starts and noise."""
    env, starts = make_reach(64), evaluate_starts(128, 5)
    before = evaluate_policy(make_reach_policy(), env, starts)
    policy = make_reach_policy()
    GRPOTrainer(dataclasses.replace(RECIPE, run=run), policy, make_reach(64, **options), env).train()
    return compare(before, evaluate_policy(policy, env, starts))


def test_fa_grpo_raises_success(tmp_path):
    comparison = improvement(tmp_path / "run")
    assert comparison.before < 0.2 and comparison.low > 35


def test_a_judge_that_throws_coins_does_not(tmp_path):
    """The same recipe; chance may move the policy, but not to where the reward would have taken it."""
    comparison = improvement(tmp_path / "run", random_judge=True)
    assert comparison.high < 25 and comparison.low < 10


class Interrupted(Reach):
    """Interrupts the run at a certain step, once."""

    countdown = 0

    def step(self, chunk):
        Interrupted.countdown -= 1
        if Interrupted.countdown == 0:
            raise KeyboardInterrupt
        return super().step(chunk)


@pytest.mark.parametrize(
    "settings", [{"beta": 0.01, "epochs": 2, "ema_decay": 0.8}, {"algorithm": "ppo"}], ids=["fa_grpo", "ppo"]
)
def test_an_interrupted_run_resumes_to_the_same_bits(tmp_path, settings):
    config = dataclasses.replace(QUICK, updates=5, save_every=2, eval_every=2, **settings)
    whole = make_reach_policy()
    straight = GRPOTrainer(dataclasses.replace(config, run=tmp_path / "a"), whole, make_reach(8)).train()

    broken = dataclasses.replace(config, run=tmp_path / "b")
    Interrupted.countdown = 135  # in the fourth update
    with pytest.raises(KeyboardInterrupt):
        GRPOTrainer(broken, make_reach_policy(), make_sync_vector_env(Interrupted, 8, AutoresetMode.DISABLED)).train()
    steps = [line["step"] for line in lines_of(tmp_path / "b")]
    assert steps == [0, 1, 2, 3]
    with (tmp_path / "b" / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 4, "reward_me')
    resumed = make_reach_policy(seed=7)  # its weights come from the checkpoint
    again = GRPOTrainer(dataclasses.replace(broken, resume=True), resumed, make_reach(8)).train()

    assert torch.equal(weights_of(resumed), weights_of(whole)) and again == straight
    saved = [weights_of(SmallFlowPolicy.from_pretrained(tmp_path / name / "policy")) for name in "ab"]
    assert torch.equal(*saved) and torch.equal(saved[0], weights_of(whole)) == (settings.get("ema_decay") is None)
    assert without_times(lines_of(tmp_path / "b")) == without_times(lines_of(tmp_path / "a"))
    names = [sorted(path.name for path in (tmp_path / name / "checkpoints").iterdir()) for name in "ab"]
    assert names[0] == names[1] and len(names[0]) == 2


def test_a_run_leaves_what_it_promises(tmp_path):
    run = tmp_path / "run"
    config = dataclasses.replace(QUICK, run=run, eval_every=1, videos_every=1, log_grad_every=1)
    policy = make_reach_policy()
    trainer = GRPOTrainer(config, policy, make_reach(8))
    result = trainer.train()
    first, *lines = lines_of(run)
    assert first["step"] == 0 and [line["step"] for line in lines] == [1, 2] and result.updates == 2
    for line in lines:
        assert line["ratio_mean"] == pytest.approx(1, abs=0.1) and line["log_prob_gap"] < 1e-3
        assert {f"gradient_norm_flow_step_{k}" for k in (1, 2, 3)} <= set(line)
        assert line["eval_success_low"] <= line["eval_success_rate"] <= line["eval_success_high"]
        assert line["frames_per_second"] > line["rollouts_per_second"] > 0
        for name in ("reward_mean", "success_rate", "zero_variance_share", "kl", "clip_fraction", "seconds_env"):
            assert name in line
    assert torch.equal(weights_of(SmallFlowPolicy.from_pretrained(run / "policy")), weights_of(policy))
    assert (run / "best" / "model.safetensors").exists()
    videos = sorted(path.name for path in (run / "videos").iterdir())
    assert videos == [f"update_{u:04d}_{name}.mp4" for u in (0, 1) for name in ("bad", "good")]
    assert list((run / "tensorboard").iterdir())
    saved = torch.load(run / "checkpoints" / "last.pt", weights_only=True)
    assert saved["progress"]["update"] == 2 and "policy" in saved["learner"]
    assert json.loads((run / "config.json").read_text())["rollouts_per_update"] == 16


def test_starts_differ_between_updates_and_never_meet_those_of_evaluations(tmp_path):
    trainer = GRPOTrainer(dataclasses.replace(QUICK, run=tmp_path, seed=3), make_reach_policy(), make_reach(8))
    seeds = [[start.seed for start in trainer.starts(update)[0]] for update in (0, 1, 0)]
    assert seeds[0] == seeds[2] and not set(seeds[0]) & set(seeds[1]) and len(set(seeds[0])) == 4
    assert max(seeds[0] + seeds[1]) < FIRST_SEED


def test_several_environments_are_learned_from_jointly(tmp_path):
    """Their horizons differ, so their batches are padded before they are joined."""
    envs = [make_reach(8), make_reach(4, calls=3)]
    config = dataclasses.replace(QUICK, run=tmp_path / "run", eval_every=1, eval_starts=4)
    trainer = GRPOTrainer(config, make_reach_policy(), envs)
    batch, _ = trainer._collect(0)
    assert len(batch) == 16 and batch.mask.shape[1] == 3
    assert batch.mask[8:, 2].any() and not batch.mask[:8, 2].any()
    assert [start.seed for start in batch.starts] == [start.seed for half in trainer.starts(0) for start in half]
    trainer.train()
    assert lines_of(tmp_path / "run")[-1]["optimizer_steps"] >= 1
    with pytest.raises(ValueError, match="multiples of 12"):
        GRPOTrainer(config, make_reach_policy(), [*envs, envs[0]])


def test_a_loss_that_is_not_finite_stops_with_the_batch_and_a_usable_checkpoint(tmp_path):
    run = tmp_path / "run"
    config = dataclasses.replace(QUICK, run=run, learning_rate=1e30, epochs=2, mini_batch=16)
    with pytest.raises(FloatingPointError, match="update 0.*failed_batch.safetensors"):
        GRPOTrainer(config, make_reach_policy(), make_reach(8)).train()
    with safetensors.safe_open(run / "failed_batch.safetensors", "pt") as stream:
        assert stream.get_tensor("path").shape[0] == 16 and stream.get_tensor("path").isfinite().all()
    state = torch.load(run / "checkpoints" / "last.pt", weights_only=True)
    assert state["progress"]["update"] == 0
    assert all(value.isfinite().all() for value in state["learner"]["policy"].values())


def broken_judge(frames, instruction):
    raise RuntimeError("no server")


@pytest.mark.parametrize(("judge", "reason"), [(broken_judge, "RuntimeError: no server"), (None, "has no judge")])
@pytest.mark.parametrize("eval_every", [0, 1])
def test_a_run_without_verdicts_stops_and_says_why(tiny_checkpoint, tmp_path, judge, reason, eval_every, caplog):
    snapshots = SnapshotSet.load(tiny_checkpoint / "snapshots")

    def make(judge):
        model = ProphetWorldModel.from_pretrained(tiny_checkpoint)
        return ProphetVectorEnv(model, 8, horizon=8, snapshots=snapshots, judge=judge, autoreset_mode="Disabled")

    config = dataclasses.replace(QUICK, run=tmp_path / "run", updates=1, eval_every=eval_every)
    what = "evaluation after 0 updates" if eval_every else "update 0"
    with pytest.raises(ValueError, match=f"^{what}: no rollout was judged .*{reason}.*judge=.*resume=True"):
        GRPOTrainer(config, make_policy(image_size=48), make(judge)).train()
    assert not (tmp_path / "run" / "policy").exists()
    assert caplog.text.count("no server") == (judge is not None)
    resumed = GRPOTrainer(dataclasses.replace(config, resume=True), make_policy(image_size=48), make(brighter)).train()
    assert resumed.updates == 1 and (tmp_path / "run" / "policy").exists()


def brighter(frames, instruction):
    """Fails on some rollouts, which are masked and no more."""
    return Verdict.abstain("dark") if frames[-1].mean() < 115 else bool(frames[-1].mean() > frames[0].mean())


class Doubtful(Reach):
    """Abstains in the updates whose numbers are ``silent``, of 16 rollouts each."""

    silent, ended = (), 0

    def step(self, chunk):
        observation, reward, terminated, truncated, info = super().step(chunk)
        if terminated or truncated:
            info["judge_valid"] = Doubtful.ended // QUICK.rollouts_per_update not in self.silent
            Doubtful.ended += 1
        return observation, reward, terminated, truncated, info


def test_one_update_without_verdicts_is_chance_two_are_not(tmp_path, monkeypatch):
    def train(run, *silent):
        monkeypatch.setattr(Doubtful, "silent", silent)
        monkeypatch.setattr(Doubtful, "ended", 0)
        config = dataclasses.replace(QUICK, run=run, updates=4)
        GRPOTrainer(config, make_reach_policy(), make_sync_vector_env(Doubtful, 8, AutoresetMode.DISABLED)).train()

    train(tmp_path / "chance", 1, 3)
    assert [line["valid_share"] for line in lines_of(tmp_path / "chance")] == [1, 0, 1, 0]
    with pytest.raises(ValueError, match="update 2: no rollout was judged, so"):
        train(tmp_path / "gone", 1, 2, 3)
    state = torch.load(tmp_path / "gone" / "checkpoints" / "last.pt", weights_only=True)
    assert state["progress"]["update"] == 2


class ScriptedTruth:
    """A reference whose outcomes are known beforehand, one list entry per check."""

    def __init__(self, rates):
        self.rates = list(rates)

    def outcomes(self, batch, rollouts):
        rate = self.rates.pop(0)
        return [i < rate * len(rollouts) for i in range(len(rollouts))]


def govern(run, rates, **rules):
    config = dataclasses.replace(QUICK, run=run, updates=len(rates))
    governor = Governor(ScriptedTruth(rates), GovernorRules(every=1, **rules))
    trainer = GRPOTrainer(config, make_reach_policy(), make_reach(8), governor=governor)
    return trainer, trainer.train(), lines_of(run)


def test_the_governor_rolls_back_to_the_weights_that_were_truly_best(tmp_path):
    trainer, result, lines = govern(tmp_path / "run", [0.5, 0.75, 0.25, 0.25], patience=2)
    assert [line["governor"]["action"] for line in lines][-1] == "rollback" and result.best_update == 1
    assert "optimizer_steps" not in lines[-1] and lines[-2]["optimizer_steps"] > 0
    best = SmallFlowPolicy.from_pretrained(tmp_path / "run" / "best")
    assert torch.equal(weights_of(trainer.learner.policy), weights_of(best))
    assert not torch.equal(weights_of(best), weights_of(make_reach_policy()))
    expected = make_reach_policy()
    GRPOTrainer(dataclasses.replace(QUICK, run=tmp_path / "one", updates=1), expected, make_reach(8)).train()
    assert torch.equal(weights_of(best), weights_of(expected))


def test_a_governor_leaves_every_environment_its_own_starts(tmp_path):
    envs = [make_reach(8), make_reach(8)]
    bare = Snapshot(np.zeros((8, 8, 3), np.uint8), "go", np.eye(4)[None], np.ones(1))
    for i, env in enumerate(envs):
        env.snapshots = [dataclasses.replace(bare, name=f"{i}-{j}", simulator_state=np.ones(3)) for j in range(3)]
    config = dataclasses.replace(QUICK, run=tmp_path / "run")
    trainer = GRPOTrainer(config, make_reach_policy(), envs, governor=Governor(ScriptedTruth([])))
    for i, starts in enumerate(trainer.starts(0)):
        assert starts and all(start.snapshot.name.startswith(f"{i}-") for start in starts)
    envs[1].snapshots = [dataclasses.replace(one, simulator_state=None) for one in envs[1].snapshots]
    with pytest.raises(ValueError, match="3 of 6 snapshots have no simulator_state, '1-0' for one"):
        GRPOTrainer(config, make_reach_policy(), envs, governor=Governor(SimulatorReference(make_reach(8))))


def test_the_governor_stops_a_run_and_its_memory_is_in_the_checkpoint(tmp_path):
    _, result, lines = govern(tmp_path / "run", [0.75, 0.25, 0.25, 0.25], patience=1, reaction="stop")
    assert result.updates == 2 and "below its best" in result.stopped and len(lines) == 2
    state = torch.load(tmp_path / "run" / "checkpoints" / "last.pt", weights_only=True)
    assert [report["true_success"] for report in state["governor"]["reports"]] == [0.75, 0.25]


def test_a_run_stops_without_progress_or_when_the_goal_is_reached(tmp_path):
    patient = dataclasses.replace(QUICK, updates=9, eval_every=1, learning_rate=1e-12, patience=2)
    result = GRPOTrainer(dataclasses.replace(patient, run=tmp_path / "a"), make_reach_policy(), make_reach(8)).train()
    assert result.updates == 2 and "no better evaluation" in result.stopped
    easy = dataclasses.replace(QUICK, updates=9, eval_every=1, stop_at_success=0.01, run=tmp_path / "b")
    result = GRPOTrainer(easy, make_reach_policy(), make_reach(8)).train()
    assert 1 <= result.updates < 9 and "training rollouts succeed" in result.stopped


def test_a_run_folder_is_not_overwritten_and_only_its_own_run_resumes(tmp_path):
    config = dataclasses.replace(QUICK, run=tmp_path / "run", updates=1)

    def train(**changes):
        GRPOTrainer(dataclasses.replace(config, **changes), make_reach_policy(), make_reach(8)).train()

    with pytest.raises(ValueError, match="nothing to resume"):
        train(resume=True)
    train()
    with pytest.raises(ValueError, match="already holds a run"):
        train()
    with pytest.raises(ValueError, match="differs"):
        train(resume=True, learning_rate=1.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group_size": 1}, "one rollout has nothing to be compared with"),
        ({"rollouts_per_update": 100}, "multiple of group_size 8"),
        ({"env": ("a", "b", "c")}, "3 environments"),
        ({"env": "Tabletop-v0"}, "one id or more"),
        ({"eval_env": "Tabletop-v0"}, "tuple of ids: \\('Tabletop-v0',\\)"),
        ({"mini_batch": 12}, "whole groups"),
        ({"mini_batch": 96}, "divides rollouts_per_update"),
        ({"algorithm": "fagrpo"}, "Did you mean 'fa_grpo'"),
        ({"advantage_norm": "std"}, "'rloo'"),
        ({"clip_low": 1.0}, "clip_low < 1"),
        ({"dual_clip": 1.1}, "above 1 \\+ clip_high"),
        ({"beta": -1.0}, "0 or more"),
        ({"noise_level": 0.0}, "noise_level is 0.0, expected above 0"),
        ({"beta": 0.1, "algorithm": "filtered_bc"}, "no KL term"),
        ({"dynamic_sampling": True, "algorithm": "ppo"}, "about groups"),
        ({"learning_rate": 0.0}, "positive"),
        ({"grad_clip": float("inf")}, "positive"),
        ({"epochs": 0}, "at least 1"),
        ({"world": WorldConfig(num_envs=0)}, "num_envs"),
        ({"seed": -1}, "0 or more"),
        ({"mixed_precision": "fp16"}, "'bf16'"),
        ({"stop_at_success": 60.0}, "rate in"),
        ({"patience": 2, "eval_every": 0}, "set eval_every above 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**settings)


def test_flowscale_bounds_are_refused_when_training_starts(tmp_path):
    config = dataclasses.replace(QUICK, run=tmp_path / "run", flowscale=FlowScaleConfig(w_min=2.0))
    with pytest.raises(ValueError, match="exclude the mean weight"):
        GRPOTrainer(config, make_reach_policy(), make_reach(8)).train()


def test_what_is_no_vector_environment_is_refused(tmp_path):
    config = dataclasses.replace(QUICK, run=str(tmp_path / "run"))
    assert config.run == tmp_path / "run"
    for env, message in ((Reach(), "env is a Reach, expected .*gym.make_vec"), ([], "env is empty")):
        with pytest.raises(ValueError, match=message):
            GRPOTrainer(config, make_reach_policy(), env)


def test_presets_are_what_they_say():
    assert (PAPER.group_size, PAPER.rollouts_per_update, PAPER.mini_batch, PAPER.updates) == (8, 256, 128, 100)
    assert TABLETOP.freeze_trunk and TABLETOP.eval_env == ("Tabletop-v0",) and SMOKE.updates == 2
    rates = [TABLETOP.learning_rate_at(update) / TABLETOP.learning_rate for update in (0, 2, 5, 30)]
    assert rates == pytest.approx([1 / 6, 0.5, 1, 1])


def test_environments_by_id():
    world = WorldConfig(num_envs=2)
    env = make_environment("Tabletop-v0", world, chunk_length=5)
    assert env.num_envs == 2 and env.single_action_space.shape == (5, 7)
    env.close()
    with pytest.raises(ValueError, match="v0"):
        make_environment("Tabletop-v3", world, chunk_length=5)
    with pytest.raises(ValueError, match="does not take the settings {'horizon': 3}"):
        make_environment("CartPole-v1", dataclasses.replace(world, horizon=3), chunk_length=5)
    assert make_environment("CartPole-v1", world, chunk_length=5).num_envs == 2
    with pytest.raises(ValueError, match="chunks have 25 commands, too many for 'Prophet-Tabletop-v0'.*1 to 20"):
        make_environment("Prophet-Tabletop-v0", world, chunk_length=25)
    with pytest.raises(ValueError, match="^chunk_length=25"):  # what the user gave
        make_environment("Prophet-Tabletop-v0", dataclasses.replace(world, chunk_length=25), chunk_length=8)


@pytest.mark.programs
def test_two_processes_learn_like_one(tmp_path):
    """torchrun on gloo: gradients, weights, metrics and whole runs equal those of one process with all rollouts."""
    from data_parallel import ALGORITHMS, learn, train

    tests = Path(__file__).parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests)])}
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         str(tests / "data_parallel.py"), str(tmp_path)],
        check=True, env=environment, timeout=250,
    )  # fmt: skip
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert [rank["world"]["size"] for rank in ranks] == [2, 2]
    for name in ALGORITHMS:
        alone = learn(name, 0, 1)
        assert torch.equal(ranks[0][name]["weights"], ranks[1][name]["weights"])
        for rank in ranks:
            torch.testing.assert_close(rank[name]["gradient"], alone["gradient"], rtol=1e-4, atol=1e-6)
            names = sorted(set(alone["metrics"]) - {"seconds_update", "log_prob_gap"})
            assert [rank[name]["metrics"][key] for key in names] == pytest.approx(
                [alone["metrics"][key] for key in names], rel=1e-3, abs=1e-5
            )
    single = train(tmp_path / "single")
    assert torch.equal(ranks[0]["train"]["weights"], ranks[1]["train"]["weights"])
    torch.testing.assert_close(ranks[0]["train"]["weights"], single["weights"], rtol=0, atol=1e-4)
    assert ranks[0]["train"]["result"] == ranks[1]["train"]["result"] == single["result"]
    assert len(lines_of(tmp_path / "run")) == 3
    assert np.isclose(lines_of(tmp_path / "run")[1]["reward_mean"], lines_of(tmp_path / "single")[1]["reward_mean"])
