"""HPSv3 behind HTTP, for the reward "remote": python server.py --port 8000, in the environment of requirements.txt.

    fastvar rl ... --rewards remote --reward-options remote.url=http://HOST:8000

A 7B vision-language model, which is downloaded at the first start. One request is scored at a time. It asks nobody
who they are: keep it on this host or behind something that does. The protocol is that of fastvar.rl.rewards.remote;
this file stands alone, as HPSv3 lives in another environment than fastvar.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import math
from http.server import BaseHTTPRequestHandler, HTTPServer

from PIL import Image


class HPSv3:
    """Scores (higher is better) of images for prompts: the mean that the model predicts.

    Args:
        device: such as "cuda".
        batch_size: images that go through the model at once.
    """

    def __init__(self, device, batch_size):
        from hpsv3 import HPSv3RewardInferencer

        self.model, self.batch_size = HPSv3RewardInferencer(device=device), batch_size

    def __call__(self, images, prompts):
        scores = []
        for start in range(0, len(images), self.batch_size):
            part = slice(start, start + self.batch_size)
            # by name: their order is another one in other versions
            predicted = self.model.reward(prompts=prompts[part], image_paths=images[part])
            scores += [float(mean) for mean, *_ in predicted]  # mean and spread of each image
        return scores


def server(score, host, port):
    """An HTTP server around `score(PIL images, prompts) -> numbers`; port 0 takes a free one."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            status = 200
            try:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                images = [Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB") for png in asked["images"]]
                scores = score(images, asked["prompts"])
                answer = {"scores": [value if math.isfinite(value) else None for value in scores]}
            except Exception as error:  # whatever it is, the client shall read it
                status, answer = 500, {"error": f"{type(error).__name__}: {error}"}
            body = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return HTTPServer((host, port), Handler)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch-size", type=int, default=8)
    given = parser.parse_args()
    server(HPSv3(given.device, given.batch_size), given.host, given.port).serve_forever()
