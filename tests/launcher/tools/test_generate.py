"""`lfm generate`: where questions come from, how they are answered, and what is refused."""

import json
import os
import pty
import subprocess
import sys

import pytest
import torch

from launcher.errors import ConfigurationError
from launcher.tools.inference.generation import Decoding, answer, load_model, prompt_ids
from launcher.tools.inference.questions import cleaned, read_lines, read_objects, told_if_changed
from tests import fork_server

COMMAND = [sys.executable, "-m", "launcher.cli", "generate"]
QUESTIONS = ["What is 7 plus 5?", "What is the capital of Peru?", "Why?"]


@pytest.fixture(scope="module")
def small(exported):
    return load_model(exported)


@pytest.mark.slow
def test_questions_from_arguments_a_file_or_the_standard_input_get_the_same_answers(exported, small, tmp_path):
    expected = answer(*small, QUESTIONS, Decoding(max_new_tokens=5))
    (tmp_path / "q.txt").write_text("\n".join(QUESTIONS) + "\n\n")
    (tmp_path / "q.jsonl").write_text("\n".join(json.dumps({"question": question}) for question in QUESTIONS))
    options = [str(exported), "--max-new-tokens", "5", "--jsonl"]
    for arguments, text in (
        (QUESTIONS, ""),
        (["--file", str(tmp_path / "q.jsonl")], ""),
        ([], (tmp_path / "q.txt").read_text()),
    ):
        result = fork_server.run(
            [*COMMAND, *options, *arguments], input=text, capture_output=True, text=True, timeout=120
        )
        assert result.returncode == 0, result.stderr
        rows = [json.loads(line) for line in result.stdout.splitlines()]
        assert rows == [{"question": q, "answer": a} for q, a in zip(QUESTIONS, expected, strict=True)]


def test_a_plain_text_is_continued(small):
    model, tokenizer = small
    text = "the sum of two"
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]])
    expected = model.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
    (given,) = answer(*small, [text], Decoding(max_new_tokens=5), is_beginning=True)
    assert given == tokenizer.decode(expected, skip_special_tokens=True)
    assert given != answer(*small, [text], Decoding(max_new_tokens=5))[0]


@pytest.mark.slow
def test_one_question_on_a_terminal_is_answered_piece_by_piece(exported, small):
    (expected,) = answer(*small, QUESTIONS[:1], Decoding(max_new_tokens=40))
    terminal, inside = pty.openpty()
    with fork_server.Popen(
        [*COMMAND, str(exported), QUESTIONS[0], "--max-new-tokens", "40"], stdout=inside, stderr=subprocess.DEVNULL
    ) as process:
        os.close(inside)
        pieces = []
        while True:
            try:
                pieces.append(os.read(terminal, 4096))
            except OSError:  # the other end is closed
                break
    os.close(terminal)
    assert process.returncode == 0
    assert b"".join(pieces).decode().replace("\r\n", "\n").strip() == expected.strip()
    # One read may return several writes, but the first one did not wait for the last.
    assert pieces[0].decode(errors="replace").strip() != expected.strip()


def test_each_decoding_option_has_its_effect(small):
    model, tokenizer = small
    plain = answer(*small, QUESTIONS, Decoding(20))
    beams = answer(*small, QUESTIONS, Decoding(20, num_beams=4))

    def likelihood(question: str, decoding: Decoding) -> float:
        """Return the mean log probability of the generated ids. Encoding their text again could give other ids."""
        prompt = torch.tensor([prompt_ids(tokenizer, question)])
        with torch.no_grad():
            ids = model.generate(prompt, attention_mask=torch.ones_like(prompt), **decoding.arguments())
            logits = model(ids, use_cache=False).logits[0, prompt.shape[1] - 1 : -1].double()
        return logits.log_softmax(-1).gather(1, ids[0, prompt.shape[1] :, None]).mean().item()

    assert beams != plain
    gains = [likelihood(q, Decoding(20, num_beams=4)) - likelihood(q, Decoding(20)) for q in QUESTIONS]
    assert max(gains) > 0
    penalised = answer(*small, QUESTIONS, Decoding(20, repetition_penalty=50.0))
    for text in penalised:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert len(set(ids)) >= len(ids) - 1
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(answer(*small, QUESTIONS, Decoding(20, temperature=1.0)))
    assert drawn[0] == drawn[1] != drawn[2]
    assert answer(*small, QUESTIONS, Decoding(20, temperature=1.0, top_p=1e-9)) == plain  # only the likeliest is left
    assert answer(*small, QUESTIONS, Decoding(20, temperature=1e-300)) == plain


def test_a_batch_gives_the_answers_of_its_questions_alone(small):
    together = answer(*small, QUESTIONS, Decoding(12), batch_size=3)
    assert together == answer(*small, QUESTIONS, Decoding(12), batch_size=1)


def test_only_newlines_end_a_line_of_a_file(tmp_path):
    """Not U+2028 or U+0085, which JSON texts may contain. A byte order mark is not part of the first line."""
    texts = ["one\u2028two", "three\x85four", "five\x0bsix"]
    rows = [json.dumps({"question": text, "answer": text}, ensure_ascii=False) for text in texts]
    file = tmp_path / "q.jsonl"
    file.write_text("\ufeff" + "\r\n".join(rows[:1]) + "\n\n" + "\n".join(rows[1:]), encoding="utf-8")
    assert read_objects(str(file), "question", "answer") == [{"question": t, "answer": t} for t in texts]
    plain = tmp_path / "q.txt"
    plain.write_text("\ufeff" + "\n".join(texts[:2]), encoding="utf-8")
    assert read_lines(str(plain)) == [(1, texts[0]), (2, texts[1])]


@pytest.mark.parametrize("line", ['{"question": "\\ud800"}', "[" * 200_000, "1" * 5000, "null", '{"question": 1}'])
def test_a_line_that_is_no_question_is_named(tmp_path, line):
    file = tmp_path / "q.jsonl"
    file.write_text('{"question": "Why?"}\n' + line)
    with pytest.raises(ConfigurationError, match='^line 2 of .* is not a JSON object with the text "question"$'):
        read_objects(str(file), "question")


@pytest.mark.parametrize("text", ["https://example.com", "<p></p>", " \t\n", "\x00"])
def test_a_question_that_cleaning_empties_is_refused(small, text):
    with pytest.raises(ConfigurationError, match="the question is .*, and cleaning leaves nothing of it"):
        answer(*small, ["Why?", text], Decoding(2))


def test_a_note_shows_a_question_whose_words_cleaning_changed(exported):
    def noted(text: str) -> str:
        return told_if_changed(text, cleaned(text))

    assert noted("Is https://example.com safe?") == (
        "the question is read as 'Is safe?': it was cleaned like the training data"
    )
    assert "'a & b'" in noted("a &amp; b")
    assert len(noted("<b>why</b> " * 1000)) < 300
    for alike in ("  Why \n\n\n not?\t", "cafe\u0301", "x < y and $a<b$"):
        assert noted(alike) == ""
    result = fork_server.run(
        [*COMMAND, str(exported), "--max-new-tokens", "1", "Why?", "Is https://example.com safe?"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0
    notes = [line for line in result.stderr.splitlines() if line.startswith("note: ")]
    assert notes == ["note: question 2 is read as 'Is safe?': it was cleaned like the training data"]


def test_questions_and_options_that_cannot_work_are_errors_of_one_sentence(exported, small):
    with pytest.raises(
        ConfigurationError, match=r"more than the model's 256 positions; shorten it, or ask for at most"
    ):
        answer(*small, ["Why? " * 60], Decoding(200))
    with pytest.raises(ConfigurationError, match=r"256 positions; shorten it$"):
        answer(*small, ["Why? " * 300], Decoding(200))
    for wrong, message in (
        ({"top_p": 0.5}, "set temperature above 0"),
        ({"temperature": -1}, "temperature is -1; it must be 0"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            Decoding(**wrong)
    result = fork_server.run([*COMMAND, str(exported)], input="\n", capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "there is no question in the standard input" in result.stderr
