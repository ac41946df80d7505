"""The model's own files in an exported folder, for where this project is not installed.

transformers loads code from beside the weights (`trust_remote_code`) as one flat package: the files are copied with
their imports of one another made relative, and `config.json` says which class is in which.
"""

from __future__ import annotations

import re
from pathlib import Path

import model
from model import LiquidConfig, LiquidForCausalLM, LiquidModel

PACKAGE = Path(model.__file__).parent
CLASSES = {"AutoConfig": LiquidConfig, "AutoModel": LiquidModel, "AutoModelForCausalLM": LiquidForCausalLM}
AUTO_MAP = {auto: f"{own.__module__.rpartition('.')[2]}.{own.__name__}" for auto, own in CLASSES.items()}
IMPORT = re.compile(rf"^(\s*from ){PACKAGE.name}(\.\w+ import )", re.MULTILINE)
FILES = {path.name for path in PACKAGE.glob("*.py")}  # an export has at most these


def write_custom_code(folder: Path) -> None:
    """Copy the files that the model's classes are made of, and those that they import."""
    wanted, done = {place.split(".")[0] for place in AUTO_MAP.values()}, set()
    while wanted - done:
        module = min(wanted - done)
        text = (PACKAGE / f"{module}.py").read_text(encoding="utf-8")
        wanted |= {found[2].split()[0].strip(".") for found in IMPORT.finditer(text)}
        (folder / f"{module}.py").write_text(IMPORT.sub(r"\1\2", text), encoding="utf-8")
        done.add(module)
