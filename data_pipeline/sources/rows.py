"""The common form of rows from any source: frames with prompt, answer and source.

Readers that see one row at a time pass them through `frames`. Readers of whole columns check a file's columns with
`check_columns`, and pass its tables through `table_frames`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import TYPE_CHECKING

import polars as pl

from data_pipeline.errors import DataError
from data_pipeline.sources.bad_rows import BadRowError, BadRows
from data_pipeline.sources.layouts import ChatLayout, Layout, TemplateLayout
from data_pipeline.sources.values import HALF_A_PAIR, column_of, text_of

if TYPE_CHECKING:
    import pyarrow as pa

# Text in memory at a time: this many rows, or about this many bytes if the rows are long.
ROWS_PER_FRAME = 8192
BYTES_PER_FRAME = 2**24

# A row, or why there is none, and a function that returns its name for errors.
Row = tuple["dict | BadRowError", Callable[[], str]]


def columns_of(layout: Layout, found: Collection[str]) -> list[str]:
    """List the columns of a source that a layout reads."""
    wanted = dict.fromkeys([*(column_of(field, found) for field in layout.fields), layout.source])
    return [column for column in wanted if column in found]


def missing_columns(layout: Layout, found: Collection[str]) -> list[str]:
    """List the columns that a layout needs and that are not among those found."""
    needed = [column_of(field, found) for field in layout.fields if field not in layout.optional]
    return list(dict.fromkeys(column for column in needed if column not in found))


# Rows one at a time


def frames(rows: Iterator[Row], layout: Layout, default_source: str, bad_rows: BadRows) -> Iterator[pl.DataFrame]:
    """Collect rows into frames of ROWS_PER_FRAME rows, or fewer if the rows are long.

    default_source: the source of rows that name none.
    """
    batch: list[dict] = []
    bad: list[tuple[BadRowError, Callable[[], str]]] = []
    size = 0
    texts_of = _texts_of(layout, default_source)
    for row, where in rows:
        try:
            texts = texts_of(row)
        except BadRowError as error:
            if bad_rows.on_bad_row == "refuse":
                bad_rows.add(error, where)
            bad.append((error, where))
            texts = {**layout.bad_row(), "source": default_source}
        batch.append(texts)
        size += sum(map(_characters, texts.values()))
        if len(batch) >= ROWS_PER_FRAME or size >= BYTES_PER_FRAME:
            yield _frame(batch, layout, bad, bad_rows)
            batch, bad, size = [], [], 0
    if batch:
        yield _frame(batch, layout, bad, bad_rows)


def empty_frame(layout: Layout) -> pl.DataFrame:
    """Return a frame without rows."""
    return _frame([], layout, [], BadRows())


def _texts_of(layout: Layout, default_source: str) -> Callable[[dict | BadRowError], dict]:
    """Return a function that reads the texts of a row. It raises BadRowError if it cannot."""
    if isinstance(layout, ChatLayout) or layout.optional or any("." in field for field in layout.fields):
        return lambda row: _texts(row, layout, default_source)
    fields, source, odd = layout.fields, layout.source, HALF_A_PAIR.search

    def texts_of(row: dict | BadRowError) -> dict:
        """Read the usual row, in which every field is a text; leave any other one to the function for all rows."""
        if isinstance(row, dict):
            texts = {field: row.get(field) for field in fields}
            texts["source"] = row.get(source, default_source)
            if all(type(text) is str and (text.isascii() or not odd(text)) for text in texts.values()):
                return texts
        return _texts(row, layout, default_source)

    return texts_of


def _texts(row: dict | BadRowError, layout: Layout, default_source: str) -> dict:
    if isinstance(row, BadRowError):
        raise row
    if missing := missing_columns(layout, row):
        names = " and no column ".join(missing)
        raise BadRowError(
            f"no column {names}", f"there is no column {names}; the columns are {', '.join(row) or 'none'}"
        )
    return {**layout.row(row), "source": text_of(row.get(layout.source, default_source), layout.source)}


def _characters(value: str | list | None) -> int:
    if isinstance(value, str):
        return len(value)
    return sum(map(_characters, value or ()))


def _frame(rows: list[dict], layout: Layout, bad: list, bad_rows: BadRows) -> pl.DataFrame:
    # Counted with the frame: a reader that begins again after a network fault reads the rows of an unfinished frame twice.
    for error, where in bad:
        bad_rows.add(error, where)
    source = pl.Series("source", [row.pop("source") for row in rows], dtype=pl.String)
    return layout.turns(rows).with_columns(source)


# Whole columns


def check_columns(schema: pa.Schema, where: str, layout: Layout) -> None:
    """Raise DataError if a column that the layout needs is missing, occurs twice, or cannot hold texts."""
    names = schema.names
    if missing := missing_columns(layout, names):
        raise DataError(
            f"{where} has no column {' and no column '.join(missing)}: it has {', '.join(names) or 'none'}, and the layout "
            f"{layout.name} needs {' and '.join(layout.fields)}"
        )
    if twice := [column for column in columns_of(layout, names) if names.count(column) > 1]:
        raise DataError(f"{where} has more than one column named {twice[0]}: rename the others")
    for name in [*layout.fields, layout.source]:
        if column_of(name, names) not in names:
            continue  # it is optional
        kind = _type_at(schema, name)
        is_chat = isinstance(layout, ChatLayout) and name == layout.messages
        if kind is None or not (_is_list(kind) if is_chat else _is_text(kind)):
            held = "no such field" if kind is None else str(kind)
            wanted = "a list of messages" if is_chat else "text"
            raise DataError(
                f"the column {name} of {where} holds {held}, not {wanted}: convert it, or name another column"
            )


def table_frames(
    table: pa.Table,
    layout: Layout,
    default_source: str,
    bad_rows: BadRows,
    place: Callable[[int], str],
    first: int = 0,
) -> Iterator[pl.DataFrame]:
    """Yield the rows of a table whose columns were checked.

    place: returns the name of a row for errors, by its position. first: the position of the table's first row.
    """
    import pyarrow as pa

    try:
        table.validate(full=True)  # readers trust text to be valid UTF-8, and it may not be
    except pa.ArrowInvalid:
        if len(table) > 1:  # find the rows by halving
            half = len(table) // 2
            yield from table_frames(table.slice(0, half), layout, default_source, bad_rows, place, first)
            yield from table_frames(table.slice(half), layout, default_source, bad_rows, place, first + half)
            return
        bad_rows.add(BadRowError("text that is not UTF-8", "it has text that is not UTF-8"), partial(place, first))
        yield bad_frame(layout, default_source)
        return
    yield _table_frame(table, layout, default_source, bad_rows, place, first)


def bad_frame(layout: Layout, source: str) -> pl.DataFrame:
    """Return what stands for a row that cannot be read."""
    return _frame([{**layout.bad_row(), "source": source}], layout, [], BadRows())


def _table_frame(
    table: pa.Table, layout: Layout, default_source: str, bad_rows: BadRows, place: Callable[[int], str], first: int
) -> pl.DataFrame:
    frame = pl.from_arrow(table)
    assert isinstance(frame, pl.DataFrame)
    if layout.source in frame.columns:
        source = frame.select(source=_text(layout.source, frame.columns))
    else:
        source = frame.select(source=pl.repeat(default_source, pl.len(), dtype=pl.String))
    if isinstance(layout, TemplateLayout):
        turns = layout.turns(frame.select(_text(field, frame.columns).alias(field) for field in layout.fields))
    else:
        turns = layout.turns(_conversations(frame[layout.messages].to_list(), layout, bad_rows, place, first))
    return turns.with_columns(source.to_series())


def _conversations(
    values: list, layout: ChatLayout, bad_rows: BadRows, place: Callable[[int], str], first: int
) -> list[dict]:
    rows: list[dict] = []
    for position, value in enumerate(values, first):
        try:
            rows.append(layout.row({layout.messages: value}))
        except BadRowError as error:
            bad_rows.add(error, partial(place, position))
            rows.append(layout.bad_row())
    return rows


def _text(field: str, columns: Collection[str]) -> pl.Expr:
    column = column_of(field, columns)
    if column not in columns:
        return pl.lit("")
    values = pl.col(column)
    for name in field[len(column) + 1 :].split(".") if field != column else []:
        values = values.struct.field(name)
    return values.cast(pl.String).fill_null("")


def _type_at(schema: pa.Schema, field: str) -> pa.DataType | None:
    import pyarrow as pa

    column = column_of(field, schema.names)
    kind = schema.field(column).type
    for name in field[len(column) + 1 :].split(".") if field != column else []:
        if not pa.types.is_struct(kind) or kind.get_field_index(name) < 0:
            return None
        kind = kind.field(name).type
    return kind


def _is_list(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_null(kind)


def _is_text(kind: pa.DataType) -> bool:
    import pyarrow.types as types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    texts = (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
    numbers = (types.is_integer, types.is_floating, types.is_decimal, types.is_boolean)
    return any(is_kind(kind) for is_kind in (*texts, *numbers))
