"""Run llama.cpp's own converters, convert_hf_to_gguf.py and convert_lora_to_gguf.py, one conversion after another.

A script for a process of its own: the converters are programs that change `sys.path`, and they bring a `gguf` that is
newer than the package of that name. It imports nothing of peft_recipes. Reads a list of conversions from stdin as JSON,
`{"script": str, "arguments": [str], "pre_tokenizer": str | null, "end_of_turn": int | null}`, and stops at the first
that fails. end_of_turn: a token that ends answers besides the tokenizer's end-of-text token.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any


def main(root: Path, conversions: list[dict[str, Any]]) -> None:
    sys.path[:0] = [str(root), str(root / "gguf-py")]
    from conversion import base

    base.TextModel._create_vocab_sentencepiece = _only_with_file(base.TextModel._create_vocab_sentencepiece)
    base.ModelBase.load_hparams = staticmethod(_with_earlier_names(base.ModelBase.load_hparams))
    _let_gemma_read_tokenizer_json()
    recognise, add_special = base.TextModel.get_vocab_base_pre, base.gguf.SpecialVocab.add_to_gguf
    for each in conversions:
        base.TextModel.get_vocab_base_pre = _or_named(recognise, each["pre_tokenizer"])
        base.gguf.SpecialVocab.add_to_gguf = _with_end_of_turn(add_special, each["end_of_turn"])
        sys.argv = [each["script"], *each["arguments"]]
        runpy.run_path(str(root / each["script"]), run_name="__main__")


def _with_earlier_names(load: Any) -> Any:
    """Add sizes under the names that the converters read and that transformers 5 no longer has."""

    def load_hparams(folder: Path, is_mistral_format: bool) -> dict[str, Any]:
        sizes = load(folder, is_mistral_format)
        if sizes.get("model_type") == "gpt2":
            sizes.setdefault("n_ctx", sizes["n_positions"])
        if sizes.get("model_type") == "gpt_neox":
            sizes.setdefault("rotary_pct", (sizes.get("rope_parameters") or {}).get("partial_rotary_factor", 0.25))
        return sizes

    return load_hparams


def _only_with_file(create: Any) -> Any:
    """Look for tokenizer.model before importing sentencepiece: most tokenizers have none."""

    def create_vocab(model: Any) -> Any:
        if not (model.dir_model / "tokenizer.model").is_file():
            raise FileNotFoundError(f"File not found: {model.dir_model / 'tokenizer.model'}")
        return create(model)

    return create_vocab


def _or_named(recognise: Any, name: str | None) -> Any:
    """Take the named pre-tokenizer where llama.cpp does not know the tokenizer by its fingerprint."""

    def get_vocab_base_pre(model: Any, tokenizer: Any) -> str:
        try:
            return recognise(model, tokenizer)
        except NotImplementedError:
            if name is None:
                raise
            return name

    return get_vocab_base_pre


def _with_end_of_turn(add_to_gguf: Any, token: int | None) -> Any:
    """Write the end-of-turn token with the other special tokens."""

    def add_special_tokens(vocabulary: Any, writer: Any, quiet: bool = False) -> None:
        if token is not None:
            vocabulary.special_token_ids["eot"] = token
        add_to_gguf(vocabulary, writer, quiet)

    return add_special_tokens


def _let_gemma_read_tokenizer_json() -> None:
    """Gemma's converters ask for tokenizer.model alone, which transformers 5 no longer saves."""
    from conversion import gemma

    def set_vocab(model: Any) -> None:
        if (model.dir_model / "tokenizer.model").is_file():
            originals[next(each for each in type(model).__mro__ if each in originals)](model)
            return
        try:
            model._set_vocab_llama_hf()
        except (FileNotFoundError, TypeError):  # a byte-level BPE
            model._set_vocab_gpt2()
        model.gguf_writer.add_add_space_prefix(False)

    classes = (gemma.GemmaModel, gemma.Gemma2Model, gemma.Gemma3Model)
    originals = {each: each.__dict__["set_vocab"] for each in classes}
    for each in classes:
        each.set_vocab = set_vocab


if __name__ == "__main__":
    sys.path.pop(0)  # this folder, whose gguf.py is not the package
    main(Path(sys.argv[1]), json.load(sys.stdin))
