"""What the demo's report says, and its five figures."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

from fastvar.pictures import image_grid
from fastvar.report import Report, curves, points
from fastvar.training.log import read_metrics

if TYPE_CHECKING:
    import torch

    from fastvar.evaluation import Interval, ReadingScore
    from fastvar.handwriting.demo import DemoConfig, Learned

_SHOWN = 64  # images a gallery
READING = (
    "Read exactly: the share of images from which the reader, a small classifier of digits that was fitted to other "
    "scans of the same data set, reads the number that should be there and nothing else."
)
NED = "NED: the mean of 1 - edit distance / longer length of the number read and the true one; 1 is all right."


def headline(results: dict[str, Any]) -> list[tuple[str, str]]:
    """The five figures of `results.json`, with 95 % intervals; fewer without reinforcement learning."""
    scores, match = results["scores"], results["subject_match"]

    def read(name: str) -> str:
        return percent(scores[name]["word_accuracy"], scores[name]["word_accuracy_95"])

    rows = [("guided samples read exactly", read("samples, guided"))]
    for kind in ("shape", "ink"):
        rate = percent(match[kind], match[f"{kind}_95"])
        rows.append((f"samples with a subject: {kind} nearest to its own reference among eight", rate))
    if "rl" not in results:
        return [*rows, ("read exactly without guidance", read("samples, no guidance"))]
    rl = results["rl"]
    before_after = f"{read('samples, no guidance')}, {read('samples, no guidance, after rewards')}"
    return [
        *rows,
        (f"read exactly without guidance, before and after {rl['iterations']} rollouts of VMR-GRPO", before_after),
        ("diversity kept by VMR-GRPO", f"{100 * rl['diversity_kept']:.0f} %"),
    ]


def write_report(
    config: DemoConfig,
    scores: dict[str, ReadingScore],
    learned: Learned | None,
    shown: dict[str, Any],
    results: dict[str, Any],
) -> None:
    """Write `report.html`.

    Args:
        config: of the demo.
        scores: what was read, by the kind of image.
        learned: what reinforcement learning changed, if there was any.
        shown: a batch of test scenes: "image" and "reference" (N, 3, H, W) in [-1, 1], "text".
        results: the figures of `results.json`.
    """
    report = Report("fastvar demo: visual autoregressive models on real handwriting")
    report.text(
        "A VQ tokenizer and a VAR were trained from scratch on scenes composed of scanned digits. Told a number, the "
        "model writes it; given a reference image of a digit, it writes with that digit's shape and ink."
    )
    report.table(["in short", "95 % interval in brackets"], headline(results))
    report.text(READING)
    if learned:
        _rewards(report, learned, config)
    _readings(report, config, scores, results)
    _subject(report, scores, shown, results)
    report.heading("The tokenizer")
    rebuilt = scores["their reconstructions"]
    report.text("Left a test scene, right its reconstruction.")
    _pairs(
        report,
        shown["image"] * 0.5 + 0.5,
        rebuilt.images,
        reading_labels(scores["test scenes"]),
        reading_labels(rebuilt),
        count=16,
    )
    _training(report, config, results)
    _next(report, config)
    report.heading("How this was made")
    report.table(["", ""], list(results["provenance"].items()))
    report.write(config.output / "report.html")


def _rewards(report: Report, learned: Learned, config: DemoConfig) -> None:
    before, after = learned.before, learned.after
    report.heading("Learning from rewards, before and after")
    report.text(
        f"VMR-GRPO with the OCR reward, {learned.iterations} rollouts of 64 images: the VAR without a subject, sampled "
        "without guidance, learns to write what the reader can read. Left a sample from before, right one of the same "
        "seed after, each with its number; what was read is in red where it is wrong. Seeds of the evaluation are not "
        "those of training."
    )
    every_second = slice(0, _SHOWN, 2)
    _pairs(
        report,
        before.read.images[every_second],
        after.read.images[every_second],
        reading_labels(before.read)[every_second],
        reading_labels(after.read)[every_second],
    )
    report.table(
        ["", "read exactly (95 % interval)", "NED", "OCR reward", "diversity"],
        [
            [
                name,
                percent(drawn.read.accuracy, drawn.read.accuracy_interval),
                f"{drawn.read.similarity:.3f}",
                f"{drawn.evaluation.metrics['ocr']:.3f}",
                f"{drawn.evaluation.metrics['diversity']:.3f}",
            ]
            for name, drawn in (("before", before), ("after", after))
        ],
    )
    report.text(
        f"{NED} OCR reward: from -0.6 (nothing right) to 2. Diversity: root mean square difference of the pixels of "
        f"two images of the same number; {100 * learned.summary()['diversity_kept']:.0f} % of it is kept."
    )
    lines = read_metrics(config.output / "rl" / "metrics.jsonl")
    report.picture(
        points(
            {
                "rollouts": [(line["step"], line["reward/ocr"]) for line in lines if "reward/ocr" in line],
                "evaluation": [(line["step"], line["evaluation/ocr"]) for line in lines if "evaluation/ocr" in line],
            },
            xlabel="rollout",
            ylabel="OCR reward",
        ),
        "OCR reward. The evaluation during training has fewer images than the table, so its figures differ a little.",
        plot=True,
    )


def _readings(report: Report, config: DemoConfig, scores: dict[str, ReadingScore], results: dict[str, Any]) -> None:
    report.heading("What the reader makes of the images")
    report.table(
        ["images", "read exactly (95 % interval)", "NED"],
        [[name, percent(s.accuracy, s.accuracy_interval), f"{s.similarity:.3f}"] for name, s in scores.items()],
    )
    report.text(
        f"{NED} Chance is {100 * results['chance_word_accuracy']:.0f} % read exactly. {config.samples} images each; "
        "intervals are those of drawing images, not of training another model."
    )
    guided = scores["samples, guided"]
    report.text(
        f"Samples with guidance {config.sampling.guidance or 0:g} and top-p {config.sampling.top_p:g}, each with its "
        "number; what was read is in red where it is wrong."
    )
    report.gallery(
        [[(image, *label)] for image, label in zip(pictures(guided.images), reading_labels(guided), strict=False)]
    )


def _subject(report: Report, scores: dict[str, ReadingScore], shown: dict[str, Any], results: dict[str, Any]) -> None:
    match = results["subject_match"]
    report.heading("Following a reference subject")
    report.table(
        ["nearest of 8 references by", "rate (95 % interval)", "chance"],
        [
            [name, percent(match[name], match[f"{name}_95"]), f"{100 * match['chance']:.1f} %"]
            for name in match
            if f"{name}_95" in match
        ],
    )
    report.text(
        "How often a sample is nearer to the reference that it was drawn with than to seven others. "
        "A reference shows one digit of a scene alone on another paper, with the place, size, slant and pen it has "
        "in the scene. Its scan is one that training has not seen; the other references show other scans of the same "
        "digit in other inks, placed, sized and written alike."
    )
    report.text("Left the reference, right a sample drawn with it.")
    subject = scores["samples with a subject"]
    references = [("reference", False)] * len(subject.texts)
    _pairs(report, shown["reference"] * 0.5 + 0.5, subject.images, references, reading_labels(subject))


def _training(report: Report, config: DemoConfig, results: dict[str, Any]) -> None:
    report.heading("Training")
    runs = {name: read_metrics(config.output / name / "metrics.jsonl") for name in ("tokenizer", "var", "var-subject")}
    report.picture(
        curves({"tokenizer": runs["tokenizer"]}, "reconstruction", ylabel="reconstruction loss"),
        "Tokenizer: reconstruction loss",
        plot=True,
    )
    report.picture(
        curves({n: runs[n] for n in ("var", "var-subject")}, "loss", ylabel="nats per token"),
        "VAR: negative log-likelihood of a token; the second run starts from the first one's weights",
        plot=True,
    )
    report.table(["stage", "seconds"], [[name, f"{seconds:.0f}"] for name, seconds in results["seconds"].items()])
    report.text(
        f"{results['seconds_in_all']:.0f} seconds in all on {results['threads']} threads; tokenizer "
        f"{results['parameters']['tokenizer']:,} parameters, VAR {results['parameters']['var']:,}."
    )


def _next(report: Report, config: DemoConfig) -> None:
    """Where the models are, and commands that use them."""
    models = {"tokenizer": "the tokenizer", "var": "the VAR", "var-subject": "the VAR with a reference subject"}
    if config.rl_iterations:
        models["rl"] = "the VAR after rewards"
    report.heading("The models, and what to run next")
    report.table(["model", "folder"], [[title, config.output / name / "model"] for name, title in models.items()])
    report.text("Folders are as seen from where the demo was started.")

    def path(name: str) -> str:
        return shlex.quote(str(config.output / name))

    var = path("rl/model" if config.rl_iterations else "var/model")
    report.commands(
        [
            f"fastvar sample --model {var} --labels 07 42 --output {path('samples.png')}",
            f"fastvar sample --model {path('var-subject/model')} --labels 07 42 --subject {path('samples.png')} "
            f"--output {path('with-subject.png')}",
            f"fastvar evaluate --model {var} --guidance 0 --top-p 1",
            f"fastvar rl --model {path('var/model')} --rewards ocr jpeg=0.1 --iterations 20 --output {path('rl-jpeg')}",
        ]
    )


def _pairs(
    report: Report,
    left: torch.Tensor,
    right: torch.Tensor,
    left_labels: list[tuple[str, bool]],
    right_labels: list[tuple[str, bool]],
    count: int = _SHOWN // 2,
) -> None:
    sides = [
        [(image, *label) for image, label in zip(pictures(images[:count]), labels, strict=False)]
        for images, labels in ((left, left_labels), (right, right_labels))
    ]
    report.gallery([list(pair) for pair in zip(*sides, strict=True)])


def pictures(images: torch.Tensor) -> list[Any]:
    """The first images of many, one by one."""
    return [image_grid(image[None], 1, zoom=2) for image in images[:_SHOWN]]


def reading_labels(score: ReadingScore) -> list[tuple[str, bool]]:
    """What each image should show, and what was read if that is something else: (label, whether it is wrong)."""
    return [
        (text, False) if read == text else (f"{text}, read {read or 'nothing'}", True)
        for text, read in zip(score.texts, score.readings, strict=True)
    ]


def percent(value: float, interval: Interval) -> str:
    """A share with its interval."""
    return f"{100 * value:.1f} % ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})"
