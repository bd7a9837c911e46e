"""residual_quantize and accumulate_scale in C++ against float64; once more with the libraries for other processors."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastvar import build
from fastvar.ops import ResidualConv, _checks, accumulate_scale, explain, residual_quantize
from fastvar.ops._extension import missing
from fastvar.schedule import VAR_256, ScaleSchedule
from tests.helpers.bounds import assert_as_accurate
from tests.helpers.replay import replayed
from tests.helpers.samples import noise
from tests.ops.test_residual_quantize import make_phi

if missing("cpu") is not None:
    pytest.skip(str(missing("cpu")), allow_module_level=True)

from fastvar.kernels.residual_quantize import impl_cpp

explain("residual_quantize", torch.zeros(1))  # loads the library
UNIT = torch.ops.fastvar_cpu.vector_unit()  # 17: 16 floats and products of bfloat16
LEVELS, CAPABILITY = list(build.LEVELS), torch.backends.cpu.get_cpu_capability().lower()
LESS = LEVELS[: LEVELS.index(CAPABILITY)] if CAPABILITY in LEVELS else []
RECTANGLES = ScaleSchedule((1, (2, 3), (2, 5), (5, 7)))


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    threads, screen = torch.get_num_threads(), impl_cpp.SCREEN
    yield
    torch.set_num_threads(threads)
    impl_cpp.SCREEN = screen


CASES = [
    (VAR_256, 32, 700, 4),
    (VAR_256, 8, 64, 1),
    (RECTANGLES, 12, 50, 2),
    (RECTANGLES, 64, 333, 4),
    (RECTANGLES, 3, 5, 0),
    (ScaleSchedule((1, 1)), 16, 1, 2),
    (ScaleSchedule(((3, 1), (6, 9), (6, 9))), 16, 129, 3),
]


@pytest.mark.parametrize("znorm", [False, True])
@pytest.mark.parametrize(("schedule", "channels", "size", "convs"), CASES)
def test_nearest_codes_and_what_they_add(
    schedule: ScaleSchedule, channels: int, size: int, convs: int, znorm: bool
) -> None:
    """A token may differ from the reference's only where both codes are as near but for roundings."""
    features, codebook = noise(3, channels, *schedule.finest), noise(size, channels, seed=1)
    phi = make_phi(channels, len(schedule), convs) if convs else None
    found = residual_quantize(features, codebook, schedule, phi=phi, znorm=znorm, backend="cpu")
    excess, rounding, feature_map, inputs = replayed(found.tokens, features, codebook, schedule, phi, znorm)
    assert bool((excess <= 8 * rounding).all()), float((excess / rounding).max())
    assert int((excess > 0).sum()) <= 2  # ties but for roundings are rare
    torch.testing.assert_close(found.feature_map, feature_map.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.teacher_forcing, inputs.float(), rtol=1e-5, atol=1e-5)
    assert torch.equal(found.usage, found.tokens.flatten().bincount(minlength=size))


def hard_codebooks() -> dict[str, torch.Tensor]:
    near = noise(300, 16, seed=1)
    beside = near.clone()
    beside[::2] += 1e-4 * noise(150, 16, seed=2)  # pairs that bfloat16 cannot tell apart
    mixed = near.clone()
    mixed[5], mixed[77, 3], mixed[100] = torch.nan, torch.inf, 1e20
    return {
        "plain": near,
        "pairs": torch.cat([near, beside]),
        "far from zero": 100 + near,
        "all in one place": 3 + 1e-5 * near,
        "tiny": 1e-20 * near,
        "huge": 1e15 * near,
        "not all finite": mixed,
        "repeated": near[:20].repeat(30, 1),
    }


@pytest.mark.skipif(UNIT < 17, reason="this processor does not multiply bfloat16")
@pytest.mark.parametrize("rounded", ["neither", "features", "codes"])
@pytest.mark.parametrize("znorm", [False, True])
@pytest.mark.parametrize("name", list(hard_codebooks()))
def test_the_screen_never_changes_a_token(name: str, znorm: bool, rounded: str) -> None:
    """Where features are bfloat16 already, only the codes' rounding matters, and the other way round."""
    codebook = hard_codebooks()[name]
    size = float(codebook.nan_to_num(0, 0, 0).abs().median())
    features = size * noise(3, 16, 8, 8)
    features[0, :, 0, 0] = 0
    schedule = ScaleSchedule((1, (3, 5), (8, 8)))
    if rounded == "features":
        features, schedule = features.bfloat16().float(), ScaleSchedule((8,))
    elif rounded == "codes":
        codebook = codebook.bfloat16().float()
    for shift in (0, size):
        check_screen(features + shift, codebook, schedule, znorm)


@pytest.mark.skipif(UNIT < 17, reason="this processor does not multiply bfloat16")
def test_the_screen_counts_roundings_of_its_sums() -> None:
    """Codes as long as one another, which bfloat16 holds: all that is wrong are the roundings of sums."""
    generator = torch.Generator().manual_seed(0)
    first = noise(16).bfloat16().float()
    codebook = torch.stack([first[torch.randperm(16, generator=generator)] for _ in range(2000)])
    for scale in (1e-4, 1e-5):
        features = (scale * noise(32, 16, 8, 8, seed=1)).bfloat16().float()
        check_screen(features, codebook, ScaleSchedule((8,)), znorm=False)


def check_screen(features: torch.Tensor, codebook: torch.Tensor, schedule: ScaleSchedule, znorm: bool) -> None:
    found = []
    for impl_cpp.SCREEN in (True, False):
        found.append(residual_quantize(features, codebook, schedule, znorm=znorm, backend="cpu"))
    for screened, plain in zip(*found, strict=True):
        assert torch.equal(screened.nan_to_num(), plain.nan_to_num())


@pytest.mark.skipif(UNIT < 17, reason="this processor does not multiply bfloat16")
def test_a_nan_that_rounds_to_zero_hides_nothing() -> None:
    """The last of all NaN overflows to minus zero as it is rounded, nearer than codes that point away."""
    codebook = -noise(90, 16).abs()
    codebook[4] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    check_screen(noise(2, 16, 8, 8).abs(), codebook, ScaleSchedule((8,)), True)


def test_the_first_of_equal_codes() -> None:
    codebook = noise(5, 3).repeat(60, 1)
    for znorm in (False, True):
        found = residual_quantize(
            noise(2, 3, 4, 4, seed=1), codebook, ScaleSchedule((1, 2, 4)), znorm=znorm, backend="cpu"
        )
        assert found.tokens.max() < 5


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_neither_batch_nor_threads_matter(threads: int) -> None:
    """Images that a thread has for itself and those that all threads share, few rows and many."""
    features, codebook, phi = noise(5, 16, 16, 16), noise(400, 16, seed=1), make_phi(16, 10, 4)
    torch.set_num_threads(1)
    alone = [residual_quantize(image[None], codebook, VAR_256, phi=phi, backend="cpu") for image in features]
    torch.set_num_threads(threads)
    for batch in range(6):
        found = residual_quantize(features[:batch], codebook, VAR_256, phi=phi, backend="cpu")
        for i in range(batch):
            assert all(torch.equal(one[i : i + 1], other) for one, other in zip(found[:3], alone[i], strict=False))
        assert torch.equal(found.usage, sum((each.usage for each in alone[:batch]), torch.zeros(400).long()))


@pytest.mark.parametrize("znorm", [False, True])
def test_what_is_not_finite_never_leaves_the_codebook(znorm: bool) -> None:
    features, codebook = noise(3, 8, 4, 4), noise(70, 8, seed=1)
    features[0] = torch.nan
    features[1, :, 0, 0], features[2, 0] = torch.inf, -torch.inf
    codebook[0, 0], codebook[3] = torch.nan, torch.inf
    tokens = residual_quantize(
        features, codebook, ScaleSchedule((1, 4)), phi=make_phi(8, 2), znorm=znorm, backend="cpu"
    ).tokens
    assert tokens[0].tolist() == [0] * 17
    assert tokens.min() >= 0 and tokens.max() < 70
    nothing = residual_quantize(features[:, :0], codebook[:, :0], ScaleSchedule((1, 4)), znorm=znorm, backend="cpu")
    assert nothing.tokens.eq(0).all()


@pytest.mark.parametrize(
    ("argument", "value"),
    [("features", torch.nan), ("codebook", torch.inf), ("phi.weight", torch.nan), ("phi.bias", -torch.inf)],
)
def test_debug_mode_names_the_argument(argument: str, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    schedule, phi = ScaleSchedule((1, 2)), make_phi(4, 2)
    features, codebook = noise(1, 4, 2, 2), noise(9, 4)
    broken = {"features": features, "codebook": codebook, "phi.weight": phi.weight, "phi.bias": phi.bias}[argument]
    broken.view(-1)[1] = value
    residual_quantize(features, codebook, schedule, phi=phi)
    monkeypatch.setattr(_checks, "DEBUG", True)
    message = f"{argument}: expected finite numbers, got 1"
    with pytest.raises(ValueError, match=f"residual_quantize: {message}"):
        residual_quantize(features, codebook, schedule, phi=phi)
    with pytest.raises(ValueError, match=f"accumulate_scale: {message.replace('features', 'feature_map')}"):
        accumulate_scale(torch.zeros(1, 1, dtype=torch.int64), features, codebook, schedule, 0, phi=phi)


def test_debug_mode_looks_at_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_checks, "DEBUG", True)
    with pytest.raises(ValueError, match="accumulate_scale: tokens: expected indices from 0 to 8, got 3 to 9"):
        accumulate_scale(torch.tensor([[3, 4, 5, 9]]), noise(1, 4, 2, 2), noise(9, 4), ScaleSchedule((1, 2)), 1)


@pytest.mark.parametrize("room", [4, 12])
@pytest.mark.parametrize("threads", [1, 2])
def test_without_memory(threads: int, room: int) -> None:
    """An error in the middle of the work, after which the process goes on."""
    script = """
import resource, sys
import torch
from fastvar import ScaleSchedule
from fastvar.ops import residual_quantize
threads, room = map(int, sys.argv[1:])
torch.set_num_threads(threads)
codebook, features = torch.randn(100, 2), torch.randn(1, 2, 256, 256)
def run(side):
    small = features[..., :side, :side].contiguous()
    return residual_quantize(small, codebook, ScaleSchedule((side,)), backend="cpu").tokens
expected = run(64)
run(64)
used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize"))
limits = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, ((used + 1024 * room) * 1024, limits[1]))
try:
    run(256)
except (MemoryError, RuntimeError):
    print("no memory")
resource.setrlimit(resource.RLIMIT_AS, limits)
assert torch.equal(run(64), expected)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(threads), str(room)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and done.stdout == "no memory\n", done.stdout + done.stderr


@pytest.mark.parametrize(("channels", "scale"), [(32, 0), (12, 1), (5, 2), (64, 3)])
@pytest.mark.parametrize("with_phi", [False, True])
def test_steps_and_their_gradients(channels: int, scale: int, with_phi: bool) -> None:
    schedule = RECTANGLES
    arguments = {"feature_map": noise(3, channels, 5, 7), "codebook": noise(9, channels, seed=1)}
    if with_phi:
        weight = noise(channels, channels, 3, 3) / (9 * channels) ** 0.5
        arguments |= {"phi_weight": weight, "phi_bias": noise(channels, seed=2)}
    tokens = torch.arange(3 * schedule.lengths[scale]).view(3, -1) % 7  # the last two codes stand for nothing

    def run(dtype: torch.dtype, backend: str) -> list[torch.Tensor]:
        leaves = {name: value.to(dtype).requires_grad_() for name, value in arguments.items()}
        convs = None
        if with_phi:
            convs = ResidualConv(leaves["phi_weight"][None], leaves["phi_bias"][None], 0.3, (0,) * len(schedule))
        step = accumulate_scale(
            tokens, leaves["feature_map"], leaves["codebook"], schedule, scale, phi=convs, backend=backend
        )
        results = [r for r in step if r is not None]
        grads = [noise(*r.shape, dtype=torch.float64, seed=4).to(dtype) for r in results]
        return [*(r.detach() for r in results), *torch.autograd.grad(results, list(leaves.values()), grads)]

    exact, plain = run(torch.float64, "reference"), run(torch.float32, "reference")
    for got, own, want in zip(run(torch.float32, "cpu"), plain, exact, strict=True):
        assert_as_accurate(got, own, want)


def test_gradients_do_not_depend_on_the_threads() -> None:
    feature_map, codebook, phi = noise(5, 16, 16, 16), noise(40, 16, seed=1).requires_grad_(), make_phi(16, 10, 1)
    leaves = [codebook, phi.weight.requires_grad_(), phi.bias.requires_grad_()]
    tokens = torch.arange(5 * 25).view(5, 25) % 40
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        step = accumulate_scale(tokens, feature_map, codebook, VAR_256, 4, phi=phi, backend="cpu")
        found.append(torch.autograd.grad((step.feature_map.square().sum(), step.next_input.sum()), leaves))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("token", [-1, 9])
def test_tokens_that_do_not_exist(token: int) -> None:
    tokens = torch.tensor([[token]])
    with pytest.raises(RuntimeError, match=f"accumulate_scale: tokens: expected 0 to 8, got {token}"):
        accumulate_scale(tokens, noise(1, 4, 5, 7), noise(9, 4), RECTANGLES, 0, backend="cpu")


def test_auto_takes_it() -> None:
    for op in ("residual_quantize", "accumulate_scale"):
        assert explain(op, noise(1, 4, 5, 7)).backend == "cpu"
        told = explain(op, noise(1, 4, 5, 7, dtype=torch.float64))
        assert told.backend == "reference" and told.reasons["cpu"] == "computes in float32, the tensor is float64"


@pytest.mark.parametrize(
    ("place", "wrong", "message"),
    [
        (0, noise(1, 4, 5, 6), r"features: expected shape \(\*, \*, 5, 7\)"),
        (0, noise(1, 5, 4, 7).transpose(1, 2), "features: expected a contiguous tensor"),
        (1, noise(9, 5), r"codebook: expected shape \(\*, 4\)"),
        (5, [0, 0, 2, 0], "phi_index: expected 0 to 1, got 2"),
        (6, [1, 1, 6, 1, 5, 7], "grids: expected 1 to 5, got 6"),
        (9, torch.zeros(1, 51, dtype=torch.int64), r"tokens: expected shape \(1, 52\), got \(1, 51\)"),
        (12, torch.zeros(8, dtype=torch.int64), r"usage: expected shape \(9\)"),
    ],
)
def test_the_op_checks_before_it_touches_memory(place: int, wrong: Any, message: str) -> None:
    phi = make_phi(4, 4)
    arguments: list[Any] = [noise(1, 4, 5, 7), noise(9, 4), phi.weight, phi.bias, 0.5, [0, 0, 1, 1], RECTANGLES.flat]
    arguments += [False, True, torch.zeros(1, 52, dtype=torch.int64), noise(1, 4, 5, 7), noise(1, 51, 4)]
    arguments.append(torch.zeros(9, dtype=torch.int64))
    torch.ops.fastvar_cpu.residual_quantize(*arguments)
    with pytest.raises(RuntimeError, match=f"residual_quantize: {message}"):
        torch.ops.fastvar_cpu.residual_quantize(*arguments[:place], wrong, *arguments[place + 1 :])


@pytest.mark.slow
@pytest.mark.skipif("ATEN_CPU_CAPABILITY" in os.environ, reason="runs in a process that this test has started")
@pytest.mark.parametrize("capability", [level or "default" for level in LESS])
def test_libraries_for_other_processors(capability: str) -> None:
    """What depends on vectors, of this file and the one of bits, with the library that a processor of less gets."""
    chosen = "nearest or first_of_equal or not_finite or steps_and or sign_of_its_residual"
    files = [str(Path(__file__).with_name(name)) for name in (Path(__file__).name, "test_bitwise_residual_quantize.py")]
    code = (
        "import sys, pytest, torch; from fastvar.ops import _extension\n"
        "code = pytest.main(sys.argv[1:]); print(_extension.loaded_from('cpu').name); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "-q", "-p", "no:cacheprovider", "-k", chosen, *files],
        capture_output=True, text=True, cwd=Path(__file__).parents[2],
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert done.stdout.splitlines()[-1] == build.file_name("cpu", capability.replace("default", ""))
