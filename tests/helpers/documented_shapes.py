"""Rows in the shapes that LLaMA-Factory, axolotl and TRL document, and what is learnt from them.

SHAPES: name -> (task, a row as a function of its number, what is learnt from row n, or the refusal). Learnt is, in
ChatML, what is shown and then, in brackets, what has a loss; of preferences and labelled answers prompt | answers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

WEATHER = {"name": "weather", "description": "of a city", "parameters": {"type": "object", "properties": {}}}
CALL = {"name": "weather", "arguments": {"city": "Rome"}}
_CALLED = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
_TOOLS = (
    "system: %sYou may call these functions:\n<tools>\n"
    + json.dumps({"type": "function", "function": WEATHER})
    + ("\n</tools>")
)
_PICTURE = "https://example.org/a.png"


def said(*turns: str, role: str = "role", content: str = "content", names: tuple[str, str] = ("user", "assistant")):
    """Messages that user and assistant say in turn."""
    return [{role: names[i % 2], content: text} for i, text in enumerate(turns)]


def sharegpt(*turns: str) -> list[dict[str, str]]:
    return said(*turns, role="from", content="value", names=("human", "gpt"))


Row = Callable[[int], dict[str, Any]]
SHAPES: dict[str, tuple[str, Row, str]] = {
    # LLaMA-Factory, data/README.md
    "LLaMA-Factory alpaca": (
        "sft",
        lambda n: {"instruction": f"ask {n}", "input": "in", "output": f"say {n}", "system": "be kind",
                   "history": [["hi", "hello"]]},
        "system: be kind / user: hi / assistant: hello / user: ask {n}\n\nin / assistant: [say {n}]",
    ),
    "LLaMA-Factory alpaca, pre-training": ("sft", lambda n: {"text": f"text {n}"}, "[text {n}]"),
    "LLaMA-Factory alpaca, preference": (
        "dpo",
        lambda n: {"instruction": f"ask {n}", "input": "in", "chosen": f"good {n}", "rejected": f"bad {n}"},
        "user: ask {n}\n\nin / assistant: | good {n} | bad {n}",
    ),
    "LLaMA-Factory alpaca, KTO": (
        "kto",
        lambda n: {"instruction": f"ask {n}", "input": "", "output": f"say {n}", "kto_tag": n % 2 == 0},
        "user: ask {n} / assistant: | say {n}",
    ),
    "LLaMA-Factory sharegpt": (
        "sft",
        lambda n: {
            "conversations": [
                {"from": "human", "value": f"ask {n}"},
                {"from": "function_call", "value": json.dumps(CALL)},
                {"from": "observation", "value": "sunny"},
                {"from": "gpt", "value": f"say {n}"},
            ],
            "system": "be kind",
            "tools": json.dumps([WEATHER]),
        },
        _TOOLS % "be kind\n\n" + " / user: ask {n} / assistant: [" + _CALLED + "] / tool: sunny / assistant: [say {n}]",
    ),
    "LLaMA-Factory sharegpt, preference": (
        "dpo",
        lambda n: {
            "conversations": sharegpt("hi", "hello", f"ask {n}"),
            "chosen": {"from": "gpt", "value": f"good {n}"},
            "rejected": {"from": "gpt", "value": f"bad {n}"},
        },
        "user: hi / assistant: hello / user: ask {n} / assistant: | good {n} | bad {n}",
    ),
    "LLaMA-Factory sharegpt, KTO": (
        "kto",
        lambda n: {"conversations": sharegpt(f"ask {n}", f"say {n}"), "kto_tag": n % 2 == 0},
        "user: ask {n} / assistant: | say {n}",
    ),
    "LLaMA-Factory openai": (
        "sft",
        lambda n: {"messages": [{"role": "system", "content": "be kind"}, *said(f"ask {n}", f"say {n}")]},
        "system: be kind / user: ask {n} / assistant: [say {n}]",
    ),
    "LLaMA-Factory multimodal": (
        "sft",
        lambda n: {"messages": said(f"<image>ask {n}", f"say {n}"), "images": [_PICTURE]},
        "refused: pictures or sound",
    ),
    "LLaMA-Factory KTO, as sft": (
        "sft",
        lambda n: {"conversations": sharegpt(f"ask {n}", f"say {n}"), "kto_tag": n % 2 == 0},
        "refused: task: kto",
    ),
    # axolotl, docs/dataset-formats
    "axolotl completion": ("language-modeling", lambda n: {"text": f"text {n}"}, "[text {n}]"),
    "axolotl alpaca": (
        "sft",
        lambda n: {"instruction": f"ask {n}", "input": "", "output": f"say {n}"},
        "user: ask {n} / assistant: [say {n}]",
    ),
    "axolotl chat_template": (
        "sft",
        lambda n: {"messages": said("hi", "hello", f"ask {n}", f"say {n}")},
        "user: hi / assistant: hello / user: ask {n} / assistant: [say {n}]",
    ),
    "axolotl chat_template, training by message": (
        "sft",
        lambda n: {
            "messages": [
                *said("hi"),
                {"role": "assistant", "content": "hello", "training": True},
                {"role": "user", "content": f"ask {n}", "training": False},
                {"role": "assistant", "content": f"say {n}", "training": False},
            ]
        },
        "user: hi / assistant: [hello] / user: ask {n} / assistant: say {n}",
    ),
    "axolotl sharegpt": (
        "sft",
        lambda n: {"conversations": sharegpt(f"ask {n}", f"say {n}")},
        "user: ask {n} / assistant: [say {n}]",
    ),
    "axolotl pygmalion": (
        "sft",
        lambda n: {"conversations": said(f"ask {n}", f"say {n}", content="value", names=("human", "bot"))},
        "user: ask {n} / assistant: [say {n}]",
    ),
    "axolotl alpaca_chat.load_qa": (
        "sft",
        lambda n: {"question": f"ask {n}", "answer": f"say {n}"},
        "user: ask {n} / assistant: [say {n}]",
    ),
    "axolotl context_qa": (
        "sft",
        lambda n: {"article": "long ago", "question": f"ask {n}", "answer": f"say {n}"},
        "user: ask {n}\n\nlong ago / assistant: [say {n}]",
    ),
    "axolotl gpteacher": (
        "sft",
        lambda n: {"instruction": f"ask {n}", "input": "in", "response": f"say {n}"},
        "user: ask {n}\n\nin / assistant: [say {n}]",
    ),
    "axolotl summarizetldr": (
        "sft",
        lambda n: {"article": f"ask {n}", "summary": f"say {n}"},
        "user: ask {n} / assistant: [say {n}]",
    ),
    "axolotl metharme": (
        "sft",
        lambda n: {"prompt": f"ask {n}", "generation": f"say {n}"},
        "user: ask {n} / assistant: [say {n}]",
    ),
    "axolotl load_open_orca": (
        "sft",
        lambda n: {"system_prompt": "be kind", "question": f"ask {n}", "response": f"say {n}"},
        "system: be kind / user: ask {n} / assistant: [say {n}]",
    ),
    "axolotl load_camel_ai": (
        "sft",
        lambda n: {"message_1": f"ask {n}", "message_2": f"say {n}"},
        "user: ask {n} / assistant: [say {n}]",
    ),
    "axolotl oasst": (
        "sft",
        lambda n: {"INSTRUCTION": f"ask {n}", "RESPONSE": f"say {n}"},
        "user: ask {n} / assistant: [say {n}]",
    ),
    "axolotl explainchoice": (
        "sft",
        lambda n: {"question": f"ask {n}", "choices": ["a", "b"], "explanation": f"say {n}"},
        "refused: none of the formats",
    ),
    "axolotl input_output": (
        "sft",
        lambda n: {"segments": [{"label": False, "text": f"ask {n}"}, {"label": True, "text": f"say {n}"}]},
        "refused: segments of text",
    ),
    "axolotl pre-tokenized": (
        "sft",
        lambda n: {"input_ids": [5, 6, n], "attention_mask": [1, 1, 1], "labels": [-100, 6, n]},
        "refused: token ids already",
    ),
    "axolotl stepwise_supervised": (
        "sft",
        lambda n: {"prompt": f"ask {n}", "completions": ["a", "b"], "labels": [True, False]},
        "refused: stepwise supervision",
    ),
    "axolotl dpo chatml.intel": (
        "dpo",
        lambda n: {"system": "be kind", "question": f"ask {n}", "chosen": f"good {n}", "rejected": f"bad {n}"},
        "system: be kind / user: ask {n} / assistant: | good {n} | bad {n}",
    ),
    "axolotl dpo chatml.icr": (
        "dpo",
        lambda n: {"system": "be kind", "input": f"ask {n}", "chosen": f"good {n}", "rejected": f"bad {n}"},
        "system: be kind / user: ask {n} / assistant: | good {n} | bad {n}",
    ),
    "axolotl dpo chatml.ultra": (
        "dpo",
        lambda n: {
            "prompt": f"ask {n}",
            "chosen": said(f"ask {n}", f"good {n}"),
            "rejected": said(f"ask {n}", f"bad {n}"),
        },
        "user: ask {n} / assistant: | good {n} | bad {n}",
    ),
    "axolotl dpo chat_template.default": (
        "dpo",
        lambda n: {
            "messages": said("hi", "hello", f"ask {n}"),
            "chosen": {"role": "assistant", "content": f"good {n}"},
            "rejected": {"role": "assistant", "content": f"bad {n}"},
        },
        "user: hi / assistant: hello / user: ask {n} / assistant: | good {n} | bad {n}",
    ),
    "axolotl kto chatml.argilla": (
        "kto",
        lambda n: {"instruction": f"ask {n}", "completion": f"say {n}", "label": n % 2 == 0},
        "user: ask {n} / assistant: | say {n}",
    ),
    "axolotl kto chatml.intel": (
        "kto",
        lambda n: {"system": "be kind", "question": f"ask {n}", "completion": f"say {n}", "label": n % 2 == 0},
        "system: be kind / user: ask {n} / assistant: | say {n}",
    ),
    # TRL, dataset formats
    "TRL language modeling": ("sft", lambda n: {"text": f"text {n}"}, "[text {n}]"),
    "TRL language modeling, conversational": (
        "sft",
        lambda n: {"messages": said(f"ask {n}", f"say {n}")},
        "user: ask {n} / assistant: [say {n}]",
    ),
    "TRL prompt-only, as sft": ("sft", lambda n: {"prompt": f"ask {n}"}, "refused: none of the formats"),
    "TRL prompt-completion": (
        "sft",
        lambda n: {"prompt": f"ask {n}", "completion": f"say {n}"},
        "user: ask {n} / assistant: [say {n}]",
    ),
    "TRL prompt-completion, conversational": (
        "sft",
        lambda n: {
            "prompt": said(f"ask {n}"),
            "completion": [
                {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]},
                {"role": "tool", "name": "weather", "content": "sunny"},
                {"role": "assistant", "content": f"say {n}"},
            ],
        },
        "user: ask {n} / assistant: [" + _CALLED + "] / tool: sunny / assistant: [say {n}]",
    ),
    "TRL preference": (
        "dpo",
        lambda n: {"prompt": f"ask {n}", "chosen": f"good {n}", "rejected": f"bad {n}"},
        "user: ask {n} / assistant: | good {n} | bad {n}",
    ),
    "TRL preference, conversational, implicit prompt": (
        "dpo",
        lambda n: {"chosen": said(f"ask {n}", f"good {n}"), "rejected": said(f"ask {n}", f"bad {n}")},
        "user: ask {n} / assistant: | good {n} | bad {n}",
    ),
    "TRL unpaired preference": (
        "kto",
        lambda n: {"prompt": f"ask {n}", "completion": f"say {n}", "label": n % 2 == 0},
        "user: ask {n} / assistant: | say {n}",
    ),
    "TRL unpaired preference, conversational": (
        "kto",
        lambda n: {"prompt": said(f"ask {n}"), "label": n % 2 == 0,
                   "completion": [{"role": "assistant", "content": f"say {n}"}]},
        "user: ask {n} / assistant: | say {n}",
    ),
    "TRL stepwise supervision": (
        "sft",
        lambda n: {"prompt": f"ask {n}", "completions": ["a", "b"], "labels": [True, False]},
        "refused: stepwise supervision",
    ),
    "TRL tool calling": (
        "sft",
        lambda n: {
            "messages": [
                *said(f"ask {n}"),
                {"role": "assistant", "tool_calls": [{"type": "function", "function": CALL}]},
            ],
            "tools": [{"type": "function", "function": WEATHER}],
        },
        _TOOLS % "" + " / user: ask {n} / assistant: [" + _CALLED + "]",
    ),
    "TRL vision": (
        "sft",
        lambda n: {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"ask {n}"}]},
                                {"role": "assistant", "content": [{"type": "text", "text": f"say {n}"}]}]},
        "refused: a part of type 'image'",
    ),
    # The rest that people have
    "OpenAI, content: null and arguments as text": (
        "sft",
        lambda n: {
            "messages": [
                *said(f"ask {n}"),
                {"role": "assistant", "content": None, "tool_calls": [
                    {"id": "1", "type": "function",
                     "function": {"name": "weather", "arguments": json.dumps(CALL["arguments"])}}]},
                {"role": "tool", "tool_call_id": "1", "content": "sunny"},
                {"role": "assistant", "content": [{"type": "text", "text": f"say {n}"}]},
            ],
        },
        "user: ask {n} / assistant: [" + _CALLED + "] / tool: sunny / assistant: [say {n}]",
    ),
    "OpenAI, weight": (
        "sft",
        lambda n: {"messages": [*said("hi"), {"role": "assistant", "content": "hello", "weight": 1},
                                {"role": "user", "content": f"ask {n}"},
                                {"role": "assistant", "content": f"say {n}", "weight": 0}]},
        "user: hi / assistant: [hello] / user: ask {n} / assistant: say {n}",
    ),
    "Messages as JSON in a text": (
        "sft",
        lambda n: {"messages": json.dumps(said(f"ask {n}", f"say {n}"))},
        "user: ask {n} / assistant: [say {n}]",
    ),
    "Messages as lists by key": (
        "sft",
        lambda n: {"conversations": {"from": ["human", "gpt"], "value": [f"ask {n}", f"say {n}"]}},
        "user: ask {n} / assistant: [say {n}]",
    ),
    "Dolly": (
        "sft",
        lambda n: {"instruction": f"ask {n}", "context": "long ago", "response": f"say {n}", "category": "open"},
        "user: ask {n}\n\nlong ago / assistant: [say {n}]",
    ),
    "OASST, a tree": (
        "sft",
        lambda n: {"message_id": str(n), "parent_id": str(n - 1), "text": f"ask {n}", "role": "prompter"},
        "refused: a tree of messages",
    ),
    "Preferences, as sft": (
        "sft",
        lambda n: {"prompt": f"ask {n}", "chosen": f"good {n}", "rejected": f"bad {n}"},
        "refused: task: dpo",
    ),
}  # fmt: skip
