"""Counter-based random numbers: the same (seed, stream, counter) gives the same number on any device, in any batch; and
the seeds that follow from the seed of a run."""

from __future__ import annotations

import hashlib
import json

import torch

_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def derive(seed: int, *purpose: str | int) -> int:
    """The seed for one purpose of a run, such as derive(seed, "rollout", 3) for its fourth rollout.

    Other words or numbers, or another seed, give a seed that has nothing to do with it, where sums of seeds and numbers
    would meet: seed 1 and number 0, seed 0 and number 1.

    Args:
        seed: of the run.
        purpose: words and numbers that name it.

    Returns:
        The first eight bytes of the SHA-256 of the JSON list of all arguments, as a big-endian number, modulo 2^31 - 1:
        from 0 to 2^31 - 2, which all generators take.
    """
    digest = hashlib.sha256(json.dumps([seed, *purpose]).encode()).digest()
    return int.from_bytes(digest[:8], "big") % (2**31 - 1)


def philox(seed: torch.Tensor, stream: torch.Tensor, counter: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Philox-4x32-10: 128 random bits for each (seed, stream, counter).

    The key is (low 32 bits of seed, high 32 bits of seed), the counter words are (counter low, counter high, stream
    low, stream high). Negative numbers stand for their two's complement.

    Args:
        seed: int64, any shape.
        stream: int64, broadcasts with seed, such as the index of a sample.
        counter: int64, broadcasts with both, such as the position of a token.

    Returns:
        Four int64 tensors of the broadcast shape, each in [0, 2**32).

    Raises:
        ValueError: a tensor that is not int64.

    Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011).
    """
    for name, tensor in (("seed", seed), ("stream", stream), ("counter", counter)):
        if tensor.dtype != torch.int64:
            raise ValueError(f"philox: {name}: expected int64, got {tensor.dtype}")
    # Words are 32-bit numbers in int64. A product of two of them wraps around in int64, which keeps all its 64 bits.
    key0, key1 = seed & _LOW, (seed >> 32) & _LOW
    word0, word1 = counter & _LOW, (counter >> 32) & _LOW
    word2, word3 = stream & _LOW, (stream >> 32) & _LOW
    for _ in range(_ROUNDS):
        product0, product1 = word0 * _MULTIPLIERS[0], word2 * _MULTIPLIERS[1]
        word0 = ((product1 >> 32) & _LOW) ^ word1 ^ key0
        word2 = ((product0 >> 32) & _LOW) ^ word3 ^ key1
        word1, word3 = product1 & _LOW, product0 & _LOW
        key0, key1 = (key0 + _KEY_STEPS[0]) & _LOW, (key1 + _KEY_STEPS[1]) & _LOW
    return tuple(torch.broadcast_tensors(word0, word1, word2, word3))


def uniform(seed: torch.Tensor, stream: torch.Tensor, counter: torch.Tensor) -> torch.Tensor:
    """Uniform numbers in [0, 1): the high 24 bits of `philox`'s first word, so that each is exact in float32.

    Args:
        seed: int64, any shape.
        stream: int64, broadcasts with seed.
        counter: int64, broadcasts with both.

    Returns:
        float32 of the broadcast shape, a multiple of 2**-24.

    Raises:
        ValueError: a tensor that is not int64.
    """
    return (philox(seed, stream, counter)[0] >> 8).to(torch.float32) * 2.0**-24
