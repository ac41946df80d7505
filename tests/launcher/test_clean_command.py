"""`lfm clean`: counts and changes per rule, in a sample of rows; and `lfm prepare --rules`."""

import json
import sys

import pytest

from launcher.cli import main

ROWS = [
    {"question": f"What is {number}  +  1?", "answer": "see https://example.org/a <b>now</b>"} for number in range(40)
] + [{"question": "Is it clean?", "answer": f"yes, {number}"} for number in range(60)]


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def counts(output: str) -> dict[str, int]:
    lines = [line.split() for line in output.splitlines()]
    return {words[0]: int(words[1]) for words in lines if len(words) == 3 and words[2].endswith("%")}


def test_every_rule_is_counted_over_all_rows_of_a_small_file(corpus, capsys):
    assert main(["clean", str(corpus)]) == 0
    output = capsys.readouterr().out
    assert output.startswith("100 rows, 200 texts")
    assert counts(output) == {
        "fix_mojibake": 0,
        "remove_control_characters": 0,
        "normalize_unicode": 0,
        "unescape_html": 0,
        "remove_tags": 40,
        "remove_urls": 40,
        "normalize_whitespace": 40,
    }
    assert "https" not in output


def test_the_changes_are_shown_by_rule(corpus, capsys):
    main(["clean", str(corpus), "--show", "--examples", "2"])
    output = capsys.readouterr().out
    assert "remove_urls (-removed- and +added+)" in output
    assert output.count("[-https://example.org/a") + output.count("[- https://example.org/a") == 2
    assert "[-<b>-]now" in output and "now[-</b>-]" in output
    assert "[-·-]" in output or "·" in output.split("normalize_whitespace (")[1]
    assert "\033[" not in output  # colours are for terminals


def test_a_rule_that_is_off_is_not_counted(corpus, capsys):
    main(["clean", str(corpus), "--rows", "50", "--rules", "no_remove_urls", "no_remove_tags"])
    output = capsys.readouterr().out
    assert output.startswith("50 rows")
    assert counts(output).keys().isdisjoint({"remove_urls", "remove_tags"})


def test_colours_are_used_on_a_terminal(corpus, monkeypatch, capsys):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    main(["clean", str(corpus), "--show", "--examples", "1"])
    output = capsys.readouterr().out
    assert "\033[31m" in output and "\033[0m" in output and "[-" not in output


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--rows", "0"], "error: --rows is 0; it must be at least 1"),
        (["--rules", "remove_html"], "error: there is no cleaning rule 'remove_html': the rules are fix_mojibake"),
        (
            ["--newlines", "space", "--rules", "remove_urls"],
            "newlines is 'space', but the rule normalize_whitespace is off",
        ),
    ],
)
def test_wrong_arguments_end_in_one_sentence(corpus, capsys, arguments, sentence):
    with pytest.raises(SystemExit):
        main(["clean", str(corpus), *arguments])
    error = capsys.readouterr().err
    assert sentence in error and "Traceback" not in error


def test_prepare_records_the_rules_and_refuses_another_choice(corpus, tmp_path, capsys):
    command = [
        "prepare",
        str(corpus),
        "--tokenizer",
        "train",
        "--seq-len",
        "64",
        "--workers",
        "1",
        "--validation-share",
        "0",
    ]
    command += ["--out", str(tmp_path / "out")]
    assert main([*command, "--rules", "no_remove_urls"]) == 0
    cleaning = json.loads((tmp_path / "out" / "index.json").read_text())["config"]["cleaning"]
    assert "remove_urls" not in cleaning["rules"] and "remove_tags" in cleaning["rules"]
    with pytest.raises(SystemExit):
        main(command)
    assert "was prepared with cleaning = " in capsys.readouterr().err
