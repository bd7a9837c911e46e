"""Rewards by frozen models: architectures as they are, random weights, scores and preprocessing computed again by hand
from PIL images through the libraries' own transforms. Nothing may open a socket."""

from __future__ import annotations

import json
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from fastvar.pictures import to_uint8
from fastvar.rl.rewards import AestheticReward, CLIPTextReward, DINOReward, HPSv2Reward, available, create
from fastvar.rl.rewards.aesthetic import AestheticHead
from fastvar.rl.rewards.models import weights_name
from fastvar.rl.rewards.preprocessing import (
    CLIP_MEAN,
    CLIP_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    crop_square,
    pad_square,
)

open_clip = pytest.importorskip("open_clip")
timm = pytest.importorskip("timm")

SIZES = [(256, 256), (300, 200), (40, 64)]
PROMPTS = ["a red cube", "two cats", "a {} in braces"]
TINY = "tiny-for-tests"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A CLIP of open_clip with few, narrow layers, but the embedding of ViT-L/14 and images of 32."""
    vision = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    path = tmp_path_factory.mktemp("open_clip") / f"{TINY}.json"
    path.write_text(json.dumps({"embed_dim": 768, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(path)
    return TINY


@pytest.fixture(scope="module")
def clip_text() -> CLIPTextReward:
    torch.manual_seed(0)
    reward = create("clip-t", pretrained=None, batch_size=2)
    assert isinstance(reward, CLIPTextReward)
    return reward


@pytest.fixture(scope="module")
def dino() -> DINOReward:
    torch.manual_seed(0)
    reward = create("dino", pretrained=None, batch_size=2)
    assert isinstance(reward, DINOReward)
    return reward


def images_of(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Colour gradients under noise, on the 256 levels of a file, away from black and white: there PIL cuts off between
    its two passes, which moves single pixels by a few levels."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 3, 3, generator=generator) * 0.5 + 0.25
    smooth = nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
    noise = torch.rand(count, 3, height, width, generator=generator) - 0.5
    return ((smooth + 0.2 * noise).clamp(0, 1) * 255).round() / 255


def as_pil(images: Tensor) -> list[Image.Image]:
    return [Image.fromarray((255 * image).round().byte().permute(1, 2, 0).numpy()) for image in images]


def assert_within_levels(found: Tensor, expected: Tensor, std: tuple[float, ...]) -> None:
    """PIL rounds to 8 bits after each of two passes: at most about one level a pixel, a third of one on average."""
    levels = (found - expected).abs() * torch.tensor(std)[:, None, None] * 255
    assert found.shape == expected.shape and found.dtype == torch.float32
    assert levels.max() < 2 and levels.mean() < 0.5


def dino_transform() -> Any:
    """What timm does to a PIL image for DINO."""
    configuration = timm.get_pretrained_cfg("vit_small_patch16_224.dino").to_dict()
    return timm.data.create_transform(**timm.data.resolve_data_config(configuration))


def padded(image: Image.Image) -> Tensor:
    """What HPSv2 does to a PIL image 40 high and 64 wide, for a model of 32."""
    canvas = Image.new("RGB", (32, 32))
    canvas.paste(image.resize((32, 20), Image.Resampling.BICUBIC), (0, 6))
    pixels = torch.from_numpy(np.array(canvas)).permute(2, 0, 1) / 255
    return (pixels - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]


@pytest.mark.parametrize("size", SIZES)
def test_crop_as_open_clip(size: tuple[int, int]) -> None:
    images = images_of(2, *size)
    transform = open_clip.image_transform(224, is_train=False)
    expected = torch.stack([transform(image) for image in as_pil(images)])
    assert_within_levels(crop_square(images), expected, CLIP_STD)


@pytest.mark.parametrize("size", SIZES)
def test_crop_as_timm(size: tuple[int, int]) -> None:
    images = images_of(2, *size)
    transform = dino_transform()
    expected = torch.stack([transform(image) for image in as_pil(images)])
    found = crop_square(images, 224, resize=248, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    assert_within_levels(found, expected, IMAGENET_STD)


@pytest.mark.parametrize("size", [*SIZES, (225, 100), (900, 10)])
def test_padding_by_hand(size: tuple[int, int]) -> None:
    images = images_of(1, *size)
    height, width = (max(round(side * 224 / max(size)), 1) for side in size)
    canvas = Image.new("RGB", (224, 224))
    small = as_pil(images)[0].resize((width, height), Image.Resampling.BICUBIC)
    canvas.paste(small, ((224 - width) // 2, (224 - height) // 2))
    pixels = torch.from_numpy(np.array(canvas)).permute(2, 0, 1) / 255
    expected = (pixels - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]
    assert_within_levels(pad_square(images), expected[None], CLIP_STD)


def test_overshoot_is_cut_off() -> None:
    """Bicubic rings at edges; 8 bits cannot hold that, so neither may we."""
    edge = torch.zeros(1, 3, 16, 16)
    edge[..., 8:] = 1
    none = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    for found in (crop_square(edge, 64, **none), pad_square(edge, 64, **none)):
        assert found.min() == 0 and found.max() == 1


def test_to_uint8() -> None:
    images = torch.tensor([0.0, 0.499 / 255, 0.501 / 255, 1.2]).reshape(1, 1, 2, 2).expand(1, 3, 2, 2)
    assert to_uint8(images)[0, :, :, 1].tolist() == [[0, 0], [1, 255]]


def by_hand(model: Any, transform: Any, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model(torch.stack([transform(image) for image in as_pil(images)]))


def cosines(first: Tensor, second: Tensor) -> list[float]:
    return [
        (sum(x * y for x, y in zip(a, b, strict=True)) / (sum(x * x for x in a) * sum(y * y for y in b)) ** 0.5)
        for a, b in zip(first.tolist(), second.tolist(), strict=True)
    ]


@pytest.mark.parametrize("name", ["clip-t", "clip-i", "aesthetic", "hpsv2", "dino"])
def test_what_the_models_see(name: str, tiny: str, dino: DINOReward) -> None:
    """The pixels that reach the network, against the PIL pipeline: scores of random weights hardly tell."""
    options = {"aesthetic": {"pretrained": None, "head": None}, "hpsv2": {"checkpoint": None}}
    reward: Any = dino if name == "dino" else create(name, model=tiny, **options.get(name, {"pretrained": None}))
    images, seen = images_of(1, 40, 64), []
    network = dino.model if name == "dino" else reward.clip.model.visual
    handle = network.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    try:
        reward(images, ["a"], images)
    finally:
        handle.remove()
    transform = {"hpsv2": padded, "dino": dino_transform()}.get(name, open_clip.image_transform(32, is_train=False))
    expected = transform(as_pil(images)[0])[None]
    assert len(seen) == (2 if name in ("clip-i", "dino") else 1)  # references too
    for pixels in seen:
        assert_within_levels(pixels, expected, IMAGENET_STD if name == "dino" else CLIP_STD)


def test_clip_text_by_hand(clip_text: CLIPTextReward) -> None:
    """The real ViT-B/32 with QuickGELU; the cosine computed in Python numbers from a PIL image."""
    images = images_of(3, 96, 80)
    scores, mask = clip_text(images, PROMPTS)
    model = clip_text.clip.model
    assert any(type(part).__name__ == "QuickGELU" for part in model.modules())
    seen = by_hand(model.encode_image, open_clip.image_transform(224, is_train=False), images)
    with torch.no_grad():
        read = model.encode_text(open_clip.tokenize(PROMPTS))
    assert scores.shape == (3,) and scores.dtype == torch.float32 and mask is None
    assert scores.tolist() == pytest.approx(cosines(seen, read), abs=2e-3)


def test_clip_image_by_hand(tiny: str) -> None:
    images, references = images_of(3, 64, 48), images_of(3, 40, 40, seed=1)
    reward: Any = create("clip-i", pretrained=None, model=tiny, batch_size=2)
    transform = open_clip.image_transform(32, is_train=False)
    seen = by_hand(reward.clip.model.encode_image, transform, images)
    goals = by_hand(reward.clip.model.encode_image, transform, references)
    assert reward(images, PROMPTS, references).scores.tolist() == pytest.approx(cosines(seen, goals), abs=2e-3)
    assert reward(images, PROMPTS, images).scores.tolist() == pytest.approx([1, 1, 1], abs=1e-6)


def test_dino_by_hand(dino: DINOReward) -> None:
    """The real ViT-S/16; its class token of 384 numbers."""
    images, references = images_of(2, 96, 80), images_of(2, 64, 64, seed=1)
    transform = dino_transform()
    model: Any = dino.model

    def class_token(pixels: Tensor) -> Tensor:
        return model.forward_features(pixels)[:, 0]

    seen, goals = by_hand(class_token, transform, images), by_hand(class_token, transform, references)
    assert seen.shape == (2, 384)
    assert dino(images, [], references).scores.tolist() == pytest.approx(cosines(seen, goals), abs=2e-3)
    assert dino(images, [], images).scores.tolist() == pytest.approx([1, 1], abs=1e-6)


@pytest.mark.parametrize("name", ["clip-i", "dino"])
def test_several_references_are_averaged(name: str, tiny: str, dino: DINOReward) -> None:
    reward: Any = dino if name == "dino" else create("clip-i", pretrained=None, model=tiny)
    images = images_of(2, 64, 64)
    several = torch.stack([images_of(2, 48, 48, seed=seed) for seed in (1, 2)], dim=1)
    each = torch.stack([reward(images, [], several[:, index]).scores for index in (0, 1)])
    torch.testing.assert_close(reward(images, [], several).scores, each.mean(0))


def test_clip_score_and_templates(tiny: str) -> None:
    images = images_of(3, 48, 48)
    torch.manual_seed(0)
    plain: Any = create("clip-t", pretrained=None, model=tiny, template="A photo depicts {}")
    torch.manual_seed(0)
    score: Any = create("clip-t", pretrained=None, model=tiny, clip_score=True)
    cosine = plain(images, PROMPTS).scores
    torch.testing.assert_close(score(images, PROMPTS).scores, 2.5 * cosine.clamp(min=0))
    with torch.no_grad():  # the other way round, so that what was positive is negative
        score.clip.model.text_projection.neg_()
    score.clip._texts.clear()
    torch.testing.assert_close(score(images, PROMPTS).scores, 2.5 * (-cosine).clamp(min=0))
    bare: Any = create("clip-t", pretrained=None, model=tiny)
    bare.clip = plain.clip
    written = bare(images, [f"A photo depicts {prompt}" for prompt in PROMPTS]).scores
    torch.testing.assert_close(written, cosine)
    with pytest.raises(ValueError, match=r"CLIPTextReward: template: expected '\{\}' in it .* got 'a photo'"):
        create("clip-t", pretrained=None, model=tiny, template="a photo")


def test_hpsv2_by_hand(tiny: str) -> None:
    images = images_of(3, 40, 64)
    reward: Any = create("hpsv2", checkpoint=None, model=tiny, batch_size=2)
    model = reward.clip.model
    seen = by_hand(model.encode_image, padded, images)
    with torch.no_grad():
        read = model.encode_text(open_clip.tokenize(PROMPTS))
    assert reward(images, PROMPTS).scores.tolist() == pytest.approx(cosines(seen, read), abs=2e-3)


def test_aesthetic_by_hand(tiny: str, tmp_path: Path) -> None:
    """The head of LAION's shape, read from a file, is one affine map of the unit embedding."""
    images = images_of(3, 48, 64)
    head = AestheticHead()
    assert [name for name, _ in head.named_parameters()] == [
        f"layers.{index}.{kind}" for index in (0, 2, 4, 6, 7) for kind in ("weight", "bias")
    ]
    torch.save(head.state_dict(), tmp_path / "head.pth")
    reward: Any = create("aesthetic", pretrained=None, head=tmp_path / "head.pth", model=tiny, batch_size=2)
    matrix, offset = torch.eye(768, dtype=torch.float64), torch.zeros(768, dtype=torch.float64)
    for index in (0, 2, 4, 6, 7):
        weight = head.state_dict()[f"layers.{index}.weight"].double()
        matrix, offset = weight @ matrix, weight @ offset + head.state_dict()[f"layers.{index}.bias"].double()
    seen = by_hand(reward.clip.model.encode_image, open_clip.image_transform(32, is_train=False), images).double()
    expected = (seen / seen.norm(dim=1, keepdim=True)) @ matrix[0] + offset
    assert reward(images).scores.tolist() == pytest.approx(expected.tolist(), abs=1e-4)


@pytest.mark.parametrize(
    ("model", "width"), [("ViT-B-32-quickgelu", 512), ("ViT-L-14-quickgelu", 768), ("ViT-H-14", 1024)]
)
def test_default_architectures(model: str, width: int) -> None:
    """Without memory for their weights: names and widths are what the published weights need."""
    with torch.device("meta"):
        network = open_clip.create_model(model, pretrained=None, device="meta")
    assert network.text_projection.shape[1] == width and network.visual.image_size in (224, (224, 224))
    assert model == "ViT-H-14" or open_clip.get_pretrained_cfg(model, "openai")["quick_gelu"]


def test_defaults_name_these_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []

    def fake(name: str, pretrained: str | None = None, **options: Any) -> None:
        asked.append((name, pretrained))
        raise RuntimeError("no network")

    monkeypatch.setattr(open_clip, "create_model", fake)
    for name, options in {
        "clip-t": {"pretrained": "openai"},
        "clip-i": {"pretrained": "openai"},
        "aesthetic": {"pretrained": "openai", "head": None},
        "hpsv2": {"checkpoint": None},
    }.items():
        with pytest.raises(RuntimeError, match="no network"):
            create(name, **options)
    small, large = ("ViT-B-32-quickgelu", "openai"), ("ViT-L-14-quickgelu", "openai")
    assert asked == [small, small, large, ("ViT-H-14", None)]


def test_chunks_autocast_and_gradients(tiny: str, dino: DINOReward) -> None:
    images = images_of(5, 48, 48).requires_grad_()
    prompts = [*PROMPTS, "one", "two"]
    torch.manual_seed(0)
    reward: Any = create("clip-t", pretrained=None, model=tiny, batch_size=2)
    torch.manual_seed(0)
    whole: Any = create("clip-t", pretrained=None, model=tiny, batch_size=64)
    scores = reward(images, prompts).scores
    assert not scores.requires_grad
    torch.testing.assert_close(scores, whole(images, prompts).scores, rtol=0, atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        whole.clip._texts.clear()
        torch.testing.assert_close(scores, whole(images, prompts).scores, rtol=0, atol=1e-6)
    half = reward(images.detach().bfloat16(), prompts).scores
    assert half.dtype == torch.float32
    for model in (reward.clip.model, dino.model):
        assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_each_prompt_is_read_once(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reward: Any = create("clip-t", pretrained=None, model=tiny)
    read: list[int] = []
    encode = reward.clip.model.encode_text
    monkeypatch.setattr(reward.clip.model, "encode_text", lambda tokens: read.append(len(tokens)) or encode(tokens))
    images = images_of(3, 32, 32)
    first = reward(images, ["a", "b", "a"]).scores
    second = reward(images, ["a", "b", "c"]).scores
    assert read == [2, 1]
    torch.testing.assert_close(first[:2], second[:2], rtol=0, atol=0)


def test_empty_batch(tiny: str) -> None:
    for name, options in {"clip-t": {"pretrained": None}, "hpsv2": {"checkpoint": None}}.items():
        assert create(name, model=tiny, **options)(torch.zeros(0, 3, 32, 32), [], None)[0].shape == (0,)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_clip_from_a_file(tiny: str, tmp_path: Path, suffix: str) -> None:
    from safetensors.torch import save_file

    path = tmp_path / f"clip.{suffix}"
    first: Any = create("hpsv2", checkpoint=None, model=tiny)
    state = first.clip.model.state_dict()
    save_file(state, path) if suffix == "safetensors" else torch.save({"state_dict": state, "epoch": 1}, path)
    second = HPSv2Reward(checkpoint=path, model=tiny)
    images = images_of(3, 32, 48)
    torch.testing.assert_close(first(images, PROMPTS).scores, second(images, PROMPTS).scores, rtol=0, atol=0)


def test_dino_from_a_file(tmp_path: Path) -> None:
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    torch.save({f"module.{name}": tensor for name, tensor in network.state_dict().items()}, tmp_path / "dino.pth")
    reward = DINOReward(pretrained=tmp_path / "dino.pth", model="vit_tiny_patch16_224")
    assert torch.equal(reward.model.state_dict()["cls_token"], network.state_dict()["cls_token"])
    with pytest.raises(ValueError, match=r"DINOReward: pretrained: expected a state dict of .*, got .*size mismatch"):
        DINOReward(pretrained=tmp_path / "dino.pth")


class Bomb:
    """Sets a flag when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("import sys; sys._fastvar_bomb = True",)


@pytest.fixture
def bad_files(tmp_path: Path) -> Iterator[dict[str, Path]]:
    files = {name: tmp_path / f"{name}.pth" for name in ("keys", "list", "code", "junk", "none")}
    torch.save({"somewhere.weight": torch.zeros(2)}, files["keys"])
    torch.save([1, 2], files["list"])
    files["code"].write_bytes(pickle.dumps(Bomb(), protocol=2))
    files["junk"].write_bytes(b"<html>not found</html>")
    files["safe"] = tmp_path / "safe.safetensors"
    files["safe"].write_bytes(b"<html>not found</html>")
    yield files
    assert not hasattr(sys, "_fastvar_bomb")


@pytest.mark.parametrize("bad", ["keys", "list", "code", "junk", "safe", "none"])
def test_bad_files(tiny: str, bad_files: dict[str, Path], bad: str) -> None:
    """A file that does not fit is an error that names argument and file, and no code in it is run."""
    path = bad_files[bad]
    attempts = {
        "AestheticReward: head": lambda: AestheticReward(pretrained=None, head=path, model=tiny),
        "CLIPTextReward: pretrained": lambda: CLIPTextReward(pretrained=path, model=tiny),
        "DINOReward: pretrained": lambda: DINOReward(pretrained=path, model="vit_tiny_patch16_224"),
        "HPSv2Reward: (checkpoint|pretrained)": lambda: HPSv2Reward(checkpoint=path, model=tiny),
    }
    for message, attempt in attempts.items():
        with pytest.raises(ValueError, match=rf"^{message}: expected .*got .*{path.name}") as raised:
            attempt()
        assert "weights_only" not in str(raised.value)  # torch's advice, to run the file's code
    if bad == "keys":
        with pytest.raises(ValueError, match=r"Missing key.*layers\.0\.weight.*Unexpected key.*somewhere\.weight"):
            AestheticReward(pretrained=None, head=path, model=tiny)


def test_quickgelu_trap() -> None:
    for name, options in {"clip-t": {}, "clip-i": {}, "aesthetic": {"head": None}}.items():
        with pytest.raises(
            ValueError, match=r"model: expected 'ViT-L-14-quickgelu', got 'ViT-L-14': the weights 'openai'"
        ):
            create(name, pretrained="openai", model="ViT-L-14", **options)


def test_wrong_options(tiny: str) -> None:
    # weights are always named
    with pytest.raises(ValueError, match="options of 'clip-t': missing a required argument: 'pretrained'"):
        create("clip-t")
    with pytest.raises(ValueError, match=r"CLIPImageReward: model: expected an architecture .* got 'ViT-B-33'"):
        create("clip-i", pretrained=None, model="ViT-B-33")
    with pytest.raises(ValueError, match=r"CLIPTextReward: pretrained: expected a file or one of .*'openai'.*'opnai'"):
        create("clip-t", pretrained="opnai")
    with pytest.raises(ValueError, match=r"DINOReward: pretrained: expected a file or one of .*'dino'.*, got 'dina'"):
        create("dino", pretrained="dina")
    with pytest.raises(ValueError, match=r"DINOReward: model: expected an architecture of timm .*'vit_smell'"):
        create("dino", pretrained=None, model="vit_smell")
    with pytest.raises(
        ValueError, match="HPSv2Reward: checkpoint: expected the path of a file, got 'laion2b_s32b_b79k'"
    ):
        create("hpsv2", checkpoint="laion2b_s32b_b79k")
    with pytest.raises(ValueError, match="CLIPTextReward: batch_size: expected at least 1, got 0"):
        create("clip-t", pretrained=None, model=tiny, batch_size=0)


def test_wrong_calls(tiny: str, dino: DINOReward) -> None:
    images = images_of(2, 32, 32)
    text: Any = create("clip-t", pretrained=None, model=tiny)
    with pytest.raises(ValueError, match="CLIPTextReward: prompts: expected 2, got 1"):
        text(images, ["one"])
    with pytest.raises(ValueError, match=r"CLIPTextReward: images: expected values in \[0, 1\]"):
        text(images * 2 - 1, ["one", "two"])
    for reward in (dino, create("clip-i", pretrained=None, model=tiny)):
        name = type(reward).__name__
        with pytest.raises(ValueError, match=rf"{name}: references: expected \(B, 3, H, W\), got None"):
            reward(images, ["one", "two"], None)
        with pytest.raises(ValueError, match=rf"{name}: references: expected some for each of 2 images, got \(1, 3"):
            reward(images, ["one", "two"], images[:1])
        with pytest.raises(ValueError, match=rf"{name}: references: expected values in \[0, 1\]"):
            reward(images, ["one", "two"], images * 255)


@pytest.mark.parametrize(
    ("name", "package", "options"),
    [
        ("clip-t", "open_clip", {"pretrained": None}),
        ("hpsv2", "open_clip", {"checkpoint": None}),
        ("dino", "timm", {"pretrained": None}),
    ],
)
def test_missing_packages(name: str, package: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{package} is needed: pip install .*\[rewards\]"):
        create(name, **options)


def test_descriptions(tiny: str, dino: DINOReward) -> None:
    """Which weights, and the bytes of all of them: float32, and open_clip's buffers."""

    def size(*networks: nn.Module) -> int:
        return sum(part.numel() * part.element_size() for network in networks for part in network.state_dict().values())

    assert dino.description.weights == "timm vit_small_patch16_224, random"
    assert dino.description.memory == size(dino.model) > 4 * 21e6 and "248" in dino.description.preprocessing
    aesthetic: Any = create("aesthetic", pretrained=None, head=None, model=tiny)
    assert aesthetic.description.weights == f"open_clip {tiny}, random and a linear head, random"
    assert aesthetic.description.memory == size(aesthetic.clip.model, aesthetic.head)
    for options, expected in (({}, "-1 to 1"), ({"clip_score": True}, "0 to 2.5")):
        assert create("clip-t", pretrained=None, model=tiny, **options).description.range == expected  # type: ignore[attr-defined]
    hps: Any = create("hpsv2", checkpoint=None, model=tiny)
    assert "black borders" in hps.description.preprocessing


def test_a_description_knows_the_file_of_weights(tmp_path: Path) -> None:
    """Scores of other weights at the same path are not taken for theirs."""
    path = tmp_path / "weights.pt"
    path.write_bytes(b"12")
    os.utime(path, ns=(0, 10**18))
    assert weights_name(path) == f"{path} (2 bytes, of 2001-09-09T01:46:40+00:00)"
    os.utime(path, ns=(0, 10**18 + 10**9))
    assert weights_name(path).endswith("01:46:41+00:00)")
    assert (weights_name("openai"), weights_name(None)) == ("openai", "random")


def test_weights_are_loaded_once(tiny: str, tmp_path: Path) -> None:
    """Rewards by the same weights share a network; random ones are each their own."""
    first: Any = create("clip-t", pretrained=None, model=tiny)
    path = tmp_path / "clip.pt"
    torch.save(first.clip.model.state_dict(), path)
    one: Any = create("clip-t", pretrained=path, model=tiny)
    other: Any = create("clip-i", pretrained=str(path), model=tiny, batch_size=3)
    assert one.clip.model is other.clip.model and other.clip.batch_size == 3
    assert create("clip-i", pretrained=None, model=tiny).clip.model is not first.clip.model  # type: ignore[attr-defined]


def test_a_device_of_its_own(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The images go there, and the scores come back to theirs."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # there is none on "meta"
    reward: Any = create("clip-i", pretrained=None, model=tiny, device="meta")
    seen: list[torch.device] = []
    reward.frozen(lambda images: seen.append(images.device), images_of(1, 8, 8))
    assert seen == [torch.device("meta")]
    other: Any = create("clip-i", pretrained=None, model=tiny, device="cpu")
    images = images_of(2, 8, 8)
    torch.testing.assert_close(other(images, [], images).scores, torch.ones(2))


def test_embedding(dino: DINOReward) -> None:
    """Products of embeddings are the scores."""
    images, references = images_of(2, 20, 30), images_of(2, 40, 20, seed=1)
    product = (dino.embed(images) * dino.embed(references)).sum(1)
    torch.testing.assert_close(product, dino(images, [], references).scores)
    with pytest.raises(ValueError, match=r"DINOReward: images: expected values in \[0, 1\]"):
        dino.embed(images * 255)


def test_importing_is_light() -> None:
    assert {"clip-t", "clip-i", "dino", "aesthetic", "hpsv2", "remote"} <= set(available())
    code = "import sys, fastvar.rl.rewards; print({'open_clip', 'timm', 'torchvision', 'easyocr'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.stdout == "set()\n", done.stdout + done.stderr
