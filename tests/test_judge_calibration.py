"""Where a judge draws the line, and what its scores mean."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from prophet_gym.actions import ACTION_SPECS
from prophet_gym.cli import main
from prophet_gym.data.episode import Episode
from prophet_gym.data.folder import write_episode
from prophet_gym.errors import MissingExtraError
from prophet_gym.judges import (
    Answer,
    ClassifierConfig,
    ClassifierJudge,
    LabelledRollout,
    Objective,
    TransformersBackend,
    Verdict,
    VLMConfig,
    VLMJudge,
    as_judge,
    calibrate_judge,
    choose_threshold,
    draw_calibration,
    expected_calibration_error,
    format_operating_point,
    open_judge,
    pick_threshold,
)
from prophet_gym.judges.decision import DecisionRule
from prophet_gym.judges.operating_point import point_figures
from prophet_gym.judges.operating_report import advice, apply_threshold, calibration_files
from prophet_gym.snapshot import SnapshotSet

SCORES = np.array([0.95, 0.9, 0.8, 0.7, 0.6, 0.55, 0.4, 0.3, 0.2, 0.1])
LABELS = np.array([1, 1, 1, 0, 1, 1, 0, 1, 0, 0], bool)


def rollout(score: float, label: bool, name: str, source: str = "real") -> LabelledRollout:
    """A grey film; its brightness is the score that the judges below read from it."""
    frames = np.full((4, 16, 16, 3), round(score * 250), np.uint8)
    return LabelledRollout(frames, "lift it", np.array([False] * 3 + [bool(label)]), name, source=source)


ROLLOUTS = [rollout(s, y, f"e{i}") for i, (s, y) in enumerate(zip(SCORES, LABELS, strict=True))]


class Brightness:
    """Judges by brightness, with a threshold."""

    def __init__(self, rule: DecisionRule) -> None:
        self.rule, self.asked = rule, 0

    def __call__(self, frames: np.ndarray, instruction: str) -> Verdict:
        self.asked += 1
        score = float(frames.mean() / 250)
        if not self.rule.decided(score):
            return Verdict.abstain("too close", score)
        return Verdict(bool(self.rule.success(score)), score)

    def judge_batch(self, frames: list[np.ndarray], instructions: list[str]) -> list[Verdict]:
        return [self(each, words) for each, words in zip(frames, instructions, strict=True)]


class Voters:
    """A backend of which as large a share votes for success as the pictures are bright; black pictures get no votes."""

    takes_video = False
    identity = {"backend": "voters"}

    def ask(self, questions: list, sampling: object, done: Callable) -> list[list[Answer]]:
        import io

        from PIL import Image

        answers = []
        for question in questions:
            share = np.asarray(Image.open(io.BytesIO(question.images[-1]))).mean() / 250
            ayes, count = round(share * len(question.seeds)), len(question.seeds)
            boxes = ["Success"] * ayes + ["Failure"] * (count - ayes)
            order = np.random.default_rng(question.seeds[0]).permutation(count)
            answers.append([Answer(f"\\box{{{boxes[i]}}}" if share > 0 else "no idea") for i in order])
            done(len(answers) - 1, answers[-1])
        return answers


# --- the rule ---


def test_a_rule_decides_abstains_and_breaks_no_ties() -> None:
    scores = np.array([0.2, 0.49, 0.5, 0.6, np.nan])
    assert DecisionRule().decided(scores).tolist() == [True, True, True, True, False]
    assert DecisionRule().success(scores[:4]).tolist() == [False, False, True, True]
    assert DecisionRule(margin=0.1).decided(scores).tolist() == [True, False, False, True, False]
    assert DecisionRule(tie_abstains=True).decided(scores).tolist() == [True, True, False, True, False]
    with pytest.raises(ValueError, match=r"threshold=1.2.*in \[0, 1\]"):
        DecisionRule(1.2)


def test_three_of_five_votes_have_a_margin_of_one_fifth_whatever_floats_say() -> None:
    judge = VLMJudge(Voters(), VLMConfig(image_size=16, min_margin=0.2))
    assert [v.success for v in judge.judge_batch([rollout(s, True, "x").frames for s in (0.6, 0.4)], ["go"] * 2)] == [
        True,
        False,
    ]


def test_a_lower_threshold_lets_two_of_five_votes_suffice() -> None:
    frames = [rollout(share, True, "x").frames for share in (0.2, 0.4, 0.6)]
    for threshold, expected in ((0.5, [False, False, True]), (0.3, [False, True, True]), (0.7, [False] * 3)):
        verdicts = VLMJudge(Voters(), VLMConfig(image_size=16, threshold=threshold)).judge_batch(frames, ["go"] * 3)
        assert [verdict.success for verdict in verdicts] == expected
    tie = VLMJudge(Voters(), VLMConfig(image_size=16, threshold=0.4))(frames[1], "go")
    assert not tie.valid and "margin of 0.00" in tie.reason
    with pytest.raises(ValueError, match="threshold=1.0: expected a share or probability between 0 and 1"):
        VLMConfig(threshold=1.0)


# --- choosing ---


def test_the_precision_objective_takes_the_highest_recall_that_is_clean_enough() -> None:
    # From the top: 3 of 3, 3 of 4, 4 of 5, 5 of 6, 5 of 7, 6 of 8, ... are right.
    assert choose_threshold(SCORES, LABELS, Objective("precision", target=0.9)) == pytest.approx(0.75)
    assert choose_threshold(SCORES, LABELS, Objective("precision", target=0.8)) == pytest.approx(0.475)
    assert choose_threshold(SCORES, LABELS, Objective("precision", target=0.75)) == pytest.approx(0.25)
    # 5 of 6 has a Wilson interval from 0.436, 3 of 3 one from 0.4385, 6 of 8 one from 0.409.
    bounded = Objective("precision", target=0.43, lower_bound=True)
    assert choose_threshold(SCORES, LABELS, bounded) == pytest.approx(0.475)
    assert choose_threshold(SCORES, LABELS, replace(bounded, target=0.437)) == pytest.approx(0.75)
    with pytest.raises(
        ValueError, match="No threshold has a lower bound of the precision of 0.9; the highest is 0.439"
    ):
        choose_threshold(SCORES, LABELS, replace(bounded, target=0.9))


def test_f_beta_takes_what_trying_every_threshold_takes() -> None:
    rng = np.random.default_rng(0)
    labels = rng.random(60) < 0.5
    scores = np.clip(rng.normal(0.35 + 0.3 * labels, 0.2), 0, 1).round(2)
    for beta in (0.5, 1.5, 3.0):
        chosen = pick_threshold(scores, labels, beta=beta)
        best = max(point_figures(scores, labels, DecisionRule(t / 1000), beta=beta)["f_beta"] for t in range(1001))
        assert point_figures(scores, labels, DecisionRule(chosen), beta=beta)["f_beta"] == pytest.approx(best)
    assert pick_threshold(scores, labels, beta=3.0) < pick_threshold(scores, labels, beta=0.5)
    with pytest.raises(ValueError, match="got 1 NaN"):
        pick_threshold(np.array([np.nan, 0.5]), np.array([True, False]))


def test_what_lies_within_the_margin_enters_no_rate() -> None:
    figures = point_figures(SCORES, LABELS, DecisionRule(0.5, 0.15))
    assert figures["abstained"] == 3  # 0.6, 0.55 and 0.4
    assert figures["precision"]["value"] == 0.75 and figures["recall"]["value"] == 0.75
    assert figures["fpr"]["value"] == pytest.approx(1 / 3)
    assert figures["f_beta"] == pytest.approx(0.75)


def test_objectives_are_checked() -> None:
    for arguments, message in (
        ({"kind": "recall"}, 'expected "fbeta" or "precision"'),
        ({"target": 1.0}, "between 0 and 1"),
        ({"beta": 0.0}, "above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            Objective(**arguments)


# --- calibration error ---


def test_expected_calibration_error_is_the_mean_gap_of_the_bins() -> None:
    scores = np.array([0.15] * 4 + [0.85] * 6)
    labels = np.array([True, False, False, False] + [True] * 6)
    assert expected_calibration_error(scores, labels) == pytest.approx(0.4 * 0.10 + 0.6 * 0.15)
    assert expected_calibration_error(np.array([0.0, 1.0]), np.array([False, True])) == 0.0
    assert expected_calibration_error(np.array([]), np.array([], bool)) is None


# --- the report ---


def test_a_calibration_says_what_the_judge_itself_would_say_at_the_new_threshold() -> None:
    judge = Brightness(DecisionRule(0.5, 0.06))
    report = calibrate_judge(judge, ROLLOUTS, Objective("precision", target=0.8), bootstrap=20)
    assert judge.asked == len(ROLLOUTS), "every rollout is judged once"
    assert json.loads(json.dumps(report)) == report
    again = calibrate_judge(Brightness(DecisionRule(report["threshold"], 0.06)), ROLLOUTS, bootstrap=20)
    assert again["now"] == report["chosen"] and report["now"]["abstained"] == 1
    assert report["chosen"]["precision"]["value"] >= 0.8
    grid = [row["threshold"] for row in report["thresholds"]]
    assert grid == sorted(grid) and report["threshold"] in grid and 0.35 in grid
    assert report["votes"] == report["margins"] == []


def test_the_rollouts_that_choose_can_be_named_and_all_are_reported() -> None:
    darker = [rollout(s / 2, y, f"e{i}", "imagined") for i, (s, y) in enumerate(zip(SCORES, LABELS, strict=True))]
    both = [*ROLLOUTS, *darker]
    chosen = {}
    for select in ("all", "real", "imagined"):
        report = calibrate_judge(Brightness(DecisionRule()), both, select=select, bootstrap=20)
        chosen[select] = report["threshold"]
        assert sorted(report["sources"]) == ["imagined", "real"]
        assert report["chosen"]["n"] == (20 if select == "all" else 10)
    assert chosen["imagined"] == pytest.approx(chosen["real"] / 2, abs=0.01)
    assert report["sources"]["imagined"]["chosen"] == {k: v for k, v in report["chosen"].items() if k != "threshold"}
    with pytest.raises(ValueError, match=r"select='imagined': there are rollouts of \['real'\] only"):
        calibrate_judge(Brightness(DecisionRule()), ROLLOUTS, select="imagined")
    with pytest.raises(ValueError, match="FunctionJudge has no threshold"):
        calibrate_judge(as_judge(lambda frames, instruction: True), ROLLOUTS)


def test_votes_and_margins_trade_abstentions_for_certainty() -> None:
    rollouts = [
        rollout(s, y, f"v{i}") for i, (s, y) in enumerate([(1.0, 1), (0.8, 1), (0.6, 0), (0.4, 1), (0.2, 0)] * 4)
    ]
    rollouts.append(rollout(0.0, False, "unreadable"))
    config = VLMConfig(image_size=16, threshold=0.5, prompt="general")
    report = calibrate_judge(VLMJudge(Voters(), config), rollouts, Objective(beta=1.0), bootstrap=20)
    assert [row["votes"] for row in report["votes"]] == [1, 2, 3, 4, 5]
    at_five = {name: value for name, value in report["votes"][-1].items() if name != "votes"}
    assert at_five == {k: v for k, v in report["chosen"].items() if k != "threshold"}, "all votes are the judge itself"
    assert all(row["abstained"] >= 1 for row in report["votes"]), "what cannot be read stays undecided"
    rows = calibrate_judge(VLMJudge(Voters(), config), rollouts, Objective("precision", target=0.7))["margins"]
    abstained = [row["abstained"] for row in rows]
    assert rows[0]["min_margin"] == 0 and abstained == sorted(abstained) and abstained[-1] > abstained[0]
    for row in rows:  # each says what the judge does with it
        threshold = calibrate_judge(VLMJudge(Voters(), config), rollouts, Objective("precision", target=0.7))[
            "threshold"
        ]
        careful = VLMJudge(Voters(), replace(config, min_margin=row["min_margin"], threshold=threshold))
        verdicts = careful.judge_batch([r.frames for r in rollouts], ["lift it"] * len(rollouts))
        assert sum(not verdict.valid for verdict in verdicts) == row["abstained"]


def test_the_text_shows_the_choice_and_repeats_the_papers_advice() -> None:
    report = calibrate_judge(Brightness(DecisionRule()), ROLLOUTS, Objective("precision", target=0.9), bootstrap=20)
    text = format_operating_point(report)
    assert "the highest recall at a precision of at least 0.9 on all rollouts" in text
    assert "<- chosen" in text and "a moderate FPR is tolerated while precision holds" in text
    assert "Recall on real rollouts is 0.50" in "\n".join(advice(report)), "a low recall is called out"
    good = calibrate_judge(Brightness(DecisionRule()), [ROLLOUTS[0], ROLLOUTS[-1]], bootstrap=20)
    assert len(advice(good)) == 2


def test_the_diagram_has_a_panel_for_votes_only_where_there_are_votes(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    plain = calibrate_judge(Brightness(DecisionRule()), ROLLOUTS, bootstrap=20)
    voting = calibrate_judge(VLMJudge(Voters(), VLMConfig(image_size=16)), ROLLOUTS, bootstrap=20)
    panels = [draw_calibration(report).count('id="axes_') for report in (plain, voting)]
    assert panels == [2, 3]
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"pip install .prophet-gym\[viz\]"):
        draw_calibration(plain)


# --- files ---


def test_a_threshold_is_applied_without_touching_anything_else(tmp_path: Path) -> None:
    ClassifierJudge(ClassifierConfig(("lift", "it"), (16, 16), width=8)).save_pretrained(tmp_path / "judge")
    before = ClassifierJudge.from_pretrained(tmp_path / "judge")
    apply_threshold(tmp_path / "judge", 0.3125)
    after = ClassifierJudge.from_pretrained(tmp_path / "judge")
    assert after.config == replace(before.config, threshold=0.3125)
    vlm = tmp_path / "mine.json"
    vlm.write_text('{"backend": {"kind": "server", "model": "m"}, "votes": 7}')
    apply_threshold(vlm, 0.25)
    assert json.loads(vlm.read_text()) == {"backend": {"kind": "server", "model": "m"}, "votes": 7, "threshold": 0.25}
    assert calibration_files(vlm)[0].name == "mine.calibration.json" and calibration_files(vlm)[0].parent == tmp_path
    assert [path.name for path in calibration_files(tmp_path / "judge")] == ["calibration.json", "calibration.svg"]
    with pytest.raises(ValueError, match="cannot be written to.*--out"):
        calibration_files(tmp_path / "nowhere")


def test_a_loaded_judge_decides_at_the_threshold_that_was_applied(tmp_path: Path) -> None:
    films = [each.frames for each in ROLLOUTS]
    folder, words = tmp_path / "judge", ["lift it"] * len(films)
    ClassifierJudge(ClassifierConfig(("lift", "it"), (16, 16), width=8)).save_pretrained(folder)
    scores = [verdict.score for verdict in open_judge(folder).judge_batch(films, words)]
    labels = np.arange(len(films)) >= 5
    rollouts = [
        replace(each, success=np.array([False] * 3 + [bool(y)])) for each, y in zip(ROLLOUTS, labels, strict=True)
    ]
    report = calibrate_judge(open_judge(folder), rollouts, Objective("precision", target=0.5), bootstrap=20)
    moved = 0.5 * sum(np.sort(scores)[4:6])  # between two rollouts, so that verdicts change with it
    for threshold in (report["threshold"], moved):
        apply_threshold(folder, threshold)
        verdicts = open_judge(folder).judge_batch(films, words)
        assert [verdict.success for verdict in verdicts] == [score >= threshold for score in scores]
    assert sum(bool(verdict.success) for verdict in verdicts) == 5
    vlm = tmp_path / "vlm.json"
    vlm.write_text('{"backend": {"kind": "transformers", "model": "m"}, "image_size": 16}')
    apply_threshold(vlm, 0.3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TransformersBackend, "from_pretrained", lambda model: Voters())
        assert open_judge(vlm)(rollout(0.4, True, "x").frames, "lift it").success is True, "two of five votes"


def test_a_judge_that_never_finds_a_success_or_never_answers_is_named() -> None:
    dark = [replace(each, frames=np.full_like(each.frames, 10)) for each in ROLLOUTS]
    judge = VLMJudge(Voters(), VLMConfig(image_size=16, prompt="general"))
    with pytest.raises(ValueError, match="All 10 rollouts have the score 0: the judge recognised none of 6 successes"):
        calibrate_judge(judge, dark)
    black = [replace(each, frames=np.zeros_like(each.frames)) for each in ROLLOUTS]
    with pytest.raises(ValueError, match="abstained on all 10 rollouts, on the first because: .*5 unread: no .box"):
        calibrate_judge(judge, black)


# --- commands ---


def episode(seed: int) -> Episode:
    rng = np.random.default_rng(seed)
    poses = np.tile(np.eye(4), (5, 1, 1, 1))
    poses[..., 2, 3] = 0.1
    return Episode(
        images=rng.integers(0, 256, (5, 48, 48, 3), dtype=np.uint8),
        actions=np.zeros((4, 7), np.float32),
        action_spec=ACTION_SPECS["tabletop"],
        instruction="lift it",
        fps=10.0,
        eef_pose=poses,
        gripper=np.ones((5, 1)),
        labels={"success": np.array([False] * 4 + [seed % 2 == 0])},
        name=f"{seed:03d}",
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> dict[str, str]:
    """Episodes that the tiny world can imagine, and two untrained judges for them."""
    folder = tmp_path_factory.mktemp("calibrate")
    camera = SnapshotSet.load(tiny_checkpoint / "snapshots")[0].camera
    for seed in range(8):
        write_episode(folder / "data" / f"{seed:03d}", replace(episode(seed), camera=camera))
    for seed in (1, 2):
        config = ClassifierConfig(("lift", "it"), (48, 48), width=8)
        ClassifierJudge(config, seed=seed).save_pretrained(folder / f"judge{seed}")
    return {
        "world": str(tiny_checkpoint),
        "data": str(folder / "data"),
        "one": str(folder / "judge1"),
        "two": str(folder / "judge2"),
    }


def run(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["prophet", "judge", *words])
    main()


def test_the_command_writes_beside_the_judge_and_changes_it_only_when_asked(
    files: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["calibrate", files["data"], "--judge", files["one"], "--checkpoint", "none", "--beta", "2"]
    folder = Path(files["one"])
    before = (folder / "judge.json").read_bytes()
    run(words, monkeypatch)
    assert "F-2 on all rollouts" in capsys.readouterr().out
    assert (folder / "judge.json").read_bytes() == before
    report = json.loads((folder / "calibration.json").read_text())
    assert report["data"] == {
        "name": "data", "episodes": 8, "labels": "simulator", "checkpoint": "none", "chunk_length": None,
    }  # fmt: skip
    assert report["advice"][0].startswith("For reinforcement learning prefer high recall; a moderate FPR is tolerated")
    assert (folder / "calibration.svg").read_text().lstrip().startswith("<?xml")
    run([*words, "--apply"], monkeypatch)
    assert open_judge(folder).config.threshold == report["threshold"]
    names = {"calibration.json", "calibration.svg", "judge.json", "judge.safetensors"}
    assert {path.name for path in folder.iterdir()} == names, "no temporary file is left"


def test_a_calibration_counts_imagined_frames_of_the_same_episodes_and_may_go_elsewhere(
    files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(path.name for path in Path(files["two"]).iterdir())
    run(["calibrate", files["data"], "--judge", files["two"], "--checkpoint", files["world"], "--select", "imagined",
         "--out", str(tmp_path / "figures")], monkeypatch)  # fmt: skip
    assert sorted(path.name for path in Path(files["two"]).iterdir()) == before
    report = json.loads((tmp_path / "figures" / "calibration.json").read_text())
    assert {name: source["n"] for name, source in report["sources"].items()} == {"imagined": 8, "real": 8}
    assert report["chosen"]["n"] == 8 and report["data"]["episodes"] == 8
    assert report["sources"]["imagined"]["successes"] == report["sources"]["real"]["successes"] == 4


def test_the_packaged_judge_is_measured_and_never_changed(
    files: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(["calibrate", files["data"], "--apply"], monkeypatch)
    assert "would change the packaged judge" in capsys.readouterr().err
