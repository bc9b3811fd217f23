"""Export for vLLM and SGLang: a folder with an adapter that they take, its tokenizer and chat template.

The rules are those of vLLM 0.33: `PEFTHelper._validate_features` and `validate_legal` (vllm/lora/peft_helper.py), the
ranks of `LoRAConfig.max_lora_rank` (vllm/config/lora.py), and the models with `SupportsLoRA`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_recipes.adapters.merge import TOLERANCE, VerificationError, largest_difference
from peft_recipes.errors import RecipeError
from peft_recipes.exporting import plain_lora
from peft_recipes.exporting.subject import Subject
from peft_recipes.exporting.templates import end_of_turn
from peft_recipes.exporting.tokenizer import save_tokenizer
from peft_recipes.exporting.verify import NEW_TOKENS, compare_answers, reference

if TYPE_CHECKING:
    from torch import nn

VERSION = "0.33"
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# Of the language models in models/architecture_table.py.
WITH_LORA = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "opt")
WITHOUT_LORA = ("gpt2",)
WITH_EMBEDDINGS = ("llama", "qwen3")  # that take LoRA on embed_tokens and lm_head: `embedding_modules`
_LOGIT_PROMPTS = 4


def check(subject: Subject) -> None:
    """Raise RecipeError for an adapter that vLLM refuses or would serve wrongly, before weights are loaded."""
    subject.check_language_model("vLLM")
    kind = subject.config.model_type
    refuse(subject, _obstacles(subject))
    if kind in WITHOUT_LORA:
        raise RecipeError(
            f"vLLM {VERSION} serves {kind} without adapters: merge it (`peft-recipes merge {subject.folder} --output "
            "DIR`) and serve the merged model."
        )
    rank = _rank(subject)
    if rank > RANKS[-1]:
        raise RecipeError(
            f"{subject.folder} has rank {rank}; vLLM takes ranks up to {RANKS[-1]}. Make a LoRA of a smaller rank with "
            f"--to lora --rank {RANKS[-1]}."
        )


def _obstacles(subject: Subject, base: nn.Module | None = None) -> list[str]:
    kind, saved = subject.config.model_type, subject.opened.saved
    found = plain_lora.obstacles(saved, base, embeddings=kind in WITH_EMBEDDINGS)
    if kind in WITH_LORA and kind not in WITH_EMBEDDINGS and any(".lm_head." in name for name in saved.tensors):
        found.append(f"LoRA on the LM head, which vLLM does not take of {kind}")
    return found


def refuse(subject: Subject, obstacles: list[str]) -> None:
    """Raise RecipeError if there are obstacles to a LoRA that vLLM serves."""
    if obstacles:
        raise RecipeError(
            f"{subject.folder} can't be served by vLLM and SGLang, which take A and B of linear layers alone: "
            f"{'; '.join(obstacles)}. Make a LoRA of it with --to lora, or merge it with `peft-recipes merge`."
        )


def export(subject: Subject, folder: Path) -> dict[str, Any]:
    """Write the adapter's folder; return what export.json says about it.

    Raises VerificationError if the folder, loaded by PEFT, gives other outputs than the adapter.
    """
    model = subject.load()
    refuse(subject, _obstacles(subject, model.get_base_model()))
    saved = subject.opened.saved
    tensors, rank, alpha = plain_lora.lora_tensors(saved)
    plain_lora.write_lora(folder, saved, tensors, rank, alpha, str(saved.config.base_model_name_or_path))
    save_tokenizer(subject, folder)
    _copy_generation_defaults(subject, folder, model)
    largest = next(each for each in RANKS if each >= rank)
    return {
        "rank": rank,
        "max_lora_rank": largest,
        "rescaled": not plain_lora.is_uniform(saved),
        "notes": _notes(subject),
        "commands": commands(folder, largest),
        "verification": _verify(subject, model, folder),
    }


def commands(folder: Path, max_rank: int) -> dict[str, str]:
    """How the folder DIR is served on its BASE. NAME is what requests call the adapter."""
    template = " --chat-template DIR/chat_template.jinja" if (folder / "chat_template.jinja").is_file() else ""
    return {
        "vllm": f"vllm serve BASE --enable-lora --max-lora-rank {max_rank} --lora-modules NAME=DIR{template}",
        "sglang": f"python -m sglang.launch_server --model-path BASE --enable-lora --max-lora-rank {max_rank} "
        f"--lora-paths NAME=DIR{template}",
    }


def _rank(subject: Subject) -> int:
    config = subject.opened.saved.config
    return max([config.r, *config.rank_pattern.values()])


def _notes(subject: Subject) -> list[str]:
    notes = ["vLLM was not run: the folder was checked by its rules and loaded by PEFT."]
    kind = subject.config.model_type
    if kind not in WITH_LORA:
        notes.append(f"vLLM {VERSION} has no model of its own for {kind} that takes adapters; whether it serves it "
                     "through transformers has to be tried.")  # fmt: skip
    if subject.opened.quantise:
        notes.append(f"The base was {subject.opened.quantise} in training: served in full precision it answers a "
                     "little differently.")  # fmt: skip
    return notes


def _copy_generation_defaults(subject: Subject, folder: Path, model: nn.Module) -> None:
    """Save the base's generation defaults, with the end tokens of the adapter's tokenizer."""
    import json

    path = Path(subject.base_argument) / "generation_config.json"
    defaults = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    token = end_of_turn(subject.tokenizer)
    ends = subject.ends(model) | ({subject.tokenizer.convert_tokens_to_ids(token)} if token else set())
    defaults["eos_token_id"] = sorted(ends) if len(ends) > 1 else next(iter(ends), None)
    (folder / "generation_config.json").write_text(json.dumps(defaults, indent=2) + "\n", encoding="utf-8")


def _verify(subject: Subject, model: nn.Module, folder: Path) -> dict[str, Any]:
    """Compare the folder, loaded by PEFT on a fresh base, with the adapter: logits, greedy answers, chat template."""
    import torch
    from peft import PeftModel
    from transformers import AutoTokenizer

    from peft_recipes.training.verify import compute_logits

    expected = reference(subject, model)
    inputs = [{"input_ids": torch.tensor([ids])} for ids in expected.ids[:_LOGIT_PROMPTS]]
    hardware = subject.opened.hardware()
    before = compute_logits(model, inputs, hardware)
    exported = PeftModel.from_pretrained(subject.opened.load_base(dequantise=True), folder).eval()
    share = largest_difference(before, compute_logits(exported, inputs, hardware))["share_of_outputs"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    same = [tokenizer(text)["input_ids"] == subject.tokenizer(text)["input_ids"] for text in expected.prompts]
    template = None
    if subject.chats:
        again = [subject.prompt_ids(text, tokenizer) for text in expected.prompts]
        alike = sum(a == b for a, b in zip(again, expected.ids, strict=True))
        template = {"passed": alike == len(expected.ids), "chats": len(expected.ids), "same": alike}
    answers = [{"tokens": tokens} for tokens in reference(subject, exported, tuple(expected.prompts)).answers]
    result = {
        "engine": "PEFT",
        "logits": {"passed": bool(share <= TOLERANCE), "share_of_outputs": share},
        "tokens": {"passed": all(same), "texts": len(same), "same": sum(same)},
        "template": template,
        "answers": compare_answers(model, subject.tokenizer, expected, answers, 0.01) | {"new_tokens": NEW_TOKENS},
    }
    result["passed"] = all(part["passed"] for part in result.values() if isinstance(part, dict))
    if not result["passed"]:
        wrong = [name for name, part in result.items() if isinstance(part, dict) and not part["passed"]]
        raise VerificationError(f"The exported folder differs from {subject.folder} in {', '.join(wrong)}. Nothing was "
                                "written.")  # fmt: skip
    return result
