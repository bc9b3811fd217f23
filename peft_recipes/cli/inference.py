"""Commands that run saved adapters: predict, generate, evaluate, playground."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from typer import Option

from peft_recipes.cli.common import (
    ADAPTERS,
    Adapter,
    Adapters,
    Base,
    Benchmarks,
    Json,
    Trust,
    command,
    say,
    show,
    split_names,
)
from peft_recipes.errors import RecipeError

File = Annotated[Path | None, Option("--file", metavar="FILE", help="Read txt (a text per line), csv, jsonl, parquet.")]
Column = Annotated[str | None, Option("--column", metavar="NAME", help="Read the texts from this column.")]


@command(ADAPTERS)
def predict(
    adapter: Adapter,
    text: Annotated[list[str], Option("--text", metavar="T", help="Classify this text; repeatable.")] = [],  # noqa: B006
    text_pair: Annotated[
        list[str], Option("--text-pair", metavar="T", help="The second text of a pair, one for each --text.")
    ] = [],  # noqa: B006
    prompt: Annotated[
        str | None, Option("--prompt", metavar="T", help="Score each --text as an answer to this (reward models).")
    ] = None,
    file: File = None,
    image: Annotated[
        list[Path], Option("--image", metavar="PATH", help="Classify an image or a folder of them; repeatable.")
    ] = [],  # noqa: B006
    column: Annotated[
        list[str], Option("--column", metavar="NAME", help="Read the texts from this column; twice for pairs.")
    ] = [],  # noqa: B006
    output: Annotated[
        Path | None, Option("--output", metavar="FILE", help="Write rows and results to csv, jsonl or parquet.")
    ] = None,
    batch_size: Annotated[
        int, Option("--batch-size", metavar="N", help="Start with this batch size; halved if memory runs out.")
    ] = 32,
    base: Base = "",
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Classify texts, pairs or images with a saved adapter: label and probability, labels, a number, or entities.

    A reward model scores texts, or answers to --prompt.
    """
    from peft_recipes.cli.output.answers import show_predictions
    from peft_recipes.inference import inputs, predict
    from peft_recipes.inference.outputs import check_writable
    from peft_recipes.inference.tables import Table

    _check_one_given({"--text": text, "--file": file, "--image": image})
    if text_pair and len(text_pair) != len(text):
        raise RecipeError(f"--text-pair: {len(text_pair)} for {len(text)} --text; give one for each.")
    if prompt is not None and not text:
        raise RecipeError("--prompt needs --text: the answer to score.")
    if output is not None:
        check_writable(output)
    predictor = predict.Predictor(adapter, base or None, batch_size=batch_size, trust_remote_code=trust_remote_code)
    if file is not None:
        names, results = predict.predict_file(predictor, file, output, column)
    else:
        files = inputs.image_files(image)
        columns = [text, text_pair] if text_pair else [text or [str(path) for path in files]]
        names = list(zip(*columns, strict=True))
        results = predictor.texts(*columns, prompt=prompt) if text else predictor.images(files)
        if output is not None:
            keys = ["text", "text_pair"] if text else ["image"]
            rows = [dict(zip(keys, name, strict=False)) for name in names]
            predict.write_results(Table(keys[: len(columns)], rows), results, output)
    if as_json or output is None:
        keys = ["image"] if image else ["text", "text_pair"]
        empty = dict.fromkeys(next(result for result in results if result is not None))
        rows = [
            dict(zip(keys, name, strict=False)) | (result or empty) for name, result in zip(names, results, strict=True)
        ]
        show(as_json, rows, lambda: show_predictions(names, results), ensure_ascii=False)
    if without := results.count(None):
        say(f"{without} of {len(results)} rows have no text, and so no result.")
    if output is not None:
        say(f"{len(results)} rows in {output}")


@command(ADAPTERS)
def generate(
    adapters: Adapters,
    prompt: Annotated[list[str], Option("--prompt", metavar="TEXT", help="Answer this prompt; repeatable.")] = [],  # noqa: B006
    file: File = None,
    chat: Annotated[bool, Option("--chat", help="Chat in the terminal; /help lists its commands.")] = False,
    column: Column = None,
    merged: Annotated[bool, Option("--merged", help="Also answer with each adapter merged into its base.")] = False,
    raw: Annotated[bool, Option("--raw", help="Use the prompt unchanged, without a template.")] = False,
    max_new_tokens: Annotated[
        int, Option("--max-new-tokens", metavar="N", help="Limit the length of an answer.")
    ] = 128,
    do_sample: Annotated[
        bool | None, Option("--do-sample/--greedy", help="Sample; greedy unless a sampling option is given.")
    ] = None,
    temperature: Annotated[
        float | None, Option("--temperature", metavar="F", help="Set the sampling temperature.")
    ] = None,
    top_p: Annotated[float | None, Option("--top-p", metavar="F", help="Sample from this probability mass.")] = None,
    top_k: Annotated[int | None, Option("--top-k", metavar="N", help="Sample from the N likeliest tokens.")] = None,
    repetition_penalty: Annotated[
        float | None, Option("--repetition-penalty", metavar="F", help="Penalise repeated tokens (1: off).")
    ] = None,
    seed: Annotated[int, Option("--seed", metavar="N", help="Seed the sampling, for each model alike.")] = 0,
    base: Base = "",
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Answer prompts with a base and its adapters side by side, with the tokens/s of each; or chat with them."""
    from peft_recipes.adapters.open import open_adapters
    from peft_recipes.cli.output.answers import show_answers
    from peft_recipes.cli.output.progress import counter, line_reader
    from peft_recipes.inference import generate, inputs

    _check_one_given({"--prompt": prompt, "--file": file, "--chat": chat})
    if chat and as_json:
        raise RecipeError("--chat and --json contradict each other; choose one.")
    sampling = generate.Sampling(max_new_tokens, do_sample, temperature, top_p, top_k, repetition_penalty, seed)
    if file is not None:
        table, column = inputs.read_texts(file, column, ["prompt", "instruction"])
        prompt = [text for text in table.values(column) if (text or "").strip()]
        if left_out := len(table.rows) - len(prompt):
            say(f"{left_out} of {len(table.rows)} rows have no prompt and are left out.")
    opened = open_adapters(adapters, base or None, trust_remote_code=trust_remote_code)
    if chat:
        from peft_recipes.inference.chat import Chat

        Chat(opened, sampling, merged).run(line_reader())
        return
    with counter("answers") as on_answer:
        answers = generate.generate(opened, prompt, sampling, merged=merged, raw=raw, on_answer=on_answer)
    show(as_json, answers, lambda: show_answers(answers), ensure_ascii=False)


@command(ADAPTERS)
def evaluate(
    adapter: Adapter,
    benchmarks: Benchmarks = "",
    benchmark_examples: Annotated[
        int | None,
        Option("--benchmark-examples", metavar="N", min=0, help="Take at most N examples of each; 0: all [200]."),
    ] = None,
    base: Base = "",
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Evaluate a base and a saved adapter side by side, on benchmarks or on the test split of the adapter's run."""
    from peft_recipes.cli.output.evaluations import show_evaluation
    from peft_recipes.cli.output.progress import counter
    from peft_recipes.inference.evaluate import evaluate as evaluate_adapter

    options = {"base": base or None, "benchmark_examples": benchmark_examples, "trust_remote_code": trust_remote_code}
    with counter("evaluations") as on_progress:
        result = evaluate_adapter(adapter, split_names(benchmarks) or [], on_progress=on_progress, **options)
    show(as_json, result, lambda: show_evaluation(result), ensure_ascii=False)


@command(ADAPTERS)
def playground(
    adapters: Adapters,
    port: Annotated[
        int, Option("--port", min=1, max=65535, help="Listen on this port of 127.0.0.1, for this machine alone.")
    ] = 7860,
    base: Base = "",
    trust_remote_code: Trust = False,
) -> None:
    """Serve a local web page to query a base and its adapters side by side, with the adapters' evidence."""
    from peft_recipes.inference import playground as page

    page.serve(adapters, port=port, base=base or None, trust_remote_code=trust_remote_code)


def _check_one_given(options: dict[str, Any]) -> None:
    """Raises RecipeError unless exactly one of these options has a value."""
    given = [name for name, value in options.items() if value]
    if len(given) != 1:
        problem = f"{' and '.join(given)} contradict each other" if given else "nothing was given to ask"
        raise RecipeError(f"Give one of {', '.join(options)}: {problem}.")
