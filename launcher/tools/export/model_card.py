"""Write the README.md of an exported model: its architecture, data, training and validation, and how to load it."""

from __future__ import annotations

import json
from pathlib import Path

import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launcher.run_folder import RunFolder
from launcher.training.checkpoints.checkpoint import TrainState
from launcher.training.monitoring import tags
from model import LiquidForCausalLM
from model.size import count_parameters

# The licences that the sources state themselves. Nothing is claimed about any other source.
LICENCES = {
    "sample": "Apache-2.0 (the built-in sample corpus of this project)",
    "TIGER-Lab/WebInstructSub": "Apache-2.0 (its page on the Hugging Face hub; the texts are from the web)",
}
UNKNOWN = "unknown: see its publisher"
FILES_SHOWN = 5


def model_card(run: RunFolder, checkpoint: Path, state: TrainState, model: LiquidForCausalLM, custom_code: bool) -> str:
    """Return the card's text; `model` may be on the meta device."""
    description = run.read_description()
    config = description["config"]
    sizes = model.config
    count = count_parameters(model)
    sources, data_lines = describe_data(config["data"])
    # All known licences are Apache-2.0.
    is_apache = not config["init_from"] and not any(UNKNOWN in line for line in data_lines)
    front = {
        "license": "apache-2.0" if is_apache else "unknown",  # the hub's identifiers
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["liquid", "mixture-of-experts"],
        **({"datasets": hub} if (hub := [name for name in sources if name.count("/") == 1]) else {}),
    }
    begun = f"the weights in `{config['init_from']}`" if config["init_from"] else "fresh weights"
    facts = {
        "Parameters": f"{count.total:,}, of which {count.active:,} are active per token",
        "Layers, width": f"{sizes.num_hidden_layers}, {sizes.hidden_size}",
        "Experts": f"{sizes.num_experts} in each layer, {sizes.num_experts_per_tok} per token, and a shared one",
        "Vocabulary": f"{sizes.used_vocab_size:,}",
        "Positions": f"{sizes.max_position_embeddings:,}, attention over the last {sizes.sliding_window:,}",
    }
    training = {
        "Started from": begun,
        "Checkpoint": f"`{checkpoint.name}` of the run `{run.path.name}`",
        "Steps": f"{state.step:,} of {config['max_steps']:,}",
        "Tokens": f"{state.tokens:,}",
        "Batch": f"{config['global_batch_rows']:,} packed rows",
        "Loss on": f"{config['loss_on']} tokens" if config["loss_on"] == "all" else "the answers' tokens",
        "Learning rate": f"{config['learning_rate']:g}, {config['warmup_steps']:,} steps of warm-up, then a cosine",
        "Processes": f"{description['world_size']}",
        "Commit": f"`{description['commit']}`" if description["commit"] else "unknown",
        "Versions": ", ".join(f"{name} {version}" for name, version in description["versions"].items()),
    }
    return "\n".join([
        "---", yaml.safe_dump(front, sort_keys=False).rstrip(), "---", "",
        f"# {run.path.name}", "",
        "A Liquid Foundation Model: blocks of local attention, deformable convolution, LSTM memory and a mixture of "
        "experts; its decoding state does not grow with the text.", "",
        *_table(facts), "", "## Data", "", *data_lines, "", "## Training", "", *_table(training), "",
        "## Last validation", "", *_validation(run, state), "", "## Use", "", *_use(custom_code), "",
    ])  # fmt: skip


def _table(rows: dict[str, str]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]


def describe_data(data: str | list[dict]) -> tuple[list[str], list[str]]:
    """Return the names of the data's sources, and the card's lines about them."""
    names: list[str] = []
    rows = []
    for location, weight in [(data, None)] if isinstance(data, str) else [(d["path"], d["weight"]) for d in data]:
        share = "" if weight is None else f" (weight {weight:g})"
        index = Path(location) / "index.json"
        if not index.is_file():
            rows.append(f"| `{location}`{share} | its index was not found | | {UNKNOWN} |")
            continue
        content = json.loads(index.read_bytes())
        counts = content["counts"]
        made = _origins(content["config"]["source"])
        names += made
        licences = sorted({LICENCES.get(name, UNKNOWN) for name in made})
        rows.append(
            f"| {_listed(made)}{share} | {counts['documents']:,} questions with answers ({', '.join(content['sources'])}) | "
            f"{counts['tokens']:,} | {'; '.join(licences)} |"
        )
    return names, ["| source | documents | tokens | licence |", "|---|---|---|---|", *rows]


def _origins(sources: list[dict]) -> dict[str, str | None]:
    """Return the datasets of a folder, each with its revision if known; a source without a dataset has its file's name."""
    return {source.get("dataset", source["name"]): source.get("revision") for source in sources}


def _listed(made: dict[str, str | None]) -> str:
    shown = [f"`{name}`" + (f" at `{revision[:12]}`" if revision else "") for name, revision in made.items()]
    return ", ".join(shown[:FILES_SHOWN]) + (f" and {len(shown) - FILES_SHOWN} more" * (len(shown) > FILES_SHOWN))


def _validation(run: RunFolder, state: TrainState) -> list[str]:
    """Return the metrics of the last validation up to the checkpoint's step."""
    if not run.tensorboard.is_dir():
        return ["The run has no TensorBoard logs."]
    events = EventAccumulator(str(run.tensorboard), size_guidance={"scalars": 0, "tensors": 1, "images": 1})
    events.Reload()
    found = {}
    for tag in events.Tags()["scalars"]:
        if tag.startswith(tags.VALIDATION):
            earlier = [event for event in events.Scalars(tag) if event.step <= state.step]
            if earlier:
                found[_label(tag)] = earlier[-1]
    if not found:
        return ["This run was not validated up to this checkpoint."]
    step = max(event.step for event in found.values())
    values = {name: f"{event.value:.4f}" for name, event in found.items() if event.step == step}
    best = (
        f" The lowest cross entropy was {state.best_metric:.4f}, at step {state.best_step:,}."
        if state.best_step
        else ""
    )
    other = "" if step == state.step else f" The exported step {state.step:,} itself was not validated."
    return [f"On held-out questions, at step {step:,}.{other}{best}", "", *_table(values)]


def _label(tag: str) -> str:
    """Describe a validation metric in words."""
    if of_source := tags.pattern(tags.SOURCE_CROSS_ENTROPY).fullmatch(tag):
        return f"cross entropy of the questions from `{of_source['source']}`"
    units = {tags.HELD_OUT_CROSS_ENTROPY: ", nats per token", tags.HELD_OUT_PERPLEXITY: " per token"}
    return tag.removeprefix(tags.VALIDATION).replace("_", " ") + units.get(tag, "")


def _use(custom_code: bool) -> list[str]:
    trust = ", trust_remote_code=True" if custom_code else ""
    needs = (
        "The folder contains the model's code, so only transformers 5.23 or later and torch are needed. Read the `.py` "
        "files before you trust them."
        if custom_code
        else "With this project installed (`import model` registers the architecture with transformers):"
    )
    return [
        needs, "", "```python",
        *([] if custom_code else ["import model"]),
        "from transformers import AutoModelForCausalLM, AutoTokenizer", "",
        f'tokenizer = AutoTokenizer.from_pretrained("FOLDER"{trust})',
        f'model = AutoModelForCausalLM.from_pretrained("FOLDER"{trust})',
        'chat = [{"role": "user", "content": "What is the capital of Peru?"}]',
        'prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)',
        "output = model.generate(**prompt, max_new_tokens=64)",
        'print(tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))', "```", "",
        "The model imitates the text that it was trained on, and its answers may be wrong: check them.",
    ]  # fmt: skip
