"""Every script of examples/, run in small."""

from __future__ import annotations

import importlib.util
import sys
from collections import defaultdict
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from fastvar.models import VAR, Infinity
from fastvar.rl.adapters import TARGETS
from fastvar.rl.rewards import check_options, create
from tests.golden.golden import load_case
from tests.helpers.policies import bitwise_policy
from tests.helpers.public_var import PublicVAR
from tests.helpers.tiny import tiny_var

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def saved(folder: Path, **fields: Any) -> VAR:
    var = tiny_var(**fields)
    var.save_pretrained(folder)
    return var


def photos(folder: Path, classes: int) -> Path:
    for label in range(classes):
        (folder / str(label)).mkdir(parents=True)
        Image.new("RGB", (20, 24), (40 * label, 90, 200)).save(folder / str(label) / "a.png")
    return folder


def test_all_are_listed_and_run() -> None:
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    listed, tested = (EXAMPLES / "README.md").read_text(), Path(__file__).read_text()
    assert all(f"[`{name}.py`]({name}.py)" in listed and f'example("{name}")' in tested for name in names)


def test_sample_public_weights(tmp_path: Path) -> None:
    case = load_case("var_tiny")
    torch.save(case.transformer, tmp_path / "var.pth")
    torch.save(case.tokenizer, tmp_path / "vae.pth")
    example("sample_public_weights").main(tmp_path / "var.pth", tmp_path / "vae.pth", (1, 2), tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").width > 0


def test_finetune_on_folder(tmp_path: Path) -> None:
    var = saved(tmp_path / "model")
    folder = photos(tmp_path / "photos", var.config.num_classes)
    example("finetune_on_folder").main(tmp_path / "model", folder, tmp_path / "run", steps=2, batch_size=2)
    after = VAR.from_pretrained(tmp_path / "run" / "model")
    assert not torch.equal(after.head.weight, var.head.weight)


def test_own_reward(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    var = saved(tmp_path / "model")
    example("own_reward").main(tmp_path / "model", tmp_path / "run", iterations=1, group_size=2)
    after = VAR.from_pretrained(tmp_path / "run" / "model")
    assert after.state_dict().keys() == var.state_dict().keys()


def test_own_reader() -> None:
    module = example("own_reader")
    empty = {name: [] for name in ("text", "conf", "left", "top", "width", "height")}  # type: dict[str, list[Any]]
    word = {"text": ["", "fast"], "conf": [-1, 90], "left": [0, 8], "top": [0, 2], "width": [0, 16], "height": [0, 10]}
    answers = iter([empty, word])
    reward = module.OCRReward(module.TesseractReader(lambda image: next(answers)))
    found = reward(torch.ones(2, 3, 16, 32), ["fast", "fast"], None)
    assert found.scores[1] > found.scores[0]
    assert found.mask is not None and found.mask[1, 5, 12] and not found.mask[1, 5, 28]


def test_subject_from_photo(tmp_path: Path) -> None:
    var = saved(tmp_path / "model", subject="block_causal")
    Image.new("RGB", (40, 30), (200, 90, 20)).save(tmp_path / "photo.png")
    example("subject_from_photo").main(tmp_path / "model", tmp_path / "photo.png", 1, 3, tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").height >= var.tokenizer.config.image_size[0]


def test_policy_loss_in_your_loop(capsys: pytest.CaptureFixture[str]) -> None:
    example("policy_loss_in_your_loop").main()
    assert capsys.readouterr().out.count("loss") == 3


def test_attention_in_your_block() -> None:
    assert example("attention_in_your_block").main() < 1e-5


def test_profile_step() -> None:
    assert any(name.startswith("fastvar::") for name in example("profile_step").main(depth=1, batch=1))


def test_lora_with_rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    module, net = example("lora_with_rewards"), bitwise_policy()
    before, named = {name: each.clone() for name, each in net.state_dict().items()}, list[str]()

    def load(*files: Path, grids: Any, text_encoder: Any) -> tuple[Infinity, None]:
        assert files == (Path("net"), Path("vae")) and grids == (1, 2) and named == ["hpsv2", "clip-t"]
        net.text_encoder = text_encoder
        return net, None

    def named_reward(name: str, **options: Any) -> Any:
        check_options(name, options)
        named.append(name)
        return create({"hpsv2": "jpeg", "clip-t": "colour"}[name])

    monkeypatch.setattr(module, "create", named_reward)
    monkeypatch.setattr(module, "load_infinity", load)
    (tmp_path / "prompts").write_text("a sign\na door\n")
    files = Path("net"), Path("vae"), "characters-16", Path("hps"), tmp_path / "prompts", tmp_path / "run"
    module.main(*files, grids=(1, 2), iterations=1, group_size=2)
    after = Infinity.from_pretrained(tmp_path / "run").state_dict()
    assert after.keys() == before.keys()
    changed = {name.split(".")[-2] for name in after if not torch.equal(after[name], before[name])}
    assert changed and changed <= set(TARGETS)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_in_your_trainer(smoothing: float) -> None:
    """The loss and the gradients of the public trainer's lines."""
    loss_of = example("cross_entropy_in_your_trainer").loss_of
    torch.manual_seed(0)
    model, tokens = PublicVAR(), torch.randint(32, (2, 30))
    labels, inputs, weights = torch.tensor([1, 2]), torch.randn(2, 29, 4), torch.rand(30)
    model.eval()
    logits = model(labels, inputs)
    theirs = F.cross_entropy(logits.view(-1, 32), tokens.view(-1), label_smoothing=smoothing, reduction="none")
    theirs = theirs.view(2, -1).mul(weights).sum(-1).mean()
    ours = loss_of(model, labels, inputs, tokens=tokens, weights=weights, smoothing=smoothing)
    parameters = [each for each in model.parameters() if each.requires_grad]
    expected = torch.autograd.grad(theirs, parameters, allow_unused=True)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, parameters, allow_unused=True), expected)
    torch.testing.assert_close(model(labels, inputs), logits)  # the head is as it was
    assert list(model.head.__dict__) == list(torch.nn.Linear(1, 1).__dict__)


def test_cross_entropy_of_bits() -> None:
    loss_of = example("cross_entropy_in_your_trainer").loss_of
    torch.manual_seed(0)
    model, bits, weights = example("cross_entropy_in_your_trainer").Trunk(), torch.rand(4, 21, 32) < 0.5, torch.rand(21)
    labels, inputs = torch.randint(10, (4,)), torch.randn(4, 21, 32)
    logits = model(labels, inputs).view(4, 21, 32, 2)  # of 0 and 1, as Infinity's
    theirs = F.cross_entropy(logits.permute(0, 3, 1, 2), bits.long(), reduction="none").mean(-1)
    theirs = theirs.mul(weights).sum(-1).mean()
    ours = loss_of(model, labels, inputs, tokens=bits, weights=weights)
    torch.testing.assert_close(ours, theirs)
    gradients = [torch.autograd.grad(each, model.head.parameters(), retain_graph=True) for each in (ours, theirs)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("on_policy", [True, False])
def test_policy_loss_in_trl(on_policy: bool) -> None:
    """What TRL's own lines give for loss_type="bnpo", with a trainer that has the attributes of TRL 1.16's."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config).train()
    trainer = example("policy_loss_in_trl").FusedLoss()
    trainer.__dict__.update(
        accelerator=SimpleNamespace(unwrap_model=lambda wrapped: wrapped),
        model=model,
        epsilon_low=0.2,
        epsilon_high=0.3,
        importance_sampling_level="token",
        beta=0.1,
        temperature=0.8,
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, entropy_coef=0.0, use_adaptive_entropy=False),
        loss_type="bnpo",
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        aux_loss_enabled=False,
        current_gradient_accumulation_steps=2,
        _metrics={"train": defaultdict(list)},
    )
    inputs = {
        "prompt_ids": torch.randint(40, (3, 4)),
        "prompt_mask": torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1]]),
        "completion_ids": torch.randint(40, (3, 5)),
        "completion_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]]),
        "advantages": torch.tensor([1.0, -0.5, 0.3]),
        "ref_per_token_logps": torch.randn(3, 5) - 3,
    }
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    logits = model(input_ids=ids, attention_mask=attention).logits[:, 3:-1] / 0.8
    log_probs = logits.log_softmax(-1).gather(2, inputs["completion_ids"][..., None])[..., 0]
    if not on_policy:
        inputs["old_per_token_logps"] = (log_probs + 0.5 * torch.randn(3, 5)).detach()
    ratio = (log_probs - inputs.get("old_per_token_logps", log_probs.detach())).exp()
    advantages, mask = inputs["advantages"][:, None], inputs["completion_mask"]
    per_token = -torch.min(ratio * advantages, ratio.clamp(1 - 0.2, 1 + 0.3) * advantages)
    away = inputs["ref_per_token_logps"] - log_probs
    per_token = per_token + 0.1 * (away.exp() - away - 1)
    theirs = (per_token * mask).sum() / mask.sum() / 2
    ours = trainer._compute_loss(model, inputs)
    torch.testing.assert_close(ours, theirs)
    parameters = list(model.parameters())
    torch.testing.assert_close(torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters))
    assert {*trainer._metrics["train"]} == {"kl", "entropy", "clip_fraction"}
    trainer.loss_type, trainer.args.use_bias_correction_kl = "dapo", True  # what TRL has by default
    with pytest.raises(ValueError, match=r"got loss_type other than 'bnpo', use_bias_correction_kl$"):
        trainer._compute_loss(model, inputs)


def test_policy_loss_in_flow_grpo(capsys: pytest.CaptureFixture[str]) -> None:
    """Without PANW the numbers of flow_grpo's own lines, with a token in the place of a timestep."""
    pytest.importorskip("peft")
    module = example("policy_loss_in_flow_grpo")
    transformer = module.main(epochs=1)
    assert "reward" in capsys.readouterr().out
    with torch.no_grad():
        for each in (transformer.head.weight, *(each for each in transformer.parameters() if each.requires_grad)):
            each.normal_()  # so that the adapters count
    sample, _ = module.draw(transformer, torch.tensor([1, 2]), seed=5)
    sample["log_probs"] = sample["log_probs"] + 0.4 * torch.randn(sample["log_probs"].shape)
    sample["advantages"] = torch.tensor([[7.0], [-0.5]]).expand(-1, 3)
    train = SimpleNamespace(adv_clip_max=5.0, clip_range=0.2, beta=0.0, panw_alpha=0.0)
    logits = transformer(sample["labels"], sample["inputs"])
    log_prob = logits.log_softmax(-1).gather(2, sample["tokens"][..., None])[..., 0]
    ratio, advantages = (log_prob - sample["log_probs"]).exp(), sample["advantages"][:, :1].clamp(-5, 5)
    theirs = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - 0.2, 1 + 0.2)).mean()
    torch.testing.assert_close(module.loss_of(transformer, sample, train).loss, theirs)
    train.beta = 1.0
    assert module.loss_of(transformer, sample, train).kl > 0  # from the model without its adapters


def test_patch_public_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkout whose `models` makes a small VAR with the attributes of the public one."""
    torch.manual_seed(0)

    class Public(PublicVAR):
        def autoregressive_infer_cfg(self, B: int, label_B: torch.Tensor, top_k: int, **options: Any) -> torch.Tensor:
            return super().autoregressive_infer_cfg(label_B, **options)[1][:, :3].sigmoid()

    def build_vae_var(**options: Any) -> tuple[torch.nn.Module, Public]:
        assert options["patch_nums"] == module.SIDES and options["depth"] == 16
        return torch.nn.Linear(1, 1), Public()

    module = example("patch_public_checkout")
    monkeypatch.setitem(sys.modules, "models", SimpleNamespace(build_vae_var=build_vae_var))  # type: ignore[arg-type]
    monkeypatch.setattr(sys, "path", [*sys.path])
    torch.save(Public().state_dict(), tmp_path / "var.pth")
    torch.save(torch.nn.Linear(1, 1).state_dict(), tmp_path / "vae.pth")
    module.main(tmp_path, tmp_path / "var.pth", tmp_path / "vae.pth", labels=(1, 2), output=tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").width > 0
    assert sys.path[0] == str(tmp_path)
    public = Public().eval()
    public.cond_drop_rate = 0.5  # of labels: most often others in each of two calls
    assert module.compare(public, torch.arange(5)) < 1e-4 and public.cond_drop_rate == 0.5
