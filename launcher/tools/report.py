"""`lfm report RUN`: describe a run in one self-contained HTML page without network access or scripts.

Slow imports are inside the functions, so that `lfm --help` does not wait for matplotlib.
"""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.config import Loss
from launcher.training.monitoring import tags

if TYPE_CHECKING:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

# The title and the TensorBoard tags of each plot. A plot without data is left out.
PLOTS = (
    ("Loss", (tags.LOSS, tags.CROSS_ENTROPY, tags.HELD_OUT_CROSS_ENTROPY)),
    ("Loss terms", tuple(tags.LOSS_TERM.format(term=weight.name) for weight in fields(Loss))),
    ("Validation loss by source", (tags.SOURCE_CROSS_ENTROPY,)),
    ("Held-out accuracy", (tags.TOKEN_ACCURACY, tags.TOP5_ACCURACY, tags.SEQUENCE_ACCURACY)),
    ("Learning rate", (tags.LEARNING_RATE,)),
    ("Gradient norm", (tags.GRADIENT_NORM,)),
    ("Gradient norm by group", (tags.GROUP_NORM,)),
    ("Loss scale", (tags.LOSS_SCALE,)),
    ("Tokens per second", (tags.TOKENS_PER_SECOND,)),
    ("Utilisation", (tags.MFU, tags.HFU)),
    (
        "Seconds per step",
        (tags.DATA_SECONDS, *(tags.PART_SECONDS.format(part=part) for part in ("forward", "backward", "optimizer"))),
    ),
    ("Memory, gigabytes", (tags.MEMORY,)),
    ("Load of the busiest expert over the mean", (tags.LOAD_MAX_OVER_MEAN,)),
    ("Router entropy", (tags.ROUTER_ENTROPY,)),
    ("Retained embedding ratio", (tags.RETAINED_RATIO,)),
)
LOGARITHMIC = {"Gradient norm", "Gradient norm by group", "Loss scale"}
LEGEND_AT_MOST = 12  # curves
STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:1200px;margin:2em auto;padding:0 1em;color:#222}"
    "h2{border-bottom:1px solid #ccc;margin-top:2em}.plots{display:flex;flex-wrap:wrap;gap:12px}"
    ".plots figure{margin:0;flex:1 1 480px}svg{width:100%;height:auto}"
    "table{border-collapse:collapse}th{background:#f6f6f6}"
    "td,th{border:1px solid #ccc;padding:4px 8px;text-align:left;vertical-align:top}"
    "pre{background:#f6f6f6;padding:1em;overflow:auto;max-height:32em}"
    "img{image-rendering:pixelated;min-width:240px;border:1px solid #ccc}"
)


def write_report(run: Path, out: Path) -> Path:
    """Write the page and return its path.

    Raises `ConfigurationError` if `run` is not a run folder, has no completed step, or `out` cannot be written.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from launcher.errors import ConfigurationError
    from launcher.files import replace_text

    if not (run / "run.yaml").is_file():
        raise ConfigurationError(f"{run} is not a run folder (it has no run.yaml); name the output of a training run")
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "images": 1, "tensors": 0})
    if (run / "tensorboard").is_dir():
        events.Reload()
    found = events.Tags()
    if tags.LOSS not in found["scalars"]:
        raise ConfigurationError(f"{run} has not completed a step yet, so there is nothing to report")
    scalars = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in found["scalars"]}
    sections = [
        f"<h1>{html.escape(run.name)}</h1>",
        _state(run),
        "<h2>Curves</h2><div class=plots>" + "".join(_plots(scalars)) + "</div>",
        *_expert_load(events, found),
        *_answers(events, found),
        "<h2>Environment and configuration</h2><pre>" + html.escape((run / "run.yaml").read_text()) + "</pre>",
    ]
    page = f"<!doctype html><meta charset=utf-8><title>{html.escape(run.name)}</title><style>{STYLE}</style>"
    try:
        replace_text(out, page + "\n".join(sections) + "\n")
    except OSError as error:
        raise ConfigurationError(
            f"cannot write the report to {out}: {error.strerror}; name another file with --out"
        ) from error
    return out


def _state(run: Path) -> str:
    path = run / "status.json"
    if not path.is_file():
        return "<p>No status yet.</p>"
    status = json.loads(path.read_text())
    reason = f" ({html.escape(status['reason'])})" if status.get("reason") else ""
    return f"<p>State: <b>{html.escape(status['state'])}</b> at step {status['step']:,}{reason}.</p>"


def _plots(scalars: dict[str, list[tuple[int, float]]]) -> Iterator[str]:
    """Yield each plot as an inline SVG that keeps text as text."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter, MaxNLocator

    for title, wanted in PLOTS:
        patterns = map(tags.pattern, wanted)
        chosen = [tag for pattern in patterns for tag in sorted(scalars) if pattern.fullmatch(tag)]
        if not chosen:
            continue
        figure = Figure(figsize=(6, 3.2), layout="constrained")
        axes = figure.subplots()
        for tag in chosen:
            steps, values = zip(*scalars[tag], strict=True)
            label = _short(tag).replace("$", r"\$")  # or matplotlib reads it as a formula
            axes.plot(steps, values, label=label, marker="o" if len(steps) < 30 else None, markersize=3)
        axes.set(title=title, xlabel="step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if title in LOGARITHMIC:
            axes.set_yscale("log")
            for formatted in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
                formatted(LogFormatter(minor_thresholds=(2, 0.4)))  # 3.6, not 3.6 × 10⁰
        axes.grid(alpha=0.3)
        if 1 < len(chosen) <= LEGEND_AT_MOST:
            # Below the plot, so that it hides no curve.
            figure.legend(loc="outside lower center", ncols=min(2, len(chosen)), fontsize="small", frameon=False)
        file = io.StringIO()
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
            figure.savefig(file, format="svg", metadata={"Date": None})
        svg = file.getvalue()
        yield f"<figure>{svg[svg.index('<svg') :]}</figure>"


def _short(tag: str) -> str:
    """Return the name of a curve in the legend."""
    for of_layers in (tags.LOAD_MAX_OVER_MEAN, tags.ROUTER_ENTROPY):
        if layer := tags.pattern(of_layers).fullmatch(tag):
            return f"layer {int(layer[1])}"
    for of_names in (tags.SOURCE_CROSS_ENTROPY, tags.GROUP_NORM):  # names stay unchanged
        if name := tags.pattern(of_names).fullmatch(tag):
            return name[1]
    return tag.removeprefix("train/").removeprefix("perf/").removesuffix("_seconds").replace("/", " ").replace("_", " ")


def _expert_load(events: EventAccumulator, found: dict) -> list[str]:
    if tags.LOAD not in found["images"]:
        return []
    from launcher.training.monitoring.expert_load import LEGEND

    image = events.Images(tags.LOAD)[-1]
    data = base64.b64encode(image.encoded_image_string).decode()
    return [
        f"<h2>Expert load at step {image.step:,}</h2><p>{LEGEND}</p>"
        f'<img alt="expert load" src="data:image/png;base64,{data}" width="{image.width}">'
    ]


def _answers(events: EventAccumulator, found: dict) -> list[str]:
    """Return the newest sampled answers as HTML; TensorBoard stores them as a Markdown table."""
    tag = f"{tags.ANSWERS}/text_summary"
    if tag not in found["tensors"]:
        return []
    newest = events.Tensors(tag)[-1]
    lines = newest.tensor_proto.string_val[0].decode().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if not line.startswith("|---")]
    # Splitting at | is safe: in the texts it is stored as an entity.
    table = "".join(
        "<tr>" + "".join(f"<{kind}>{_escaped(cell)}</{kind}>" for cell in row) + "</tr>"
        for kind, row in zip(["th"] + ["td"] * len(rows), rows, strict=False)
    )
    return [f"<h2>Answers to held-out questions at step {newest.step:,}</h2><table>{table}</table>"]


def _escaped(cell: str) -> str:
    return html.escape(cell.replace("&#124;", "|"))
