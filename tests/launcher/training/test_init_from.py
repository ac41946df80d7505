"""Training from exported weights: folders that do not fit are refused, and under ZeRO-3 no rank holds the model."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from data_pipeline.loading.reader import ShardFolder
from launcher.cli import main as lfm
from launcher.config_file import load_run_config
from launcher.errors import ConfigurationError
from launcher.run_folder import RunFolder
from launcher.tools.export.export import load_run
from launcher.training.setup.json_keys import AUTOEP
from launcher.training.setup.model_source import build_model, model_config
from launcher.weight_files import WeightFiles, write_shards
from model import LiquidConfig, LiquidForCausalLM
from tests.launcher.trainer import PROJECT, start

GIGABYTE = 1e9


@pytest.fixture(scope="module")
def folder(trainer) -> Path:
    """A model folder for the sample's tokenizer."""
    config = load_run_config(trainer.config)
    data = ShardFolder(config.data)
    out = trainer.folder / "model"
    shutil.copytree(data.tokenizer_path, out)
    build_model(config, data).save_pretrained(out)
    return out


@pytest.fixture
def copied(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "model"))


def refusal(trainer, folder: Path) -> str:
    config = load_run_config(trainer.config, [f"init_from={folder}"])
    with pytest.raises(ConfigurationError) as refused:
        model_config(config, ShardFolder(config.data))
    return str(refused.value)


def test_an_unchanged_folder_is_accepted(trainer, folder):
    config = load_run_config(trainer.config, [f"init_from={folder}"])
    assert model_config(config, ShardFolder(config.data)).hidden_size == 32


def test_another_vocabulary_is_refused(trainer, copied):
    description = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**description, "used_vocab_size": 1990}))
    assert "another tokenizer" in refusal(trainer, copied)
    tokenizer = json.loads((copied / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-1]
    (copied / "config.json").write_text(json.dumps(description))
    (copied / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "another tokenizer" in refusal(trainer, copied)
    (copied / "tokenizer.json").unlink()
    assert "has no tokenizer.json" in refusal(trainer, copied)


def test_weights_that_do_not_match_the_configuration_are_refused(trainer, copied):
    description = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**description, "moe_intermediate_size": 32}))
    message = refusal(trainer, copied)
    assert "(4, 32, 24) in its weights and (4, 32, 32)" in message and "config.json" in message
    (copied / "config.json").write_text(json.dumps({**description, "num_hidden_layers": 1}))
    assert "None by its config.json" in refusal(trainer, copied)
    (copied / "config.json").write_text(json.dumps({**description, "model_type": "llama"}))
    assert "'llama'" in refusal(trainer, copied)


def test_an_exports_embedding_table_is_padded_again(trainer, copied):
    """An export has only the rows of tokens."""
    whole = AutoModelForCausalLM.from_pretrained(copied).eval()
    tokens = whole.config.used_vocab_size
    assert whole.config.vocab_size % 128 == 0 and whole.config.vocab_size > tokens
    exported = AutoModelForCausalLM.from_pretrained(copied)
    exported.resize_token_embeddings(tokens)
    exported.save_pretrained(copied)
    assert WeightFiles(copied).shapes["model.embed_tokens.weight"] == (tokens, 32)
    config = load_run_config(trainer.config, [f"init_from={copied}"])
    begun = build_model(config, ShardFolder(config.data)).eval()
    assert begun.config.vocab_size == whole.config.vocab_size
    ids = torch.arange(4, 60).unsqueeze(0)
    assert torch.equal(begun(ids).logits, whole(ids).logits)


def test_damaged_weights_are_refused(trainer, copied):
    weights = copied / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    assert "truncated" in refusal(trainer, copied)
    weights.write_bytes(b"\xff" * 100)
    assert "holds no weights" in refusal(trainer, copied)
    save_file({"model.norm.weight": torch.zeros(32, dtype=torch.int64)}, weights)
    assert "fp32, bf16 or fp16" in refusal(trainer, copied)


def test_the_weight_files_are_read_as_transformers_reads_them(folder):
    files, model = WeightFiles(folder), AutoModelForCausalLM.from_pretrained(folder)
    state = model.state_dict()
    assert files.shapes.keys() == state.keys() - {"lm_head.weight"}
    assert all(torch.equal(files.read(name), state[name]) for name in files.shapes)


@pytest.mark.slow
def test_a_run_resumes_without_the_weights_that_it_began_with(trainer, folder, capsys):
    """A resumed run with fresh weights does not read any either. The results are those of a run without a stop."""
    gone = "init_from=/moved/elsewhere"
    common = ["schedule.steps=3", "validate_every=null"]
    results = trainer.run(
        1,
        trainer.arguments("whole", f"init_from={folder}", "max_steps=3", *common),
        trainer.arguments("parts", f"init_from={folder}", "max_steps=1", *common),
        trainer.arguments("parts", gone, "max_steps=2", *common),
        trainer.arguments("parts", "model=tiny", "max_steps=3", *common),
        trainer.arguments("fresh", "max_steps=3", *common),
        trainer.arguments("fresh-parts", "max_steps=1", *common),
        trainer.arguments("fresh-parts", gone, "max_steps=3", *common),
    )
    for whole, parts in (("whole", "parts"), ("fresh", "fresh-parts")):
        expected, found = (load_run(trainer.folder / name).state_dict() for name in (whole, parts))
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert results[0].stdout.count("init_from=/moved/elsewhere is not read") == 2
    begun = [RunFolder(trainer.folder / name).began_with() for name in ("parts", "fresh-parts")]
    assert begun == [str(folder), None]
    shutil.copytree(trainer.folder / "parts", trainer.folder / "checked")
    lfm(["preflight", "--config", str(trainer.config), "--deepspeed_config", str(trainer.fp32), *[
        f"output={trainer.folder / 'checked'}", gone, "max_steps=5",
    ]])  # fmt: skip
    assert "of the run" in capsys.readouterr().out


@pytest.mark.bench
def test_a_rank_of_two_takes_less_than_60_percent_of_the_memory_of_one(tmp_path):
    """Rank 0 reads a bf16 folder of preset `1b` into an fp32 engine, with the experts spread over all ranks.

    The engine has no optimizer, whose states would be halved exactly.
    """
    config = LiquidConfig.from_preset("1b")
    with torch.device("meta"):
        model = LiquidForCausalLM(config)
    tensors = {name: (tuple(tensor.shape), torch.bfloat16) for name, tensor in model.state_dict().items()}
    del tensors["lm_head.weight"]
    write_shards(tmp_path, tensors, lambda name, target: target.fill_(0.01), 10**9)
    config.save_pretrained(tmp_path)
    resolved = json.loads((PROJECT / "ds_configs" / "zero3.json").read_text())
    for section in ("fp16", "optimizer", "activation_checkpointing"):
        del resolved[section]
    resolved |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "gradient_clipping": 1.0}
    peaks = {}
    for world_size in (1, 2):
        resolved["train_batch_size"] = world_size
        resolved["expert_parallel"] |= AUTOEP | {"autoep_size": world_size, "use_grouped_mm": False}
        command = [sys.executable, "-m", "partition_worker", str(tmp_path), json.dumps(resolved)]
        results = start(world_size, command, timeout=500)
        assert all(result.returncode == 0 for result in results), results[0].stdout
        found = [json.loads(result.stdout.splitlines()[-1]) for result in results]
        for rank, values in enumerate(found):
            shown = ", ".join(f"{name} {value / GIGABYTE:.2f} GB" for name, value in values.items())
            print(f"rank {rank} of {world_size}: {shown}")
        peaks[world_size] = max(values["peak"] for values in found)
    assert peaks[2] < 0.6 * peaks[1]
