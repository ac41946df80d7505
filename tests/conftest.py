"""What holds for the whole suite: its options, and that no test changes the environment of another."""

import os

import pytest

# GNU OpenMP's threads spin at the end of each parallel loop. Beside another busy process, as here, a small step then takes
# ten times as long and more. Read when torch is loaded. (Alone a step is 7 % faster with spinning: runs keep it.)
os.environ.setdefault("GOMP_SPINCOUNT", "1000")


CLUSTER = "tests/cluster/"
LONGEST = (
    CLUSTER,
    "tests/test_main_job.py",
    "tests/launcher/training/test_kills.py",
    "tests/launcher/training/test_faults.py",
)


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


def pytest_make_parametrize_id(val, argname):
    """Name a case of bytes by its argument: contents as an id are hard to read, and a gzip's hold the time of day."""
    return argname if isinstance(val, bytes) else None


def pytest_collection_modifyitems(items):
    """Begin with what takes longest, so that no worker of xdist is left alone with it at the end."""
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))  # stable: the rest stays in order


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Keep the tests of a file on one worker, since they share runs, and those of the only cluster too."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return CLUSTER if nodeid.startswith(CLUSTER) else nodeid.split("::")[0]

    config.option.loadscopereorder = False
    return ByFile(config, log)


@pytest.fixture(autouse=True)
def environment_as_it_was():
    """Commands that a test calls in its own process export who they are, and what is started later would believe it."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
