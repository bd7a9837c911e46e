"""A reward in a process of its own."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.util import Finalize
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from fastvar.rl.rewards.base import Description, Reward, RewardFunction, description_of, plain_options


class InProcess:
    """A reward that is asked in a process of its own, for one that keeps the interpreter busy, as readers do on a CPU:
    images are drawn beside it. The process starts at the first call and ends with the program, or with a call that did
    not get its answer: the next one starts another.

    Args:
        reward: of which no score depends on the other images of a call. It is pickled, so a function has to have a
            name in its module, and gets tensors on the CPU.
        concurrent: asked while images are drawn, about one part of a rollout at a time.

    Raises:
        RuntimeError: when called, the reward raised or its process has ended.
    """

    def __init__(self, reward: RewardFunction, *, concurrent: bool = True) -> None:
        vars(self).update(plain_options(reward))  # by which a run knows its reward again
        self.reward, self.concurrent = reward, concurrent
        self._lock = Lock()
        self._connection: Connection[Any, Any] | None = None
        self._end: Any = None

    @property
    def description(self) -> Description:
        """That of the reward."""
        return description_of(self.reward)

    def check_texts(self, texts: Sequence[str]) -> None:
        """As the reward, here."""
        getattr(self.reward, "check_texts", lambda _: None)(texts)

    def __call__(self, images: Tensor, prompts: Sequence[str], references: Tensor | None = None) -> Reward:
        """Score images; arguments as `RewardFunction`."""
        name = f"InProcess: {getattr(self.reward, '__name__', type(self.reward).__name__)}"
        # as arrays: tensors would go through shared memory, which is small in containers
        asked = (images.cpu().numpy(), list(prompts), None if references is None else references.cpu().numpy())
        with self._lock:
            try:
                connection = self._connection or self._start()
                connection.send(asked)
                answer = connection.recv()
            except BaseException as error:  # an answer that nobody waits for would be taken for the next one
                self._connection = None
                if self._end is not None:
                    self._end()
                if isinstance(error, EOFError | OSError):
                    raise RuntimeError(f"{name}: its process has ended") from error
                raise
        if isinstance(answer, str):
            raise RuntimeError(f"{name} raised {answer}")
        scores, mask = (None if part is None else torch.from_numpy(part).to(images.device) for part in answer)
        assert scores is not None
        return Reward(scores, mask)

    def _start(self) -> Connection[Any, Any]:
        context = get_context("spawn")
        self._connection, theirs = context.Pipe()
        process = context.Process(target=_answers, args=(theirs, self.reward), daemon=True)
        process.start()
        theirs.close()
        # before multiprocessing tells it to end, which it ignores, and waits for it
        self._end = Finalize(self, process.kill, exitpriority=10)
        return self._connection


def _answers(connection: Connection[Any, Any], reward: RewardFunction) -> None:
    """Answers until the other end is closed. Terminals and clusters signal all processes: this one goes on, as a run
    finishes its iteration."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    with suppress(EOFError, OSError):
        while True:
            connection.send(_answer(reward, *connection.recv()))


def _answer(reward: RewardFunction, images: Any, prompts: Sequence[str], references: Any) -> Any:
    """Scores and mask as arrays; or what it raised as text, as an exception may be one that cannot be pickled."""
    try:
        with torch.no_grad():
            given = None if references is None else torch.from_numpy(references)
            found = reward(torch.from_numpy(images), prompts, given)
        found = found if isinstance(found, Reward) else Reward(found)
        return found.scores.cpu().numpy(), None if found.mask is None else found.mask.cpu().numpy()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
