"""Agreement with FoundationVision/Infinity on recorded weights, inputs and outputs."""

from __future__ import annotations

import pytest
import torch

from fastvar.models import BSQTokenizer, BSQTokenizerConfig, Infinity, TextFeatures, load_infinity
from fastvar.models.infinity_checkpoints import _public_tokenizer_names
from tests.golden.golden import GoldenCase, load_case


@pytest.fixture(scope="module")
def case() -> GoldenCase:
    return load_case("infinity_tiny")


@pytest.fixture(scope="module")
def models(case: GoldenCase) -> tuple[Infinity, BSQTokenizer]:
    return load_infinity(case.transformer, case.tokenizer, grids=case.config["scale_schedule"])


@pytest.fixture(scope="module")
def texts(case: GoldenCase) -> TextFeatures:
    return TextFeatures(case.tensors["text"], case.config["text_lengths"])


def test_config_is_read_off_the_state_dict(case: GoldenCase, models: tuple[Infinity, BSQTokenizer]) -> None:
    net, bsq = models
    expected = case.config
    assert [list(grid) for grid in net.config.grids] == expected["scale_schedule"]
    for ours, public in [
        ("depth", "depth"),
        ("embed_dim", "embed_dim"),
        ("num_heads", "num_heads"),
        ("bits", "code_dim"),
        ("text_channels", "text_channels"),
        ("text_length", "text_maxlen"),
    ]:
        assert getattr(net.config, ours) == expected[public], ours
    assert bsq.config.channels == expected["tokenizer"]["base_ch"]
    assert list(bsq.config.channel_multipliers) == expected["tokenizer"]["ch_mult"]
    assert bsq.config.blocks_per_level == expected["tokenizer"]["num_res_blocks"]
    assert not bsq.config.patchify and net.tokenizer is bsq and not net.training


@pytest.mark.slow
@torch.no_grad()
def test_bits_of_an_image(case: GoldenCase, models: tuple[Infinity, BSQTokenizer]) -> None:
    """The second of the two, as the encoder takes its time; the quantiser itself has both in its own tests."""
    _, bsq = models
    image = case.images[1:]
    torch.testing.assert_close(bsq.encode_features(image), case.tensors["features"][1:], rtol=0, atol=1e-4)
    found = bsq.quantize(image)
    for name in ("bits", "tokenizer_bits"):
        assert torch.equal(found.bits, case.tensors[name][1:].bool())
    torch.testing.assert_close(found.teacher_forcing, case.tensors["next_scale_input"][1:], rtol=1e-5, atol=1e-5)


def test_teacher_forcing_inputs(case: GoldenCase, models: tuple[Infinity, BSQTokenizer]) -> None:
    inputs, expected = models[1].teacher_forcing(case.tensors["bits"]), case.tensors["next_scale_input"]
    torch.testing.assert_close(inputs, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_reconstruction(case: GoldenCase, models: tuple[Infinity, BSQTokenizer]) -> None:
    """Of the first image; it was kept at every eighth pixel."""
    image = models[1].decode(case.tensors["bits"][:1])[:, :, ::8, ::8]
    torch.testing.assert_close(image, case.tensors["reconstruction_sub"][:1], rtol=0, atol=1e-4)


@torch.no_grad()
def test_logits(case: GoldenCase, models: tuple[Infinity, BSQTokenizer], texts: TextFeatures) -> None:
    logits = models[0](texts, case.tensors["next_scale_input"])
    of_zero, of_one = case.tensors["logits"].unflatten(2, (-1, 2)).unbind(3)
    torch.testing.assert_close(logits, of_one - of_zero, rtol=0, atol=1e-4)


def test_greedy_generation_is_bit_exact(
    case: GoldenCase, models: tuple[Infinity, BSQTokenizer], texts: TextFeatures
) -> None:
    net, _ = models
    config = case.config
    out = net.generate(texts, guidance=config["cfg"], temperature=config["tau"], top_k=1, decode=False)
    assert torch.equal(out.tokens, case.tensors["generated_bits"].bool())


@pytest.fixture(scope="module", params=["infinity_wide", "infinity_patches"])
def other(request: pytest.FixtureRequest) -> GoldenCase:
    """Rectangles, heads of 96 channels, tokens of 2 x 2 cells, texts of 1 to 40 tokens, guidance by scale."""
    return load_case(request.param)


@pytest.fixture(scope="module")
def net(other: GoldenCase) -> Infinity:
    """With a small tokenizer, of whose networks the case says nothing."""
    config = other.config
    shape = {"bits": config["code_dim"], "patchify": config["patchify"], "channels": 32, "channel_multipliers": (1, 2)}
    bsq = BSQTokenizer(BSQTokenizerConfig(config["scale_schedule"], **shape, blocks_per_level=1))
    names = _public_tokenizer_names(bsq)
    state = {names[ours]: tensor for ours, tensor in bsq.state_dict().items()}
    return load_infinity(other.transformer, state, grids=config["scale_schedule"])[0]


@torch.no_grad()
def test_other_shapes(other: GoldenCase, net: Infinity, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bits and inputs of features, logits; the first at every 16th, the second at every seventh token."""
    tensors, config = other.tensors, other.config
    assert net.tokenizer.config.patchify == config["patchify"]
    monkeypatch.setattr(net.tokenizer, "encode_features", lambda images, schedule: tensors["features"])
    found = net.tokenizer.quantize(torch.empty(2, 3, *net.tokenizer.config.image_size))
    assert torch.equal(found.bits, tensors["bits"].bool())
    torch.testing.assert_close(found.teacher_forcing[:, ::16], tensors["next_scale_input_rows"], rtol=1e-5, atol=1e-5)
    logits = net(TextFeatures(tensors["text"], config["text_lengths"]), found.teacher_forcing)
    of_zero, of_one = tensors["logit_rows"].unflatten(2, (-1, 2)).unbind(3)
    torch.testing.assert_close(logits[:, ::7], of_one - of_zero, rtol=0, atol=1e-4)


@pytest.mark.parametrize("where", ["logits", "hidden states"])
def test_other_greedy_generations(other: GoldenCase, net: Infinity, where: str) -> None:
    """Some scales without guidance."""
    tensors, config = other.tensors, other.config
    layer, name = (
        (0, "generated_bits") if where == "logits" else (-config["cfg_insertion_layer"], "generated_bits_hidden")
    )
    texts = TextFeatures(tensors["text"], config["text_lengths"])
    options = {"guidance": config["cfg"], "temperature": config["tau"], "top_k": 1, "decode": False}
    assert torch.equal(net.generate(texts, guidance_layer=layer, **options).tokens, tensors[name].bool())
