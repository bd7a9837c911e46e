"""Philox against its published answers, the promises of `uniform`, and seeds that follow from seeds."""

from __future__ import annotations

import hashlib

import pytest
import torch

from fastvar.random import derive, philox, uniform


def word(low: int, high: int) -> torch.Tensor:
    """The int64 with these two 32-bit halves."""
    value = (high << 32) | low
    return torch.tensor(value - (1 << 64) if value >> 63 else value)


# The known-answer vectors of Random123 for philox4x32-10: counter, key, result.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]) -> None:
    got = philox(word(*key), word(counter[2], counter[3]), word(counter[0], counter[1]))
    assert tuple(int(g) for g in got) == expected


def test_uniform_is_the_high_bits_of_the_first_word() -> None:
    zero = torch.tensor(0)
    assert uniform(zero, zero, zero).item() == (0x6627E8D5 >> 8) / 2**24
    assert uniform(zero, zero, zero).dtype == torch.float32


def test_broadcasts_and_does_not_depend_on_the_batch() -> None:
    seed, stream, counter = torch.tensor(7), torch.arange(5)[:, None], torch.arange(11)
    numbers = uniform(seed, stream, counter)
    assert numbers.shape == (5, 11)
    assert torch.equal(uniform(seed, stream[3:], counter[4:]), numbers[3:, 4:])
    assert all(w.shape == (5, 11) for w in philox(seed, stream, counter))
    assert uniform(seed, stream[:0], counter).shape == (0, 11)


def test_distribution() -> None:
    numbers = uniform(torch.tensor(1), torch.arange(40)[:, None], torch.arange(2500)).double()
    assert numbers.min() >= 0 and numbers.max() < 1
    # 1e5 draws: the standard error of the mean is 9e-4; a bin of 32 expects 3125 +- 55
    assert abs(numbers.mean() - 0.5) < 4e-3
    assert (torch.histc(numbers, 32, 0, 1) - 3125).abs().max() < 300
    flat = numbers.flatten() - 0.5
    assert abs((flat[1:] * flat[:-1]).mean() * 12) < 0.02
    assert abs((numbers[0] - 0.5).mul(numbers[1] - 0.5).mean() * 12) < 0.1


def test_seeds_and_streams_differ() -> None:
    counter = torch.arange(64)
    rows = [uniform(torch.tensor(s), torch.tensor(t), counter) for s in (0, 1, 1 << 32, -1) for t in (0, 1, 1 << 32)]
    assert len({tuple(row.tolist()) for row in rows}) == len(rows)


def test_wrong_dtype() -> None:
    zero = torch.tensor(0)
    with pytest.raises(ValueError, match=r"philox: counter: expected int64, got torch\.int32"):
        uniform(zero, zero, zero.int())


def test_seeds_for_purposes() -> None:
    """They are those of the definition, and no two of them are alike."""
    digest = hashlib.sha256(b'[7, "rollout", 3]').digest()
    assert derive(7, "rollout", 3) == int.from_bytes(digest[:8], "big") % (2**31 - 1)
    seeds = [derive(seed, word, i) for seed in range(10) for word in ("rollout", "prompts") for i in range(50)]
    assert len({*seeds, derive(0), derive(0, "rollout")}) == len(seeds) + 2
