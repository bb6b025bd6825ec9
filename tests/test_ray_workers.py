"""Rollouts and verdicts of Ray actors are those of one process, also when workers die, are slow or fail."""

import copy
import dataclasses
import functools
import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from moody import MoodyJudge, make_moody, make_uneven, workers_of
from reach import make_reach_policy

from prophet_gym import SnapshotSet, check_judge
from prophet_gym.errors import MissingExtraError
from prophet_gym.judges import Verdict
from prophet_gym.registration import ASSETS
from prophet_gym.words import build_vocabulary
from prophrl_agents import PolicyStatistics, SmallFlowPolicy, SmallFlowPolicyConfig
from prophrl_agents.batch import RolloutBatch, Start
from prophrl_agents.config import TrainConfig, WorldConfig
from prophrl_agents.ray_judge import RayJudge
from prophrl_agents.ray_workers import RayRollouts
from prophrl_agents.rollout import collect_groups
from prophrl_agents.trainer import GRPOTrainer

pytestmark = pytest.mark.programs  # a cluster
STARTS = [Start(seed) for seed in (4, 2, 9, 7, 1, 6, 3)]


@pytest.fixture(scope="module")
def ray():
    """A cluster of two CPUs on this machine."""
    ray = pytest.importorskip("ray", reason='Ray is not installed: pip install "prophet-gym[ray]"')
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in workers with one CPU
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PYTHONPATH", str(Path(__file__).parent))  # workers import moody.py
        environment.setenv("RAY_worker_niceness", "0")  # at Ray's 15 they wait for whatever else the machine does
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20)
        yield ray
        ray.shutdown()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def moods(tmp_path_factory):
    """Where tests write what befalls a start, and environments what they did."""
    return tmp_path_factory.mktemp("moods")


@pytest.fixture(scope="module")
def rollouts(ray, moods):
    make, policy = functools.partial(make_moody, moods), make_reach_policy()
    with RayRollouts(make, policy, num_workers=2, num_cpus_per_worker=0.5, max_restarts=1) as made:
        yield made


@pytest.fixture(autouse=True)
def forget(moods):
    for path in moods.iterdir():
        path.unlink()


def assert_same(left, right, levels=0):
    """Equal to the bit, or, with ``levels``, up to so many grey levels of an image and what follows from them."""
    for field in dataclasses.fields(RolloutBatch):
        one, other = getattr(left, field.name), getattr(right, field.name)
        if isinstance(one, torch.Tensor):
            tolerance = 0.02 * levels if one.is_floating_point() else levels if field.name == "image" else 0
            one, other = (x.int() if x.dtype == torch.uint8 else x for x in (one, other))  # 0 - 1 is not 255
            torch.testing.assert_close(one, other, rtol=0, atol=tolerance, equal_nan=True, msg=f"{field.name} differ")
        elif field.name == "frames":
            assert len(one) == len(other) and all(map(np.array_equal, one, other))
        elif field.name == "starts":
            assert [start.seed for start in one] == [start.seed for start in other]
        elif field.name != "seconds":
            assert one == other, field.name


def here(policy, starts=STARTS, **options):
    return collect_groups(make_uneven(), policy, starts, 4, **{"noise_seed": 5, **options})


def test_workers_give_what_one_process_gives(rollouts):
    batch = rollouts.collect(STARTS, 4, noise_seed=5, keep_frames=True)
    assert_same(batch, here(rollouts._policy, keep_frames=True))
    assert batch.starts == tuple(STARTS) and not batch.called[8:, 2].any()  # padded to the longest task
    batch.frames[0][:] = 0  # the batch owns its memory
    with pytest.raises(ValueError, match="expected at least 3, the policy calls"):
        batch.padded(2)
    assert set(batch.seconds) == {"policy", "env", "total"}
    assert_same(rollouts.collect(STARTS[3:4], 4, noise_seed=5), here(rollouts._policy, STARTS[3:4]))
    assert_same(rollouts.collect(STARTS, 4, noise_seed=6, mode="ode"), here(rollouts._policy, noise_seed=6, mode="ode"))


def test_the_policy_is_sent_when_its_weights_or_settings_have_changed(ray, rollouts, monkeypatch):
    sent, put, policy = [], ray.put, rollouts._policy
    monkeypatch.setattr(ray, "put", lambda value: (sent.append(value), put(value))[1])
    first = rollouts.collect(STARTS, 4, noise_seed=5)
    assert not sent
    with torch.no_grad():
        policy.head.outputs.bias += 0.5
    second = rollouts.collect(STARTS, 4, noise_seed=5)
    assert len(sent) == 1 and not torch.equal(first.actions, second.actions)
    assert_same(second, here(policy))
    policy.set_flow(noise_level=0.2)
    assert_same(rollouts.collect(STARTS, 4, noise_seed=5), here(policy))
    assert len(sent) == 2


def test_a_slow_worker_does_not_hold_up_the_others(rollouts, moods):
    (moods / "4").write_text("wait 5")  # until the other worker began all starts but this one's task
    batch = rollouts.collect(STARTS, 4, noise_seed=5)
    assert_same(batch, here(rollouts._policy))
    workers = workers_of(moods)
    assert workers[4] == workers[2] and workers[4] not in [workers[start.seed] for start in STARTS[2:]]


def test_a_killed_worker_is_replaced_and_no_rollout_is_lost_or_counted_twice(rollouts, moods):
    (moods / "7").write_text("die 1")
    batch = rollouts.collect(STARTS, 4, noise_seed=5)
    assert (moods / "7").read_text() == "die 0"
    assert_same(batch, here(rollouts._policy))
    assert_same(rollouts.collect(STARTS, 4, noise_seed=5), batch)


def test_training_through_workers_is_training_in_one_process(rollouts, tmp_path):
    config = TrainConfig(
        run=tmp_path / "ray", updates=2, rollouts_per_update=16, group_size=4, mini_batch=8, learning_rate=2e-3,
        eval_every=2, eval_starts=8, videos_every=2, log_grad_every=0,
    )  # fmt: skip
    policy = copy.deepcopy(rollouts._policy)
    GRPOTrainer(config, rollouts._policy, make_uneven(), collectors=[rollouts.collect]).train()
    GRPOTrainer(dataclasses.replace(config, run=tmp_path / "here"), policy, make_uneven()).train()
    assert lines_of(tmp_path / "ray") == lines_of(tmp_path / "here") and len(lines_of(tmp_path / "ray")) == 3
    assert lines_of(tmp_path / "ray")[1]["reward_mean"] > 0
    assert all(map(torch.equal, policy.parameters(), rollouts._policy.parameters()))


def test_an_error_of_the_environment_names_the_starts_and_ends_the_workers(rollouts, moods):
    rollouts.collect(STARTS, 4, noise_seed=5)
    processes = set(workers_of(moods).values())
    (moods / "1").write_text("raise")
    with pytest.raises(ValueError, match="seed 1, seed 6.*on holiday"):
        rollouts.collect(STARTS, 4, noise_seed=5)
    assert {path.name for path in moods.glob("closed.*")} == {f"closed.{process}" for process in processes}
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{process}").exists() for process in processes):
        assert time.monotonic() < deadline, "workers are left over"
        time.sleep(0.05)
    with pytest.raises(ValueError, match="closed"):
        rollouts.collect(STARTS, 4, noise_seed=5)


def test_a_start_that_kills_its_workers_is_an_error_that_names_it(ray, moods):
    make = functools.partial(make_moody, moods)
    (moods / "7").write_text("die 9")
    with (
        RayRollouts(make, make_reach_policy(), num_workers=1, groups_per_task=1, max_restarts=0) as rollouts,
        pytest.raises(RuntimeError, match="start at seed 7: .*died over this: 1, "),
    ):
        rollouts.collect(STARTS, 4, noise_seed=5)


def test_what_cannot_work_is_refused_at_the_start(ray):
    def no_env():
        raise ValueError("no such world")

    for settings, message in [
        ({"num_workers": 0}, "num_workers is 0"),
        ({"num_workers": 3}, "3 workers with 1 CPU each need 3, the Ray cluster has 2 "),
        ({"num_workers": 1, "num_gpus_per_worker": 1}, "1 GPU each need 1, the Ray cluster has 0 "),
        ({"num_workers": 1, "groups_per_task": 0}, "groups_per_task is 0"),
        ({"num_workers": 1}, "a worker's environment: ValueError: no such world"),
    ]:
        with pytest.raises(ValueError, match=message):
            RayRollouts(no_env, make_reach_policy(), **settings)


def test_collectors_that_do_not_fit_are_refused(tmp_path):
    config = TrainConfig(run=tmp_path, rollouts_per_update=16, group_size=4, mini_batch=8)
    with pytest.raises(ValueError, match="ray_workers=1 makes environments from the ids in config.env"):
        GRPOTrainer(dataclasses.replace(config, ray_workers=1), make_reach_policy(), make_uneven())
    with pytest.raises(ValueError, match="0 collectors for 1 environments"):
        GRPOTrainer(config, make_reach_policy(), make_uneven(), collectors=[])
    with pytest.raises(ValueError, match="ray_workers is -1"):
        dataclasses.replace(config, ray_workers=-1)


def test_without_ray_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match='pip install "prophet-gym\\[ray\\]"'):
        RayJudge(lambda frames, instruction: True, 1)


def test_a_world_model_on_workers_by_one_setting(ray, tmp_path):
    """The trainer makes the workers' environments by id; rollouts, rewards and losses are those of one process."""
    config = TrainConfig(
        world=WorldConfig(num_envs=4, horizon=16, num_inference_steps=1),
        updates=1, rollouts_per_update=8, group_size=4, mini_batch=8, learning_rate=1e-3, eval_every=0,
        eval_starts=8, videos_every=0, log_grad_every=0,
    )  # fmt: skip
    batches, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)  # as Ray does for its workers: other numbers of threads round differently
    try:
        for workers in (1, 0):
            settings = dataclasses.replace(config, run=tmp_path / str(workers), ray_workers=workers)
            trainer = GRPOTrainer(settings, tabletop_policy())
            batches.append(trainer._collect(0)[0])
            trainer.train()
    finally:
        torch.set_num_threads(threads)
    assert_same(*batches, levels=2)  # another process may round a pixel of the world model differently
    for one, other in zip(lines_of(tmp_path / "1"), lines_of(tmp_path / "0"), strict=True):
        assert one == pytest.approx(other, abs=0.05, nan_ok=True)


def tabletop_policy():
    torch.manual_seed(0)
    snapshots = SnapshotSet.load(ASSETS / "tabletop" / "snapshots")
    words = build_vocabulary([snapshot.instruction for snapshot in snapshots])
    config = SmallFlowPolicyConfig(words, trunk_width=8, feature_dim=32, head_width=64, head_blocks=1)
    low, high = np.array([-0.04] * 3 + [-0.25] * 3 + [0.0]), np.array([0.04] * 3 + [0.25] * 3 + [1.0])
    statistics = PolicyStatistics((low + high) / 2, (high - low) / 4, low, high, np.zeros(8), np.ones(8))
    return SmallFlowPolicy(config, statistics)


def test_judges_on_workers(ray, moods):
    frames = [np.full((3, 8, 8, 3), level, np.uint8) for level in (250, 10, 200, 20, 240)]
    doomed = moods / "doomed"
    with RayJudge(MoodyJudge(), 2, num_cpus_per_worker=0.5, max_restarts=1) as judge:
        check_judge(judge)
        doomed.write_text("die 1")
        verdicts = judge.judge_batch(frames, ["go", "raise", "go", str(doomed), "go"])
        assert doomed.read_text() == "die 0"
        assert [verdict.success for verdict in verdicts] == [True, None, True, False, True]
        assert [verdict.score for verdict in verdicts] == pytest.approx(
            [250 / 255, np.nan, 200 / 255, 20 / 255, 240 / 255], nan_ok=True
        )
        assert "KeyError" in verdicts[1].reason and all(isinstance(verdict, Verdict) for verdict in verdicts)
        doomed.write_text("die 9")
        verdicts = judge.judge_batch(frames[:2], ["go", str(doomed)])
        assert verdicts[0].success and not verdicts[1].valid and "died over this: 2, " in verdicts[1].reason
        assert judge.judge_batch([], []) == []
    with pytest.raises(ValueError, match="closed"):
        judge(frames[0], "go")


def lines_of(run):
    """What was logged, without times."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("seconds") and "per_second" not in k} for line in lines]
