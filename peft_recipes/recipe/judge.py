"""Judge: who compares two answers where `metric` is preference, and how it is asked."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from peft_recipes.errors import RecipeError
from peft_recipes.recipe.metrics import PREFERENCE
from peft_recipes.recipe.type_checks import type_problems

PLACEHOLDERS = ("prompt", "first", "second")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")


@dataclass
class Judge:
    """The model that compares two answers: a local one, or one behind an OpenAI-compatible endpoint.

    model: a Hub id, a folder or "embedded:NAME", run through transformers; with base_url: the model's name there.
    base_url: of the endpoint, up to "/chat/completions": https://api.openai.com/v1, http://localhost:8000/v1.
    api_key_env: the environment variable that holds the endpoint's key. The key itself is never written anywhere.
    template: the question, a text or a file with {prompt}, {first} and {second} (default: scoring/judge.py TEMPLATE).
    max_new_tokens: of a reply. batch_size: questions at a time of a local model. concurrency: requests at a time.
    timeout: seconds that an endpoint may take for a reply. options: more fields of the request, such as
    {"reasoning_effort": "low"}; null leaves a field out.
    """

    model: str
    base_url: str | None = None
    api_key_env: str | None = None
    template: str | None = None
    max_new_tokens: int = 8
    batch_size: int = 8
    concurrency: int = 4
    timeout: float = 60.0
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Replace the name of a template's file by its text, so that the recipe alone repeats the judgements."""
        if isinstance(self.template, str) and _is_file(self.template):
            path = Path(self.template).expanduser()
            try:
                self.template = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise RecipeError(f"judge.template: {path} can't be read as text: {error}.") from error

    def problems(self, where: str = "judge") -> list[str]:
        """Return every problem, one line each."""
        if problems := type_problems(self, f"{where}."):
            return problems  # the checks below rely on the types
        if not self.model.strip():
            problems.append(f"{where}.model: expected a model, got {self.model!r}.")
        problems += [
            f"{where}.{key}: expected 1 or more, got {getattr(self, key)!r}."
            for key in ("max_new_tokens", "batch_size", "concurrency")
            if getattr(self, key) < 1
        ]
        if self.timeout <= 0:
            problems.append(f"{where}.timeout: expected seconds above 0, got {self.timeout!r}.")
        return [*problems, *_endpoint_problems(self, where), *_template_problems(self.template, where)]


def judge_problems(recipe: Any) -> list[str]:
    """Return every problem of a Recipe's judge, one line each."""
    if recipe.judge is None:
        missing = "judge: {model: ...} for a local model, or judge: {base_url: ..., model: ...} for an endpoint"
        return [f"metric: '{PREFERENCE}' needs a judge. Set {missing}."] if recipe.metric == PREFERENCE else []
    if recipe.metric != PREFERENCE:
        return [
            f"judge: no effect with the metric '{recipe.metric}'. Set metric: {PREFERENCE}, or leave the judge out."
        ]
    return recipe.judge.problems()


def _endpoint_problems(judge: Judge, where: str) -> list[str]:
    """Check base_url and api_key_env. No message repeats their value where it may hold a key."""
    if judge.base_url is None:
        given = [key for key, value in (("api_key_env", judge.api_key_env), ("options", judge.options)) if value]
        return [f"{where}.{key}: no effect unless {where}.base_url names an endpoint." for key in given]
    try:
        problems, url = [], urlsplit(judge.base_url)
    except ValueError as error:
        return [f"{where}.base_url: expected http://HOST/v1 or https://HOST/v1: {error}."]
    if url.username or url.password or url.query:
        problems.append(
            f"{where}.base_url: holds credentials or a query. Name the variable with the key in {where}.api_key_env."
        )
    elif url.scheme not in ("http", "https") or not url.netloc:
        problems.append(f"{where}.base_url: expected http://HOST/v1 or https://HOST/v1, got {judge.base_url!r}.")
    elif url.path.rstrip("/").endswith("/chat/completions"):
        problems.append(f"{where}.base_url: leave out '/chat/completions', which is added to it.")
    if judge.api_key_env is not None and not _VARIABLE.match(judge.api_key_env):
        problems.append(
            f"{where}.api_key_env: expected the name of an environment variable, such as OPENAI_API_KEY, and not the "
            "key itself."
        )
    if wrong := [key for key in judge.options if key in ("model", "messages", "stream")]:
        problems.append(f"{where}.options: {', '.join(wrong)} can't be set there.")
    return problems


def _template_problems(template: str | None, where: str) -> list[str]:
    missing = [name for name in PLACEHOLDERS if template is not None and f"{{{name}}}" not in template]
    if len(missing) == len(PLACEHOLDERS) and "\n" not in template:
        return [f"{where}.template: no file {template!r}, and no text with {{prompt}}, {{first}} and {{second}}."]
    return [f"{where}.template: {{{name}}} is missing." for name in missing]


def _is_file(template: str) -> bool:
    try:
        return "\n" not in template and Path(template).expanduser().is_file()
    except (OSError, RuntimeError, ValueError):  # a text that can't be a path
        return False
