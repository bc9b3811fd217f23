"""Export a saved adapter in the format of another program, verified, with the evidence beside it."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

from peft_recipes.adapters.merge import atomic_folder, check_new_folder
from peft_recipes.errors import RecipeError, unknown
from peft_recipes.exporting.subject import Subject, open_subject
from peft_recipes.runs.files import file_sizes, write_json

FORMATS = ("gguf", "vllm", "lora")
TYPES = ("f16", "q8_0", "f32")
FILE = "export.json"


def export_adapter(
    adapter: str | Path,
    output: str | Path,
    to: str,
    *,
    base: str | None = None,
    merged: bool = False,
    dtype: str | None = None,
    rank: int | None = None,
    pre_tokenizer: str | None = None,
    engine: str | None = None,
    allow_differences: bool = False,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Export a saved adapter to a new folder; return the content of its export.json.

    to: "gguf" (llama.cpp, Ollama), "vllm" (vLLM, SGLang) or "lora" (a LoRA made of any adapter that changes weights).
    merged, dtype ("f16", "q8_0", "f32"), pre_tokenizer, engine ("xllamacpp", "llama-cpp-python"), allow_differences: of
    "gguf". rank: of "lora". A full fine-tune is taken by "gguf" with merged.
    The result of "vllm" also has base_argument, the base's place on this machine, which no file holds.
    Raises RecipeError for a user's mistake and for what a server can't take; VerificationError if the exported model
    is another one than that in PEFT. Nothing is written then.
    """
    output = Path(output)
    gguf_only = {"--merged": merged, "--type": dtype, "--pre-tokenizer": pre_tokenizer, "--engine": engine,
                 "--allow-differences": allow_differences}  # fmt: skip
    _check_options(to, gguf_only, rank, dtype)
    check_new_folder(output)
    subject = open_subject(adapter, base, full_too=to == "gguf" and merged, trust_remote_code=trust_remote_code)
    options = {"merged": merged, "dtype": dtype or "f16", "pre_tokenizer": pre_tokenizer,
               "allow_differences": allow_differences}  # fmt: skip
    write = _writer(subject, to, rank, engine, options)
    with atomic_folder(output) as folder:
        evidence = {
            "schema": 1,
            "to": to,
            "adapter": subject.title,
            "method": subject.method,
            "base": subject.base,
            **write(folder),
        }
        if to == "gguf" and not evidence["verification"]:
            from peft_recipes.exporting.llama_cpp import INSTALL

            evidence["not_verified"] = f"no engine of llama.cpp is installed: {INSTALL}."
        evidence["versions"] = {name: importlib.metadata.version(name) for name in ("peft_recipes", "peft")}
        evidence["bytes"] = file_sizes(folder)
        write_json(folder / FILE, evidence)
        from peft_recipes.exporting.card import write_card

        write_card(subject, folder, evidence)
    return {**evidence, "base_argument": subject.base_argument} if to == "vllm" else evidence


def _check_options(to: str, gguf_only: dict[str, Any], rank: int | None, dtype: str | None) -> None:
    """Raise RecipeError for an unknown format or type, and for an option of another format."""
    if to not in FORMATS:
        raise RecipeError(unknown("format", to, FORMATS, "--to"))
    given = [name for name, value in gguf_only.items() if value]
    if to != "gguf" and given:
        raise RecipeError(f"{', '.join(given)}: for --to gguf alone.")
    if to != "lora" and rank is not None:
        raise RecipeError("--rank: for --to lora alone, which makes an adapter of that rank.")
    if dtype is not None and dtype not in TYPES:
        raise RecipeError(unknown("type", dtype, TYPES, "--type"))


def _writer(subject: Subject, to: str, rank: int | None, engine: str | None, options: dict[str, Any]) -> Any:
    """Check what the format takes, before anything is written; return the function that writes a folder."""
    if to == "gguf":
        from peft_recipes.exporting import gguf, llama_cpp

        chosen = llama_cpp.choose_engine(engine)
        gguf.check(subject, options["merged"])
        return lambda folder: gguf.export(subject, folder, engine=chosen, **options)
    if to == "vllm":
        from peft_recipes.exporting import vllm

        vllm.check(subject)
        return lambda folder: vllm.export(subject, folder)
    from peft_recipes.exporting import as_lora

    as_lora.check(subject, rank)
    return lambda folder: as_lora.export(subject, rank, folder)
