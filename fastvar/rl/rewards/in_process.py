"""A reward in a process of its own."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from fastvar.rl.rewards.base import Description, Reward, RewardFunction, description_of, plain_options


class InProcess:
    """A reward that is asked in a process of its own, for one that keeps the interpreter busy, as readers do on a CPU:
    images are drawn beside it. The process starts at the first call and ends with the program.

    Args:
        reward: of which no score depends on the other images of a call. It is pickled, so a function has to have a
            name in its module, and gets tensors on the CPU.

    Raises:
        RuntimeError: when called, the process has ended.
    """

    concurrent = True

    def __init__(self, reward: RewardFunction) -> None:
        vars(self).update(plain_options(reward))  # by which a run knows its reward again
        self.reward = reward
        self._connection: Connection[Any, Any] | None = None

    @property
    def description(self) -> Description:
        """That of the reward."""
        return description_of(self.reward)

    def check_texts(self, texts: Sequence[str]) -> None:
        """As the reward, here."""
        getattr(self.reward, "check_texts", lambda _: None)(texts)

    def __call__(self, images: Tensor, prompts: Sequence[str], references: Tensor | None = None) -> Reward:
        """Score images; arguments as `RewardFunction`. What the reward raises is raised here."""
        if self._connection is None:
            context = get_context("spawn")
            self._connection, theirs = context.Pipe()
            context.Process(target=_answer, args=(theirs, self.reward), daemon=True).start()
            theirs.close()
        # as arrays: tensors would go through shared memory, which is small in containers
        asked = (images.cpu().numpy(), list(prompts), None if references is None else references.cpu().numpy())
        try:
            self._connection.send(asked)
            answer = self._connection.recv()
        except (EOFError, OSError) as error:
            raise RuntimeError(f"InProcess: the process of {type(self.reward).__name__} has ended") from error
        if isinstance(answer, BaseException):
            raise answer
        scores, mask = (None if part is None else torch.from_numpy(part).to(images.device) for part in answer)
        assert scores is not None
        return Reward(scores, mask)


def _answer(connection: Connection[Any, Any], reward: RewardFunction) -> None:
    """Answers until the other end is closed. A terminal interrupts all processes: this one goes on, as a run finishes
    its iteration."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        try:
            images, prompts, references = connection.recv()
        except EOFError:
            return
        answer: Any
        try:
            with torch.no_grad():
                given = None if references is None else torch.from_numpy(references)
                found = reward(torch.from_numpy(images), prompts, given)
            found = found if isinstance(found, Reward) else Reward(found)
            answer = (found.scores.cpu().numpy(), None if found.mask is None else found.mask.cpu().numpy())
        except Exception as error:  # it is raised at the other end
            answer = error
        connection.send(answer)
