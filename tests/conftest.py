"""What holds for the whole suite: its options, and that no test changes the environment of another."""

import os

import pytest

import launcher  # noqa: F401 - sets what torch reads when it is loaded


def pytest_addoption(parser):
    parser.addoption(
        "--forbid-missing-installs",
        action="store_true",
        help="fail when a test was skipped because something is not installed (its reason says `install`)",
    )


def pytest_sessionfinish(session):
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if not session.config.getoption("--forbid-missing-installs") or reporter is None:
        return
    reasons = {report.longrepr[2] for report in reporter.stats.get("skipped", [])}
    if missing := [reason for reason in reasons if "install" in reason]:
        reporter.write_line("not installed: " + "; ".join(missing), red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(autouse=True)
def environment_as_it_was():
    """Commands that a test calls in its own process export who they are, and what is started later would believe it."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
