"""`lfm preflight`: find mistakes before a run spends GPU hours."""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.commands.parsing import Subcommands, command
from launcher.config_file import add_run_arguments
from launcher.errors import ConfigurationError

if TYPE_CHECKING:
    from launcher.environment import Environment


def add_preflight(commands: Subcommands) -> None:
    """Add `lfm preflight` to the commands."""
    parser = command(
        commands,
        "preflight",
        _preflight,
        "Check a run before it starts: settings, data, model, memory, disk and GPUs; if started by srun, mpirun, torchrun "
        "or deepspeed, also all nodes together. The exit code is 1 if a line is red.",
        "lfm preflight --deepspeed_config ds_configs/zero3.json --config run.yaml --nodes 4 --ranks-per-node 8",
    )
    parser.add_argument("--deepspeed_config", required=True, help="DeepSpeed JSON, usually ds_configs/zero3.json")
    parser.add_argument("--nodes", type=int, default=argparse.SUPPRESS, metavar="N",
                        help="number of nodes (default: from the SLURM job or the started ranks, otherwise 1)")  # fmt: skip
    parser.add_argument("--ranks-per-node", type=int, default=argparse.SUPPRESS, metavar="M",
                        help="ranks on each node (default: from the same source)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--save", type=Path, metavar="FILE", help="also write the JSON to FILE")
    add_run_arguments(parser)


def _preflight(options: argparse.Namespace) -> int:
    from launcher.environment import detect_environment
    from launcher.process import export_for_torch

    with redirect_stdout(sys.stderr):  # imports may print, and stdout is reserved for the result
        environment = detect_environment()
        export_for_torch(environment)
        from launcher.training.engine import start_process_group
        from launcher.training.preflight.checks import check_run
        from launcher.training.preflight.findings import RED, as_json, print_table, worst
        from launcher.training.preflight.nodes import check_nodes

        arguments = (options.config, options.overrides, options.deepspeed_config)
        world = world_of(options, environment)
        # False if only the options describe the run, as on a login node.
        here = environment.world_size > 1 or "SLURM_JOB_ID" in os.environ or world == environment
        findings, nodes = check_run(*arguments, world, here), [socket.gethostname()]
        if environment.world_size > 1:
            from launcher.training.resilience.leaving import leave_together

            start_process_group(environment)
            findings, nodes = check_nodes(environment, *_shared_paths(options), findings)
    if environment.is_main:
        report = json.dumps(as_json(findings, nodes), indent=1, ensure_ascii=False)
        if options.save:
            _save(options.save, report)
        print(report) if options.json else print_table(findings)
        sys.stdout.flush()
    if environment.world_size > 1:
        leave_together()  # otherwise the first rank to exit with an error makes srun kill ranks that have not reported
    return int(worst(findings) == RED)


def _save(path: Path, report: str) -> None:
    from launcher.files import replace_text

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, f"{report}\n")
    except OSError as error:
        raise ConfigurationError(f"cannot write {path}: {error.strerror}; name another file with --save") from error


def world_of(
    options: argparse.Namespace, environment: Environment, variables: Mapping[str, str] = os.environ
) -> Environment:
    """Return the world of the planned run: from the options, else from the SLURM job, else from the current processes.

    Under `srun --ntasks-per-node=1` there is only one process per node, fewer than the run will have.
    """
    from launcher.environment import Environment

    nodes, ranks = getattr(options, "nodes", None), getattr(options, "ranks_per_node", None)
    for name, value in (("--nodes", nodes), ("--ranks-per-node", ranks)):
        if value is not None and value < 1:
            raise ConfigurationError(f"{name} is {value}; it must be at least 1")
    if nodes is None and ranks is None and (environment.world_size > 1 or "SLURM_JOB_ID" not in variables):
        return environment
    alone = environment.world_size == 1
    nodes = nodes or (
        int(variables.get("SLURM_JOB_NUM_NODES", 1))
        if alone
        else max(1, environment.world_size // environment.local_world_size)
    )
    if ranks is None:
        of_job = int(variables["SLURM_NTASKS"]) // nodes if alone and variables.get("SLURM_NTASKS") else None
        ranks = of_job or int(variables.get("SLURM_NTASKS_PER_NODE", environment.local_world_size))
    return Environment(environment.rank, nodes * ranks, environment.local_rank, ranks, environment.launcher)


def _shared_paths(options: argparse.Namespace) -> tuple[str | None, str | None]:
    """Return the run folder and the data's index, which all nodes must see; None for what does not exist."""
    from data_pipeline.loading.remote import is_remote
    from launcher.config_file import load_run_config

    try:
        config = load_run_config(options.config, options.overrides)
    except ConfigurationError:
        return None, None  # a red line reports the error
    folders = [config.data] if isinstance(config.data, str) else [weighted.path for weighted in config.data]
    index = next((str(Path(folder, "index.json")) for folder in folders if not is_remote(folder)), None)
    return config.output, None if index is None or not Path(index).exists() else index
