"""The common form of rows from any source: frames with prompt, answer and source.

Readers that see one row at a time pass each through `values_of` and all of them through `frames`. Readers of whole columns
check a file's columns with `check_columns` and pass its tables through `text_frame`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

import polars as pl

from data_pipeline.errors import DataError
from data_pipeline.sources.layouts import ChatLayout, Layout, TemplateLayout
from data_pipeline.sources.values import column_of, text_of

if TYPE_CHECKING:
    import pyarrow as pa

# Text in memory at a time: this many rows, or about this many bytes if the rows are long.
ROWS_PER_FRAME = 8192
BYTES_PER_FRAME = 2**24


def columns_of(layout: Layout, found: Collection[str]) -> list[str]:
    """List the columns of a source that a layout reads."""
    wanted = dict.fromkeys([*(column_of(field, found) for field in layout.fields), layout.source])
    return [column for column in wanted if column in found]


def require_columns(layout: Layout, found: Collection[str], where: str) -> None:
    """Raise DataError if a column that the layout needs is missing."""
    needed = [column_of(field, found) for field in layout.fields if field not in layout.optional]
    missing = [column for column in needed if column not in found]
    if missing:
        raise DataError(
            f"{where} has no column {' and no column '.join(dict.fromkeys(missing))}: it has {', '.join(found) or 'none'}, "
            f"and the layout {layout.name} needs {' and '.join(layout.fields)}"
        )


# Rows one at a time


def values_of(row: dict, where: str, default_source: str, layout: Layout) -> dict:
    """Return the texts of one row. Raises DataError if a column is missing or holds no text."""
    require_columns(layout, row, where)
    source = row.get(layout.source, default_source)
    return {**layout.row(row, where), "source": text_of(source, f"{where} source")}


def frames(values: Iterator[dict], layout: Layout) -> Iterator[pl.DataFrame]:
    """Collect rows into frames of ROWS_PER_FRAME rows, or fewer if the rows are long."""
    batch, size = [], 0
    for row in values:
        batch.append(row)
        size += sum(_characters(value) for value in row.values())
        if len(batch) >= ROWS_PER_FRAME or size >= BYTES_PER_FRAME:
            yield _frame(batch, layout)
            batch, size = [], 0
    if batch:
        yield _frame(batch, layout)


def empty_frame(layout: Layout) -> pl.DataFrame:
    """Return a frame without rows."""
    return _frame([], layout)


def _characters(value: str | list[str]) -> int:
    return len(value) if isinstance(value, str) else sum(map(len, value))


def _frame(rows: list[dict], layout: Layout) -> pl.DataFrame:
    source = pl.Series("source", [row.pop("source") for row in rows], dtype=pl.String)
    return layout.turns(rows).with_columns(source)


# Whole columns


def check_columns(schema: pa.Schema, where: str, layout: Layout) -> None:
    """Raise DataError if a column that the layout needs is missing, occurs twice, or cannot hold texts."""
    require_columns(layout, schema.names, where)
    if twice := [column for column in columns_of(layout, schema.names) if schema.names.count(column) > 1]:
        raise DataError(f"{where} has more than one column named {twice[0]}: rename the others")
    for name in [*layout.fields, layout.source]:
        if column_of(name, schema.names) not in schema.names:
            continue  # it is optional
        kind = _type_at(schema, name)
        is_chat = isinstance(layout, ChatLayout) and name == layout.messages
        if kind is None or not (_is_list(kind) if is_chat else _is_text(kind)):
            held = "no such field" if kind is None else str(kind)
            wanted = "a list of messages" if is_chat else "text"
            raise DataError(
                f"the column {name} of {where} holds {held}, not {wanted}: convert it, or name another column"
            )


def text_frame(table: pa.Table, where: str, default_source: str, layout: Layout, first_row: int = 0) -> pl.DataFrame:
    """Return the rows of a table whose columns were checked.

    where: names the file in errors. first_row: number of the table's first row in the file.
    Raises DataError for a row that the layout cannot read.
    """
    frame = pl.from_arrow(table)
    assert isinstance(frame, pl.DataFrame)
    if layout.source in frame.columns:
        source = frame.select(source=_text(layout.source, frame.columns))
    else:
        source = frame.select(source=pl.repeat(default_source, pl.len(), dtype=pl.String))
    if isinstance(layout, TemplateLayout):
        turns = layout.turns(frame.select(_text(field, frame.columns).alias(field) for field in layout.fields))
    else:
        messages = frame[layout.messages].to_list()
        turns = layout.turns([
            layout.row({layout.messages: value}, f"{where}, row {number},") for number, value in enumerate(messages, first_row)
        ])  # fmt: skip
    return turns.with_columns(source.to_series())


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
