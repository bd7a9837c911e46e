"""Agreement with FoundationVision/VAR on recorded weights, inputs and outputs."""

from __future__ import annotations

import pytest
import torch
from golden.golden import GoldenCase, load_case

from fastvar.models import VAR, VQTokenizer, load_var

CASES = ("var_tiny", "var_tiny_shared_adaln")


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> GoldenCase:
    return load_case(request.param)


@pytest.fixture(scope="module")
def models(case: GoldenCase) -> tuple[VAR, VQTokenizer]:
    return load_var(case.transformer, case.tokenizer, num_heads=case.config["num_heads"])


def test_config_is_read_off_the_state_dict(case: GoldenCase, models: tuple[VAR, VQTokenizer]) -> None:
    var, vq = models
    expected = case.config
    assert [h for h, _ in var.config.grids] == expected["patch_nums"]
    for ours, public in [
        ("depth", "depth"),
        ("embed_dim", "embed_dim"),
        ("num_heads", "num_heads"),
        ("num_classes", "num_classes"),
        ("shared_adaln", "shared_aln"),
        ("qk_l2_norm", "attn_l2_norm"),
        ("vocab_size", "vocab_size"),
        ("code_channels", "z_channels"),
    ]:
        assert getattr(var.config, ours) == expected[public], ours
    assert vq.config.channels == expected["ch"]
    assert vq.config.residual_convs == expected["share_quant_resi"]


def test_tokens_of_images(case: GoldenCase, models: tuple[VAR, VQTokenizer]) -> None:
    _, vq = models
    assert torch.equal(vq.encode(case.images), case.tensors["tokens"])


def test_feature_map_and_reconstruction(case: GoldenCase, models: tuple[VAR, VQTokenizer]) -> None:
    _, vq = models
    torch.testing.assert_close(vq.feature_map(case.tensors["tokens"]), case.tensors["f_hat"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(vq.decode(case.tensors["tokens"]), case.tensors["reconstruction"], rtol=1e-4, atol=1e-4)


def test_teacher_forcing_inputs(case: GoldenCase, models: tuple[VAR, VQTokenizer]) -> None:
    _, vq = models
    expected = case.tensors["next_scale_input"]
    torch.testing.assert_close(vq.teacher_forcing(case.tensors["tokens"]), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(vq.quantize(case.images).teacher_forcing, expected, rtol=1e-5, atol=1e-5)


def test_logits(case: GoldenCase, models: tuple[VAR, VQTokenizer]) -> None:
    var, vq = models
    with torch.no_grad():
        logits = var(case.tensors["label"], vq.teacher_forcing(case.tensors["tokens"]))
    torch.testing.assert_close(logits, case.tensors["logits"], rtol=0, atol=1e-4)


def test_greedy_generation_is_token_exact(case: GoldenCase, models: tuple[VAR, VQTokenizer]) -> None:
    var, _ = models
    out = var.generate(case.tensors["label"], guidance=case.config["cfg"], top_k=1)
    assert torch.equal(out.tokens, case.tensors["generated_tokens"])
    torch.testing.assert_close(out.images, case.tensors["generated_image"], rtol=0, atol=1e-4)


def test_a_wrong_key_is_named(case: GoldenCase) -> None:
    state = dict(case.transformer)
    state["blocks.0.attn.mat_qkv.wrong"] = state.pop("blocks.0.attn.mat_qkv.weight")
    with pytest.raises(ValueError, match=r"missing key blocks\.0\.attn\.mat_qkv\.weight\n.*unexpected key .*wrong"):
        load_var(state, case.tokenizer, num_heads=case.config["num_heads"])
    tokenizer = {n: t for n, t in case.tokenizer.items() if not n.startswith("quantize.embedding")}
    with pytest.raises(ValueError, match=r"missing key quantize\.embedding\.weight"):
        load_var(case.transformer, tokenizer, num_heads=case.config["num_heads"])


def test_variants_of_public_files(case: GoldenCase, tmp_path: object) -> None:
    """Usage statistics of another number of scales, scale_mul saved as (1, 1, H, 1), a path, a trainer's nesting."""
    transformer = {n: t.reshape(1, 1, -1, 1) if "scale_mul" in n else t for n, t in case.transformer.items()}
    tokenizer = dict(case.tokenizer, **{"quantize.ema_vocab_hit_SV": torch.zeros(7, case.config["vocab_size"])})
    path = f"{tmp_path}/checkpoint.pth"
    torch.save({"trainer": {"var_wo_ddp": transformer, "vae_local": tokenizer}}, path)
    var, _ = load_var(path, path, num_heads=case.config["num_heads"])
    assert torch.equal(
        var.generate(case.tensors["label"], guidance=case.config["cfg"], top_k=1, decode=False).tokens,
        case.tensors["generated_tokens"],
    )
