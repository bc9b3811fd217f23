"""Export to GGUF: the adapter and its base, or one merged model, for llama.cpp and Ollama."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_recipes.adapters.merge import VerificationError
from peft_recipes.arms.merge import merged as merged_model
from peft_recipes.embedded.cache import say
from peft_recipes.errors import RecipeError
from peft_recipes.exporting import llama_cpp, plain_lora, templates
from peft_recipes.exporting.subject import Subject
from peft_recipes.exporting.tokenizer import save_tokenizer
from peft_recipes.exporting.verify import Reference, reference, verify_gguf

if TYPE_CHECKING:
    from torch import nn

TYPES = ("f16", "q8_0", "f32")
_NOT_CONVERTED = ("wordlevel", "wordpiece", "unigram")
_GPT2_TRANSPOSED = (".c_attn.", ".c_proj.", ".c_fc.")


def check(subject: Subject, merged: bool) -> None:
    """Raise RecipeError for what llama.cpp can't take, before weights are loaded."""
    subject.check_language_model("llama.cpp")
    if subject.opened is None and not merged:
        raise RecipeError(f"{subject.folder} holds a full model, not an adapter: add --merged.")
    llama_cpp.converters()
    if not merged:
        refuse(subject, _obstacles(subject), "--merged")
    backend = getattr(subject.tokenizer, "backend_tokenizer", None)
    kind = type(backend.model).__name__ if backend is not None else ""
    if kind.lower() in _NOT_CONVERTED and not (Path(subject.base_argument) / "tokenizer.model").is_file():
        raise RecipeError(
            f"The tokenizer of {subject.folder} is a {kind} model; for language models llama.cpp reads byte-level BPE "
            "(tokenizer.json) and SentencePiece (tokenizer.model)."
        )


def _obstacles(subject: Subject, base: nn.Module | None = None) -> list[str]:
    saved = subject.opened.saved
    found = plain_lora.obstacles(saved, base)
    if getattr(subject.config, "tie_word_embeddings", False) and any(".lm_head." in name for name in saved.tensors):
        found.append("LoRA on an LM head that shares its weight with the embedding")
    return found


def refuse(subject: Subject, obstacles: list[str], instead: str) -> None:
    """Raise RecipeError if there are obstacles to a LoRA that llama.cpp applies to its base."""
    if obstacles:
        raise RecipeError(
            f"{subject.folder} can't be a LoRA in llama.cpp, which takes A and B of linear layers alone: "
            f"{'; '.join(obstacles)}. Export the merged model with {instead}, or a LoRA made of it with --to lora."
        )


def export(
    subject: Subject, folder: Path, *, merged: bool, dtype: str, pre_tokenizer: str | None, engine: str | None,
    allow_differences: bool,
) -> dict[str, Any]:  # fmt: skip
    """Write GGUF files and a Modelfile into a folder; return what export.json says about them.

    Raises VerificationError if llama.cpp makes something else of the prompts than the model in PEFT.
    """
    model = subject.load()
    if subject.opened is not None and not merged:
        refuse(subject, _obstacles(subject, model.get_base_model()), "--merged")
    if engine:
        say("Answering the prompts in PEFT ...")
    expected = reference(subject, model) if engine else None
    say("Converting ...")
    stage = folder / ".stage"
    stage.mkdir()
    try:
        gguf, adapter = convert(subject, model, stage, folder, merged, dtype, pre_tokenizer)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    if merged and subject.opened is not None:
        model = subject.load()  # merging has consumed it
    text, has_template = templates.modelfile(
        gguf.name, adapter and adapter.name, subject.tokenizer, _adds_bos(subject.tokenizer)
    )
    (folder / "Modelfile").write_text(text, encoding="utf-8")
    verification = None
    if engine:
        say(f"Answering the prompts in llama.cpp ({engine}) ...")
        verification = _verified(subject, model, expected, engine, dtype, gguf, adapter, allow_differences)
    return {
        "merged": merged,
        "type": dtype,
        "files": {"model": gguf.name, "adapter": adapter and adapter.name},
        "ollama_template": has_template,
        "commands": _commands(folder, gguf, adapter),
        "verification": verification,
    }


def _verified(
    subject: Subject, model: nn.Module, expected: Reference, engine: str, dtype: str, gguf: Path, adapter: Path | None,
    allow_differences: bool,
) -> dict[str, Any]:  # fmt: skip
    try:
        result = verify_gguf(subject, model, expected, engine, dtype, gguf, adapter)
    except llama_cpp.EngineError as error:
        if "unknown pre-tokenizer type" in str(error):
            raise RecipeError(
                f"--pre-tokenizer: llama.cpp knows no {str(error).rpartition(': ')[2]}. The names are in llama.cpp's "
                "src/llama-vocab.cpp."
            ) from error
        raise VerificationError(f"llama.cpp ({engine}) can't use it: {error} Nothing was written.") from error
    if not result["passed"] and not allow_differences:
        raise VerificationError(f"{explain(result)} Nothing was written; --allow-differences writes it all the same.")
    return result


def explain(result: dict[str, Any]) -> str:
    """Say in a sentence or two what a verification found, the worst first."""
    found = []
    if (tokens := result["tokens"]) and not tokens["passed"]:
        first = tokens["differing"][0]
        found.append(f"llama.cpp tokenises {len(tokens['differing'])} of {tokens['texts']} texts otherwise than "
                     f"transformers, first {first['text']!r}.")  # fmt: skip
    if (template := result["template"]) and not template["passed"]:
        found.append(f"llama.cpp renders {len(template['differing'])} of {template['chats']} chats otherwise than "
                     "transformers.")  # fmt: skip
    if not result["end_token"]["passed"]:
        end = result["end_token"]
        found.append(f"The end token is {end['transformers']!r} in transformers and {end['llama.cpp']!r} in llama.cpp.")
    if not (answers := result["answers"])["passed"]:
        first = next(each for each in answers["differing"] if not each["tie"])
        gap = "one of them has ended" if first["gap"] is None else f"{first['gap']:.3g} apart in PEFT's logits"
        found.append(f"{answers['same']} of {answers['prompts']} answers are the same; the first other one, to "
                     f"{first['prompt']!r}, differs at token {first['position']}: {first['peft']!r} in PEFT, "
                     f"{first['exported']!r} in llama.cpp ({gap}).")  # fmt: skip
    return " ".join(found)


def convert(
    subject: Subject, model: nn.Module, stage: Path, folder: Path, merged: bool, dtype: str, pre_tokenizer: str | None
) -> tuple[Path, Path | None]:
    """Convert the base and the adapter, or the merged model; return the paths of the model and of the adapter."""
    conversions, gguf, adapter = prepare(subject, model, stage, folder, merged, dtype, pre_tokenizer)
    llama_cpp.convert(conversions)
    return gguf, adapter


def prepare(
    subject: Subject, model: nn.Module, stage: Path, folder: Path, merged: bool, dtype: str, pre_tokenizer: str | None
) -> tuple[list[dict[str, Any]], Path, Path | None]:
    """Write what the converters read into the stage; return the conversions and the files that they will write."""
    source = stage / "model"
    source.mkdir()
    name = "model" if subject.opened is None else "merged" if merged else "base"
    gguf, adapter = folder / f"{name}-{dtype}.gguf", None
    if merged and subject.opened is not None:
        _save_merged(subject, model, source)
    else:
        subject.stage_base(source)
    save_tokenizer(subject, source)
    conversions = [llama_cpp.model_conversion(source, gguf, dtype, **_tokenizer_options(subject, pre_tokenizer))]
    if subject.opened is not None and not merged:
        adapter_type = "f16" if dtype == "q8_0" else dtype  # A and B are small, and q8_0 needs ranks of 32 and more
        adapter = folder / f"adapter-{adapter_type}.gguf"
        plain = stage / "adapter"
        plain.mkdir()
        tensors, rank, alpha = plain_lora.lora_tensors(subject.opened.saved)
        tensors = _as_gpt2_converter_expects(tensors) if subject.config.model_type == "gpt2" else tensors
        plain_lora.write_lora(plain, subject.opened.saved, tensors, rank, alpha, subject.base)
        conversions.append(llama_cpp.lora_conversion(plain, source, adapter, adapter_type))
    return conversions, gguf, adapter


def _save_merged(subject: Subject, model: nn.Module, folder: Path) -> None:
    result = merged_model(model)
    if result is None:
        raise RecipeError(f"{subject.folder} is {subject.method}, which can't be merged: keep it with its base.")
    result.save_pretrained(folder)


def _tokenizer_options(subject: Subject, pre_tokenizer: str | None) -> dict[str, Any]:
    token = templates.end_of_turn(subject.tokenizer)
    turn = subject.tokenizer.convert_tokens_to_ids(token) if token else None
    return {
        "pre_tokenizer": pre_tokenizer or llama_cpp.pre_tokenizer(subject.tokenizer),
        "end_of_turn": turn if turn != subject.tokenizer.eos_token_id else None,
    }


def _as_gpt2_converter_expects(tensors: dict[str, Any]) -> dict[str, Any]:
    """Swap and transpose A and B of GPT-2's Conv1D layers.

    llama.cpp's converter transposes these layers' weights, [in, out] in transformers, and an adapter's with them; but
    PEFT stores B A as [out, in]. (B A)^T = A^T B^T, which it turns back.
    """
    result = dict(tensors)
    for name, tensor in tensors.items():
        if any(layer in name for layer in _GPT2_TRANSPOSED):
            a, b = ".lora_A.", ".lora_B."
            result[name.replace(a, b) if a in name else name.replace(b, a)] = tensor.T
    return result


def _adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer, and so llama.cpp, puts a BOS token before a text."""
    ids = list(tokenizer("a")["input_ids"])
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]


def _commands(folder: Path, gguf: Path, adapter: Path | None) -> dict[str, str]:
    lora = f" --lora {adapter.name}" if adapter else ""
    return {
        "llama.cpp": f"llama-server -m {gguf.name}{lora} --jinja",
        "ollama": "ollama create NAME -f Modelfile && ollama run NAME",
    }
