"""Folders of made comparisons, runs and adapters for the gallery, with what is wrong with some."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from comparison_fixture import image_comparison, png, sft_comparison
from page import EVIL

CARD = f"""---
base_model: org/base
---

# The card of an adapter

> **A verdict.**

{EVIL}

![A plot](plots/loss.png) ![outside](../../../secret.png) ![remote](https://example.com/x.png)

| a | b |
|:--|--:|
| 1 | 2 |

<details>
<summary>The complete recipe</summary>

```yaml
model: /home/someone/models/base
```

</details>

[a file](run.json), [a page](https://example.com), [a trick](javascript:alert(1)) <img src=x onerror=alert(1)>
"""


def write(folder: Path, name: str, data: Any) -> Path:
    """Write JSON (or text) into a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    return folder


def card(folder: Path) -> None:
    """Write a card with a figure into a run's folder."""
    write(folder, "README.md", CARD)
    (folder / "plots").mkdir(exist_ok=True)
    (folder / "plots" / "loss.png").write_bytes(base64.b64decode(png([[0, 255], [255, 0]])))


def run(arm: str = "lora", seed: int = 0, **changes: Any) -> dict[str, Any]:
    """Invent a run.json."""
    made = {
        "schema": 1, "status": "ok", "error": None, "recipe": "alone", "arm": arm, "seed": seed, "metric": "accuracy",
        "method": "LORA" if arm != "full" else "full", "rank": 8, "task": "text-classification", "embedded": False,
        "model": "/home/someone/models/bert", "dataset": "org/data", "learning_rate": 1e-3, "checkpoint_bytes": 5_000,
        "parameters": {"trainable": 4_000, "total": 1_000_000}, "metrics": {"test": {"accuracy": 0.8 + seed / 100}},
        "training": {"seconds": 3.5, "peak_memory_bytes": 200_000_000},
    }  # fmt: skip
    return made | changes


def fill(root: Path) -> Path:
    """Two comparisons, two runs and an adapter without one, and seven things that can't be shown."""
    images = write(root / "images" / "mnist-shift", "comparison.json", image_comparison())
    for seed in (0, 1):
        card(write(images / "lora" / f"seed-{seed}", "run.json", run(seed=seed, recipe="mnist-shift")))
    write(root / "texts" / "alpaca", "comparison.json", sft_comparison(title=f"Answers {EVIL}", model="/data/base"))
    for seed in (0, 1):
        card(write(root / "alone" / "lora" / f"seed-{seed}", "run.json", run(seed=seed)))
    config = {"peft_type": "LORA", "r": 4, "task_type": "CAUSAL_LM", "base_model_name_or_path": "org/base"}
    card(write(root / "theirs" / "adapter", "adapter_config.json", config))
    write(root / "broken" / "a", "comparison.json", "{")
    write(root / "broken" / "b", "comparison.json", {"schema": 9, "arms": {}})
    write(
        root / "broken" / "c", "comparison.json", {"schema": 1, "arms": {"lora": {"metric": {"mean": 0.5}}}, "seeds": 3}
    )
    write(root / "broken" / "d", "comparison.json", "[1]")
    write(root / "broken" / "lora" / "seed-0", "run.json", '{"no": "status"}')
    write(root / "broken" / "lora" / "seed-1", "log.jsonl", "")
    write(root / "broken" / "adapter", "adapter_config.json", "{}")
    return root
