"""A run from start to end: its files, stopping, resuming, and refusing what would spoil it."""

import json
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_pipeline.loading.reader import ShardFolder
from launcher.cli import main as lfm
from launcher.environment import Environment
from launcher.errors import ConfigurationError
from launcher.run_folder import RunFolder
from launcher.tools.evaluation.held_out import data_of_run
from launcher.tools.export.export import load_run
from launcher.tools.report import _plots, write_report
from launcher.training.checkpoints.checkpoint import find_checkpoint, read_train_state
from launcher.training.checkpoints.manifest import describe_durably, files_of, read_manifest, write_manifest
from launcher.training.checkpoints.universal import convert
from launcher.training.plan import Plan, make_plan
from model.moe import balancing_bias
from tests import fork_server

STEPS = 20
TAGS = {
    "train/loss", "train/cross_entropy", "train/focal", "train/reconstruction", "train/budget", "train/expert_usage",
    "train/z_loss", "train/learning_rate", "train/grad_norm", "perf/tokens_per_second", "perf/step_seconds",
    "model/retained_ratio", "moe/layer_00/load_max_over_mean", "moe/layer_01/load_max_over_mean",
    "balance/bias_max", "data/bad_shard_rows", "perf/data_seconds", "perf/forward_seconds", "perf/backward_seconds",
    "perf/optimizer_seconds", "perf/save_seconds", "perf/memory_gigabytes", "train/perplexity", "moe/layer_00/router_entropy",
    "moe/layer_01/router_entropy",
    "train/skipped_steps", "train/spike",
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(trainer):
    """`whole`: 20 steps, then a start after its end. `halves`: 10 steps, then 10 more. Two ranks share the experts."""
    common = ["expert_parallel_size=2", f"schedule.steps={STEPS}", "checkpoint_every=5"]
    whole = trainer.arguments("whole", f"max_steps={STEPS}", *common)
    halves = [trainer.arguments("halves", f"max_steps={steps}", *common) for steps in (10, STEPS)]
    # Each in new processes: nothing that a process has in memory may help.
    trainer.run(2, whole)
    for half in halves:
        trainer.run(2, half)
    trainer.outputs = trainer.run(2, whole)
    return trainer


def test_a_resumed_run_has_the_curve_of_an_uninterrupted_one(runs):
    whole, halves = runs.scalars("whole"), runs.scalars("halves")
    for tag in whole:
        assert set(whole[tag]) == set(range(1, STEPS + 1) if tag != "perf/save_seconds" else (5, 10, 15, 20))
        if not tag.startswith("perf/"):
            assert halves[tag] == whole[tag], tag
    losses = whole["train/loss"]
    assert losses[STEPS] < losses[1] - 1


def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(runs):
    whole, halves = (load_run(runs.folder / name).state_dict() for name in ("whole", "halves"))
    assert all(torch.equal(whole[name], halves[name]) for name in whole)


def test_an_exported_model_has_the_bias_of_the_train_state(runs):
    state = read_train_state(runs.folder / "whole" / "checkpoints" / f"step-{STEPS:08d}")
    bias = balancing_bias(load_run(runs.folder / "whole"))
    assert torch.equal(bias, torch.tensor(state.balancing_bias))
    assert bias.sum(-1).abs().max() < 1e-6
    assert bias.abs().max().item() == pytest.approx(runs.scalars("whole")["balance/bias_max"][STEPS])
    assert bias.abs().amax(-1).min() > 0  # the bias of every layer has changed


def test_tensorboard_shows_one_point_a_step_for_every_figure(runs):
    assert set(runs.scalars("whole")) == TAGS


def test_the_loss_is_the_weighted_sum_of_its_terms(runs):
    shown = runs.scalars("whole")
    weights = {
        "cross_entropy": 1,
        "focal": 0.1,
        "reconstruction": 0.1,
        "budget": 0.1,
        "expert_usage": 0.01,
        "z_loss": 0.001,
    }
    for step in (1, STEPS):
        total = sum(weight * shown[f"train/{term}"][step] for term, weight in weights.items())
        assert shown["train/loss"][step] == pytest.approx(total, rel=1e-5)


def test_a_run_folder_records_what_happened(runs):
    run = RunFolder(runs.folder / "whole")
    assert json.loads((run.path / "status.json").read_text())["state"] == "done"
    description = yaml.safe_load((run.path / "run.yaml").read_text())
    assert description["config"]["max_steps"] == STEPS
    assert description["deepspeed"]["expert_parallel"]["autoep_size"] == 2
    assert description["world_size"] == 2
    assert sorted(path.name for path in run.checkpoints.glob("step-*")) == ["step-00000015", "step-00000020"]
    assert run.latest.read_text() == "step-00000020\n"
    assert not (run.path / "stacks").exists()  # nothing hung


def test_a_report_that_cannot_be_written_is_an_error_of_one_sentence(runs, tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "missing" / "x.html", tmp_path / "file" / "x.html"):
        with pytest.raises(ConfigurationError, match=f"cannot write the report to {place}: .*; name another file"):
            write_report(runs.folder / "whole", place)


def test_a_finished_run_started_again_says_so_and_changes_nothing(runs):
    assert "set a larger max_steps to continue" in runs.outputs[0].stdout
    assert "resuming from" in runs.outputs[0].stdout


def test_an_exported_folder_gives_the_runs_logits_and_answers(runs, tmp_path, capsys):
    lfm(["export", str(runs.folder / "whole"), "--out", str(tmp_path / "model")])
    ids = torch.randint(4, 1900, (2, 40), generator=torch.Generator().manual_seed(0))
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert torch.equal(exported(ids).logits, load_run(runs.folder / "whole")(ids).logits)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    chat = [{"role": "user", "content": "What is 1 plus 1?"}]
    assert (
        tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == "<s>What is 1 plus 1?<sep>"
    )
    capsys.readouterr()
    for source in (tmp_path / "model", runs.folder / "whole"):
        lfm(["generate", str(source), "What is 1 plus 1?", "--max-new-tokens", "5"])
    from_folder, from_run = capsys.readouterr().out.splitlines()
    assert from_folder == from_run
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps({"question": "What is 1 plus 1?", "answer": from_folder}) + "\n")
    lfm(["evaluate", str(tmp_path / "model"), "--questions", str(questions), "--max-new-tokens", "5"])
    assert "1 of 1 held-out answers are exactly right" in capsys.readouterr().out
    with pytest.raises(ConfigurationError, match="has no held-out rows on this machine"):
        data_of_run(runs.folder / "whole")  # with the run.yaml of a real run


def test_a_run_can_begin_with_exported_weights(runs, tmp_path):
    lfm(["export", str(runs.folder / "whole"), "--out", str(tmp_path / "model")])
    standing_still = ["learning_rate=1e-12", "weight_decay=0", "balancing_rate=0", "max_steps=1"]
    runs.run(1, runs.arguments("begun", f"init_from={tmp_path / 'model'}", *standing_still))
    begun, exported = load_run(runs.folder / "begun").state_dict(), load_run(runs.folder / "whole").state_dict()
    for name, weight in exported.items():
        torch.testing.assert_close(begun[name], weight, atol=1e-6, rtol=0)
    bias = [name for name in exported if name.endswith("e_score_correction_bias")]
    assert len(bias) == 2 and all(torch.equal(begun[name], exported[name]) for name in bias)


@pytest.fixture
def copied(runs, tmp_path) -> RunFolder:
    """A copy of the finished run that a test may damage."""
    shutil.copytree(runs.folder / "whole", tmp_path / "run")
    return RunFolder(tmp_path / "run")


def plan_for(copied: RunFolder, runs, *overrides: str) -> Plan:
    """Return what rank 0 of two decides."""
    common = [f"output={copied.path}", "expert_parallel_size=2", f"max_steps={STEPS + 5}"]
    plan, run = make_plan(str(runs.config), [*common, *overrides], str(runs.fp32), Environment(0, 2, 0, 2, "test"))
    run.release()
    return plan


def attempts(run: RunFolder) -> list[dict]:
    return [json.loads(line) for line in (run.path / "attempts.jsonl").read_text().splitlines()]


def test_every_start_has_a_line_with_what_was_changed_since_the_start_before(copied, runs):
    begun = [line for line in attempts(copied) if line["event"] == "begins"]
    assert [(line["checkpoint"], line["world_size"], line["expert_parallel_size"]) for line in begun] == [
        (None, 2, 2),
        ("step-00000020", 2, 2),
    ]
    assert [line["state"] for line in attempts(copied) if line["event"] == "ended"] == ["done", "done"]
    assert begun[1]["changed"] == {} and begun[1]["command"]
    plan = plan_for(copied, runs, "learning_rate=0.5", "loss_on=all")
    (note,) = [note for note in plan.notes if note.startswith("changed since the previous start")]
    assert "learning_rate 0.003 -> 0.5" in note and "loss_on answer -> all" in note
    assert "DeepSpeed JSON" not in note  # the JSON has the rate as well, but it is listed once
    line = attempts(copied)[-1]
    assert line["event"] == "begins" and line["checkpoint"] == "step-00000020" and line["host"] and line["time"]
    assert line["changed"]["config.learning_rate"] == [0.003, 0.5]
    assert line["changed"]["deepspeed.optimizer.params.lr"] == [0.003, 0.5]
    assert len(line["commit"]) == 40 and line["uncommitted_changes"] in (True, False)


def test_changes_of_the_json_and_of_versions_are_listed(copied, runs):
    description = yaml.safe_load((copied.path / "run.yaml").read_text())
    description["deepspeed"]["optimizer"]["params"]["eps"] = 1e-6
    description["versions"]["deepspeed"] = "0.0.1"
    (copied.path / "run.yaml").write_text(yaml.safe_dump(description))
    (note,) = [note for note in plan_for(copied, runs).notes if note.startswith("changed since the previous start")]
    assert "optimizer.params.eps in the DeepSpeed JSON 1e-06 -> 1e-08" in note
    assert "deepspeed's version 0.0.1 -> 0.19.8" in note


@pytest.mark.parametrize(
    ("section", "values", "sentence"),
    [
        ("zero_optimization", {"stage": 1}, "was trained with ZeRO stage 3, and now it would be 1"),
        (
            "bf16",
            {"enabled": True},
            r"was trained with precision fp32, and now it would be bf16.*\(precision.force=true",
        ),
    ],
)
def test_changes_that_deepspeed_could_not_load_are_refused_in_a_sentence(copied, runs, section, values, sentence):
    path = runs.deepspeed_config("other", **{section: values})
    overrides = [f"output={copied.path}", "expert_parallel_size=2", f"max_steps={STEPS + 5}", "precision.force=true"]
    with pytest.raises(ConfigurationError, match=f"{sentence}.*init_from"):
        make_plan(str(runs.config), overrides, str(path), Environment(0, 2, 0, 2, "test"))


def test_a_checkpoint_of_another_optimizer_is_refused_in_a_sentence(copied, runs):
    """An earlier version accepted other optimizers."""
    description = yaml.safe_load((copied.path / "run.yaml").read_text())
    description["deepspeed"]["optimizer"]["type"] = "SGD"
    (copied.path / "run.yaml").write_text(yaml.safe_dump(description))
    with pytest.raises(ConfigurationError, match="trained with optimizer SGD, and now it would be AdamW.*init_from"):
        plan_for(copied, runs)


def test_a_start_reports_that_the_previous_one_did_not_end_properly(copied, runs, capsys):
    plan_for(copied, runs)  # a start that is killed before it trains
    assert json.loads((copied.path / "status.json").read_text())["state"] == "starting"
    plan_for(copied, runs)
    assert f"the previous attempt did not end properly: last seen at step {STEPS}" in capsys.readouterr().out
    begun, ended, again = attempts(copied)[-3:]
    assert (begun["event"], ended["event"], again["event"]) == ("begins", "ended", "begins")
    assert ended["state"] == "failed" and "was killed" in ended["reason"]


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("seed=77", "was trained with seed 1234 and now it is 77.*; set seed=1234, or another output"),
        ("global_batch_rows=3", "global_batch_rows is 3, which does not divide"),  # found before the folder is read
    ],
)
def test_a_refused_start_changes_the_status_from_done_to_failed(copied, runs, override, sentence):
    with pytest.raises(ConfigurationError, match=sentence) as raised:
        plan_for(copied, runs, override)
    status = json.loads((copied.path / "status.json").read_text())
    assert (status["state"], status["step"], status["reason"]) == ("failed", STEPS, str(raised.value))
    assert attempts(copied)[-1]["reason"] == str(raised.value)
    assert plan_for(copied, runs).checkpoint.name == "step-00000020"


def test_a_refused_start_keeps_the_status_of_a_running_job_and_creates_no_folder(copied, runs, tmp_path):
    holder = RunFolder(copied.path)
    holder.claim()
    holder.write_status("running", 7)
    for override in ("max_steps=30", "global_batch_rows=3"):
        with pytest.raises(ConfigurationError):
            plan_for(copied, runs, override)
        assert json.loads((copied.path / "status.json").read_text())["state"] == "running"
    with pytest.raises(ConfigurationError):
        plan_for(RunFolder(tmp_path / "new"), runs, "global_batch_rows=3")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("name", "content"), [("run.yaml", None), ("run.yaml", "config: ["), ("model/config.json", None), ("model", None)]
)
def test_a_run_folder_that_has_lost_a_file_is_an_error_of_one_sentence(copied, runs, name, content):
    path = copied.path / name
    if content is not None:
        path.write_text(content)
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    with pytest.raises(ConfigurationError, match=f"cannot read .*{name}.*restore it.*or set another output") as raised:
        plan_for(copied, runs)
    assert "\n" not in str(raised.value)


def test_a_warm_up_that_outlasts_the_run_gives_a_note(copied, runs):
    notes = plan_for(copied, runs, "warmup_steps=50").notes
    assert any(f"schedule ends at step {STEPS}, within the warm-up of 50 steps" in note for note in notes)
    assert not any("warm-up" in note for note in plan_for(copied, runs).notes)


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete", "manifest"])
def test_a_damaged_newest_checkpoint_is_skipped(copied, damage):
    newest, before = copied.checkpoints / "step-00000020", copied.checkpoints / "step-00000015"
    assert find_checkpoint(copied, "auto") == (newest, [])
    victim = newest / "manifest.json" if damage == "manifest" else next(newest.glob("*optim_states.pt"))
    content = bytearray(victim.read_bytes())
    if damage == "delete":
        victim.unlink()
    elif damage == "flip":
        content[1000] ^= 1
        victim.write_bytes(content)
    else:
        victim.write_bytes(content[: len(content) // 2])
    found, passed_over = find_checkpoint(copied, "auto")
    assert found == before
    assert victim.name in passed_over[0]
    with pytest.raises(ConfigurationError, match="cannot resume from step-00000020"):
        find_checkpoint(copied, "step-00000020")
    with pytest.raises(ConfigurationError, match="has checkpoints up to step-00000020"):
        find_checkpoint(copied, "never")
    (before / "manifest.json").write_text("{")
    with pytest.raises(ConfigurationError, match="has no complete checkpoint"):
        find_checkpoint(copied, "auto")  # nor may the run start anew over what is there


def test_a_checkpoint_of_an_earlier_version_is_refused_in_one_sentence(copied):
    for manifest in copied.checkpoints.glob("*/manifest.json"):
        content = json.loads(manifest.read_text())
        del content["train_state"]["balancing_bias"]
        manifest.write_text(json.dumps({**content, "format": 1}))
    with pytest.raises(ConfigurationError, match="format 1; this version reads 2.*; set another output") as raised:
        find_checkpoint(copied, "auto")
    assert "\n" not in str(raised.value)


class Foreign:
    """An object that runs foreign code when it is loaded from a checkpoint."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_checkpoint_with_foreign_code_is_refused_and_the_code_not_run(copied, runs, tmp_path, capsys):
    checkpoint, harm = copied.checkpoints / "step-00000020", tmp_path / "harm"
    victim = min(checkpoint.glob("*optim_states.pt"))
    torch.save({**torch.load(victim, weights_only=False), "foreign": Foreign(harm)}, victim)
    manifest = read_manifest(checkpoint)
    (checkpoint / "manifest.json").unlink()
    write_manifest(checkpoint, {**manifest, "files": describe_durably(checkpoint, files_of(checkpoint))})
    sentence = "is not a training state written by DeepSpeed, and loading it could run foreign code"
    with pytest.raises(ConfigurationError, match=f"{sentence}.*open"):
        plan_for(copied, runs)
    with pytest.raises(ConfigurationError, match=sentence):
        convert(checkpoint, tmp_path / "universal")
    with pytest.raises(SystemExit):
        lfm(["export", str(copied.path), "--out", str(tmp_path / "exported")])
    assert sentence in capsys.readouterr().err
    assert not harm.exists()


def test_an_export_reports_that_it_skips_a_damaged_newest_checkpoint(copied, tmp_path, capsys):
    next((copied.checkpoints / "step-00000020").glob("*optim_states.pt")).unlink()
    lfm(["export", str(copied.path), "--out", str(tmp_path / "exported")])
    assert "skipping the damaged checkpoint step-00000020: " in capsys.readouterr().err
    assert "| 15 of 20 |" in (tmp_path / "exported" / "README.md").read_text()


def test_resuming_from_an_earlier_checkpoint_keeps_the_new_checkpoints(copied, runs):
    """The later checkpoints are of steps that are trained again: they must neither be loaded nor replace new ones."""
    (copied.checkpoints / "step-00000007.partial").mkdir()
    (copied.checkpoints / "step-00000003").mkdir()  # has lost its manifest: ignored, but left for the user to delete
    overrides = ["expert_parallel_size=2", "max_steps=16", f"schedule.steps={STEPS}", "resume=step-00000015"]
    (output, _) = runs.run(2, [*runs.arguments("whole"), *overrides, f"output={copied.path}"])
    assert "checkpoint step-00000020 was renamed to left-step-00000020" in output.stdout
    names = sorted(path.name for path in copied.checkpoints.iterdir() if path.is_dir())
    assert names == ["left-step-00000020", "step-00000003", "step-00000015", "step-00000016"]
    assert copied.latest.read_text() == "step-00000016\n"
    assert find_checkpoint(copied, "auto")[0].name == "step-00000016"


def test_a_checkpoint_of_another_run_is_not_resumed_from(copied, runs):
    with pytest.raises(ConfigurationError, match="init_from starts a new run"):
        find_checkpoint(copied, str(runs.folder / "whole" / "checkpoints" / "step-00000020"))


@pytest.mark.slow
def test_a_signal_stops_a_run_with_a_checkpoint_and_it_resumes_from_there(trainer):
    """While it trains, another job may not train in the folder."""
    arguments = trainer.arguments("stopped", "max_steps=100000", "schedule.steps=20", "checkpoint_every=100000")
    command = [sys.executable, "train.py", *arguments]
    process = fork_server.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        for line in process.stdout:
            if line.startswith("step 1/"):
                break
        second = fork_server.run(command, capture_output=True, text=True, timeout=120)
        assert second.returncode == 2
        assert "another job is training in" in second.stderr
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    finally:
        process.kill()  # otherwise it would train for hours
    assert process.returncode == 75
    run = RunFolder(trainer.folder / "stopped")
    status = json.loads((run.path / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("stopped", "signal")
    assert run.latest.read_text() == f"step-{status['step']:08d}\n"
    trainer.run(1, trainer.arguments("stopped", f"max_steps={status['step'] + 3}", "schedule.steps=20"))
    assert set(trainer.scalars("stopped")["train/loss"]) == set(range(1, status["step"] + 4))


def test_another_corpus_or_global_batch_than_the_checkpoints_is_refused(copied, runs, sample_data, tmp_path):
    other = tmp_path / "other"
    lfm(["prepare", "sample", "--out", str(other), "--seq-len", "48"])
    fingerprints = [ShardFolder(folder).fingerprint[:16] for folder in (sample_data, other)]
    command = [sys.executable, "train.py", *runs.arguments("whole", f"max_steps={STEPS + 1}", f"output={copied.path}")]
    for change, expected in (
        (f"data={other}", fingerprints),
        ("global_batch_rows=8", ["global_batch_rows 4 ", "it is 8"]),
    ):
        result = fork_server.run([*command, change], capture_output=True, text=True, timeout=120)
        assert result.returncode == 2, result.stderr
        assert all(part in result.stderr for part in expected)
        assert "Traceback" not in result.stderr


def test_the_name_of_a_source_may_contain_markup():
    (drawn,) = _plots({f"validation/by_source/{name}": [(1, 2.0), (2, 1.0)] for name in (r"a <b> $\frac$", "c")})
    assert r"a &lt;b&gt; $\frac$" in drawn
