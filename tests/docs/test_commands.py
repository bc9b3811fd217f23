"""Every command and every Python block of README.md, docs/ and SKILL.md works as it is written.

They run in a workspace of small things (workspace.py), page by page, in the order of the page. `peft-recipes` commands
run in this process, through typer's CliRunner. What is changed first is in CHANGED, what is not run in NOT_RUN.
"""

from __future__ import annotations

import gc
import re
import shlex
import shutil
import time
from pathlib import Path

import pytest
import workspace
import yaml
from blocks import PAGES, ROOT, Block, blocks
from typer.testing import CliRunner

import peft_recipes.catalog.recipes
import peft_recipes.comparison.adapter_checks
import peft_recipes.comparison.compare
import peft_recipes.inference.playground
import peft_recipes.serving.server
from peft_recipes import Recipe
from peft_recipes.cli.app import app

# What a command is turned into before it runs: pattern -> replacement, and why.
CHANGED = [
    (r"--budget \S+", "--budget 2h", "it counts from the start of the process, which is the tests'"),
    (r"--max-seeds \S+", "--max-seeds 3", "a single look"),
    (r"--learning-rates \S+", "--learning-rates 1e-3,1e-2", "two learning rates instead of six"),
    (r"^peft-recipes scan (?!.*--learning)", "peft-recipes scan --learning-rates 1e-3,1e-2 ", "two instead of five"),
    (r"^peft-recipes scan (?!.*--arms)", "peft-recipes scan --arms lora ", "one arm instead of all"),
    (r"--ranks \S+", "--ranks 2,4", "two ranks instead of four"),
    (r"--seeds \S+", "--seeds 0", "one seed"),
    (r"--arms full,lora,dora,ia3", "--arms full,lora,ia3", "DoRA is trained by another command"),
    (r"^peft-recipes push (?!.*--dry-run)", "peft-recipes push --dry-run ", "no Hub here; tests/publishing has one"),
    (r"^peft-recipes train (?!.*--resume)", "peft-recipes train --overwrite ", "the workspace has the run already"),
    (r"^peft-recipes compare (\S+) --embedded --launch (\S+) --processes (\d+)",
     r"peft-recipes plan \1 --embedded --config \2 --processes 4", "a launch starts as many processes"),
    (r"--processes 8", "--processes 4", "batches here have four examples"),
    (r"--benchmarks \S+", "--benchmarks my_task.yaml", "lm_eval's own are on the Hub, the embedded one takes a minute"),
    (r"^peft-recipes export \S+ --to gguf", "peft-recipes export byte-pairs/adapter --to gguf",
     "the models here have word-level tokenizers, which llama.cpp does not read"),
    (r" --on ray( --address \S+)?", "", "tests/comparison/test_ray.py has a cluster"),
    (r" --share-base", "", "tests/comparison/test_shared_runs.py trains together"),
    (r"report_to=\[.*\]", "report_to=tensorboard", "the others' stores lie elsewhere: tests/training/test_trackers.py"),
    (r"--jobs (4|auto)( --measure)?", "--jobs 1", "runs are trained in this process"),
    (r"^peft-recipes (stop|add) \S+ .*", r"peft-recipes \1 --help", "no comparison runs: tests/comparison has some"),
]  # fmt: skip
# Commands that are checked but not run: their first words, and why. `make` targets and files must exist.
NOT_RUN = {
    "pip install": "it would change the environment of the tests; `make install` does it in CI",
    ". .venv/bin/activate": "the tests run in an environment already",
    "make": "`make test` runs these tests; the target must exist",
    "ray": "it starts the nodes of a cluster, on several machines: tests/comparison/test_ray.py has one",
    **dict.fromkeys(("tensorboard --logdir", "mlflow ui", "trackio show"), "it serves a page until it is stopped"),
    "wandb sync": "it needs an account",
    "accelerate launch": "it starts several processes: tests/distributed; its files and its command must exist",
    "uv ": "tests/recipe/test_script_header.py runs it without a network; its files must exist",
    "hf jobs uv run": "it rents a machine; tests/docs/test_launchers.py",
    "sbatch": "needs Slurm; tests/docs/test_launchers.py runs the scripts",
    "sky jobs launch": "it rents a machine; tests/docs/test_launchers.py",
    "kubectl": "needs Kubernetes; tests/docs/test_launchers.py",
    "mkdir": "a folder",
}
# Blocks that are no list of commands: what one begins with, and why it is not run.
SCRIPTS = {
    "#!/bin/bash\n#SBATCH": "needs Slurm and four machines",
    "hosts=(": "needs ssh and four machines",
}
LINES_OF_INPUT = {"--chat": "say good\n/base\n/quit\n"}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, tiny, own_caches):
    """The workspace, with the runs that pages expect."""
    root = tmp_path_factory.mktemp("prepared")
    gc.freeze()  # every run ends with a collection: 0.5 s each with the libraries' objects in it
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        workspace.make(root, tiny)
    gc.freeze()
    yield root
    gc.unfreeze()


@pytest.fixture
def here(prepared, tmp_path, monkeypatch):
    """A copy of the workspace for one page, as the current folder."""
    folder = tmp_path / "work"
    shutil.copytree(prepared, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(peft_recipes.catalog.recipes, "recipe_files", lambda: workspace.recipe_files(prepared))
    compare = peft_recipes.comparison.compare
    monkeypatch.setattr(compare, "executor_of", workspace.ThisProcess)
    checks = peft_recipes.comparison.adapter_checks
    monkeypatch.setattr(checks, "check_in_fresh_process", lambda runs, trust_remote_code: None)
    monkeypatch.setattr(peft_recipes.inference.playground, "serve", lambda *args, **options: None)
    server, listen = peft_recipes.serving.server, peft_recipes.serving.server.open_socket
    monkeypatch.setattr(server.Server, "run", lambda server, on_ready: on_ready())
    monkeypatch.setattr(server, "open_socket", lambda host, port: listen(host, 0))
    return folder


def runnable(page: Path) -> list[Block]:
    return [block for block in blocks(page) if block.language in ("bash", "python", "yaml")]


@pytest.mark.parametrize(
    "page", [page for page in PAGES if runnable(page)], ids=lambda page: page.relative_to(ROOT).as_posix()
)
def test_the_commands_of_a_page_work(page, here):
    space: dict = {"__name__": "page"}
    for block in runnable(page):
        start = time.monotonic()
        if block.language == "python":
            exec(compile(block.text, block.name, "exec"), space)
        elif block.language == "yaml":
            _yaml(block, here)
        elif not block.text.startswith(tuple(SCRIPTS)):
            for words in block.commands():
                _command(words, block)
        print(f"{block.name}: {time.monotonic() - start:.1f} s")


def _command(words: list[str], block: Block) -> None:
    line = shlex.join(words)
    if words[0] != "peft-recipes":
        _check(words, line, block)
        return
    for pattern, replacement, _ in CHANGED:
        line = re.sub(pattern, replacement, line)
    said = next((text for flag, text in LINES_OF_INPUT.items() if flag in words), None)
    shown = CliRunner().invoke(app, shlex.split(line)[1:], input=said)
    if shown.exception is not None and not isinstance(shown.exception, SystemExit):
        raise AssertionError(f"{block.name}: {line}") from shown.exception
    assert shown.exit_code == 0, f"{block.name}: {line}\n{shown.output[-1500:]}{shown.stderr[-1500:]}"


def _check(words: list[str], line: str, block: Block) -> None:
    """What can be said of a command that is not run."""
    assert line.startswith(tuple(NOT_RUN)), f"{block.name}: neither run nor listed: {line}"
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line
    files = [word for word in words if word.endswith((".py", ".yaml", ".sbatch"))]
    assert all((ROOT / file).is_file() for file in files), line
    if words[0] == "accelerate":
        assert files, line
        if "peft_recipes" in words:
            command, *given = words[words.index("peft_recipes") + 1 :]
            offered = CliRunner().invoke(app, [command, "--help"], terminal_width=200).output
            assert all(flag in offered for flag in given if flag.startswith("--")), line


def _yaml(block: Block, folder: Path) -> None:
    """A recipe is saved under its name, for the commands that follow; a part of one goes into a recipe."""
    given = yaml.safe_load(block.text)
    if "name" in given:
        small = {"training": {"max_steps": 3, "use_cpu": True, "bf16": False}}
        recipe = Recipe.from_dict(given).with_changes(small)
        recipe.to_yaml(folder / f"{recipe.name}.yaml")
    else:
        Recipe.from_yaml(folder / "named" / "smollm2-alpaca.yaml").with_changes(given)


def test_every_language_of_a_block_is_known():
    for page in PAGES:
        for block in blocks(page):
            assert block.language in ("bash", "python", "yaml", "text"), block.name


def test_every_change_is_used():
    lines = [shlex.join(words) for page in PAGES for block in blocks(page) if block.language == "bash"
             and not block.text.startswith(tuple(SCRIPTS)) for words in block.commands()]  # fmt: skip
    assert len([line for line in lines if line.startswith("peft-recipes ")]) >= 50
    for pattern, _, why in CHANGED:
        assert any(re.search(pattern, line) for line in lines), why
    for words in NOT_RUN:
        assert any(line.startswith(words) for line in lines), words
