"""Operators in texts: tells `2 - 3` from `well-known`, so that two formulas that differ in one sign are different words.

An ASCII character can be an operator or punctuation. Its neighbours decide; one space may lie between.

- `+ = < ^ %` are operators beside an operand on either side.
- `- * / >` are operators between two operands: a hyphen, a bullet or emphasis never is.
- `-` is also a sign if it touches a number, and nothing touches it from the left.

An operand is a digit, a single letter, a bracket, or the beginning or end of LaTeX. Mathematical symbols beyond ASCII, such
as ≤, are never punctuation. They are words by themselves.
"""

import numpy as np

# Duplicates of ASCII operators, among them the fraction slash, into which NFKC turns ½.
ASCII_OPERATORS = {"−": "-", "×": "*", "÷": "/", "⁄": "/", "∗": "*", "∕": "/"}
OPERATOR_SYMBOL = r"[\p{Sm}--[\x00-\x7f]]"

_DIGIT, _LETTER, _OPENS, _CLOSES = 1, 2, 4, 8


def _kinds() -> np.ndarray:
    kinds = np.zeros(256, dtype=np.uint8)
    for characters, kind in (("0123456789", _DIGIT), ("([{\\", _OPENS), (")]}", _CLOSES), ("$", _OPENS | _CLOSES)):
        kinds[[ord(character) for character in characters]] = kind
    kinds[[byte for byte in range(256) if byte >= 0x80 or chr(byte).isalpha()]] = _LETTER
    return kinds


def _table(characters: str) -> np.ndarray:
    table = np.zeros(256, dtype=bool)
    table[[ord(character) for character in characters]] = True
    return table


_KIND = _kinds()
_BESIDE_AN_OPERAND, _BETWEEN_OPERANDS = _table("+=<^%"), _table("-*/>")
_TWO_BYTES = _table("".join(map(chr, range(0xC2, 0xE0)))).astype(np.int64)  # the first byte of such a character
_OPERATOR = _BESIDE_AN_OPERAND | _BETWEEN_OPERANDS


def find_operators(text: np.ndarray) -> np.ndarray:
    """Find the ASCII operators in UTF-8 bytes, uint8 `[bytes]`: their positions, int64 `[operators]`, in order."""
    places = np.flatnonzero(_OPERATOR[text])
    if not len(places):
        return places
    padded = np.concatenate([np.full(4, ord("\n"), np.uint8), text, np.full(4, ord("\n"), np.uint8)])
    places = places + 4
    left, right = places - 1, places + 1
    touched = padded[left] > ord(" ")
    touches_a_digit = _KIND[padded[right]] == _DIGIT
    left, right = left - (padded[left] == ord(" ")), right + (padded[right] == ord(" "))
    # Letters of two bytes, such as Greek ones, are single letters as well.
    left_operand = _is_operand(padded, left, left - 1 - _TWO_BYTES[padded[left - 1]], _CLOSES)
    right_operand = _is_operand(padded, right, right + 1 + _TWO_BYTES[padded[right]], _OPENS)
    operators = padded[places]
    found = _BESIDE_AN_OPERAND[operators] & (left_operand | right_operand)
    found |= left_operand & right_operand
    found |= (operators == ord("-")) & touches_a_digit & ~touched
    return places[found] - 4


def _is_operand(text: np.ndarray, places: np.ndarray, beyond: np.ndarray, bracket: int) -> np.ndarray:
    kinds = _KIND[text[places]]
    is_single = (_KIND[text[beyond]] & (_LETTER | _DIGIT)) == 0
    return (kinds == _DIGIT) | ((kinds == _LETTER) & is_single) | (kinds & bracket > 0)
