"""Find, check and load the lm_eval tasks of a recipe's `benchmarks`: by name, from a file, or embedded.

A task's file may name local data (`dataset_path: json`, `dataset_kwargs: {data_files: ...}`): relative paths are
resolved beside the file, where lm_eval itself takes them from the current folder.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import io
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_recipes.embedded import benchmarks as embedded
from peft_recipes.embedded.cache import version_of
from peft_recipes.errors import RecipeError, nearest, unknown
from peft_recipes.recipe.benchmarks import benchmark_name, is_file
from peft_recipes.recipe.dataset import EMBEDDED

if TYPE_CHECKING:
    from lm_eval.api.task import Task

# The dataset builders of the library datasets that read files.
_FILE_BUILDERS = ("json", "csv", "parquet", "text", "arrow")


def check_installed() -> None:
    """Raise RecipeError, with the command that installs it, where lm_eval is missing."""
    if importlib.util.find_spec("lm_eval") is None:
        raise RecipeError(
            "benchmarks: lm_eval is not installed. Install it with `pip install 'peft_recipes[benchmarks]'`, or leave "
            "benchmarks out with --set benchmarks=[]."
        )


def check(benchmarks: Sequence[str]) -> None:
    """Check that every benchmark exists, without loading its data; nothing for none.

    Raises RecipeError with every problem: an unknown name (with the nearest one), a file that is missing or no task,
    missing data files, lm_eval not installed.
    """
    if not benchmarks:
        return
    check_installed()
    problems = []
    for benchmark in benchmarks:
        try:
            if is_file(benchmark):
                _read_task(Path(benchmark))
            elif benchmark.startswith(EMBEDDED) and benchmark_name(benchmark) not in embedded.NAMES:
                valid = [f"{EMBEDDED}{name}" for name in embedded.NAMES]
                problems.append(unknown("benchmark", benchmark, valid, "benchmarks"))
        except RecipeError as error:
            problems += error.problems
    named = [each for each in benchmarks if not is_file(each) and not each.startswith(EMBEDDED)]
    if named:
        valid = set(_known_tasks().all_tasks)
        problems += [
            f"Unknown benchmark '{name}'.{nearest(name, valid)} `lm-eval ls tasks` lists all; a file of your own ends "
            "in .yaml."
            for name in named
            if name not in valid
        ]
    if problems:
        raise RecipeError(*problems)


def load(benchmarks: Sequence[str]) -> dict[str, list[Task]]:
    """Load every benchmark's tasks with their data: name -> its task, or the tasks of a group.

    Raises RecipeError with every problem, also where data can't be loaded, such as from a Hub that can't be reached.
    """
    check(benchmarks)
    tasks, problems = {}, []
    for benchmark in benchmarks:
        try:
            tasks[benchmark_name(benchmark)] = _load(benchmark)
        except RecipeError as error:
            problems += error.problems
    if problems:
        raise RecipeError(*problems)
    return tasks


def fingerprint(benchmarks: Sequence[str]) -> str:
    """Hash what the benchmarks ask: lm_eval's version, and the content of local files; "" for none."""
    if not benchmarks:
        return ""
    check_installed()
    tasks = [task for benchmark in benchmarks if (task := _file_of(benchmark))]
    # A task may include others and name functions, all in files beside it.
    beside = {path for task in tasks for path in task.parent.iterdir() if path.suffix in (".yaml", ".yml", ".py")}
    files = [*sorted(beside), *(path for task in tasks for path in [task, *_data_files(task)])]
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.is_file()]
    return version_of(importlib.metadata.version("lm_eval"), digests)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence lm_eval's log. Its bars, and what it prints, go to stderr, and nowhere where that is no terminal."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    stderr = sys.stderr if sys.stderr.isatty() else io.StringIO()
    try:
        with contextlib.redirect_stdout(stderr), contextlib.redirect_stderr(stderr):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _file_of(benchmark: str) -> Path | None:
    """The file of a benchmark's task; None for one that lm_eval knows by name. An embedded one is made if needed."""
    if benchmark.startswith(EMBEDDED):
        return embedded.task_file(benchmark_name(benchmark))
    return Path(benchmark).expanduser() if is_file(benchmark) else None


def _load(benchmark: str) -> list[Task]:
    from lm_eval.tasks import TaskManager

    path = _file_of(benchmark)
    try:
        with quiet():
            if path is None:
                loaded = _known_tasks().load([benchmark])
            else:
                task = _read_task(path)
                if "group" in task:  # it names other tasks: lm_eval's own, or files beside it
                    with _in_folder(path.parent):  # where the data files of its members are
                        loaded = TaskManager(include_path=os.getcwd()).load([task["group"]])
                else:
                    loaded = TaskManager(include_defaults=False).load([task])
    except RecipeError:
        raise
    except Exception as error:  # of lm_eval, datasets, or a task's own functions
        what = " ".join(str(error).split())[:300]
        raise RecipeError(
            f"benchmarks: '{benchmark}' can't be loaded: {type(error).__name__}: {what} Without a network, name a "
            f"task with local data, or {EMBEDDED}{embedded.NAMES[0]}."
        ) from error
    tasks = list(loaded["tasks"].values())
    if unsafe := [task.task_name for task in tasks if getattr(task, "UNSAFE_CODE", False)]:
        raise RecipeError(f"benchmarks: '{unsafe[0]}' runs code that the model writes, which is not done here.")
    if images := [task.task_name for task in tasks if getattr(task, "MULTIMODAL", False)]:
        raise RecipeError(f"benchmarks: '{images[0]}' shows the model images or sound; a language model reads text.")
    if sum(len(task.eval_docs) for task in tasks) < 2:
        raise RecipeError(f"benchmarks: '{benchmark}' has one example: the interval of a difference needs two.")
    return tasks


@contextlib.contextmanager
def _in_folder(folder: Path) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@functools.cache
def _known_tasks() -> Any:
    """lm_eval's index of its own tasks: 14,683 names in version 0.4.13, which take 4 s to read (2 CPU cores)."""
    from lm_eval.tasks import TaskManager

    with quiet():
        return TaskManager()


def _read_task(path: Path) -> dict[str, Any]:
    """Read a task's file, with the paths of its data resolved. Raises RecipeError for a file that is no task's."""
    from lm_eval.tasks._yaml_loader import load_yaml

    path = path.expanduser()
    if not path.is_file():
        beside = [each.name for ending in ("yaml", "yml") for each in path.parent.glob(f"*.{ending}")]
        raise RecipeError(f"benchmarks: there is no file {path}.{nearest(path.name, beside)}")
    try:
        task = load_yaml(path)
    except Exception as error:  # of YAML, or of a function that the file names
        raise RecipeError(f"benchmarks: {path} can't be read: {' '.join(str(error).split())[:300]}") from error
    if not {"task", "group"} & set(task):
        raise RecipeError(f"benchmarks: {path} is no lm_eval task: it has no `task:` with its name.")
    kwargs = task.get("dataset_kwargs")
    if isinstance(kwargs, dict) and kwargs.get("data_files") and task.get("dataset_path") in _FILE_BUILDERS:
        task["dataset_kwargs"] = {**kwargs, "data_files": _resolved(kwargs["data_files"], path)}
    return task


def _data_files(path: Path) -> list[Path]:
    """The local data files of a task's file."""
    kwargs = _read_task(path).get("dataset_kwargs")
    files = kwargs.get("data_files") if isinstance(kwargs, dict) else None
    splits = files.values() if isinstance(files, dict) else [files]
    return [Path(file) for split in splits for file in (split if isinstance(split, list) else [split])
            if isinstance(file, str)]  # fmt: skip


def _resolved(files: Any, beside: Path) -> Any:
    """Return data_files (a path, a list, a mapping of splits) with paths beside the task's file, or in this folder."""
    if isinstance(files, dict):
        return {split: _resolved(each, beside) for split, each in files.items()}
    if isinstance(files, list):
        return [_resolved(each, beside) for each in files]
    if not isinstance(files, str):
        raise RecipeError(f"benchmarks: {beside}: data_files must be names of files, got {files!r}.")
    if "://" in files or any(mark in files for mark in "*?["):
        return files
    for found in (beside.parent / files, Path(files)):
        if found.is_file():
            return str(found.resolve())
    raise RecipeError(f"benchmarks: {beside} names the data file {files}, which is not beside it.")
