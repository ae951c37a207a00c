"""The tests' own machinery: programs start with default signals however the tests were started, and none is left
behind.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, environment, parents

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGTTOU)
IGNORED = """from pathlib import Path
def ignored():
    mask = int(Path("/proc/self/status").read_text().split("SigIgn:")[1].split()[0], 16)
    print([number for number in %r if mask >> number - 1 & 1], flush=True)
""" % ([int(number) for number in SIGNALS],)


def in_the_background():
    """What a non-interactive shell, nohup and cron do to a process before it starts."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def outer(*words, cwd):
    return subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env=environment() | {"PYTHONPATH": f"{ROOT / 'tests'}{os.pathsep}{cwd}"},
        preexec_fn=in_the_background,
        capture_output=True,
        text=True,
    )


def test_programs_start_with_default_signals(tmp_path):
    """Without conftest.py a child inherits what is ignored; with it neither a new program nor a child of the fork
    server does.
    """
    (tmp_path / "inner.py").write_text(IGNORED + 'if __name__ == "__main__":\n    ignored()\n')
    (tmp_path / "outer.py").write_text("""import subprocess, sys
if __name__ == "__main__":
    subprocess.run([sys.executable, "inner.py"])
    import conftest, helpers, inner
    subprocess.run([sys.executable, "inner.py"])
    helpers.SERVER.set_forkserver_preload([])
    child = helpers.SERVER.Process(target=inner.ignored)
    child.start(), child.join()
""")
    done = outer("outer.py", cwd=tmp_path)
    assert done.stdout.splitlines() == [str([int(number) for number in SIGNALS]), "[]", "[]"], done.stderr


@pytest.mark.slow
def test_nothing_is_left_of_a_test_that_hangs_or_forgets(tmp_path):
    """Also in a session of its own, where no process group reaches it. The test that forgets is an error, although
    it passes.
    """
    (tmp_path / "test_inner.py").write_text("""import subprocess, time
def start():
    subprocess.Popen(["sleep", "987"], start_new_session=True)
def test_hangs():
    start()
    time.sleep(60)
def test_forgets():
    start()
def test_is_good():
    subprocess.run(["true"])
""")
    done = outer("-m", "pytest", "-q", "-p", "conftest", "--timeout=8", "test_inner.py", cwd=tmp_path)
    assert (
        done.returncode == 1
        and "1 failed, 2 passed, 2 errors" in done.stdout
        and "left processes running" in done.stdout
    ), done.stdout + done.stderr
    left = []
    for pid in parents():
        try:
            left += [pid] if b"sleep\x00987" in Path(f"/proc/{pid}/cmdline").read_bytes() else []
        except OSError:
            continue
    assert not left
