"""One run to a folder: a second one would remove the first one's checkpoints and mix with its metrics."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from fastvar.training.log import say

LOCK = ".lock"
_held: set[Path] = set()  # by this process, for which the system's lock is no obstacle


@contextmanager
def locked(output: Path, *, active: bool = True) -> Iterator[None]:
    """Hold a run's folder for this process. The system lets it go when the process ends, however it ends.

    Args:
        output: the folder; made if it is not there.
        active: False for all processes of a run but the main one.

    Raises:
        ValueError: another process has it; names the process, its host and since when.
    """
    if not active:
        yield
        return
    output.mkdir(parents=True, exist_ok=True)
    place = output.resolve()
    if place in _held:  # before the file is opened: closing it again would let go of the lock
        raise ValueError(f"train: output: {output} is in use by another run of this process; choose another folder")
    with (output / LOCK).open("a+") as file:
        try:
            # Of the process, not of the open file: workers that are forked later do not hold it too.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise ValueError(
                f"train: output: {output} is in use by {owner}; wait for it or choose another folder"
            ) from None
        except OSError as error:  # a file system without locks
            say(f"{output} cannot be locked ({error.strerror}): see that no second run uses it")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {datetime.now():%Y-%m-%d %H:%M:%S}\n")
        file.flush()
        _held.add(place)
        try:
            yield
        finally:
            _held.discard(place)
            file.truncate(0)
