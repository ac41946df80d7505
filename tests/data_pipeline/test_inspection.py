import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from data_pipeline.checking import inspection
from data_pipeline.checking.inspection import choose_rows, collect_statistics, report, rows_as_text
from data_pipeline.checking.inspection_plots import save_histograms
from data_pipeline.errors import DataError
from data_pipeline.loading.reader import ShardFolder
from launcher.commands.shard_folders import add_inspect, add_verify


@pytest.fixture(scope="module")
def statistics(prepared):
    return collect_statistics(prepared)


@pytest.fixture(scope="module")
def documents(prepared) -> dict[int, dict]:
    """Each document's length, question, answer and source, counted piece by piece."""
    folder = ShardFolder(prepared)
    found: dict[int, dict] = {}
    for row in range(folder.num_rows):
        for start, answer_start, end, source, input_row, _ in folder.read(row)[1].tolist():
            one = found.setdefault(input_row, {"document": 0, "prompt": -2, "answer": -1, "source": source})
            one["document"] += end - start
            one["prompt"] += answer_start - start
            one["answer"] += end - answer_start
    return found


def cells(table: str, first: str) -> list[str]:
    (line,) = (line for line in table.splitlines() if line.split()[:1] == [first])
    return line.split()


def test_lengths_add_up_over_the_pieces_of_a_document(statistics, documents):
    in_order = [documents[row] for row in sorted(documents)]
    for name in ("document", "prompt", "answer"):
        assert getattr(statistics, f"{name}_tokens").tolist() == [one[name] for one in in_order]
    assert statistics.document_sources.tolist() == [one["source"] for one in in_order]
    assert max(statistics.document_tokens) > 64, "no document continues in another row"


def test_the_summary_is_counted_and_not_copied_from_the_index(prepared, tmp_path, documents):
    folder = shutil.copytree(prepared, tmp_path / "shards")
    index = json.loads((folder / "index.json").read_text())
    true = index["counts"] | {}
    index["counts"].update(documents=1, tokens=1, packed_rows=1)
    (folder / "index.json").write_text(json.dumps(index))
    text = report(collect_statistics(folder))
    assert f"{true['packed_rows']} of 64 tokens, in {len(index['files'])} shards" in text
    assert re.search(rf"^  documents +{len(documents)}$", text, re.MULTILINE)
    fill = true["tokens"] / (64 * true["packed_rows"])
    assert f"{true['tokens']:,} of {64 * true['packed_rows']:,} ({fill:.2%} filled)" in text
    assert re.search(rf"^  rows dropped +{sum(true['rows_dropped'].values())} \(", text, re.MULTILINE)
    assert all((f"{number} {reason}" in text) == (number > 0) for reason, number in true["rows_dropped"].items())


def test_pieces_and_vocabulary_are_counted(prepared, statistics, documents):
    folder = ShardFolder(prepared)
    rows = [folder.read(row) for row in range(folder.num_rows)]
    used = set(np.concatenate([tokens for tokens, _ in rows]).tolist())
    pieces = [len(spans) for _, spans in rows]
    text = report(statistics)
    assert f"{folder.vocab_size} ids, {len(used)} of them used" in text
    assert f"continued pieces  {sum(pieces) - len(documents)} of {sum(pieces)}" in text
    assert f"{np.mean(pieces):.1f} ({min(pieces)} to {max(pieces)})" in text


def test_quantiles_are_lengths_that_occur(statistics, documents):
    answers = sorted(one["answer"] for one in documents.values())
    row = cells(report(statistics), "answer")
    assert row[1] == f"{np.mean(answers):,.1f}"
    assert row[-1] == str(answers[-1])
    assert row[4] == str(answers[(len(answers) - 1) // 2])


def test_sources_are_told_apart(prepared, statistics, documents):
    names = ShardFolder(prepared).index["sources"]
    for source, name in enumerate(names):
        its_own = [one for one in documents.values() if one["source"] == source]
        tokens = sum(one["document"] for one in its_own)
        row = cells(report(statistics), name)
        assert row[1:3] == [f"{len(its_own):,}", f"{tokens:,}"]
        assert row[3] == f"{tokens / sum(one['document'] for one in documents.values()):.1%}"
        assert row[4] == f"{np.mean([one['prompt'] for one in its_own]):,.1f}"
        assert row[5] == f"{np.mean([one['answer'] for one in its_own]):,.1f}"


def test_the_fill_of_a_source_is_that_of_the_rows_with_its_tokens(prepared, statistics):
    folder = ShardFolder(prepared)
    filled: dict[int, list[float]] = {}
    for row in range(folder.num_rows):
        spans = folder.read(row)[1].tolist()
        for start, _, end, source, _, _ in spans:
            filled.setdefault(source, []).extend([spans[-1][2] / folder.seq_len] * (end - start))
    assert statistics.source_fill == pytest.approx([np.mean(filled[source]) for source in sorted(filled)])
    assert cells(report(statistics), folder.sources[0])[6] == f"{np.mean(filled[0]):.2%}"


def test_many_sources_are_summed_up_unless_all_are_wanted(statistics):
    count = 40
    changed = statistics.__dict__ | {
        "source_names": [f"source{number}" for number in range(count)],
        "document_sources": np.arange(len(statistics.document_sources)) % count,
        "source_fill": np.ones(count),
    }
    changed = type(statistics)(**{name: changed[name] for name in type(statistics).__dataclass_fields__})
    assert "… 20 smaller sources" in report(changed)
    full = report(changed, full=True)
    assert "smaller" not in full
    assert all(f"source{number} " in full for number in range(count))


def test_rows_show_every_text_as_the_model_reads_it(prepared, rows):
    folder = ShardFolder(prepared)
    texts = "\n".join(rows_as_text(prepared, range(folder.num_rows), full=True))
    flat = texts.replace("\n       ", "\n")
    shown = 0
    for number in range(0, 397, 7):
        question = rows[number]["question"]
        if question.isascii() and not set(question) & set("&(\r"):
            shown += f"<s>{question}<sep>" in flat
            assert f"s{number % 3}, input row {number}, tokens " in texts
    assert shown > 5
    assert "continues at token 64 of its document" in texts


def test_long_texts_are_shortened(prepared, monkeypatch):
    monkeypatch.setattr(inspection, "TEXT_HEAD", 40)
    monkeypatch.setattr(inspection, "TEXT_TAIL", 20)
    short, full = ("\n".join(rows_as_text(prepared, range(40), full)) for full in (False, True))
    assert "characters …]" in short
    assert "characters …]" not in full
    assert len(short) < len(full)


def test_rows_are_drawn_by_their_seed(prepared):
    assert choose_rows(prepared, 5, 0) == choose_rows(prepared, 5, 0) != choose_rows(prepared, 5, 1)
    assert choose_rows(prepared, 10**6, 0) == list(range(ShardFolder(prepared).num_rows))
    with pytest.raises(DataError, match="has no row -1: its rows are 0 to"):
        list(rows_as_text(prepared, [-1]))


def test_a_validation_folder_may_share_the_tokenizer_above_it(prepared, tmp_path):
    folder = shutil.copytree(prepared, tmp_path / "shards")
    inner = shutil.copytree(prepared, folder / "validation", ignore=shutil.ignore_patterns("tokenizer"))
    index = json.loads((inner / "index.json").read_text())
    index["tokenizer"]["files"] = []
    index["counts"] = {name: index["counts"][name] for name in ("documents", "tokens", "packed_rows")}
    (inner / "index.json").write_text(json.dumps(index))
    assert list(rows_as_text(inner, [3])) == list(rows_as_text(prepared, [3]))
    assert "dropped" not in report(collect_statistics(inner))


def test_a_broken_shard_is_named(prepared, tmp_path):
    folder = shutil.copytree(prepared, tmp_path / "shards")
    path = folder / "shard-00000-001.tar"
    data = bytearray(path.read_bytes())
    data[300] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="shard-00000-001.tar"):
        collect_statistics(folder)


def test_histograms_are_a_picture(statistics, tmp_path):
    from PIL import Image

    path = save_histograms(statistics, tmp_path / "new" / "histograms.png")
    assert path == tmp_path / "new" / "histograms.png"
    with Image.open(path) as picture:
        assert picture.size[0] > 1000
        assert len(picture.convert("RGB").getcolors(2**24)) > 10
    assert save_histograms(statistics, tmp_path) == tmp_path / "inspection.png"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["inspection.png", "new"]
    with pytest.raises(DataError, match="cannot be written"):
        save_histograms(statistics, path / "below.png")


def test_without_matplotlib_the_command_says_what_to_install(statistics, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(DataError, match="pip install matplotlib"):
        save_histograms(statistics, tmp_path)


def test_no_heavy_library_is_imported_for_tables():
    program = "import sys; from data_pipeline.checking import inspection, inspection_plots, verification\n"
    program += "sys.exit(bool({'matplotlib', 'torch', 'transformers', 'polars'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


class Commands:
    """The commands alone, as `lfm` adds them."""

    def __init__(self) -> None:
        import argparse

        self.parser = argparse.ArgumentParser()
        commands = self.parser.add_subparsers()
        add_verify(commands)
        add_inspect(commands)

    def __call__(self, *arguments) -> None:
        options = self.parser.parse_args([str(argument) for argument in arguments])
        options.run(options)


def test_the_commands_print_tables_rows_and_that_all_is_whole(prepared, capsys):
    lfm = Commands()
    lfm("inspect", prepared, "--row", 2, "--row", 0)
    said = capsys.readouterr().out
    assert "packed rows" in said
    assert said.index("\nrow 2: ") < said.index("\nrow 0: ")
    lfm("inspect", prepared, "--rows", 0)
    assert "\nrow " not in capsys.readouterr().out
    lfm("inspect", prepared, "--rows", 3, "--seed", 1)
    assert capsys.readouterr().out.count("\nrow ") == 3
    lfm("verify", prepared, "--workers", 1)
    counts = ShardFolder(prepared).index["counts"]
    assert f"is intact: {len(ShardFolder(prepared).index['files'])} shards" in (said := capsys.readouterr().out)
    assert f"{counts['documents']:,} documents and {counts['tokens']:,} tokens" in said
