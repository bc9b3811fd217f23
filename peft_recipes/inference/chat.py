"""Chat in the terminal with a base and its adapters: history, streaming, switching between adapters."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from peft_recipes.adapters.open import OpenedAdapter
from peft_recipes.errors import RecipeError, nearest
from peft_recipes.inference.generate import (
    Sampling,
    check_generates,
    generate_answer,
    length_and_speed,
    max_answer_tokens,
    prompt_tokens,
)
from peft_recipes.inference.variants import BASE, Variants
from peft_recipes.reporting.facts import plain

COMMANDS = {
    "/adapter": "/adapter NAME   answer with this adapter (without NAME: list them)",
    "/base": "/base           answer with the base alone",
    "/reset": "/reset          forget the conversation",
    "/help": "/help           these lines",
    "/quit": "/quit           end (so does Ctrl-D)",
}


class Chat:
    """A conversation: its messages, and the variant that answers next. write: prints text, piece by piece."""

    def __init__(
        self,
        adapters: dict[str, OpenedAdapter],
        sampling: Sampling,
        merged: bool = False,
        write: Callable[[str], None] | None = None,
    ):
        check_generates(adapters)
        if encoding := [adapter.folder for adapter in adapters.values() if adapter.encodes]:
            raise RecipeError(f"{encoding[0]} is for seq2seq, which has no turns: ask with --prompt.")
        self.variants = Variants(adapters, merged)
        self.sampling = sampling
        self.active = next(iter(adapters))
        self.messages: list[dict[str, str]] = []
        self._write = write or functools.partial(print, end="", flush=True)

    def run(self, read: Callable[[str], str] = input) -> None:
        """Read lines until /quit or the end of the input. Ctrl-C ends an answer, not the conversation."""
        self._line(f"{', '.join(self.variants.adapters)} on {self.variants.first.base_name}. /help lists the commands.")
        while True:
            try:
                line = read(f"you > {self.active}: ").strip()
            except EOFError:
                self._line("")
                return
            except KeyboardInterrupt:
                self._line("\n(/quit ends)")
                continue
            if line == "/quit":
                return
            try:
                self.handle(line)
            except RecipeError as error:
                self._line(str(error))

    def handle(self, line: str) -> None:
        """Run one line of input: a command, or a message to answer. Raises RecipeError for an unknown adapter."""
        command, _, name = line.partition(" ")
        if not line.startswith("/"):
            if line:
                self._answer(line)
        elif command == "/adapter" and not name.strip():
            marks = {self.active: " (answers now)"}
            self._line(", ".join(name + marks.get(name, "") for name in self.variants.names))
        elif command in ("/adapter", "/base"):
            name = BASE if command == "/base" else name.strip()
            self.variants.model(name)  # raises for a wrong name, or one that can't be merged, before anything changes
            self.active = name
            self._line(f"({name} answers from here on)")
        elif command == "/reset":
            self.messages.clear()
            self._line("(forgotten)")
        elif command == "/help":
            self._line("\n".join(COMMANDS.values()))
        else:
            self._line(f"There is no command {command}.{nearest(command, COMMANDS)} /help lists them.")

    def _answer(self, message: str) -> None:
        adapter, model = self.variants.adapter(self.active), self.variants.model(self.active)
        self.messages.append({"role": "user", "content": message})
        try:
            tokens = self._tokens_that_fit(adapter, model)
            streamer = _streamer(adapter.processor, self._write)
            try:
                answer = generate_answer(model, adapter, tokens, self.sampling, streamer)
            except KeyboardInterrupt:
                self._line(f"{streamer.flush_cache()}\n(stopped)")
                answer = {"text": streamer.text.strip(), "tokens": 0}
        except BaseException:
            self.messages.pop()
            raise
        self.messages.append({"role": "assistant", "content": answer["text"]})
        if answer["tokens"]:
            self._line(f"({self.active}: {length_and_speed(answer)})")

    def _tokens_that_fit(self, adapter: OpenedAdapter, model: Any) -> Any:
        """Tokenise the conversation; drop its oldest turns until there is room for an answer."""
        dropped = 0
        while True:
            tokens = prompt_tokens(adapter, self.messages)
            try:
                max_answer_tokens(model, tokens, 1, "Your message")
            except RecipeError:
                if len(self.messages) < 3:
                    raise
                del self.messages[:2]
                dropped += 1
                continue
            if dropped:
                self._line(f"(the oldest {dropped} turns are dropped: the model has no more room)")
            return tokens

    def _line(self, text: str) -> None:
        self._write(f"{text}\n")


def _streamer(tokenizer: Any, write: Callable[[str], None]) -> Any:
    """Make a transformers TextStreamer that prints with `write`, without a model's terminal control sequences."""
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        text = ""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            self.text += text
            write(plain(text) + ("\n" if stream_end else ""))

        def flush_cache(self) -> str:
            """Return the text that is generated but not printed yet."""
            if not self.token_cache:
                return ""
            rest = tokenizer.decode(self.token_cache, **self.decode_kwargs)[self.print_len :]
            self.text += rest
            return rest

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
