"""What people say about rollouts: asked for in the terminal or on a page, kept in a file, measured against."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prophet_gym.actions import ACTION_SPECS
from prophet_gym.cli import main
from prophet_gym.data.episode import Episode
from prophet_gym.data.folder import write_episode
from prophet_gym.judges import (
    ClassifierConfig,
    ClassifierJudge,
    as_judge,
    evaluate_judge,
    known_labels,
    labelled_rollouts,
    read_labels,
    write_labels,
)
from prophet_gym.judges.human_labels import merge_labels
from prophet_gym.judges.label_page import write_label_page
from prophet_gym.judges.label_terminal import ansi_strip, label_in_terminal


def episode(number: int, length: int = 9) -> Episode:
    """A film without any truth about it, red where its number is even."""
    images = np.zeros((length, 16, 24, 3), np.uint8)
    images[..., number % 2] = np.linspace(50, 250, length, dtype=np.uint8)[:, None, None]
    return Episode(
        images=images,
        actions=np.zeros((length - 1, 7), np.float32),
        action_spec=ACTION_SPECS["tabletop"],
        instruction=f"lift </script> number {number}",
        fps=10.0,
        name=f"film{number}",
    )


EPISODES = [episode(number) for number in range(4)]


class Person:
    """Answers in turn, and remembers what was shown and what the file held at each question."""

    def __init__(self, answers: str, out: Path) -> None:
        self.answers, self.out = iter(answers), out
        self.shown: list[str] = []
        self.kept: list[dict[str, str]] = []

    def ask(self, question: str) -> str:
        self.kept.append(read_labels(self.out) if self.out.exists() else {})
        try:
            return next(self.answers)
        except StopIteration:
            raise EOFError from None

    def names(self) -> list[str]:
        return [found[1] for text in self.shown if (found := re.search(r"of 4  (film\d)", text))]


def label(person: Person, **options: int) -> dict[str, str]:
    return label_in_terminal(EPISODES, person.out, total=4, ask=person.ask, show=person.shown.append, **options)


# --- the file ---


def test_labels_come_back_and_the_unsure_decide_nothing(tmp_path: Path) -> None:
    labels = {"b": "failure", "a": "success", "c": "unsure"}
    write_labels(tmp_path / "new" / "labels.json", labels)
    assert read_labels(tmp_path / "new" / "labels.json") == labels
    assert known_labels(labels) == {"a": True, "b": False}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["labels.json"]


def test_files_that_are_not_of_labels_are_named(tmp_path: Path) -> None:
    path = tmp_path / "labels.json"
    with pytest.raises(ValueError, match="not a file of labels.*prophet judge label"):
        read_labels(path)
    for text, message in (
        ("{}", 'expected an object with "format": "prophet_gym.rollout_labels"'),
        ("[1]", "expected an object"),
        ('{"format": "prophet_gym.rollout_labels", "labels": {"a": "sucess"}}', "'sucess'.*Did you mean 'success'"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_labels(path)


def test_merging_takes_what_is_new_and_what_was_changed(tmp_path: Path) -> None:
    mine, theirs = tmp_path / "mine.json", tmp_path / "theirs.json"
    write_labels(theirs, {"a": "success", "b": "failure"})
    assert merge_labels(mine, theirs) == (2, 0)
    write_labels(theirs, {"b": "unsure", "c": "success"})
    assert merge_labels(mine, theirs) == (1, 1)
    assert read_labels(mine) == {"a": "success", "b": "unsure", "c": "success"}


# --- the terminal ---


def test_frames_become_half_blocks_of_their_colours() -> None:
    frames = np.zeros((2, 4, 4, 3), np.uint8)
    frames[0, 0], frames[0, 1], frames[1] = (255, 0, 0), (0, 255, 0), (1, 2, 3)
    lines = ansi_strip(frames, 4).split("\n")
    assert len(lines) == 2
    cells = re.findall(r"\x1b\[38;2;(\d+);(\d+);(\d+);48;2;(\d+);(\d+);(\d+)m▀", lines[0])
    assert [tuple(map(int, cell)) for cell in cells] == [(255, 0, 0, 0, 255, 0)] * 4 + [(1, 2, 3, 1, 2, 3)] * 4
    assert lines[0].count("\x1b[0m") == 2, "colours end before the gap"
    with pytest.raises(ValueError, match="width=3: expected at least 4"):
        ansi_strip(frames, 3)


def test_every_answer_is_kept_at_once_and_a_later_sitting_goes_on(tmp_path: Path) -> None:
    first = Person("y?nq", tmp_path / "labels.json")
    assert label(first) == {"film0": "success", "film1": "failure"}
    assert first.kept[1] == {"film0": "success"} and first.kept[3] == {"film0": "success", "film1": "failure"}
    assert first.names() == ["film0", "film1", "film2"]
    assert "please answer y, n, u, b or q" in first.shown
    second = Person("u", tmp_path / "labels.json")
    assert label(second)["film2"] == "unsure", "the end of the input is an orderly end"
    assert second.names() == ["film2", "film3"]
    third = Person("y", tmp_path / "labels.json")
    assert len(label(third)) == 4 and third.names() == ["film3"]
    assert label(Person("", tmp_path / "labels.json")) == read_labels(tmp_path / "labels.json")


def test_an_answer_can_be_taken_back(tmp_path: Path) -> None:
    person = Person("bynbbyuyyy", tmp_path / "labels.json")
    assert label(person) == {"film0": "success", "film1": "unsure", "film2": "success", "film3": "success"}
    assert person.names() == ["film0", "film1", "film2", "film1", "film0", "film1", "film2", "film3"]
    assert "nothing to go back to" in person.shown


def test_the_first_and_the_last_frame_are_always_shown(tmp_path: Path) -> None:
    person = Person("q", tmp_path / "labels.json")
    label(person, frames=3, width=6)
    assert "frames 0, 4, 8" in person.shown
    assert "\x1b[38;2;50;0;0" in person.shown[1] and "\x1b[38;2;250;0;0" in person.shown[1]
    with pytest.raises(ValueError, match="frames=1: expected at least 2"):
        label(person, frames=1)


# --- the page ---


def content_of(page: Path) -> dict:
    return json.loads(re.search(r"^const content = (.*);$", page.read_text(), flags=re.MULTILINE)[1])


def test_the_page_holds_every_frame_and_nothing_from_elsewhere(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    write_label_page([*EPISODES, episode(4, length=100)], page, {"film1": "failure"}, name="a <b> set")
    text = page.read_text()
    assert not re.search(r"(src|href)=|https?://", text) and "a &lt;b&gt; set" in text
    assert text.count("</script>") == 1, "an instruction ends the script"
    content = content_of(page)
    assert content["labels"] == {"film1": "failure"}
    assert [each["name"] for each in content["rollouts"]] == [f"film{i}" for i in range(5)]
    assert content["rollouts"][0]["instruction"] == EPISODES[0].instruction
    assert len(content["rollouts"][4]["frames"]) == 60 and content["rollouts"][4]["frames"][-1] == 99
    head, data = content["rollouts"][0]["strip"].split(",")
    strip = np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))).astype(int)
    assert head == "data:image/jpeg;base64" and strip.shape == (16, 9 * 24, 3)
    assert abs(strip[8, 8 * 24 + 12] - [250, 0, 0]).max() < 12
    with pytest.raises(ValueError, match="at least one episode"):
        write_label_page([], page)


# The smallest browser in which the page's script runs: it answers keys and catches the download.
BROWSER = """
const handlers = {}, blobs = [], kept = {};
const make = () => ({children: [], classList: {toggle() {}}, getContext: () => ({drawImage() {}}), dataset: {}});
const elements = {};
globalThis.document = {
  getElementById: id => elements[id] ??= make(),
  createElement: () => ({click() {}}),
  addEventListener: (name, handler) => { handlers[name] = handler; },
};
globalThis.localStorage = {getItem: key => kept[key] ?? null, setItem: (key, value) => { kept[key] = value; }};
globalThis.Image = class {};
globalThis.Blob = class { constructor(parts) { blobs.push(parts.join("")); } };
URL.createObjectURL = () => "blob:";
globalThis.setInterval = () => {};
SCRIPT
const press = key => handlers.keydown({key, preventDefault() {}});
KEYS.forEach(press);
console.log(JSON.stringify({download: blobs.at(-1), where: elements.where.textContent, kept}));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="no node to run the page's script")
def test_keys_label_and_the_download_can_be_merged(tmp_path: Path) -> None:
    page, out = tmp_path / "page.html", tmp_path / "labels.json"
    write_labels(out, {"film0": "success", "elsewhere": "failure"})
    write_label_page(EPISODES, page, read_labels(out), name="films")
    script = re.search(r"<script>(.*)</script>", page.read_text(), flags=re.DOTALL)[1]
    keys = ["f", "u", "s", "ArrowLeft", "ArrowLeft", "s", "x", "d"]  # starts at film1, the first without a label
    program = BROWSER.replace("SCRIPT", script).replace("KEYS", json.dumps(keys))
    result = subprocess.run(["node", "-e", program], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    seen = json.loads(result.stdout)
    assert seen["where"] == "3 of 4: film2"
    (tmp_path / "download.json").write_text(seen["download"])
    merge_labels(out, tmp_path / "download.json")
    expected = {"film0": "success", "film1": "success", "film2": "unsure", "film3": "success", "elsewhere": "failure"}
    assert read_labels(out) == expected
    assert json.loads(seen["kept"]["prophet-gym labels films"])["film1"] == "success"


# --- judges against people ---


def test_judges_are_measured_against_people_where_no_simulator_tells() -> None:
    labels = known_labels({"film0": "success", "film1": "failure", "film2": "failure", "film3": "unsure"})
    chosen = [each for each in EPISODES if each.name in labels]
    rollouts = labelled_rollouts(chosen, labels=labels)
    assert [each.label for each in rollouts] == [True, False, False]
    imagined = labelled_rollouts(chosen, [255 - each.frames for each in chosen], labels=labels)
    assert [each.label for each in imagined] == [True, False, False] and imagined[0].source == "imagined"
    red = as_judge(lambda frames, instruction: bool(frames[-1, ..., 0].mean() > 100))
    report = evaluate_judge(red, rollouts, bootstrap=20)
    assert (report["precision"]["value"], report["recall"]["value"]) == (0.5, 1.0)
    with pytest.raises(ValueError, match="'film3' has no label among the 3 given"):
        labelled_rollouts(EPISODES, labels=labels)
    with pytest.raises(ValueError, match="prophet judge label"):
        labelled_rollouts(EPISODES)


# --- commands ---


@pytest.fixture
def prophet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs `prophet judge WORDS` beside a folder ``data`` of the episodes."""
    for each in EPISODES:
        write_episode(tmp_path / "data" / each.name, replace(each, instruction="lift it"))
    monkeypatch.chdir(tmp_path)

    def run(*words: str, typed: str = "") -> None:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{letter}\n" for letter in typed)))
        monkeypatch.setattr(sys, "argv", ["prophet", "judge", *words])
        main()

    return run


def test_labels_typed_and_merged_serve_an_evaluation(
    prophet: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prophet("label", "data", "--out", "mine.json", typed="ynq")
    assert "1 success, 1 failure, 0 unsure: mine.json" in capsys.readouterr().out
    prophet("label", "data", "--out", "mine.json", "--page", "page.html")
    assert "prophet judge label data --out mine.json --merge DOWNLOAD" in capsys.readouterr().out
    assert content_of(tmp_path / "page.html")["labels"] == {"film0": "success", "film1": "failure"}
    write_labels("download.json", {"film2": "success", "film3": "unsure"})
    prophet("label", "data", "--out", "mine.json", "--merge", "download.json")
    assert "2 labels added, 0 changed: mine.json" in capsys.readouterr().out
    ClassifierJudge(ClassifierConfig(("lift", "it"), (16, 24), width=8)).save_pretrained("judge")
    prophet("eval", "data", "--judge", "judge", "--checkpoint", "none", "--labels", "mine.json", "--out", "out.json")
    shown = capsys.readouterr()
    assert "3 of 4 episodes have a label in mine.json" in shown.err
    report = json.loads(Path("out.json").read_text())["real"]
    assert (report["n"], report["successes"]) == (3, 2)
    with pytest.raises(SystemExit):
        prophet("eval", "data", "--judge", "judge", "--checkpoint", "none")
    assert "prophet judge label" in capsys.readouterr().err
