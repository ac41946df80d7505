"""What TensorBoard and the console show of a run."""

import ast
import base64
import json
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from urllib.error import URLError
from xml.etree import ElementTree

import pytest
import torch
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from torch.utils.flop_counter import FlopCounterMode

from launcher.cli import main as lfm
from launcher.config import RunConfig
from launcher.config_file import load_run_config
from launcher.environment import free_port
from launcher.errors import ConfigurationError
from launcher.training.monitoring import tags
from launcher.training.monitoring.expert_load import CELL, load_image
from launcher.training.monitoring.monitor import Monitor
from launcher.training.monitoring.step_timer import StepTimer
from launcher.training.monitoring.throughput import TokenFlops, known_teraflops, peak_flops, token_flops, utilisation
from model import LiquidConfig, LiquidForCausalLM

STEPS = 6


@pytest.fixture(scope="module")
def watched(trainer, tmp_path_factory):
    """A run on two ranks with everything monitored."""
    data = tmp_path_factory.mktemp("data") / "with_validation"
    overrides = [
        f"data={data}", "prepare.seq_len=64", "prepare.validation_share=0.02",
        f"max_steps={STEPS}", "monitor.every=2", "monitor.peak_teraflops=0.5", "profile.steps=[3, 4]",
        "validate_every=3", "validation_samples=2", "expert_parallel_size=2", "checkpoint_every=3",
    ]  # fmt: skip
    trainer.outputs = trainer.run(2, trainer.arguments("watched", *overrides))
    return trainer


@pytest.fixture(scope="module")
def tensorboard(watched):
    """Query a real TensorBoard server over HTTP."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "tensorboard.main", "--logdir", str(watched.folder / "watched"), "--port", str(port),
         "--load_fast", "false"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip

    def ask(path: str, body: dict | None = None):
        data = json.dumps(body).encode() if body else None
        request = urllib.request.Request(f"http://127.0.0.1:{port}/data/{path}", data)
        if data:
            request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=30) as reply:
            return json.loads(reply.read())

    deadline = time.monotonic() + 120
    while True:
        try:
            if ask("plugin/scalars/tags"):
                break
        except (URLError, ConnectionError):
            pass
        assert process.poll() is None and time.monotonic() < deadline, "TensorBoard did not start"
        time.sleep(0.3)
    yield ask
    process.kill()
    process.wait()


def test_tensorboard_shows_every_kind_of_figure(tensorboard):
    ((_, scalars),) = tensorboard("plugin/scalars/tags").items()
    for tag in (
        "train/loss", "train/perplexity", "train/learning_rate", "train/grad_norm", "grad_norm/embedding",
        "grad_norm/experts", "grad_norm/router", "grad_norm/norms", "perf/tokens_per_second", "perf/mfu", "perf/hfu",
        "perf/memory_gigabytes", "perf/data_seconds", "perf/forward_seconds", "perf/backward_seconds",
        "perf/optimizer_seconds", "perf/save_seconds", "perf/validation_seconds", "moe/layer_01/router_entropy",
        "moe/layer_01/load_max_over_mean", "model/retained_ratio", "activations/model.layers.1/rms",
        "gradients/model.norm/max_abs", "validation/cross_entropy", "validation/perplexity",
        "validation/token_accuracy", "validation/top5_accuracy", "validation/sequence_accuracy",
    ):  # fmt: skip
        assert tag in scalars, tag
    assert any(tag.startswith("validation/by_source/") for tag in scalars)
    ((_, images),) = tensorboard("plugin/images/tags").items()
    assert "moe/load" in images
    texts = tensorboard("plugin/text/tags")
    shown = {tag for tags in texts.values() for tag in tags}
    assert {"run/run.yaml", "validation/answers", "validation/by_source"} <= {
        tag.removesuffix("/text_summary") for tag in shown
    }
    (run,) = texts
    (page,) = (tag for tag in shown if tag.startswith("run/run.yaml"))
    text = tensorboard(f"plugin/text/text?run={run}&tag={page}")[0]["text"]
    assert "global_batch_rows: 4" in text and "world_size: 2" in text


def test_every_figure_has_a_declared_tag_and_every_tag_a_figure(tensorboard):
    shown = set()
    for kind in ("scalars", "images", "text"):
        (found,) = tensorboard(f"plugin/{kind}/tags").values()
        shown |= {tag.removesuffix("/text_summary") for tag in found}
    declared = {tag: tags.pattern(tag) for tag in tags.MEANINGS}
    assert not [tag for tag in shown if not any(pattern.fullmatch(tag) for pattern in declared.values())]
    without = [tag for tag, pattern in declared.items() if not any(map(pattern.fullmatch, shown))]
    assert without == [tags.LOSS_SCALE]  # this run is not in fp16


def test_the_page_of_figures_is_made_from_their_declarations():
    page = Path(tags.__file__).with_name("README.md").read_text(encoding="utf-8")
    assert page.endswith(f"\n\n{tags.table()}"), "put the output of `python -m launcher.training.monitoring.tags` there"


def test_tags_are_written_in_one_file_only():
    declared = [tags.pattern(tag) for tag in tags.MEANINGS]
    launcher = Path(tags.__file__).parents[2]
    for path in [launcher.parent / "train.py", *launcher.rglob("*.py")]:
        if path != Path(tags.__file__):
            constants = [node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
            texts = [text for text in constants if isinstance(text, str)]
            assert not [text for text in texts if any(pattern.fullmatch(text) for pattern in declared)], path


def test_the_tab_of_hyperparameters_shows_settings_and_results(watched, tensorboard):
    """Keys of sections have their full names. A second folder of events would be shown as another run."""
    groups = tensorboard("plugin/hparams/session_groups", {"startIndex": 0, "sliceSize": 10, "allowedStatuses": [
        "STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_RUNNING", "STATUS_FAILURE"], "colParams": [
        {"metric": {"group": "", "tag": "validation/cross_entropy"}}]})["sessionGroups"]  # fmt: skip
    (group,) = groups
    assert group["hparams"]["global_batch_rows"] == 4 and group["hparams"]["loss.focal"] == pytest.approx(0.1)
    assert group["hparams"]["data"].endswith("with_validation")
    (metric,) = (value for value in group["metricValues"] if value["name"]["tag"] == "validation/cross_entropy")
    assert metric["value"] == pytest.approx(watched.scalars("watched")["validation/cross_entropy"][STEPS])
    assert not [path for path in (watched.folder / "watched" / "tensorboard").iterdir() if path.is_dir()]


def test_answers_to_held_out_questions_are_text(tensorboard):
    texts = tensorboard("plugin/text/tags")
    (run,) = texts
    (tag,) = (tag for tag in texts[run] if tag.startswith("validation/answers"))
    events = tensorboard(f"plugin/text/text?run={run}&tag={tag}")
    assert [event["step"] for event in events] == [3, 6]
    assert events[0]["text"].count("<tr>") == 1 + 1 + 2  # TensorBoard's outer table, the header, two questions


def test_figures_are_written_at_the_requested_steps(watched):
    shown = watched.scalars("watched")
    for tag, steps in (
        ("grad_norm/experts", {2, 4, 6}),
        ("activations/model.norm/rms", {2, 4, 6}),
        ("validation/perplexity", {3, 6}),
        ("perf/save_seconds", {3, 6}),
        ("perf/mfu", set(range(1, STEPS + 1))),
    ):
        assert set(shown[tag]) == steps, tag
    for step in range(1, STEPS + 1):
        parts = sum(shown[f"perf/{part}_seconds"][step] for part in ("forward", "backward", "optimizer"))
        assert 0 < parts < shown["perf/step_seconds"][step]
        assert 0 < shown["perf/mfu"][step] < shown["perf/hfu"][step] < 2
        assert 0 < shown["moe/layer_00/router_entropy"][step] <= torch.tensor(4.0).log().item() + 1e-6


def test_a_profile_of_rank_0_is_written(watched):
    traces = list((watched.folder / "watched" / "profile").iterdir())
    assert [trace.name for trace in traces] == ["trace-3-4.json"]
    content = traces[0].read_bytes()  # parsing it all would take seconds
    assert b'"traceEvents"' in content and content.count(b'"aten::mm"') > 10 and content.rstrip().endswith(b"}")
    assert "trace-3-4.json" in watched.outputs[0].stdout


def test_only_rank_0_prints_lines_with_progress_loss_and_time_left(watched):
    lines = [line for line in watched.outputs[0].stdout.splitlines() if line.startswith("step ")]
    assert any(line.startswith(f"step {STEPS}/{STEPS}  loss ") and "ETA 00:00" in line for line in lines)
    assert not any(line.startswith("step ") for line in watched.outputs[1].stdout.splitlines())


def test_the_flops_of_a_token_are_those_of_a_forward_pass(trainer):
    config = LiquidConfig.from_preset(str(trainer.model)).sized_for(2000)
    config.moe_intermediate_size = 24
    model = LiquidForCausalLM(config).eval()
    model.set_experts_implementation("eager")
    ids = torch.randint(4, 1900, (1, 256))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids, use_cache=False)
    flops = token_flops(config, 256)
    forward = flops.training / 3 * 256
    # The counter includes masked keys of block-local attention and zeros of the banded convolution, but not the LSTM.
    assert 0.8 * counter.get_total_flops() < forward <= counter.get_total_flops() * 1.05


def test_utilisation_is_the_share_of_the_peak():
    flops = TokenFlops(blocks=2e9, embedding=0.5e9, head=0.5e9)
    values = utilisation(flops, True, tokens_per_second=1e4, world_size=2, peak=1e14)
    assert values == pytest.approx({"perf/mfu": 9e9 * 1e4 / 2e14, "perf/hfu": 11.5e9 * 1e4 / 2e14})
    assert utilisation(flops, False, 1e4, 2, 1e14)["perf/hfu"] == pytest.approx(9.5e9 * 1e4 / 2e14)


def test_the_peak_is_that_of_the_device_by_name(monkeypatch):
    cuda = torch.device("cuda")
    for name, peak in (("NVIDIA H100 80GB HBM3", 989.4e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA A10G", 70e12),
                       ("NVIDIA A100-SXM4-80GB", 312e12), ("something new", None)):  # fmt: skip
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(cuda, in_16_bits=True) == peak
    for name in ("NVIDIA RTX A1000", "NVIDIA RTX A4000", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA T400", "NVIDIA GB200",
                 "NVIDIA GeForce RTX 4090 Laptop GPU"):  # fmt: skip
        assert known_teraflops(name) is None, name
    assert peak_flops(cuda, in_16_bits=False) is None
    assert peak_flops(torch.device("cpu"), in_16_bits=True) is None


def test_the_picture_of_the_load_has_a_cell_for_each_expert():
    image = load_image(torch.tensor([[1.0, 1.0, 1.0, 1.0], [4.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]))
    assert image.shape == (3, 3 * CELL, 4 * CELL) and image.dtype == torch.uint8
    cells = image[:, ::CELL, ::CELL].permute(1, 2, 0).tolist()
    assert cells[0] == [[247, 247, 247]] * 4
    assert cells[1] == [[178, 24, 43], *[[8, 29, 88]] * 3]
    assert cells[2] == [[8, 29, 88]] * 4


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("validate_every=-1", "validate_every is -1; it must be at least 0"),
        ("monitor.every=-5", "monitor.every is -5"),
        ("monitor.peak_teraflops=0", "monitor.peak_teraflops is 0; it must be above 0"),
        ("profile.steps=[3, 2]", r"profile.steps is \[3, 2\]; it must be the first and the last step"),
        ("profile.steps=7", "profile.steps in .* is '7'; it must be a list"),
    ],
)
def test_wrong_settings_are_refused_in_a_sentence(trainer, override, fault):
    with pytest.raises(ConfigurationError, match=fault):
        load_run_config(trainer.config, [override])


def test_a_report_is_one_page_with_every_plot_drawn(watched, tmp_path, capsys):
    lfm(["report", str(watched.folder / "watched"), "--out", str(tmp_path / "report.html")])
    assert str(tmp_path / "report.html") in capsys.readouterr().out
    page = (tmp_path / "report.html").read_text()
    for title in ("Loss", "Validation loss by source", "Gradient norm by group", "Utilisation", "Router entropy"):
        assert f">{title}</text>" in page, title
    drawings = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(drawings) >= 12
    for drawing in drawings:
        tree = ElementTree.fromstring(drawing)
        curves = [
            group for group in tree.iter("{http://www.w3.org/2000/svg}g") if group.get("id", "").startswith("line2d")
        ]
        assert any(len(path.get("d", "").split("L")) > 1 for group in curves for path in group if "d" in path.attrib)
    ids = [name for drawing in drawings for name in re.findall(r'<clipPath id="(\w+)"', drawing)]
    assert len(ids) == len(set(ids))  # otherwise a plot is clipped by another's frame
    (image,) = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert base64.b64decode(image).startswith(b"\x89PNG")
    assert "Answers to held-out questions at step 6" in page and page.count("<tr>") == 1 + 2
    assert "global_batch_rows: 4" in page and "State: <b>done</b> at step 6" in page
    assert "<script" not in page and not re.findall(r'(?:src|href)="(?!data:|#)', page)


def test_a_folder_that_is_no_run_has_no_report(watched, tmp_path, capsys):
    with pytest.raises(SystemExit):
        lfm(["report", str(tmp_path)])
    assert "is not a run folder" in capsys.readouterr().err
    (tmp_path / "run.yaml").write_text("")
    with pytest.raises(SystemExit):
        lfm(["report", str(tmp_path)])
    assert "has not completed a step yet" in capsys.readouterr().err


def test_a_rank_that_shows_no_timings_collects_none(tmp_path):
    """They would pile up: on a GPU, two events for each part of each micro-batch of the whole run."""
    monitor = Monitor(tmp_path, 1, RunConfig(), active=False)
    monitor.timer = StepTimer(torch.device("cpu"))
    with monitor.timed("forward"):
        torch.ones(10).sum()
    assert monitor.timer.take() == {}


@pytest.mark.parametrize("back_to", [3, 5])
def test_a_rollback_to_the_first_step_of_a_start_keeps_the_texts_written_there(tmp_path, back_to):
    (tmp_path / "run.yaml").write_text("seed: 1\n")
    monitor = Monitor(tmp_path / "tensorboard", 6, RunConfig(), active=True)
    monitor.writer.add_scalar("loss", 1.0, 7)
    monitor.goes_back_to(back_to)
    monitor.writer.add_scalar("loss", 2.0, back_to + 1)
    monitor.goes_back_to(back_to + 1)
    monitor.close()
    reader = EventAccumulator(str(tmp_path / "tensorboard"))  # the class that TensorBoard's server uses
    reader.Reload()
    for tag in ("loss", "run/run.yaml/text_summary", "moe/load/legend/text_summary"):
        assert [event.step for event in reader.Tensors(tag)] == [back_to + 1]
