"""A forked process is what `python -m MODULE ...` is: its arguments, folder, environment, output, end and exit code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from peft_recipes.comparison import forking, processes

pytestmark = pytest.mark.skipif(not forking.can_fork(), reason="needs Linux without a GPU")


@pytest.fixture
def fork(tmp_path):
    """fork(statement, **environment): a process that runs a statement with the standard library's timeit."""
    made = []

    def start(statement, **environment):
        command = [sys.executable, "-m", "timeit", "-n1", "-r1", statement]
        made.append(processes.start(command, tmp_path / "log.txt", environment, fork=True))
        assert isinstance(made[-1], forking._ForkedProcess)
        return made[-1]

    yield start
    for process in made:
        process.kill()
        process.wait()


def said(tmp_path):
    return (tmp_path / "log.txt").read_text().splitlines()


def test_it_has_the_arguments_the_folder_and_the_environment_of_its_caller(fork, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here = os.getcwd()
    values = f"os.getcwd(), os.environ['MINE'], {here!r} in sys.path, 'torch' in sys.modules"
    code = f"import json, os, sys; print(json.dumps([{values}]))"
    assert fork(code, MINE="some words\nin two lines").wait() == 0
    assert json.loads(said(tmp_path)[0]) == [here, "some words\nin two lines", True, True]
    assert fork("import os; print(sorted(name for name in os.environ if name == 'MINE'))").wait() == 0
    assert said(tmp_path)[2] == "[]"  # appended, and nothing is left of the other's variables


def test_it_ends_with_its_own_exit_code_or_signal(fork, tmp_path):
    assert fork("import os; os._exit(3)").wait() == 3
    assert fork("1 / 0").wait() == 1
    assert "ZeroDivisionError" in "\n".join(said(tmp_path))
    sleeping = fork("import time; time.sleep(100)")
    assert sleeping.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        sleeping.wait(0.05)
    sleeping.send_signal(signal.SIGKILL)
    assert sleeping.wait() == -signal.SIGKILL


def test_its_stdin_is_its_own(fork):
    reads = "import os; os.read(0, 1)"
    first, second = fork(reads), fork(reads)
    first.stdin.close()
    assert first.wait() == 0 and second.poll() is None
    second.stdin.close()
    assert second.wait() == 0


def test_its_threads_are_those_of_its_slot(fork, tmp_path):
    assert fork("import torch; print(torch.get_num_threads())", OMP_NUM_THREADS="2").wait() == 0
    assert said(tmp_path)[0] == "2"


def test_an_answer_that_nobody_waited_for_is_skipped(fork):
    process = fork("import time; time.sleep(100)")
    server = process._server  # Ctrl-C between a request and its answer
    server.process.stdin.write(b'{"poll": %d, "number": 0}\n' % process.pid)
    server.process.stdin.flush()
    process.kill()
    assert process.wait() == -signal.SIGKILL


def test_a_killed_server_ends_its_processes_and_another_takes_its_place(fork):
    process = fork("import os; os.read(0, 1)")
    server = process._server
    server.process.kill()
    server.process.wait()
    assert process.wait() == -signal.SIGTERM  # as a worker ends itself when its stdin closes
    assert fork("pass").wait() == 0
    assert forking._server is not server


def test_another_environment_gets_a_server_of_its_own(fork, monkeypatch):
    fork("pass").wait()
    server = forking._server
    fork("pass").wait()
    assert forking._server is server
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert forking.prepare() is not server and server.process.poll() is not None
