"""The reward by HTTP against servers on this host: a real one, and ones that fail in every way."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
import torch

from fastvar.rl.rewards import RemoteReward, Reward, create, reward_server
from fastvar.rl.rewards import remote as module
from fastvar.rl.rewards.remote import decode_images, encode_images

IMAGES = torch.rand(5, 3, 12, 16, generator=torch.Generator().manual_seed(0))
REFERENCES = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))
PROMPTS = ["a", "bb", "Größe", "", "eeeee"]


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits between attempts, which do not happen."""
    waited: list[float] = []
    monkeypatch.setattr(module.time, "sleep", waited.append)
    return waited


@contextmanager
def running(server: HTTPServer) -> Iterator[str]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Scripted(HTTPServer):
    """Answers with one (status, body) after the other; keeps what it was asked."""

    def __init__(self, *answers: tuple[int, bytes], delay: float = 0.0) -> None:
        self.answers = list(answers)
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                outer.headers.append(dict(self.headers))
                threading.Event().wait(delay)
                status, body = outer.answers.pop(0)
                try:
                    self.send_response(status)
                    if status == 302:
                        self.send_header("Location", "http://127.0.0.1:1/")
                    self.end_headers()
                    self.wfile.write(body)
                except OSError:  # the client is gone
                    pass

            def log_message(self, *arguments: Any) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)


def good(*scores: float | None) -> tuple[int, bytes]:
    return 200, json.dumps({"scores": scores}).encode()


def test_images_survive() -> None:
    levels = (IMAGES * 255).round() / 255
    torch.testing.assert_close(decode_images(encode_images(IMAGES)), levels)


def brightness(images: torch.Tensor, prompts: Sequence[str], references: torch.Tensor | None) -> Reward:
    """Tells apart all that it is given; nothing to say about empty prompts."""
    scores = images.mean((1, 2, 3)) + torch.tensor([float(len(prompt)) for prompt in prompts])
    if references is not None:
        scores = scores + 100 * references.mean((1, 2, 3))
    return Reward(scores.masked_fill(torch.tensor([not prompt for prompt in prompts]), math.nan))


@pytest.mark.parametrize("references", [None, REFERENCES])
def test_server_and_client(references: torch.Tensor | None) -> None:
    with running(reward_server(brightness, port=0)) as url:
        reward: Any = create("remote", url=url, batch_size=2, timeout=10)
        scores, mask = reward(IMAGES, PROMPTS, references)
    levels = [None if images is None else (images * 255).round() / 255 for images in (IMAGES, references)]
    expected = brightness(levels[0], PROMPTS, levels[1]).scores  # type: ignore[arg-type]
    torch.testing.assert_close(scores, expected, equal_nan=True)
    assert mask is None and scores.dtype == torch.float32 and scores.isnan().tolist() == [False] * 3 + [True, False]


def test_plain_scores_and_a_failing_reward(waits: list[float]) -> None:
    def failing(images: torch.Tensor, prompts: Sequence[str], references: Any) -> torch.Tensor:
        return torch.ones(len(images)) / 0 if prompts == ["zero"] else torch.tensor([1 / (prompts[0] != "bad")])

    with running(reward_server(failing, port=0)) as url:
        reward = RemoteReward(url, retries=1, timeout=10)
        assert reward(IMAGES[:1], ["good"]).scores.tolist() == [1.0]
        assert reward(IMAGES[:1], ["zero"]).scores.isnan().all()  # JSON has no infinity
        with pytest.raises(RuntimeError, match=r"HTTP 500 .*ZeroDivisionError: division by zero"):
            reward(IMAGES[:1], ["bad"])


def test_what_is_sent() -> None:
    server = Scripted(good(1, 2), good(3, 4), good(5))
    with running(server) as url:
        reward = RemoteReward(url, batch_size=2, headers={"Authorization": "Bearer me"})
        assert reward(IMAGES, PROMPTS).scores.tolist() == [1, 2, 3, 4, 5]
    assert [asked["prompts"] for asked in server.asked] == [PROMPTS[:2], PROMPTS[2:4], PROMPTS[4:]]
    assert [asked["references"] for asked in server.asked] == [None] * 3
    assert server.headers[0]["Authorization"] == "Bearer me"
    assert server.headers[0]["Content-Type"] == "application/json"


def test_empty_batch_asks_nobody() -> None:
    assert RemoteReward("http://127.0.0.1:1/")(IMAGES[:0], []).scores.shape == (0,)


def test_attempts_and_waits(waits: list[float]) -> None:
    server = Scripted((503, b"loading"), (429, b""), good(7))
    with running(server) as url:
        assert RemoteReward(url, backoff=0.5)(IMAGES[:1], ["a"]).scores.tolist() == [7]
    assert waits == [0.5, 1.0] and len(server.asked) == 3
    server = Scripted(*[(502, b"no luck")] * 3)
    with running(server) as url, pytest.raises(RuntimeError) as error:
        RemoteReward(url, retries=2)(IMAGES[:1], ["a"])
    assert str(error.value) == (
        f"RemoteReward: {url}: no answer after 3 attempt(s), the last: HTTP 502 Bad Gateway: no luck"
    )


@pytest.mark.parametrize(("status", "reason"), [(400, "HTTP 400 .*your fault"), (302, "HTTP 302")])
def test_no_second_attempt(waits: list[float], status: int, reason: str) -> None:
    """What would fail again, and redirections: headers may hold a secret."""
    server = Scripted((status, b"your fault"))
    with running(server) as url, pytest.raises(RuntimeError, match=rf"after 1 attempt\(s\), the last: {reason}"):
        RemoteReward(url)(IMAGES[:1], ["a"])
    assert waits == [] and len(server.asked) == 1


def test_silence(waits: list[float]) -> None:
    server = Scripted(good(1), good(1), delay=0.4)
    start = time.monotonic()
    with running(server) as url, pytest.raises(RuntimeError, match=rf"{url}: no answer after 2 .*timed out"):
        RemoteReward(url, timeout=0.1, retries=1)(IMAGES[:1], ["a"])
    assert time.monotonic() - start < 5


def test_nobody_there(waits: list[float]) -> None:
    server = Scripted()
    url = f"http://127.0.0.1:{server.server_port}/"
    server.server_close()
    with pytest.raises(RuntimeError, match=rf"{url}: no answer after 4 attempt\(s\), the last: URLError.*refused"):
        RemoteReward(url)(IMAGES[:1], ["a"])
    assert waits == [1.0, 2.0, 4.0]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"<html>", r"no JSON .*<html>"),
        (b"\xff\xfe", "no JSON"),
        (b"[1.0]", 'no list "scores"'),
        (b'{"score": [1.0]}', 'no list "scores"'),
        (b'{"scores": 1.0}', 'no list "scores"'),
        (b'{"scores": [1.0, 2.0]}', "2 scores for 1 images"),
        (b'{"scores": ["1.0"]}', "scores that are neither numbers nor null"),
        (b'{"scores": [true]}', "scores that are neither numbers nor null"),
        (b'{"scores": [[1.0]]}', "scores that are neither numbers nor null"),
    ],
)
def test_malformed_answers(body: bytes, message: str) -> None:
    server = Scripted((200, body))
    with running(server) as url, pytest.raises(RuntimeError, match=rf'{url}: expected {{"scores": .*, got {message}'):
        RemoteReward(url)(IMAGES[:1], ["a"])


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (lambda: RemoteReward("file:///etc/hostname"), "url: expected http://... or https://..., got 'file:"),
        (lambda: RemoteReward("localhost:8000"), "url: expected http://"),
        (lambda: RemoteReward("http://a/", timeout=0), "expected timeout > 0, .* got 0, 3"),
        (lambda: RemoteReward("http://a/", timeout=math.nan), "expected timeout > 0, .* got nan, 3"),
        (lambda: RemoteReward("http://a/", retries=-1), "expected .*retries >= 0"),
        (lambda: RemoteReward("http://a/")(IMAGES, ["a"]), "prompts: expected 5, got 1"),
        (lambda: RemoteReward("http://a/")(IMAGES * 3, PROMPTS), r"images: expected values in \[0, 1\]"),
        (lambda: RemoteReward("http://a/")(IMAGES, PROMPTS, REFERENCES[:1]), "references: expected 5, got 1"),
    ],
)
def test_wrong_arguments(attempt: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"RemoteReward: {message}"):
        attempt()
