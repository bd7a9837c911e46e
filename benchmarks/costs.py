"""What the parts of a model cost on one device, on paper: operations, bytes and seconds, used by `benchmarks.scaling`.

Counted for float32 weights under bf16 autocast, as the trainers run. Seconds are lower bounds: each kind of kernel at
its roofline, without launches and the host.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from benchmarks.shapes import MODELS, ModelShape

GIB = 2**30

# Bytes of a token in a block, in units of the width, with a residual stream in float32; the second number of a pair is
# what attention to a text adds.
MATMUL_TRAFFIC = (32, 8)  # inputs and outputs of qkv, proj and MLP: 16 widths in bf16
POINTWISE_TRAFFIC = (58, 16)  # two norms 12, queries and keys 10, two gated residuals 20, GELU 16
# Others.
CAST = 6  # of a parameter, a pass: float32 read, bf16 written
LOGIT_PASSES = 4  # of sampling over float32 logits: written; truncation, normalisation, draw


@dataclass(frozen=True)
class Rates:
    """What an H200 node is taken for; where the numbers are from stands in docs/scaling.md."""

    matmul: float = 790e12  # FLOP/s
    attention: float = 0.6 * 790e12
    convolution: float = 0.5 * 790e12
    bandwidth: float = 0.8 * 4.8e12  # bytes/s of the memory
    capacity: float = 139 * GIB  # bytes of it
    usable: float = 0.9  # share that is planned with
    nvlink: float = 0.8 * 450e9  # bytes/s of a GPU, each direction
    network: float = 0.8 * 50e9  # bytes/s of a GPU's own port
    node: int = 8  # GPUs
    hop: float = 2e-6  # seconds from a GPU to the next in a collective
    reward: float = 0.01  # seconds an image


RATES = Rates()


@dataclass(frozen=True)
class Job:
    """Operations and bytes by kind of kernel: {"linears": (flops, bytes), ...}."""

    work: dict[str, tuple[float, float]]

    def __add__(self, other: Job) -> Job:
        work = dict(self.work)
        for kind, (flops, bytes_) in other.work.items():
            own = work.get(kind, (0.0, 0.0))
            work[kind] = (own[0] + flops, own[1] + bytes_)
        return Job(work)

    def __mul__(self, times: float) -> Job:
        return Job({kind: (times * flops, times * bytes_) for kind, (flops, bytes_) in self.work.items()})

    @property
    def flops(self) -> float:
        return sum(flops for flops, _ in self.work.values())

    @property
    def bytes(self) -> float:
        return sum(bytes_ for _, bytes_ in self.work.values())

    @property
    def seconds(self) -> float:
        """Each kind at its roofline, one after the other."""
        peak = {"attention": RATES.attention, "convolutions": RATES.convolution}
        return sum(
            max(flops / peak.get(kind, RATES.matmul), bytes_ / RATES.bandwidth)
            for kind, (flops, bytes_) in self.work.items()
        )


def total(jobs: Iterable[Job]) -> Job:
    """Operations and bytes of jobs. Their seconds add up to more: each of them has a roofline of its own."""
    return sum(jobs, Job({}))


@dataclass(frozen=True)
class Architecture:
    """What a model's shape leaves open. The defaults will do where operations alone are asked for."""

    shape: ModelShape
    middle: int = 1  # m, scales before it are the coarse segment
    shared_adaln: bool = False  # one modulation for all blocks plus a table for each, instead of a layer in each
    text: int = 0  # tokens of a prompt that every block attends to; 0 for a class condition
    parameters: int = 0
    block_parameters: int = 0
    decoder_flops: float = 0.0  # of decoding an image
    decoder_bytes: float = 0.0  # of its memory: bf16 in, norm and SiLU in float32, at the widest layer

    @property
    def tokens(self) -> int:
        return self.shape.tokens

    @property
    def scales(self) -> int:
        return len(self.shape.schedule)

    @property
    def coarse_tokens(self) -> int:
        return self.shape.schedule.starts[self.middle]

    @property
    def logits(self) -> int:
        """Logits of a token: one for each code, or two for each bit."""
        return self.shape.vocab_size or 2 * self.shape.channels

    @property
    def token_weights(self) -> int:
        """Weights of a block that multiply every token."""
        return (14 if self.text else 12) * self.shape.width**2

    @property
    def cache_bytes(self) -> int:
        """Keys and values of a token in bf16."""
        return 2 * 2 * self.shape.width * self.shape.depth


def _architecture(name: str, *counts: int, **fields: Any) -> Architecture:
    """With a coarse segment that ends with a quarter of the finest side, as in VMR's paper."""
    grids = MODELS[name].schedule.grids
    middle = sum(4 * side <= grids[-1][0] for side, _ in grids)
    fields |= zip(("parameters", "block_parameters", "decoder_flops"), counts, strict=True)
    return Architecture(MODELS[name], middle, **fields)


# Counted on our VAR and decoders and on the public classes of Infinity.
_INFINITY: dict[str, Any] = {"shared_adaln": True, "text": 64, "decoder_bytes": 10 * 256 * 1024**2}
ARCHITECTURES = {
    "VAR-d30": _architecture("VAR-d30", 2_010_020_356, 66_382_110, 393_708_830_720, decoder_bytes=10 * 160 * 256**2),
    "Infinity-2B": _architecture("Infinity-2B", 2_204_564_032, 67_147_792, 9_848_225_792_000, **_INFINITY),
    "Infinity-8B": _architecture("Infinity-8B", 8_375_791_824, 205_589_020, 9_887_786_467_328, **_INFINITY),
}


def blocks(model: Architecture, rows: float, tokens: float, pairs: float, keys: float) -> Job:
    """All blocks forward, with the codes' embedding.

    Args:
        rows: of the batch.
        tokens: of a row.
        pairs: of query and visible key of a row.
        keys: whose keys and values are read, over all rows.
    """
    shape, c = model.shape, model.shape.width
    every = rows * tokens * shape.depth  # tokens times blocks
    matmul, pointwise = (a + b * bool(model.text) for a, b in (MATMUL_TRAFFIC, POINTWISE_TRAFFIC))
    linears = 2 * every * model.token_weights + 2 * rows * tokens * shape.channels * c
    moved = 2 * shape.depth * model.token_weights + every * c * matmul
    attention = 4 * c * shape.depth * rows * (pairs + tokens * model.text)
    read = every * c * 2 * 2 + keys * model.cache_bytes  # queries and results; keys and values
    return Job({"linears": (linears, moved), "attention": (attention, read), "pointwise": (0.0, every * c * pointwise)})


def condition(model: Architecture, rows: float) -> Job:
    """What is made once for each row: modulations, and keys and values of its text."""
    shape, c = model.shape, model.shape.width
    weights = 6 * c**2 * (1 if model.shared_adaln else shape.depth) + 2 * c**2
    flops = 2 * rows * weights
    if model.text:
        weights += shape.depth * 2 * c**2
        flops += 2 * rows * model.text * shape.depth * 2 * c**2
    return Job({"linears": (flops, 2 * weights)})


def head(model: Architecture, tokens: float, passes: float = 0.0) -> Job:
    """Logits of tokens, and `passes` over them in float32."""
    c = model.shape.width
    moved = 2 * c * (model.logits + tokens) + 4 * passes * tokens * model.logits
    return Job({"head": (2 * tokens * model.logits * c, moved)})


def decoding(model: Architecture, images: float) -> Job:
    return Job({"convolutions": (images * model.decoder_flops, 0.0)})


def sampling(model: Architecture, rows: float, first: int = 0, stop: int | None = None, forks: int = 1) -> list[Job]:
    """Scales first to stop of cached sampling, each a job; with the first scale of all the condition is made too.

    Args:
        forks: adjacent rows that share the keys and values of the scales before `first`.
    """
    schedule, jobs = model.shape.schedule, []
    trunk = schedule.starts[first]
    for new, end in list(zip(schedule.lengths, schedule.ends, strict=True))[first:stop]:
        keys = rows * (end - trunk) + rows / forks * trunk
        job = blocks(model, rows, new, new * end, keys) + head(model, rows * new, LOGIT_PASSES)
        jobs.append(job + Job({"pointwise": (0.0, rows * new * model.cache_bytes)}))  # written to the cache
    if first == 0:
        jobs[0] += condition(model, rows)
    return jobs


def visible(model: Architecture, scales: int) -> tuple[int, int]:
    """Tokens of the first scales, and pairs of query and visible key among them."""
    schedule = model.shape.schedule.truncated(scales)
    return schedule.num_tokens, sum(n * e for n, e in zip(schedule.lengths, schedule.ends, strict=True))


def subject(model: Architecture, tokens: float, prefixes: float) -> Job:
    """What prefixes of subjects, each as long as an image, add to a pass of so many tokens: attention to them, and
    their own pass through all blocks but the last, of which there are only the keys and values. Operations alone."""
    shape, c = model.shape, model.shape.width
    length, pairs = visible(model, model.scales)
    weights = (shape.depth - 1) * model.token_weights + 3 * c**2 + shape.channels * c
    linears = 2 * prefixes * length * weights + condition(model, prefixes).flops
    attention = 4 * c * ((shape.depth - 1) * prefixes * pairs + shape.depth * tokens * length)
    return Job({"linears": (linears, 0.0), "attention": (attention, 0.0)})


def forward(model: Architecture, rows: float, scales: int, prefixes: float = 0.0) -> Job:
    """Teacher forcing without the head, with so many subjects' prefixes."""
    tokens, pairs = visible(model, scales)
    cast = Job({"pointwise": (0.0, CAST * model.parameters)})
    job = blocks(model, rows, tokens, pairs, rows * tokens) + condition(model, rows) + cast
    return job + subject(model, rows * tokens, prefixes) if prefixes else job


def reference(model: Architecture, rows: float, scales: int) -> Job:
    """The reference's part of an exact KL: hidden states, and its logits for the loss and again for its gradient."""
    return forward(model, rows, scales) + head(model, rows * visible(model, scales)[0]) * 2


def training(
    model: Architecture, rows: float, scales: int, checkpointing: bool = False, prefixes: float = 0.0
) -> tuple[Job, Job]:
    """Forward and backward of a policy loss; its backward pass makes the logits again."""
    tokens, pairs = visible(model, scales)
    once, logits = forward(model, rows, scales, prefixes), head(model, rows * tokens)
    back = (once * 2).work
    flops, bytes_ = back["linears"]
    # the codes need no gradient; gradients of the weights are added in float32
    no_gradient = 2 * rows * tokens * model.shape.channels * model.shape.width
    back["linears"] = (flops - no_gradient, bytes_ + 8 * model.parameters)
    back["attention"] = (2.5 * once.work["attention"][0], back["attention"][1])  # five products instead of two
    backward = Job(back) + logits * 3
    if checkpointing:
        backward += blocks(model, rows, tokens, pairs, rows * tokens)
    return once + logits, backward
