"""The Python that the batch scripts use, and their errors if it is missing; no cluster is needed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
MODULES = Path("/etc/profile.d/modules.sh")
SHOW = 'set -euo pipefail; source slurm/environment.sh; "${python[@]}" -c "import sys; print(sys.prefix)"'


def source(script: str = SHOW, **variables: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LFM_")} | variables
    return subprocess.run(
        ["bash", "-c", script], cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=60, check=False
    )


def executable(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)
    return path


def test_lfm_venv_selects_a_virtual_environment():
    assert source(LFM_VENV=sys.prefix).stdout.strip() == sys.prefix


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"LFM_VENV": "/nowhere"}, "LFM_VENV is /nowhere, but there is no /nowhere/bin/python"),
        ({"LFM_VENV": "a", "LFM_CONDA": "b"}, "LFM_VENV LFM_CONDA are set"),
        ({"LFM_IMAGE": "/nowhere.sif"}, "LFM_IMAGE is /nowhere.sif, which is not a readable file"),
        ({"LFM_IMAGE": "/etc/hostname", "PATH": "/usr/bin:/bin"}, "there is no apptainer"),
        ({"LFM_CONDA": "train", "PATH": "/usr/bin:/bin"}, "there is no conda"),
        ({"LFM_MODULES": "no-such-module"}, "LFM_MODULES "),
        ({"LFM_VENV": sys.prefix, "LFM_INTERFACE": "ib7"}, "LFM_INTERFACE names ib7, which"),
    ],
)
def test_a_wrong_setting_is_an_error_of_one_sentence(variables, sentence):
    result = source(**variables)
    assert result.returncode == 2
    error = result.stderr.splitlines()[-1]
    assert error.startswith("error: ") and sentence in error
    assert not result.stdout


@pytest.mark.extra
def test_modules_are_loaded(tmp_path):
    if not MODULES.exists():
        pytest.skip("there are no modules; install environment-modules")
    (tmp_path / "compiler").write_text("#%Module\nsetenv COMPILER loaded\n")
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda" / "12.4").write_text("#%Module\nsetenv CUDA_HOME /opt/cuda\n")
    variables = {"LFM_VENV": sys.prefix, "LFM_MODULES": "compiler cuda/12.4", "MODULEPATH": str(tmp_path)}
    result = source("set -euo pipefail; source slurm/environment.sh; echo $COMPILER $CUDA_HOME", **variables)
    assert result.stdout.split() == ["loaded", "/opt/cuda"], result.stderr
    wrong = source(**{**variables, "LFM_MODULES": "cuda/13"})
    assert wrong.returncode == 2
    assert "error: LFM_MODULES names cuda/13" in wrong.stderr


def test_a_conda_environment_is_activated(tmp_path):
    """A small executable with conda's interface stands in: the real one is not on the package index."""
    hook = f'conda() {{ [[ $2 == train ]] && export PATH={sys.prefix}/bin:$PATH && echo "$UNSET_BY_A_PACKAGE" >/dev/null; }}'
    executable(tmp_path / "conda", f"[[ $* == 'shell.bash hook' ]] && cat <<'HOOK'\n{hook}\nHOOK")
    path = f"{tmp_path}:/usr/bin:/bin"
    assert source(LFM_CONDA="train", PATH=path).stdout.strip() == sys.prefix
    assert "LFM_CONDA is other, which conda cannot activate" in source(LFM_CONDA="other", PATH=path).stderr


def test_an_image_runs_its_own_python(tmp_path):
    """A small executable with Apptainer's interface stands in: Debian has no package of it."""
    executable(
        tmp_path / "apptainer",
        f'printf "%s\\n" "$@" >{tmp_path}/called; while [[ $1 != *.sif ]]; do shift; done; "${{@:2}}"',
    )
    image = tmp_path / "an image.sif"
    image.touch()
    result = source(LFM_IMAGE=str(image), PATH=f"{tmp_path}:{sys.prefix}/bin:/usr/bin:/bin")
    assert result.stdout.strip() == sys.prefix, result.stderr
    called = (tmp_path / "called").read_text().splitlines()
    assert called[:5] == ["exec", "--bind", str(PROJECT), "--pwd", str(PROJECT)]
    assert called[-4:-1] == [str(image), "python3", "-c"]


def test_an_interface_is_set_and_variables_of_other_launchers_are_removed():
    script = "set -euo pipefail; source slurm/environment.sh; "
    script += "echo $GLOO_SOCKET_IFNAME $NCCL_SOCKET_IFNAME $NCCL_DEBUG ${RANK:-none}"
    result = source(script, LFM_VENV=sys.prefix, LFM_INTERFACE="lo", RANK="3")
    assert result.stdout.split() == ["lo", "lo", "WARN", "none"]


@pytest.mark.parametrize("script", ["train", "prepare", "evaluate"])
def test_a_script_started_by_hand_or_from_another_folder_names_the_right_command(script, tmp_path):
    submit = f"submit it from the project's folder: sbatch slurm/{script}.sbatch"
    for variables in ({}, {"SLURM_JOB_ID": "1", "SLURM_SUBMIT_DIR": str(tmp_path)}):
        result = source(f"bash slurm/{script}.sbatch", **variables)
        assert result.returncode == 2
        assert submit in result.stderr


@pytest.mark.extra
def test_shellcheck_finds_nothing():
    if shutil.which("shellcheck") is None:
        pytest.skip("there is no shellcheck; install shellcheck")
    scripts = [*PROJECT.glob("slurm/[a-z]*.s*"), *PROJECT.glob("tests/cluster/*.sh")]
    assert len(scripts) >= 6
    result = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True, timeout=60, check=False)
    assert not result.stdout
    for script in PROJECT.glob("slurm/*.sbatch"):
        assert "\nset -euo pipefail\n" in script.read_text()
