"""A run's folder belongs to one process at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastvar.training.lock import locked


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[int]:
    """Another process that has the folder."""
    ready, tell = os.pipe()
    child = os.fork()
    if not child:
        with locked(tmp_path / "run"):
            os.write(tell, b".")
            while True:
                time.sleep(0.01)
    os.read(ready, 1)
    yield child
    os.close(ready)
    os.close(tell)


def test_a_second_run_is_refused(holder: int, tmp_path: Path) -> None:
    """It names process and host. The lock goes with the process, however that ends."""
    message = rf"train: output: .*run is in use by process {holder} on {socket.gethostname()} since \d{{4}}-"
    try:
        with pytest.raises(ValueError, match=message), locked(tmp_path / "run"):
            pass
        with locked(tmp_path / "run", active=False):  # the other processes of that run
            pass
    finally:
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
    with locked(tmp_path / "run"):
        assert f"process {os.getpid()} on" in (tmp_path / "run" / ".lock").read_text()


def test_it_is_let_go_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError), locked(tmp_path):
        raise KeyError
    assert (tmp_path / ".lock").read_text() == ""


def test_without_locks_in_the_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run goes on, and says what to see to."""

    def no(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", no)
    with locked(tmp_path):
        pass
    assert "cannot be locked (No locks available)" in capsys.readouterr().err


def test_a_second_run_of_the_same_process_is_refused(tmp_path: Path) -> None:
    """And does not let go of the first one's lock, as closing the file would."""
    with locked(tmp_path):
        with pytest.raises(ValueError, match="in use by another run of this process"), locked(tmp_path):
            pass
        child = os.fork()
        if not child:
            with (tmp_path / ".lock").open("a+") as file:
                try:
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    os._exit(0)
            os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
    with locked(tmp_path):
        pass
