"""What a vision-language model is shown and asked, and how its answer is read; no model, no server."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from prophet_gym.judges import PROMPTS, VLMConfig
from prophet_gym.judges.pictures import encode_frames, spread_indices
from prophet_gym.judges.prompting import load_prompt, pick_prompt, read_vote, success_probability

YES, NO = "\\box{Success}", "\\box{Failure}"


# --- reading answers ---


@pytest.mark.parametrize(
    ("text", "vote", "why"),
    [
        ("The block rests on the plate.\n\\box{Success}", True, ""),
        ("First I thought \\box{Failure }, and so it is: \\box{Failure}", False, ""),
        ("\\box{ Success }\n", True, ""),
        ("Success", None, "no .box"),
        ("\\boxed{Success}", None, "no .box"),
        ("\\box{success}", None, "the last box says 'success'"),
        ("\\box{Success} or \\box{Failure}", None, "contradict"),
        ("\\box{Success}, that is \\box{Unclear}", None, "the last box says 'Unclear'"),
        ("\\box{Success", None, "no .box"),
        (" \n", None, "an empty answer"),
    ],
)
def test_only_an_unmistakable_last_box_is_a_vote(text: str, vote: bool | None, why: str) -> None:
    found = read_vote(text)
    assert found[0] is vote and (not why or why.replace(".", "\\", 1) in found[1])


def test_probability_is_read_where_the_last_box_begins_its_word() -> None:
    first = [("\\box{", {"\\box{": 0.0}), ("Failure", {"Failure": 0.0, "Success": -9.0}), ("} ", {"} ": 0.0})]
    last = [("\\box{", {"\\box{": 0.0}), ("Suc", {"Suc": math.log(0.6), "Fail": math.log(0.2), "S": math.log(0.1)})]
    assert success_probability([*first, *last]) == pytest.approx(0.7 / 0.9)
    fused = [("\\box{Success}", {"\\box{Success}": math.log(0.3), "\\box{Failure}": math.log(0.1), "x": -0.1})]
    assert success_probability(fused) == pytest.approx(0.75)
    assert success_probability([("no box", {"no box": 0.0})]) is None
    assert success_probability([("\\box{", {}), ("Maybe", {"Maybe": 0.0})]) is None
    assert success_probability([("\\box{", {})]) is None and success_probability([]) is None


def test_frames_are_spread_evenly_resized_and_compressed() -> None:
    assert spread_indices(101, 5) == [0, 25, 50, 75, 100]
    assert spread_indices(3, 20) == [0, 1, 2] and spread_indices(21, 20)[-1] == 20
    frames = np.zeros((2, 40, 60, 3), np.uint8)
    frames[1, :, :30] = (255, 0, 0)
    for image_format in ("jpeg", "png"):
        pictures = [np.asarray(Image.open(io.BytesIO(p))) for p in encode_frames(frames, 224, image_format)]
        assert [p.shape for p in pictures] == [(224, 224, 3)] * 2 and pictures[0].max() < 5
        assert pictures[1][100, 50, 0] > 240 and pictures[1][100, 50, 2] < 15 and pictures[1][100, 180, 0] < 15


def test_every_packaged_prompt_follows_the_structure_of_figure_4() -> None:
    assert len(PROMPTS) == 13 and {"libero", "general", "ur30e_place_bowl", "bridge_pull_out_tissue"} <= set(PROMPTS)
    for name in PROMPTS:
        text = load_prompt(name)
        parts = ["{instruction}", "only if the video shows all of this", "1. ", "2. ", "Do not give success easily",
                 "Think first", YES + "\n" + NO]  # fmt: skip
        places = [text.index(part) for part in parts]
        assert places == sorted(places), name


@pytest.mark.parametrize(
    ("instruction", "name"),
    [
        ("put carrot on plate", "bridge_put_carrot_on_plate"),
        ("Put the spoon on the towel.", "bridge_put_spoon_on_towel"),
        ("stack the green block on the yellow block", "bridge_stack_cube"),
        ("put eggplant into yellow basket", "bridge_put_eggplant_in_basket"),
        ("put the purple block on the white plate", "tabletop_put"),
        ("push the red block to the left edge", "tabletop_push"),
        ("open the drawer", "general"),
    ],
)
def test_a_task_with_a_prompt_of_its_own_gets_it(instruction: str, name: str) -> None:
    assert pick_prompt(instruction) == name


def test_bad_prompts_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Unknown prompt 'libreo'.*Did you mean 'libero'.*template\.txt"):
        load_prompt("libreo")
    own = tmp_path / "own.txt"
    own.write_text("Did it work? \\box{Success}")
    with pytest.raises(ValueError, match=r"lacks \['\{instruction\}', '.*Failure"):
        load_prompt(str(own))
    own.write_text((Path(__file__).parents[1] / "prophet_gym/judges/prompts/template.txt").read_text())
    with pytest.raises(ValueError, match="<contact: .*left to fill in"):
        load_prompt(str(own))


# --- settings ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_frames": 1}, "num_frames=1: expected an integer of at least 2"),
        ({"votes": 2, "min_votes": 3}, "can never be reached"),
        ({"temperature": 0.0}, "greedy answers are all the same"),
        ({"temperature": "hot"}, "expected a number"),
        ({"media": "gif"}, "expected one of .*'video'"),
        ({"media": "video", "image_format": "png"}, "sequence of JPEG"),
        ({"min_margin": 2.0}, r"in \[0, 1\]"),
        ({"prompt": None}, "name of a prompt"),
    ],
)
def test_settings_out_of_range_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VLMConfig(**change)
