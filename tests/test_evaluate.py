"""`evaluate_world_model` on models whose scores are known: the truth itself, the frozen frame, a deaf one."""

import json
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import av
import numpy as np
import pytest
from PIL import Image

from prophet_gym.actions import ACTION_SPECS
from prophet_gym.data import Episode
from prophet_gym.metrics import Comparison, draw_strips, evaluate_world_model, save_mp4
from prophet_gym.metrics.evaluate import block_truth, derangement
from prophet_gym.metrics.fidelity import PSNR_CAP
from prophet_gym.metrics.scores import Bootstrap

STEPS = 10
SPEC = ACTION_SPECS["tabletop"]


def make_episode(index: int, moves: bool = True) -> Episode:
    """A red block that slides over a textured table; the commands say how."""
    rng = np.random.default_rng(index)
    velocity = rng.choice([-1, 1], 2) * rng.uniform(0.6, 1.4, 2) * moves
    px = np.array([32.0, 32.0]) + np.arange(STEPS + 1)[:, None] * velocity
    table = np.array([168, 161, 148]) + rng.integers(-6, 6, (64, 64, 1))
    frames = np.repeat(table[None], STEPS + 1, axis=0)
    for frame, (u, v) in zip(frames, px.round().astype(int), strict=True):
        frame[v - 3 : v + 4, u - 3 : u + 4] = (209, 33, 31)
    actions = np.zeros((STEPS, 7), np.float32)
    actions[:, :2] = velocity * 0.01
    return Episode(
        images=frames.astype(np.uint8),
        actions=actions,
        action_spec=SPEC,
        instruction="push the red block",
        fps=10.0,
        eef_pose=np.tile(np.eye(4), (STEPS + 1, 1, 1, 1)),
        gripper=np.ones((STEPS + 1, 1)),
        success=index % 2 == 0,
        labels={"block_px": px.round(), "block_visible": np.full(STEPS + 1, 49)},
        name=f"episode_{index}",
        metadata={"behaviour": "expert" if index % 2 == 0 else "random"},
    )


@dataclass
class KnownModel:
    """A deterministic WorldModel. `obey`: replay the real frames of the *commands*; otherwise freeze the start."""

    episodes: list[Episode]
    obey: bool
    chunk_length: int = 4
    image_size: tuple[int, int] = (64, 64)
    num_effectors: int = 1
    action_spec: object = SPEC
    num_inference_steps: int = 1
    requires_camera: bool = False
    checkpoint_info: dict = field(default_factory=lambda: {"name": "known"})
    batches: list[int] = field(default_factory=list)

    def begin(self, snapshots, seeds):
        assert len(snapshots) == len(seeds)
        return SimpleNamespace(images=np.stack([s.image for s in snapshots]), t=0)

    def predict(self, state, actions, num_inference_steps=None):
        batch, length = actions.shape[:2]
        assert length <= self.chunk_length and actions.shape[2:] == (1, 7)
        self.batches.append(batch)
        frames = np.repeat(state.images[:, None], length, axis=1)
        if self.obey:
            for slot, commands in enumerate(actions):
                now = slice(state.t, state.t + length)
                source = next(e for e in self.episodes if np.array_equal(e.canonical_actions[now], commands))
                frames[slot] = source.frames[1:][now]
        return frames, SimpleNamespace(images=state.images, t=state.t + length)


@pytest.fixture(scope="module")
def episodes() -> list[Episode]:
    return [make_episode(i) for i in range(6)]


@pytest.fixture(scope="module")
def evaluated(episodes, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluation")
    model = KnownModel(episodes, obey=True)
    return evaluate_world_model(model, episodes, steps=STEPS, batch_size=4, out=out), out, model


def value(result, predictor, metric, group="all", horizon=STEPS):
    return result["groups"][group]["horizons"][str(horizon)]["predictors"][predictor][metric]["value"]


def test_the_truth_scores_perfectly(evaluated):
    result, _, model = evaluated
    for horizon in (8, STEPS):
        perfect = {"psnr": PSNR_CAP, "ssim": 1, "tssim": 1, "epe_mean": 0, "cos_mean": 1}
        figures = {metric: value(result, "model", metric, horizon=horizon) for metric in perfect}
        assert figures == pytest.approx(perfect, abs=1e-4)
    assert value(result, "model", "block_within") == 1 and value(result, "model", "block_lost") == 0
    assert value(result, "model", "block_error") == pytest.approx(value(result, "real", "block_error"))
    assert value(result, "real", "block_error") < 0.2
    assert model.batches == [4] * 6 + [2] * 6  # true and shuffled commands in chunks of 4, 4, 2


def test_the_frozen_frame_equals_its_baseline(episodes):
    result = evaluate_world_model(KnownModel(episodes, obey=False), episodes, steps=STEPS)
    rows = result["groups"]["all"]["horizons"][str(STEPS)]
    np.testing.assert_equal(rows["predictors"]["model"], rows["predictors"]["last_frame"])
    np.testing.assert_equal(result["per_frame"]["model"], result["per_frame"]["last_frame"])
    assert rows["against"]["psnr_over_last_frame"]["value"] == 0
    assert rows["against"]["epe_ratio_to_last_frame"]["value"] == 1
    assert rows["against"]["epe_ratio_of_shuffled"]["value"] == 1  # deaf to its actions
    assert np.isnan(rows["predictors"]["model"]["cos_mean"]["value"])
    assert rows["predictors"]["model"]["cos_defined"]["value"] == 0
    assert rows["predictors"]["model"]["block_within"]["value"] == 0
    assert rows["predictors"]["model"]["block_lost"]["value"] == 0


def test_shuffled_commands_and_last_frame_are_worse_than_the_truth(evaluated):
    result = evaluated[0]
    against = result["groups"]["all"]["horizons"][str(STEPS)]["against"]
    assert against["psnr_over_last_frame"]["value"] > 20 and against["psnr_over_shuffled"]["value"] > 20
    assert against["epe_ratio_to_last_frame"]["value"] == 0
    assert value(result, "last_frame", "epe_mean") > 0
    names = [row["name"] for row in result["episodes"]]
    assert sorted(row["partner"] for row in result["episodes"]) == sorted(names)
    assert all(row["partner"] != row["name"] for row in result["episodes"])


def test_subsets_and_intervals(evaluated):
    result = evaluated[0]
    assert {name: group["n"] for name, group in result["groups"].items()} == {
        "all": 6, "success": 3, "failure": 3, "expert": 3, "random": 3,
    }  # fmt: skip
    figure = result["groups"]["all"]["horizons"]["8"]["predictors"]["last_frame"]["psnr"]
    assert figure["low"] < figure["value"] < figure["high"] and figure["n"] == 6
    assert result["groups"]["success"]["horizons"]["8"]["predictors"]["last_frame"]["psnr"]["n"] == 3
    assert len(result["per_frame"]["model"]["psnr"]) == STEPS


def test_the_files(evaluated):
    result, out, _ = evaluated
    stored = json.loads((out / "metrics.json").read_text())
    assert stored["groups"]["all"]["n"] == 6
    assert stored["groups"]["all"]["horizons"]["8"]["predictors"]["last_frame"]["cos_mean"]["value"] is None
    page = (out / "report.md").read_text()
    for text in ("**model**", "last frame repeated", "shuffled actions", "tracker check", "100.00 [100.00, 100.00]"):
        assert text in page
    with Image.open(out / "strips.png") as picture:
        assert picture.width > 1000
    with av.open(str(out / "rollouts.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert sum(1 for _ in container.decode(stream)) == STEPS + 1
    assert result["seconds"]["total"] > result["seconds"]["model"] > 0


def test_equal_seeds_give_equal_results(episodes):
    results = [evaluate_world_model(KnownModel(episodes, True), episodes, STEPS, batch_size=b, seed=3) for b in (2, 6)]
    for result in results:
        result.pop("seconds")
    np.testing.assert_equal(*results)


def test_episodes_without_labels_or_motion():
    still = [make_episode(i, moves=False) for i in range(2)]
    unlabelled = [Episode(**{**e.__dict__, "labels": {}, "success": None, "metadata": {}}) for e in still]
    result = evaluate_world_model(KnownModel(unlabelled, True), unlabelled, steps=4)
    assert list(result["groups"]) == ["all"]
    row = result["groups"]["all"]["horizons"]["4"]["predictors"]["model"]
    assert row["block_within"]["n"] == row["cos_mean"]["n"] == 0
    row = evaluate_world_model(KnownModel(still, True), still, steps=4)["groups"]["all"]["horizons"]["4"]
    assert row["predictors"]["model"]["block_within"]["n"] == 0


def test_a_crop_hides_the_block_that_lies_beside_it():
    """`block_visible` counts pixels of the recording: a crop leaves it as it is."""
    whole = make_episode(0)
    px = whole.labels["block_px"]
    px[:4] = (40, 70), (70, 40), (-5, 40), (-2, 40)
    shown = np.array([60, 59, 58, 57] + [49] * (STEPS - 3))
    cropped = replace(whole, labels={"block_px": px, "block_visible": shown})
    truth = block_truth(cropped, STEPS)
    assert truth.visible.tolist() == [False] * 3 + [True] * (STEPS - 2)  # at -2 a third of the block is in view
    assert truth.color.tolist() == [209, 33, 31]
    away = replace(whole, labels={"block_px": px + 100, "block_visible": shown})
    assert block_truth(away, STEPS) is None
    evaluate_world_model(KnownModel([cropped, away], True), [cropped, away], steps=STEPS)


@pytest.mark.parametrize("n", [2, 3, 7, 100])
def test_a_derangement_has_no_fixed_point(n):
    partner = derangement(n, seed=n)
    assert sorted(partner) == list(range(n)) and not np.any(partner == np.arange(n))
    assert np.array_equal(partner, derangement(n, seed=n))


def test_bootstrap_intervals_cover_a_known_mean():
    rng, hits = np.random.default_rng(0), 0
    for trial in range(60):
        figure = Bootstrap(80, trial).mean(rng.normal(5.0, 2.0, 80))
        hits += figure["low"] <= 5.0 <= figure["high"]
    assert hits >= 52
    values = rng.uniform(1, 2, 50)
    assert Bootstrap(50, 0).ratio(3 * values, values) == pytest.approx({"value": 3, "low": 3, "high": 3, "n": 50})


def test_bad_input_is_refused(episodes):
    model = KnownModel(episodes, True)
    with pytest.raises(ValueError, match="1 episode.*at least 2"):
        evaluate_world_model(model, episodes[:1], steps=STEPS)
    with pytest.raises(ValueError, match="'episode_0' has 10 commands, expected at least steps=40"):
        evaluate_world_model(model, episodes)
    with pytest.raises(ValueError, match="steps is 0"):
        evaluate_world_model(model, episodes, steps=0)
    model.action_spec = ACTION_SPECS["bridge"]
    with pytest.raises(ValueError, match="'servo' deltas, the model was trained on 'difference'"):
        evaluate_world_model(model, episodes, steps=STEPS)
    with pytest.raises(ValueError, match="even H and W"):
        save_mp4("x.mp4", np.zeros((2, 31, 32, 3), np.uint8), 10)
    with pytest.raises(ValueError, match="one common"):
        draw_strips([])
    frames = episodes[0].frames
    with pytest.raises(ValueError, match="one common"):
        draw_strips([Comparison("a", frames, frames), Comparison("b", frames[:5], frames[:5])])
