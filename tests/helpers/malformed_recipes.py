"""Malformed recipe files: duplicate keys, encodings, modules, values of every part of a recipe."""

from __future__ import annotations

from pathlib import Path

from malformed import Case, _key, _recipe


def _text(name: str, message: str, content: str | bytes, file: str = "mine.yaml") -> Case:
    """A recipe file of this content."""

    def make(folder: Path, valid: dict[str, Path]) -> list[str]:
        path = folder / file
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return ["compare", str(path)]

    return Case("recipe", name, make, message)


RECIPES = [
    _recipe("a key twice", lambda t: t + "name: again\n", "the key 'name' is given twice (lines 1 and"),
    _recipe(
        "a key twice in a mapping", _key("training", "{max_steps: 1, max_steps: 2}"), "the key 'max_steps' is given"
    ),
    _text("tabs", "can't be read as YAML", "name: x\n\ttask: sft\n"),
    _text("UTF-16", "can't be read as YAML", "name: x\n".encode("utf-16")),
    _text("Windows' encoding", "can't be read as YAML", "name: ä\n".encode("cp1252")),
    _text("an alias of nothing", "can't be read as YAML", "name: *x\n"),
    _text("a module without a recipe", "has no `recipe = Recipe(...)`", "x = 1\n", "mine.py"),
    _text("a module with a syntax error", "line 2", "x = 1\ny = (\n", "mine.py"),
    _text("a module that raises", "ZeroDivisionError", "x = 1 / 0\n", "mine.py"),
    _recipe("a key of the dataset with a typo", lambda t: t.replace("  label:", "  lable:"), "Did you mean 'label'"),
    _recipe("an unknown format", _key("dataset", "{path: d, format: alpacca}"), "Did you mean 'alpaca'"),
    _recipe("all rows skipped", _key("dataset", "{path: d, skip_rows: 1}"), "expected a share from 0 to below 1"),
    _recipe(
        "an unknown problem type", _key("dataset", "{path: d, problem_type: regresion}"), "Did you mean 'regression'"
    ),
    _recipe("a negative seed of the dataset", _key("dataset", "{path: d, seed: -1}"), "dataset.seed"),
    _recipe("a class named twice", _key("dataset", "{path: d, labels: [a, a]}"), "no name twice"),
    _recipe("an unknown transform", _key("dataset", "{path: d, transform: {rotate: 3}}"), "dataset.transform"),
    _recipe("a path of nothing", _key("dataset", "{path: ' '}"), "dataset.path"),
    _recipe("a dataset without a path", _key("dataset", "{train: 4}"), "Missing key 'path'"),
    _recipe("an unknown metric", _key("metric", "acuracy"), "Did you mean 'accuracy'"),
    _recipe("a metric of another task", _key("metric", "rouge_l"), "metric"),
    _recipe("no base", _key("model", "null"), "model"),
    _recipe("a length of text", _key("max_length", "long"), "max_length"),
    _recipe("threads of 0", _key("threads", "0"), "threads"),
    _recipe("one scored answer", _key("test_generations", "1"), "test_generations"),
    _recipe("a set named as a split", _key("evaluate_also", "{test: {path: d}}"), "evaluate_also"),
    _recipe("a set with an unknown key", _key("evaluate_also", "{other: {pth: d}}"), "Did you mean 'path'"),
    _recipe(
        "a set at an address", _key("evaluate_also", "{other: {path: 'https://example.org/x.csv'}}"), "is an address"
    ),
    _recipe("benchmarks of a classifier", _key("benchmarks", "[arc_easy]"), "benchmarks"),
    _recipe("an unknown method", _key("arms", "{x: {method: lorra, learning_rate: 1e-3}}"), "lorra"),
    _recipe("a rank of 0", _key("arms", "{x: {learning_rate: 1, peft: {peft_type: LORA, r: 0}}}"), "r"),
    _recipe(
        "a PEFT key with a typo",
        _key("arms", "{x: {learning_rate: 1, peft: {peft_type: LORA, lora_alfa: 4}}}"),
        "Did you mean 'lora_alpha'",
    ),
    _recipe(
        "targets that hit nothing",
        _key("arms", "{x: {learning_rate: 1, peft: {peft_type: LORA, target_modules: [q_proj]}}}"),
        "q_proj",
    ),
    _recipe("epochs of text", _key("training", "{num_train_epochs: many}"), "num_train_epochs"),
    _recipe("a tracker that is not there", _key("training", "{report_to: wandbb}"), "report_to"),
]
