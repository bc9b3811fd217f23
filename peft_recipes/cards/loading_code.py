"""The code that loads what a run saved, with plain PEFT and transformers; it stands in the card, and a test runs it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from peft_recipes.arms.apply import OWN_FILES
from peft_recipes.cards.metadata import kind_of
from peft_recipes.cards.redaction import is_place, short
from peft_recipes.data import columns
from peft_recipes.models import bases
from peft_recipes.recipe.dataset import EMBEDDED
from peft_recipes.recipe.recipe import Recipe
from peft_recipes.reporting.facts import plain
from peft_recipes.runs.folder import BASE

_AUTO = {
    "text-classification": "AutoModelForSequenceClassification",
    "image-classification": "AutoModelForImageClassification",
}
_MOST_LABELS = 30  # more would be most of the code
# How a card names the folder that it lies in, in its code and in the commands below it.
_HERE = '"."  # this folder, or its repository on the Hub'
PLACE = "THIS_FOLDER"


def loading_code(recipe: Recipe, data: dict[str, Any]) -> str | None:
    """Python that loads the run's adapter, head or model and uses it once; None for the base, which holds nothing.

    It is started in the run's folder; `placed_at` makes it load from a repository of the Hub.
    """
    kind = kind_of(data)
    if kind == BASE:
        return None
    called = {"full": "model_id", "part": "weights"}.get(kind, "adapter")
    auto = _AUTO.get(recipe.task, "AutoModelForCausalLM")
    options = _options(recipe, data)
    lines = [f"{called} = {_HERE}"]
    imports = {"transformers": {auto}}
    if kind == "full":
        lines += _own_class(recipe)
        lines.append(f"model = {auto}.from_pretrained({', '.join([called, *_trusted(recipe)])}).eval()")
        base = called
    else:
        made, base = _base(recipe, called, imports)
        quantised = _quantised(recipe, data, imports)
        options += ["quantization_config=quantised"] if quantised else []
        lines += [*made, *quantised, _call(f"base = {auto}.from_pretrained", [base, *options])]
        lines += _put_on(data, called, imports)
    lines += ["", *_used(recipe, base, imports)]
    return "\n".join([*_imports(imports), "", *lines]) + "\n"


def _text(text: object) -> str:
    """Text from outside as a Python string on one line."""
    shown = plain(text)
    return json.dumps(shown, ensure_ascii=not shown.isprintable())


def _options(recipe: Recipe, data: dict[str, Any]) -> list[str]:
    labels = [row["label"] for row in data.get("per_class") or []] or list(recipe.dataset.labels or [])
    options = []
    if labels:
        options.append(f"num_labels={len(labels)}")
        if len(labels) <= _MOST_LABELS:
            names = ", ".join(f"{i}: {_text(label)}" for i, label in enumerate(labels))
            options.append(f"id2label={{{names}}}")
    return options + _trusted(recipe)


def _trusted(recipe: Recipe) -> list[str]:
    return ["trust_remote_code=True"] if recipe.trust_remote_code else []


def _base(recipe: Recipe, called: str, imports: dict[str, set[str]]) -> tuple[list[str], str]:
    """The lines that name the base, and the expression that from_pretrained takes."""
    if recipe.model == bases.SMALL_CNN or recipe.model.startswith(EMBEDDED):
        imports["peft_recipes"] = {"base_folder"}
        how = "trained" if recipe.model == bases.SMALL_CNN else "made"
        return [f"base_id = base_folder({called})  # {how} here on first use, then kept"], "base_id"
    if is_place(recipe.model):
        return [f"base_id = {_text(short(recipe.model))}  # put your copy of the base there"], "base_id"
    return [f"base_id = {_text(recipe.model)}"], "base_id"


def _own_class(recipe: Recipe) -> list[str]:
    if recipe.model != bases.SMALL_CNN:
        return []
    return ["import peft_recipes.models.small_cnn  # the model's class", ""]


def _quantised(recipe: Recipe, data: dict[str, Any], imports: dict[str, set[str]]) -> list[str]:
    """The base as it was trained on, where that was a quantised one."""
    how = getattr(recipe.arms.get(data["arm"]), "quantise", None)
    if not how:
        return []
    imports["transformers"].add("BitsAndBytesConfig")
    skipped = 'llm_int8_skip_modules=["lm_head", "classifier", "pre_classifier", "score"]'
    if how == "int8":
        return [_call("quantised = BitsAndBytesConfig", ["load_in_8bit=True", skipped])]
    imports[""] = {"torch"}
    computed = "torch.bfloat16" if data["environment"].get("precision") == "bf16" else "torch.float32"
    settings = ["load_in_4bit=True", 'bnb_4bit_quant_type="nf4"', "bnb_4bit_use_double_quant=True"]
    return [_call("quantised = BitsAndBytesConfig", [*settings, f"bnb_4bit_compute_dtype={computed}", skipped])]


def _put_on(data: dict[str, Any], called: str, imports: dict[str, set[str]]) -> list[str]:
    if kind_of(data) == "part":
        imports["safetensors.torch"] = {"load_file"}
        name = OWN_FILES[data["method"]]
        file = f'f"{{{called}}}/{name}"'
        return [f"base.load_state_dict(load_file({file}), strict=False)", "model = base.eval()"]
    imports["peft"] = {"PeftModel"}
    return [f"model = PeftModel.from_pretrained(base, {called}).eval()"]


def _used(recipe: Recipe, base: str, imports: dict[str, set[str]]) -> list[str]:
    if recipe.task == "image-classification":
        return _on_a_picture(recipe, base, imports)
    imports["transformers"].add("AutoTokenizer")
    lines = [f"tokenizer = AutoTokenizer.from_pretrained({', '.join([base, *_trusted(recipe)])})"]
    if recipe.task == "text-classification":
        return [
            *lines,
            'inputs = tokenizer("A text to classify.", return_tensors="pt", truncation=True, '
            f"max_length={recipe.max_length})",
            "print(model.config.id2label[model(**inputs).logits.argmax(-1).item()])",
        ]
    prompt = recipe.prompts[0]["prompt"] if recipe.prompts else "Once upon a time"
    lines.append(f"prompt = {_text(prompt)}")
    if recipe.task == "language-modeling":
        lines.append('inputs = tokenizer(prompt, return_tensors="pt")')
    else:
        lines += [
            "if tokenizer.chat_template:  # as it was trained",
            '    messages = [{"role": "user", "content": prompt}]',
            "    inputs = tokenizer.apply_chat_template(",
            '        messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
            "    )",
            "else:",
            f'    inputs = tokenizer({_text(columns.PLAIN_PROMPT)}.format(prompt=prompt), return_tensors="pt")',
        ]
    return [
        *lines,
        "made = model.generate(**inputs, max_new_tokens=64, do_sample=False)",
        'print(tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]


def _on_a_picture(recipe: Recipe, base: str, imports: dict[str, set[str]]) -> list[str]:
    answer = "print(model.config.id2label[model(**inputs).logits.argmax(-1).item()])"
    if recipe.model == bases.SMALL_CNN:
        imports[""] = {"torch"}
        return ['inputs = {"pixel_values": torch.rand(1, 1, 28, 28)}  # your picture: grey, values from 0 to 1', answer]
    imports["transformers"].add("AutoImageProcessor")
    imports["PIL"] = {"Image"}
    return [
        f"processor = AutoImageProcessor.from_pretrained({base})",
        'inputs = processor(Image.new("RGB", (224, 224)), return_tensors="pt")  # your picture instead',
        answer,
    ]


def _call(start: str, arguments: list[str]) -> str:
    line = f"{start}({', '.join(arguments)})"
    return line if len(line) <= 110 else f"{start}(\n    " + ",\n    ".join(arguments) + ",\n)"


def _imports(imports: dict[str, set[str]]) -> list[str]:
    whole = [f"import {name}" for name in sorted(imports.get("", ()))]
    some = [f"from {module} import {', '.join(sorted(names))}" for module, names in sorted(imports.items()) if module]
    return whole + some


def placed_at(card: str, repo_id: str) -> str:
    """A card's text, for a repository of the Hub instead of a folder."""
    return card.replace(_HERE, f"{_text(repo_id)}  # its repository on the Hub").replace(PLACE, repo_id)


def code_in(card: str | Path) -> str:
    """The Python of a card, as a reader would copy it."""
    text = card.read_text(encoding="utf-8") if isinstance(card, Path) else card
    found = re.search(r"^(`{3,})python\n(.*?)^\1$", text, re.DOTALL | re.MULTILINE)
    if found is None:
        raise ValueError("The card holds no Python.")
    return found[2]
