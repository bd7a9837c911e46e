"""Agreement with FoundationVision/VAR on recorded weights, inputs and outputs."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastvar.models import VAR, VQTokenizer, load_var
from fastvar.models.checkpoints import _public_transformer_name
from tests.golden.golden import GoldenCase, load_case

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


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_weights_of_a_wrapped_model(case: GoldenCase, prefix: str) -> None:
    wrapped = [{prefix + n: t for n, t in state.items()} for state in (case.transformer, case.tokenizer)]
    var, _ = load_var(*wrapped, num_heads=case.config["num_heads"])
    expected, _ = load_var(case.transformer, case.tokenizer, num_heads=case.config["num_heads"])
    assert all(torch.equal(var.state_dict()[n], t) for n, t in expected.state_dict().items())
    del wrapped[0][f"{prefix}head.bias"]
    with pytest.raises(ValueError, match=rf"\n  missing key {prefix}head\.bias$"):
        load_var(*wrapped, num_heads=case.config["num_heads"])


def test_something_else_than_a_transformer(case: GoldenCase, tmp_path: Path) -> None:
    """All that is missing is named, and what is there; files are named; torch's advice to run code is left out."""
    with pytest.raises(ValueError) as raised:
        load_var({f"module.{n}": t for n, t in case.tokenizer.items()}, case.transformer)
    for part in (
        *("load_var: transformer: ", "missing key module.word_embed.weight", "missing key module.head.weight"),
        *(f"{len(case.tokenizer)} keys are there", f"module.{next(iter(case.tokenizer))}"),
    ):
        assert part in str(raised.value)
    flat = {n: t.flatten() if n == "word_embed.weight" else t for n, t in case.transformer.items()}
    with pytest.raises(ValueError, match=r"word_embed\.weight: expected 2 dimensions, got shape \(\d+,\)"):
        load_var(flat, case.tokenizer)
    path = tmp_path / "var.pth"
    for content, why in (
        ({"model": case.transformer, "args": argparse.Namespace()}, "holds a argparse.Namespace, whose code would"),
        ([1, 2], "expected a state dict, got list"),
        ({"epoch": 3}, r"got other values under \['epoch'\]"),
        ({"trainer": 3}, "expected a state dict, got int"),
    ):
        torch.save(content, path)
        with pytest.raises(ValueError, match=f"load_var: transformer: .*{why}") as raised:
            load_var(path, case.tokenizer)
        assert "weights_only" not in str(raised.value)
    path.write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match=r"load_var: tokenizer: expected a file .*var\.pth: it is something else$"):
        load_var(case.transformer, path)
    with pytest.raises(FileNotFoundError, match=r"load_var: tokenizer: .*nowhere\.pth"):
        load_var(case.transformer, tmp_path / "nowhere.pth")


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


def test_what_leaves_no_trace_in_the_weights(case: GoldenCase, models: tuple[VAR, VQTokenizer]) -> None:
    """Heads without normalised queries and keys, by default of 64 channels; the tokenizer's distance and groups."""
    var = VAR(replace(models[0].config, embed_dim=128, num_heads=4, qk_l2_norm=False))
    state = {_public_transformer_name(name): tensor for name, tensor in var.state_dict().items()}
    state["lvl_1L"] = torch.tensor(var.schedule.scale_of_token)[None]
    assert load_var(state, case.tokenizer, num_heads=4)[0].config == var.config
    found, tokenizer = load_var(state, case.tokenizer)
    assert found.config.num_heads == 2 and not tokenizer.config.cosine and tokenizer.config.norm_groups == 32
    _, tokenizer = load_var(state, case.tokenizer, znorm=True, norm_groups=8)
    assert tokenizer.config.cosine and tokenizer.config.norm_groups == 8
