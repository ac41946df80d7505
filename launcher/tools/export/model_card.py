"""The README.md of an exported model: what it is, what it was trained on and for how long, and how to load it."""

from __future__ import annotations

import json
from pathlib import Path

import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launcher.run_folder import RunFolder
from launcher.training.checkpoints.checkpoint import TrainState
from model import LiquidForCausalLM
from model.size import count_parameters

# What the sources' own pages say. Of any other source nothing is claimed.
LICENCES = {
    "sample": "Apache-2.0 (the built-in sample corpus of this project)",
    "TIGER-Lab/WebInstructSub": "Apache-2.0 (its page on the Hugging Face hub; the texts are from the web)",
}
UNKNOWN = "not known here: see its publisher"
FILES_SHOWN = 5


def model_card(run: RunFolder, checkpoint: Path, state: TrainState, model: LiquidForCausalLM, custom_code: bool) -> str:
    """The card's text; `model` may be without weights (on the meta device)."""
    description = run.read_description()
    config = description["config"]
    sizes = model.config
    count = count_parameters(model)
    sources, data_lines = describe_data(config["data"])
    is_apache = not config["init_from"] and not any(UNKNOWN in line for line in data_lines)  # no other licence is known
    front = {
        "license": "apache-2.0" if is_apache else "unknown",  # as the hub's model cards name it
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["liquid", "mixture-of-experts"],
        **({"datasets": hub} if (hub := [name for name in sources if name.count("/") == 1]) else {}),
    }
    begun = f"the weights in `{config['init_from']}`" if config["init_from"] else "fresh weights"
    facts = {
        "Parameters": f"{count.total:,}, of which {count.active:,} are active for a token",
        "Layers, width": f"{sizes.num_hidden_layers}, {sizes.hidden_size}",
        "Experts": f"{sizes.num_experts} in each layer, {sizes.num_experts_per_tok} for a token, and a shared one",
        "Vocabulary": f"{sizes.used_vocab_size:,}",
        "Positions": f"{sizes.max_position_embeddings:,}, attention over the last {sizes.sliding_window:,}",
    }
    training = {
        "Begun with": begun,
        "Checkpoint": f"`{checkpoint.name}` of the run `{run.path.name}`",
        "Steps": f"{state.step:,} of {config['max_steps']:,}",
        "Tokens": f"{state.tokens:,}",
        "Batch": f"{config['global_batch_rows']:,} packed rows",
        "Loss on": f"{config['loss_on']} tokens" if config["loss_on"] == "all" else "the answers' tokens",
        "Learning rate": f"{config['learning_rate']:g}, {config['warmup_steps']:,} steps of warm-up, then a cosine",
        "Processes": f"{description['world_size']}",
        "Commit": f"`{description['commit']}`" if description["commit"] else "not known",
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
    """The names of what the text was made of, and the card's lines on it."""
    names, rows = [], []
    for location, weight in [(data, None)] if isinstance(data, str) else [(d["path"], d["weight"]) for d in data]:
        share = "" if weight is None else f" (weight {weight:g})"
        index = Path(location) / "index.json"
        if not index.is_file():
            rows.append(f"| `{location}`{share} | its index could not be read from here | | {UNKNOWN} |")
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
    return names, ["| made of | documents | tokens | licence |", "|---|---|---|---|", *rows]


def _origins(sources: list[dict]) -> dict[str, str | None]:
    """What a folder was made of: datasets with their revision, where it is known, and files of which no dataset is."""
    return {source.get("dataset", source["name"]): source.get("revision") for source in sources}


def _listed(made: dict[str, str | None]) -> str:
    shown = [f"`{name}`" + (f" at `{revision[:12]}`" if revision else "") for name, revision in made.items()]
    return ", ".join(shown[:FILES_SHOWN]) + (f" and {len(shown) - FILES_SHOWN} more" * (len(shown) > FILES_SHOWN))


def _validation(run: RunFolder, state: TrainState) -> list[str]:
    """The figures of the last validation up to the checkpoint's step."""
    if not run.tensorboard.is_dir():
        return ["The run's logs are not there."]
    events = EventAccumulator(str(run.tensorboard), size_guidance={"scalars": 0, "tensors": 1, "images": 1})
    events.Reload()
    found = {}
    for tag in events.Tags()["scalars"]:
        if tag.startswith("validation/"):
            earlier = [event for event in events.Scalars(tag) if event.step <= state.step]
            if earlier:
                found[_label(tag.removeprefix("validation/"))] = earlier[-1]
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


def _label(figure: str) -> str:
    """What a figure of a validation is, in words."""
    if figure.startswith("by_source/"):
        return f"cross entropy of the questions from `{figure.removeprefix('by_source/')}`"
    units = {"cross_entropy": ", nats a token", "perplexity": " of a token"}
    return figure.replace("_", " ") + units.get(figure, "")


def _use(custom_code: bool) -> list[str]:
    trust = ", trust_remote_code=True" if custom_code else ""
    needs = (
        "The folder brings the model's code: transformers 5.23 or later and torch are all that is needed. Read the `.py` "
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
        "It answers in the manner of the text that it was trained on, which it may have learned wrongly: check what it says.",
    ]  # fmt: skip
