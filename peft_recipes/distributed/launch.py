"""Runs under `accelerate launch`: its configurations, read and checked."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_recipes.errors import RecipeError, unknown
from peft_recipes.recipe.arm import Arm

# Like the recipes: inside the package in a wheel, next to it in a checkout.
_FOLDERS = tuple(parent / "recipes" / "accelerate" for parent in Path(__file__).parents[1:3])


@dataclass(frozen=True)
class Launch:
    """An Accelerate configuration. distributed_type: "DDP", "FSDP2" or "ZeRO-2". processes: the world size."""

    config: Path
    processes: int
    distributed_type: str

    def command(self, module: str, *arguments: str) -> list[str]:
        """The command that runs `python -m module` on every rank, on any free port."""
        options = ["--config_file", str(self.config), "--num_processes", str(self.processes)]
        launcher = [sys.executable, "-m", "accelerate.commands.launch", *options, "--main_process_port", "0"]
        return [*launcher, "-m", module, *arguments]

    def distributed_type_of(self, arm: Arm | None) -> str:
        """The distributed type of an arm's run: a linear probe and the untrained base (None) are never sharded."""
        return "DDP" if arm is None or arm.method == "head" else self.distributed_type


def launch_files() -> dict[str, Path]:
    """The shipped configurations: name -> file."""
    for folder in _FOLDERS:
        if files := {path.stem: path for path in sorted(folder.glob("*.yaml"))}:
            return files
    return {}


def read_launch(name_or_path: str | Path, processes: int | None = None) -> Launch:
    """Read a shipped configuration ("ddp") or a file, with Accelerate's own parser.

    processes: replaces the file's number. Raises RecipeError for a missing file, a key unknown to Accelerate, a
    distributed type that adapters do not support, several machines.
    """
    path, files = Path(name_or_path), launch_files()
    if str(name_or_path) in files:
        path = files[str(name_or_path)]
    elif not path.is_file():
        message = unknown("launch configuration", str(name_or_path), files)
        raise RecipeError(f"{message} Or a path to a file that `accelerate config` wrote.")
    config = _parsed(path)
    distributed_type = _distributed_type(config, path)
    if (config.num_machines or 1) > 1:
        raise RecipeError(
            f"{path.name}: it is for {config.num_machines} machines, and a comparison starts its runs on this one. On "
            "several, start `accelerate launch -m peft_recipes train` on each."
        )
    count = processes if processes is not None else config.num_processes
    if not isinstance(count, int) or count < 2:
        raise RecipeError(
            f"{path.name}: a launch needs 2 processes or more, got {count}. Set their number with --processes, or "
            "leave --launch out."
        )
    return Launch(path.absolute(), count, distributed_type)


def check_installed(launch: Launch) -> None:
    """Raise RecipeError where the launch needs DeepSpeed and it is not installed."""
    if launch.distributed_type.startswith("ZeRO") and importlib.util.find_spec("deepspeed") is None:
        raise RecipeError(
            f"{launch.config.name}: DeepSpeed is not installed. It needs a GPU, and: pip install deepspeed. Without "
            "it: --launch fsdp2."
        )


def _parsed(path: Path) -> Any:
    import yaml
    from accelerate.commands.config.config_args import load_config_from_file

    try:
        return load_config_from_file(str(path))
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        message = " ".join(str(error).split()).split("), please try upgrading")[0]
        raise RecipeError(f"{path}: Accelerate can't read it: {message}") from error


def _distributed_type(config: Any, path: Path) -> str:
    name = str(getattr(config.distributed_type, "value", config.distributed_type))
    if name == "MULTI_GPU":
        return "DDP"
    if name == "FSDP" and str(config.fsdp_config.get("fsdp_version", 1)) == "2":
        return "FSDP2"
    if name == "DEEPSPEED" and str(config.deepspeed_config.get("zero_stage", 2)) == "2":
        return "ZeRO-2"
    version = {"FSDP": " of version 1", "DEEPSPEED": " beyond ZeRO-2"}.get(name, "")
    raise RecipeError(
        f"{path.name}: distributed_type {name}{version} is not supported. MULTI_GPU (DDP), FSDP with fsdp_version: 2 "
        f"and DEEPSPEED with zero_stage: 2 are; shipped: {', '.join(launch_files())}."
    )
