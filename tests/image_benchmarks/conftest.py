"""A CLIP that is quick."""

from __future__ import annotations

import json

import pytest


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
