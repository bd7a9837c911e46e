"""residual_quantize and accumulate_scale on a GPU, at sizes as they are: nearest codes by float64, safe in graphs."""

from __future__ import annotations

import pytest
import torch
from replay import replayed
from samples import noise
from test_residual_quantize import make_phi

from fastvar.ops import accumulate_scale, explain, residual_quantize
from fastvar.schedule import VAR_256, VAR_512, VAR_1024, ScaleSchedule

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
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


def test_in_a_cuda_graph(backend: str) -> None:
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
