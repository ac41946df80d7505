"""Declare the keys of a run with meaning, default and bounds; `launcher/configs/README.md` is generated from them."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field

from launcher.errors import ConfigurationError
from launcher.exit_codes import HUNG
from launcher.run_keys import check_values, key

LONGEST_TIMEOUT = 30 * 24 * 3600  # seconds; much larger values overflow in the libraries that use it


@dataclass
class Prepare:
    """The arguments of `lfm prepare` for the shard folder `data`."""

    source: str = key("sample", "what `lfm prepare` reads: `sample`, a dataset on the Hugging Face hub, or files")
    tokenizer: str = key("train", "`train`, a tokenizer folder, or a name on the hub")
    seq_len: int = key(256, "tokens in a row", at_least=1)
    validation_share: float = key(0.0, "share of the questions to hold out for validation", at_least=0, below=1)


@dataclass
class WeightedData:
    """One folder of a mixture."""

    path: str = key(MISSING, "a shard folder, or the URL of one", not_empty=True)
    weight: float = key(MISSING, "its share of the rows is its weight over the sum of all weights", above=0)


@dataclass
class DataCache:
    """The local cache of shards behind a URL."""

    folder: str | None = key(None, "a folder on the machine's own disk; by default among its temporary files")
    gigabytes: float = key(50.0, "size of the cache", above=0)


@dataclass
class Loss:
    """Weights of the loss terms beside the cross entropy, and the focal term's exponent (`model/loss.py`).

    The defaults are the model's own. They are repeated here because importing the model imports torch, and a command
    that only reads a configuration should not wait for that.
    """

    focal: float = key(0.1, "weight of the focal loss", at_least=0)
    focal_gamma: float = key(2.0, "exponent of the focal loss", at_least=0)
    reconstruction: float = key(0.1, "weight of the embedding's reconstruction error", at_least=0)
    budget: float = key(0.1, "weight of the embedding's distance from its target ratio", at_least=0)
    expert_usage: float = key(0.01, "weight of the experts' unequal use", at_least=0)
    z_loss: float = key(0.001, "weight of the router's z-loss", at_least=0)


@dataclass
class Schedule:
    """Cosine annealing with warm restarts after the warm-up (Loshchilov & Hutter 2017)."""

    cycles: int = key(1, "number of cosine cycles", at_least=1)
    multiplier: float = key(1.0, "how much longer each cycle is than the one before", at_least=1)
    minimum_ratio: float = key(0.1, "lowest learning rate of a cycle, as a share of the highest", at_least=0, at_most=1)
    steps: int | None = key(None, "length of the schedule in steps; by default `max_steps`", at_least=1)


@dataclass
class Precision:
    """Half precision on a CPU."""

    force: bool = key(False, "keep the JSON's fp16 or bf16 on a CPU that computes it slowly")


@dataclass
class Spike:
    """The definition of a loss spike."""

    window: int = key(50, "number of earlier losses to compare with", at_least=2)
    factor: float = key(
        10.0, "a spike is this many median absolute deviations above the median of those losses", above=0
    )


@dataclass
class Monitor:
    """The measurements inside the model."""

    every: int = key(
        100,
        "steps between measuring activations, their gradients, gradient norms and expert load; 0: never",
        at_least=0,
    )
    layers: list[str] = key(
        lambda: [r"model\.liquid_embedding", r"model\.layers\.\d+", r"model\.norm"],
        "modules whose activations are measured: regular expressions of module names",
    )
    peak_teraflops: float | None = key(None, "peak teraflops of one device, for MFU; known for common GPUs", above=0)


@dataclass
class Profile:
    """The steps that are profiled."""

    steps: list[int] | None = key(
        None, "`[first, last]`: a torch profiler's trace of rank 0, in `profile/` of the run folder"
    )


@dataclass
class RunConfig:
    """Everything that a run depends on beside the DeepSpeed JSON."""

    data: str | list[WeightedData] = key(
        "data/sample", "a shard folder, the URL of one, or a list of `{path, weight}` to mix", not_empty=True
    )
    prepare: Prepare | None = key(
        None,
        "how to create `data` if it is missing. A file's `prepare` belongs to the file's `data`: if only `data` is "
        "overridden, nothing is prepared",
    )
    on_bad_shard: str = key(
        "refuse",
        "what to do with a shard that does not match its index: stop before the step that needs it, or skip its rows",
        one_of=("refuse", "skip"),
    )
    data_cache: DataCache = key(DataCache, "where shards behind a URL are kept")
    validation_data: str | None = key(None, "a shard folder of held-out rows; by default `validation` in `data`")
    validate_every: int | None = key(
        None, "steps between two validations; by default `checkpoint_every`; 0: never", at_least=0
    )
    validation_samples: int = key(
        3, "held-out questions that each validation answers, for TensorBoard; 0: none", at_least=0
    )
    output: str = key("runs/sample", "the run folder", not_empty=True)
    model: str = key("tiny", "a preset (`model/README.md`) or a YAML file of model fields", not_empty=True)
    init_from: str | None = key(
        None, "an exported folder to start from, instead of fresh weights; its sizes replace `model`"
    )
    resume: str = key(
        "auto",
        "the checkpoint to resume from: `auto` (the newest whole one), `best` (lowest validation loss), `never`, "
        "or a tag or path. Data, model, `seed`, `global_batch_rows`, ZeRO stage, precision and optimizer must stay the same",
    )
    seed: int = key(1234, "seed of the weights and of the order of the rows", at_least=0, below=2**63)
    max_steps: int = key(1000, "length of the run in steps", at_least=1)
    checkpoint_every: int = key(500, "steps between two checkpoints", at_least=1)
    keep_checkpoints: int = key(2, "checkpoints to keep beside the best", at_least=1)
    global_batch_rows: int = key(16, "packed rows in a step, over all ranks", at_least=1)
    micro_batch_rows: int = key(16, "most rows that one rank processes at once", at_least=1)
    loss_on: str = key("all", "which tokens the loss counts", one_of=("all", "answer"))
    loss: Loss = key(Loss, "weights of the loss terms beside the cross entropy")
    learning_rate: float = key(1e-3, "the highest learning rate", above=0)
    warmup_steps: int = key(100, "steps of linear warm-up", at_least=0)
    schedule: Schedule = key(Schedule, "cosine with warm restarts after the warm-up")
    weight_decay: float = key(0.1, "AdamW's decoupled weight decay", at_least=0)
    gradient_clipping: float = key(1.0, "highest norm of all gradients together", above=0)
    expert_parallel_size: int = key(
        1,
        "ranks that a layer's experts are spread over; the largest that fits is taken",
        at_least=1,
    )
    balancing_rate: float = key(
        1e-3, "how far a step moves the router's bias towards experts with less than their share; 0: off", at_least=0
    )
    activation_checkpointing: bool = key(True, "recompute activations in the backward pass")
    attention: str = key(
        "auto",
        "how attention is computed; `auto` is the model's default; all give the same results (`model/README.md`)",
        one_of=("auto", "block_local", "sdpa", "eager", "flex_attention"),
    )
    precision: Precision = key(Precision, "half precision on a CPU")
    max_skipped_in_a_row: int = key(
        10,
        "steps without a finite loss or gradient, or without a counted token, are skipped; more in a row end the run",
        at_least=0,
    )
    on_spike: str = key(
        "mark",
        "what to do about a loss spike: mark it, or roll back to the last checkpoint and skip those rows",
        one_of=("mark", "rollback"),
    )
    spike: Spike = key(Spike, "when a loss counts as a spike")
    step_timeout_seconds: float = key(
        1800.0,
        f"a step, save or validation forward that takes longer ends the run with code {HUNG} and writes all stacks to "
        "`stacks/`; the first step may take three times as long",
        above=0,
        at_most=LONGEST_TIMEOUT,
    )
    monitor: Monitor = key(Monitor, "what is measured inside the model")
    profile: Profile = key(Profile, "which steps are profiled")
    # The keys that a file or an override set. Only these can contradict the JSON; defaults cannot.
    explicit: frozenset[str] = field(default=frozenset(), init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_values(self)
        profiled = self.profile.steps
        if profiled is not None and not (len(profiled) == 2 and 1 <= profiled[0] <= profiled[1]):
            raise ConfigurationError(
                f"profile.steps is {profiled}; it must be the first and the last step, as in profile.steps=[10, 12]"
            )
        if profiled is not None and profiled[1] > self.max_steps:
            raise ConfigurationError(
                f"profile.steps is {profiled}, but the run ends at max_steps {self.max_steps}; profile earlier steps"
            )
