"""The built-in sample corpus: about 7,500 short questions and answers, enough for a tiny model to learn within minutes.

Rows have the columns of WebInstructSub (`orig_question`, `orig_answer`, `question`, `answer`, `source`, `index`) and
its kinds of dirt. All random choices come from `random.Random(SEED)`, so the rows are the same on every machine.

**Families.** Fact tables (`sample_facts.py`: capitals, elements, opposites, animals, months, definitions, ...) and
number families computed here (sums, differences, times tables, equations, units, comparisons, parity, neighbors,
weekdays some days on). A family is a list of facts and 4 to 7 phrasings; a fact has one answer in every phrasing.

**The split.** No held-out question occurs in training. Each one combines things that do, in one of two ways:

- `known` (about two thirds): training asks for the same fact in other phrasings, and uses this phrasing for other
  facts. Right answers show that the model has learned facts and not strings.
- `new` (about a third): training never has the operands together. A held-out number bond (7, 8, 15) is held out in
  either order, and from sums, differences and equations. The same holds for a pair of numbers to compare, a number
  whose parity or neighbor is asked, a number with a unit, and a weekday with a number of days. Every word of such an
  answer occurs in other training answers. Right answers show that the model computes rather than recalls. Held-out
  numbers lie in the range of the trained ones, so longer numbers are not measured.

**Dirt.** About a sixth of the training rows have dirt in question or answer: entities, URLs, control and zero-width
characters, decomposed accents, stray whitespace. A few rows are exact repetitions, have no answer, or contain `<s>` and
`<mask>` as text. Cleaning `training_rows()` gives `clean_rows()`, row by row. Held-out rows are clean.
"""

import html
import random
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from data_pipeline.sources.sample_facts import FACT_TABLES, WEEKDAYS

SEED = 20240527
SHARE_OF_SOILED_ROWS = 0.17
SHARE_OF_REPEATED_ROWS = 0.02


@dataclass(frozen=True)
class Fact:
    """The values for a phrasing's slots, the answer, and the combination to hold out as a whole ("" for never)."""

    slots: tuple[str, ...]
    answer: str
    combination: str = ""


@dataclass(frozen=True)
class Family:
    """Facts that share their phrasings. Training asks for each fact in at most `phrasings_per_fact` of them."""

    name: str
    source: str
    phrasings: tuple[str, ...]
    facts: tuple[Fact, ...]
    phrasings_per_fact: int
    held_out_known: int = 0
    held_out_new: int = 0


@dataclass(frozen=True)
class Entry:
    """One question and its answer, before dirt. `kind` is `training`, `known` or `new` (see the module's docstring)."""

    family: str
    source: str
    fact: Fact
    phrasing: str
    kind: str

    @property
    def question(self) -> str:
        return self.phrasing.format(*self.fact.slots)

    @property
    def answer(self) -> str:
        return self.fact.answer


def _mathematics(name: str, phrasings: tuple[str, ...], facts: list[Fact], phrasings_per_fact: int,
                 known: int = 0, new: int = 0) -> Family:
    return Family(name, "mathstackexchange", phrasings, tuple(facts), phrasings_per_fact, known, new)


def _bond(first: int, second: int) -> str:
    # Bonds with 0 and 1 are never held out: the questions about the neighbors of a number would give the answer away.
    return f"bond {min(first, second)} {max(first, second)}" if min(first, second) > 1 else ""


def _arithmetic_families() -> list[Family]:
    bonds = [(first, second) for first in range(21) for second in range(21 - first)]
    sums = [Fact((str(a), str(b)), str(a + b), _bond(a, b)) for a, b in bonds]
    differences = [Fact((str(a + b), str(a)), str(b), _bond(a, b)) for a, b in bonds]
    # x + a = c. Equations with zero are left out: they are trivial, and the sums have enough zeros.
    equations = [Fact((str(a), str(a + b)), f"x = {b}", _bond(a, b)) for a, b in bonds if a and b]
    products = [Fact((str(a), str(b)), str(a * b)) for a in range(2, 11) for b in range(2, 11)]
    return [
        _mathematics("addition", (
            "What is {} + {}?", "What is {} plus {}?", "Add {} and {}.", "Compute {} + {}.", "{} plus {} is what?",
            "What do {} and {} add up to?", "A box holds {} red and {} blue pens. How many pens is that?",
        ), sums, 4, known=4, new=6),
        _mathematics("subtraction", (
            "What is {} - {}?", "What is {} minus {}?", "Compute {} - {}.", "{} minus {} is what?",
            "From {} take away {}. What is left?", "What's the result of {} - {}?",
            "Of {} birds, {} fly away. How many birds stay?",
        ), differences, 4, known=3, new=5),
        _mathematics("equations", (
            "Solve for x: x + {} = {}.", "Find x if x + {} = {}.", "If x + {} = {}, what is x?",
            "Which x makes x + {} = {} true?",
        ), equations, 2, new=4),
        _mathematics("times tables", (
            "What is {} × {}?", "Multiply {} by {}.", "Compute {} × {}.", "{} times {} is what?",
            "What's the product of {} and {}?",
        ), products, 4, known=6),
    ]


def _number_families(generator: random.Random) -> list[Family]:
    numbers = range(1, 100)
    parities = [Fact((str(n),), "even" if n % 2 == 0 else "odd", f"parity {n}") for n in numbers]
    following = [Fact((str(n),), str(n + 1), f"after {n}") for n in numbers]
    preceding = [Fact((str(n),), str(n - 1), f"before {n}") for n in numbers]
    pairs = sorted({tuple(sorted(generator.sample(range(10, 100), 2))) for _ in range(160)})
    # Either number may come first; otherwise the model could answer by position.
    shown = [(pair, pair if generator.random() < 0.5 else pair[::-1]) for pair in pairs]
    larger = [Fact((str(a), str(b)), str(pair[1]), f"compare {pair}") for pair, (a, b) in shown]
    signs = [Fact((str(a), str(b)), "<" if a < b else ">", f"compare {pair}") for pair, (a, b) in shown]
    return [
        _mathematics("parity", (
            "Is {} even or odd?", "Is the number {} odd or even?", "Tell me if {} is even or odd.",
            "{}: even or odd?",
        ), parities, 2, new=7),
        _mathematics("next numbers", (
            "What number comes after {}?", "Which number follows {}?", "Count on by one from {}.",
            "What's one more than {}?",
        ), following, 2, new=5),
        _mathematics("previous numbers", (
            "What number comes before {}?", "Which number precedes {}?", "Count back by one from {}.",
            "What's one less than {}?",
        ), preceding, 2, new=4),
        _mathematics("larger numbers", (
            "Which is larger, {} or {}?", "Which number is greater: {} or {}?", "Name the larger of {} and {}.",
            "Of {} and {}, which is more?",
        ), larger, 2, new=6),
        _mathematics("signs", (
            "Which sign stands between {} and {}, < or >?", "Put < or > between {} and {}.",
            "Is it {} < {} or >?", "Compare {} with {}: < or >?",
        ), signs, 2, new=5),
    ]


# Decimal conversions only append zeros, so the model can convert a number that it never saw with the unit.
DECIMAL_UNITS = (
    ("meters", "centimeters", "00"), ("kilometers", "meters", "000"), ("centimeters", "millimeters", "0"),
    ("kilograms", "grams", "000"), ("liters", "milliliters", "000"), ("tonnes", "kilograms", "000"),
    ("dollars", "cents", "00"), ("decades", "years", "0"), ("centuries", "years", "00"),
)
OTHER_UNITS = (
    ("feet", "inches", 12), ("years", "months", 12), ("hours", "minutes", 60), ("minutes", "seconds", 60),
    ("days", "hours", 24), ("weeks", "days", 7),
)
UNIT_PHRASINGS = (
    "How many {1} are in {0} {2}?", "Convert {0} {2} to {1}.", "{0} {2} is how many {1}?",
    "Express {0} {2} in {1}.", "What is {0} {2} in {1}?",
)
NUMBER_OF_DAYS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}


def _measure_families() -> list[Family]:
    decimal = [Fact((str(n), small, large), f"{n}{zeros} {small}", f"{n} {large} in {small}")
               for large, small, zeros in DECIMAL_UNITS for n in range(2, 21)]
    other = [Fact((str(n), small, large), f"{n * factor} {small}")
             for large, small, factor in OTHER_UNITS for n in range(2, 9)]
    later = [Fact((words, day), WEEKDAYS[(position + days) % 7], f"{days} after {day}")
             for position, day in enumerate(WEEKDAYS) for days, words in NUMBER_OF_DAYS.items()]
    earlier = [Fact((words, day), WEEKDAYS[(position - days) % 7], f"{days} before {day}")
               for position, day in enumerate(WEEKDAYS) for days, words in NUMBER_OF_DAYS.items()]
    return [
        Family("decimal units", "socratic", UNIT_PHRASINGS, tuple(decimal), 2, held_out_new=14),
        Family("other units", "socratic", UNIT_PHRASINGS, tuple(other), 4, held_out_known=5),
        Family("weekdays later", "stackexchange", (
            "What day is {} days after {}?", "Which day comes {} days after {}?", "Name the day {} days after {}.",
            "What's the weekday {} days after {}?",
        ), tuple(later), 4, held_out_known=2, held_out_new=1),
        Family("weekdays earlier", "stackexchange", (
            "What day is {} days before {}?", "Which day comes {} days before {}?", "Name the day {} days before {}.",
            "What's the weekday {} days before {}?",
        ), tuple(earlier), 4, held_out_known=2, held_out_new=1),
    ]


def _families(generator: random.Random) -> list[Family]:
    tables = [
        Family(table.name, table.source, table.phrasings,
               tuple(Fact((subject,), answer) for subject, answer in table.answers.items()),
               phrasings_per_fact=min(5, len(table.phrasings)), held_out_known=table.held_out)
        for table in FACT_TABLES
    ]
    return tables + _arithmetic_families() + _number_families(generator) + _measure_families()


def _hold_out_combinations(families: list[Family], generator: random.Random) -> dict[str, Entry]:
    """Return the one question about each held-out combination. Its other facts are left out of the corpus."""
    facts_by_combination: dict[str, list[Fact]] = {}
    for family in families:
        for fact in family.facts:
            facts_by_combination.setdefault(fact.combination, []).append(fact)
    remaining_words = Counter(word for family in families for fact in family.facts for word in fact.answer.split())
    held_out: dict[str, Entry] = {}
    for family in families:
        candidates = [fact for fact in family.facts if fact.combination]
        generator.shuffle(candidates)
        wanted = len(held_out) + family.held_out_new
        while len(held_out) < wanted:
            fact = candidates.pop()
            leaving = Counter(word for gone in facts_by_combination[fact.combination] for word in gone.answer.split())
            # Each word of the answer must remain in at least one training row. Otherwise a right answer would be luck.
            if fact.combination in held_out or any(remaining_words[word] <= leaving[word] for word in leaving):
                continue
            remaining_words -= leaving
            held_out[fact.combination] = Entry(family.name, family.source, fact, generator.choice(family.phrasings), "new")
    return held_out


def split() -> tuple[list[Entry], list[Entry]]:
    """Return the training entries and the held-out entries, in the order of the families."""
    generator = random.Random(SEED)
    families = _families(generator)
    new = _hold_out_combinations(families, generator)
    training, held_out = [], list(new.values())
    for family in families:
        facts = [fact for fact in family.facts if fact.combination not in new]
        asked_in_a_new_phrasing = set(generator.sample(range(len(facts)), family.held_out_known))
        for position, fact in enumerate(facts):
            phrasings = generator.sample(family.phrasings, family.phrasings_per_fact)
            if position in asked_in_a_new_phrasing:
                held_out.append(Entry(family.name, family.source, fact, phrasings.pop(), "known"))
            training += [Entry(family.name, family.source, fact, phrasing, "training") for phrasing in phrasings]
    return training, held_out


# Some rows of WebInstructSub have no answer. Here one answer is empty and one is whitespace.
UNANSWERED = (("What is the best book ever written?", ""), ("How many stars will we never see?", " \t "))
# Strings that are special tokens for the tokenizer, used here as plain text.
LITERAL_TOKENS = (
    ("What does the HTML tag <s> do?", "It strikes text through."), ("Which tag closes the HTML tag <s>?", "</s>"),
    ("What does a masked language model read in place of a hidden word?", "<mask>"),
)


def _row(question: str, answer: str, source: str, index: int) -> dict:
    return {"orig_question": question, "orig_answer": answer, "question": question, "answer": answer,
            "source": source, "index": index}


def held_out_rows() -> list[dict]:
    """Return the held-out questions with their clean answers, in the columns of WebInstructSub."""
    return [_row(entry.question, entry.answer, entry.source, index) for index, entry in enumerate(split()[1])]


def clean_rows() -> list[dict]:
    """Return the training rows without dirt: row i is row i of `training_rows()`, which ends with repetitions."""
    texts = [(entry.question, entry.answer, entry.source) for entry in split()[0]]
    texts += [(question, answer.strip(), "stackexchange") for question, answer in UNANSWERED]
    texts += [(question, answer, "stackexchange") for question, answer in LITERAL_TOKENS]
    random.Random(SEED).shuffle(texts)
    return [_row(*text, index) for index, text in enumerate(texts)]


def training_rows() -> Iterator[dict]:
    """Yield the training rows in the columns of WebInstructSub, with dirt and repetitions like scraped text."""
    generator = random.Random(SEED)
    whitespace_answers = dict(UNANSWERED)
    literal_questions = [question for question, _ in LITERAL_TOKENS]
    rows = []
    for clean in clean_rows():
        question, answer = clean["question"], whitespace_answers.get(clean["question"], clean["answer"])
        if answer.strip() and question not in literal_questions and generator.random() < SHARE_OF_SOILED_ROWS:
            question = _soil(question, generator)
            # An answer with accents always gets dirt as well: few have accents, and these are to be decomposed.
            if generator.random() < 0.2 or not answer.isascii():
                answer = _soil(answer, generator)
        rows.append(clean | {
            "orig_question": _as_html(clean["question"], generator), "orig_answer": _as_html(clean["answer"], generator),
            "question": question, "answer": answer,
        })
    repeated = generator.sample(rows, round(SHARE_OF_REPEATED_ROWS * len(rows)))
    yield from rows
    yield from (row | {"index": len(rows) + position} for position, row in enumerate(repeated))


def _as_html(text: str, generator: random.Random) -> str:
    link = f' (see <a href="{_url(generator)}">here</a>)' if generator.random() < 0.05 else ""
    return f"<p>{_escape(text)}{link}</p>\n"


def _escape(text: str) -> str:
    return html.escape(text).replace("&#x27;", "&#39;")


def _url(generator: random.Random) -> str:
    site = generator.choice(("example.org/questions", "example.com/q", "www.example.net/a"))
    return f"https://{site}/{generator.randrange(10_000, 1_000_000)}"


def _insert(text: str, position: int, piece: str) -> str:
    return text[:position] + piece + text[position:]


def _inside_a_word(text: str, generator: random.Random) -> int:
    return generator.choice([i for i in range(1, len(text)) if text[i - 1].isalpha() and text[i].isalpha()] or [0])


def _at_a_space(text: str, piece: str, generator: random.Random) -> str:
    """Replace one space of the text by the piece, or append the piece if the text has no space."""
    spaces = [position for position, character in enumerate(text) if character == " "]
    if not spaces:
        return text + piece
    position = generator.choice(spaces)
    return text[:position] + piece + text[position + 1:]


# Cleaning undoes each kind of dirt exactly. Line breaks are only added at the end, because cleaning may rightly keep
# others. Control characters are put beside a space, where removing them and treating them as separators are the same.
DIRT: dict[str, Callable[[str, random.Random], str]] = {
    "entity": lambda text, generator: _escape(text),
    "twice-escaped entity": lambda text, generator: _escape(_escape(text)),
    "decomposed accent": lambda text, generator: unicodedata.normalize("NFD", text),
    "URL": lambda text, generator: f"{text} {_url(generator)}",
    "URL in brackets": lambda text, generator: f"{text} ({_url(generator)})",
    "control character": lambda text, generator: _at_a_space(
        text, " " + generator.choice("\x01\x07\x08\x1b\x7f"), generator),
    "zero-width character": lambda text, generator: _insert(
        text, _inside_a_word(text, generator), generator.choice("\u200b\u2060")),
    "soft hyphen": lambda text, generator: _insert(text, _inside_a_word(text, generator), "\u00ad"),
    "byte-order mark": lambda text, generator: "\ufeff" + text,
    "no-break space": lambda text, generator: _at_a_space(text, generator.choice(("\u00a0", "&nbsp;")), generator),
    "spaces": lambda text, generator: _at_a_space(text, generator.choice(("  ", "   ", " \t ")), generator),
    "CRLF": lambda text, generator: text + generator.choice(("\r\n", " \r\n\r\n")),
}
RARE_DIRT = ("entity", "twice-escaped entity", "decomposed accent")


def _soil(text: str, generator: random.Random) -> str:
    """Return the text with one kind of dirt, preferring a rare kind if the text can have it."""
    possible = [kind for kind in RARE_DIRT if DIRT[kind](text, generator) != text]
    common = [kind for kind in DIRT if kind not in RARE_DIRT]
    if "decomposed accent" in possible:
        kind = "decomposed accent"
    else:
        kind = generator.choice(possible if possible and generator.random() < 0.5 else common)
    return DIRT[kind](text, generator)
