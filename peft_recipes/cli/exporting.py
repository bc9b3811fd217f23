"""The command that writes a saved adapter in the format of another program: export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Option

from peft_recipes.cli.common import ADAPTERS, Adapter, Base, Json, Trust, command, show, unless_refused


@command(ADAPTERS)
def export(
    adapter: Adapter,
    to: Annotated[str, Option("--to", metavar="FORMAT", help="Write gguf (llama.cpp, Ollama), vllm or lora.")],
    output: Annotated[Path, Option("--output", metavar="DIR", help="Write the export to this new folder.")],
    merged: Annotated[bool, Option("--merged", help="Write one merged model, not base and adapter (gguf).")] = False,
    dtype: Annotated[
        str, Option("--type", metavar="TYPE", help="Store f16, q8_0 or f32 weights (gguf; default: f16).")
    ] = "",
    rank: Annotated[int | None, Option("--rank", metavar="R", help="Make a LoRA of this rank (lora).")] = None,
    pre_tokenizer: Annotated[
        str,
        Option("--pre-tokenizer", metavar="NAME", help="Name the split of a tokenizer that llama.cpp does not know."),
    ] = "",
    engine: Annotated[
        str, Option("--engine", metavar="NAME", help="Verify with xllamacpp or llama-cpp-python (gguf).")
    ] = "",
    allow_differences: Annotated[
        bool, Option("--allow-differences", help="Write what differs from PEFT, too, and say so (gguf).")
    ] = False,
    base: Base = "",
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Export an adapter for llama.cpp, Ollama, vLLM or SGLang, or as a LoRA; verified next to PEFT."""
    from peft_recipes.cli.output.exports import show_export
    from peft_recipes.exporting.export import export_adapter

    result = unless_refused(
        export_adapter, adapter, output, to, base=base or None, merged=merged, dtype=dtype or None, rank=rank,
        pre_tokenizer=pre_tokenizer or None, engine=engine or None, allow_differences=allow_differences,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    show(as_json, result, lambda: show_export(result, output), ensure_ascii=False)
