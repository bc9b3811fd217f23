"""The commands that use saved adapters: predict, generate, merge, combine, playground."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from peft_recipes.cli.common import ADAPTERS, Json, app, friendly, say
from peft_recipes.errors import RecipeError

Adapter = Annotated[Path, typer.Argument(metavar="ADAPTER", help="The folder of a saved adapter.")]
Several = Annotated[list[Path], typer.Argument(metavar="ADAPTER ...", help="Folders of adapters of one base.")]
Base = Annotated[str, typer.Option("--base", metavar="MODEL", help="Instead of the base that it names.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Let the base's repository run its code here.")]
File = Annotated[Path | None, typer.Option("--file", metavar="FILE", help="txt (a text a line), csv, jsonl, parquet.")]
Column = Annotated[str | None, typer.Option("--column", metavar="NAME", help="The file's column of texts.")]


@app.command(rich_help_panel=ADAPTERS)
@friendly
def predict(
    adapter: Adapter,
    text: Annotated[list[str], typer.Option("--text", metavar="T", help="A text; may be repeated.")] = [],  # noqa: B006
    file: File = None,
    image: Annotated[list[Path], typer.Option("--image", metavar="PATH", help="An image or a folder of them.")] = [],  # noqa: B006
    column: Column = None,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="csv, jsonl or parquet: rows with the results.")
    ] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", metavar="N", help="Begin with; halved where memory runs out.")
    ] = 32,
    base: Base = "",
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Classify texts or images with a saved adapter: label and probability."""
    _quiet()
    import datasets

    from peft_recipes.cli.output.answers import show_predictions
    from peft_recipes.inference import inputs, predict

    _one_of({"--text": text, "--file": file, "--image": image})
    if output is not None:
        inputs.check_writable(output)
    made = predict.Predictor(adapter, base or None, batch_size=batch_size, trust_remote_code=trust_remote_code)
    if file is not None:
        names, found = predict.predict_file(made, file, output, column)
    else:
        files = inputs.image_files(image)
        names = text or [str(path) for path in files]
        found = made.texts(text) if text else made.images(files)
        if output is not None:
            rows = datasets.Dataset.from_dict({"text" if text else "image": names})
            predict.write_results(rows, found, output)
    if as_json:
        key = "image" if image else "text"
        _print([{key: name, **result} for name, result in zip(names, found, strict=True)])
    elif output is None:
        show_predictions(names, found)
    if output is not None:
        say(f"{len(found)} rows in {output}")


@app.command(rich_help_panel=ADAPTERS)
@friendly
def generate(
    adapters: Several,
    prompt: Annotated[list[str], typer.Option("--prompt", metavar="TEXT", help="A prompt; may be repeated.")] = [],  # noqa: B006
    file: File = None,
    chat: Annotated[bool, typer.Option("--chat", help="A session in the terminal; /help tells its commands.")] = False,
    column: Column = None,
    merged: Annotated[bool, typer.Option("--merged", help="Each adapter merged into its base, too.")] = False,
    raw: Annotated[bool, typer.Option("--raw", help="The prompt as it is, without a template.")] = False,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", metavar="N")] = 128,
    do_sample: Annotated[
        bool | None, typer.Option("--do-sample/--greedy", help="Greedy, unless a sampling option is given.")
    ] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", metavar="F")] = None,
    top_p: Annotated[float | None, typer.Option("--top-p", metavar="F")] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", metavar="N")] = None,
    repetition_penalty: Annotated[float | None, typer.Option("--repetition-penalty", metavar="F")] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of sampling; every form draws from it.")] = 0,
    base: Base = "",
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Ask a base and its adapters side by side, with the tokens/s of each; or chat with them."""
    _quiet()
    from peft_recipes.adapters.open import open_adapters
    from peft_recipes.cli.output.answers import show_answers
    from peft_recipes.cli.output.progress import counted, line_reader
    from peft_recipes.inference import generate, inputs

    _one_of({"--prompt": prompt, "--file": file, "--chat": chat})
    if chat and as_json:
        raise RecipeError("--chat and --json contradict each other; choose one.")
    sampling = generate.Sampling(max_new_tokens, do_sample, temperature, top_p, top_k, repetition_penalty, seed)
    if file is not None:
        rows, found = inputs.read_texts(file, column, ["prompt", "instruction"])
        prompt = list(rows[found])
    opened = open_adapters(adapters, base or None, trust_remote_code=trust_remote_code)
    if chat:
        from peft_recipes.inference.chat import Chat

        Chat(opened, sampling, merged).run(line_reader())
        return
    with counted("answers") as on_answer:
        answers = generate.generate(opened, prompt, sampling, merged=merged, raw=raw, on_answer=on_answer)
    if as_json:
        _print(answers)
    else:
        show_answers(answers)


@app.command(rich_help_panel=ADAPTERS)
@friendly
def merge(
    adapter: Adapter,
    output: Annotated[Path, typer.Option("--output", metavar="DIR", help="Where the merged model goes.")],
    base: Base = "",
    tolerance: Annotated[
        float, typer.Option("--tolerance", metavar="F", help="Of the logits, as a share of their size.")
    ] = 1e-3,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Merge an adapter into its base, verified on real inputs: a plain transformers folder."""
    _quiet()
    from peft_recipes.adapters import merge
    from peft_recipes.cli.output.answers import show_merge

    made = _refusable(merge.merge_adapter, adapter, output, base or None, tolerance=tolerance,
                      trust_remote_code=trust_remote_code)  # fmt: skip
    if as_json:
        _print(made)
    else:
        show_merge(made, output)


@app.command(rich_help_panel=ADAPTERS)
@friendly
def combine(
    adapters: Several,
    output: Annotated[Path, typer.Option("--output", metavar="DIR", help="Where the combination goes.")],
    weights: Annotated[str, typer.Option("--weights", metavar="0.5,0.5", help="One an adapter; default: equal.")] = "",
    method: Annotated[
        str,
        typer.Option(
            "--method",
            help="linear, cat, svd, ties, dare_linear, dare_ties, magnitude_prune, or one of the last four with _svd.",
        ),
    ] = "svd",
    density: Annotated[
        float | None, typer.Option("--density", metavar="F", help="What ties, dare and prune keep (0.5).")
    ] = None,
    rank: Annotated[int | None, typer.Option("--rank", metavar="N", help="Of what svd leaves.")] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of what dare drops.")] = 0,
    base: Base = "",
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Combine adapters of one base into one, evaluated on each one's own test set before it is saved."""
    _quiet()
    from peft_recipes.adapters import combine
    from peft_recipes.cli.output.answers import show_combination

    made = _refusable(combine.combine_adapters, adapters, output, _numbers(weights), method, density=density,
                      rank=rank, seed=seed, base=base or None, trust_remote_code=trust_remote_code)  # fmt: skip
    if as_json:
        _print(made)
    else:
        show_combination(made, output)


@app.command(rich_help_panel=ADAPTERS)
@friendly
def playground(
    adapters: Several,
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="On this machine alone (127.0.0.1).")] = 7860,
    base: Base = "",
    trust_remote_code: Trust = False,
) -> None:
    """A local web page to ask a base and its adapters side by side, their evidence beside them."""
    _quiet()
    from peft_recipes.inference import playground as page

    page.serve(adapters, port=port, base=base or None, trust_remote_code=trust_remote_code)


def _quiet() -> None:
    from peft_recipes.distributed.quiet import quiet_libraries

    quiet_libraries()


def _print(made: Any) -> None:
    print(json.dumps(made, indent=1, ensure_ascii=False))


def _one_of(given: dict[str, Any]) -> None:
    """Raises RecipeError unless exactly one of these options was given."""
    there = [name for name, value in given.items() if value]
    if len(there) != 1:
        said = f"{' and '.join(there)} contradict each other" if there else "nothing was given to ask"
        raise RecipeError(f"Give one of {', '.join(given)}: {said}.")


def _numbers(listed: str) -> list[float] | None:
    try:
        return [float(number) for number in listed.split(",")] if listed.strip() else None
    except ValueError:
        raise RecipeError(f"--weights {listed}: expected numbers with commas between them, as in 0.5,0.5.") from None


def _refusable(make: Any, *args: Any, **options: Any) -> Any:
    """What was made; where it does not answer as it must, why, and exit code 1."""
    from peft_recipes.adapters.merge import VerificationError

    try:
        return make(*args, **options)
    except VerificationError as error:
        say(f"Refused: {error}")
        raise typer.Exit(1) from None
