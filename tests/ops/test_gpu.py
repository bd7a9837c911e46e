"""On a GPU every implementation gives what the reference gives on a CPU, without waiting for the GPU.

The quantisers at sizes as they are: nearest codes by float64, safe in CUDA graphs. The sampler with vocabularies as
they are: the sets and tokens of the CPU.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from fastvar.kernels.sample_tokens import reference

from fastvar.ops import accumulate_scale, explain, residual_quantize, sample_bits, sample_tokens
from fastvar.ops._dispatch import REGISTRY
from fastvar.random import uniform
from fastvar.schedule import VAR_256, VAR_512, VAR_1024, ScaleSchedule
from tests.helpers.draws import distance
from tests.helpers.replay import replayed
from tests.helpers.samples import SAMPLES, moved, noise
from tests.ops.test_residual_quantize import make_phi

PACKAGES = ("sdpa", "flex", "flash_attn", "xformers")  # take less than all calls: test_attention_packages.py
IMPLEMENTATIONS = [
    (name, implementation.backend)
    for name in SAMPLES
    for implementation in REGISTRY[name]
    if (not implementation.devices or "cuda" in implementation.devices) and implementation.backend not in PACKAGES
]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def _float32_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN rounds the inputs of float32 convolutions to TF32 unless told not to."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def tensors(result: Any) -> list[torch.Tensor]:
    return [r for r in ((result,) if isinstance(result, torch.Tensor) else result) if isinstance(r, torch.Tensor)]


def run(
    function: Any, arguments: dict[str, Any], names: tuple[str, ...], device: str, backend: str
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Results and gradients, on the CPU. In a second call nothing may wait for the device."""
    arguments = {key: moved(value, device) for key, value in arguments.items()}
    function(**arguments, backend=backend)  # what is made once for a device may wait for it
    leaves = [arguments[key].detach().requires_grad_() for key in names]
    arguments |= dict(zip(names, leaves, strict=True))
    mode = torch.cuda.get_sync_debug_mode() if device == "cuda" else None
    if mode is not None:
        torch.cuda.set_sync_debug_mode("error")
    try:
        results = tensors(function(**arguments, backend=backend))
        outputs = [r for r in results if r.requires_grad]
        gradients: tuple[torch.Tensor, ...] = ()
        if outputs:
            gradients = torch.autograd.grad(outputs, leaves, [torch.ones_like(r) for r in outputs])
    finally:
        if mode is not None:
            torch.cuda.set_sync_debug_mode(mode)
    return [r.detach().cpu() for r in results], [g.cpu() for g in gradients]


@pytest.mark.parametrize(
    ("name", "backend", "dtype"),
    # in bfloat16 only what the interpreter cannot show; the reference is held to itself in float32
    [(*each, torch.float32) for each in IMPLEMENTATIONS]
    + [(*each, torch.bfloat16) for each in IMPLEMENTATIONS if each[1] != "reference"],
)
def test_as_on_the_cpu(name: str, backend: str, dtype: torch.dtype) -> None:
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for i, call in enumerate(SAMPLES[name](dtype)):
        print(f"sample {i}")
        found, expected = run(*call, "cuda", backend), run(*call, "cpu", "reference")
        for one, other in zip(found, expected, strict=True):
            for a, b in zip(one, other, strict=True):
                torch.testing.assert_close(a, b, **tolerance)


RECTANGLES = ScaleSchedule((1, (2, 3), (2, 5), (5, 7)))
CASES = [
    (VAR_256, 1, 32, 4096),  # a cluster for each image
    (VAR_256, 200, 32, 512),  # a block for each image
    (VAR_256, 3, 8, 700),
    (VAR_512, 2, 32, 4096),
    (VAR_512, 70, 32, 512),  # clusters because of the size
    (VAR_1024, 1, 32, 4096),  # tiles
    (ScaleSchedule((1, 7, 80)), 1, 32, 300),
    (RECTANGLES, 3, 12, 50),
    (ScaleSchedule((1, 7, 64)), 2, 64, 1000),
]

DEGENERATE = [  # one channel, one code, no image, one token
    (RECTANGLES, 3, 1, 50),
    (RECTANGLES, 2, 3, 1),
    (RECTANGLES, 0, 3, 5),
    (ScaleSchedule((1,)), 2, 1, 1),
    (ScaleSchedule((1, 1)), 2, 4, 7),
]


@pytest.fixture(params=["cuda", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    why_not = explain("residual_quantize", torch.zeros(1, device="cuda"), request.param).reasons[request.param]
    if why_not != "chosen":
        pytest.skip(why_not)
    return request.param


@pytest.mark.parametrize("znorm", [False, True])
@pytest.mark.parametrize(("schedule", "batch", "channels", "size"), CASES)
def test_nearest_codes(
    schedule: ScaleSchedule, batch: int, channels: int, size: int, znorm: bool, backend: str
) -> None:
    features, codebook = noise(batch, channels, *schedule.finest), noise(size, channels, seed=1)
    phi = make_phi(channels, len(schedule), 4)
    on_gpu = phi._replace(weight=phi.weight.cuda(), bias=phi.bias.cuda())
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        found = residual_quantize(features.cuda(), codebook.cuda(), schedule, phi=on_gpu, znorm=znorm, backend=backend)
    tokens, feature_map, inputs = (result[:4].cpu() for result in found[:3])
    assert torch.equal(found.usage, found.tokens.flatten().bincount(minlength=size))
    excess, rounding, *exact = replayed(tokens, features[:4], codebook, schedule, phi, znorm)
    assert bool((excess <= 8 * rounding).all()), float((excess / rounding).max())
    assert (excess > 0).float().mean() < 1e-3
    for got, wanted in zip((feature_map, inputs), exact, strict=True):
        torch.testing.assert_close(got, wanted.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("znorm", [False, True])
@pytest.mark.parametrize("scale", [1e-3, 1, 1e6])
@pytest.mark.parametrize("spread", [1e-4, 1e-2])  # of the codes about some points: most are alike in bfloat16
def test_the_screen_changes_nothing(spread: float, scale: float, znorm: bool, backend: str) -> None:
    """Codes that only float32 can tell apart: the token's is as near as a rounding in float32 can tell."""
    points, features = noise(9, 32), scale * noise(3, 32, 16, 16, seed=1)
    codebook = scale * (points[torch.arange(4096) % 9] + spread * noise(4096, 32, seed=2))
    schedule = ScaleSchedule((16,))
    found = residual_quantize(features.cuda(), codebook.cuda(), schedule, znorm=znorm, backend=backend)
    excess, rounding, *_ = replayed(found.tokens.cpu(), features, codebook, schedule, None, znorm)
    assert bool((excess <= 8 * rounding).all()), float((excess / rounding).max())


@pytest.mark.parametrize("znorm", [False, True])
@pytest.mark.parametrize(("schedule", "batch", "channels", "size"), DEGENERATE)
def test_degenerate_shapes(
    schedule: ScaleSchedule, batch: int, channels: int, size: int, znorm: bool, backend: str
) -> None:
    """The tokens of a CPU, though with one channel all directions of a sign are equally near."""
    features, codebook = noise(batch, channels, *schedule.finest), noise(size, channels, seed=1)
    expected = residual_quantize(features, codebook, schedule, znorm=znorm, backend="reference")
    for backend_of_gpu in (backend, "reference"):
        found = residual_quantize(features.cuda(), codebook.cuda(), schedule, znorm=znorm, backend=backend_of_gpu)
        assert torch.equal(found.tokens.cpu(), expected.tokens)
        torch.testing.assert_close(found.feature_map.cpu(), expected.feature_map)


def test_more_images_than_an_axis_of_a_grid_holds(backend: str) -> None:
    schedule, batch = ScaleSchedule((1, 2)), 70_000
    features, codebook = noise(batch, 2, 2, 2).cuda(), noise(11, 2, seed=1).cuda()
    found = residual_quantize(features, codebook, schedule, backend=backend)
    tail = residual_quantize(features[-9:], codebook, schedule, backend=backend)
    assert torch.equal(found.tokens[-9:], tail.tokens)
    step = accumulate_scale(found.tokens[:, :1], features, codebook, schedule, 0, backend=backend)
    last = accumulate_scale(tail.tokens[:, :1], features[-9:], codebook, schedule, 0, backend=backend)
    assert step.next_input is not None and last.next_input is not None
    assert torch.equal(step.next_input[-9:], last.next_input)


def test_quantiser_in_a_cuda_graph(backend: str) -> None:
    """A replay reads what then lies in the features, and an image does not depend on the batch."""
    features, codebook, phi = noise(5, 32, 16, 16).cuda(), noise(900, 32, seed=1).cuda(), make_phi(32, 10, 4)
    phi = phi._replace(weight=phi.weight.cuda(), bias=phi.bias.cuda())
    residual_quantize(features, codebook, VAR_256, phi=phi, backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = residual_quantize(features, codebook, VAR_256, phi=phi, backend=backend)
    features.copy_(noise(5, 32, 16, 16, seed=1))
    graph.replay()
    again = residual_quantize(features, codebook, VAR_256, phi=phi, backend=backend)
    alone = residual_quantize(features[2:3], codebook, VAR_256, phi=phi, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(results, again, strict=True))
    assert torch.equal(alone.tokens, again.tokens[2:3])


@pytest.mark.parametrize("scale", [0, 4, 9])
@pytest.mark.parametrize("schedule", [VAR_256, VAR_512])
def test_steps_and_their_gradients(schedule: ScaleSchedule, scale: int, backend: str) -> None:
    feature_map, codebook, phi = noise(3, 32, *schedule.finest), noise(50, 32, seed=1), make_phi(32, 10, 4)
    tokens = torch.arange(3 * schedule.lengths[scale]).view(3, -1) % 50

    def run(device: str, dtype: torch.dtype, backend: str) -> list[torch.Tensor]:
        leaves = [t.detach().to(device, dtype).requires_grad_() for t in (feature_map, codebook, phi.weight, phi.bias)]
        convs = phi._replace(weight=leaves[2], bias=leaves[3])
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            step = accumulate_scale(
                tokens.to(device), leaves[0], leaves[1], schedule, scale, phi=convs, backend=backend
            )
            results = [r for r in step if r is not None]
            gradients = torch.autograd.grad([r.square().sum() for r in results], leaves)
        return [t.detach().double().cpu() for t in (*results, *gradients)]

    for got, wanted in zip(run("cuda", torch.float32, backend), run("cpu", torch.float64, "reference"), strict=True):
        assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max() + 1e-5


EDGE = 2e-6  # of the probability: so close to a bound the roundings of float32 decide


@pytest.mark.parametrize(("top_k", "top_p"), [(900, 0.96), (900, 1.0), (0, 0.96), (0, 1.0), (1, 1.0)])
@pytest.mark.parametrize("size", [1000, 4096, 16384, 32768])
def test_tokens_of_the_cpu(size: int, top_k: int, top_p: float) -> None:
    """All but a few, whose draws lie at the bound between two tokens."""
    both = 2 * noise(4, 200, size)
    seeds, count = torch.tensor([3, -7]), 200
    options: dict[str, Any] = {"guidance": 1.5, "temperature": 0.9, "top_k": top_k, "top_p": top_p, "log_probs": True}
    wanted = sample_tokens(both[:2], unconditional=both[2:], seeds=seeds, **options)
    device = both.cuda()
    got = sample_tokens(device[:2], unconditional=device[2:], seeds=seeds.cuda(), backend="triton", **options)
    found = [result.cpu() for result in got]
    same = found[0] == wanted.tokens
    z = reference._guided(both[:2], both[2:], 1.5, 0.9)
    threshold = reference._threshold(z, top_k, top_p)
    kept = z.double().masked_fill(z < (-math.inf if threshold is None else threshold), -math.inf)
    draws = uniform(seeds[:, None], torch.zeros(1, dtype=torch.int64), torch.arange(count)).double()
    assert (~same).sum() <= 4
    assert same.all() or distance(found[0][~same], draws[~same], kept[~same]).max() < EDGE
    for scores, expected in zip(found[1:], wanted[1:], strict=True):
        # another set would change all scores of a row by the share of a token: some may, where masses meet 1 - p
        off = (scores - expected).abs()[same]
        assert off.median() < 5e-6 and (off > 2e-5).sum() <= (4 if 0 < top_p < 1 else 0)


@pytest.mark.parametrize("function", [sample_tokens, sample_bits])
def test_sampling_in_a_cuda_graph(function: Any) -> None:
    """A replay reads what then lies in the inputs."""
    logits, seeds = noise(2, 5, 64).cuda(), torch.arange(2).cuda()
    options: dict[str, Any] = {"seeds": seeds, "top_p": 0.9, "log_probs": True, "backend": "triton"}
    function(logits, **options)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function(logits, **options)
    logits.copy_(noise(2, 5, 64, seed=1))
    seeds.add_(7)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(results, function(logits, **options), strict=True))
