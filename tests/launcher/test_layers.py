"""launcher/README.md lists every file, and imports run down its table."""

import re
from pathlib import Path

import launcher

PACKAGE = Path(launcher.__file__).parent
TABLE = re.findall(
    r"^\| (?:`([\w/]+)/`)? *\| (`.*?`) \|", (PACKAGE / "README.md").read_text(encoding="utf-8"), re.MULTILINE
)
# The modules of each row, from the top.
LAYERS = [
    {
        ".".join(filter(None, ["launcher", *folder.split("/"), name.removesuffix(".py")]))
        for name in files.strip("`").split()
    }
    for folder, files in TABLE
]


def modules() -> dict[str, Path]:
    """Return every module of the package by its dotted name, except the `__init__.py` files."""
    return {
        ".".join(["launcher", *path.relative_to(PACKAGE).with_suffix("").parts]): path
        for path in PACKAGE.rglob("*.py")
        if path.name != "__init__.py"
    }


def test_every_file_is_listed_once():
    listed = [name for layer in LAYERS for name in layer]
    assert sorted(listed) == sorted(modules())


def test_imports_run_one_way():
    place = {name: number for number, layer in enumerate(LAYERS) for name in layer}
    for name, path in modules().items():
        reached = re.findall(r"(?:from|import) (launcher[\w.]+)", path.read_text(encoding="utf-8"))
        upwards = [other for other in reached if other in place and place[other] < place[name]]
        assert not upwards, f"{name} imports {upwards}"


def test_model_and_data_pipeline_import_none_of_the_other_packages():
    for package in ("model", "data_pipeline"):
        other = {"model", "data_pipeline", "launcher", "train"} - {package}
        for path in (PACKAGE.parent / package).rglob("*.py"):
            reached = re.findall(r"^\s*(?:from|import) (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert not other & set(reached), path
