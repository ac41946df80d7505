"""The house: what launcher/README.md lists is there, nothing else is, and imports run down its table."""

import re
from pathlib import Path

import launcher

PACKAGE = Path(launcher.__file__).parent
TABLE = re.findall(r"^\| (?:`(\w+)/`)? *\| (.*?) \|", (PACKAGE / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
FLOORS = [room or files.strip("`").removesuffix(".py") for room, files in TABLE if "`" in room + files]


def test_every_file_is_listed():
    listed = {(room, name) for room, files in TABLE for name in re.findall(r"\w+\.py", files)}
    there = {
        (path.parent.name if path.parent != PACKAGE else "", path.name)
        for path in PACKAGE.rglob("*.py")
        if path.name != "__init__.py"
    }
    assert listed == there


def test_imports_run_one_way():
    for place, floor in enumerate(FLOORS):
        files = list((PACKAGE / floor).glob("*.py")) or [PACKAGE / f"{floor}.py"]
        for path in files:
            reached = set(re.findall(r"(?:from|import) launcher\.(\w+)", path.read_text(encoding="utf-8")))
            assert reached <= set(FLOORS[place:]), path


def test_the_packages_below_never_look_up():
    for package in ("model", "data_pipeline"):
        other = {"model", "data_pipeline", "launcher", "train"} - {package}
        for path in (PACKAGE.parent / package).rglob("*.py"):
            reached = re.findall(r"^\s*(?:from|import) (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert not other & set(reached), path
