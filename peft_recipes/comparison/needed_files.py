"""The files outside of its folder that a run reads: local models, data, scoring functions, stand-ins."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from pathlib import Path

from peft_recipes.cluster.work import Needed
from peft_recipes.embedded import stand_ins
from peft_recipes.embedded.cache import cache_dir
from peft_recipes.recipe.dataset import EMBEDDED
from peft_recipes.recipe.recipe import Recipe


def needed_files(recipe: Recipe, with_data: bool) -> tuple[Needed, ...]:
    """Return what a machine without this one's disk lacks. with_data: also the datasets, which a run prepares itself.

    Hub ids are not among them: each node has its own cache of the Hub.
    """
    found = {needed.place: needed for name in _names(recipe, with_data) for needed in _located(name)}
    return tuple(found.values())


def _names(recipe: Recipe, with_data: bool) -> Iterator[str]:
    """Every value of a recipe that may name a file, a folder, a pattern or a stand-in."""
    yield f"model {recipe.model}" if recipe.model.startswith(EMBEDDED) else recipe.model
    for function in (recipe.score, recipe.reward):
        if function:
            source = function.rpartition(":")[0]
            yield source if source.endswith(".py") else _module_of_current_folder(source)
    yield from recipe.benchmarks
    if with_data:
        yield from (source.path for source in recipe.sources)
        yield from (str(other["path"]) for other in recipe.evaluate_also.values() if "path" in other)


def _module_of_current_folder(name: str) -> str:
    """The file or package, in the current folder, that a module's name stands for; one that is installed is nowhere."""
    top = name.partition(".")[0]
    return top if Path(top, "__init__.py").is_file() else f"{top}.py"


def _located(name: str) -> Iterator[Needed]:
    if name.startswith(f"model {EMBEDDED}"):
        # A stand-in that each node trained itself would differ from this machine's in its last bits.
        folder = stand_ins.model_folder(name.removeprefix(f"model {EMBEDDED}"))
        yield Needed(folder, str(folder.relative_to(cache_dir())), in_cache=True)
        return
    path = Path(name).expanduser()
    paths = [path] if path.exists() else [Path(each) for each in glob.glob(str(path), recursive=True)]
    for each in paths:
        if each.suffix in (".yaml", ".yml") and each.is_file():  # a benchmark's, with the files that it includes
            each = each.parent
        yield Needed(each.absolute(), str(each))
