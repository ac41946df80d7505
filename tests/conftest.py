"""Options and hooks of the whole suite; the environment variables are restored after each test."""

import os

import pytest

# GNU OpenMP's threads spin at the end of each parallel loop. Next to another busy process, as here, that makes a small step
# ten times slower or more. The variable is read when torch is loaded. (Without other processes a step is 7 % faster with
# spinning, so real runs keep it.)
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
    """Name a case of bytes by its argument: the bytes are unreadable as an id, and gzip's contain the time of day."""
    return argname if isinstance(val, bytes) else None


def pytest_collection_modifyitems(items):
    """Run the longest tests first, so that no xdist worker is left alone with one at the end."""
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))  # stable: the rest stays in order


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Keep the tests of a file on one worker, because they share runs; and all cluster tests: there is one cluster."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return CLUSTER if nodeid.startswith(CLUSTER) else nodeid.split("::")[0]

    config.option.loadscopereorder = False
    return ByFile(config, log)


@pytest.fixture(autouse=True)
def environment_as_it_was():
    """Restore the environment: commands called in a test's process export ranks, which later processes would inherit."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
