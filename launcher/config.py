"""The run configuration: a YAML file plus `key=value` overrides, typed, strict, with errors that name the fix."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import os
import re
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from launcher.errors import ConfigurationError

NULL = ("", "null", "~", "None")
# Whose `~` and variables are expanded where they are read. (`data_cache.folder` keeps its variables: they are each machine's.)
PATH_KEYS = re.compile(r"data|data\[\d+\]\.path|validation_data|output|model|init_from|prepare\.(source|tokenizer)")
LONGEST_TIMEOUT = 30 * 24 * 3600  # seconds; far larger ones overflow in the libraries that wait
CONFIG_FOLDER = Path(__file__).parent / "configs"
DEFAULT_CONFIG = CONFIG_FOLDER / "sample.yaml"


@dataclass
class Preparation:
    """How to make the shard folder `data` where it is missing: the arguments of `lfm prepare`."""

    source: str = "sample"
    tokenizer: str = "train"
    seq_len: int = 256
    validation_share: float = 0.0


@dataclass
class WeightedData:
    """One folder of a mixture; its share of the rows is its weight over the sum of all weights."""

    path: str
    weight: float


@dataclass
class DataCache:
    """Where shards behind a URL are kept: a folder on the machine's own disk (null: among its temporary files)."""

    folder: str | None = None
    gigabytes: float = 50.0


@dataclass
class LossTerms:
    """Weights of the loss terms beside the cross entropy, and the focal term's exponent (`model/loss.py`).

    The defaults are the model's own. They are written out here since importing the model imports torch, for which no
    command that only reads a configuration should wait.
    """

    focal: float = 0.1
    focal_gamma: float = 2.0
    reconstruction: float = 0.1
    budget: float = 0.1
    expert_usage: float = 0.01
    z_loss: float = 0.001


@dataclass
class Schedule:
    """Cosine annealing with warm restarts after the warm-up (Loshchilov & Hutter 2017)."""

    cycles: int = 1
    multiplier: float = 1.0
    minimum_ratio: float = 0.1
    steps: int | None = None


@dataclass
class Precision:
    """`force` keeps the JSON's fp16 or bf16 on a CPU where it is slow, and may be unsupported."""

    force: bool = False


@dataclass
class Spike:
    """A loss is a spike above the median of the last `window` by `factor` times their median absolute deviation."""

    window: int = 50
    factor: float = 10.0


@dataclass
class Watching:
    """What is looked at inside the model every so many steps, and the speed that the device could have (TFLOP/s)."""

    every: int = 100
    layers: list[str] = field(
        default_factory=lambda: [r"model\.liquid_embedding", r"model\.layers\.\d+", r"model\.norm"]
    )
    peak_teraflops: float | None = None


@dataclass
class Profile:
    """The first and the last step of a profile of rank 0, or none."""

    steps: list[int] | None = None


@dataclass
class RunConfig:
    """All that a run depends on beside the DeepSpeed JSON; the README has a line on each key."""

    data: str | list[WeightedData] = "data/sample"
    on_bad_shard: str = "refuse"
    data_cache: DataCache = field(default_factory=DataCache)
    validation_data: str | None = None
    validate_every: int | None = None
    validation_samples: int = 3
    output: str = "runs/sample"
    model: str = "tiny"
    seed: int = 1234
    max_steps: int = 1000
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    resume: str = "auto"
    init_from: str | None = None
    global_batch_rows: int = 16
    micro_batch_rows: int = 16
    loss_on: str = "all"
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    warmup_steps: int = 100
    gradient_clipping: float = 1.0
    expert_parallel_size: int = 1
    balancing_rate: float = 1e-3
    activation_checkpointing: bool = True
    loss: LossTerms = field(default_factory=LossTerms)
    schedule: Schedule = field(default_factory=Schedule)
    precision: Precision = field(default_factory=Precision)
    max_skipped_in_a_row: int = 10
    on_spike: str = "mark"
    spike: Spike = field(default_factory=Spike)
    step_timeout_seconds: float = 1800.0
    prepare: Preparation | None = None
    monitor: Watching = field(default_factory=Watching)
    profile: Profile = field(default_factory=Profile)
    # The keys that a file or an override set, as opposed to these defaults: only such a key can contradict the JSON.
    explicit: frozenset[str] = field(default=frozenset(), init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("data", "output", "model"):
            if not getattr(self, name):
                raise ConfigurationError(f"{name} is empty; name one, or leave the key out for its default")
        for name in ("max_steps", "checkpoint_every", "keep_checkpoints", "global_batch_rows", "micro_batch_rows"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.seed < 2**63:
            raise ConfigurationError(f"seed is {self.seed}; it must be at least 0 and below 2^63")
        for name in ("learning_rate", "gradient_clipping"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigurationError(f"{name} is {getattr(self, name)}; it must be above 0, and finite")
        loss_weights = {f"loss.{name}": value for name, value in dataclasses.asdict(self.loss).items()}
        named = {name: getattr(self, name) for name in ("weight_decay", "warmup_steps", "balancing_rate")}
        for name, value in {**named, **loss_weights}.items():
            if not 0 <= value < math.inf:
                raise ConfigurationError(f"{name} is {value}; it must be at least 0, and finite")
        if not 0 <= self.schedule.minimum_ratio <= 1:
            raise ConfigurationError(f"schedule.minimum_ratio is {self.schedule.minimum_ratio}; it must be in [0, 1]")
        if self.schedule.steps is not None and self.schedule.steps < 1:
            raise ConfigurationError(f"schedule.steps is {self.schedule.steps}; it must be at least 1")
        if self.on_bad_shard not in ("refuse", "skip"):
            raise ConfigurationError(f"on_bad_shard is {self.on_bad_shard!r}; it must be 'refuse' or 'skip'")
        if not 0 < self.data_cache.gigabytes < math.inf:
            raise ConfigurationError(
                f"data_cache.gigabytes is {self.data_cache.gigabytes}; it must be above 0, and finite"
            )
        if self.on_spike not in ("mark", "rollback"):
            raise ConfigurationError(f"on_spike is {self.on_spike!r}; it must be 'mark' or 'rollback'")
        if self.max_skipped_in_a_row < 0:
            raise ConfigurationError(f"max_skipped_in_a_row is {self.max_skipped_in_a_row}; it must be at least 0")
        if self.spike.window < 2:
            raise ConfigurationError(f"spike.window is {self.spike.window}; it must be at least 2")
        if not 0 < self.spike.factor < math.inf:
            raise ConfigurationError(f"spike.factor is {self.spike.factor}; it must be above 0, and finite")
        if not 0 < self.step_timeout_seconds <= LONGEST_TIMEOUT:
            raise ConfigurationError(
                f"step_timeout_seconds is {self.step_timeout_seconds:g}; it must be above 0 and at most {LONGEST_TIMEOUT:,}"
            )
        for name, value in (
            ("validate_every", self.validate_every or 0),
            ("validation_samples", self.validation_samples),
            ("monitor.every", self.monitor.every),
        ):
            if value < 0:
                raise ConfigurationError(f"{name} is {value}; it must be at least 0, which turns it off")
        if self.monitor.peak_teraflops is not None and not 0 < self.monitor.peak_teraflops < math.inf:
            raise ConfigurationError(
                f"monitor.peak_teraflops is {self.monitor.peak_teraflops}; it must be above 0, and finite"
            )
        profiled = self.profile.steps
        if profiled is not None and not (len(profiled) == 2 and 1 <= profiled[0] <= profiled[1]):
            raise ConfigurationError(
                f"profile.steps is {profiled}; it must be the first and the last step, as in profile.steps=[10, 12]"
            )
        if profiled is not None and profiled[1] > self.max_steps:
            raise ConfigurationError(
                f"profile.steps is {profiled}, but the run ends at max_steps {self.max_steps}; profile earlier steps"
            )
        if self.loss_on not in ("all", "answer"):
            raise ConfigurationError(f"loss_on is {self.loss_on!r}; it must be 'all' or 'answer'")
        if self.schedule.cycles < 1 or self.schedule.multiplier < 1:
            raise ConfigurationError("schedule.cycles and schedule.multiplier must be at least 1")


class _Once(argparse.Action):
    """An option whose second value would silently take the place of the first."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        if getattr(namespace, f"given_{self.dest}", False):
            parser.error(f"{option_string} is given twice ({getattr(namespace, self.dest)} and {values}); give it once")
        setattr(namespace, f"given_{self.dest}", True)
        setattr(namespace, self.dest, values)


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that name a run configuration: `--config`, and `key=value` overrides."""
    parser.add_argument(
        "--config", action=_Once, default=str(DEFAULT_CONFIG), help="run configuration, YAML (default: the sample)"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a key of the run configuration")


def load_run_config(path: str | Path, overrides: list[str] = ()) -> RunConfig:
    """Read a YAML file and apply `key=value` overrides (`loss.focal=0.2` reaches into a section).

    A value is read as its key's type: text stays as it stands (`output=1.10`), and a path's `~` and variables are expanded.
    The file may be a run's own run.yaml, whose configuration it then repeats. The file's `prepare` is for the file's
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
    """YAML whose values stay text: what 1.10, 010, 12:30 or 2024_01 mean is for the key's type to say."""

    def construct_mapping(self, node, deep=False):
        mapping = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in mapping:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key} is there twice", key_node.start_mark
                )
            mapping[key] = self.construct_object(value_node, deep=True)
        return mapping


def read_yaml(path: str | Path) -> dict:
    """The mapping in a YAML file, its values as text; `ConfigurationError` if it is missing or not a mapping."""
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
    """The configuration as plain values, ready for YAML."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name != "explicit"}


def _parse_value(key: str, value: str):
    """An override's value: text as it stands if that is what the key takes, else YAML (lists and sections)."""
    if _takes_text(key) and not (key == "data" and value.startswith("[")):
        return value
    try:
        return yaml.load(value, _TextLoader) if value else ""
    except yaml.YAMLError as error:
        raise ConfigurationError(f"the value of {key} is not valid YAML: {value!r}; put quotes around it") from error


def _takes_text(key: str) -> bool:
    hint = RunConfig
    for name in key.split("."):
        members = typing.get_args(hint) or (hint,)
        section = next((member for member in members if dataclasses.is_dataclass(member)), None)
        hint = typing.get_type_hints(section).get(name) if section else None
    return str in (hint, *typing.get_args(hint))


@dataclass
class _Origin:
    """Where a key's value was given: in the file, or in one of the overrides, which are kept by key."""

    path: str
    overrides: dict[str, str] = field(default_factory=dict)

    def of(self, key: str) -> str:
        """Its name for a message; an override may have given the key, the section it is in, or a key inside it."""
        for given, override in self.overrides.items():
            if f"{key}.".startswith((f"{given}.", f"{given}[")) or given.startswith(f"{key}."):
                return f"the override {override}"
        return self.path


def _build(cls: type, fields: dict, prefix: str, origin: _Origin):
    known = [f.name for f in dataclasses.fields(cls) if f.init]
    hints = typing.get_type_hints(cls)
    values = {}
    for name, value in fields.items():
        if name not in known:
            nearest = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)
            where = origin.of(f"{prefix}{name}")
            raise ConfigurationError(f"unknown key {prefix}{name} in {where}; did you mean {prefix}{nearest[0]}?")
        values[name] = _convert(hints[name], value, f"{prefix}{name}", origin)
    required = [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory]  # neither is there
    if missing := [name for name in required if name not in values]:
        raise ConfigurationError(f"{prefix}{missing[0]} is missing in {origin.of(prefix.rstrip('.'))}")
    return cls(**values)


def _convert(hint, value, key: str, origin: _Origin):
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
    """A path as a shell would have it, which does not look behind the `=` of an override."""
    expanded = os.path.expandvars(os.path.expanduser(path))
    if missing := re.search(r"\$\{?\w+\}?", expanded):
        raise ConfigurationError(f"{key} in {origin.of(key)} names the variable {missing[0]}, which is not set")
    return expanded
