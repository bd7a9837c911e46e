"""The reward by HTTP: scores from a model that lives in another environment or on another machine.

One request scores one chunk of images, as JSON in UTF-8:

    POST url     {"images": [PNG in base64, ...], "prompts": [text, ...], "references": [PNG in base64, ...] or null}
    answer 200   {"scores": [number or null, ...]}, one for each image; null where there is nothing to say

PNGs are RGB with 8 bits a channel. Any other status is a failure; its text is shown to the user.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import math
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
from torch import Tensor

from fastvar.pictures import check_images, png, read_picture, to_uint8
from fastvar.rl.rewards.base import Description, Reward, RewardFunction, register

_EXCERPT = 200  # characters of a failed answer that a message shows


@register("remote")
class RemoteReward:
    """Scores by a server (see the module; `reward_server` is one). Scores are (B,) float32, NaN for null; no mask.

    What may pass is tried again: no connection, no answer in time, a broken answer, the statuses 408, 429 and 5xx.

    Args:
        url: http or https. Redirections are not followed, so that headers go nowhere else.
        timeout: seconds that the server may be silent.
        retries: further attempts after the first.
        backoff: seconds before the second attempt; doubles with each.
        batch_size: images a request.
        headers: more of them, for example {"Authorization": "Bearer ..."}.
        concurrent: asked while images are drawn; a request then holds at most the images of one part of a rollout.

    Raises:
        ValueError: another kind of URL, numbers out of range; when called, images of another shape or range.
        RuntimeError: when called, no usable answer; names the URL and the last failure.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 60.0,
        retries: int = 3,
        backoff: float = 1.0,
        batch_size: int = 64,
        headers: Mapping[str, str] | None = None,
        concurrent: bool = True,
    ) -> None:
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc:
            raise ValueError(f"RemoteReward: url: expected http://... or https://..., got {url!r}")
        if not (0 < timeout < math.inf and retries >= 0 and 0 <= backoff < math.inf and batch_size >= 1):
            raise ValueError(
                "RemoteReward: expected timeout > 0, retries >= 0, backoff >= 0 and batch_size >= 1, "
                f"got {timeout}, {retries}, {backoff} and {batch_size}"
            )
        self.url, self.timeout, self.retries, self.backoff, self.batch_size = url, timeout, retries, backoff, batch_size
        self.headers = {"Content-Type": "application/json"} | dict(headers or {})
        self.concurrent = concurrent
        self._opener = urllib.request.build_opener(_NoRedirection)

    @property
    def description(self) -> Description:
        """Where the model is; what it is, its server knows."""
        server = f"the server's at {self.url}"
        return Description(server, f"8 bits a channel, then {server}", server)

    def __call__(self, images: Tensor, prompts: Sequence[str], references: Tensor | None = None) -> Reward:
        """Score images (B, 3, H, W) in [0, 1]; references (B, 3, H, W) or None. Arguments as `RewardFunction`."""
        check_images(images, "RemoteReward: images")
        if len(prompts) != len(images):
            raise ValueError(f"RemoteReward: prompts: expected {len(images)}, got {len(prompts)}")
        if references is not None:
            check_images(references, "RemoteReward: references")
            if len(references) != len(images):
                raise ValueError(f"RemoteReward: references: expected {len(images)}, got {len(references)}")
        scores: list[float] = []
        for start in range(0, len(images), self.batch_size):
            chunk = slice(start, start + self.batch_size)
            asked = list(prompts[chunk])
            request = {
                "images": encode_images(images[chunk]),
                "prompts": asked,
                "references": None if references is None else encode_images(references[chunk]),
            }
            scores += self._scores(self._post(json.dumps(request).encode()), len(asked))
        return Reward(torch.tensor(scores, dtype=torch.float32, device=images.device))

    def _post(self, body: bytes) -> bytes:
        failure = ""
        attempts = 0
        for attempts in range(1, self.retries + 2):
            if attempts > 1:
                time.sleep(self.backoff * 2 ** (attempts - 2))
            request = urllib.request.Request(self.url, body, self.headers, method="POST")
            try:
                with self._opener.open(request, timeout=self.timeout) as answer:
                    return answer.read()
            except urllib.error.HTTPError as error:
                with error:
                    text = error.read(_EXCERPT).decode(errors="replace")
                failure = f"HTTP {error.code} {error.reason}: {text}"
                if error.code < 500 and error.code not in (408, 429):
                    break  # the same request would fail again
            except (OSError, http.client.HTTPException) as error:
                failure = f"{type(error).__name__}: {error}"
        raise RuntimeError(f"RemoteReward: {self.url}: no answer after {attempts} attempt(s), the last: {failure}")

    def _scores(self, answer: bytes, count: int) -> list[float]:
        try:
            content = json.loads(answer)
        except ValueError as error:
            raise self._unusable(answer, f"no JSON ({error})") from error
        scores = content.get("scores") if isinstance(content, dict) else None
        if not isinstance(scores, list):
            raise self._unusable(answer, 'no list "scores"')
        if len(scores) != count:
            raise self._unusable(answer, f"{len(scores)} scores for {count} images")
        # bool is a number to Python, but no score.
        if any(isinstance(score, bool) or not isinstance(score, int | float | None) for score in scores):
            raise self._unusable(answer, "scores that are neither numbers nor null")
        return [math.nan if score is None else float(score) for score in scores]

    def _unusable(self, answer: bytes, what: str) -> RuntimeError:
        text = answer[:_EXCERPT].decode(errors="replace")
        return RuntimeError(f'RemoteReward: {self.url}: expected {{"scores": [...]}}, got {what}: {text}')


class _NoRedirection(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *arguments: Any) -> None:
        """None makes the redirection an error with its status."""


def encode_images(images: Tensor) -> list[str]:
    """Images (B, 3, H, W) in [0, 1] as PNGs in base64."""
    from PIL import Image

    return [base64.b64encode(png(Image.fromarray(pixels))).decode() for pixels in to_uint8(images)]


def decode_images(encoded: Sequence[str]) -> Tensor:
    """Images (B, 3, H, W) in [0, 1], float32, of PNGs in base64, all of one size; the inverse of `encode_images`."""
    files = [io.BytesIO(base64.b64decode(image)) for image in encoded]
    images = [np.array(read_picture(file, f"decode_images: encoded[{i}]")) for i, file in enumerate(files)]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255


def reward_server(
    reward: RewardFunction, host: str = "127.0.0.1", port: int = 8000, device: str | torch.device = "cpu"
) -> HTTPServer:
    """A server for `RemoteReward`, one request at a time: `reward_server(reward).serve_forever()`.

    It asks nobody who they are: keep it on this host or behind something that does.

    Args:
        reward: what scores; its mask is not sent.
        port: 0 takes a free one: `server.server_port`.
        device: where the images are put for the reward.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            status = 200
            answer: dict[str, Any] = {}
            try:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                images = decode_images(asked["images"]).to(device)
                references = asked.get("references") and decode_images(asked["references"]).to(device)
                scored = reward(images, asked["prompts"], references)
                scores = (scored.scores if isinstance(scored, Reward) else scored).tolist()
                answer["scores"] = [score if math.isfinite(score) else None for score in scores]
            except Exception as error:  # whatever it is, the client shall read it
                status, answer = 500, {"error": f"{type(error).__name__}: {error}"}
            body = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return HTTPServer((host, port), Handler)
