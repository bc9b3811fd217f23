"""lm_eval tasks on local files, about the words of the small models' sentences."""

from __future__ import annotations

import json
import random
from pathlib import Path

from small import BAD, FILLER, GOOD

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: data/{name}.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: label
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
  - {{metric: brier_score, aggregation: brier_score, higher_is_better: false}}
"""


def choices(folder: Path, name: str = "words", count: int = 24) -> Path:
    """Write a multiple choice task whose data is named relative to its file; return the file."""
    draw, rows = random.Random(name), []
    for _ in range(count):
        words = draw.sample(GOOD + BAD, 3)
        question = f"say {words[0]} in {draw.choice(FILLER)} film"
        options = [f"{draw.choice(FILLER)} {word}" + " so" * draw.randrange(3) for word in words]
        rows.append({"question": question, "choices": options, "label": draw.randrange(3)})
    (folder / "data").mkdir(parents=True, exist_ok=True)
    (folder / "data" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    file = folder / f"{name}.yaml"
    file.write_text(TASK.format(name=name))
    return file
