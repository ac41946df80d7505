"""The settings that all jobs on this cluster share, in `~/.config/lfm/site.yaml`."""

from __future__ import annotations

import os
from pathlib import Path

import yaml

from launcher.errors import ConfigurationError

# OPTIONS become sbatch options; VARIABLES are environment variables of the batch scripts (slurm/README.md).
OPTIONS = ("partition", "account", "qos", "reservation")
VARIABLES = {
    "modules": "LFM_MODULES",
    "interface": "LFM_INTERFACE",
    "venv": "LFM_VENV",
    "conda": "LFM_CONDA",
    "image": "LFM_IMAGE",
    "mpi": "LFM_MPI",
}
PYTHONS = ("venv", "conda", "image")  # they exclude each other


def site_file() -> Path:
    """Return the path of the settings file, which respects `XDG_CONFIG_HOME`."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "lfm" / "site.yaml"


def read_site() -> dict[str, str]:
    """Read the settings by name; there are none without a file. Raises `ConfigurationError` if the file is invalid."""
    path = site_file()
    if not path.exists():
        return {}
    try:
        content = yaml.load(path.read_text(), yaml.BaseLoader) or {}  # strings only: an account may be 007
    except (OSError, yaml.YAMLError) as error:
        raise ConfigurationError(f"cannot read {path}: {' '.join(str(error).split())}; fix or delete it") from error
    if not isinstance(content, dict):
        raise ConfigurationError(f"{path} is not a list of `name: value` lines; fix or delete it")
    _check(content, str(path))
    return {name: text for name, value in content.items() if (text := _text(name, value, path))}


def write_site(settings: list[str]) -> Path:
    """Add `name=value` settings to the file; an empty value removes one.

    Raises `ConfigurationError` for a malformed or unknown setting.
    """
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
        raise ConfigurationError(f"{path} has a {type(value).__name__} as {name}; make it a single text")
    return value


def _check(settings: dict, where: str) -> None:
    known = [*OPTIONS, *VARIABLES]
    for name in settings:
        if name not in known:
            raise ConfigurationError(f"{where} has the unknown setting {name}; known are {', '.join(known)}")
