"""What a vision-language model is asked, and how its answer is read (paper 3.4.2, Fig. 4).

A prompt is a text file: the task, what must be seen for a success, a warning against easy successes, the request to
reason first, and the two boxes of which the last line must be one. ``prompts/`` holds one for every task of the paper
and a template. Reading is strict, because a guess here becomes a reward: an answer without a box, with another word in
its last box, or with boxes that contradict each other is no vote at all.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from prophet_gym.errors import nearest

__all__ = ["AUTO", "PROMPTS", "fill_prompt", "load_prompt", "pick_prompt", "read_vote", "success_probability"]

FOLDER = Path(__file__).parent / "prompts"
PROMPTS = tuple(sorted(path.stem for path in FOLDER.glob("*.txt") if path.stem != "template"))
"""Names of the prompts that come with the package."""

AUTO = "auto"
"""The name that stands for: the prompt made for the instruction, else "general"."""

INSTRUCTIONS = {
    "put carrot on plate": "bridge_put_carrot_on_plate",
    "put the spoon on the towel": "bridge_put_spoon_on_towel",
    "stack the green block on the yellow block": "bridge_stack_cube",
    "put eggplant into yellow basket": "bridge_put_eggplant_in_basket",
    "put the * block on the * plate": "tabletop_put",
    "push the * block to the * edge": "tabletop_push",
}
"""Instructions with a prompt of their own, ``*`` for any words: those of SimplerEnv's WidowX tasks and of Tabletop."""

BOX = re.compile(r"\\box\{([^{}]*)\}")
OPEN_BOX = "\\box{"
WORDS = {"Success": True, "Failure": False}


def load_prompt(name: str) -> str:
    """Returns the text of a prompt.

    Args:
        name: one of :data:`PROMPTS`, or the path of a ``.txt`` file with a prompt of your own, made from
            ``prompts/template.txt``.

    Raises:
        ValueError: no such prompt, or a file that does not name both boxes and the instruction, or that still has
            ``<...>`` of the template to fill in.
    """
    path = Path(name) if name.endswith(".txt") else FOLDER / f"{name}.txt"
    if not path.is_file() or name == "template":
        raise ValueError(
            f"Unknown prompt {name!r}: expected {AUTO!r}, a .txt file, or one of {list(PROMPTS)}."
            f"{nearest(name, PROMPTS)} To write one, copy and fill in {FOLDER / 'template.txt'}."
        )
    text = path.read_text(encoding="utf-8")
    missing = [part for part in ("{instruction}", *(f"{OPEN_BOX}{word}}}" for word in WORDS)) if part not in text]
    blanks = re.findall(r"<[^<>]+>", text)
    if missing or blanks:
        raise ValueError(
            f"Prompt {path} lacks {missing} and has {blanks} left to fill in. A prompt says {{instruction}} where the "
            "instruction goes and asks for one of the two boxes, as prompts/template.txt does."
        )
    return text


def pick_prompt(instruction: str) -> str:
    """Returns the name of the prompt made for ``instruction``, else "general"; case and a final stop do not matter."""
    words = " ".join(instruction.lower().split()).rstrip(".")
    return next((name for pattern, name in INSTRUCTIONS.items() if fnmatchcase(words, pattern)), "general")


def fill_prompt(text: str, instruction: str) -> str:
    """Returns the prompt's text with the instruction in its place."""
    return text.replace("{instruction}", instruction.strip())


def read_vote(text: str) -> tuple[bool | None, str]:
    r"""Reads the decision in an answer.

    Args:
        text: what the model said.

    Returns:
        Success or not, as the last ``\box{}`` says, and an empty string; or None and why this is no vote.
    """
    boxes = [box.strip() for box in BOX.findall(text)]
    if not text.strip():
        return None, "an empty answer"
    if not boxes:
        return None, "no \\box{...} in the answer"
    if boxes[-1] not in WORDS:
        return None, f"the last box says {boxes[-1][:40]!r}"
    if len({box for box in boxes if box in WORDS}) > 1:
        return None, "boxes that contradict each other"
    return WORDS[boxes[-1]], ""


def success_probability(tokens: Sequence[tuple[str, Mapping[str, float]]]) -> float | None:
    r"""Probability of "Success" against "Failure" where the last ``\box{}`` of an answer begins its word.

    Args:
        tokens: of the answer, each with its text and the log-probabilities of the likeliest tokens at its place, its
            own among them.

    Returns:
        P(Success) / (P(Success) + P(Failure)); None without a box, or if neither word is among the likeliest.
    """
    place = "".join(text for text, _ in tokens).rfind(OPEN_BOX)
    if place < 0:
        return None
    place += len(OPEN_BOX)
    at = 0
    while at < len(tokens) and place >= len(tokens[at][0]):
        place -= len(tokens[at][0])
        at += 1
    if at == len(tokens):
        return None
    text, alternatives = tokens[at]
    before, mass = text[:place], dict.fromkeys(WORDS, 0.0)
    for alternative, log_prob in alternatives.items():
        word = alternative[place:] if alternative.startswith(before) else ""
        for name in WORDS:
            if word and (word.startswith(name) or name.startswith(word)):  # tokenizers may cut a word into pieces
                mass[name] += math.exp(log_prob)
    total = sum(mass.values())
    return mass["Success"] / total if total > 0 else None
