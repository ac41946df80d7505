"""launcher/TROUBLESHOOTING.md quotes only sentences that the programs print."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import launcher

PROJECT = Path(launcher.__file__).parent.parent
PAGE = PROJECT / "launcher/TROUBLESHOOTING.md"
SHORTEST = 12  # characters of a fragment; shorter ones could occur anywhere
VALUE = "…"  # stands for an interpolated value, on the page and in the texts below
SHELL_VALUE = re.compile(r"\$\{[^}]*\}|\$\([^()]*\)|\$[\w*@#?!]+")


def quotes() -> list[str]:
    """Return the sentences in the page's `text` blocks: one a line; an indented line continues the one above it."""
    blocks = re.findall(r"^```text\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in re.sub(r"\n +", " ", block).splitlines()]


def texts_in_python(source: str) -> Iterator[str]:
    """Yield a program's strings except docstrings: adjacent literals joined, `VALUE` for interpolated values."""
    tree = ast.parse(source)
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else VALUE for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


def text_of_shell(source: str) -> str:
    """Return a script without its comments: lines that end with a backslash joined, `VALUE` for expansions."""
    code = re.sub(r"(?m)^\s*#.*$|\s#\s.*$", "", source)
    return SHELL_VALUE.sub(VALUE, re.sub(r'"?\s*\\\n\s*"?', " ", code)).replace('\\"', '"')


def printed() -> str:
    """Return all texts that the project can print, one a line."""
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
    """Return the constant parts of a sentence that are long enough to search for.

    They have no punctuation around them, because the program may assemble a sentence from two texts.
    """
    parts = [part.strip(" ,;:()") for part in quote.removeprefix("error: ").split(VALUE)]
    return [part for part in parts if len(part) >= SHORTEST]


@pytest.fixture(scope="module")
def sources() -> str:
    return printed()


@pytest.mark.parametrize("quote", quotes())
def test_every_quoted_sentence_is_printed(quote, sources):
    assert fragments(quote), f"no constant part of it is long enough: {quote}"
    missing = [part for part in fragments(quote) if part not in sources]
    assert not missing, f"no program prints {missing}; quote the current wording in {PAGE.name}"


def test_the_page_has_at_least_20_quotes():
    assert len(quotes()) >= 20


def test_the_search_tells_printed_sentences_from_others(sources):
    assert fragments("error: … is made of green cheese")[0] not in sources
    program = 'def f(x):\n    "in a docstring"\n    print(f"one {x} and " "another, "\n        f"then {x!r}")\n'
    assert list(texts_in_python(program)) == [f"one {VALUE} and another, then {VALUE}", "one ", " and another, then "]
    script = '# a comment\nfail "there is no $x on $(hostname)" \\\n    "and none in ${y:-here}"  # another\n'
    assert text_of_shell(script).strip() == f'fail "there is no {VALUE} on {VALUE} and none in {VALUE}"'
