"""Rewards that are asked about a rollout's first images while the next ones are drawn."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, wait
from functools import partial
from queue import SimpleQueue
from threading import Thread
from typing import Any

import torch

from fastvar.rl.prompts import Prompts
from fastvar.rl.rewards import Reward, RewardSum


class RewardsAhead:
    """Asks the rewards of a sum that are `concurrent` about each part of a rollout as soon as it is decoded, each in a
    thread of its own, one part after the other. Inside a `with`; what is not asked yet at its end is not asked.

    Args:
        reward: the sum. Its other rewards are left alone.
    """

    def __init__(self, reward: RewardSum) -> None:
        self._reward = reward
        self._askers: dict[str, _Asker] = {}

    def __enter__(self) -> RewardsAhead:
        self._askers = {name: _Asker(partial(self._reward.ask_one, name)) for name in self._reward.concurrent}
        return self

    def __exit__(self, *error: object) -> None:
        for asker in self._askers.values():
            asker.end()
        self._askers = {}  # masks are large

    @property
    def each_part(self) -> Callable[[torch.Tensor, Prompts], None] | None:
        """What `roll_out` is to call with each part; None where nothing is to be asked."""
        return self._ask if self._askers else None

    def _ask(self, images: torch.Tensor, prompts: Prompts) -> None:
        for asker in self._askers.values():
            asker.put(images, prompts.texts, prompts.references)

    def answers(self) -> dict[str, Reward]:
        """By name what was said of all images, in their order; waits for it. None has been asked about twice.

        Raises:
            RuntimeError: names a reward that misbehaved.
        """
        return {name: asker.answer() for name, asker in self._askers.items()}


class _Asker:
    """A thread that asks one reward. It is a daemon: a program that is told to end does not wait for an answer."""

    def __init__(self, ask: Callable[..., Reward]) -> None:
        self._ask = ask
        self._parts: SimpleQueue[tuple[Future[Reward], Any, tuple[Any, ...]] | None] = SimpleQueue()
        self._answers: list[Future[Reward]] = []
        self._stream: torch.cuda.Stream | None = None
        Thread(target=self._run, daemon=True).start()

    def put(self, images: torch.Tensor, *rest: Any) -> None:
        drawn = torch.cuda.current_stream(images.device).record_event() if images.is_cuda else None
        self._answers.append(Future())
        self._parts.put((self._answers[-1], drawn, (images, *rest)))

    def answer(self) -> Reward:
        parts = []
        for future in self._answers:
            while not future.done():  # a signal that another thread takes does not wake this one
                wait([future], timeout=0.25)
            parts.append(future.result())
        masks = [part.mask for part in parts if part.mask is not None]
        return Reward(
            torch.cat([part.scores for part in parts]), torch.cat(masks) if len(masks) == len(parts) else None
        )

    def end(self) -> None:
        for future in self._answers:
            future.cancel()
        self._parts.put(None)

    def _run(self) -> None:
        while (entry := self._parts.get()) is not None:
            future, drawn, part = entry
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(self._ask(*part) if drawn is None else self._beside(drawn, part))
            except BaseException as error:  # it is raised where the answer is asked for
                future.set_exception(error)

    def _beside(self, drawn: torch.cuda.Event, part: tuple[Any, ...]) -> Reward:
        """On a stream of its own: on that of the drawing it would wait for the images drawn next."""
        stream = self._stream = self._stream or torch.cuda.Stream(part[0].device)
        with torch.cuda.device(stream.device), torch.cuda.stream(stream):
            stream.wait_event(drawn)
            try:
                return self._ask(*part)
            finally:
                stream.synchronize()
