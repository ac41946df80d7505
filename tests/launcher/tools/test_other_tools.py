"""Other projects' tools, used as their users do, work with this project's exported folders and shards."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import model  # noqa: F401 - registers the architecture
from data_pipeline.loading.reader import ShardFolder
from launcher.cli import main as lfm

pytestmark = pytest.mark.extra
QUESTION = [{"role": "user", "content": "What is 1 plus 1?"}]


def wanted(package: str):
    return pytest.importorskip(package, reason=f"install {package} (pip install -e .[tools])")


@pytest.fixture(scope="module")
def folder(trainer) -> Path:
    """A short run, exported with the model's code as for other people."""
    trainer.run(1, trainer.arguments("run", "max_steps=10"))
    out = trainer.folder / "model"
    lfm(["export", str(trainer.folder / "run"), "--out", str(out), "--custom-code"])
    return out


@pytest.fixture
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def test_lm_evaluation_harness_runs_on_the_folder(folder, tmp_path):
    """One task compares likelihoods and one generates text; both read local files, without the hub."""
    wanted("lm_eval")
    documents = [{"question": f"What is {n} plus 1?", "answer": str(n + 1)} for n in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in documents))
    common = (
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\n"
        "test_split: test\ndoc_to_text: '{{question}}'\n"
    )
    (tmp_path / "sums_choice.yaml").write_text(
        "task: sums_choice\noutput_type: multiple_choice\n"
        + common
        + "doc_to_choice: ['{{answer}}', 'Lima']\ndoc_to_target: 0\nmetric_list: [{metric: acc}]\n"
    )
    (tmp_path / "sums_written.yaml").write_text(
        "task: sums_written\noutput_type: generate_until\n"
        + common
        + "doc_to_target: '{{answer}}'\ngeneration_kwargs: {max_gen_toks: 4, until: ['.']}\n"
        "metric_list: [{metric: exact_match}]\n"
    )
    command = [
        sys.executable,
        "-m",
        "lm_eval",
        "--model",
        "hf",
        "--tasks",
        "sums_choice,sums_written",
        "--device",
        "cpu",
    ]
    command += ["--model_args", f"pretrained={folder},trust_remote_code=True", "--batch_size", "4"]
    command += ["--include_path", str(tmp_path), "--output_path", str(tmp_path / "out")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    (written,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(written.read_text())["results"]
    assert 0 <= results["sums_choice"]["acc,none"] <= 1
    assert 0 <= results["sums_written"]["exact_match,none"] <= 1


def test_datasets_and_webdataset_read_the_shards(sample_data, tmp_path):
    webdataset, datasets = wanted("webdataset"), wanted("datasets")
    shards = sorted(map(str, sample_data.glob("*.tar")))
    expected = ShardFolder(sample_data).gather(np.arange(5))
    rows = list(webdataset.WebDataset(shards, shardshuffle=False).decode())
    index = json.loads((sample_data / "index.json").read_text())
    assert len(rows) == index["counts"]["packed_rows"]
    read = datasets.load_dataset(
        "webdataset", data_files={"train": shards}, split="train", streaming=True, cache_dir=str(tmp_path)
    )
    for number, row in enumerate(read.take(5)):
        assert np.array_equal(np.asarray(row["tokens.npy"]), expected.tokens[number])
        assert np.array_equal(rows[number]["tokens.npy"], expected.tokens[number])
        assert rows[number]["spans.npy"].shape == np.asarray(row["spans.npy"]).shape == (expected.pieces[number], 6)


def test_a_pipeline_answers_questions_alone_and_in_batches(folder):
    answers = pipeline("text-generation", model=str(folder), device="cpu")
    assert answers.tokenizer.model_max_length == answers.model.config.max_position_embeddings
    (single,) = answers(QUESTION, max_new_tokens=5, do_sample=False)
    assert single["generated_text"][-1]["role"] == "assistant"
    longer = [{"role": "user", "content": "What is the capital of Peru, and which country is it in?"}]
    batch = answers([QUESTION, longer], batch_size=2, max_new_tokens=5, do_sample=False)
    assert batch[0][0]["generated_text"] == single["generated_text"]  # padding in the batch changes nothing
    (sampled,) = answers("What is 1 plus 1?", max_new_tokens=3, return_full_text=False)
    assert isinstance(sampled["generated_text"], str)


def test_prompt_tuning_works_with_batches_that_are_padded_on_the_left(folder, tokenizer):
    """PEFT puts its virtual tokens in front of the padding."""
    peft = wanted("peft")
    torch.manual_seed(0)
    options = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    tuned = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), options).eval()
    texts = [[{"role": "user", "content": text}] for text in ("Why?", "What is the capital of Peru?")]
    read = {"return_dict": True, "return_tensors": "pt", "padding": True}
    batch = tokenizer.apply_chat_template(texts, **read)
    assert not batch["attention_mask"].all()
    both = tuned(**batch).logits
    written = tuned.generate(**batch, max_new_tokens=6, do_sample=False, eos_token_id=None)[:, -6:]
    for row, text in enumerate(texts):
        alone = tokenizer.apply_chat_template([text], **read)
        tokens = alone["input_ids"].shape[1]
        torch.testing.assert_close(both[row, -tokens:], tuned(**alone).logits[0, -tokens:])
        torch.testing.assert_close(both[row, :5], tuned(**alone).logits[0, :5])
        assert torch.equal(
            written[row], tuned.generate(**alone, max_new_tokens=6, do_sample=False, eos_token_id=None)[0, -6:]
        )
    tuned.train()
    tuned(**batch, labels=batch["input_ids"]).loss.backward()
    assert tuned.prompt_encoder.default.embedding.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("packing", [False, True])
def test_one_step_of_trls_trainer_changes_only_the_adapters(folder, tokenizer, tmp_path, packing):
    peft, trl, datasets = wanted("peft"), wanted("trl"), wanted("datasets")
    conversations = [
        {
            "messages": [
                {"role": "user", "content": f"What is {n} plus {n}?"},
                {"role": "assistant", "content": str(2 * n)},
            ]
        }
        for n in range(8)
    ]
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM")
    options = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=4, learning_rate=0.1, report_to="none",
        use_cpu=True, packing=packing, max_length=64, save_strategy="no", bf16=False, disable_tqdm=True,
    )  # fmt: skip
    whole = AutoModelForCausalLM.from_pretrained(folder)
    before = {name: weight.clone() for name, weight in whole.state_dict().items()}
    trainer = trl.SFTTrainer(
        model=whole,
        args=options,
        train_dataset=datasets.Dataset.from_list(conversations),
        peft_config=lora,
        processing_class=tokenizer,
    )
    adapters = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert len(adapters) == 2 * 2 * 4 and all("lora_" in name for name in adapters)
    result = trainer.train()
    assert np.isfinite(result.training_loss) and result.training_loss > 1
    after = dict(trainer.model.named_parameters())
    assert all(not torch.equal(after[name], old) for name, old in adapters.items() if "lora_B" in name)
    merged = trainer.model.unload().state_dict()
    assert all(torch.equal(merged[name], old) for name, old in before.items())


def test_transformers_trainer_accumulates_and_evaluates(folder, tokenizer, tmp_path):
    """Two padded micro-batches of different lengths make one step; the evaluation gathers only the logits."""
    wanted("accelerate")
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

    rows = [tokenizer(f"What is {n} plus {'1 plus ' * n}1?") for n in range(8)]
    options = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        per_device_eval_batch_size=4, report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    whole = AutoModelForCausalLM.from_pretrained(folder)
    trainer = Trainer(
        model=whole,
        args=options,
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizer,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    found = trainer.predict(rows)
    mean = found.metrics["test_loss"]
    assert found.predictions.shape[::2] == (8, whole.config.vocab_size)
    assert mean < trainer.train().training_loss < 1.3 * mean  # it has the other terms as well, but nothing twice
