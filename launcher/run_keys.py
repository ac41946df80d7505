"""Declare a run key once: its default, meaning and bounds.

The checks and the table of all keys (`launcher/configs/README.md`) are made from these declarations.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from launcher.errors import ConfigurationError


@dataclass(frozen=True)
class Key:
    """A key's meaning and its allowed values. Bounds apply to numbers; infinity and NaN are never allowed."""

    meaning: str
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    one_of: tuple[str, ...] = ()
    not_empty: bool = False

    def fault(self, value: Any) -> str:
        """Return what is wrong with a value, to follow the key's name in a message; an empty string if it is valid."""
        if value is None:
            return ""
        if self.one_of and value not in self.one_of:
            return f"is {value!r}; it must be {' or '.join(map(repr, self.one_of))}"
        if self.not_empty and not value:
            return "is empty; name one, or leave the key out for its default"
        if isinstance(value, int | float) and not isinstance(value, bool) and not self._is_within(value):
            shown = f"{value:g}" if isinstance(value, float) else value
            return f"is {shown}; it must be {self.bounds}"
        return ""

    def _is_within(self, value: float) -> bool:
        return (
            (isinstance(value, int) or math.isfinite(value))
            and (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )

    @property
    def bounds(self) -> str:
        """Return the bounds in words."""
        names = (("at least", self.at_least), ("above", self.above), ("at most", self.at_most), ("below", self.below))
        return " and ".join(f"{name} {_short(bound)}" for name, bound in names if bound is not None) or "finite"


def key(default: Any, meaning: str, **limits: Any) -> Any:
    """Declare a configuration field with its `Key`; a callable default, such as a class, is called for each instance."""
    metadata = {"key": Key(meaning, **limits)}
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=metadata)
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def keys_of(cls: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field, Key]]:
    """Yield all keys of a configuration by full name, including those of its sections."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if "key" not in field.metadata:
            continue
        section = section_of(hints[field.name])
        yield f"{prefix}{field.name}", field, field.metadata["key"]
        if section is not None:
            yield from keys_of(section, f"{prefix}{field.name}{'[]' if _is_list(hints[field.name]) else ''}.")


def section_of(hint: Any) -> Any:
    """Return the dataclass in a type such as `Section`, `Section | None` or `str | list[Section]`; None without one."""
    if dataclasses.is_dataclass(hint):
        return hint
    return next(filter(None, map(section_of, typing.get_args(hint))), None)


def check_values(config: Any, prefix: str = "") -> None:
    """Raise `ConfigurationError` for the first value that its key does not allow."""
    for field in dataclasses.fields(config):
        if "key" not in field.metadata:
            continue
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            check_values(value, f"{prefix}{field.name}.")
        elif isinstance(value, list) and value and dataclasses.is_dataclass(value[0]):
            for place, entry in enumerate(value):
                check_values(entry, f"{prefix}{field.name}[{place}].")
        elif fault := field.metadata["key"].fault(value):
            raise ConfigurationError(f"{prefix}{field.name} {fault}")


def table(cls: type) -> str:
    """Format all keys as a Markdown table: name, default, meaning with bounds."""
    rows = ["| key | default | meaning |", "|---|---|---|"]
    hints = _hints_by_name(cls)
    for name, field, declared in keys_of(cls):
        if section_of(hints[name]) is not None and not _has_value(field):
            rows.append(f"| `{name}` | | {declared.meaning} |")
            continue
        limits = " or ".join(f"`{choice}`" for choice in declared.one_of)
        if not limits and declared.bounds != "finite":
            limits = declared.bounds
        rows.append(f"| `{name}` | {_default(field)} | {declared.meaning}{f' ({limits})' if limits else ''} |")
    return "\n".join(rows) + "\n"


def _hints_by_name(cls: type, prefix: str = "") -> dict[str, object]:
    found = {}
    for name, hint in typing.get_type_hints(cls).items():
        found[f"{prefix}{name}"] = hint
        if (section := section_of(hint)) is not None:
            found |= _hints_by_name(section, f"{prefix}{name}{'[]' if _is_list(hint) else ''}.")
    return found


def _is_list(hint: Any) -> bool:
    return typing.get_origin(hint) is list or any(typing.get_origin(part) is list for part in _parts(hint))


def _parts(hint: Any) -> tuple:
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else ()


def _has_value(field: dataclasses.Field) -> bool:
    return field.default is not dataclasses.MISSING and field.default is not None


def _default(field: dataclasses.Field) -> str:
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if value is dataclasses.MISSING:
        return "required"
    if value is None:
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, list):
        return ", ".join(f"`{entry}`" for entry in value)
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def _short(bound: float) -> str:
    return f"{bound:,}" if bound < 2**53 else f"2^{math.log2(bound):.0f}"
