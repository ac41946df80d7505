"""`lfm submit`: jobs on a SLURM cluster, without remembering sbatch's options."""

from __future__ import annotations

import argparse
from pathlib import Path

EPILOG = """\
examples:
  lfm submit --site partition=gpu account=project modules=cuda/12.4    once: every job then has them
  lfm submit train                                                     the smoke run
  lfm submit --nodes 4 --gpus 8 --time 12:00:00 train --config run.yaml max_steps=1000
  lfm submit --nodes 4 --gpus 8 --chain prepare data/hub/dataset --tokenizer data/hub/tokenizer --out data/mine \\
      then train --config run.yaml data=data/mine output=runs/mine then evaluate runs/mine
  lfm submit --sweep learning_rate=1e-4,3e-4 --sweep seed=1,2 train --config run.yaml output=runs/sweep
  lfm submit --table runs/sweep                                        how its runs stand

Options stand before the script's name; what follows it are the script's own arguments (slurm/README.md).
"""

INSTEAD = {
    "--mem-per-gpu": "--mem, the memory of each node",
    "--mem-per-cpu": "--mem, the memory of each node",
    "--cpus-per-gpu": "--sbatch=--cpus-per-task, of which there is one for each GPU",
    "--ntasks-per-gpu": "--gpus, the number on each node, with a task for each",
    "--gpus": "--gpus, the number on each node, itself",
}


def add_submit(commands) -> None:
    """Add `lfm submit` to the commands."""
    about = "Submit batch scripts to SLURM: one, a chain, or a sweep."
    parser = commands.add_parser(
        "submit", help=about, description=about, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(run=_submit)
    add = parser.add_argument
    add("--dry-run", action="store_true", help="show the script and the call of sbatch, and submit nothing")
    add(
        "--chain",
        action="store_true",
        help="several scripts, with `then` between: each waits until the one before is through",
    )
    add("--sweep", action="append", default=[], metavar="KEY=V,V",
        help="train once for each value, each in a run folder of its own below `output`; again for combinations")  # fmt: skip
    add("--table", metavar="OUTPUT", help="show how a sweep's runs stand, and write it to table.md there")
    add("--site", nargs="+", metavar="NAME=VALUE",
        help="note what holds for every job here: partition, account, qos, reservation, modules, interface, venv, conda, "
        "image")  # fmt: skip
    resources = parser.add_argument_group("resources (in a chain, of its training)")
    resources.add_argument("--nodes", type=int, help="default: the script's")
    resources.add_argument("--gpus", type=int, help="of each node, a task for each; 0: one task, on the CPU")
    resources.add_argument("--mem", help="memory of each node, as 200G; default: the script's, with two GPUs or more "
                           "0, which is all of it")  # fmt: skip
    resources.add_argument("--time", help="time limit, as 12:00:00; default: the script's")
    add("--sbatch", action="append", default=[], metavar="OPTION", help="any other option, as --sbatch=--exclude=node7")
    add("words", nargs=argparse.REMAINDER, metavar="train|prepare|evaluate ...", help="the script and its arguments")


def _submit(options) -> None:
    from launcher.cluster.sbatch import check_sbatch, of_script, stages
    from launcher.cluster.site import read_site, write_site

    if options.site:
        print(f"noted in {write_site(options.site)}")
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
            # Where the one before has failed, this one could only wait for ever.
            job.options += [f"--dependency=afterok:{previous}", "--kill-on-invalid-dep=yes"]
        previous = _send(job, options.dry_run, script)


def _checked(found, options):
    from launcher.errors import ConfigurationError

    for name, value, least in (("--nodes", options.nodes, 1), ("--gpus", options.gpus, 0)):
        if value is not None and value < least:
            raise ConfigurationError(f"{name} is {value}; it must be at least {least}")
    for word in options.sbatch:
        name = word.partition("=")[0]
        if name in INSTEAD:  # sbatch refuses two ways to say one thing, and the scripts' #SBATCH lines have one
            raise ConfigurationError(
                f"the batch scripts say it in another way than --sbatch={name}; give {INSTEAD[name]}"
            )
    if len(found) > 1 and not options.chain:
        raise ConfigurationError("`then` joins the scripts of a chain; give --chain")
    if options.sweep and [script for script, _ in found] != ["train"]:
        raise ConfigurationError("--sweep is for train alone; lfm submit --help has an example")
    return found


def _submit_sweep(options, site: dict[str, str], arguments: list[str]) -> None:
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
            f"job {array} trains the runs, but none will write their table ({error}); later: lfm submit --table {output}"
        ) from error
    print(f"{len(runs)} runs below {output}; when all have ended, {output / 'table.md'} compares them")


def _show_table(output: Path) -> None:
    from launcher.cluster.sweep import table

    text = table(output)
    (output / "table.md").write_text(text)
    print(text, end="")


def _resources(options, script: str = "train") -> list[str]:
    named = []
    if script == "train":
        named += [f"--nodes={options.nodes}"] if options.nodes is not None else []
        # Together, since a task is started for each GPU.
        if options.gpus is not None:
            named += [f"--gpus-per-node={options.gpus}", f"--ntasks-per-node={max(1, options.gpus)}"]
        said = any(word.startswith("--mem=") for word in options.sbatch)
        memory = options.mem or ("0" if (options.gpus or 0) > 1 and not said else None)
        named += [f"--mem={memory}"] if memory else []
        named += [f"--time={options.time}"] if options.time else []
    return named + options.sbatch


def _send(job, dry_run: bool, script: str = "") -> str:
    """Submit a job, or show it; its number, or what stands for it."""
    if not dry_run:
        number = job.send()
        print(f"job {number}: {job.shown()}")
        return number
    if script:
        print(f"# slurm/{script}.sbatch\n{Path('slurm', f'{script}.sbatch').read_text()}")
    print(f"# would be called:\n{job.shown()}\n")
    return f"<{script}>"
