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
CASES = [
    (VAR_256, 1, 32, 4096),  # a cluster for each image
    (VAR_256, 200, 32, 512),  # a block for each image
    (VAR_256, 3, 8, 700),
    (VAR_512, 2, 32, 4096),
    (VAR_512, 70, 32, 512),  # clusters because of the size
    (VAR_1024, 1, 32, 4096),
    (ScaleSchedule((1, 7, 80)), 1, 32, 300),  # tiles
    (ScaleSchedule((1, (2, 3), (2, 5), (5, 7))), 3, 12, 50),
    (ScaleSchedule((1, 7, 64)), 2, 64, 1000),
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
def test_steps_and_their_gradients(schedule: ScaleSchedule, scale: int) -> None:
    why_not = explain("accumulate_scale", torch.zeros(1, device="cuda"), "cuda").reasons["cuda"]
    if why_not != "chosen":
        pytest.skip(why_not)
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

    for got, wanted in zip(run("cuda", torch.float32, "cuda"), run("cpu", torch.float64, "reference"), strict=True):
        assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max() + 1e-5
