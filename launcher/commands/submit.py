"""`lfm submit`: submit jobs to a SLURM cluster without remembering sbatch's options."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.commands.parsing import Subcommands

if TYPE_CHECKING:
    from launcher.cluster.sbatch import Submission

EPILOG = """\
examples:
  lfm submit --site partition=gpu account=project modules=cuda/12.4    once, for all later jobs
  lfm submit train                                                     the smoke run
  lfm submit --nodes 4 --gpus 8 --time 12:00:00 train --config run.yaml max_steps=1000
  lfm submit --nodes 4 --gpus 8 --chain prepare data/hub/dataset --tokenizer data/hub/tokenizer --out data/mine \\
      then train --config run.yaml data=data/mine output=runs/mine then evaluate runs/mine
  lfm submit --sweep learning_rate=1e-4,3e-4 --sweep seed=1,2 train --config run.yaml output=runs/sweep
  lfm submit --table runs/sweep                                        the state of its runs

Options go before the script's name; what follows the name are the script's own arguments (slurm/README.md).
"""

INSTEAD = {
    "--mem-per-gpu": "--mem, the memory of each node",
    "--mem-per-cpu": "--mem, the memory of each node",
    "--cpus-per-gpu": "--sbatch=--cpus-per-task, with one task for each GPU",
    "--ntasks-per-gpu": "--gpus, the number on each node, with one task for each",
    "--gpus": "--gpus directly, the number on each node",
}


def add_submit(commands: Subcommands) -> None:
    """Add `lfm submit` to the commands."""
    about = "Submit batch scripts to SLURM: one, a chain, or a sweep."
    parser = commands.add_parser(
        "submit", help=about, description=about, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(run=_submit)
    add = parser.add_argument
    add("--dry-run", action="store_true", help="show the script and the sbatch command without submitting")
    add(
        "--chain",
        action="store_true",
        help="submit several scripts, separated by `then`; each waits until the one before has succeeded",
    )
    add("--sweep", action="append", default=[], metavar="KEY=V,V",
        help="train once for each value, each in its own run folder below `output`; repeat for combinations")  # fmt: skip
    add("--table", metavar="OUTPUT", help="show the state of a sweep's runs, and write it to table.md in OUTPUT")
    add(
        "--site",
        nargs="+",
        metavar="NAME=VALUE",
        help="save settings for all later jobs: partition, account, qos, reservation, modules, interface, venv, conda, "
        "image, mpi; an empty VALUE removes one",
    )
    resources = parser.add_argument_group("resources (in a chain, for the training job)")
    resources.add_argument("--nodes", type=int, help="number of nodes (default: the script's)")
    resources.add_argument(
        "--gpus", type=int, help="GPUs on each node, with one task for each; 0 for one task on the CPU"
    )
    resources.add_argument(
        "--mem",
        help="memory of each node, such as 200G (default: the script's; with two or more GPUs, all memory of the node)",
    )
    resources.add_argument("--time", help="time limit, such as 12:00:00 (default: the script's)")
    add("--sbatch", action="append", default=[], metavar="OPTION",
        help="any other sbatch option, such as --sbatch=--exclude=node7; may be repeated")  # fmt: skip
    add("words", nargs=argparse.REMAINDER, metavar="train|prepare|evaluate ...", help="the script and its arguments")


def _submit(options: argparse.Namespace) -> None:
    from launcher.cluster.sbatch import check_sbatch, of_script, stages
    from launcher.cluster.site import read_site, write_site

    if options.site:
        print(f"saved in {write_site(options.site)}")
        return
    if options.table:
        _show_table(Path(options.table))
        return
    if not options.dry_run:
        check_sbatch()
    site, found = read_site(), _checked(stages(options.words), options)
    if options.sweep:
        _submit_sweep(options, site, found[0][1])
        return
    previous = ""
    for script, arguments in found:
        job = of_script(script, arguments, site, _resources(options, script) if options.chain else _resources(options))
        if previous:
            # If the job before fails, SLURM would otherwise keep this one waiting forever.
            job.options += [f"--dependency=afterok:{previous}", "--kill-on-invalid-dep=yes"]
        previous = _send(job, options.dry_run, script)


def _checked(found: list[tuple[str, list[str]]], options: argparse.Namespace) -> list[tuple[str, list[str]]]:
    from launcher.errors import ConfigurationError

    for name, value, least in (("--nodes", options.nodes, 1), ("--gpus", options.gpus, 0)):
        if value is not None and value < least:
            raise ConfigurationError(f"{name} is {value}; it must be at least {least}")
    for word in options.sbatch:
        name = word.partition("=")[0]
        if name in INSTEAD:  # sbatch refuses the option beside the equivalent one of the scripts' #SBATCH lines
            raise ConfigurationError(f"--sbatch={name} conflicts with the batch scripts; give {INSTEAD[name]}")
    if len(found) > 1 and not options.chain:
        raise ConfigurationError("`then` needs --chain; put --chain before the first script")
    if options.sweep and [script for script, _ in found] != ["train"]:
        raise ConfigurationError("--sweep works only with train; lfm submit --help has an example")
    return found


def _submit_sweep(options: argparse.Namespace, site: dict[str, str], arguments: list[str]) -> None:
    from launcher.cluster.batch_job import run_folder
    from launcher.cluster.sweep import sweep, table_job, write_runs
    from launcher.errors import ConfigurationError

    output = Path(run_folder(arguments))
    runs, job = sweep(options.sweep, arguments, output, site, _resources(options))
    if options.dry_run:
        for number, overrides in enumerate(runs):
            print(f"task {number}: {' '.join(overrides)}")
    else:
        write_runs(runs, Path(job.variables["LFM_SWEEP"]))
    array = _send(job, options.dry_run, "train")
    try:
        _send(table_job(output, site, array, options.sbatch), options.dry_run)
    except ConfigurationError as error:
        raise ConfigurationError(
            f"job {array} trains the runs, but the job that writes their table was not submitted ({error}); write it later "
            f"with lfm submit --table {output}"
        ) from error
    print(f"{len(runs)} runs in {output}; when all have ended, {output / 'table.md'} compares them")


def _show_table(output: Path) -> None:
    from launcher.cluster.sweep import table

    text = table(output)
    (output / "table.md").write_text(text)
    print(text, end="")


def _resources(options: argparse.Namespace, script: str = "train") -> list[str]:
    named = []
    if script == "train":
        named += [f"--nodes={options.nodes}"] if options.nodes is not None else []
        # Set together: there is one task for each GPU.
        if options.gpus is not None:
            named += [f"--gpus-per-node={options.gpus}", f"--ntasks-per-node={max(1, options.gpus)}"]
        said = any(word.startswith("--mem=") for word in options.sbatch)
        memory = options.mem or ("0" if (options.gpus or 0) > 1 and not said else None)
        named += [f"--mem={memory}"] if memory else []
        named += [f"--time={options.time}"] if options.time else []
    return named + options.sbatch


def _send(job: Submission, dry_run: bool, script: str = "") -> str:
    """Submit the job and return its number; in a dry run, print it and return a placeholder."""
    if not dry_run:
        number = job.send()
        print(f"job {number}: {job.shown()}")
        return number
    if script:
        print(f"# slurm/{script}.sbatch\n{Path('slurm', f'{script}.sbatch').read_text()}")
    print(f"# sbatch command:\n{job.shown()}\n")
    return f"<{script}>"
