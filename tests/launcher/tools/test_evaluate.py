"""`lfm evaluate`: likelihood figures against plain PyTorch, and the same figures from any number of processes."""

import json
import math
import os
import re
import shutil
import sys
from itertools import islice

import numpy as np
import pytest
import torch

from data_pipeline.loading.loader import ValidationBatches
from data_pipeline.loading.reader import ShardFolder
from data_pipeline.preparation.prepare import prepare
from data_pipeline.preparation.settings import Settings
from launcher.errors import ConfigurationError
from launcher.tools.evaluation.held_out import data_of_run
from launcher.tools.evaluation.likelihood import DocumentScore, bytes_of_tokens, likelihood_metrics
from launcher.tools.inference.generation import load_model
from tests import fork_server
from tests.launcher.trainer import start

COMMAND = [sys.executable, "-m", "launcher.cli", "evaluate"]


@pytest.fixture(scope="module")
def held_out(sample_data, tmp_path_factory):
    """Shards made with the model's tokenizer; in the held-out part, the ends of rows cut some answers."""
    folder = tmp_path_factory.mktemp("held_out") / "data"
    settings = Settings(seq_len=16, validation_share=0.02, tokenizer=str(sample_data / "tokenizer"))
    prepare("sample", folder, settings, progress=False)
    return folder


@pytest.fixture(scope="module")
def learned(exported, sample_data, tmp_path_factory):
    """The small model after a few steps, so that some tokens are right."""
    model, tokenizer = load_model(exported)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for batch in islice(ValidationBatches(ShardFolder(sample_data), micro_batch_rows=8, rank=0, world_size=1), 25):
        optimizer.zero_grad()
        model.train()(**batch.inputs).loss.backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("learned") / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def evaluated(learned, held_out, tmp_path_factory):
    """The folder with the results of one process and of two, and what they printed."""
    folder = tmp_path_factory.mktemp("evaluated")
    arguments = [str(learned), "--data", str(held_out), "--max-new-tokens", "6", "--batch-size", "4", "--limit", "23"]
    one = fork_server.run(
        [*COMMAND, *arguments, "--out", str(folder / "one")], capture_output=True, text=True, timeout=240
    )
    assert one.returncode == 0, one.stderr
    results = start(2, [*COMMAND, *arguments, "--out", str(folder / "two")])
    for result in results:
        assert result.returncode == 0, result.stdout
    return folder, one.stdout, [result.stdout for result in results]


def test_two_processes_give_the_figures_of_one_to_the_last_digit(evaluated):
    folder, one, (first, second) = evaluated
    for name in ("metrics.json", "samples.jsonl"):
        assert (folder / "one" / name).read_bytes() == (folder / "two" / name).read_bytes()
    assert one.splitlines()[-1] == first.splitlines()[-1]
    assert "held-out answers are exactly right" in one.splitlines()[-1]
    assert "answers" not in second  # only the first one prints


def test_the_likelihood_figures_are_those_of_plain_pytorch(evaluated, learned, held_out):
    metrics = json.loads((evaluated[0] / "one" / "metrics.json").read_text())
    model, tokenizer = load_model(learned)
    data = ShardFolder(held_out / "validation")
    nats, places, text, whole = [], [], "", []
    for number in np.unique(np.linspace(0, data.num_rows - 1, 23).round().astype(int)):
        read = data.gather(np.array([number]))
        for start_, answer, end, _, _, offset in read.spans.tolist():
            ids = torch.from_numpy(read.tokens[:, start_:end].astype(np.int64))
            with torch.no_grad():
                logits = model(ids, use_cache=False).logits[0, :-1].double()
            asked = slice(max(answer - start_, 1) - 1, None)
            target = ids[0, 1:][asked]
            if len(target) == 0:
                continue
            nats.append(torch.nn.functional.cross_entropy(logits[asked], target, reduction="sum").item())
            order = logits[asked].argsort(dim=-1, descending=True, stable=True)
            places.append((order == target[:, None]).int().argmax(-1))
            text += tokenizer.decode(target, skip_special_tokens=True)
            if offset == 0 and ids[0, -1] == tokenizer.eos_token_id:
                whole.append(bool((places[-1] == 0).all()))
    places = torch.cat(places)
    found, counts = metrics["teacher_forced"], metrics["counts"]
    assert counts["answer_tokens"] == len(places)
    assert counts["whole_documents"] == len(whole) == counts["answers"] < counts["documents"]
    assert found["perplexity"] == pytest.approx(math.exp(sum(nats) / len(places)), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(sum(nats) / math.log(2) / len(text.encode()), rel=1e-4)
    for top, name in {1: "token_accuracy", 3: "top3_accuracy", 5: "top5_accuracy", 10: "top10_accuracy"}.items():
        assert found[name] == (places < top).double().mean().item()
    assert found["token_accuracy"] < found["top3_accuracy"] < found["top10_accuracy"]
    assert metrics["evaluated"]["data_fingerprint"] == data.fingerprint


def test_likelihood_figures_match_a_case_worked_by_hand():
    whole = DocumentScore(math.log(2) * 6, 3, 6, (3, 3, 3, 3), is_whole=True)
    wrong = DocumentScore(math.log(2) * 14, 1, 2, (0, 0, 1, 1), is_whole=True)
    piece = DocumentScore(0.0, 1, 2, (1, 1, 1, 1), is_whole=False)
    found = likelihood_metrics([whole, wrong, piece])
    assert found["perplexity"] == pytest.approx(2 ** (20 / 5))  # per token; a mean over documents would differ
    assert found["bits_per_byte"] == pytest.approx(20 / 10)
    names = ("token_accuracy", "top3_accuracy", "top5_accuracy", "top10_accuracy")
    assert [found[name] for name in names] == [4 / 5, 4 / 5, 1, 1]
    assert found["sequence_accuracy"] == 1 / 2


def test_the_bytes_of_tokens_are_those_of_their_text(exported):
    _, tokenizer = load_model(exported)
    text = "What is 12 × 7?\n\tñ中 😀"
    ids = tokenizer(text)["input_ids"]
    assert bytes_of_tokens(tokenizer, len(tokenizer))[ids].sum() == len(text.encode())


@pytest.mark.slow
def test_questions_from_a_file_give_figures_and_the_best_and_worst_answers(exported, tmp_path):
    rows = [{"question": f"What is {n} plus 1?", "answer": str(n + 1)} for n in range(5)]
    rows.append({"question": "What is <b>5</b> plus 1?", "answer": "6"})
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    model = shutil.copytree(exported, tmp_path / "model")
    arguments = [
        str(model),
        "--questions",
        str(tmp_path / "questions.jsonl"),
        "--samples",
        "2",
        "--max-new-tokens",
        "3",
    ]
    environment = {**os.environ, "NLTK_DATA": "/nowhere", "HOME": "/nowhere"}
    result = fork_server.run([*COMMAND, *arguments], env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "note: cleaning changed 1 of 6 pairs, as it does for training data" in result.stderr
    assert result.stdout.count("METEOR is skipped: NLTK finds no WordNet; set NLTK_DATA") == 1
    out = tmp_path / "model-evaluation"  # an exported folder holds the model and nothing else
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [sample["kind"] for sample in samples] == ["best", "best", "worst", "worst"]
    assert json.loads((out / "metrics.json").read_text())["counts"]["answers"] == 6


def test_a_run_is_evaluated_on_its_own_held_out_rows(tmp_path):
    run, data = tmp_path / "run", tmp_path / "data"
    run.mkdir()

    def asked(**keys) -> str:
        (run / "run.yaml").write_text(json.dumps({"config": keys}))
        return data_of_run(run)

    assert asked(data="there", validation_data="elsewhere") == "elsewhere"
    for keys in (
        {"data": str(data)},
        {"data": [{"path": str(data), "weight": 1}]},
        {"data": "there", "validation_data": "https://elsewhere"},
    ):
        with pytest.raises(ConfigurationError, match="no held-out rows on this machine; give --data"):
            asked(**keys)  # `data` has no held-out part, and its own rows were trained on
    (data / "validation").mkdir(parents=True)
    assert asked(data=str(data)) == str(data / "validation")


@pytest.mark.slow
def test_an_evaluation_that_cannot_run_is_an_error_of_one_sentence(exported, sample_data, tmp_path):
    other = tmp_path / "other"
    prepare("sample", other, Settings(seq_len=512), progress=False)
    (tmp_path / "wrong.jsonl").write_text('{"question": "a", "answer": 1}')
    emptied = [{"question": "a", "answer": "b"}, {"question": "Where is it?", "answer": "https://example.com"}]
    (tmp_path / "emptied.jsonl").write_text("\n".join(map(json.dumps, emptied)))
    for arguments, message in (
        (["--data", str(other)], "has rows of 512 tokens, but the model takes at most 256"),
        (
            ["--questions", str(tmp_path / "wrong.jsonl")],
            'line 1 of .*wrong.jsonl is not a JSON object with the texts "question"',
        ),
        (
            ["--questions", str(tmp_path / "emptied.jsonl")],
            "the answer of pair 2 of .*emptied.jsonl is 'https://example.com', and cleaning leaves nothing of it",
        ),
        (["--limit", "0"], "--limit is 0; it must be at least 1"),
        ([], "is not a run folder, so its held-out data is unknown; give --data"),
    ):
        result = fork_server.run([*COMMAND, str(exported), *arguments], capture_output=True, text=True, timeout=120)
        assert result.returncode == 2, result.stderr
        assert re.search("error: .*" + message, result.stderr), result.stderr
