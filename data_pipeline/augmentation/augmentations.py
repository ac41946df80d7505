"""Augmentations: rewrite a prompt and its answer so that the answer stays right.

An augmentation is a function of a prompt and an answer that returns the rewritten pair, or None if it does not apply. It is
deterministic: the same pair always gives the same copy. To add one, write the function and name it in AUGMENTATIONS.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
import xxhash

Pair = tuple[str, str]

REQUESTS = ("Question: {}", "Please answer: {}", "{} Answer briefly.", "I have a question. {}", "Tell me: {}")
NUMBER_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
).split()
OPERATOR_WORDS = {"+": "plus", "-": "minus", "−": "minus", "×": "times", "*": "times"}
COMMUTATIVE = ("+", "×", "*", "plus", "times")
_OPERATION = re.compile(r"\b(\d{1,3}) (\+|-|−|×|\*|plus|minus|times) (\d{1,3})\b(?![.,]\d)")
# Anything that would make an operation a part of a longer one.
_NUMBER_OR_OPERATOR = re.compile(r"\d+|[-+−×*/÷=^<>%]|\b(?:plus|minus|times|divided|squared|power)\b")
# Relations that hold in both directions for one pair of things only.
_RELATION = re.compile(
    r"(?:What is|What's|Name) the (capital|opposite|chemical symbol) (of|for) ([^?.,;\d\n]{2,40}?)[?.]"
)
_COURTESY = re.compile(
    r"(?<=[.?!\n])\s*(?:many |any )?(?:thanks|thank you|help (?:is|would be|will be) (?:greatly |much )?appreciated)"
    r"(?: you)?(?: so much| very much| a lot)?(?: in advance)?(?: for (?:your|any) help)?[.!]*\s*\Z",
    re.IGNORECASE,
)


def request(prompt: str, answer: str) -> Pair | None:
    """Put the prompt into one of several phrasings of a request. Prompts of several lines stay as they are."""
    if "\n" in prompt:
        return None
    phrasing = REQUESTS[xxhash.xxh3_64_intdigest(prompt.encode()) % len(REQUESTS)]
    return phrasing.format(prompt), answer


def number_words(prompt: str, answer: str) -> Pair | None:
    """Write the only operation of a prompt in words: `What is 7 + 5?` becomes `What is seven plus five?`."""
    found = _only_operation(prompt)
    if not found or max(int(found[1]), int(found[3])) >= len(NUMBER_WORDS):
        return None
    first, second = (NUMBER_WORDS[int(found[group])] for group in (1, 3))
    operator = OPERATOR_WORDS.get(found[2], found[2])
    return f"{prompt[: found.start()]}{first} {operator} {second}{prompt[found.end() :]}", answer


def swapped_operands(prompt: str, answer: str) -> Pair | None:
    """Swap the operands of the only sum or product of a prompt: `What is 7 + 5?` becomes `What is 5 + 7?`."""
    found = _only_operation(prompt)
    if not found or found[2] not in COMMUTATIVE or found[1] == found[3]:
        return None
    return f"{prompt[: found.start()]}{found[3]} {found[2]} {found[1]}{prompt[found.end() :]}", answer


def reversed_fact(prompt: str, answer: str) -> Pair | None:
    """Ask a fact the other way round: `What is the capital of Peru?` becomes `What is Lima the capital of?`."""
    found = _RELATION.fullmatch(prompt)
    if not found or not re.fullmatch(r"[^\d\W][\w' -]{0,30}", answer):
        return None
    return f"What is {answer} the {found[1]} {found[2]}?", found[3]


def without_courtesy(prompt: str, answer: str) -> Pair | None:
    """Drop thanks at the end of a prompt."""
    shorter = _COURTESY.sub("", prompt)
    return (shorter, answer) if shorter != prompt and shorter else None


def _only_operation(prompt: str) -> re.Match | None:
    found = _OPERATION.search(prompt)
    # Two numbers and the operator between them, and nothing else of the kind.
    return found if found and len(_NUMBER_OR_OPERATOR.findall(prompt)) == 3 else None


AUGMENTATIONS: dict[str, Callable[[str, str], Pair | None]] = {
    "request": request,
    "number-words": number_words,
    "swapped-operands": swapped_operands,
    "reversed-fact": reversed_fact,
    "without-courtesy": without_courtesy,
}


@dataclass(frozen=True)
class Copies:
    """Rewritten rows.

    rows: int64 `[copies]`, index of the row that each was made from, in ascending order.
    numbers: uint8 `[copies]`, 1 and up: which of the chosen augmentations made it.
    prompts, answers: `[copies]`.
    """

    rows: np.ndarray
    numbers: np.ndarray
    prompts: pl.Series
    answers: pl.Series


def copies_of(prompts: pl.Series, answers: pl.Series, names: Sequence[str]) -> Copies:
    """Apply the augmentations to every row; each that applies gives one copy."""
    functions = [AUGMENTATIONS[name] for name in names]
    made = [
        (row, number, *copy)
        for row, pair in enumerate(zip(prompts.to_list(), answers.to_list(), strict=True))
        for number, function in enumerate(functions, 1)
        if (copy := function(*pair)) is not None
    ]
    rows, numbers, copied_prompts, copied_answers = zip(*made, strict=True) if made else ((), (), (), ())
    return Copies(
        np.array(rows, dtype=np.int64),
        np.array(numbers, dtype=np.uint8),
        pl.Series(copied_prompts, dtype=pl.String),
        pl.Series(copied_answers, dtype=pl.String),
    )
