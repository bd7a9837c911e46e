"""residual_quantize and accumulate_scale in C++, on every vector unit of this processor, against float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from bounds import assert_as_accurate
from samples import noise
from test_residual_quantize import make_phi

from fastvar.ops import ResidualConv, _checks, accumulate_scale, explain, residual_quantize
from fastvar.ops._extension import missing
from fastvar.schedule import VAR_256, ScaleSchedule

if missing("cpu") is not None:
    pytest.skip(str(missing("cpu")), allow_module_level=True)

from fastvar.kernels.residual_quantize import impl_cpp, reference

explain("residual_quantize", torch.zeros(1))  # loads the library
UNIT = torch.ops.fastvar_cpu.vector_unit()  # 17: 16 floats and products of bfloat16
UNITS = [unit for unit in (4, 8, 16, 17) if unit <= UNIT]
RECTANGLES = ScaleSchedule((1, (2, 3), (2, 5), (5, 7)))


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    threads, lanes, screen = torch.get_num_threads(), impl_cpp.LANES, impl_cpp.SCREEN
    yield
    torch.set_num_threads(threads)
    impl_cpp.LANES, impl_cpp.SCREEN = lanes, screen


def replayed(
    tokens: torch.Tensor, features: torch.Tensor, codebook: torch.Tensor, schedule: ScaleSchedule,
    phi: ResidualConv | None, znorm: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """In float64, for the residuals that these tokens leave: by how much a code is nearer than the token's, what a
    rounding in float32 of such a distance is, the feature map and the inputs."""
    features, codebook = features.double(), codebook.double()
    feature_map, excess, rounding, inputs = torch.zeros_like(features), [], [], []
    for k, part in enumerate(tokens.split(schedule.lengths, 1)):
        rows = reference._to_rows(reference._area(features - feature_map, schedule[k]))  # [B, n, C]
        if znorm:
            rows, codes = (t / t.norm(dim=-1, keepdim=True).clamp(min=1e-12) for t in (rows, codebook))
            distances, size = -rows @ codes.T, torch.ones(rows.shape[:2], dtype=torch.float64)
        else:
            distances = torch.cdist(rows, codebook, compute_mode="donot_use_mm_for_euclid_dist").square()
            size = rows.square().sum(-1) + codebook.square().sum(-1).amax()
        excess.append(distances.gather(2, part[..., None])[..., 0] - distances.amin(2))
        rounding.append(size * torch.finfo(torch.float32).eps)
        convs = (None, None, 0.0)
        if phi is not None:
            convs = (phi.weight[phi.index[k]].double(), phi.bias[phi.index[k]].double(), phi.ratio)
        following = schedule[k + 1] if k + 1 < len(schedule) else (0, 0)
        feature_map, next_input = reference.accumulate_scale(
            feature_map, part, codebook, *convs, *schedule[k], *following
        )
        inputs.append(next_input)
    return torch.cat(excess, 1), torch.cat(rounding, 1), feature_map, torch.cat(inputs, 1)


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
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize(("schedule", "channels", "size", "convs"), CASES)
def test_nearest_codes_and_what_they_add(
    schedule: ScaleSchedule, channels: int, size: int, convs: int, unit: int, znorm: bool
) -> None:
    """A token may differ from the reference's only where both codes are as near but for roundings."""
    features, codebook = noise(3, channels, *schedule.finest), noise(size, channels, seed=1)
    phi = make_phi(channels, len(schedule), convs) if convs else None
    impl_cpp.LANES = unit
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
    for impl_cpp.LANES in UNITS:
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
    for impl_cpp.LANES in UNITS:
        tokens = residual_quantize(
            features, codebook, ScaleSchedule((1, 4)), phi=make_phi(8, 2), znorm=znorm, backend="cpu"
        ).tokens
        assert tokens[0].tolist() == [0] * 17
        assert tokens.min() >= 0 and tokens.max() < 70
    nothing = residual_quantize(features[:, :0], codebook[:, :0], ScaleSchedule((1, 4)), znorm=znorm, backend="cpu")
    assert nothing.tokens.eq(0).all()


@pytest.mark.parametrize(("argument", "value"), [("features", torch.nan), ("codebook", torch.inf)])
def test_debug_mode_names_the_argument(argument: str, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = {"features": noise(1, 4, 2, 2), "codebook": noise(9, 4)}
    arguments[argument].flatten()[1] = value
    residual_quantize(**arguments, schedule=ScaleSchedule((1, 2)))
    monkeypatch.setattr(_checks, "DEBUG", True)
    with pytest.raises(ValueError, match=f"residual_quantize: {argument}: expected finite numbers, got 1"):
        residual_quantize(**arguments, schedule=ScaleSchedule((1, 2)))


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize(("channels", "scale"), [(32, 0), (12, 1), (5, 2), (64, 3)])
@pytest.mark.parametrize("with_phi", [False, True])
def test_steps_and_their_gradients(channels: int, scale: int, with_phi: bool, unit: int) -> None:
    schedule, impl_cpp.LANES = RECTANGLES, unit
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
        (10, torch.zeros(1, 51, dtype=torch.int64), r"tokens: expected shape \(1, 52\), got \(1, 51\)"),
        (13, torch.zeros(8, dtype=torch.int64), r"usage: expected shape \(9\)"),
    ],
)
def test_the_op_checks_before_it_touches_memory(place: int, wrong: Any, message: str) -> None:
    phi = make_phi(4, 4)
    arguments: list[Any] = [noise(1, 4, 5, 7), noise(9, 4), phi.weight, phi.bias, 0.5, [0, 0, 1, 1], RECTANGLES.flat]
    arguments += [False, True, 0, torch.zeros(1, 52, dtype=torch.int64), noise(1, 4, 5, 7), noise(1, 51, 4)]
    arguments.append(torch.zeros(9, dtype=torch.int64))
    torch.ops.fastvar_cpu.residual_quantize(*arguments)
    with pytest.raises(RuntimeError, match=f"residual_quantize: {message}"):
        torch.ops.fastvar_cpu.residual_quantize(*arguments[:place], wrong, *arguments[place + 1 :])
