"""Convert checkpoints to DeepSpeed's universal form: one file per parameter, which any number of ranks can read."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

from launcher.errors import ConfigurationError, DiskError
from launcher.training.checkpoints.checkpoint import universal_folder
from launcher.training.checkpoints.manifest import (
    MANIFEST,
    describe_durably,
    files_of,
    find_fault,
    read_manifest,
    write_manifest,
)
from launcher.training.checkpoints.states import check_states, load_state


def for_ranks(checkpoint: Path, world_size: int, expert_parallel_size: int) -> tuple[Path, str | None]:
    """Return the form of a checkpoint that `world_size` processes can load, and a message if it is the universal one.

    Raises as `keep_universal` does.
    """
    manifest = read_manifest(checkpoint)
    wrote = (manifest["world_size"], manifest["expert_parallel_size"])
    if wrote == (world_size, expert_parallel_size):
        return checkpoint, None
    print(
        f"{checkpoint.name} was written by differently arranged ranks; finding or creating its universal form",
        flush=True,
    )
    universal, is_new = keep_universal(checkpoint)
    return universal, (
        f"{checkpoint.name} was written by {wrote[0]} processes with expert_parallel_size {wrote[1]}, this run has "
        f"{world_size} with {expert_parallel_size}: {'converted to' if is_new else 'taken from'} {universal}"
    )


def keep_universal(checkpoint: Path) -> tuple[Path, bool]:
    """Create the universal form of a checkpoint beside it, with its own manifest and the same train state.

    If a whole universal form of this checkpoint exists, it is reused. Returns its folder, and whether it is new.
    Raises `ConfigurationError` if the checkpoint holds no optimizer state yet, and `DiskError` if the folder cannot be
    written.
    """
    folder = universal_folder(checkpoint)
    source = _source_of(checkpoint)
    if find_fault(folder) is None and read_manifest(folder).get("source") == source:
        return folder, False
    partial = folder.with_name(f"{folder.name}.partial")
    try:
        for stale in (partial, folder):
            if stale.exists():
                shutil.rmtree(stale)
        convert(checkpoint, partial / "universal")
        inner = partial / "universal"  # the converter also writes beside its output folder
        manifest = {**read_manifest(checkpoint), "source": source}
        write_manifest(inner, {**manifest, "files": describe_durably(inner, files_of(inner))})
        inner.rename(folder)
        shutil.rmtree(partial)
    except OSError as error:
        raise DiskError(
            f"cannot write the universal form of {checkpoint} to {folder}: {error.strerror or error}; free about as much "
            "disk space there as the checkpoint takes"
        ) from error
    return folder, True


def note_train_state(checkpoint: Path, train_state: dict) -> None:
    """Replace the train state in a checkpoint's manifest, and in its universal form, which stays valid.

    Raises `OSError`, and `ValueError` if a manifest cannot be read.
    """
    universal, source = universal_folder(checkpoint), _source_of(checkpoint)
    write_manifest(checkpoint, {**read_manifest(checkpoint), "train_state": train_state})
    if (universal / MANIFEST).is_file() and read_manifest(universal).get("source") == source:
        noted = {"train_state": train_state, "source": _source_of(checkpoint)}
        write_manifest(universal, {**read_manifest(universal), **noted})


def _source_of(checkpoint: Path) -> str:
    """Return the hash that ties a universal form to its checkpoint."""
    return hashlib.sha256((checkpoint / MANIFEST).read_bytes()).hexdigest()


def convert(checkpoint: Path, target: Path) -> None:
    """Write the universal form of a checkpoint to the folder `target`, in a separate process.

    Raises `ConfigurationError` if no step has been taken yet or the files hold more than states, and `RuntimeError` if
    DeepSpeed's converter fails.
    """
    check_states(checkpoint)
    optimizer = load_state(min(checkpoint.glob("*optim_states.pt")))["optimizer_state_dict"]
    stage_3 = "fp32_flat_groups" in optimizer
    if not optimizer["optimizer_state_dict" if stage_3 else "base_optimizer_state"]["state"]:
        raise ConfigurationError(
            f"{checkpoint} cannot be converted: all its steps were skipped, so the optimizer has no state yet; "
            "resume with as many processes as wrote it, or start over in another output"
        )
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    command += ["--input_folder", str(checkpoint), "--output_folder", str(target)]
    command += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"converting {checkpoint} failed:\n{result.stderr[-2000:]}")
