"""launcher/TROUBLESHOOTING.md quotes only sentences that the programs print."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import launcher

PROJECT = Path(launcher.__file__).parent.parent
PAGE = PROJECT / "launcher/TROUBLESHOOTING.md"
SHORTEST = 12  # characters of a fragment; shorter ones could stand anywhere
VALUE = "…"  # what differs from one time to the next, on the page and in the texts below
SHELL_VALUE = re.compile(r"\$\{[^}]*\}|\$\([^()]*\)|\$[\w*@#?!]+")


def quotes() -> list[str]:
    """The sentences in the page's `text` blocks: one a line, and an indented line continues the one above it."""
    blocks = re.findall(r"^```text\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in re.sub(r"\n +", " ", block).splitlines()]


def texts_in_python(source: str) -> Iterator[str]:
    """Every string of a program but its docstrings: adjacent literals joined, and `VALUE` for what is formatted in."""
    tree = ast.parse(source)
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else VALUE for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


def text_of_shell(source: str) -> str:
    """A script without its comments: arguments that go on behind a backslash joined, and `VALUE` for what is expanded."""
    code = re.sub(r"(?m)^\s*#.*$|\s#\s.*$", "", source)
    return SHELL_VALUE.sub(VALUE, re.sub(r'"?\s*\\\n\s*"?', " ", code)).replace('\\"', '"')


def printed() -> str:
    """All texts that the project can print, one a line."""
    packages = [PROJECT / name for name in ("launcher", "data_pipeline", "model", "slurm")]
    files = [PROJECT / "train.py", *(path for package in packages for path in package.rglob("*") if path.is_file())]
    texts: list[str] = []
    for path in files:
        if path.suffix == ".py":
            texts += texts_in_python(path.read_text(encoding="utf-8"))
        elif path.suffix in (".sh", ".sbatch"):
            texts.append(text_of_shell(path.read_text(encoding="utf-8")))
    return "\n".join(texts)


def fragments(quote: str) -> list[str]:
    """The parts of a sentence that never change and are long enough to be looked for.

    Without the punctuation around them: a sentence may be put together of two texts.
    """
    parts = [part.strip(" ,;:()") for part in quote.removeprefix("error: ").split(VALUE)]
    return [part for part in parts if len(part) >= SHORTEST]


@pytest.fixture(scope="module")
def sources() -> str:
    return printed()


@pytest.mark.parametrize("quote", quotes())
def test_every_quoted_sentence_is_printed(quote, sources):
    assert fragments(quote), f"too little of it never changes: {quote}"
    missing = [part for part in fragments(quote) if part not in sources]
    assert not missing, f"no program prints {missing}; quote the present wording in {PAGE.name}"


def test_the_page_has_its_entries():
    assert len(quotes()) >= 20


def test_a_sentence_that_is_not_printed_is_told_from_one_that_is(sources):
    assert fragments("error: … is made of green cheese")[0] not in sources
    program = 'def f(x):\n    "in a docstring"\n    print(f"one {x} and " "another, "\n        f"then {x!r}")\n'
    assert list(texts_in_python(program)) == [f"one {VALUE} and another, then {VALUE}", "one ", " and another, then "]
    script = '# a comment\nfail "there is no $x on $(hostname)" \\\n    "and none in ${y:-here}"  # another\n'
    assert text_of_shell(script).strip() == f'fail "there is no {VALUE} on {VALUE} and none in {VALUE}"'
