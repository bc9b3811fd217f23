"""How runs are started: under `accelerate launch` with a configuration, or several at a time, one device each."""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_recipes.distributed.processes import JOBS
from peft_recipes.errors import RecipeError, unknown
from peft_recipes.recipe.arm import Arm

# As recipes are: in a wheel inside the package, in a checkout beside it.
_FOLDERS = tuple(place / "recipes" / "accelerate" for place in Path(__file__).parents[1:3])


@dataclass(frozen=True)
class Launch:
    """An Accelerate configuration. kind: "DDP", "FSDP2" or "ZeRO-2". processes: in all."""

    config: Path
    processes: int
    kind: str

    def command(self, module: str, *arguments: str) -> list[str]:
        """What starts `python -m module` in every process. The port is any free one."""
        given = ["--config_file", str(self.config), "--num_processes", str(self.processes), "--main_process_port", "0"]
        return [sys.executable, "-m", "accelerate.commands.launch", *given, "-m", module, *arguments]

    def shares(self, arm: Arm | None) -> str:
        """How a run of an arm is shared. A head learns on features, and the base not at all: neither is spread."""
        return "DDP" if arm is None or arm.method == "head" else self.kind


def launch_files() -> dict[str, Path]:
    """The configurations that are shipped: name -> file."""
    for folder in _FOLDERS:
        if found := {path.stem: path for path in sorted(folder.glob("*.yaml"))}:
            return found
    return {}


def read_launch(name_or_path: str | Path, processes: int | None = None) -> Launch:
    """The configuration of a shipped name ("ddp") or of a file, read by Accelerate's own parser.

    processes: instead of the file's own. Raises RecipeError: no such file, a key that Accelerate does not know, a way
    of sharing that adapters do not survive, several machines.
    """
    path, files = Path(name_or_path), launch_files()
    if str(name_or_path) in files:
        path = files[str(name_or_path)]
    elif not path.is_file():
        raise RecipeError(unknown("launch configuration", str(name_or_path), files)
                          + " Or a path to a file that `accelerate config` wrote.")  # fmt: skip
    given = _parsed(path)
    kind = _kind(given, path)
    if (given.num_machines or 1) > 1:
        raise RecipeError(f"{path.name}: it is for {given.num_machines} machines, and a comparison starts its runs on "
                          "this one. On several, start `accelerate launch -m peft_recipes train` on each.")  # fmt: skip
    count = processes if processes is not None else given.num_processes
    if not isinstance(count, int) or count < 2:
        raise RecipeError(f"{path.name}: a launch needs 2 processes or more, got {count}. Say how many with "
                          "--processes, or leave --launch out.")  # fmt: skip
    return Launch(path.absolute(), count, kind)


def installed(launch: Launch) -> Launch:
    """The launch, where what it needs is here. Raises RecipeError."""
    if launch.kind.startswith("ZeRO") and importlib.util.find_spec("deepspeed") is None:
        raise RecipeError(f"{launch.config.name}: DeepSpeed is not installed. It needs a GPU, and: pip install "
                          "deepspeed. Without it: --launch fsdp2.")  # fmt: skip
    return launch


def _parsed(path: Path) -> Any:
    import yaml
    from accelerate.commands.config.config_args import load_config_from_file

    try:
        return load_config_from_file(str(path))
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        said = " ".join(str(error).split()).split("), please try upgrading")[0]
        raise RecipeError(f"{path}: Accelerate can't read it: {said}") from error


def _kind(given: Any, path: Path) -> str:
    name = str(getattr(given.distributed_type, "value", given.distributed_type))
    if name == "MULTI_GPU":
        return "DDP"
    if name == "FSDP" and str(given.fsdp_config.get("fsdp_version", 1)) == "2":
        return "FSDP2"
    if name == "DEEPSPEED" and str(given.deepspeed_config.get("zero_stage", 2)) == "2":
        return "ZeRO-2"
    said = name + {"FSDP": " of version 1", "DEEPSPEED": " beyond ZeRO-2"}.get(name, "")
    raise RecipeError(
        f"{path.name}: distributed_type {said} is not supported. MULTI_GPU (DDP), FSDP with fsdp_version: 2 and "
        f"DEEPSPEED with zero_stage: 2 are; shipped: {', '.join(launch_files())}."
    )


def slots(jobs: int) -> list[dict[str, str]]:
    """What is different in the environment of each of so many runs at a time: a GPU, or a share of the threads.

    Raises RecipeError where there are fewer GPUs.
    """
    import torch

    if isinstance(jobs, bool) or not isinstance(jobs, int) or jobs < 1:
        raise RecipeError(f"--jobs {jobs}: expected a whole number of 1 or more.")
    if jobs == 1:
        return [{}]
    said = {JOBS: str(jobs)}
    if not torch.cuda.is_available():
        threads = max((os.cpu_count() or 1) // jobs, 1)
        return [{**said, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}] * jobs
    there = torch.cuda.device_count()
    if jobs > there:
        raise RecipeError(f"--jobs {jobs}: this machine has {there} GPU{'s' * (there > 1)}, and each run needs one "
                          f"of its own. At most: --jobs {there}.")  # fmt: skip
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(number) for number in range(there)]
    return [{**said, "CUDA_VISIBLE_DEVICES": name} for name in names[:jobs]]
