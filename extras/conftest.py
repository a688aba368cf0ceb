"""`python -m pytest`, without further words, uses two processes: a second one runs the files in SECOND beside
the others, each on one thread, and what it printed stands before the summary."""
import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
SECOND = "exercises benchmark small faults distill sampling networks attention formats".split()


def pytest_configure(config):
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    if not whole or config.option.keyword or config.option.collectonly:
        return
    files = [str(path) for name in SECOND if (path := HERE / f"test_{name}.py").exists()]
    os.environ["OMP_NUM_THREADS"] = "1"
    config.option.ignore = [*(config.option.ignore or []), *files]
    config.second_output = tempfile.TemporaryFile("w+")
    config.second = subprocess.Popen([sys.executable, "-m", "pytest", "-q", *files], cwd=HERE.parent,
                                     stdout=config.second_output, stderr=subprocess.STDOUT)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session, exitstatus):
    for child in multiprocessing.active_children():  # Python waits for them, and workers ignore SIGTERM
        child.kill()
    second = getattr(session.config, "second", None)
    if second:
        if exitstatus == pytest.ExitCode.INTERRUPTED:
            second.terminate()
        if second.wait() and not session.exitstatus:
            session.exitstatus = second.returncode


def pytest_terminal_summary(terminalreporter, config):
    if hasattr(config, "second"):
        config.second_output.seek(0)
        terminalreporter.section("second process")
        terminalreporter.write(config.second_output.read())


def pytest_unconfigure(config):
    if hasattr(config, "second") and config.second.poll() is None:
        config.second.terminate()
