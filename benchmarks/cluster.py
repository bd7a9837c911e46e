"""VMR-GRPO on 1 to 1,024 GPUs, on paper: what an iteration does, what it keeps in memory and how long it takes.

Arithmetic with assumed rates, used by `benchmarks.scaling`; nothing of it was measured on several GPUs. It follows the
trainer as it is: float32 parameters under bf16 autocast, averaged weights and reference sharded where weights are.
Communication is hidden behind work as well as it can be.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

from benchmarks.costs import RATES, Architecture, Job, decoding, reference, sampling, training

# Bytes of a token in a block, in units of the width; the second number is what attention to a text adds.
SAVED = (44, 10)  # for the backward pass: the residual twice 8, and 18 widths in bf16
LIVE = 26  # at once without gradient: the residual 4, a norm's output 6, the MLP's two 16
ADAMW, AVERAGE = 28, 12  # bytes of a parameter that the optimizer and the averaged weights read and write
SEGMENTS = ("coarse", "fine")


@dataclass(frozen=True)
class Plan:
    """A cycle of VMR-GRPO on each GPU; the defaults are the paper's group, continuations, alternation and guidance."""

    segments: int = 16  # of an iteration on each GPU
    group: int = 16  # G
    continuations: int = 2  # K
    guided: bool = True  # whether sampling runs unconditional rows too
    coarse_updates: int = 3  # iterations of the coarse segment to one of the fine one
    micro_batch: int = 16  # segments of one forward and backward pass
    chunk: int = 32  # images drawn at a time
    checkpointing: bool = False  # whether blocks are recomputed in updates of the fine segment

    @property
    def rows(self) -> int:
        """Rows that sampling has for each image: two with guidance."""
        return 2 if self.guided else 1

    def images(self, segment: str) -> int:
        return self.segments * (self.continuations if segment == "coarse" else 1)


@dataclass(frozen=True)
class Cluster:
    """GPUs, and whether weights, copies, gradients and optimizer are sharded over them (FSDP2) or whole (DDP)."""

    gpus: int = 1
    sharded: bool = False

    @property
    def shards(self) -> int:
        return self.gpus if self.sharded else 1


def work(model: Architecture, plan: Plan, segment: str, shards: int = 1) -> dict[str, list[Job]]:
    """What a GPU does in an iteration, by part: jobs that run one after the other."""
    scales, size = model.scales, plan.micro_batch
    if segment == "coarse":  # as many tokens at once
        scales, size = model.middle, min(size * (model.tokens // model.coarse_tokens), plan.segments)
    passes = -(-plan.segments // size)
    checkpointing = plan.checkpointing and segment == "fine"
    return {
        "rollout": rollout(model, plan, segment),
        "decoding": [decoding(model, plan.images(segment))],
        "reference": [reference(model, size, scales)] * passes,
        "update": [*training(model, size, scales, checkpointing)] * passes,
        "optimizer": [Job({"pointwise": (0.0, model.parameters * (ADAMW + AVERAGE) / shards)})],
    }


def rollout(model: Architecture, plan: Plan, segment: str) -> list[Job]:
    """All scales of a chunk, for every chunk."""
    if segment == "coarse":
        states = drawn = min(plan.chunk // plan.continuations, plan.segments)
        forks = plan.continuations
    else:  # the images of a group continue one coarse segment
        drawn = min(plan.chunk, plan.segments)
        forks = min(plan.group, drawn)
        states = drawn // forks
    rows = states * plan.rows
    chunk = sampling(model, rows, 0, model.middle) + sampling(model, rows * forks, model.middle, forks=forks)
    return chunk * -(-plan.segments // drawn)


class Memory(NamedTuple):
    """Bytes of a GPU."""

    weights: float
    optimizer: float
    buckets: float  # of DDP, for gradients; kept from step to step
    gradients: float  # beside the buckets: those of passes without synchronisation, which are whole under FSDP2 too
    copies: float  # averaged weights and reference
    halves: float  # bf16 copies that autocast keeps, and layers that are gathered
    activations: float  # of a micro-batch
    sampling: float  # cache, activations and decoder of a chunk

    @property
    def kept(self) -> float:
        return self.weights + self.optimizer + self.buckets + self.copies + self.halves

    @property
    def peak(self) -> float:
        """The largest of an update or of a rollout."""
        return self.kept + max(self.gradients + self.activations, self.sampling)


def memory(model: Architecture, plan: Plan, cluster: Cluster) -> Memory:
    """What a GPU holds; the loss makes its logits in chunks."""
    whole = 4 * model.parameters
    shard, buckets = whole / cluster.shards, whole if cluster.gpus > 1 and not cluster.sharded else 0
    return Memory(
        weights=shard,
        optimizer=2 * shard,
        buckets=buckets,
        gradients=whole if plan.micro_batch < plan.segments else 0 if buckets else shard,
        copies=2 * shard,
        halves=whole / 2 + (2 * 4 * model.block_parameters if cluster.sharded else 0),
        activations=activations(model, plan.micro_batch, plan.checkpointing),
        sampling=cache(model, plan) + drawing(model, plan),
    )


def activations(model: Architecture, rows: float, checkpointing: bool) -> float:
    """Saved for the backward pass of the fine segment's update."""
    tokens = rows * model.tokens * model.shape.width
    saved = SAVED[0] + SAVED[1] * bool(model.text)
    return tokens * (4 * model.shape.depth + saved if checkpointing else saved * model.shape.depth)


def cache(model: Architecture, plan: Plan) -> float:
    """Of a chunk of the coarse rollout: a trunk for each segment and what its forks add."""
    rows, fine = plan.chunk * plan.rows, model.tokens - model.coarse_tokens
    return model.cache_bytes * (rows / plan.continuations * model.coarse_tokens + rows * fine)


def drawing(model: Architecture, plan: Plan) -> float:
    """Of a chunk: the last scale's activations and logits, or the decoder's."""
    rows, last = plan.chunk * plan.rows, model.shape.schedule.lengths[-1]
    return max(rows * last * (LIVE * model.shape.width + 4 * model.logits), plan.chunk * model.decoder_bytes)


def fit(model: Architecture, cluster: Cluster, plan: Plan) -> Plan | None:
    """The plan with the largest chunk and micro-batch that fit, blocks recomputed only where a segment does not fit
    otherwise; None where nothing does."""
    chunks = [size for size in _halves(plan.images("coarse")) if size >= plan.continuations]
    for chunk, again, size in product(chunks, (False, True), _halves(plan.segments)):
        candidate = replace(plan, chunk=chunk, checkpointing=again, micro_batch=size)
        if memory(model, candidate, cluster).peak <= RATES.capacity * RATES.usable:
            return candidate
    return None


def _halves(size: int) -> list[int]:
    return [size >> i for i in range(size.bit_length())]


class Transfer(NamedTuple):
    """Bytes that each GPU takes in, and the seconds of that."""

    bytes: float
    seconds: float


def gather(bytes_: float, calls: float, gpus: int) -> Transfer:
    """All-gathers, or reduce-scatters, of so many bytes in all: rings."""
    taken = bytes_ * (gpus - 1) / gpus
    return Transfer(taken, taken / _bus(gpus) + calls * (gpus - 1) * RATES.hop)


def all_reduce(bytes_: float, gpus: int) -> Transfer:
    """DDP's all-reduce: 2 (N - 1) / N of the bytes, in buckets of 25 MiB whose latency is a tree's."""
    taken, buckets = 2 * bytes_ * (gpus - 1) / gpus, bytes_ / (25 * 2**20)
    return Transfer(taken, taken / _bus(gpus) + buckets * 2 * math.log2(gpus) * RATES.hop)


def _bus(gpus: int) -> float:
    """Bytes a second of a collective through each GPU: what a node needs from others comes in by all of its ports."""
    return RATES.nvlink if gpus <= RATES.node else min(RATES.nvlink, RATES.node * RATES.network)


def communication(model: Architecture, cluster: Cluster, jobs: Mapping[str, list[Job]]) -> list[tuple[Transfer, float]]:
    """An iteration's transfers, each with the seconds of the work behind which it can hide: that of the same scale or
    pass. Gradients are reduced in the last pass."""
    gpus, depth, back = cluster.gpus, model.shape.depth, jobs["update"][-1].seconds
    if not cluster.sharded:
        return [(all_reduce(4 * model.parameters, gpus), back)]

    def layers(times: int) -> Transfer:
        return gather(times * 4 * depth * model.block_parameters, times * depth, gpus)

    # blocks that have modulations of their own make them before anything else
    first = 0 if model.shared_adaln else 1
    last = gather(4 * (model.parameters + (1 + first) * depth * model.block_parameters), (2 + first) * depth, gpus)
    return [
        *[(layers(first), 0.0)] * (len(jobs["rollout"]) // model.scales),  # chunks
        *((layers(1), job.seconds) for job in jobs["rollout"]),
        *((layers(1 + first), job.seconds) for job in (*jobs["reference"], *jobs["update"][:-1])),
        (last, back),
    ]


@dataclass(frozen=True)
class Step:
    """An iteration or a cycle on each GPU."""

    seconds: dict[str, float]  # by part; "waiting" is for communication that nothing hides
    received: float  # bytes from other GPUs

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    def share(self, part: str) -> float:
        return self.seconds[part] / self.total


def iteration(model: Architecture, plan: Plan, cluster: Cluster, segment: str) -> Step:
    """One rollout and its update."""
    jobs = work(model, plan, segment, cluster.shards)
    transfers = communication(model, cluster, jobs)
    seconds = {part: sum(job.seconds for job in own) for part, own in jobs.items()}
    seconds["reward"] = RATES.reward * plan.images(segment)
    seconds["waiting"] = sum(max(transfer.seconds - hidden, 0.0) for transfer, hidden in transfers)
    return Step(seconds, sum(transfer.bytes for transfer, _ in transfers))


def cycle(model: Architecture, plan: Plan, cluster: Cluster) -> Step:
    """The coarse iterations and the fine one."""
    coarse, fine = (iteration(model, plan, cluster, segment) for segment in SEGMENTS)
    times = plan.coarse_updates
    seconds = {part: times * coarse.seconds[part] + fine.seconds[part] for part in fine.seconds}
    return Step(seconds, times * coarse.received + fine.received)
