"""Malformed recipes, datasets and adapters, each with a part of the error message it must give.

Used by test_malformed.py, and by benchmarks/malformed_inputs.py, which counts them for the README.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_VALID_LINES = "".join(f'{{"text": "the film was {i}", "label": "{("good", "bad")[i % 2]}"}}\n' for i in range(40))


@dataclass(frozen=True)
class Case:
    """One malformed input.

    kind: "dataset", "recipe" or "adapter". make: writes it to a folder and returns the command line arguments; it gets
    the folder and the valid inputs. message: a part of the error message. code: the exit code: 2, or 1 for an adapter
    that is readable but fails a check.
    """

    kind: str
    name: str
    make: Callable[[Path, dict[str, Path]], list[str]]
    message: str
    code: int = 2


def _data(file: str, content: str | bytes, message: str, *changes: str, name: str = "") -> Case:
    def make(folder: Path, valid: dict[str, Path]) -> list[str]:
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        shares = ("dataset.train=0.6", "dataset.validation=0.2", "dataset.test=0.2")
        more = [word for change in (*shares, *changes) for word in ("--set", change)]
        return ["compare", str(valid["classify"]), "--set", f"dataset.path={path}", *more]

    return Case("dataset", name or f"{file}: {message[:40]}", make, message)


def _parquet(rows: dict[str, list[Any]], cut: int = 0) -> bytes:
    import pandas

    buffer = io.BytesIO()
    pandas.DataFrame(rows).to_parquet(buffer)
    return buffer.getvalue()[: -cut or None]


_VALID_ROWS = {"text": [f"text {i}" for i in range(40)], "label": ["a", "b"] * 20}
_LINES = _VALID_LINES.splitlines()

DATASETS = [
    _data("d.csv", "", "is empty"),
    _data("d.csv", "text,label\n", "a header and no rows"),
    _data("d.csv", "text,label\n" + "a,good\n" * 3 + "b,bad,more\n", "line 5"),
    _data("d.csv", 'text,label\n"never closed,good\nb,bad\n', "line 2"),
    _data("d.csv", b"text,label\n\xff\xfe\xfa,good\n", "not UTF-8"),
    _data("d.csv", "body,stars\n" + "x,1\n" * 40, "It has: body, stars"),
    _data("d.csv", "text|label\n" + "x|1\n" * 40, "no column"),
    _data("d.csv", "text,label\n" + "".join(f"w {i},{i}.5\n" for i in range(40)), "make it a regression"),
    _data("d.jsonl", "", "is empty"),
    _data("d.jsonl", _LINES[0] + '\n{"text": "x", "label":\n', "line 2"),
    _data("d.jsonl", _LINES[0] + "\n[1, 2]\n", "line 2", name="a line that is a list"),
    _data("d.jsonl", _LINES[0] + "\n\x00\x00\n", "line 2", name="a line of zeros"),
    _data("d.jsonl", b'{"text": "\xff", "label": "a"}\n', "UTF-8"),
    _data("d.jsonl", _VALID_LINES + '{"text": null, "label": "good"}\n' * 9, "can't be used"),
    _data("d.jsonl", _VALID_LINES + '{"text": "x", "label": null}\n', "label"),
    _data("d.jsonl", _VALID_LINES + f'{{"text": "{"x" * 1_000_000}\n', "line 41", name="a broken line of a megabyte"),
    _data("d.jsonl", _VALID_LINES.replace('"the film was 7"', "7"), "text", name="a number for a text"),
    _data("d.jsonl", _VALID_LINES.replace('"the film was 7"', '["a"]'), "text", name="a list for a text"),
    _data("d.jsonl", _VALID_LINES.replace('"bad"', '"good"'), "one class"),
    _data("d.jsonl", _VALID_LINES, "dataset.labels", "dataset.labels=[good]", name="a label not in dataset.labels"),
    _data("d.jsonl", _VALID_LINES, "asks for", "dataset.train=5000", name="more rows than there are"),
    _data("d.jsonl", _VALID_LINES, "Did you mean 'text'", "dataset.text=txet", name="a text column with a typo"),
    _data("d.jsonl", _VALID_LINES, "Did you mean 'label'", "dataset.label=lable", name="a label column with a typo"),
    _data("d.jsonl", "\n".join(_LINES[:1]) + "\n", "too few", name="one row"),
    _data("d.json", '{"a": 1', "d.json"),
    _data("d.parquet", b"PAR1 not really", "can't be read"),
    _data("d.parquet", _parquet(_VALID_ROWS, cut=40), "can't be read", name="a parquet cut short"),
    _data("d.parquet", _parquet({"text": _VALID_ROWS["text"]}), "no column 'label'"),
    _data("d.parquet", _parquet({**_VALID_ROWS, "label": [0.5] * 40}), "label", name="a parquet of fractions"),
    _data("d.xyz", "text", "d.xyz"),
    _data("folder/none.txt", "x", "folder", "dataset.path=folder", name="a folder without data"),
]  # fmt: skip


def _recipe(name: str, change: Callable[[str], str], message: str) -> Case:
    def make(folder: Path, valid: dict[str, Path]) -> list[str]:
        path = folder / "mine.yaml"
        path.write_text(change(valid["classify"].read_text()))
        return ["compare", str(path)]

    return Case("recipe", name, make, message)


def _key(key: str, value: str) -> Callable[[str], str]:
    """Return a function that replaces a top-level key of the recipe's YAML."""

    def change(text: str) -> str:
        lines, out, skipping = text.splitlines(), [], False
        for line in lines:
            top = line and not line[0].isspace() and not line.startswith("-")
            skipping = line.startswith(f"{key}:") if top else skipping
            if not skipping:
                out.append(line)
        return "\n".join([*out, f"{key}: {value}"]) + "\n"

    return change


_BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
RECIPES = [
    _recipe("not a mapping", lambda _: "- 1\n- 2\n", "mine.yaml"),
    _recipe("empty", lambda _: "", "mine.yaml"),
    _recipe("invalid YAML", lambda _: "a: [1, 2\nb: }", "mine.yaml"),
    _recipe("an object", lambda _: "name: !!python/object/apply:os.getcwd []\n", "can't be read as YAML"),
    _recipe("an object of peft", lambda t: t + "x: !!python/name:os.system\n", "can't be read as YAML"),
    _recipe("a bomb", lambda _: _BOMB, "mine.yaml"),
    _recipe("a key with a typo", lambda t: t.replace("max_length:", "max_lenght:"), "Did you mean 'max_length'"),
    _recipe("an unknown task", _key("task", "text-clasification"), "Did you mean 'text-classification'"),
    _recipe("a name that leaves the folder", _key("name", "../../up"), "it names a folder"),
    _recipe("an absolute name", _key("name", "/tmp/up"), "it names a folder"),
    _recipe("a list for a name", _key("name", "[a]"), "name"),
    _recipe("an arm that leaves the folder", lambda t: t.replace("  lora:", "  ../lora:"), "can't name an arm"),
    _recipe("no arms", _key("arms", "{}"), "at least one arm"),
    _recipe("an arm of text", _key("arms", "{full: yes please}"), "arms"),
    _recipe("a learning rate of NaN", _key("arms", "{full: {method: full, learning_rate: .nan}}"), "above 0"),
    _recipe("a negative learning rate", _key("arms", "{full: {method: full, learning_rate: -1}}"), "above 0"),
    _recipe("a learning rate of text", _key("arms", "{full: {method: full, learning_rate: fast}}"), "learning_rate"),
    _recipe("an unknown PEFT type", _key("arms", "{x: {learning_rate: 1, peft: {peft_type: LORAA}}}"), "'LORA'"),
    _recipe("a length of 0", _key("max_length", "0"), "max_length"),
    _recipe("a huge length", _key("max_length", "1e30"), "max_length"),
    _recipe("a margin of infinity", _key("margin", ".inf"), "margin"),
    _recipe("a batch of 0", _key("training", "{per_device_train_batch_size: 0}"), "per_device_train_batch_size"),
    _recipe("a batch of text", _key("training", "{per_device_train_batch_size: big}"), "per_device_train_batch_size"),
    _recipe("an unknown option", _key("training", "{num_train_epoch: 1}"), "Did you mean 'num_train_epochs'"),
    _recipe("an unknown optimiser", _key("training", "{optim: adamw_tocrh}"), "adamw_tocrh"),
    _recipe("a dataset of text", _key("dataset", "reviews.csv"), "dataset"),
    _recipe("shares beyond one", _key("dataset", "{path: d, train: 0.9, test: 0.9}"), "add up to"),
    _recipe("a negative count", _key("dataset", "{path: d, train: -4}"), "dataset.train"),
    _recipe("a missing model", _key("model", "./nowhere"), "no config.json"),
    _recipe("an unknown guard", _key("skip_checks", "[memroy]"), "Did you mean 'memory'"),
    _recipe("a negative checkpoint interval", _key("checkpoint_seconds", "-5"), "checkpoint_seconds"),
]  # fmt: skip


def change_tensors(folder: Path, how: str) -> None:
    """Damage an adapter's weights in a way that `check` must find."""
    tensors = load_file(folder / WEIGHTS)
    name = next(name for name in sorted(tensors) if "lora_B" in name)
    if how == "nan":
        tensors[name][0, 0] = float("nan")
    elif how == "zero":
        tensors = {n: torch.zeros_like(t) if "lora_B" in n else t for n, t in tensors.items()}
    elif how == "shape":
        tensors[name] = tensors[name][1:].contiguous()
    elif how == "missing":
        del tensors[name]
    elif how == "stray":
        tensors["base_model.model.no.such.weight"] = torch.ones(2)
    elif how == "empty":
        tensors[name] = torch.ones(0)
    elif how == "other":
        tensors = {n: t + 1.0 if "lora_B" in n else t for n, t in tensors.items()}
    save_file(tensors, folder / WEIGHTS)


class _Explosive:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return (open, (str(self.path), "w"))


def _pickle(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({"a": _Explosive(folder / "exploded")}, folder / "adapter_model.bin")


def _no_base(folder: Path) -> None:
    (folder / "recipe.yaml").unlink()
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": None}))


def _cut(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:200])


def _adapter(name: str, damage: Callable[[Path], Any], message: str, code: int = 2, *words: str) -> Case:
    def make(folder: Path, valid: dict[str, Path]) -> list[str]:
        import shutil

        copy = Path(shutil.copytree(valid["adapter"], folder / "adapter"))
        damage(copy)
        return ["check", str(copy), *[str(valid.get(word, word)) for word in words]]

    return Case("adapter", name, make, message, code)


def _config(text: str | bytes) -> Callable[[Path], Any]:
    content = text if isinstance(text, bytes) else text.encode()
    return lambda folder: (folder / CONFIG).write_bytes(content)


def _tensors(how: str) -> Callable[[Path], Any]:
    return lambda folder: change_tensors(folder, how)


ADAPTERS = [
    _adapter("no configuration", lambda f: (f / CONFIG).unlink(), "no adapter: there is no adapter_config.json"),
    _adapter("a configuration cut short", _config('{"peft_type": "LORA",'), "adapter_config.json can't be read"),
    _adapter("a configuration that is not text", _config(b"\xff\xfe{}"), "adapter_config.json can't be read"),
    _adapter("a configuration that is a list", _config("[]"), "names no peft_type"),
    _adapter("a configuration without a type", _config('{"r": 4}'), "names no peft_type"),
    _adapter("an unknown type", _config('{"peft_type": "LORAA", "r": 4}'), "Did you mean 'LORA'"),
    _adapter("what PEFT rejects", _config('{"peft_type": "LORA", "layers_pattern": "h"}'), "PEFT refuses it"),
    _adapter("weights cut short", _cut, "adapter_model.safetensors can't be read"),
    _adapter("weights of noise", lambda f: (f / WEIGHTS).write_bytes(b"\xff" * 500), "can't be read"),
    _adapter("no weights", lambda f: (f / WEIGHTS).unlink(), "has no adapter_model.safetensors"),
    _adapter("a pickle", _pickle, "is a pickle"),
    _adapter("a recipe with an object", lambda f: (f / "recipe.yaml").write_text("!!python/object/apply:os.abort []"),
             "recipe.yaml"),
    _adapter("no base named", _no_base, "names no base model"),
    _adapter("NaN", _tensors("nan"), "NaN", 1),
    _adapter("an empty tensor", _tensors("empty"), "empty", 1),
    _adapter("an untrained adapter", _tensors("zero"), "changes nothing", 1),
    _adapter("a wrong shape", _tensors("shape"), "1 of another shape", 1),
    _adapter("a missing tensor", _tensors("missing"), "1 tensors missing", 1),
    _adapter("a stray tensor", _tensors("stray"), "no.such.weight", 1),
    _adapter("other weights than the trained ones", _tensors("other"), "differ", 1),
    _adapter("another base", lambda f: None, "more targets like it)", 1, "--base", "gpt2"),
    _adapter("a missing base", lambda f: None, "no config.json", 2, "--base", "./nowhere"),
]  # fmt: skip

CASES = [*DATASETS, *RECIPES, *ADAPTERS]
