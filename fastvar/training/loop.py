"""The training loop: AdamW with warm-up and cosine, mixed precision, averaged weights, exact resume."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Generic, Protocol, TypeVar

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from fastvar.files import json_text
from fastvar.pictures import save_picture
from fastvar.random import derive
from fastvar.ranges import (
    Count,
    CountOrNone,
    NotNegative,
    OneOf,
    Positive,
    PositiveOrInfinite,
    Range,
    Seed,
    Share,
    ShareBelowOne,
    check_fields,
)
from fastvar.training.batches import step_loader, step_sampler
from fastvar.training.checkpoints import Checkpoints
from fastvar.training.ema import EMA
from fastvar.training.graphed import GraphedStep, check_alone
from fastvar.training.interrupts import Interrupted, Interrupts, SharedRequests
from fastvar.training.lock import locked
from fastvar.training.log import RunLog
from fastvar.training.settings import SEEDS, check_enough_steps, check_same_settings, write_settings
from fastvar.training.sharded import Blueprint, called, gather_for_methods, mesh_of, name_blocks
from fastvar.training.space import check_space

if TYPE_CHECKING:
    from PIL.Image import Image

_Model = TypeVar("_Model", bound=nn.Module)
Part = Callable[[Any], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class TrainConfig:
    """How to train."""

    steps: Count = 1000
    """Optimizer steps in all. A run that was stopped or has finished can go on to more: from there its learning rate is
    that of a run of so many steps."""
    batch_size: Count = 64
    """Samples per process and optimizer step."""
    learning_rate: Positive = 1e-3
    """Peak of the cosine schedule."""
    final_learning_rate: Share = 0.05
    """End of the cosine schedule as a share of the peak."""
    warmup: Share = 0.05
    """Share of the steps in which the learning rate rises linearly."""
    betas: Annotated[tuple[float, float], Range(0, 1, below=True)] = (0.9, 0.95)
    """The betas of AdamW."""
    weight_decay: NotNegative = 0.05
    """Weight decay of matrices; biases, embeddings, scales and codebooks have none."""
    clip_norm: PositiveOrInfinite = 1.0
    """Largest norm of the gradient; larger ones are scaled down. Infinity for no limit."""
    ema_decay: ShareBelowOne = 0.999
    """Decay of the averaged weights, which are the ones sampled from and saved as the model."""
    precision: Annotated[str, OneOf("auto", "no", "bf16")] = "no"
    """"no" (float32), "bf16" (autocast) or "auto" (bf16 where the hardware computes in it, else float32)."""
    accumulate: Count = 1
    """Micro-batches per optimizer step; must divide the batch size."""
    graphs: bool = False
    """Run micro-batches by CUDA graphs, which helps where the host is slower than the GPU. On one GPU, in one process.
    The graphs keep the activations of a micro-batch in memory, also between steps."""
    seed: Seed = 0
    """Seed of the order of the data, dropout and augmentation."""
    workers: CountOrNone = 0
    """Processes that load data."""
    log_every: Count = 10
    """Steps between two lines of metrics."""
    picture_every: CountOrNone = 0
    """Steps between two pictures; 0 for the last step only."""
    save_every: Count = 500
    """Steps between two checkpoints."""
    save_minutes: NotNegative = 5.0
    """Also save when so many minutes have passed since the last checkpoint, but never for more than a twentieth of the
    time; 0 for not."""
    keep: Count = 2
    """Checkpoints that are kept."""
    resume: bool = True
    """Go on from the newest checkpoint in the output folder, if there is one."""

    def check(self) -> None:
        """Raise a ValueError that names a setting which makes no sense; `train` does so before anything else."""
        check_fields(self)
        if self.batch_size % self.accumulate:
            expected = f"a divisor of the batch size {self.batch_size}"
            raise ValueError(f"TrainConfig: accumulate: expected {expected}, got {self.accumulate}")

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of a step, 0 to steps - 1."""
        warmup = max(round(self.warmup * self.steps), 1)
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        progress = (step - warmup) / max(self.steps - warmup, 1)
        low = self.final_learning_rate
        return self.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress)))


class Task(Protocol[_Model]):
    """What is trained: a model, its loss on a batch, and what to show of it.

    A task that can be run by graphs has a method `tensors(batch)` besides: what `loss` reads of a batch, by the same
    names and on the model's device, tensors alone.
    """

    name: str
    model: _Model
    identity: dict[str, Any]
    """What besides the model's config decides what is learned; a run is only resumed with the same."""

    def loss(self, model: nn.Module, batch: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The scalar to minimise and scalars to log, called with the (possibly wrapped) model in training mode."""

    def picture(self, model: _Model) -> Image | None:
        """A picture of what the averaged model can do, or None."""


@dataclass
class TrainResult(Generic[_Model]):
    """What a run left.

    Attributes:
        model: the averaged model in evaluation mode. Where FSDP2 has sharded it, it is put together on the CPU of the
            first process; others have their part of it.
        output: the run's folder: `model/` (save_pretrained), `metrics.jsonl`, `pictures/`, `tensorboard/`,
            `checkpoints/`.
        seconds: of this call.
        steps_run: steps of this call; fewer than the config's if it resumed.
    """

    model: _Model
    output: Path
    seconds: float
    steps_run: int
    pictures: list[Path] = field(default_factory=list)


def resolve_precision(precision: str, device: torch.device) -> str:
    """What "auto" means on a device: "bf16" if it has instructions for bfloat16, else "no"; other settings as they are.

    A CPU without them emulates bfloat16 and takes several times as long as in float32.
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:  # private to torch: where they are missing, nothing is known of the CPU
        checks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
        native = device.type == "cpu" and any(check is not None and check() for check in checks)
    return "bf16" if native else "no"


def launched_precision(precision: str) -> str:
    """A run's precision under `accelerate launch`, whose own (--mixed_precision, or its config file) decides only what
    "auto" means: autocast is ours.

    Raises:
        ValueError: the two contradict each other.
    """
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched in ("no", precision):
        return precision
    if (launched, precision) == ("bf16", "auto"):
        return launched
    expected = "bf16 there as here (--precision bf16), or no" if launched == "bf16" else "no or bf16"
    raise ValueError(
        f"train: precision: expected accelerate's --mixed_precision to be {expected}; got {launched} there, "
        f"{precision} here"
    )


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weights of linear layers and convolutions with weight decay; all else, embeddings and codebooks too, without.

    Raises:
        ValueError: nothing to train.
    """
    matrices = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if id(p) in matrices]
    plain = [p for p in trained if id(p) not in matrices]
    if not decayed and not plain:
        raise ValueError("train: model: expected parameters that require a gradient, got none")
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def train(task: Task[_Model], dataset: Any, config: TrainConfig, output: Path) -> TrainResult[_Model]:
    """Train a task's model; goes on from the newest checkpoint in `output` if there is one.

    Everything that a step does follows from (config, data, step): an interrupted run that resumes gives the same
    weights as one that was never interrupted, bit by bit on a CPU.

    Args:
        task: the model and its loss.
        dataset: a map-style data set whose items (or `batch(indices)`) are dictionaries with what the task reads. If it
            has `buckets`, a number for each item, a batch has items of one of them.
        config: how.
        output: the run's folder.

    Raises:
        ValueError: settings that make no sense, or others than those of the run that would be resumed.
        OSError: no room for a checkpoint.
        RuntimeError: the gradient is not finite.
        Interrupted: SIGINT or SIGTERM came; the step was finished and saved.
    """
    from accelerate import Accelerator
    from accelerate.utils import set_seed

    config.check()
    check_space(output, task.model)
    if hasattr(task, "check_data"):  # whether the data fits the model; a task need not know
        task.check_data(dataset)
    # Autocast is ours: accelerate fixes its precision once per process, but two runs may differ.
    accelerator = Accelerator(mixed_precision="no", cpu=not torch.cuda.is_available())
    check_alone("TrainConfig: graphs", config.graphs, accelerator)
    if config.graphs and not hasattr(task, "tensors"):
        raise ValueError(f"TrainConfig: graphs: expected False, as {type(task).__name__} has no `tensors`, got True")
    set_seed(derive(config.seed, "training", accelerator.process_index))
    precision = resolve_precision(launched_precision(config.precision), accelerator.device)
    config = replace(config, precision=precision)  # resuming compares it
    with locked(output, active=accelerator.is_main_process), Interrupts() as interrupts:
        return _train(accelerator, task, dataset, config, output, interrupts)


def _train(
    accelerator: Any, task: Task[_Model], dataset: Any, config: TrainConfig, output: Path, interrupts: Interrupts
) -> TrainResult[_Model]:
    start = time.perf_counter()
    task.model.to(accelerator.device)
    optimizer = torch.optim.AdamW(
        parameter_groups(task.model, config.weight_decay), lr=config.learning_rate, betas=config.betas, fused=True
    )
    blueprint = Blueprint(task.model, sharded=accelerator.distributed_type == "FSDP")
    name_blocks(task.model, getattr(task.model, "blocks", ()))
    model, optimizer = accelerator.prepare(task.model, optimizer)
    gather_for_methods(model)
    ema = EMA(blueprint, config.ema_decay)
    checkpoints = Checkpoints(accelerator, output, model, optimizer, ema, keep=config.keep, minutes=config.save_minutes)

    settings = _settings(task, dataset, config, accelerator.num_processes)
    resumed_from = checkpoints.newest() if config.resume else None
    first_step = resumed_from or 0
    main = accelerator.is_main_process
    if resumed_from is not None:
        check_same_settings(output / "settings.json", settings, may_change=_MAY_CHANGE)
        check_enough_steps("steps", config.steps, resumed_from, output)
        checkpoints.load(resumed_from)
    elif main:
        checkpoints.clear()
        (output / "metrics.jsonl").unlink(missing_ok=True)
    if main:
        write_settings(output / "settings.json", settings, resumed_from, config.steps)
    sampler = step_sampler(
        dataset,
        config.batch_size,
        seed=config.seed,
        first_step=first_step,
        last_step=config.steps,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )
    log = RunLog(output, first_step, config.steps, title=task.name, active=main)
    result: TrainResult[_Model] = TrainResult(ema.model, output, 0.0, config.steps - first_step)
    requests = SharedRequests(accelerator)
    part = _part_of(accelerator, task, model, config)
    check: _Check | None = None
    try:
        for step, batch in enumerate(step_loader(dataset, sampler, workers=config.workers), first_step):
            before = check
            metrics, check = _step(accelerator, task, model, optimizer, part, batch, config, step)
            if before is not None:  # by now it is known, and the device is busy with this step
                before.raise_if_bad()
            ema.update(accelerator.unwrap_model(model))
            done, last = step + 1, step + 1 == config.steps
            stop, due = requests(interrupts.received is not None, checkpoints.due())
            save = stop or due or last or done % config.save_every == 0
            shown = last or (config.picture_every and done % config.picture_every == 0)
            if shown or save or done % config.log_every == 0:
                check.raise_if_bad()
            log.advance()
            if done % config.log_every == 0 or last:
                log.write(done, _over_processes(accelerator, metrics))
            if shown and (main or mesh_of(ema.model)):  # of sharded weights all have to draw
                _show(task, ema, log, done, output, result)
            if save:
                saved = checkpoints.save(done)
            if stop and not last:
                raise Interrupted(interrupts.received or "SIGTERM", done, saved)
    finally:
        log.close()
    averaged: Any = blueprint.whole(ema.model)
    result.model = averaged
    if main:
        averaged.save_pretrained(output / "model")
    accelerator.wait_for_everyone()
    result.seconds = time.perf_counter() - start
    return result


def _part_of(accelerator: Any, task: Task[Any], model: nn.Module, config: TrainConfig) -> Part:
    """What runs a micro-batch: forward, loss and backward; it answers the loss and what is logged, detached."""

    def run(batch: Any) -> dict[str, torch.Tensor]:
        with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            loss, logged = task.loss(model, batch)
        accelerator.backward(loss / config.accumulate)
        return {name: value.detach() for name, value in {"loss": loss, **logged}.items()}

    if not config.graphs:
        return run
    step, tensors = GraphedStep(lambda **batch: run(batch), model), task.tensors  # type: ignore[attr-defined]
    return lambda batch: step(**tensors(batch))


def _step(
    accelerator: Any,
    task: Task[Any],
    model: nn.Module,
    optimizer: Any,
    run: Part,
    batch: Any,
    config: TrainConfig,
    step: int,
) -> tuple[dict[str, Any], _Check]:
    """One optimizer step; it is left out where the gradient is not finite. Nothing waits for the device."""
    model.train()
    rate = config.learning_rate_at(step)
    for group in optimizer.param_groups:
        group["lr"] = rate
    metrics: dict[str, Any] = {}
    for i, part in enumerate(_parts(batch, config.accumulate)):
        with nullcontext() if i + 1 == config.accumulate else accelerator.no_sync(model):
            results = run(part)
        for name, value in results.items():
            metrics[name] = metrics.get(name, 0.0) + value / config.accumulate
    norm = accelerator.clip_grad_norm_(model.parameters(), config.clip_norm)
    sharded = isinstance(norm, DTensor)
    norm = norm.full_tensor() if sharded else norm
    check = _Check(task.name, step, metrics["loss"], norm)
    if sharded:  # the optimizer cannot ask sharded weights and a whole number together
        check.raise_if_bad()
    else:
        optimizer.optimizer.found_inf = check.bad  # what PyTorch's fused optimizers ask, as under loss scaling
    optimizer.step()
    optimizer.zero_grad(set_to_none=not config.graphs)
    return {**metrics, "gradient_norm": norm, "learning_rate": rate}, check


class _Check:
    """Whether a step's gradient is finite, on its way to the host. It is the same in all processes, so that all of them
    stop."""

    def __init__(self, name: str, step: int, loss: torch.Tensor, norm: torch.Tensor) -> None:
        self.name, self.step, self.bad = name, step, (~norm.isfinite()).float()
        self.values = torch.stack([loss.float(), norm.float()]).to("cpu", non_blocking=True)
        self.event = torch.cuda.current_stream(norm.device).record_event() if norm.is_cuda else None

    def raise_if_bad(self) -> None:
        if self.event is not None:
            self.event.synchronize()
        loss, norm = self.values.tolist()
        if not math.isfinite(norm):
            raise RuntimeError(f"{self.name}: at step {self.step + 1} the loss is {loss}, its gradient's norm {norm}")


# Settings that change what a run shows and keeps, but not what it learns; and how far it goes, which is kept apart.
_MAY_CHANGE = (
    "steps",
    "log_every",
    "picture_every",
    "save_every",
    "save_minutes",
    "keep",
    "resume",
    "workers",
    "graphs",
)


def _settings(task: Task[Any], dataset: Any, config: TrainConfig, processes: int) -> dict[str, Any]:
    """What decides the run's result, as JSON has it."""
    plain = (bool, int, float, str, tuple)
    described = {n: v for n, v in vars(dataset).items() if not n.startswith("_") and isinstance(v, plain)}
    settings = {
        "train": {name: value for name, value in asdict(config).items() if name not in _MAY_CHANGE},
        "model": asdict(task.model.config),
        "data": {"kind": type(dataset).__name__, "items": len(dataset), **described},
        "processes": processes,
        "seeds": SEEDS,
        **task.identity,
    }
    return json.loads(json_text(settings))


def _over_processes(accelerator: Any, metrics: dict[str, Any]) -> dict[str, float]:
    """The mean of each metric over all processes."""
    values = torch.stack([torch.as_tensor(value, device=accelerator.device).float() for value in metrics.values()])
    return dict(zip(metrics, accelerator.reduce(values, "mean").tolist(), strict=True))


def _parts(batch: Any, count: int) -> list[Any]:
    if count == 1:
        return [batch]

    def slices(value: Any) -> list[Any]:
        size = len(value) // count
        return [value[i * size : (i + 1) * size] for i in range(count)]

    columns = {name: slices(value) for name, value in batch.items()}
    return [{name: column[i] for name, column in columns.items()} for i in range(count)]


def _show(task: Task[Any], ema: EMA, log: RunLog, step: int, output: Path, result: TrainResult[Any]) -> None:
    # Drawing samples must not disturb the training's random numbers.
    with torch.random.fork_rng(devices=list(range(torch.cuda.device_count()))), torch.no_grad():
        image = called(ema.model, task.picture)
    if image is not None and log.active:
        path = output / "pictures" / f"step-{step:08d}.png"
        save_picture(image, path)
        log.picture(step, task.name, image)
        result.pictures.append(path)
