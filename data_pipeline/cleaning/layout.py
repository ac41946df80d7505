"""Finds the parts of a text that its lines show to be code, a table or XML, without any mark around them.

A *program* is a run of lines around at least one line that is surely code: a declaration, a statement that ends like one, a
command, a line of a log. Lines that may be code count only next to such a line. Mathematical prose is full of brackets and
equations, so these alone never count. If prose is taken for code by mistake, it merely stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise

import polars as pl

from data_pipeline.cleaning.program_lines import CODE, PERHAPS_CODE, ascii_only
from data_pipeline.cleaning.tables import find_tables, may_have_table

# Every text in which `find_layout` finds something has one of these, or matches one of the two patterns below.
_SIGNS = [
    *(
        ";\n",
        "{\n",
        "\t",
        "</",
        "->",
        "::",
        "=> ",
        "<-",
        ":= ",
        '":',
        "|\n",
        "()",
        "\ufdd1",
        ");\n",
        ") {",
        "def ",
        "import ",
    ),
    *(
        "#include",
        "#define",
        "SELECT ",
        "CREATE ",
        "INSERT ",
        "UPDATE ",
        "DELETE ",
        ">>> ",
        "\n$ ",
        "curl",
        "wget",
        "sudo ",
        "git ",
    ),
    *(
        "docker ",
        "grep ",
        "/* ",
        " install ",
        "HTTP/",
        "Traceback",
        "ERROR",
        "WARN",
        "DEBUG",
        "INFO",
        "print(",
        "fetch(",
    ),
    *(
        "):\n ",
        "\n\n    ",
        ' = "',
        " = '",
        " = [",
        " = {",
        "-|-",
        "-+-",
        ":\n  ",
        "#!/",
        "\nend",
        "(def",
        "kubectl ",
        "\n@@ ",
    ),
    *("export ", "\\begin{verb", "\\begin{lst", ");  "),
]
_CAN_BE_DAMAGED = (
    r"&[#A-Za-z][0-9A-Za-z]*;|<[/?!A-Za-z]|\t|://|\n\n\n|[^ \n.?!:;,]  |[;:,]   |[;:,]  [^A-Z]|\n [^ \n]+\("
)
_TIME = ":[0-9][0-9]:[0-9][0-9]"
_AT_THE_BEGINNING = ascii_only(r"\A(?:    |\$ |(?:npm|pip3?|ls|cd) |[\w.]+\([^\n]*\)[;:]?\z|[\w<>*&: ]+= ?&?\w+;\z)")


_INDENTED = re.compile(r"(?: {2,}|\t)\s*\S")
# An item of a list, or a heading: an indented line below it is prose.
_LIST_ITEM = re.compile(r"\s*(?:[-*+•]|\d{1,3}[.)]|[a-z][.)]|\([a-z0-9]{1,3}\))\s+\S")
_CODE_BLOCK = re.compile(r"(?: {4}|\t)")
_CODE_SIGN = re.compile(r"[=(){};<>\[\]_$#/\\|&~^*@`]")
_FENCE = re.compile(r"\s*(?:```|~~~)")
# A key with its value, as in YAML, .ini files, HTTP headers and the head of an e-mail: three in a row are data.
_KEY = re.compile(r"\s*(?:- )?[A-Za-z_][\w.-]*\s?[:=](?:\s+\S.*)?$")
_C_REFERENCE = re.compile(
    r"\s*(?:[A-Za-z_][\w <>:]*\*+\s*\w+|[A-Za-z_][\w.>\[\]-]+|return)\s*=?\s*"
    r"&(?!(?:lt|gt|amp|quot|nbsp|apos|deg|times|minus|plusmn)\b)(\w+);\s*$"
)
_ENDS_IN_A_REFERENCE = re.compile(r"&#?\w{2,31};\s*$")
_GREEK = frozenset(
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma tau upsilon phi chi psi "
    "omega infin radic".split()
)

# The lines of a formula can look like a table, but a formula is a region of its own kind.
_FORMULA = re.compile(r"(?s)\$\$.*?\$\$|\\begin\{(?!verb|lstl|mint).*?\\end\{\w+\*?\}")

_ELEMENT = re.compile(r"<([A-Za-z][\w:.-]*)(?:\s[^<>]*)?(?<!/)>")
# Elements of HTML that hold prose, and names that are special tokens: they make a text neither XML nor a program.
PROSE_ELEMENTS = frozenset(
    "a abbr acronym address article aside b bdi bdo big blockquote caption center cite code col colgroup dd "
    "del details dfn div dl dt em figcaption figure font footer h1 h2 h3 h4 h5 h6 header hr i img ins kbd li "
    "main mark nav nobr ol p pre q s samp section small span strike strong sub summary sup table tbody td "
    "tfoot th thead tr tt u ul var wbr br mask sep pad think answer o:p".split()
)


def may_have_layout(texts: pl.Series) -> pl.Series:
    """Search for signs of layout: a bool for each text, true for every text in which `find_layout` finds something."""
    # Only these can damage a program or a table: references, tags, URLs, tabs, blank lines, and spaces within lines.
    rows = texts.str.contains(_CAN_BE_DAMAGED).arg_true()
    found = texts.gather(rows).to_frame("text").select(_has_signs()).to_series()
    return pl.zeros(len(texts), pl.Boolean, eager=True).scatter(rows.filter(found), True)


def _has_signs() -> pl.Expr:
    text = pl.col("text")
    # The patterns are apart, because a search for an anchored pattern stops at once, and one for an end begins there.
    at_the_ends = text.str.contains(_AT_THE_BEGINNING) | text.str.ends_with(";") | text.str.ends_with("{")
    return text.str.contains_any(_SIGNS) | text.str.contains(_TIME) | at_the_ends | may_have_table(text)


def find_layout(texts: pl.Series) -> list[list[tuple[int, int]]]:
    """Find the programs, indented code blocks, tables and XML of each text: start and end, in order, never overlapping."""
    if texts.is_empty():
        return []
    column = pl.col("text")
    frame = texts.to_frame("text").select(column, may_have_table(column).alias("table"))
    looks_like_code = texts.to_frame("text").select(column.str.split("\n").explode().str.contains(CODE)).to_series()
    codes, found = iter(looks_like_code.to_list()), []
    for text, has_table in frame.iter_rows():
        of_text = text.split("\n")
        sure = {number for number, line in enumerate(of_text) if next(codes) and _is_sure(line)}
        found.append(_find_in(text, of_text, sure, has_table))
    return found


def _find_in(text: str, lines: list[str], sure: set[int], has_table: bool) -> list[tuple[int, int]]:
    sure |= _keys_in_a_row(lines) if ": " in text or "=" in text else set()
    numbers = set(sure)
    for number in sure:
        numbers |= _beside(lines, sure, number, 1) | _beside(lines, sure, number, -1)
    if "    " in text or "\t" in text:
        numbers |= _lines_of_code_blocks(lines)
    if has_table:
        numbers |= find_tables(lines)
    runs = list(_runs(lines, numbers))
    if runs and ("$$" in text or "\\begin{" in text):
        formulas = [formula.span() for formula in _FORMULA.finditer(text)]
        runs = [run for run in runs if not any(start <= run[0] < end for start, end in formulas)]
    return _merged([*runs, *_elements(text)])


def _beside(lines: list[str], sure: set[int], number: int, step: int) -> set[int]:
    """Walk from a line of code to the lines that may belong to it, across blank lines, up to the next line of code."""
    found: set[int] = set()
    blank: set[int] = set()
    number += step
    while 0 <= number < len(lines) and number not in sure:
        line = lines[number]
        if not line.strip():
            blank.add(number)
        elif _FENCE.match(line) or not (
            PERHAPS_CODE.match(line) or (_INDENTED.match(line) and not _LIST_ITEM.match(line))
        ):
            return found
        else:
            found |= blank | {number}
            blank = set()
        number += step
    return found | blank if 0 <= number < len(lines) else found


def _is_sure(line: str) -> bool:
    """Whether a line that looks like code is neither a fence, nor prose, nor ends in a character reference."""
    if _ENDS_IN_A_REFERENCE.search(line):  # `x = &pi;` ends in a reference, not in a semicolon
        return _is_reference_in_c(line)
    return not _FENCE.match(line) and not _is_prose(line)


def _is_reference_in_c(line: str) -> bool:
    """Whether a line takes the address of a variable, which looks like a character reference: `int *p = &num;`."""
    found = _C_REFERENCE.match(line)
    return found is not None and ("*" in line or found[1].lower() not in _GREEK)


def _is_prose(line: str) -> bool:
    """Whether most of a line is words: then its brackets and signs are those of a sentence."""
    words = re.findall(
        r"(?<![\w.(\"'=/_-])[A-Za-z]{2,}[,.]?(?=\s|$)", re.sub(r"(\"[^\"]*\"|'[^']*'|//.*|#.*|--\s.*)", "", line)
    )
    return len(words) >= 8 and len(words) >= 0.6 * len(line.split()) and not line.rstrip().endswith((";", "{", "\\"))


def _keys_in_a_row(lines: list[str]) -> set[int]:
    found: set[int] = set()
    run: list[int] = []
    for number, line in enumerate([*lines, ""]):
        if _KEY.match(line) or (run and _INDENTED.match(line)):
            run.append(number)
            continue
        if len(run) >= 3:
            found.update(run)
        run = []
    return found


def _lines_of_code_blocks(lines: list[str]) -> set[int]:
    """Find Markdown's indented code blocks: after a blank line, outside of lists, and no prose."""
    found: set[int] = set()
    block: list[int] = []
    above = ""
    several = sum(bool(line.strip()) for line in lines) > 1  # the indentation of a single line shows nothing
    for number, line in enumerate([*lines, "end"]):
        if _CODE_BLOCK.match(line) and line.strip() and (block or number == 0 or not lines[number - 1].strip()):
            block.append(number)
        elif line.strip():
            if block and several and not _LIST_ITEM.match(above) and _is_code_block([lines[n] for n in block]):
                found.update(range(block[0], block[-1] + 1))
            block, above = [], line
    return found


def _is_code_block(block: list[str]) -> bool:
    items = sum(bool(_LIST_ITEM.match(line)) for line in block)
    signs = sum(bool(_CODE_SIGN.search(line)) for line in block)
    prose = sum(_is_prose(line) or line.rstrip().endswith((".", "?", "!", ",")) for line in block)
    return items < len(block) / 2 and signs > 0 and prose <= len(block) / 3


def _elements(text: str) -> Iterator[tuple[int, int]]:
    """Find elements that are not HTML prose, from the start tag to the end tag: XML, web pages and forms."""
    if "</" not in text:
        return
    position = 0
    if "<?xml" in text and (last := text.rfind(">")) > (first := text.index("<?xml")):
        yield first, last + 1
    while found := _ELEMENT.search(text, position):
        position = found.end()
        if found[1].lower() in PROSE_ELEMENTS:
            continue
        end = text.find(f"</{found[1]}>", position)
        if end >= 0:
            position = end + len(found[1]) + 3
            yield found.start(), position


def _runs(lines: list[str], numbers: set[int]) -> Iterator[tuple[int, int]]:
    """Turn line numbers into spans of the text, without the newline at their end."""
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line) + 1)
    ordered = sorted(numbers)
    first = ordered[0] if ordered else 0
    for number, following in pairwise([*ordered, len(lines) + 1]):
        if following != number + 1:
            if any(lines[line].strip() for line in range(first, number + 1)):
                yield starts[first], starts[number + 1] - 1
            first = following


def _merged(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if merged and start < merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        elif end > start:
            merged.append((start, end))
    return merged
