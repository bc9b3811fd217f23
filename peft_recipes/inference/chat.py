"""A chat in the terminal with a base and its adapters: history, streaming, a switch in the middle."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from peft_recipes.adapters.open import Served
from peft_recipes.errors import RecipeError, nearest
from peft_recipes.inference.generate import Sampling, check_generates, pace, prompt_tokens, room, write
from peft_recipes.inference.variants import BASE, Forms
from peft_recipes.reporting.facts import plain

COMMANDS = {
    "/adapter": "/adapter NAME   the answers come from this adapter (without NAME: which there are)",
    "/base": "/base           the answers come from the base alone",
    "/reset": "/reset          forget what was said",
    "/help": "/help           these lines",
    "/quit": "/quit           end (so does Ctrl-D)",
}


class Chat:
    """A conversation: what was said so far, and who answers next. `say` writes to the terminal, piece by piece."""

    def __init__(
        self,
        opened: dict[str, Served],
        sampling: Sampling,
        merged: bool = False,
        say: Callable[[str], None] | None = None,
    ):
        check_generates(opened)
        self.forms = Forms(opened, merged)
        self.sampling = sampling
        self.speaker = next(iter(opened))
        self.messages: list[dict[str, str]] = []
        self._say = say or _to_stdout

    def run(self, read: Callable[[str], str] = input) -> None:
        """Reads lines until /quit or the end of the input. Ctrl-C ends an answer, not the conversation."""
        self._line(f"{', '.join(self.forms.opened)} on {self.forms.first.model}. /help tells the commands.")
        while True:
            try:
                line = read(f"you > {self.speaker}: ").strip()
            except EOFError:
                self._line("")
                return
            except KeyboardInterrupt:
                self._line("\n(/quit ends)")
                continue
            if line == "/quit":
                return
            try:
                self.hear(line)
            except RecipeError as error:
                self._line(str(error))

    def hear(self, line: str) -> None:
        """One line of the user's: a command, or something to answer. Raises RecipeError for a wrong name."""
        if line.startswith("/"):
            self._command(line)
        elif line:
            self._answer(line)

    def _command(self, line: str) -> None:
        word, _, rest = line.partition(" ")
        if word == "/adapter" and rest.strip():
            self._switch(rest.strip())
        elif word == "/adapter":
            self._line(
                ", ".join(name + (" (answers now)" if name == self.speaker else "") for name in self.forms.names)
            )
        elif word == "/base":
            self._switch(BASE)
        elif word == "/reset":
            self.messages.clear()
            self._line("(forgotten)")
        elif word == "/help":
            self._line("\n".join(COMMANDS.values()))
        else:
            self._line(f"There is no command {word}.{nearest(word, COMMANDS)} /help tells those that there are.")

    def _switch(self, name: str) -> None:
        self.forms.model(name)  # a wrong name, or one that can't be merged, before anything changes
        self.speaker = name
        self._line(f"({name} answers from here on)")

    def _answer(self, said: str) -> None:
        served, model = self.forms.served(self.speaker), self.forms.model(self.speaker)
        self.messages.append({"role": "user", "content": said})
        try:
            tokens = self._fitting(served, model)
            streamer = _streamer(served.processor, self._say)
            try:
                made = write(model, served, tokens, self.sampling, streamer)
            except KeyboardInterrupt:
                self._line(f"{streamer.ended()}\n(stopped)")
                made = {"text": streamer.text.strip(), "tokens": 0}
        except BaseException:
            self.messages.pop()
            raise
        self.messages.append({"role": "assistant", "content": made["text"]})
        if made["tokens"]:
            self._line(f"({self.speaker}: {pace(made)})")

    def _fitting(self, served: Served, model: Any) -> Any:
        """The conversation's tokens; its oldest turns are left out where the model has no room for an answer."""
        left_out = 0
        while True:
            tokens = prompt_tokens(served, self.messages)
            try:
                room(model, tokens, 1, "What you said")
            except RecipeError:
                if len(self.messages) < 3:
                    raise
                del self.messages[:2]
                left_out += 1
                continue
            if left_out:
                self._line(f"(the oldest {left_out} turns are forgotten: the model has no more room)")
            return tokens

    def _line(self, text: str) -> None:
        self._say(f"{text}\n")


def _to_stdout(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _streamer(tokenizer: Any, say: Callable[[str], None]) -> Any:
    """transformers' TextStreamer, which writes by `say`, without control sequences that a model may write."""
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        text = ""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            self.text += text
            say(plain(text) + ("\n" if stream_end else ""))

        def ended(self) -> str:
            """What was written and not yet shown."""
            rest = (
                tokenizer.decode(self.token_cache, **self.decode_kwargs)[self.print_len :] if self.token_cache else ""
            )
            self.text += rest
            return rest

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
