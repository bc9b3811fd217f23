"""The shapes of OpenAI's answers: chat or text, in one piece or in chunks."""

from __future__ import annotations

import json
import time
import uuid
from typing import Any

from peft_recipes.serving.engine import Job


class Reply:
    """The JSON of one answer. chat: of /v1/chat/completions, else of /v1/completions."""

    def __init__(self, job: Job, chat: bool):
        self._job, self._chat = job, chat
        self._shared = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": job.served.name,
        }

    def whole(self, text: str, reason: str) -> dict[str, Any]:
        """The answer in one piece."""
        content = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        choice = {"index": 0, **content, "finish_reason": reason, "logprobs": None}
        kind = "chat.completion" if self._chat else "text_completion"
        return {**self._shared, "object": kind, "choices": [choice], "usage": self._usage()}

    def start(self) -> list[str]:
        """The chunks before the first text: a chat's names its role."""
        return [self._chunk({"role": "assistant", "content": ""}, None)] if self._chat else []

    def piece(self, text: str) -> str:
        """A chunk with a piece of the answer."""
        return self._chunk({"content": text} if self._chat else text, None)

    def end(self, reason: str, usage: bool) -> list[str]:
        """The last chunks: why the answer ends, its token counts if they are asked for, and the end of the stream."""
        last = [self._chunk({} if self._chat else "", reason)]
        counts = [_event({**self._shared, "object": self._kind, "choices": [], "usage": self._usage()})]
        return [*last, *(counts if usage else []), "data: [DONE]\n\n"]

    @property
    def _kind(self) -> str:
        return "chat.completion.chunk" if self._chat else "text_completion"

    def _chunk(self, content: Any, reason: str | None) -> str:
        content = {"delta" if self._chat else "text": content}
        choice = {"index": 0, **content, "finish_reason": reason, "logprobs": None}
        return _event({**self._shared, "object": self._kind, "choices": [choice]})

    def _usage(self) -> dict[str, int]:
        """Token counts; the end token counts as generated."""
        prompt, generated = len(self._job.prompt), self._job.generated
        return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}


def error_event(body: dict[str, Any]) -> str:
    """A stream's error, after its headers were sent."""
    return _event(body)


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
