import dataclasses
import json
import math

import numpy as np
import pytest

from prophet_gym.judges import (
    ClassifierConfig,
    ClassifierJudge,
    Judge,
    LabelledRollout,
    OracleJudge,
    Verdict,
    as_judge,
    auc,
    calibration_report,
    evaluate_judge,
    format_calibration,
    pick_threshold,
    wilson_interval,
)
from prophet_gym.judges.network import frame_indices
from prophet_gym.words import build_vocabulary, encode_instruction

INSTRUCTION = "put the red block on the blue plate"


def random_frames(seed, length=6, size=32):
    return np.random.default_rng(seed).integers(0, 256, (length, size, size, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def judge():
    vocabulary = build_vocabulary([INSTRUCTION, "Push the green block, left!"])
    return ClassifierJudge(ClassifierConfig(vocabulary, image_size=(32, 32), width=16), seed=3)


# --- verdicts and protocol ---


def test_verdict_fields_must_agree():
    assert Verdict(True, 0.9).to_dict() == {"success": True, "score": 0.9, "votes": [], "valid": True, "reason": ""}
    abstention = Verdict.abstain("server down")
    assert abstention.success is None and not abstention.valid and abstention.to_dict()["score"] is None
    for arguments, message in [
        ((None, 0.5), "abstain"),
        ((True, 1.5), r"\[0, 1\]"),
        ((True, math.nan), "NaN"),
        ((True, 0.5, (), False, "why"), "success=None"),
        ((None, 0.5, (), False, ""), "reason"),
    ]:
        with pytest.raises(ValueError, match=message):
            Verdict(*arguments)


def test_any_callable_becomes_a_judge():
    frames = random_frames(0)
    assert as_judge(lambda f, i: True)(frames, INSTRUCTION) == Verdict(True, 1.0)
    assert as_judge(lambda f, i: 0.4)(frames, INSTRUCTION) == Verdict(False, 0.4)
    assert as_judge(lambda f, i: np.float32(0.25), threshold=0.25)(frames, INSTRUCTION).success is True
    assert as_judge(lambda f, i: Verdict.abstain("blurred"))(frames, INSTRUCTION).reason == "blurred"
    brightness = as_judge(lambda f, i: float(f.mean() / 255))
    verdicts = brightness.judge_batch([frames // 2, frames], [INSTRUCTION] * 2)
    assert isinstance(brightness, Judge) and verdicts[0].score < verdicts[1].score
    assert as_judge(brightness) is brightness


def test_as_judge_refuses_what_is_not_one():
    with pytest.raises(ValueError, match="must be callable.*int"):
        as_judge(3)
    with pytest.raises(ValueError, match="instance, got the class OracleJudge"):
        as_judge(OracleJudge)
    with pytest.raises(ValueError, match="answered 'yes'"):
        as_judge(lambda f, i: "yes")(random_frames(0), INSTRUCTION)
    with pytest.raises(ValueError, match="answered 7"):
        as_judge(lambda f, i: 7)(random_frames(0), INSTRUCTION)


@pytest.mark.parametrize(
    ("frames", "instruction", "message"),
    [
        (random_frames(0).astype(np.float32), INSTRUCTION, "uint8.*float32"),
        ([1, 2], INSTRUCTION, "uint8.*list"),
        (random_frames(0)[..., :1], INSTRUCTION, "RGB.*1\\)"),
        (random_frames(0)[0], INSTRUCTION, "RGB"),
        (random_frames(0)[:1], INSTRUCTION, "at least 2 frames.*T = 1"),
        (random_frames(0), "  ", "non-empty instruction"),
    ],
)
def test_bad_rollouts_are_refused_by_every_judge(judge, frames, instruction, message):
    for each in (judge, as_judge(lambda f, i: True), OracleJudge(lambda: True)):
        with pytest.raises(ValueError, match=message):
            each(frames, instruction)
    with pytest.raises(ValueError, match="Rollout 1: .*" + message):
        judge.judge_batch([random_frames(0), frames], [INSTRUCTION, instruction])


def test_batch_needs_one_instruction_each(judge):
    with pytest.raises(ValueError, match="2 rollouts and 1 instructions"):
        judge.judge_batch([random_frames(0)] * 2, [INSTRUCTION])
    with pytest.raises(ValueError, match="one string"):
        judge.judge_batch([random_frames(0)] * 2, INSTRUCTION)
    assert judge.judge_batch([], []) == []


# --- oracle ---


class Lamp:
    """The smallest simulator: a lamp that is on or off."""

    on = False

    def is_success(self):
        return self.on


def test_oracle_follows_its_simulator():
    lamp = Lamp()
    oracle = OracleJudge(lamp)
    assert oracle(random_frames(0), INSTRUCTION) == Verdict(False, 0.0)
    lamp.on = True
    assert oracle.judge_batch([random_frames(0)], [INSTRUCTION]) == [Verdict(True, 1.0)]
    with pytest.raises(ValueError, match="one rollout at a time, got 2"):
        oracle.judge_batch([random_frames(0)] * 2, [INSTRUCTION] * 2)
    with pytest.raises(ValueError, match="is_success"):
        OracleJudge(object())


# --- classifier ---


def test_instruction_encoding_knows_order_and_limits():
    vocabulary = build_vocabulary([INSTRUCTION])
    forward, _ = encode_instruction("Put the red block on the blue plate.", vocabulary, 16)
    swapped, _ = encode_instruction("put the blue block on the red plate", vocabulary, 16)
    assert forward == encode_instruction(INSTRUCTION, vocabulary, 16)[0] and sorted(forward) == sorted(swapped)
    assert forward != swapped and len(forward) == 16
    assert "unknown words ['fold', 'towel']" in encode_instruction("fold the towel", vocabulary, 16)[1]
    assert "8 words, expected 1 to 4" in encode_instruction(INSTRUCTION, vocabulary, 4)[1]
    assert encode_instruction("!?", vocabulary, 4)[0] == []


def test_frame_indices_first_then_late():
    assert frame_indices(41, (0, 2, 5)) == [0, 35, 38, 40]
    assert frame_indices(3, (0, 2, 5)) == [0, 0, 0, 2]


def test_classifier_is_deterministic_and_independent_of_its_batch(judge):
    frames = [random_frames(seed, length) for seed, length in enumerate((6, 9, 2, 30))]
    batch = judge.judge_batch(frames, [INSTRUCTION] * 4)
    assert batch == judge.judge_batch(frames, [INSTRUCTION] * 4)
    for rollout, verdict in zip(frames, batch, strict=True):
        assert judge(rollout, INSTRUCTION).score == pytest.approx(verdict.score, abs=1e-6)
    assert judge(frames[0], "push the green block left").score != judge(frames[0], INSTRUCTION).score


def test_classifier_abstains_on_unknown_words_only_for_that_rollout(judge):
    verdicts = judge.judge_batch([random_frames(0)] * 2, ["fold the towel", INSTRUCTION])
    assert [verdict.valid for verdict in verdicts] == [False, True]
    assert verdicts[0].success is None and "towel" in verdicts[0].reason and math.isnan(verdicts[0].score)


def test_classifier_abstains_within_its_margin(judge):
    score = judge(random_frames(0), INSTRUCTION).score
    careful = dataclasses.replace(judge.config, threshold=round(score, 3), abstain_margin=0.1)
    verdict = ClassifierJudge(careful, judge.network)(random_frames(0), INSTRUCTION)
    assert not verdict.valid and "within 0.1 of the threshold" in verdict.reason
    assert verdict.score == pytest.approx(score)


def test_classifier_names_the_size_it_was_trained_on(judge):
    with pytest.raises(ValueError, match=r"\(32, 32\), got \(64, 64\)"):
        judge(random_frames(0, size=64), INSTRUCTION)


def test_default_network_is_small():
    network = ClassifierJudge(ClassifierConfig(tuple("abcdefghijklmnopqrst"))).network
    assert sum(parameter.numel() for parameter in network.parameters()) <= 400_000


def test_save_and_load(judge, tmp_path):
    judge.save_pretrained(tmp_path)
    first = ClassifierJudge.from_pretrained(tmp_path)
    assert first.config == judge.config
    first.save_pretrained(tmp_path)  # half precision is reached once: the second round trip changes nothing
    second = ClassifierJudge.from_pretrained(tmp_path)
    frames = random_frames(1)
    assert first(frames, INSTRUCTION) == second(frames, INSTRUCTION)
    assert first(frames, INSTRUCTION).score == pytest.approx(judge(frames, INSTRUCTION).score, abs=1e-2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["judge.json", "judge.safetensors"]


def test_a_device_that_is_not_there_is_named(judge, tmp_path):
    judge.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"device='gpu': expected a device of torch"):
        ClassifierJudge.from_pretrained(tmp_path, device="gpu")


def test_bad_checkpoints_are_named(judge, tmp_path):
    with pytest.raises(ValueError, match="missing.*prophet judge train"):
        ClassifierJudge.from_pretrained(tmp_path)
    judge.save_pretrained(tmp_path)
    config_file, weights_file = tmp_path / "judge.json", tmp_path / "judge.safetensors"
    config, weights = config_file.read_text(), weights_file.read_bytes()
    for text, message in [
        (config[:40], "not valid JSON"),
        ("{}", "does not describe"),
        (json.dumps({**json.loads(config), "layers": 3}), r"unknown \['layers'\]"),
        (json.dumps({**json.loads(config), "threshold": "0.5"}), "does not fit its weights"),
        (json.dumps({**json.loads(config), "threshold": 1.5}), r"does not fit .*in \[0, 1\], got 1.5"),
        (json.dumps({**json.loads(config), "width": 24}), "does not fit its weights"),
    ]:
        config_file.write_text(text)
        with pytest.raises(ValueError, match=message):
            ClassifierJudge.from_pretrained(tmp_path)
    config_file.write_text(config)
    weights_file.write_bytes(weights[:-100])
    with pytest.raises(ValueError, match="digest"):
        ClassifierJudge.from_pretrained(tmp_path)


# --- calibration ---


def test_wilson_interval_matches_published_values():
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_auc_closed_form():
    labels = np.array([False, False, True, True])
    assert auc(np.array([0.1, 0.4, 0.35, 0.8]), labels) == 0.75
    assert auc(np.full(4, 0.5), labels) == 0.5
    assert math.isnan(auc(np.ones(2), np.array([True, True])))


def test_threshold_sits_in_the_gap_and_recall_pulls_it_down():
    labels = np.array([False, False, True, True])
    assert pick_threshold(np.array([0.1, 0.2, 0.6, 0.9]), labels) == pytest.approx(0.4)
    scores = np.array([0.1, 0.1, 0.4, 0.4, 0.3, 0.8, 0.8, 0.8])
    labels = np.array([False] * 4 + [True] * 4)
    assert pick_threshold(scores, labels, beta=3.0) == pytest.approx(0.2)
    assert pick_threshold(scores, labels, beta=0.5) == pytest.approx(0.6)
    with pytest.raises(ValueError, match="at least one success"):
        pick_threshold(scores, np.zeros(8, bool))


def test_report_rates_are_those_of_equation_33():
    verdicts = [Verdict(True, 0.9)] * 6 + [Verdict(False, 0.1)] * 2 + [Verdict(True, 0.8), Verdict(False, 0.2)]
    labels = np.array([True] * 8 + [False] * 2)
    report = calibration_report([*verdicts, Verdict.abstain("no idea")], np.append(labels, True))
    assert (report["n"], report["successes"], report["abstained"]) == (11, 9, 1)
    assert report["precision"]["value"] == pytest.approx(6 / 7)
    assert report["recall"]["value"] == pytest.approx(6 / 8)
    assert report["fpr"]["value"] == pytest.approx(1 / 2)
    assert report["recall"]["low"] < 0.75 < report["recall"]["high"]
    assert report["auc"]["low"] <= report["auc"]["value"] <= report["auc"]["high"]
    row = next(row for row in report["thresholds"] if row["threshold"] == 0.5)
    assert row["recall"] == pytest.approx(0.75)


def test_evaluate_judge_by_behaviour_and_source():
    success = {"expert": [False] * 3 + [True], "random": [False] * 4}
    rollouts = [
        LabelledRollout(random_frames(i, 4), INSTRUCTION, np.array(success[who]), f"e{i}", who, source)
        for i, (who, source) in enumerate([("expert", "real"), ("random", "real"), ("expert", "imagined")] * 4)
    ]
    report = evaluate_judge(as_judge(lambda frames, instruction: True), rollouts, batch_size=5, bootstrap=50)
    assert json.loads(json.dumps(report)) == report
    assert report["behaviours"]["random"] | {"fpr": 0} == {
        "n": 4, "successes": 0, "abstained": 0, "fpr": 0, "auc": {"value": None, "low": 0.0, "high": 1.0},
        "precision": {"value": 0.0, "low": 0.0, "high": pytest.approx(0.49, abs=0.01)},
        "recall": {"value": None, "low": 0.0, "high": 1.0},
    }  # fmt: skip
    assert report["sources"]["imagined"]["precision"]["value"] == 1.0
    text = format_calibration(report)
    assert "imagined" in text and "expert" in text and "0.667 [" in text
    with pytest.raises(ValueError, match="at least one"):
        evaluate_judge(as_judge(lambda f, i: True), [])


def test_labels_must_fit_the_frames():
    with pytest.raises(ValueError, match=r"'e0'.*bool of shape \(4\,\)"):
        LabelledRollout(random_frames(0, 4), INSTRUCTION, np.zeros(3, bool), "e0")
