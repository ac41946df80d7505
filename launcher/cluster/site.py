"""What jobs need on this cluster, written down once: `~/.config/lfm/site.yaml`."""

from __future__ import annotations

import os
from pathlib import Path

import yaml

from launcher.errors import ConfigurationError

# What sbatch wants as an option, and what the batch scripts read from the environment (slurm/README.md).
OPTIONS = ("partition", "account", "qos", "reservation")
VARIABLES = {
    "modules": "LFM_MODULES",
    "interface": "LFM_INTERFACE",
    "venv": "LFM_VENV",
    "conda": "LFM_CONDA",
    "image": "LFM_IMAGE",
}
PYTHONS = ("venv", "conda", "image")  # of which a job has one


def site_file() -> Path:
    """Where the settings are; `XDG_CONFIG_HOME` is heeded."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "lfm" / "site.yaml"


def read_site() -> dict[str, str]:
    """The settings by name; none where nothing was written yet. Raises `ConfigurationError`."""
    path = site_file()
    if not path.exists():
        return {}
    try:
        content = yaml.load(path.read_text(), yaml.BaseLoader) or {}  # texts alone: an account may be 007
    except (OSError, yaml.YAMLError) as error:
        raise ConfigurationError(f"cannot read {path}: {' '.join(str(error).split())}; mend or delete it") from error
    if not isinstance(content, dict):
        raise ConfigurationError(f"{path} is not a list of `name: value`; mend or delete it")
    _check(content, str(path))
    return {name: text for name, value in content.items() if (text := _text(name, value, path))}


def write_site(settings: list[str]) -> Path:
    """Add `name=value` settings to those that are there; an empty value takes one away. Raises `ConfigurationError`."""
    named = {}
    for setting in settings:
        name, separator, value = setting.partition("=")
        if not separator:
            raise ConfigurationError(f"{setting!r} is not a setting; write it as name=value, for example partition=gpu")
        named[name] = value
    _check(named, "--site")
    path = site_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({name: value for name, value in {**read_site(), **named}.items() if value}))
    return path


def _text(name: str, value: str | list | dict, path: Path) -> str:
    if name == "modules" and isinstance(value, list) and all(isinstance(module, str) for module in value):
        return " ".join(value)
    if not isinstance(value, str):
        raise ConfigurationError(f"{path} has a {type(value).__name__} as {name}, which is one text; mend it")
    return value


def _check(settings: dict, where: str) -> None:
    known = [*OPTIONS, *VARIABLES]
    for name in settings:
        if name not in known:
            raise ConfigurationError(f"{where} has {name}, which is no setting of a site; there are {', '.join(known)}")
