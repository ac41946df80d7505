"""Build and run sbatch commands for single jobs, chains and arrays."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from launcher.cluster.site import OPTIONS, PYTHONS, VARIABLES
from launcher.errors import ConfigurationError

SCRIPTS = ("prepare", "train", "evaluate")


@dataclass
class Submission:
    """A call of sbatch from the project's folder: the command to run, sbatch's options, and the job's variables."""

    command: list[str]
    options: list[str] = field(default_factory=list)
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def words(self) -> list[str]:
        return ["sbatch", "--parsable", *self.options, *self.command]

    def shown(self) -> str:
        """Return the call as a shell command line."""
        return " ".join(
            [*(f"{name}={shlex.quote(value)}" for name, value in self.variables.items()), shlex.join(self.words)]
        )

    def send(self) -> str:
        """Submit the job and return its number. Raises `ConfigurationError` with sbatch's message."""
        environment = {**os.environ, **self.variables}
        result = subprocess.run(self.words, env=environment, capture_output=True, text=True, check=False)
        if result.returncode:
            raise ConfigurationError(f"sbatch refused the job: {' '.join(result.stderr.split())}")
        return result.stdout.strip().split(";")[0]  # a federation appends the cluster's name


def of_script(script: str, arguments: list[str], site: dict[str, str], options: list[str]) -> Submission:
    """Build a job of `slurm/SCRIPT.sbatch`. The shell's variables and `options` override the site's settings."""
    path = Path("slurm", f"{script}.sbatch")
    if not path.is_file():
        raise ConfigurationError(f"there is no {path} in {Path.cwd()}; run lfm submit from the project's folder")
    return Submission([str(path), *arguments], [*site_options(site), *options], _site_variables(site))


def site_options(site: dict[str, str]) -> list[str]:
    """Return the site's sbatch options, except those set in the shell, which an option would override."""
    return [f"--{name}={site[name]}" for name in OPTIONS if name in site and f"SBATCH_{name.upper()}" not in os.environ]


def _site_variables(site: dict[str, str]) -> dict[str, str]:
    chosen = {VARIABLES[name]: site[name] for name in VARIABLES if name in site}
    if any(os.environ.get(VARIABLES[name]) for name in PYTHONS):  # the batch scripts accept only one Python
        chosen = {VARIABLES[name]: site[name] for name in VARIABLES if name in site and name not in PYTHONS}
    return {name: value for name, value in chosen.items() if name not in os.environ}


def stages(words: list[str]) -> list[tuple[str, list[str]]]:
    """Split `prepare ... then train ... then evaluate ...` into scripts with their arguments.

    Raises `ConfigurationError` for an unknown or missing script.
    """
    found: list[list[str]] = [[]]
    for word in words:
        if word == "then":
            found.append([])
        else:
            found[-1].append(word)
    for stage in found:
        if not stage or stage[0] not in SCRIPTS:
            named = repr(stage[0]) if stage else "nothing"
            raise ConfigurationError(
                f"lfm submit takes {', '.join(SCRIPTS)}, not {named}; lfm submit --help has examples"
            )
    return [(script, arguments) for script, *arguments in found]


def check_sbatch() -> None:
    """Raise `ConfigurationError` if this machine has no sbatch."""
    if shutil.which("sbatch") is None:
        raise ConfigurationError("there is no sbatch here; run lfm submit on a login node, or use --dry-run")


def check_setting(setting: str) -> tuple[str, list[str]]:
    """Parse `key=value,value` of a sweep into the key and its values. Raises `ConfigurationError` if it is malformed."""
    key, separator, values = setting.partition("=")
    found = _split(values)
    if not separator or not re.fullmatch(r"\w+(\.\w+)*", key) or not all(found):
        raise ConfigurationError(
            f"{setting!r} is not a sweep; write it as key=value,value, such as learning_rate=1e-4,3e-4"
        )
    return key, found


def _split(values: str) -> list[str]:
    """Split at commas outside brackets and quotes, since a value may be a list."""
    found, depth, quote = [""], 0, ""
    for character in values:
        if quote or character in "\"'":
            quote = "" if character == quote else quote or character
        else:
            depth += (character in "[{(") - (character in "]})")
        if character == "," and depth == 0 and not quote:
            found.append("")
        else:
            found[-1] += character
    return found
