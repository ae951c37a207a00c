"""What holds for every test: how its processes react to signals, and that none of them is left behind.

pytest-timeout limits the time of each test (pytest.ini).
"""

import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
# Tests are many small runs, so several threads would only slow each other down. The token finds processes that a test
# started even when their parent has ended: every process inherits it.
os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "EESMM_TEST_PROCESS": str(os.getpid())}

# A background shell, nohup and cron ignore some of these signals, and a program inherits what is ignored. A Python
# handler
# is not inherited: programs that tests start begin with the default reactions, while pytest itself stays alive under
# nohup.
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGTTOU):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, lambda *_: None)

import pytest  # noqa: E402
from helpers import pictures, stop_fork_server, stop_leftover_processes  # noqa: E402


def pytest_configure(config):
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = (
            ""  # results are bit-identical only on a CPU, and two processes need two devices
        )


@pytest.fixture(autouse=True)
def no_process_is_left():
    """Kill what a failed or timed-out test has left running; a test that passes must leave nothing."""
    yield
    left = stop_leftover_processes()
    assert not left, "this test left processes running, which were killed: " + "; ".join(left)


@pytest.fixture
def drawn():
    """A test that looks at pictures of a run has them drawn."""
    with pictures():
        yield


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session):
    """Each worker of pytest-xdist checks at its end that nothing is left, such as a process that a fixture of a
    module started.
    """
    if session.config.pluginmanager.hasplugin("dsession"):  # the main process, whose workers still run
        return
    if left := stop_leftover_processes():
        session.shouldfail = "processes left after the last test, which were killed: " + "; ".join(
            left
        )  # a worker hands this to the main process
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    stop_fork_server()


def pytest_runtest_setup(item):
    """A test marked `peers` names the packages that it compares with, and is skipped without them."""
    for marker in item.iter_markers("peers"):
        for package in marker.args:
            pytest.importorskip(package, reason=f"{package} is not installed")


def pytest_terminal_summary(terminalreporter):
    skipped = [report.longrepr[2].removeprefix("Skipped: ") for report in terminalreporter.stats.get("skipped", [])]
    absent = sorted({reason.split()[0] for reason in skipped if reason.endswith(" is not installed")})
    if absent:
        terminalreporter.write_line(
            f"skipped: {len(skipped)} tests that need {', '.join(absent)}; `make test-peers` installs them and "
            f"runs these tests"
        )
