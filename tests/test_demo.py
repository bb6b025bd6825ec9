"""The packaged policies, recording what they do, and the demonstration that begins with them."""

import json

import numpy as np
import pytest
import torch

from prophet_gym.data.folder import EpisodeFolder
from prophrl_agents import SmallFlowPolicy

pytestmark = pytest.mark.render


def test_packaged_policies_load_by_name():
    policy = SmallFlowPolicy.from_pretrained("tabletop-sft")
    assert (policy.chunk_length, policy.action_dim) == (8, 7)
    assert sum(parameter.numel() for parameter in policy.parameters()) <= 5_000_000
    with pytest.raises(ValueError, match=r"'tabletop-stf'.*Did you mean 'tabletop-sft'"):
        SmallFlowPolicy.from_pretrained("tabletop-stf")


def test_a_recorded_policy_repeats_and_differs_with_noise(tmp_path):
    from prophrl_agents.record import record_policy

    sets = {}
    for name, share in (("a", 0.0), ("b", 0.0), ("noisy", 1.0)):
        made = record_policy(tmp_path / name, "tabletop-sft", 2, 77, steps=10, noisy_share=share, workers=0)
        assert made == 2
        sets[name] = list(EpisodeFolder(tmp_path / name))
    for one, other, noisy in zip(*sets.values(), strict=True):
        np.testing.assert_array_equal(one.actions, other.actions)
        np.testing.assert_array_equal(one.frames, other.frames)
        np.testing.assert_array_equal(one.frames[0], noisy.frames[0])
        assert not np.allclose(one.actions, noisy.actions)
        assert (one.metadata["behaviour"], noisy.metadata["behaviour"]) == ("policy", "noisy_policy")
        assert one.labels["distractor_px"].shape == (11, 2)
    assert record_policy(tmp_path / "a", "tabletop-sft", 2, 77, steps=10, workers=0) == 0


def test_recording_plays_what_an_evaluation_plays(tmp_path):
    """The first chunk of a recorded episode is what the policy answers to the environment's observation."""
    import gymnasium as gym

    from prophrl_agents.record import record_policy

    record_policy(tmp_path, "tabletop-sft", 1, 5, steps=8, noisy_share=0.0, workers=0)
    episode = EpisodeFolder(tmp_path)[0]
    env = gym.make("Tabletop-v0")
    seen, info = env.reset(options={"snapshot": episode.snapshot()})
    np.testing.assert_array_equal(seen["image"], episode.frames[0])
    env.close()
    batch = {"image": seen["image"][None], "state": seen["state"][None], "instruction": [info["instruction"]]}
    rng = np.random.default_rng((5, 3))
    rng.random()
    generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
    chunk = SmallFlowPolicy.from_pretrained("tabletop-sft").predict_action_chunk(batch, generator)[0]
    np.testing.assert_allclose(episode.actions, chunk, atol=1e-6)


def test_what_a_policy_does_in_a_world_is_played_in_the_simulator(tmp_path):
    """Commands answer imagined frames, frames are the simulator's: chunk for chunk as an environment plays it."""
    import gymnasium as gym

    from prophrl_agents.record import record_policy

    options = {"noisy_share": 0.0, "workers": 0, "steps": 20}
    record_policy(tmp_path / "world", "tabletop-sft", 1, 5, world="Prophet-Tabletop-v0", **options)
    record_policy(tmp_path / "simulator", "tabletop-sft", 1, 5, **options)
    episode, plain = EpisodeFolder(tmp_path / "world")[0], EpisodeFolder(tmp_path / "simulator")[0]
    about = [episode.metadata[name] for name in ("behaviour", "world", "checkpoint")]
    assert about == ["policy_in_world", "Prophet-Tabletop-v0", "prophet-tabletop-tiny"]
    with pytest.raises(ValueError, match="saw the simulator, expected Prophet-Tabletop-v0; give each a folder"):
        record_policy(tmp_path / "simulator", "tabletop-sft", 2, 5, world="Prophet-Tabletop-v0", **options)
    policy, rng = SmallFlowPolicy.from_pretrained("tabletop-sft"), np.random.default_rng((5, 3))
    rng.random()
    generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
    world, simulator = (gym.make(name, chunk_length=8) for name in ("Prophet-Tabletop-v0", "Tabletop-v0"))
    seen, info = world.reset(seed=5, options={"snapshot": episode.snapshot()})
    real, _ = simulator.reset(options={"snapshot": episode.snapshot()})
    for start in (0, 8):
        batch = {"image": seen["image"][None], "state": seen["state"][None], "instruction": [info["instruction"]]}
        chunk = policy.predict_action_chunk(batch, generator)[0].numpy()
        np.testing.assert_allclose(episode.actions[start : start + 8], chunk, atol=1e-6)
        seen, real = world.step(chunk)[0], simulator.step(chunk)[0]
        assert np.abs(real["image"].astype(int) - episode.frames[start + 8]).max() <= 8  # the video codec's rounding
    np.testing.assert_allclose(plain.actions[:8], episode.actions[:8], atol=1e-6)
    assert np.abs(plain.actions[8:] - episode.actions[8:]).max() > 1e-4
    world.close()
    simulator.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noisy_share": 2.0}, "share from 0 to 1"),
        ({"world": "Prophet-Tabeltop-v0"}, r"Unknown world .*Did you mean 'Prophet-Tabletop-v0'"),
        ({"checkpoint": "mine"}, "none is named"),
        (
            {"world": "Prophet-Custom-v0", "checkpoint": "bridge"},
            r"other commands than Tabletop-v0: .*rotation='euler_xyz'",
        ),
        ({"world": "Prophet-Tabletop-v0", "checkpoint": "bridge"}, "speaks 'tabletop' actions"),
        ({"steps": 0}, "steps=0"),
        ({}, "episodes=0"),
        ({"task": "3"}, "Tabletop-v0 has no task"),
    ],
)
def test_recording_refuses_what_cannot_work(tmp_path, options, message):
    from prophrl_agents.record import record_policy

    with pytest.raises(ValueError, match=message):
        record_policy(tmp_path, "tabletop-sft", 0, 0, workers=0, **options)


@pytest.mark.programs
def test_the_demonstration_ends_in_one_page(tmp_path):
    from prophrl_agents.demo import DemoConfig, run_demo

    config = DemoConfig(out=tmp_path / "demo", updates=1, rollouts=16, starts=4, imagined=2)
    summary = run_demo(config)
    page = (config.out / "report.html").read_text()
    assert summary.splitlines()[1] in page.replace("&#x27;", "'")
    assert page.count("data:video/mp4;base64,") == 2 and "<svg" in page and "data:image/png;base64," in page
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )
    figures = json.loads((config.out / "reinforcement.json").read_text())
    rows = figures["evaluations"]["before"]["rows"]
    assert len(rows) == 4 and figures["comparison"]["starts"] == 4
    with pytest.raises(ValueError, match="updates is 0"):
        DemoConfig(updates=0)
