"""The run configuration is typed and strict, and its errors name the fix."""

import dataclasses

import pytest
import yaml

from launcher.config import RunConfig
from launcher.config_file import CONFIG_FOLDER, DEFAULT_CONFIG, as_dict, key_table, load_run_config
from launcher.errors import ConfigurationError
from launcher.run_keys import keys_of
from model.loss import LossWeights
from train import parse_arguments


def test_overrides_win_over_the_file_and_reach_into_sections():
    config = load_run_config(DEFAULT_CONFIG, ["max_steps=7", "loss.focal=0.25", "learning_rate=1e-4", "model=base"])
    assert (config.max_steps, config.loss.focal, config.learning_rate, config.model) == (7, 0.25, 1e-4, "base")
    assert config.loss.reconstruction == 0.1
    assert {"max_steps", "loss", "data"} <= config.explicit


def test_the_default_weights_of_the_loss_are_the_models_own():
    assert dataclasses.asdict(RunConfig().loss) == dataclasses.asdict(LossWeights())


def test_every_shipped_configuration_is_the_same_after_writing_and_loading(tmp_path):
    for path in CONFIG_FOLDER.glob("*.yaml"):
        config = load_run_config(path)
        (tmp_path / "again.yaml").write_text(yaml.safe_dump(as_dict(config)))
        assert as_dict(load_run_config(tmp_path / "again.yaml")) == as_dict(config)


def test_the_page_of_keys_is_made_from_their_declarations():
    page = (CONFIG_FOLDER / "README.md").read_text(encoding="utf-8")
    assert page.endswith(f"\n\n{key_table()}"), "run `python -m launcher.config_file` and put its table into the page"


def test_every_key_is_declared_with_its_meaning():
    names = {name for name, _, declared in keys_of(RunConfig) if declared.meaning}
    fields = {field.name for field in dataclasses.fields(RunConfig) if field.init}
    assert fields == {name for name in names if "." not in name}
    assert {"loss.focal", "data[].weight", "prepare.seq_len", "profile.steps"} <= names


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("max_step=5", "unknown key max_step in the override max_step=5; did you mean max_steps"),
        ("schedule={cycle: 2}", "unknown key schedule.cycle in the override schedule={cycle: 2}; did you mean"),
        ("loss.vocal=5", r"unknown key loss.vocal in .*; did you mean loss.focal"),
        ("max_steps=many", "max_steps in the override max_steps=many is 'many'; it must be of type int"),
        ("max_steps=1.5", "max_steps in .* is '1.5'; it must be of type int"),
        ("learning_rate=fast", "learning_rate in .* is 'fast'; it must be of type float"),
        ("activation_checkpointing=1", "activation_checkpointing in .* is '1'; it must be of type bool"),
        ("loss=3", "loss in .* is a section of keys"),
        ("max_steps.x=3", "reaches into 'max_steps', which is not a section"),
        ("max_steps", "'max_steps' is not an override; write it as key=value"),
        ("max_steps=0", "max_steps is 0; it must be at least 1"),
        ("seed=-1", "seed is -1; it must be at least 0"),
        ("seed=99999999999999999999", "seed is 99999999999999999999; it must be at least 0 and below"),
        ("step_timeout_seconds=1e10", "step_timeout_seconds is 1e.10; it must be above 0 and at most 2,592,000"),
        ("learning_rate=.nan", "learning_rate is nan; it must be above 0"),
        ("weight_decay=-3", "weight_decay is -3; it must be at least 0"),
        ("balancing_rate=-0.1", "balancing_rate is -0.1; it must be at least 0"),
        ("loss.focal_gamma=-1", "loss.focal_gamma is -1; it must be at least 0"),
        ("schedule.minimum_ratio=7", "schedule.minimum_ratio is 7; it must be at least 0 and at most 1"),
        ("data=[{path: a, weight: 0}]", r"data\[0\].weight is 0; it must be above 0"),
        ("prepare.validation_share=1", "prepare.validation_share is 1; it must be at least 0 and below 1"),
        ("loss_on=question", "loss_on is 'question'; it must be 'all' or 'answer'"),
        ("profile.steps=[1", "the value of profile.steps is not valid YAML"),
        ("output=$LFM_UNSET/x", r"output in the override .* names the variable \$LFM_UNSET, which is not set"),
        ("output=", "output is empty; name one"),
        ("data=", "data is empty; name one"),
        ("profile.steps=[398, 401]", r"profile.steps is \[398, 401\], but the run ends at max_steps 400"),
    ],
)
def test_a_wrong_override_is_an_error_of_one_sentence_with_its_fix(override, sentence):
    with pytest.raises(ConfigurationError, match=sentence) as raised:
        load_run_config(DEFAULT_CONFIG, [override])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "text", ["1.10", "2024_01", "12:30", "010", "runs/a #1", "yes", "a: b", "[x", "'quoted'", "null"]
)
def test_text_is_not_converted(text, tmp_path):
    assert load_run_config(DEFAULT_CONFIG, [f"output={text}"]).output == text
    assert load_run_config(DEFAULT_CONFIG, [f"prepare.source={text}"]).prepare.source == text
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"output": text}))
    assert load_run_config(path).output == text
    path.write_text("output: 1.10\nmodel: 2024_01\n")
    assert (load_run_config(path).output, load_run_config(path).model) == ("1.10", "2024_01")


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("max_steps=010", 10), ("learning_rate=1e-4", 1e-4), ("learning_rate=3", 3.0), ("resume=5", "5"),
        ("activation_checkpointing=False", False), ("init_from=null", None), ("validate_every=~", None),
        ("profile.steps=[3, 4]", {"steps": [3, 4]}), ("data=[{path: a b, weight: 2}]", [{"path": "a b", "weight": 2.0}]),
    ],
)  # fmt: skip
def test_a_value_is_read_as_its_keys_type(override, value):
    assert as_dict(load_run_config(DEFAULT_CONFIG, [override]))[override.split("=")[0].split(".")[0]] == value


def test_a_second_configuration_file_is_an_error(capsys):
    for words in (["--config", "a.yaml", "--config", "b.yaml"], ["--config=a.yaml", "seed=1", "--config=b.yaml"]):
        with pytest.raises(SystemExit):
            parse_arguments(["--deepspeed_config", "x.json", *words])
        assert "--config is given twice (a.yaml and b.yaml)" in capsys.readouterr().err


def test_a_paths_home_and_variables_are_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("SCRATCH", "/scratch")
    config = load_run_config(DEFAULT_CONFIG, ["output=~/runs/x", "data=$SCRATCH/rows", "data_cache.folder=$TMP/x"])
    assert (config.output, config.data, config.data_cache.folder) == ("/home/someone/runs/x", "/scratch/rows", "$TMP/x")


def test_a_runs_own_file_repeats_its_configuration(tmp_path):
    config = load_run_config(DEFAULT_CONFIG, ["max_steps=7", "loss.focal=0.25", "profile.steps=[1, 2]"])
    content = {"config": as_dict(config), "deepspeed": {}, "world_size": 2}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    assert as_dict(load_run_config(tmp_path / "run.yaml")) == as_dict(config)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("a: [", "is not valid YAML"),
        ("seed: 1\nmax_steps: 2\nseed: 3", "the key seed is given twice"),
        ("- 1", "must be a mapping"),
        (None, "cannot read the run"),
    ],
)
def test_a_file_that_cannot_be_used_is_an_error_of_one_sentence(tmp_path, content, sentence):
    path = tmp_path / "run.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigurationError, match=sentence) as raised:
        load_run_config(path)
    assert "\n" not in str(raised.value)


def test_a_wrong_value_in_the_file_names_the_file_whatever_else_is_overridden(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("max_steps: many\n")
    with pytest.raises(ConfigurationError, match=f"max_steps in {path} is 'many'"):
        load_run_config(path, ["learning_rate=1e-4", "loss.focal=0.2"])


def test_the_files_prepare_section_applies_only_to_the_files_data():
    """A typo in `data=` must not prepare the sample's rows under the wrong name."""
    assert load_run_config(DEFAULT_CONFIG).prepare.source == "sample"
    assert load_run_config(DEFAULT_CONFIG, ["data=data/webinstrut"]).prepare is None
    assert load_run_config(DEFAULT_CONFIG, ["data=data/other", "prepare.seq_len=64"]).prepare.source == "sample"
