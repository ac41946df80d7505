"""`lfm fetch`: data and a tokenizer from the hub, where the internet is."""

from __future__ import annotations

from launcher.commands.parsing import command
from launcher.errors import ConfigurationError


def add_fetch(commands) -> None:
    """Add `lfm fetch` to the commands."""
    parser = command(
        commands, "fetch", _fetch, "Download a dataset and a tokenizer from the hub, for jobs that run offline.",
        "lfm fetch --out data/hub  (then: lfm prepare data/hub/dataset --tokenizer data/hub/tokenizer --out data/webinstruct)",
    )  # fmt: skip
    parser.add_argument(
        "--dataset", default="TIGER-Lab/WebInstructSub", help="hub dataset; its parquet files are taken"
    )
    parser.add_argument(
        "--tokenizer", default="allenai/led-base-16384", help="hub model; its tokenizer files are taken"
    )
    parser.add_argument("--out", default="data/hub", help="folder that gets dataset/ and tokenizer/")


def _fetch(options) -> None:
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
            if repository == "dataset":
                write_origin(target, name, revision)  # so that prepared shards and a model's card can say so
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, HTTPError, OSError) as error:
            raise ConfigurationError(
                f"cannot download {name} from the hub ({' '.join(str(error).split())[:160]}); run this where the internet "
                "is reached, a login node for example"
            ) from error
        print(f"{name} is in {target}")
