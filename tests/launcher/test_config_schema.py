"""The JSON schema of run configurations accepts what the program accepts, and is up to date."""

import pytest
import yaml

from launcher.config import RunConfig
from launcher.config_file import CONFIG_FOLDER, load_run_config
from launcher.config_schema import schema, text
from launcher.errors import ConfigurationError
from launcher.run_keys import keys_of

KINDS = {"string": str, "integer": int, "number": int | float, "boolean": bool, "null": type(None), "array": list,
         "object": dict}  # fmt: skip


def accepts(rules: dict, value) -> bool:
    """Whether a value fits a schema, for the words that this schema uses."""
    kinds = rules.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(_is_of(kind, value) for kind in kinds):
        return False
    if "anyOf" in rules and not any(accepts(option, value) for option in rules["anyOf"]):
        return False
    if "enum" in rules and value not in rules["enum"]:
        return False
    if isinstance(value, str | list) and len(value) < rules.get(
        "minLength" if isinstance(value, str) else "minItems", 0
    ):
        return False
    if _is_of("number", value) and not (
        rules.get("minimum", value) <= value <= rules.get("maximum", value)
        and value > rules.get("exclusiveMinimum", value - 1)
        and value < rules.get("exclusiveMaximum", value + 1)
    ):
        return False
    if isinstance(value, list):
        return all(accepts(rules.get("items", {}), entry) for entry in value)
    if isinstance(value, dict) and "properties" in rules:
        return (
            value.keys() <= rules["properties"].keys()
            and set(rules.get("required", ())) <= value.keys()
            and all(accepts(rules["properties"][name], entry) for name, entry in value.items())
        )
    return True


def _is_of(kind: str, value) -> bool:
    return isinstance(value, KINDS[kind]) and (kind == "boolean" or not isinstance(value, bool))


def test_the_schema_is_made_from_the_declarations():
    file = CONFIG_FOLDER / "run.schema.json"
    assert file.read_text(encoding="utf-8") == text(), f"run `python -m launcher.config_schema > {file.name}` there"


def test_every_shipped_configuration_names_the_schema_and_fits_it():
    for path in CONFIG_FOLDER.glob("*.yaml"):
        assert path.read_text().startswith("# yaml-language-server: $schema=run.schema.json\n"), path
        assert accepts(schema(), yaml.safe_load(path.read_text())), path


def test_every_key_of_a_run_is_in_the_schema():
    words = text()
    for name, _, declared in keys_of(RunConfig):
        assert f'"{name.rpartition(".")[2]}"' in words and declared.meaning.split("`")[0] in words, name


@pytest.mark.parametrize(
    "content",
    [
        "max_step: 3", "max_steps: 0", "max_steps: many", "loss: {vocal: 1}", "loss_on: question", "seed: -1", "data: []",
        "data: [{path: a}]", "data: [{path: a, weight: 0}]", "learning_rate: fast", "activation_checkpointing: 1", "loss: 3",
        "prepare: {validation_share: 1}", "profile: {steps: 7}", "output: ''", "spike: {window: 1}", "attention: flash",
    ],
)  # fmt: skip
def test_what_the_program_refuses_does_not_fit_the_schema(content, tmp_path):
    (tmp_path / "run.yaml").write_text(content)
    assert not accepts(schema(), yaml.safe_load(content))
    with pytest.raises(ConfigurationError):
        load_run_config(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    "content",
    [
        "max_steps: 3", "loss: {focal: 0}", "data: [{path: a, weight: 2}]", "prepare: null", "init_from: null",
        "profile: {steps: [3, 4]}", "monitor: {peak_teraflops: 989.4, layers: []}", "schedule: {cycles: 2, steps: 100}",
        "precision: {force: true}", "data_cache: {folder: $TMPDIR/x}",
    ],
)  # fmt: skip
def test_what_the_program_accepts_fits_the_schema(content, tmp_path):
    (tmp_path / "run.yaml").write_text(content)
    load_run_config(tmp_path / "run.yaml")
    assert accepts(schema(), yaml.safe_load(content))
