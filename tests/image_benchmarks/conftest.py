"""A CLIP and a Mask2Former that are quick, and weights of Inception."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The name of a CLIP of open_clip with few, narrow layers and images of 32."""
    open_clip = pytest.importorskip("open_clip")
    vision = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    name = "tiny-for-benchmarks"
    path = tmp_path_factory.mktemp("open_clip") / f"{name}.json"
    path.write_text(json.dumps({"embed_dim": 64, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(path)
    return name


@pytest.fixture(scope="session")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of Inception in a file, which its class asks for."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = module.FeatureExtractorInceptionV3("inception-v3-compat", ["64"])
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def mask2former(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Mask2Former with random weights, which takes all that it sees for cups and never for a tv remote."""
    transformers = pytest.importorskip("transformers")
    swin = {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 4, "image_size": 64}
    stages = ["stage1", "stage2", "stage3", "stage4"]
    config = transformers.Mask2FormerConfig(
        backbone_config=transformers.SwinConfig(**swin, out_features=stages),
        **dict.fromkeys(("hidden_dim", "feature_size", "mask_feature_size", "encoder_feedforward_dim"), 32),
        dim_feedforward=32,
        num_attention_heads=2,
        encoder_layers=1,
        decoder_layers=2,
        num_queries=3,
        id2label={0: "cup", 1: "remote"},
    )
    torch.manual_seed(0)
    network = transformers.Mask2FormerForUniversalSegmentation(config)
    network.class_predictor.bias.data += torch.tensor([20.0, 0.0, 0.0])
    path = tmp_path_factory.mktemp("mask2former")
    network.save_pretrained(path)
    return path
