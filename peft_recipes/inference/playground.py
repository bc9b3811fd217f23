"""A local web page by gradio: a base and its adapters asked side by side, their evidence beside them.

It answers on this machine alone and asks nothing of any other: no analytics, no version check, no fonts from elsewhere.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_recipes.adapters.open import Served, open_adapters
from peft_recipes.errors import RecipeError
from peft_recipes.inference.generate import Sampling, pace, prompt_tokens, room, write
from peft_recipes.inference.playground_evidence import evidence_markdown
from peft_recipes.inference.predict import Predictor
from peft_recipes.inference.variants import BASE, Forms

if TYPE_CHECKING:
    import gradio

HOST = "127.0.0.1"
# The page is made for a desk: the questions and answers take two thirds, the evidence the rest.
_CSS = """
.gradio-container {max-width: 1500px !important}
#evidence table {font-size: 0.82rem; width: 100%; display: table}
#evidence td, #evidence th {padding: 3px 8px; overflow-wrap: anywhere}
#evidence td:not(:first-child), #evidence th:not(:first-child) {text-align: right; font-variant-numeric: tabular-nums}
#evidence blockquote {font-size: 0.9rem}
footer {display: none !important}
"""


def serve(
    folders: Sequence[str | Path],
    *,
    port: int = 7860,
    base: str | None = None,
    trust_remote_code: bool = False,
    on_ready: Callable[[str], None] = print,
) -> None:
    """Opens the page on 127.0.0.1 and answers until it is interrupted. on_ready is told the address.

    Raises RecipeError: gradio is not installed, the port is taken, an adapter is none or sits on another base.
    """
    gradio = _gradio()
    _check_port(port)
    page = build(open_adapters(folders, base, trust_remote_code=trust_remote_code))
    page.queue(default_concurrency_limit=1).launch(
        server_name=HOST, server_port=port, share=False, quiet=True, prevent_thread_lock=True, inbrowser=False,
        footer_links=[], ssr_mode=False, show_error=True, theme=gradio.themes.Base(**_FONTS), css=_CSS,
    )  # fmt: skip
    on_ready(f"http://{HOST}:{port}  (Ctrl-C ends)")
    try:
        threading.Event().wait()
    finally:
        page.close(verbose=False)


_FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}


def _gradio() -> Any:
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    try:
        import gradio
    except ImportError as error:
        raise RecipeError("The playground needs gradio: pip install 'peft_recipes[playground]'.") from error
    return gradio


def _check_port(port: int) -> None:
    with socket.socket() as asked:
        asked.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            asked.bind((HOST, port))
        except OSError as error:
            raise RecipeError(f"--port {port} can't be had ({error.strerror}); name another.") from error


def build(opened: dict[str, Served]) -> gradio.Blocks:
    """The page of adapters that are open, as gradio's Blocks, not yet launched."""
    gradio = _gradio()
    first = next(iter(opened.values()))
    forms, lock = Forms(opened), threading.Lock()
    with gradio.Blocks(title="peft-recipes playground", analytics_enabled=False, fill_width=True) as page:
        gradio.Markdown(f"## {', '.join(opened)} on {_shown(first.model)}")
        with gradio.Row():
            with gradio.Column(scale=2, min_width=560):
                (_writing if first.generates else _classifying)(gradio, forms, lock)
            with gradio.Column(scale=1, min_width=380, elem_id="evidence"):
                gradio.Markdown(evidence_markdown(opened))
    return page


def _shown(model: str) -> str:
    from peft_recipes.adapters.merge import public_name

    return public_name(model)


def _writing(gradio: Any, forms: Forms, lock: threading.Lock) -> None:
    """A prompt, how text is drawn, and one answer a form, each shown as soon as it is written."""
    examples = [row["prompt"] for row in forms.first.recipe.prompts]
    asked = gradio.Textbox(label="Prompt", lines=3, value=examples[0] if examples else "", elem_id="prompt")
    with gradio.Row():
        length = gradio.Slider(1, 512, value=96, step=1, label="New tokens, at most")
        heat = gradio.Slider(0, 2, value=0, step=0.05, label="Temperature (0: greedy)")
        top_p = gradio.Slider(0.05, 1, value=1, step=0.05, label="Top p")
        seed = gradio.Number(value=0, precision=0, minimum=0, label="Seed")
    button = gradio.Button("Ask", variant="primary", elem_id="ask")
    answers = []
    with gradio.Row(equal_height=True):
        for name in forms.names:
            with gradio.Column(min_width=240):
                answers.append(gradio.Textbox(label=name, lines=10, max_lines=24, interactive=False, buttons=["copy"],
                                              elem_id=f"answer-{name}"))  # fmt: skip
                answers.append(gradio.Markdown("", elem_classes="speed"))

    def ask(prompt: str, most: float, temperature: float, nucleus: float, drawn: float) -> Iterator[list[Any]]:
        with lock:
            try:
                if not (prompt or "").strip():
                    raise RecipeError("Write a prompt first.")
                chosen = {"temperature": temperature, "top_p": nucleus} if temperature else {}
                sampling = Sampling(int(most), bool(temperature), seed=int(drawn or 0), **chosen)
                tokens = prompt_tokens(forms.first, [{"role": "user", "content": prompt}])
                room(forms.base, tokens, 1, "The prompt")
            except RecipeError as error:
                raise gradio.Error(str(error)) from error
            shown: list[Any] = ["", ""] * len(forms.names)
            for place, name in enumerate(forms.names):
                made = write(forms.model(name), forms.first, tokens, sampling)
                shown[2 * place] = made["text"]
                shown[2 * place + 1] = pace(made)
                yield list(shown)

    given = [asked, length, heat, top_p, seed]
    button.click(ask, given, answers, api_name="ask")
    asked.submit(ask, given, answers, api_name=False)


def _classifying(gradio: Any, forms: Forms, lock: threading.Lock) -> None:
    """A text or an image, and the classes' probabilities by each form; a base whose head is new has nothing to say."""
    names = [name for name in forms.names if name != BASE or not any(s.brings_head for s in forms.opened.values())]
    pictures = forms.first.recipe.task == "image-classification"
    if pictures:
        asked = gradio.Image(type="pil", label="Image", height=260, elem_id="image", sources=["upload", "clipboard"])
    else:
        asked = gradio.Textbox(label="Text", lines=4, elem_id="text")
    button = gradio.Button("Ask", variant="primary", elem_id="ask")
    with gradio.Row():
        answers = [gradio.Label(label=name, num_top_classes=5, elem_id=f"answer-{name}") for name in names]

    def ask(given: Any) -> list[dict[str, float]]:
        if given is None or (isinstance(given, str) and not given.strip()):
            raise gradio.Error("Choose an image first." if pictures else "Write a text first.")
        found = []
        with lock:
            for name in names:
                predictor = Predictor(forms.served(name), model=forms.model(name))
                found.append((predictor.images([given]) if pictures else predictor.texts([given]))[0]["probabilities"])
        return found if len(found) > 1 else found[0]

    button.click(ask, [asked], answers, api_name="ask")
    if not pictures:
        asked.submit(ask, [asked], answers, api_name=False)
