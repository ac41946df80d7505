"""Draw the README's pictures.

`python -m tests.benchmarks.pictures runs/sample` writes `model/architecture.svg` and `launcher/run.svg`.

They are plain SVG, and their colours follow the reader's light or dark theme.
"""

import sys
from pathlib import Path
from xml.sax.saxutils import escape

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launcher.training.monitoring import tags

PROJECT = Path(__file__).parents[2]
STYLE = """<style>
text { font: 14px system-ui, sans-serif; fill: #1f2328 } .small { font-size: 12px; fill: #59636e }
.box { fill: #f6f8fa; stroke: #d1d9e0 } .part { fill: #ddf4ff; stroke: #54aeff }
.line { stroke: #59636e; fill: none } .head { fill: #59636e } .grid { stroke: #d1d9e0 }
.first { stroke: #0969da; fill: none; stroke-width: 2 } .second { stroke: #bc4c00; fill: none; stroke-width: 2 }
.first-text { fill: #0969da } .second-text { fill: #bc4c00 }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc } .small { fill: #9198a1 }
  .box { fill: #151b23; stroke: #3d444d } .part { fill: #0c2d6b; stroke: #1f6feb }
  .line { stroke: #9198a1 } .head { fill: #9198a1 } .grid { stroke: #3d444d }
  .first { stroke: #4493f8 } .second { stroke: #f0883e } .first-text { fill: #4493f8 } .second-text { fill: #f0883e }
}
</style>
"""
ARROW = (
    '<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
    '<path d="M0 0 L10 5 L0 10 z" class="head"/></marker></defs>\n'
)
PARTS = (
    ("attention", "last W tokens, grouped queries, rotary positions"),
    ("deformable convolution", "gated; each token picks its delays"),
    ("LSTM memory", "in every few layers; reads block means"),
    ("mixture of experts", "top-k routed, and a shared expert"),
)


def svg(width: int, height: int, title: str, *parts: str) -> str:
    """Return a picture in the common style."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">\n'
    return head + STYLE + "\n".join(parts) + "\n</svg>\n"


def box(x: float, y: float, width: float, height: float, name: str, detail: str = "", kind: str = "box") -> str:
    """Draw a labelled rectangle."""
    middle = x + width / 2
    lines = [f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" class="{kind}"/>']
    lines.append(
        f'<text x="{middle}" y="{y + (18 if detail else height / 2 + 5)}" text-anchor="middle">{escape(name)}</text>'
    )
    if detail:
        lines.append(f'<text x="{middle}" y="{y + 36}" text-anchor="middle" class="small">{escape(detail)}</text>')
    return "\n".join(lines)


def arrow(x: float, y1: float, y2: float) -> str:
    """Draw an arrow from top to bottom."""
    return f'<path d="M{x} {y1} V{y2}" class="line" marker-end="url(#head)"/>'


def architecture() -> str:
    """Draw one column: table, embedding, the repeated block with its four parts, norm, head."""
    drawn, y, middle = [ARROW], 10, 260
    for name, detail in (
        ("token ids", ""),
        ("token table", "also the output layer's weights"),
        ("liquid embedding", "causal convolution; keeps more components for longer, less predictable text"),
    ):
        height = 46 if detail else 30
        drawn += [box(20, y, 480, height, name, detail), arrow(middle, y + height, y + height + 20)]
        y += height + 20
    block = 66 * len(PARTS) + 34
    drawn.append(f'<rect x="20" y="{y}" width="480" height="{block}" rx="8" class="box"/>')
    drawn.append(f'<text x="34" y="{y + 20}" class="small">a layer, repeated; h is the residual stream</text>')
    for number, (name, detail) in enumerate(PARTS):
        top = y + 30 + 66 * number
        drawn.append(f'<text x="34" y="{top + 29}" class="small">h +=</text>')
        drawn.append(box(90, top, 390, 46, name, detail, "part"))
        if number + 1 < len(PARTS):
            drawn.append(arrow(285, top + 46, top + 66))
    y += block
    for name in ("norm", "logits"):
        drawn += [arrow(middle, y, y + 20), box(20, y + 20, 480, 30, name)]
        y += 50
    return svg(520, y + 10, "Architecture of the model", *drawn)


def curve(points: list[tuple[float, float]], of_x: tuple[float, float], of_y: tuple[float, float], kind: str) -> str:
    """Draw a line through points of a plot, which reaches from 60 to 620 across and from 30 to 250 down."""
    xs = (60 + 560 * (x - of_x[0]) / (of_x[1] - of_x[0]) for x, _ in points)
    ys = (250 - 220 * (y - of_y[0]) / (of_y[1] - of_y[0]) for _, y in points)
    place = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys, strict=True))
    return f'<polyline points="{place}" class="{kind}"/>'


def run_picture(run: Path) -> str:
    """Draw the training loss and the share of right held-out tokens over a run's steps."""
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    loss = [(event.step, event.value) for event in events.Scalars(tags.CROSS_ENTROPY)]
    right = [(event.step, event.value) for event in events.Scalars(tags.TOKEN_ACCURACY)]
    steps, highest = (0, loss[-1][0]), max(value for _, value in loss)
    grid = []
    for part in range(5):
        y = 250 - 55 * part
        grid.append(f'<path d="M60 {y} H620" class="grid"/>')
        grid.append(
            f'<text x="52" y="{y + 4}" text-anchor="end" class="small first-text">{highest * part / 4:.1f}</text>'
        )
        grid.append(f'<text x="628" y="{y + 4}" class="small second-text">{part * 25} %</text>')
        grid.append(
            f'<text x="{60 + 140 * part}" y="270" text-anchor="middle" class="small">{steps[1] * part // 4}</text>'
        )
    return svg(
        680,
        290,
        "A run of the sample: training loss and held-out accuracy",
        *grid,
        curve(loss, steps, (0, highest), "first"),
        curve(right, steps, (0, 1), "second"),
        '<text x="60" y="18" class="first-text">training cross entropy, nats a token</text>',
        '<text x="620" y="18" text-anchor="end" class="second-text">held-out tokens right</text>',
        '<text x="340" y="286" text-anchor="middle" class="small">step</text>',
    )


if __name__ == "__main__":
    (PROJECT / "model" / "architecture.svg").write_text(architecture(), encoding="utf-8")
    (PROJECT / "launcher" / "run.svg").write_text(run_picture(Path(sys.argv[1])), encoding="utf-8")
