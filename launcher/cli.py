"""The `lfm` command: everything but training itself, which is `deepspeed train.py`.

Imports stand inside the commands: `lfm --help` must not wait for torch.
"""

from __future__ import annotations

import argparse
import os
import sys

from launcher.errors import ConfigurationError, one_sentence_errors
from launcher.folder_commands import add_inspect, add_verify
from launcher.prepare_command import add_prepare
from launcher.report import add_report


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.run is not _fetch:
        # transformers draws a bar for every file that it reads or writes, here over in an instant.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with one_sentence_errors():
        return options.run(options) or 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lfm",
        description="Prepare data for, and use, a Liquid Foundation Model.",
        epilog="Training: deepspeed train.py --deepspeed_config ds_configs/zero3.json [--config run.yaml] [key=value ...]",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (
        _add_fetch,
        add_prepare,
        add_verify,
        add_inspect,
        _add_export,
        _add_generate,
        _add_evaluate,
        add_report,
    ):
        add(commands)
    return parser


def _command(commands, name: str, run, help: str, epilog: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name, help=help, description=help, epilog=f"example: {epilog}",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    parser.set_defaults(run=run)
    return parser


def _add_fetch(commands) -> None:
    parser = _command(
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
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = (
        (options.dataset, "dataset", "dataset", ["*.parquet", "README.md"]),
        (options.tokenizer, "model", "tokenizer", ["vocab.json", "merges.txt", "*token*.json", "config.json"]),
    )
    for name, repository, folder, patterns in wanted:
        target = f"{options.out}/{folder}"
        try:
            snapshot_download(name, repo_type=repository, local_dir=target, allow_patterns=patterns)
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise ConfigurationError(
                f"cannot download {name} from the hub ({' '.join(str(error).split())[:160]}); run this where the internet "
                "is reached, a login node for example"
            ) from error
        print(f"{name} is in {target}")


def _add_export(commands) -> None:
    parser = _command(
        commands, "export", _export, "Write a run's checkpoint as a Hugging Face folder.",
        "lfm export runs/sample --out runs/sample/export",
    )  # fmt: skip
    parser.add_argument("run_folder", metavar="RUN", help="a run folder")
    parser.add_argument(
        "--out", required=True, default=argparse.SUPPRESS, help="folder to write; an earlier export there is replaced"
    )
    parser.add_argument("--tag", default="auto", help="which checkpoint; auto is the newest whole one")


def _export(options) -> None:
    from launcher.export import export

    print(f"the model is in {export(options.run_folder, options.out, options.tag)}")


def _add_generate(commands) -> None:
    parser = _command(
        commands, "generate", _generate, "Answer questions.",
        'lfm generate runs/sample/export "What is 7 plus 5?"',
    )  # fmt: skip
    parser.add_argument("model", help="an exported folder, or a run folder")
    parser.add_argument("question", nargs="+", help="one or more questions, each in quotes")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="longest answer")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--seed", type=int, default=0, help="for sampling")


def _generate(options) -> None:
    import torch

    from launcher.generation import answer, load_model

    model, tokenizer = load_model(options.model)
    torch.manual_seed(options.seed)
    for text in answer(model, tokenizer, options.question, options.max_new_tokens, options.temperature):
        print(text)


def _add_evaluate(commands) -> None:
    parser = _command(
        commands, "evaluate", _evaluate, "Answer held-out questions and count the exactly right ones.",
        "lfm evaluate runs/sample/export --questions sample --show 3",
    )  # fmt: skip
    parser.add_argument("model", help="an exported folder, or a run folder")
    parser.add_argument("--questions", default="sample", help="'sample', or a JSON-lines file with question and answer")
    parser.add_argument("--show", type=int, default=3, help="how many questions to show with their answers")
    parser.add_argument("--max-new-tokens", type=int, default=32, help="longest answer")


def _evaluate(options) -> None:
    from tqdm import tqdm

    from launcher.evaluation import evaluate, read_questions
    from launcher.generation import load_model

    rows = read_questions(options.questions)
    model, tokenizer = load_model(options.model)
    with tqdm(total=len(rows), unit="question", disable=not sys.stderr.isatty()) as bar:
        results = evaluate(model, tokenizer, rows, options.max_new_tokens, bar.update)
    # Spread over the file, since neighbours are of one kind.
    for result in results[:: max(1, len(results) // max(1, options.show))][: options.show]:
        mark = "right" if result.is_right else f"wrong, expected: {result.expected}"
        print(f"  Q: {result.question}\n  A: {result.given}   ({mark})")
    right = sum(result.is_right for result in results)
    print(f"{right} of {len(results)} held-out answers are exactly right ({right / max(1, len(results)):.0%})")


if __name__ == "__main__":
    sys.exit(main())
