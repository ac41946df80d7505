"""The JSON schema of run configurations, by which editors complete keys and mark mistakes.

    python -m launcher.config_schema > launcher/configs/run.schema.json

It is made from the declarations in `launcher/config.py`. A YAML file names it in its first line:
`# yaml-language-server: $schema=run.schema.json`.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from typing import Any

from launcher.config import RunConfig
from launcher.run_keys import Key

TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}
BOUNDS = {"at_least": "minimum", "above": "exclusiveMinimum", "at_most": "maximum", "below": "exclusiveMaximum"}


def schema() -> dict[str, Any]:
    """Return the schema of a run's YAML file."""
    return {"$schema": "http://json-schema.org/draft-07/schema#", "title": "A run's keys", **_of_section(RunConfig)}


def _of_section(section: Any) -> dict[str, Any]:
    """Return the schema of the keys of a dataclass; other keys are mistakes."""
    hints = typing.get_type_hints(section)
    declared = [field for field in dataclasses.fields(section) if "key" in field.metadata]
    required = [field.name for field in declared if field.default is field.default_factory]  # both are MISSING
    return {
        "type": "object",
        "properties": {field.name: _of_key(field, hints[field.name]) for field in declared},
        "additionalProperties": False,
        **({"required": required} if required else {}),
    }


def _of_key(field: dataclasses.Field, hint: Any) -> dict[str, Any]:
    key: Key = field.metadata["key"]
    allowed = {"description": key.meaning, **_of_type(hint)}
    allowed |= {name: getattr(key, bound) for bound, name in BOUNDS.items() if getattr(key, bound) is not None}
    if key.one_of:
        allowed["enum"] = list(key.one_of)
    if key.not_empty:
        allowed |= {"minLength": 1} | ({"minItems": 1} if "anyOf" in allowed else {})  # of a text, of a list
    if isinstance(field.default, str | int | float):
        allowed["default"] = field.default
    return allowed


def _of_type(hint: Any) -> dict[str, Any]:
    if isinstance(hint, types.UnionType):
        options = [_of_type(option) for option in typing.get_args(hint)]
        plain = [option["type"] for option in options if option.keys() == {"type"}]
        return {"type": plain} if len(plain) == len(options) else {"anyOf": options}
    if typing.get_origin(hint) is list:
        return {"type": "array", "items": _of_type(typing.get_args(hint)[0])}
    return _of_section(hint) if dataclasses.is_dataclass(hint) else {"type": TYPES[hint]}


def text() -> str:
    """Return the content of `launcher/configs/run.schema.json`."""
    return json.dumps(schema(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    print(text(), end="")
