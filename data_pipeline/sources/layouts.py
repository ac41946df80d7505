"""Layouts: how the fields of a row become the prompts and answers of a document."""

from __future__ import annotations

from dataclasses import dataclass
from string import Formatter

import polars as pl

from data_pipeline.errors import DataError
from data_pipeline.sources.conversations import turns_of
from data_pipeline.sources.values import text_of, value_at

SOURCE = "source"  # the column with the name of a row's origin, which any layout may have


@dataclass(frozen=True)
class Template:
    """A text with the names of fields in braces. A field is a column, or a value inside one: `translation.de`.

    Raises DataError if the braces do not match, or if they hold anything but names.
    """

    text: str

    def __post_init__(self) -> None:
        if not self.fields:
            raise DataError(f"the template {self.text!r} names no column: write one in braces, such as {{question}}")

    @property
    def parts(self) -> list[tuple[str, str | None]]:
        """Return pairs of a literal text and the field after it, which is None after the last literal."""
        try:
            parsed = list(Formatter().parse(self.text))
        except ValueError as error:
            raise DataError(
                f"the template {self.text!r} has braces that do not match: double those that belong to the text ({error})"
            ) from error
        for _, name, form, conversion in parsed:
            if name == "" or form or conversion:
                raise DataError(f"the template {self.text!r} has braces without the plain name of a column: write one")
        return [(literal, name) for literal, name, _, _ in parsed]

    @property
    def fields(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for _, name in self.parts if name is not None))

    def render(self) -> pl.Expr:
        """Return the expression of the filled-in text. Line breaks that an empty field leaves at the ends are removed."""
        pieces = []
        for literal, name in self.parts:
            pieces += [pl.lit(literal)] if literal else []
            pieces += [pl.col(name)] if name else []
        return pieces[0] if len(pieces) == 1 else pl.concat_str(pieces).str.strip_chars("\n")


@dataclass(frozen=True)
class TemplateLayout:
    """A document of one turn, or a plain text if there is no prompt.

    source: the column with the row's origin. optional: fields that may be missing; they are empty then.
    """

    name: str
    prompt: Template | None
    answer: Template
    source: str = SOURCE
    optional: tuple[str, ...] = ()

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields that hold texts."""
        of_prompt = self.prompt.fields if self.prompt else ()
        return tuple(dict.fromkeys((*of_prompt, *self.answer.fields)))

    def config(self) -> dict:
        """Return what decides the documents, as JSON values."""
        prompt = self.prompt.text if self.prompt else None
        return {"name": self.name, "prompt": prompt, "answer": self.answer.text, "source": self.source}

    @property
    def has_one_turn(self) -> bool:
        """Whether every row has one prompt and one answer."""
        return self.prompt is not None

    def row(self, row: dict) -> dict[str, str]:
        """Return the texts of one row by field. Raises BadRowError if a value is no text."""
        return {name: text_of(value_at(row, name), name) for name in self.fields}

    def bad_row(self) -> dict[str, None]:
        """Return what stands for a row that cannot be read."""
        return dict.fromkeys(self.fields)

    def turns(self, rows: list[dict] | pl.DataFrame) -> pl.DataFrame:
        """Return prompt and answer, two columns of strings, from the texts by field; plain texts have no prompt.

        Both are null for a row that cannot be read.
        """
        frame = pl.DataFrame(rows, schema=dict.fromkeys(self.fields, pl.String)) if isinstance(rows, list) else rows
        prompt = {"prompt": self.prompt.render()} if self.prompt else {}
        return frame.select(**prompt, answer=self.answer.render())


@dataclass(frozen=True)
class ChatLayout:
    """A document of one turn for each message of the user and its answer.

    messages: the column with the list of messages.
    """

    messages: str
    name: str = "chat"
    source: str = SOURCE
    optional: tuple[str, ...] = ()

    @property
    def fields(self) -> tuple[str, ...]:
        """The field that holds the messages."""
        return (self.messages,)

    def config(self) -> dict:
        """Return what decides the documents, as JSON values."""
        return {"name": self.name, "messages": self.messages, "source": self.source}

    @property
    def has_one_turn(self) -> bool:
        """Whether every row has one prompt and one answer."""
        return False

    def row(self, row: dict) -> dict[str, list[str]]:
        """Return the prompts and answers of one row. Raises BadRowError for a conversation that cannot be read."""
        prompts, answers = turns_of(row.get(self.messages), self.messages)
        return {"prompt": prompts, "answer": answers}

    def bad_row(self) -> dict[str, list[None]]:
        """Return what stands for a row that cannot be read."""
        return {"prompt": [None], "answer": [None]}

    def turns(self, rows: list[dict]) -> pl.DataFrame:
        """Return prompt and answer, two columns of lists with one string per turn."""
        return pl.DataFrame(rows, schema=dict.fromkeys(("prompt", "answer"), pl.List(pl.String)))


Layout = TemplateLayout | ChatLayout
