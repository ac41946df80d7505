"""Pages and batch scripts give the exit codes of launcher/exit_codes.py."""

import re
from pathlib import Path

import pytest

import launcher
from data_pipeline.errors import DataError
from launcher import exit_codes
from launcher.errors import ConfigurationError, DiskError, HardwareError, TrainingError, one_sentence_errors

PROJECT = Path(launcher.__file__).parent.parent


def test_the_page_on_training_lists_every_code_with_its_meaning():
    page = (PROJECT / "launcher/training/README.md").read_text(encoding="utf-8")
    table = page.split("| exit code | meaning |\n|---|---|\n")[1].split("\n\n")[0]
    assert table == "\n".join(f"| {code} | {meaning} |" for code, meaning in exit_codes.MEANINGS.items())


def test_every_code_has_a_meaning():
    codes = {value for name, value in vars(exit_codes).items() if name.isupper() and isinstance(value, int)}
    assert codes == set(exit_codes.MEANINGS)


def test_the_page_on_batch_jobs_has_the_same_codes():
    page = (PROJECT / "slurm/README.md").read_text(encoding="utf-8")
    for words, code in (
        (r"a step hung \((\d+)\)", exit_codes.HUNG),
        (r"a device failed \((\d+)\)", exit_codes.LOST),
        (r"the job ends with code (\d+)", exit_codes.STOPPED),
    ):
        assert re.findall(words, page) == [str(code)], words


def test_batch_scripts_end_with_the_same_codes():
    lifecycle = (PROJECT / "slurm/lifecycle.sh").read_text(encoding="utf-8")
    assert re.findall(r"^readonly stopped=(\d+)", lifecycle, re.MULTILINE) == [str(exit_codes.STOPPED)]
    for path in PROJECT.joinpath("slurm").iterdir():
        text = path.read_text(encoding="utf-8")
        # After an error about the way in which a script was started, or the job's settings.
        assert set(re.findall(r"error: [^\n]*\n *exit (\d+)", text)) <= {str(exit_codes.WRONG_INPUT)}, path
        assert set(re.findall(r"\bexit (\d+)", text)) <= {str(exit_codes.DONE), str(exit_codes.WRONG_INPUT)}, path


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigurationError, 2),
        (DataError, 2),
        (DiskError, 2),
        (TrainingError, 1),
        (HardwareError, 77),
        (KeyboardInterrupt, 130),
    ],
)
def test_an_error_for_the_user_ends_the_program_with_its_code_and_one_line(error, code, capsys):
    with pytest.raises(SystemExit) as ended, one_sentence_errors():
        raise error("what is wrong; the fix")
    assert ended.value.code == code
    expected = "interrupted" if error is KeyboardInterrupt else "error: what is wrong; the fix"
    assert capsys.readouterr().err.splitlines() == [expected]
