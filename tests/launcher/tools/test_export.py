"""An exported folder: the engine's model, usable without this project, and written without holding all of it."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_pipeline.errors import DataError
from data_pipeline.preparation.prepare import prepare
from data_pipeline.preparation.settings import Settings
from data_pipeline.sources.origin import NOTE, write_origin
from launcher.cli import main as lfm
from launcher.run_folder import RunFolder
from launcher.tools.export.export import load_run
from launcher.tools.export.model_card import describe_data
from launcher.training.checkpoints.checkpoint import read_train_state
from launcher.training.checkpoints.universal import convert
from model.modeling import UNUSED_LOGIT
from model.moe import balancing_bias
from tests import fork_server
from tests.launcher.export_worker import TOKENS
from tests.launcher.trainer import start
from tests.small_model import SIZES

STEPS = 4
# Has only the standard library and installed packages; `-S` leaves out the paths that an editable install adds.
ISOLATED = """\
import importlib.util, json, sys
folder, site, tokens, out = sys.argv[1:]
sys.path.append(site)
for package in ("model", "launcher", "data_pipeline"):
    assert importlib.util.find_spec(package) is None, package
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
assert type(model).__module__.startswith("transformers_modules."), type(model)
with torch.no_grad():
    torch.save(model(torch.tensor(json.loads(tokens))).logits, out)
card = open(folder + "/README.md", encoding="utf-8").read()
exec(card.split("```python")[1].split("```")[0].replace("FOLDER", folder))
"""


@pytest.fixture(scope="module")
def run(trainer, tmp_path_factory) -> RunFolder:
    """A run of two ranks that share the experts, validated at its end."""
    data = tmp_path_factory.mktemp("held-out") / "sample"
    prepare("sample", data, Settings(seq_len=64, validation_share=0.02), progress=False)
    options = ["expert_parallel_size=2", f"max_steps={STEPS}", f"validate_every={STEPS}", "validation_samples=0"]
    arguments = trainer.arguments("run", f"data={data}", *options)
    for result in start(2, [sys.executable, "-m", "export_worker", json.dumps(arguments)]):
        assert result.returncode == 0, result.stdout
    return RunFolder(trainer.folder / "run")


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "model"
    lfm(["export", str(run.path), "--out", str(out), "--max-shard-size", "100KB", "--custom-code"])
    return out


@torch.no_grad()
def test_the_folders_logits_are_the_engines(run, exported):
    engines = torch.load(run.path / "logits.pt")
    folder = AutoModelForCausalLM.from_pretrained(exported).eval()
    folders = folder(TOKENS).logits
    tokens = len(AutoTokenizer.from_pretrained(exported))
    assert engines[..., :tokens].std() > 0.1 and (engines[..., tokens:] == UNUSED_LOGIT).all()
    torch.testing.assert_close(folders, engines[..., :tokens], atol=1e-5, rtol=1e-5)
    assert torch.equal(folders, load_run(run.path)(TOKENS).logits)
    # Fused heads of other tools multiply by the whole table, so it may only have the rows of tokens.
    assert len(folder.get_output_embeddings().weight) == folder.config.vocab_size == tokens < engines.shape[-1]


@torch.no_grad()
def test_the_folder_works_without_this_project(exported, tmp_path):
    logits = tmp_path / "logits.pt"
    site = Path(torch.__file__).parents[1]
    command = [sys.executable, "-I", "-S", "-c", ISOLATED, exported, site, json.dumps(TOKENS.tolist()), logits]
    environment = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment, timeout=120)
    assert result.returncode == 0, result.stderr
    assert torch.equal(torch.load(logits), AutoModelForCausalLM.from_pretrained(exported).eval()(TOKENS).logits)


def test_files_stay_below_the_requested_size_except_for_a_larger_tensor(exported):
    index = json.loads((exported / "model.safetensors.index.json").read_text())
    files = sorted(exported.glob("*.safetensors"))
    assert len(files) >= 3 and {path.name for path in files} == set(index["weight_map"].values())
    found = {}
    for path in files:
        with safe_open(path, "pt") as content:
            sizes = {name: content.get_tensor(name).nbytes for name in content.keys()}  # noqa: SIM118 - not a dict
        assert sum(sizes.values()) <= 100_000 or len(sizes) == 1
        assert all(index["weight_map"][name] == path.name for name in sizes)
        found |= sizes
    assert found.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(found.values())
    assert "lm_head.weight" not in found  # it is the token table


def test_bf16_rounds_the_weights_once_and_does_not_change_the_routers_bias(run, tmp_path):
    lfm(["export", str(run.path), "--out", str(tmp_path / "model"), "--dtype", "bf16"])
    folder, whole = AutoModelForCausalLM.from_pretrained(tmp_path / "model"), load_run(run.path)
    assert folder.dtype == torch.bfloat16
    for (name, rounded), weight in zip(folder.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(rounded, weight.bfloat16()), name
    (checkpoint,) = run.checkpoints.glob("step-*")
    trained = torch.tensor(read_train_state(checkpoint).balancing_bias)
    assert trained.any() and torch.equal(balancing_bias(folder), trained)


def test_the_model_card_describes_the_run(run, exported):
    card = (exported / "README.md").read_text()
    (checkpoint,) = run.checkpoints.glob("step-*")
    state = read_train_state(checkpoint)
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "transformers" and front["pipeline_tag"] == "text-generation"
    assert f"| Tokens | {state.tokens:,} |" in card and f"| Steps | {STEPS} of {STEPS} |" in card
    assert "| `sample` |" in card and "Apache-2.0" in card
    shown = float(re.search(r"\| cross entropy, nats per token \| ([\d.]+) \|", card)[1])
    assert "| cross entropy of the questions from `mathstackexchange` |" in card
    assert front["license"] == "apache-2.0"  # the sample's
    assert shown == pytest.approx(state.best_metric, abs=1e-4)


def test_a_new_export_replaces_an_earlier_one_and_nothing_else(run, tmp_path, monkeypatch, capsys):
    out = tmp_path / "models" / "model"
    lfm(["export", str(run.path), "--out", str(out)])
    (out / "tokenizer-note.txt").write_text("of the earlier one")
    (tmp_path / "link").symlink_to(out)
    inside = tmp_path / "inside"
    inside.mkdir()
    for folder, name in ((out, "."), (out, "../model"), (inside, "../inside"), (inside, "../../..")):
        monkeypatch.chdir(folder)
        with pytest.raises(SystemExit):
            lfm(["export", str(run.path), "--out", name])
        assert "is the current folder or one of its parents" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        lfm(["export", str(run.path), "--out", "/proc"])
    assert "mount point" in capsys.readouterr().err
    for name in (f"{inside}/../models/model/../model", str(tmp_path / "link")):
        (out / "tokenizer-note.txt").write_text("of the earlier one")
        lfm(["export", str(run.path), "--out", name])
        assert AutoModelForCausalLM.from_pretrained(out) and not (out / "tokenizer-note.txt").exists()
    assert [path.name for path in out.parent.iterdir()] == ["model"] and (tmp_path / "link").is_symlink()


@pytest.mark.slow
def test_an_export_that_a_signal_ends_leaves_nothing_behind(run, tmp_path):
    """The signal comes while it writes. It has much to write: a file for each weight."""
    options = ["--out", str(tmp_path / "model"), "--max-shard-size", "1KB"]
    process = fork_server.Popen([sys.executable, "-m", "launcher.cli", "export", str(run.path), *options])
    while not (writes := any(tmp_path.glob(".model.*/*.safetensors"))) and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143 and writes and not list(tmp_path.iterdir())


def test_the_model_card_names_the_dataset_of_downloaded_files(sample_data, tmp_path):
    """The card has one line for a folder, however many files it was made from."""
    files = tmp_path / "hub" / "dataset" / "data"
    files.mkdir(parents=True)
    for number in range(3):
        row = {"question": f"What is {number} plus 1?", "answer": str(number + 1)}
        (files / f"part-{number}.jsonl").write_text(json.dumps(row) + "\n")
    settings = Settings(seq_len=64, tokenizer=str(sample_data / "tokenizer"))
    prepare(str(files), tmp_path / "plain", settings, progress=False)
    names, lines = describe_data(str(tmp_path / "plain"))
    (line,) = lines[2:]
    assert names == [f"part-{number}.jsonl" for number in range(3)]
    assert "| 3 questions with answers" in line and line.endswith("| unknown: see its publisher |")
    write_origin(files.parent, "TIGER-Lab/WebInstructSub", "0123456789abcdef")
    prepare(str(files), tmp_path / "noted", settings, progress=False)
    names, lines = describe_data([{"path": str(tmp_path / "noted"), "weight": 2.0}])
    (line,) = lines[2:]
    assert names == ["TIGER-Lab/WebInstructSub"]
    assert line.startswith("| `TIGER-Lab/WebInstructSub` at `0123456789ab` (weight 2) | 3 questions")
    assert "Apache-2.0" in line
    (files.parent / NOTE).write_text("{}")
    with pytest.raises(DataError, match="does not name `dataset` and `revision`: run `lfm fetch` again"):
        prepare(str(files), tmp_path / "broken", settings, progress=False)


@pytest.mark.parametrize("size", ["", "2", "0MB", "2TB"])
def test_an_invalid_size_is_refused(size, capsys):
    with pytest.raises(SystemExit):
        lfm(["export", "run", "--out", "out", "--max-shard-size", size])
    assert "write it as 500MB or 2GB" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "experts", "json_changes", "overrides"),
    [
        (4, 2, {}, []),
        (2, 2, {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}}, ["precision.force=true"]),
        (2, 2, {"zero_optimization": {"stage": 2}}, []),
        (2, 1, {"zero_optimization": {"stage": 3, "sub_group_size": 20_000}}, []),
        (2, 1, {"expert_parallel": {"enabled": False}}, []),
    ],
)
def test_the_weights_are_those_of_deepspeeds_converter(trainer, tmp_path, world_size, experts, json_changes, overrides):
    """DeepSpeed's universal form, one file a parameter, is an independent way to the same values."""
    name = tmp_path.name
    path = trainer.deepspeed_config(name, **json_changes)
    options = ["max_steps=2", f"expert_parallel_size={experts}", *overrides]
    trainer.run(world_size, trainer.arguments(name, *options, deepspeed_config=path))
    run = trainer.folder / name
    (checkpoint,) = (run / "checkpoints").glob("step-*")
    convert(checkpoint, tmp_path / "universal")
    own = load_run(run).state_dict()
    seen = set()
    for file in (tmp_path / "universal" / "zero").glob("*/fp32.pt"):
        if file.parent.name == "lm_head.weight":  # stage 1 writes it separately, rounded
            continue
        content = torch.load(file, weights_only=True)
        value = content["param"] if isinstance(content, dict) else content
        name, half = file.parent.name, None
        if found := re.fullmatch(r"(.*\.experts)\.w([123])", name):
            name, half = f"{found[1]}.{'down' if found[2] == '2' else 'gate_up'}_proj", {"1": 0, "3": 1}.get(found[2])
        weight = own[name] if half is None else own[name].chunk(2, dim=1)[half]
        assert torch.equal(value.flatten()[: weight.numel()].view_as(weight), weight), name
        seen.add(name)
    assert seen | {"lm_head.weight"} >= {name for name in own if not name.endswith("bias") or "moe" not in name}


MEASURE = """\
import json, sys
import deepspeed
from launcher.tools.export.export import export
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # resets the peak
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
before = peak()
export(sys.argv[1], sys.argv[2], max_shard_bytes=int(sys.argv[3]))
print(json.dumps(peak() - before))
"""


@pytest.mark.slow
def test_an_export_holds_little_more_than_its_largest_tensor(trainer, tmp_path):
    """Resident memory, mapped files included, grows by three of the largest tensors and a shard at most."""
    larger = {**SIZES, "hidden_size": 256, "num_hidden_layers": 24, "num_experts": 8, "moe_intermediate_size": 512}
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(larger))
    trainer.run(2, trainer.arguments("larger", f"model={tmp_path / 'model.yaml'}", "max_steps=1"))
    shard = 20 * 10**6
    command = [sys.executable, "-c", MEASURE, trainer.folder / "larger", tmp_path / "model", shard]
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True, timeout=300)
    taken = json.loads(result.stdout.splitlines()[-1])
    weights = load_run(trainer.folder / "larger").state_dict()
    largest, whole = max(w.nbytes for w in weights.values()), sum(w.nbytes for w in weights.values())
    print(f"export of {whole / 1e6:.0f} MB took {taken / 1e6:.1f} MB; the largest tensor has {largest / 1e6:.1f} MB")
    assert taken < 3 * largest + shard < whole / 7
