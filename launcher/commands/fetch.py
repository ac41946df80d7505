"""`lfm fetch`: download a dataset and a tokenizer from the hub, on a machine with internet access."""

from __future__ import annotations

import argparse

from launcher.commands.parsing import Subcommands, command
from launcher.errors import ConfigurationError


def add_fetch(commands: Subcommands) -> None:
    """Add `lfm fetch` to the commands."""
    parser = command(
        commands,
        "fetch",
        _fetch,
        "Download a dataset and a tokenizer from the Hugging Face hub, for jobs that run offline.",
        "lfm fetch --out data/hub  (then: lfm prepare data/hub/dataset --tokenizer data/hub/tokenizer --out data/webinstruct)",
    )
    parser.add_argument(
        "--dataset", default="TIGER-Lab/WebInstructSub", help="hub dataset; its parquet files are downloaded"
    )
    parser.add_argument(
        "--tokenizer", default="allenai/led-base-16384", help="hub model; its tokenizer files are downloaded"
    )
    parser.add_argument("--out", default="data/hub", help="folder for dataset/ and tokenizer/")


def _fetch(options: argparse.Namespace) -> None:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalEntryNotFoundError

    from data_pipeline.sources.origin import write_origin

    wanted = (
        (options.dataset, "dataset", "dataset", ["*.parquet", "README.md"]),
        (options.tokenizer, "model", "tokenizer", ["vocab.json", "merges.txt", "*token*.json", "config.json"]),
    )
    for name, repository, folder, patterns in wanted:
        target = f"{options.out}/{folder}"
        try:
            revision = HfApi().repo_info(name, repo_type=repository).sha
            snapshot_download(name, repo_type=repository, revision=revision, local_dir=target, allow_patterns=patterns)
            if repository == "dataset" and revision is not None:
                write_origin(target, name, revision)  # for the index of prepared shards and the model card
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, HTTPError, OSError) as error:
            raise ConfigurationError(
                f"cannot download {name} from the hub ({' '.join(str(error).split())[:160]}); run this on a machine with "
                "internet access, such as a login node"
            ) from error
        print(f"{name} is in {target}")
