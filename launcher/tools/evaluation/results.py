"""Write the results of an evaluation: `metrics.json`, `samples.jsonl`, and a table on the console.

    python -m launcher.tools.evaluation.results

prints the table of metrics in README.md beside this file.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launcher.files import replace_text
from launcher.tools.evaluation.evaluation import Answered, Evaluation, by_quality
from launcher.tools.evaluation.likelihood import LIKELIHOOD_METRICS
from launcher.tools.evaluation.metric import Metric
from launcher.tools.evaluation.text_metrics import TEXT_METRICS

METRICS: dict[str, Metric] = {**LIKELIHOOD_METRICS, **TEXT_METRICS}


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
            metric = METRICS[name]
            table.add_row(metric.label, metric.without if value is None else metric.form.format(value))
        table.add_section()
    Console().print(table)


def page_table() -> str:
    """Return the Markdown table of all metrics with their meanings."""
    rows = [f"| `{name}` | {metric.meaning} |" for name, metric in METRICS.items()]
    return "\n".join(["| metric | meaning |", "|---|---|", *rows]) + "\n"


if __name__ == "__main__":
    print(page_table(), end="")
