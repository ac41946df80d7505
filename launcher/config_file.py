"""Read a run configuration: a YAML file plus `key=value` overrides, typed and strict."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from launcher.config import RunConfig
from launcher.errors import ConfigurationError
from launcher.run_keys import table

NULL = ("", "null", "~", "None")
# Keys whose `~` and variables are expanded on reading. `data_cache.folder` is not one of them: each machine expands it.
PATH_KEYS = re.compile(r"data|data\[\d+\]\.path|validation_data|output|model|init_from|prepare\.(source|tokenizer)")
CONFIG_FOLDER = Path(__file__).parent / "configs"
DEFAULT_CONFIG = CONFIG_FOLDER / "sample.yaml"


class _Once(argparse.Action):
    """Refuse an option that is given twice, because argparse would silently drop its first value."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if getattr(namespace, f"given_{self.dest}", False):
            parser.error(f"{option_string} is given twice ({getattr(namespace, self.dest)} and {values}); give it once")
        setattr(namespace, f"given_{self.dest}", True)
        setattr(namespace, self.dest, values)


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--config` and the `key=value` overrides to a parser."""
    parser.add_argument("--config", action=_Once, default=str(DEFAULT_CONFIG), help="run configuration, a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a key of the run configuration")


def load_run_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file and apply `key=value` overrides (`loss.focal=0.2` reaches into a section).

    A value is read as its key's type: text is kept as written (`output=1.10`), and `~` and variables in paths are
    expanded. The file may also be the run.yaml of a run, to repeat that run. The file's `prepare` belongs to the file's
    `data`: if only `data` is overridden, nothing is prepared.
    Raises `ConfigurationError` for a missing or unreadable file, an unknown key (naming the nearest one) or a value of
    the wrong type.
    """
    fields, origin = read_yaml(path), _Origin(str(path))
    if {"config", "deepspeed", "world_size"} <= fields.keys():
        fields = fields["config"]
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator:
            raise ConfigurationError(
                f"{override!r} is not an override; write it as key=value, for example max_steps=100"
            )
        section = fields
        *parents, last = key.split(".")
        for parent in parents:
            section = section.setdefault(parent, {})
            if not isinstance(section, dict):
                raise ConfigurationError(f"{key!r} reaches into {parent!r}, which is not a section")
        section[last] = _parse_value(key, value)
        origin.overrides[key] = override
    if "data" in origin.overrides and not any(key.split(".")[0] == "prepare" for key in origin.overrides):
        fields.pop("prepare", None)
    config = _build(RunConfig, fields, "", origin)
    config.explicit = frozenset(fields)
    return config


class _TextLoader(yaml.BaseLoader):
    """Load YAML with all values as text; the key's type decides what 1.10, 010, 12:30 or 2024_01 mean."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        mapping = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in mapping:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key} is given twice", key_node.start_mark
                )
            mapping[key] = self.construct_object(value_node, deep=True)
        return mapping


def read_yaml(path: str | Path) -> dict:
    """Read the mapping in a YAML file, with text values. Raises `ConfigurationError` if it is missing or no mapping."""
    try:
        content = yaml.load(Path(path).read_text(), _TextLoader)
    except OSError as error:
        known = ", ".join(sorted(p.name for p in CONFIG_FOLDER.glob("*.yaml")))
        raise ConfigurationError(
            f"cannot read the run configuration {path}: {error.strerror}; {CONFIG_FOLDER.name}/ in the launcher has {known}"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if content in (None, ""):
        return {}
    if not isinstance(content, dict):
        raise ConfigurationError(f"{path} must be a mapping of keys to values, not a {type(content).__name__}")
    return content


def as_dict(config: RunConfig) -> dict:
    """Return the configuration as plain values for YAML."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name != "explicit"}


def _parse_value(key: str, value: str) -> Any:
    """Parse an override's value: plain text if the key takes text, else YAML (lists and sections)."""
    if _takes_text(key) and not (key == "data" and value.startswith("[")):
        return value
    try:
        return yaml.load(value, _TextLoader) if value else ""
    except yaml.YAMLError as error:
        raise ConfigurationError(f"the value of {key} is not valid YAML: {value!r}; put quotes around it") from error


def _takes_text(key: str) -> bool:
    hint: Any = RunConfig
    for name in key.split("."):
        members = typing.get_args(hint) or (hint,)
        section = next((member for member in members if dataclasses.is_dataclass(member)), None)
        hint = typing.get_type_hints(section).get(name) if section else None
    return str in (hint, *typing.get_args(hint))


@dataclass
class _Origin:
    """The source of each key's value: the file, or one of the overrides (by key)."""

    path: str
    overrides: dict[str, str] = field(default_factory=dict)

    def of(self, key: str) -> str:
        """Name a key's source for a message; an override may set the key, its section, or a key inside it."""
        for given, override in self.overrides.items():
            if f"{key}.".startswith((f"{given}.", f"{given}[")) or given.startswith(f"{key}."):
                return f"the override {override}"
        return self.path


def _build(cls: Any, fields: dict, prefix: str, origin: _Origin) -> Any:
    known = [f.name for f in dataclasses.fields(cls) if f.init]
    hints = typing.get_type_hints(cls)
    values = {}
    for name, value in fields.items():
        if name not in known:
            nearest = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)
            where = origin.of(f"{prefix}{name}")
            raise ConfigurationError(f"unknown key {prefix}{name} in {where}; did you mean {prefix}{nearest[0]}?")
        values[name] = _convert(hints[name], value, f"{prefix}{name}", origin)
    required = [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory]  # both are MISSING
    if missing := [name for name in required if name not in values]:
        raise ConfigurationError(f"{prefix}{missing[0]} is missing in {origin.of(prefix.rstrip('.'))}")
    return cls(**values)


def _convert(hint: Any, value: Any, key: str, origin: _Origin) -> Any:
    if isinstance(hint, types.UnionType):
        if type(None) in typing.get_args(hint) and value in NULL:
            return None
        options = [option for option in typing.get_args(hint) if option is not type(None)]
        hint = next((o for o in options if (typing.get_origin(o) is list) == isinstance(value, list)), options[0])
    if typing.get_origin(hint) is list:
        if not isinstance(value, list):
            raise ConfigurationError(f"{key} in {origin.of(key)} is {value!r}; it must be a list, such as [1, 2]")
        (element,) = typing.get_args(hint)
        return [_convert(element, entry, f"{key}[{index}]", origin) for index, entry in enumerate(value)]
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ConfigurationError(f"{key} in {origin.of(key)} is a section of keys, not the value {value!r}")
        return _build(hint, value, f"{key}.", origin)
    if not isinstance(value, str):
        raise ConfigurationError(f"{key} in {origin.of(key)} is {value!r}; it must be of type {hint.__name__}")
    if hint is str:
        return _expanded(value, key, origin) if PATH_KEYS.fullmatch(key) else value
    read = {int: _integer, float: _number, bool: _truth}[hint](value)
    if read is None:
        raise ConfigurationError(f"{key} in {origin.of(key)} is {value!r}; it must be of type {hint.__name__}")
    return read


def _integer(text: str) -> int | None:
    return int(text) if re.fullmatch(r"[+-]?\d+", text) else None


def _number(text: str) -> float | None:
    try:
        return float(text.replace(".nan", "nan").replace(".inf", "inf"))  # as YAML writes these
    except ValueError:
        return None


def _truth(text: str) -> bool | None:
    return {"true": True, "false": False}.get(text.lower())


def _expanded(path: str, key: str, origin: _Origin) -> str:
    """Expand `~` and variables in a path, as a shell does; shells do not expand them after the `=` of an override."""
    expanded = os.path.expandvars(os.path.expanduser(path))
    if missing := re.search(r"\$\{?\w+\}?", expanded):
        raise ConfigurationError(f"{key} in {origin.of(key)} names the variable {missing[0]}, which is not set")
    return expanded


def key_table() -> str:
    """Return the table of all keys for `launcher/configs/README.md`."""
    return table(RunConfig)


if __name__ == "__main__":
    print(key_table(), end="")
