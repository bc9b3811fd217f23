"""Compare an exported model with the one in PEFT: tokens, chat template, end token and greedy answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_recipes.errors import RecipeError
from peft_recipes.exporting import llama_cpp, templates
from peft_recipes.exporting.subject import Subject
from peft_recipes.scoring.generation import generate, room

if TYPE_CHECKING:
    from torch import nn

NEW_TOKENS = 24
# How far apart two tokens' logits may be in PEFT's fp32 model where the exported one prefers the other of them, as a
# share of the logits' standard deviation there.
TIES = {"f32": 0.01, "f16": 0.05, "q8_0": 0.5}
PROMPTS = (
    "What does numpy.cumsum do?",
    "Write a haiku about the sea.",
    "What is 17 * 23?",
    "Name three primary colours.",
    "Translate 'good morning' into French, German and Spanish.",
    "Why is the sky blue?",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "List the planets of the solar system, in order.",
    "Summarise: The committee met on 3 May 2021, at 10:45, and adjourned without a vote.",
    "Who wrote \"Pride and Prejudice\"?",
    "Explain recursion to a child.",
    "What's the difference between a list and a tuple in Python?",
    "Ünïcödé: naïve café, Straße, Ελλάδα, Россия.",
    "日本語で挨拶してください。",
    "🙂 What does this emoji mean? 🦙",
    "Fix the grammar: she dont likes apples",
    "   Leading and trailing spaces   ",
    "Tabs\tand\n\nblank lines\n\n\nbetween words.",
    "1234567890 + 0.000001 = ?",
    "SELECT name, COUNT(*) FROM users GROUP BY name HAVING COUNT(*) > 1;",
    "Is it true that <b>HTML</b> &amp; XML are the same?",
    "Give a synonym for happy.",
    "How do I boil an egg?",
    "https://example.org/a/b?c=d&e=f#g",
)  # fmt: skip


@dataclass(frozen=True)
class Reference:
    """What the model in PEFT makes of the prompts: their tokens and its answers, by transformers."""

    prompts: list[str]
    ids: list[list[int]]
    answers: list[list[int]]


def reference(subject: Subject, model: nn.Module, prompts: tuple[str, ...] = PROMPTS) -> Reference:
    """Answer the prompts greedily; those that leave a short model no room are left out."""
    kept, ids = [], []
    for prompt in prompts:
        tokens = subject.prompt_ids(prompt)
        left = room(model, len(tokens))
        if tokens and (left is None or left >= NEW_TOKENS):
            kept.append(prompt)
            ids.append(tokens)
    if not ids:
        raise RecipeError(f"{subject.folder}: its positions leave no prompt room for an answer of {NEW_TOKENS} tokens.")
    pad = subject.tokenizer.pad_token_id
    pad = pad if pad is not None else subject.tokenizer.eos_token_id or 0
    return Reference(kept, ids, generate(model, ids, pad, NEW_TOKENS, ends=subject.ends(model)))


def verify_gguf(
    subject: Subject, model: nn.Module, expected: Reference, engine: str, dtype: str, gguf: Path, adapter: Path | None
) -> dict[str, Any]:
    """Let llama.cpp answer the same prompts, and return what differs; `passed`: nothing does but near ties."""
    tokenizer = subject.tokenizer
    chats = [each for each in templates.CONVERSATIONS if templates.render(tokenizer, each)] if subject.chats else []
    reply = llama_cpp.ask(
        engine,
        gguf,
        adapter,
        context=max(map(len, expected.ids), default=0) + NEW_TOKENS + 64,
        new=NEW_TOKENS,
        texts=expected.prompts,
        chats=[templates.messages(chat) for chat in chats],
        prompts=expected.ids,
    )
    plain = [list(tokenizer(text)["input_ids"]) for text in expected.prompts]
    chat_ids = [
        list(tokenizer.apply_chat_template(templates.messages(chat), add_generation_prompt=True, return_dict=False))
        for chat in chats
    ]
    # A chat model's prompts begin as its template says, and a plain text's BOS token does not matter to it.
    pairs = [*zip(chats, chat_ids, reply["chat_tokens"], strict=True)]
    pairs += [*zip(expected.prompts, plain, reply["tokens"], strict=True)]
    bos = tokenizer.bos_token_id if subject.chats else None
    tokens = _compare_tokens(pairs, bos)
    template = _compare_templates(tokenizer, chats, reply)
    end = _compare_end(tokenizer, reply["eos"])
    answers = compare_answers(model, tokenizer, expected, reply["answers"], TIES[dtype])
    parts = {"tokens": tokens, "template": template, "end_token": end, "answers": answers}
    return {
        "engine": llama_cpp.engine_version(engine),
        "passed": all(part["passed"] for part in parts.values() if part is not None),
        **parts,
    }


def _compare_tokens(pairs: list[Any], ignored_bos: int | None) -> dict[str, Any]:
    def stripped(ids: list[int]) -> list[int]:
        return ids[1:] if ids and ids[0] == ignored_bos else ids

    differing = [
        {"text": text if isinstance(text, str) else text[-1][1], "transformers": ours, "llama.cpp": theirs}
        for text, ours, theirs in pairs
        if (stripped(ours) != stripped(theirs) if isinstance(text, str) else ours != theirs)
    ]
    return {"passed": not differing, "texts": len(pairs), "same": len(pairs) - len(differing), "differing": differing}


def _compare_templates(tokenizer: Any, chats: list[Any], reply: dict[str, Any]) -> dict[str, Any] | None:
    """Whether llama.cpp renders the chats alike, except for a BOS token that it adds when it tokenises."""
    if not chats:
        return None
    bos = tokenizer.bos_token or ""
    differing = []
    for chat, theirs in zip(chats, reply["rendered"], strict=True):
        ours = templates.render(tokenizer, chat) or ""
        if theirs is None or ours.removeprefix(bos) != theirs.removeprefix(bos):
            differing.append({"transformers": ours, "llama.cpp": theirs})
    return {"passed": not differing, "chats": len(chats), "same": len(chats) - len(differing), "differing": differing}


def _compare_end(tokenizer: Any, theirs: str) -> dict[str, Any]:
    ours = tokenizer.eos_token
    turn = templates.end_of_turn(tokenizer)
    return {"passed": ours == theirs, "transformers": ours, "llama.cpp": theirs, "end_of_turn": turn}


def compare_answers(
    model: nn.Module, tokenizer: Any, expected: Reference, answers: list[dict[str, Any]], tie: float
) -> dict[str, Any]:
    """Compare answers token by token up to the first that differs, and say how close the two tokens are there.

    gap: PEFT's logit of its own token minus that of the other's; gap_exported: the same pair in the exported model, by
    its own logits, where both are among its likeliest. tie: the largest gap, as a share of the standard deviation of
    PEFT's logits there, at which rounding decides. An answer that llama.cpp ends at a special token, as it does at an
    end-of-text token that PEFT goes on after, is compared up to there.
    """
    special = set(tokenizer.all_special_ids) | {token for token, each in tokenizer.added_tokens_decoder.items()}

    differing, compared = [], 0
    for prompt, ids, ours, answer in zip(expected.prompts, expected.ids, expected.answers, answers, strict=True):
        theirs = answer["tokens"]
        position = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
        compared += min(len(ours), len(theirs)) if position is None else position
        if position is None and len(ours) != len(theirs) and not (theirs and theirs[-1] in special):
            position = min(len(ours), len(theirs))
        if position is None:
            continue
        pair = [tokens[position] if position < len(tokens) else None for tokens in (ours, theirs)]
        gap, spread = _gap(model, [*ids, *ours[:position]], pair)
        exported, near = _exported_gap(answer, position, pair), gap is not None and gap <= tie * spread
        names = [None if token is None else tokenizer.convert_ids_to_tokens(token) for token in pair]
        differing.append({"prompt": prompt, "position": position, "peft": names[0], "exported": names[1],
                          "gap": gap, "gap_exported": exported, "spread": spread, "tie": near})  # fmt: skip
    return {
        "passed": all(each["tie"] for each in differing),
        "prompts": len(expected.prompts),
        "same": len(expected.prompts) - len(differing),
        "tokens": compared,
        "new_tokens": NEW_TOKENS,
        "tie": tie,
        "differing": differing,
    }


def _gap(model: nn.Module, ids: list[int], pair: list[int | None]) -> tuple[float | None, float]:
    """The difference of two tokens' logits after a text, None where an answer has ended, and the logits' deviation."""
    import torch

    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids], device=next(model.parameters()).device)).logits[0, -1]
    gap = None if None in pair else float(logits[pair[0]] - logits[pair[1]])
    return gap, float(logits.std())


def _exported_gap(answer: dict[str, Any], position: int, pair: list[int | None]) -> float | None:
    steps = answer.get("logits") or []
    if position >= len(steps):
        return None
    values = [steps[position].get(str(token)) for token in pair]
    return None if None in values else values[0] - values[1]
