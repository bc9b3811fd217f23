"""Which adapters to serve, and the names that clients give as `model`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from peft_recipes.adapters.saved import CONFIG
from peft_recipes.errors import RecipeError
from peft_recipes.models.bases import hub_errors
from peft_recipes.models.hub import offline_if_unreachable


@dataclass(frozen=True)
class Given:
    """An adapter as given: a folder or a repository of the Hub, and its name, if one was given (NAME=ADAPTER)."""

    place: str
    name: str | None = None

    @classmethod
    def parse(cls, text: str) -> Given:
        """Parse ADAPTER or NAME=ADAPTER. Raises RecipeError for an empty name or place."""
        name, equals, place = text.partition("=")
        if not equals or Path(text).exists():
            return cls(text)
        if not name.strip() or not place:
            raise RecipeError(f"'{text}': expected a folder, a repository id, or NAME=ADAPTER.")
        return cls(place, name.strip())


def served_names(given: Sequence[Given]) -> list[str]:
    """Name each adapter: as given, a run `recipe/arm` (with its seed if two would be equal), a folder by its own name,
    a repository by its id. Raises RecipeError for a name that two adapters have.
    """
    for longer in (False, True):
        names = [one.name or _name(one.place, longer) for one in given]
        if len(set(names)) == len(names):
            return names
    twice = next(name for name in names if names.count(name) > 1)
    raise RecipeError(f"Two adapters have the name '{twice}': name them apart, NAME=ADAPTER.")


def _name(place: str, longer: bool) -> str:
    if not Path(place).exists():
        return place
    path = Path(place).resolve()
    if (path / "recipe.yaml").is_file() and path.name.startswith("seed-"):
        return "/".join(path.parts[-3:] if longer else path.parts[-3:-1])
    return "/".join(path.parts[-2:] if longer else path.parts[-1:])


def folder_of(place: str) -> Path:
    """The adapter's folder; a repository of the Hub is downloaded. Raises RecipeError if there is neither."""
    path = Path(place).expanduser()
    if path.exists() or place.count("/") != 1 or place.startswith((".", "/", "~")):
        return path
    from huggingface_hub import snapshot_download

    offline_if_unreachable()
    with hub_errors("adapter", place):
        # No pickles, and no checkpoints of an interrupted run.
        return Path(snapshot_download(place, allow_patterns=[CONFIG, "*.safetensors", "*.json", "*.yaml", "*.jinja",
                                                             "*.txt", "*.model"], ignore_patterns=["*/*"]))  # fmt: skip
