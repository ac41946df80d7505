"""Copy the model's code into an exported folder, for machines on which this project is not installed.

With `trust_remote_code`, transformers loads code from the model folder as one flat package. So the imports between the
copied files become relative, and `config.json` says which file holds which class.
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
FILES = {path.name for path in PACKAGE.glob("*.py")}  # an export contains some or all of them


def write_custom_code(folder: Path) -> None:
    """Copy the files that define the model's classes, and the files that they import."""
    wanted = {place.split(".")[0] for place in AUTO_MAP.values()}
    done: set[str] = set()
    while wanted - done:
        module = min(wanted - done)
        text = (PACKAGE / f"{module}.py").read_text(encoding="utf-8")
        wanted |= {found[2].split()[0].strip(".") for found in IMPORT.finditer(text)}
        (folder / f"{module}.py").write_text(IMPORT.sub(r"\1\2", text), encoding="utf-8")
        done.add(module)
