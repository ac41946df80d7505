"""Write the results of an evaluation: `metrics.json`, `samples.jsonl`, and a table on the console."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launcher.files import replace_text
from launcher.tools.evaluation.evaluation import Answered, Evaluation, by_quality

# The label and the number format of each metric in the table.
LABELS = {
    "perplexity": ("perplexity per token", "{:.3f}"),
    "bits_per_byte": ("bits per byte", "{:.4f}"),
    "cross_entropy": ("cross entropy, nats per token", "{:.4f}"),
    "token_accuracy": ("correct token is the most likely", "{:.2%}"),
    "top3_accuracy": ("correct token is in the top 3", "{:.2%}"),
    "top5_accuracy": ("correct token is in the top 5", "{:.2%}"),
    "top10_accuracy": ("correct token is in the top 10", "{:.2%}"),
    "sequence_accuracy": ("answers with every token correct", "{:.2%}"),
    "exact_match": ("exact match", "{:.2%}"),
    "bleu": ("BLEU (0 to 100)", "{:.2f}"),
    "rouge1": ("ROUGE-1", "{:.4f}"),
    "rouge2": ("ROUGE-2", "{:.4f}"),
    "rouge_l": ("ROUGE-L", "{:.4f}"),
    "meteor": ("METEOR", "{:.4f}"),
    "distinct_1": ("distinct words", "{:.4f}"),
    "distinct_2": ("distinct pairs of words", "{:.4f}"),
    "distinct_3": ("distinct triples of words", "{:.4f}"),
    "average_length": ("words per generated answer", "{:.2f}"),
    "average_expected_length": ("words per expected answer", "{:.2f}"),
}
# What the table shows for a metric that is None.
WITHOUT = {
    "sequence_accuracy": "no whole answer",
    "bleu": "no answer has 4 words",
    "rouge2": "no answer has 2 words",
    "meteor": "needs WordNet",
    "distinct_1": "no words",
    "distinct_2": "no answer has 2 words",
    "distinct_3": "no answer has 3 words",
}


def write_results(folder: Path, evaluation: Evaluation, evaluated: dict[str, Any], samples: int) -> None:
    """Write `metrics.json` and `samples.jsonl` into `folder`.

    evaluated: the model, the data and the settings; it is stored beside the metrics and counts. samples: how many of
    the best and of the worst answers to write.
    """
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"teacher_forced": evaluation.likelihood, "generated": evaluation.text}
    content = {"evaluated": evaluated, "counts": evaluation.counts, **figures}
    replace_text(folder / "metrics.json", json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    lines = [json.dumps(sample, ensure_ascii=False) for sample in _samples(evaluation.answers, samples)]
    replace_text(folder / "samples.jsonl", "".join(line + "\n" for line in lines))


def _samples(answers: list[Answered], count: int) -> list[dict]:
    """Return the `count` best and the `count` worst answers, without repeating any."""
    ranked = by_quality(answers)
    best, worst = ranked[:count], ranked[max(count, len(ranked) - count) :]
    return [
        {"kind": kind, **asdict(answered), "exact_match": answered.is_right}
        for kind, part in (("best", best), ("worst", worst[::-1]))
        for answered in part
    ]


def print_table(evaluation: Evaluation) -> None:
    """Print all metrics as a table."""
    from rich.console import Console
    from rich.table import Table

    counts = evaluation.counts
    table = Table(show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    for title, figures in (
        (f"expected answers, teacher-forced ({counts['answer_tokens']:,} tokens)", evaluation.likelihood),
        (f"generated answers ({counts['answers']:,})", evaluation.text),
    ):
        if figures:
            table.add_row(f"[bold]{title}[/bold]", "", end_section=True)
        for name, value in figures.items():
            label, form = LABELS[name]
            table.add_row(label, WITHOUT[name] if value is None else form.format(value))
        table.add_section()
    Console().print(table)
