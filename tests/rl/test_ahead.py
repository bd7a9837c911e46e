"""Rewards are asked while the next images are drawn, and nothing that is learned changes by it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pytest
import torch

from fastvar.models import SamplingOptions
from fastvar.rl import Prompts, VMRGRPOTrainer
from fastvar.rl.ahead import RewardsAhead
from fastvar.rl.processes import RewardError
from fastvar.rl.resuming import _reward_options
from fastvar.rl.rewards import Description, InProcess, RemoteReward, Reward, RewardSum
from tests.helpers.policies import policy, redness
from tests.rl.test_trainer import PROMPTS, QUICK, lines, patchy

PARTS = replace(QUICK, prompts=3, rollout=SamplingOptions(batch_size=4), use_mask=True)
LONG = 20.0  # seconds that nothing here waits for, unless it fails


class Concurrent:
    """A reward that may be asked ahead; it remembers of how many images."""

    def __init__(self, function: Callable[..., Any], concurrent: bool = True) -> None:
        self.function, self.concurrent = function, concurrent
        self.asked: list[int] = []

    def __call__(self, images: torch.Tensor, prompts: Sequence[str], references: Any) -> Any:
        self.asked.append(len(images))
        return self.function(images, prompts, references)


def trainer(output: Path, rewards: Any, **changes: Any) -> VMRGRPOTrainer[Any]:
    return VMRGRPOTrainer(policy(), RewardSum(rewards), PROMPTS, replace(PARTS, **changes), output)


@pytest.mark.parametrize("iteration", [0, 2], ids=["coarse", "fine"])
def test_the_next_part_is_drawn_while_a_reward_thinks(iteration: int, tmp_path: Path) -> None:
    next_is_drawn, waited = threading.Event(), []

    def slow(images: torch.Tensor, prompts: Sequence[str], references: Any) -> torch.Tensor:
        if threading.current_thread() is not threading.main_thread():  # as it is about the blank picture
            waited.append(next_is_drawn.wait(LONG))
        return redness(images, prompts, references)

    training = trainer(tmp_path, {"slow": Concurrent(slow)})
    generate, decoded = training.policy.generate, []

    def watched(*arguments: Any, **options: Any) -> Any:
        drawn = generate(*arguments, **options)
        decoded.append(drawn.images is not None)
        if sum(decoded) == 2:
            next_is_drawn.set()
        return drawn

    training.policy.generate = watched
    training.iteration(iteration)
    assert len(waited) > 1 and all(waited)


def test_what_is_learned_is_the_same(tmp_path: Path) -> None:
    """Whole and parts, masks and texts, beside a reward that is asked at the end."""
    runs = []

    def by_text(images: torch.Tensor, prompts: Sequence[str], references: Any) -> Reward:
        found = patchy(images, prompts, references)
        return found._replace(scores=found.scores + torch.tensor([float(text) for text in prompts]))

    for ahead in (False, True):
        reward = Concurrent(by_text, ahead)
        training = trainer(tmp_path / str(ahead), {"at the end": Concurrent(redness, False), "ahead": reward})
        weights = training.train().state_dict()
        runs.append((lines(tmp_path / str(ahead)), [value.tolist() for value in weights.values()]))
        coarse, fine = ([4] * 6, [4] * 3) if ahead else ([24], [12])
        assert reward.asked[1:] == (2 * coarse + fine) * 2  # after the blank picture
    assert runs[0] == runs[1]


def test_errors_are_the_same(tmp_path: Path) -> None:
    said = []
    for ahead in (False, True):

        def breaks(images: torch.Tensor, prompts: Sequence[str], references: Any) -> torch.Tensor:
            if len(images) > 2:
                raise TimeoutError("the scorer is gone")
            return redness(images, prompts, references)

        training = trainer(tmp_path / str(ahead), {"it": Concurrent(breaks, ahead)})
        with pytest.raises(RewardError) as raised:
            training.train()
        said.append(str(raised.value))
    assert said == ["reward 'it' raised TimeoutError: the scorer is gone"] * 2


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A shell's job in the background is made to ignore interrupts, and passes that on."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


def test_an_interrupt_does_not_wait(tmp_path: Path, interruptible: None) -> None:
    """It comes while the answer is waited for; of what was not asked yet nothing is asked any more."""
    all_is_drawn, end = threading.Event(), threading.Event()

    def endless(images: torch.Tensor, prompts: Sequence[str], references: Any) -> torch.Tensor:
        if len(images) > 2:
            all_is_drawn.wait(LONG)
            if not end.is_set():
                signal.pthread_kill(threading.get_ident(), signal.SIGINT)  # Python's handlers run in the main thread
            end.wait(LONG)
        return redness(images, prompts, references)

    reward = Concurrent(endless)
    training = trainer(tmp_path, {"it": reward})
    grade = training.grade
    training.grade = lambda *arguments: (all_is_drawn.set(), grade(*arguments))[1]  # type: ignore[method-assign]
    before, start = set(threading.enumerate()), time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        training.iteration(0)
    assert time.monotonic() - start < LONG / 2
    (asker,) = set(threading.enumerate()) - before
    assert asker.daemon
    end.set()
    asker.join(LONG)
    assert not asker.is_alive()
    assert reward.asked == [2, 4]


def test_a_mask_holds_if_all_parts_have_one() -> None:
    def some(images: torch.Tensor, prompts: Sequence[str], references: Any) -> Reward:
        mask = None if prompts[0] == "everywhere" else torch.ones(len(images), 2, 2, dtype=torch.bool)
        return Reward(images[:, 0, 0, 0], mask)

    for last, expected in (("here", (3, 2, 2)), ("everywhere", None)):
        with RewardsAhead(RewardSum({"it": Concurrent(some), "other": redness})) as ahead:
            assert ahead.each_part is not None
            ahead.each_part(torch.zeros(2, 3, 2, 2), Prompts(["here"] * 2))
            ahead.each_part(torch.ones(1, 3, 2, 2), Prompts([last]))
            found = ahead.answers()
        assert list(found) == ["it"] and found["it"].scores.tolist() == [0, 0, 1]
        assert (None if found["it"].mask is None else tuple(found["it"].mask.shape)) == expected


def test_which_rewards_are_asked_ahead() -> None:
    with RewardsAhead(RewardSum({"it": redness})) as ahead:
        assert ahead.each_part is None and ahead.answers() == {}
    far = {"far": RemoteReward("http://localhost:1"), "off": RemoteReward("http://localhost:1", concurrent=False)}
    assert RewardSum({"it": redness, **far}).concurrent == ("far",)
    assert RewardSum({"it": InProcess(redness), "off": InProcess(redness, concurrent=False)}).concurrent == ("it",)


class Odd(Exception):
    def __init__(self, one: str, two: str) -> None:  # so that it cannot be unpickled
        super().__init__(f"{one} {two}")


def of_the_process(images: torch.Tensor, prompts: Sequence[str], references: torch.Tensor | None) -> Reward:
    if prompts[0] == "fail":
        raise TimeoutError("the scorer is gone")
    if prompts[0] == "end":
        os._exit(1)
    if prompts[0] == "odd":
        raise Odd("the", "reason")
    if prompts[0] == "interrupt":
        os.kill(os.getppid(), signal.SIGINT)
        time.sleep(0.2)
    mean = images.mean((1, 2, 3)) if references is None else references.mean((1, 2, 3))
    return Reward(mean + os.getpid(), images[:, 0] > 0.5)


def test_a_reward_in_a_process_of_its_own(interruptible: None) -> None:
    reward = InProcess(of_the_process)
    images = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    asked = RewardSum({"it": reward})

    def process() -> int:
        scores, mask = reward(images, ["a", "b"])
        other = round(float((scores - images.mean((1, 2, 3)))[0]))
        torch.testing.assert_close(scores, images.mean((1, 2, 3)) + other)
        assert mask is not None and torch.equal(mask, images[:, 0] > 0.5)
        return other

    other = process()
    assert other != os.getpid()
    torch.testing.assert_close(reward(images, ["a", "b"], images / 2).scores, images.mean((1, 2, 3)) / 2 + other)
    for text, said in {"fail": "TimeoutError: the scorer is gone", "odd": "Odd: the reason"}.items():
        with pytest.raises(RuntimeError, match=f"reward 'it' raised .*: of_the_process raised {said}"):
            asked(images, [text] * 2)
    for number in (signal.SIGINT, signal.SIGTERM):  # as all processes get them
        os.kill(other, number)
    assert process() == other
    with pytest.raises(KeyboardInterrupt):
        reward(1 - images, ["interrupt"] * 2)
    another = process()  # and not the answer about the other images
    assert another != other
    (alive,) = active_children()
    assert alive.pid == another
    with pytest.raises(RuntimeError, match="of_the_process: its process has ended"):
        asked(images, ["end"] * 2)


class Slow:
    """A connection that holds one question at a time."""

    asked: Any = None

    def send(self, asked: Any) -> None:
        assert self.asked is None
        self.asked = asked
        time.sleep(0.01)

    def recv(self) -> Any:
        (images, _, _), self.asked = self.asked, None
        return images[:, 0, 0, 0], None


def test_two_threads_ask_one_process() -> None:
    reward: Any = InProcess(redness)
    reward._connection = Slow()
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda value: reward(torch.full((1, 3, 2, 2), value), ["a"]).scores.item(), (0.0, 1.0)))
    assert found == [0.0, 1.0]


class Described:
    description = Description("some weights")

    def __init__(self) -> None:
        self.limit = 2

    def __call__(self, images: torch.Tensor, prompts: Sequence[str], references: Any) -> torch.Tensor:
        return images[:, 0, 0, 0]

    def check_texts(self, texts: Sequence[str]) -> None:
        raise ValueError(f"expected no texts, got {texts}")


def test_what_a_reward_in_a_process_says_of_itself() -> None:
    asked = RewardSum({"it": InProcess(Described(), concurrent=False)})
    assert _reward_options(asked) == {"it.limit": 2}
    assert asked.descriptions()["it"]["weights"] == "some weights"
    with pytest.raises(ValueError, match="reward 'it': expected no texts"):
        asked.check_texts(["a"])
