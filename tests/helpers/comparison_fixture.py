"""Invented comparisons for tests of the report. EVERY NUMBER AND ANSWER IS INVENTED: nothing was trained.

They have the format that `compare` writes (docs/concepts/file-formats.md). `image_comparison` has seven arms with
three seeds; one arm ran out of memory. `sft_comparison` has a loss as its metric, one seed, and answers.
"""

from __future__ import annotations

import base64
import copy
import math
import random
import struct
import zlib
from typing import Any

SEVEN = ["0111110", "0000010", "0000100", "0001000", "0010000", "0010000", "0010000"]
FOUR = ["0001100", "0010100", "0100100", "1000100", "1111110", "0000100", "0000100"]
ZERO = ["0111100", "1000010", "1000010", "1000010", "1000010", "1000010", "0111100"]


def png(pixels: list[list[int]]) -> str:
    """Return a greyscale PNG of rows of values from 0 to 255, as base64 text."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    raw = b"".join(b"\0" + bytes(row) for row in pixels)
    header = struct.pack(">IIBBBBB", len(pixels[0]), len(pixels), 8, 0, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    return base64.b64encode(data).decode()


def digit(shape: list[str], degrees: float = 0.0, noise: float = 0.0, seed: int = 0) -> str:
    """Draw a digit of 28 x 28 pixels, turned and noisy; return the PNG as base64 text."""
    draw, turn = random.Random(seed), math.radians(degrees)
    rows = []
    for y in range(28):
        row = []
        for x in range(28):
            u = (x - 13.5) * math.cos(turn) - (y - 13.5) * math.sin(turn) + 13.5
            v = (x - 13.5) * math.sin(turn) + (y - 13.5) * math.cos(turn) + 13.5
            column, line = int((u - 4) // 3), int((v - 4) // 3)
            ink = 230 if 0 <= column < 7 and 0 <= line < 7 and shape[line][column] == "1" else 0
            row.append(max(0, min(255, int(ink + draw.gauss(0, 255 * noise)))))
        rows.append(row)
    return png(rows)


def curves(seeds: int, steps: int, first: float, last: float, noise: float, metric: tuple[float, float]) -> list[dict]:
    """Invent training curves: exponential decay with noise, and a validation metric at every fifth of the steps."""
    draw, runs = random.Random(f"{first}{last}"), []
    for seed in range(seeds):
        loss = [
            [s, last + (first - last) * math.exp(-4 * s / steps) + draw.gauss(0, noise)] for s in range(1, steps + 1)
        ]
        marks = [round(steps * part / 5) for part in range(1, 6)]
        before, after = metric
        rise = [[s, after + (before - after) * math.exp(-3.5 * s / steps) + draw.gauss(0, 0.004)] for s in marks]
        runs.append({"seed": seed, "loss": loss, "validation": rise})
    return runs


def arm(method: str, mean: float, clean: float, trainable: int, **other: Any) -> dict:
    """Invent an arm of the image comparison."""
    values = [round(mean + delta, 6) for delta in (-0.006, 0.001, 0.005)]
    draw = random.Random(method + str(trainable))
    entry = {
        "status": "ok", "error": None, "seeds": [0, 1, 2], "failures": [], "method": method, "rank": None,
        "target_modules": [],
        "trainable_parameters": trainable, "adapter_parameters": 0, "head_parameters": 0, "total_parameters": 421_642,
        "checkpoint_bytes": trainable * 4 + 2_100, "learning_rate": 3e-3, "steps": 125,
        "metric": {"mean": sum(values) / 3, "sd": 0.0056, "values": values},
        "metrics": {
            "test": {"accuracy": sum(values) / 3, "loss": 1.2 - mean, "macro_f1": mean - 0.004},
            "clean": {"accuracy": clean, "loss": 0.2}, "validation": {"accuracy": mean + 0.01, "loss": 1.19 - mean},
        },
        "training_seconds": 4.1, "warmup_seconds": 0.2, "total_seconds": 9.3, "tokens_per_second": None,
        "examples_per_second": 951.0, "padding_share": None, "peak_memory_bytes": 512_000_000,
        "latency_ms": {"base": 0.61, "adapter": None, "merged": None}, "generation_tokens_per_second": None,
        "curves": curves(3, 125, 1.9, 1.15 - mean, 0.06, (0.67, mean + 0.01)),
        "per_class": [
            {"label": str(label), "precision": mean, "recall": mean, "f1": mean + draw.gauss(0, 0.02), "support": 90}
            for label in range(10)
        ],
        "answers": None, "folder": None, "notes": [],
    }  # fmt: skip
    return entry | other


def lora(rank: int, mean: float, clean: float, targets: list[str], trainable: int, **other: Any) -> dict:
    """Invent a LoRA arm of the image comparison."""
    latency = {"base": 0.61, "adapter": 0.79, "merged": 0.62}
    options = {"rank": rank, "target_modules": targets, "adapter_parameters": trainable, "latency_ms": latency}
    return arm("LORA", mean, clean, trainable, **options, **other)


def image_comparison(**changes: Any) -> dict:
    """Invent a comparison of seven arms on turned and noisy digits, three seeds; the wide LoRA ran out of memory."""
    linear = ["fc1", "classifier"]
    killed = arm("LORA", 0.5, 0.5, 54_000, rank=16, target_modules=[*linear, "conv1", "conv2"]) | {
        "status": "out-of-memory", "error": "The process was killed by the system (signal 9) at step 3", "metrics": {},
        "metric": {"mean": None, "sd": None, "values": []}, "curves": [], "per_class": None, "training_seconds": None,
        "peak_memory_bytes": None, "checkpoint_bytes": None, "failures": [{"seed": 0, "error": "killed"}],
    }  # fmt: skip
    comparison = {
        "schema": 1, "recipe": "mnist-shift", "title": "Digits that are turned and noisy, on a small CNN",
        "task": "image-classification", "embedded": True, "model": "small-cnn", "dataset": "embedded:mnist",
        "metric": "accuracy", "higher_is_better": True, "margin": 0.01,
        "rows": {"train": 800, "validation": 200, "test": 1200, "clean": 1200}, "seeds": [0, 1, 2],
        "base": {
            "status": "ok",
            "metrics": {"test": {"accuracy": 0.673, "loss": 1.1, "macro_f1": 0.665}, "clean": {"accuracy": 0.986}},
            "total_parameters": 421_642, "answers": None,
            "parameters_by_component": {"embeddings": 0, "attention": 0, "mlp": 0, "head": 1290, "other": 420_352},
        },
        "arms": {
            "full": arm("full", 0.887, 0.951, 421_642),
            "head": arm("head", 0.739, 0.978, 1_290, learning_rate=1e-2, training_seconds=0.4,
                        peak_memory_bytes=301_000_000),
            "lora": lora(8, 0.802, 0.967, linear, 27_216, learning_rate=1e-2, training_seconds=2.6,
                         peak_memory_bytes=430_000_000,
                         folder="lora/seed-0"),
            "lora-conv": lora(8, 0.861, 0.959, [*linear, "conv2"], 34_100, training_seconds=3.9,
                              peak_memory_bytes=471_000_000),
            "lora-r2": lora(2, 0.771, 0.972, linear, 6_804, training_seconds=2.5, peak_memory_bytes=428_000_000),
            "lora-r16": lora(16, 0.818, 0.964, linear, 54_432, training_seconds=2.8, peak_memory_bytes=433_000_000),
            "lora-wide": killed,
        },
        "differences": {
            "head": difference(-0.148, -0.171, -0.126, "worse"), "lora": difference(-0.085, -0.101, -0.069, "worse"),
            "lora-conv": difference(-0.026, -0.041, -0.012, "worse"),
            "lora-r2": difference(-0.116, -0.136, -0.097, "worse"),
            "lora-r16": difference(-0.069, -0.086, -0.051, "worse"),
        },
        "samples": [
            {"label": label, "before": digit(shape), "after": digit(shape, turn, 0.15, seed)}
            for seed, (label, shape, turn) in enumerate(
                zip("740740", [SEVEN, FOUR, ZERO, SEVEN, FOUR, ZERO], [31, -24, 40, -42, 12, -8], strict=True)
            )
        ],
        "environment": environment(), "notes": ["Invented for a test."],
    }  # fmt: skip
    return comparison | changes


def difference(estimate: float, low: float, high: float, verdict: str, margin: float = 0.01, **other: Any) -> dict:
    """Invent a difference from full."""
    entry = {"against": "full", "estimate": estimate, "ci95": [low, high], "margin": margin, "verdict": verdict}
    return entry | {"seeds": 3, "examples": 1200} | other


def environment() -> dict:
    """Invent a machine."""
    return {
        "device": "cpu", "device_name": "Invented CPU", "threads": 2, "precision": "fp32", "python": "3.11.7",
        "platform": "Linux",
        "versions": {"torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2"}, "git_commit": "0123456789abcdef",
        "dataset_fingerprint": "feedc0ffee",
    }  # fmt: skip


PROMPTS = [
    ("coding", "Write a Python function that returns the n-th Fibonacci number."),
    ("question", "Why is the sky blue?"),
    ("summary", "Summarise: The tram was late again, so most of the council arrived on foot, wet and in poor humour."),
]
CODE = "def fibonacci(n):\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a"


def answers(*texts: str) -> list[dict]:
    """Return the texts as answers to the three prompts."""
    return [
        {"kind": kind, "prompt": prompt, "answer": text} for (kind, prompt), text in zip(PROMPTS, texts, strict=True)
    ]


def sft_comparison(**changes: Any) -> dict:
    """Invent a comparison of full and two LoRAs of a small chat model by loss: one seed, three answers each."""

    def tuned(method: str, loss: float, trainable: int, **other: Any) -> dict:
        curve = curves(1, 60, 2.6, loss - 0.03, 0.09, (2.25, loss))
        return arm(method, 0.5, 0.5, trainable) | {
            "seeds": [0], "total_parameters": 134_515_008, "checkpoint_bytes": trainable * 4 + 12_000, "steps": 60,
            "metric": {"mean": loss, "sd": None, "values": [loss]}, "learning_rate": 2e-4, "per_class": None,
            "curves": curve,
            "metrics": {
                "test": {"loss": loss, "perplexity": math.exp(loss), "token_accuracy": 0.61},
                "validation": {"loss": loss},
            },
            "tokens_per_second": 212.0, "examples_per_second": 1.9, "training_seconds": 251.0, "padding_share": 0.0,
            "peak_memory_bytes": 1_410_000_000, "latency_ms": {"base": 41.0, "adapter": 48.0, "merged": 41.5},
            "generation_tokens_per_second": {"base": 22.0, "adapter": 17.5, "merged": 21.8},
        } | other  # fmt: skip

    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    long_answer = "Air scatters short waves more than long ones. " * 30
    comparison = {
        "schema": 1, "recipe": "smollm2-alpaca", "title": "Following instructions: a small chat model on Alpaca",
        "task": "sft",
        "embedded": False, "model": "HuggingFaceTB/SmolLM2-135M-Instruct", "dataset": "tatsu-lab/alpaca",
        "metric": "loss",
        "higher_is_better": False, "margin": 0.01803, "rows": {"train": 960, "validation": 100, "test": 200},
        "seeds": [0],
        "base": {
            "status": "ok", "metrics": {"test": {"loss": 2.214, "perplexity": 9.15, "token_accuracy": 0.55}},
            "total_parameters": 134_515_008,
            "parameters_by_component": {"embeddings": 28_311_552, "attention": 39_813_120},
            "answers": answers("Here is a function.\n```python\nprint(1)\n```", "Because.", "The tram was late again."),
        },
        "arms": {
            "full": tuned("full", 1.803, 134_515_008, learning_rate=2e-5, training_seconds=604.0,
                          peak_memory_bytes=3_460_000_000,
                          latency_ms={"base": 41.0, "adapter": None, "merged": None}, generation_tokens_per_second=None,
                          answers=answers(CODE, "Air scatters blue light most.", "A late tram left the council wet.")),
            "lora": tuned("LORA", 1.811, 1_843_200, rank=16, target_modules=attention, folder="lora/seed-0",
                          answers=answers(CODE, long_answer, "The council walked in, wet and cross.")),
            "lora-all": tuned("LORA", 1.797, 4_884_480, rank=16,
                              target_modules=[*attention, "up_proj", "down_proj", "gate_proj"],
                              training_seconds=330.0, answers=answers(CODE, "Light.", "They were late.")),
        },
        "differences": {
            "lora": difference(0.008, -0.004, 0.0172, "equivalent", 0.01803, seeds=1, examples=200),
            "lora-all": difference(-0.006, -0.021, 0.009, "not shown", 0.01803, seeds=1, examples=200),
        },
        "samples": None, "environment": environment(), "notes": [],
    }  # fmt: skip
    return comparison | changes


def with_scored_answers(comparison: dict, ended: float = 0.97, **by_arm: float) -> dict:
    """Add invented figures of scored answers to the base and every arm; `by_arm`: share of ended answers of an arm."""
    for name, entry in [("base", comparison["base"]), *comparison["arms"].items()]:
        test = entry["metrics"].get("test")
        if test:
            test |= {"ended": by_arm.get(name, ended), "answer_tokens": 41.25, "empty_answers": 0.005}
            test |= {"bits_per_byte": 0.913, "rougeL": 0.4}
    return comparison | {"answers_cut_at": 64}


def crowded_comparison() -> dict:
    """Invent a comparison with twelve arms, long names, three extra splits and every optional column."""
    comparison = sft_comparison(recipe="a-recipe-whose-name-is-rather-long-as-names-of-recipes-can-be", seeds=[0, 1, 2])
    lora, full = comparison["arms"]["lora"], comparison["arms"]["full"]
    lora |= {"training_seconds": 12_345.0, "estimated_memory": {"total": 3_210_000_000}, "padding_share": 0.213}
    lora["metric"] = {"mean": 0.4321, "sd": 0.0123, "values": [0.43, 0.44, 0.4263]}
    full["metric"] = {"mean": 0.5321, "sd": 0.0123, "values": [0.53, 0.54, 0.5263]}
    base = comparison["base"]
    for entry in (lora, full, base):
        entry["metrics"] |= {
            "test": {"rougeL": 0.4321, "loss": 1.8, "likelihood_accuracy": 0.75},
            **{split: {"rougeL": 0.31} for split in ("plain", "instructions_in_another_language", "clean")},
        }
    names = [f"{kind}-on-every-linear-layer-with-a-long-name-{n}" for n in range(5) for kind in ("lora", "ia3")]
    arms = {"full": full, **{name: copy.deepcopy(lora) for name in names}}
    arms["withalongnamethathasnoplaceforalinebreakatallhowevernarrowthetableis"] = copy.deepcopy(lora)
    open_ = difference(-0.1, -0.10123, 0.00512, "not shown", seeds=3, examples=200)
    comparison |= {"metric": "rougeL", "higher_is_better": True, "margin": 0.01, "arms": arms}
    comparison["differences"] = {name: dict(open_) for name in arms if name != "full"}
    comparison["disagreements"] = {name: disagreement("score", "Word" * 80) for name in list(arms)[1:4]}
    return with_scored_answers(comparison)


def disagreement(kind: str = "right", text: str = "The answer is 7.", prompt: str | None = "What is 3 + 4?") -> dict:
    """Invent where an arm differs from full: 2 examples gained, 1 lost, 1 changed."""
    better, worse = (1.0, 0.0) if kind == "right" else (0.83, 0.25)

    def example(number: int, score: float, other: float) -> dict:
        return {
            "id": f"test-{number}", "prompt": prompt, "reference": "7", "answer": text,
            "answer_against": f"{text} Or {number}.", "score": score, "score_against": other,
        }  # fmt: skip

    return {
        "against": "full", "seed": 0, "kind": kind, "examples": 200,
        "gained": {"count": 12, "examples": [example(n, better, worse) for n in range(2)]},
        "lost": {"count": 15, "examples": [example(2, worse, better)]},
        "changed": {"count": 3, "examples": [example(3, worse, worse)]},
    }  # fmt: skip
