"""Instructions as word ids: what judges and policies know of language.

A network's vocabulary is the words of its training data. An unknown word is reported, never skipped: the network would
read another instruction.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["build_vocabulary", "encode_instruction", "split_words"]


def split_words(instruction: str) -> list[str]:
    """Returns the lower-case words of an instruction, without punctuation."""
    return re.findall(r"[a-z0-9]+", instruction.lower())


def build_vocabulary(instructions: Sequence[str]) -> tuple[str, ...]:
    """Returns the sorted words of all instructions; word ids are positions + 1, as 0 is padding."""
    return tuple(sorted({word for instruction in instructions for word in split_words(instruction)}))


def encode_instruction(instruction: str, vocabulary: Sequence[str], max_words: int) -> tuple[list[int], str]:
    """Turns an instruction into word ids, padded with 0.

    Returns:
        (ids of length ``max_words``, "") or ([], why not) for an unknown word or too many words.
    """
    words = split_words(instruction)
    unknown = sorted(set(words) - set(vocabulary))
    if unknown:
        return [], f"unknown words {unknown} in instruction {instruction!r}; known: {list(vocabulary)}"
    if not 1 <= len(words) <= max_words:
        return [], f"instruction of {len(words)} words, expected 1 to {max_words}: {instruction!r}"
    ids = [vocabulary.index(word) + 1 for word in words]
    return ids + [0] * (max_words - len(ids)), ""
