"""A local web page (gradio) to compare a base and its adapters on one input, with their measured evidence.

It listens on 127.0.0.1 only and makes no request elsewhere: no analytics, no version check, no web fonts.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_recipes.adapters.merge import public_name
from peft_recipes.adapters.open import OpenedAdapter, open_adapters
from peft_recipes.errors import RecipeError
from peft_recipes.inference.generate import Sampling, generate_answer, length_and_speed, prompt_tokens
from peft_recipes.inference.playground_evidence import evidence_markdown
from peft_recipes.inference.predict import Predictor
from peft_recipes.inference.predictions import in_words
from peft_recipes.inference.variants import BASE, Variants

if TYPE_CHECKING:
    import gradio

HOST = "127.0.0.1"
_FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
# For a desktop screen: questions and answers take two thirds of the width, the evidence the rest.
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
) -> None:
    """Serve the page on 127.0.0.1 until it is interrupted, and print the address.

    Raises RecipeError: gradio is not installed, the port is taken, a folder holds no adapter or one of another base.
    """
    gradio = _import_gradio()
    _check_port(port)
    page = build(open_adapters(folders, base, trust_remote_code=trust_remote_code))
    page.queue(default_concurrency_limit=1).launch(
        server_name=HOST, server_port=port, share=False, quiet=True, prevent_thread_lock=True, inbrowser=False,
        footer_links=[], ssr_mode=False, show_error=True, theme=gradio.themes.Base(**_FONTS), css=_CSS,
    )  # fmt: skip
    print(f"http://{HOST}:{port}  (Ctrl-C ends)")
    try:
        threading.Event().wait()
    finally:
        page.close(verbose=False)


def _import_gradio() -> Any:
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    try:
        import gradio
    except ImportError as error:
        raise RecipeError("The playground needs gradio: pip install 'peft_recipes[playground]'.") from error
    return gradio


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise RecipeError(f"--port {port} is not available ({error.strerror}); name another.") from error


def build(adapters: dict[str, OpenedAdapter]) -> gradio.Blocks:
    """Build the page for opened adapters, as gradio's Blocks, without launching it."""
    gradio = _import_gradio()
    first = next(iter(adapters.values()))
    if first.recipe.task == "reward":
        raise RecipeError(f"{first.folder} scores texts, which has no page: use `predict --prompt P --text ANSWER`.")
    variants, lock = Variants(adapters), threading.Lock()
    with gradio.Blocks(title="peft-recipes playground", analytics_enabled=False, fill_width=True) as page:
        gradio.Markdown(f"## {', '.join(adapters)} on {public_name(first.base_name)}")
        with gradio.Row():
            with gradio.Column(scale=2, min_width=560):
                _layout(first)(gradio, variants, lock)
            with gradio.Column(scale=1, min_width=380, elem_id="evidence"):
                gradio.Markdown(evidence_markdown(adapters))
    return page


def _layout(adapter: OpenedAdapter) -> Callable[[Any, Variants, threading.Lock], None]:
    if adapter.generates:
        return _generation
    return _entities if adapter.recipe.task == "token-classification" else _classification


def _generation(gradio: Any, variants: Variants, lock: threading.Lock) -> None:
    """Lay out a prompt, the sampling options, and an answer of each variant, shown as soon as it is generated."""
    examples = [row["prompt"] for row in variants.first.recipe.prompts]
    prompt_box = gradio.Textbox(label="Prompt", lines=3, value=examples[0] if examples else "", elem_id="prompt")
    with gradio.Row():
        options = [
            gradio.Slider(1, 512, value=96, step=1, label="New tokens, at most"),
            gradio.Slider(0, 2, value=0, step=0.05, label="Temperature (0: greedy)"),
            gradio.Slider(0.05, 1, value=1, step=0.05, label="Top p"),
            gradio.Number(value=0, precision=0, minimum=0, label="Seed"),
        ]
    button = gradio.Button("Ask", variant="primary", elem_id="ask")
    answers = []
    with gradio.Row(equal_height=True):
        for name in variants.names:
            with gradio.Column(min_width=240):
                answers.append(gradio.Textbox(label=name, lines=10, max_lines=24, interactive=False, buttons=["copy"],
                                              elem_id=f"answer-{name}"))  # fmt: skip
                answers.append(gradio.Markdown("", elem_classes="speed"))

    def ask(prompt: str, max_new_tokens: float, temperature: float, top_p: float, seed: float) -> Iterator[list[Any]]:
        try:
            if not (prompt or "").strip():
                raise RecipeError("Write a prompt first.")
            chosen = {"temperature": temperature, "top_p": top_p} if temperature else {}
            sampling = Sampling(int(max_new_tokens), bool(temperature), seed=int(seed or 0), **chosen)
            messages = [{"role": "user", "content": prompt}]
            shown: list[Any] = ["", ""] * len(variants.names)
            with lock:
                for i, name in enumerate(variants.names):
                    adapter = variants.adapter(name)  # each is asked in the format of its own tokenizer
                    tokens = prompt_tokens(adapter, messages)
                    answer = generate_answer(variants.model(name), adapter, tokens, sampling)
                    shown[2 * i : 2 * i + 2] = answer["text"], length_and_speed(answer)
                    yield list(shown)
        except RecipeError as error:
            raise gradio.Error(str(error)) from error

    button.click(ask, [prompt_box, *options], answers, api_name="ask")
    prompt_box.submit(ask, [prompt_box, *options], answers, api_name=False)


def _classification(gradio: Any, variants: Variants, lock: threading.Lock) -> None:
    """Lay out an input and what each variant predicts (probabilities, a number); of the base if its head is trained."""
    untrained = any(adapter.has_own_head for adapter in variants.adapters.values())
    names = [name for name in variants.names if not (name == BASE and untrained)]
    takes_images = variants.first.recipe.task == "image-classification"
    if takes_images:
        options = {"type": "pil", "height": 260, "elem_id": "image", "sources": ["upload", "clipboard"]}
        boxes = [gradio.Image(label="Image", **options)]
    else:
        columns = variants.first.recipe.dataset.text_columns
        labels = ["First text", "Second text"] if len(columns) > 1 else ["Text"]
        ids = ["text", "text-pair"]
        boxes = [gradio.Textbox(label=label, lines=4, elem_id=i) for label, i in zip(labels, ids, strict=False)]
    button = gradio.Button("Ask", variant="primary", elem_id="ask")
    with gradio.Row():
        answers = [gradio.Label(label=name, num_top_classes=5, elem_id=f"answer-{name}") for name in names]

    def ask(*example: Any) -> Any:
        if any(part is None or (isinstance(part, str) and not part.strip()) for part in example):
            raise gradio.Error("Choose an image first." if takes_images else "Write a text first.")
        found = []
        with lock:
            for name in names:
                predictor = Predictor(variants.adapter(name), model=variants.model(name))
                classify = predictor.images if takes_images else predictor.texts
                result = classify(*([part] for part in example))[0]
                found.append(result["probabilities"] if "probabilities" in result else in_words(result)[0])
        return found if len(found) > 1 else found[0]

    button.click(ask, boxes, answers, api_name="ask")
    for box in () if takes_images else boxes:
        box.submit(ask, boxes, answers, api_name=False)


def _entities(gradio: Any, variants: Variants, lock: threading.Lock) -> None:
    """Lay out a text, and the same text for each variant with its entities marked."""
    untrained = any(adapter.has_own_head for adapter in variants.adapters.values())
    names = [name for name in variants.names if not (name == BASE and untrained)]
    box = gradio.Textbox(label="Text", lines=4, elem_id="text")
    button = gradio.Button("Ask", variant="primary", elem_id="ask")
    answers = [gradio.HighlightedText(label=name, elem_id=f"answer-{name}") for name in names]

    def ask(text: str) -> list[dict[str, Any]] | dict[str, Any]:
        if not (text or "").strip():
            raise gradio.Error("Write a text first.")
        marked = []
        with lock:
            for name in names:
                predictor = Predictor(variants.adapter(name), model=variants.model(name))
                found = predictor.texts([text])[0]["entities"]
                spans = [{"entity": row["label"], "start": row["start"], "end": row["end"]} for row in found]
                marked.append({"text": text, "entities": spans})
        return marked if len(marked) > 1 else marked[0]

    button.click(ask, [box], answers, api_name="ask")
    box.submit(ask, [box], answers, api_name=False)
