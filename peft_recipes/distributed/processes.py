"""Several processes of one run, as `accelerate launch` starts them: who is who, and how one's failure ends them all.

What is trained goes through Accelerate's own group. What is here goes through a second one, over gloo: objects, waits
as long as the main process takes, and agreements that no process may miss.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from peft_recipes.errors import RecipeError, Terminated
from peft_recipes.models import hub

T = TypeVar("T")

_PATIENCE = datetime.timedelta(days=1)  # the main process evaluates, saves and checks while the others wait
_control: Any = None  # the group, once joined
_runs = 0  # how many runs this process has joined: failures are told under a run's number
_ENDED = ("closed by peer", "connection reset", "connection refused", "nccl", "socket", "broken pipe")


class Elsewhere(Exception):
    """Another process of the run has failed and says so; this one ends without a word."""


def count() -> int:
    """How many processes train together; 1 where none was launched."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def index() -> int:
    """This one's number; 0 is the main process."""
    return int(os.environ["RANK"]) if count() > 1 else 0


def is_main() -> bool:
    """Whether this process prints, writes and asks the Hub."""
    return index() == 0


def local_count() -> int:
    """How many of them run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", count())) if count() > 1 else 1


def is_local_main() -> bool:
    """Whether this is the first process of its machine."""
    return count() == 1 or os.environ.get("LOCAL_RANK", "0") == "0"


def kind() -> str | None:
    """How they share the work: "DDP", "FSDP2", "ZeRO-2"; None for one process."""
    if count() == 1:
        return None
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        return f"ZeRO-{os.environ.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', '2')}"
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        return f"FSDP{os.environ.get('FSDP_VERSION', '1')}"
    return "DDP"


def facts() -> dict[str, Any]:
    """What a run's environment says of its processes. jobs: how many runs shared the machine at a time."""
    return {
        "processes": count(),
        "machines": count() // local_count(),
        "distributed": kind(),
        "jobs": int(os.environ.get(JOBS, "1")),
    }


JOBS = "PEFT_RECIPES_JOBS"


def join(device: str) -> None:
    """Joins the run's group, and the one for what processes tell each other. Nothing where there is one process."""
    global _control, _runs
    if count() == 1:
        return
    if kind() in ("FSDP1", "ZeRO-3"):
        raise RecipeError(f"{kind()} is not supported: an adapter's weights come back in parts. Use FSDP2 instead: "
                          "recipes/accelerate/fsdp2.yaml.")  # fmt: skip
    import torch.distributed as dist
    from accelerate import PartialState

    if not dist.is_initialized():
        PartialState(cpu=device == "cpu")
    if _control is None:
        _control = dist.new_group(backend="gloo", timeout=_PATIENCE)
    _runs += 1


def joined() -> bool:
    """Whether this process can tell the others of its run."""
    return _control is not None


def gathered(value: T) -> list[T]:
    """Every process's value, in their order, in every process."""
    if count() == 1:
        return [value]
    import torch.distributed as dist

    found: list[Any] = [None] * count()
    dist.all_gather_object(found, value, group=_control)
    return found


def from_main(work: Callable[[], T]) -> T:
    """What the main process's `work` returns, in every process. Where it raises, the others raise Elsewhere."""
    if count() == 1:
        return work()
    import torch.distributed as dist

    made: list[Any] = [None, False]
    error: BaseException | None = None
    if is_main():
        try:
            made[0] = work()
        except BaseException as problem:
            error, made = problem, [None, True]
    dist.broadcast_object_list(made, src=0, group=_control)
    if error is not None:
        raise error
    if made[1]:
        raise Elsewhere
    return made[0]


def fetched(work: Callable[[], T]) -> T:
    """`work` done by the first process of each machine, then by the others, offline: from what that one fetched."""
    if count() == 1:
        return work()
    made: Any = None
    error: Exception | None = None
    if is_local_main():
        try:
            made = work()
        except Exception as problem:
            error = problem
    failed = any(gathered(error is not None))
    if error is not None:
        raise error
    if failed:
        raise Elsewhere
    if not is_local_main():
        hub.work_offline()
        made = work()
    return made


def largest(*numbers: int) -> list[int]:
    """The largest of each number over all processes: what one asks for, all do, at the same step."""
    if count() == 1:
        return list(numbers)
    import torch
    import torch.distributed as dist

    found = torch.tensor(numbers, dtype=torch.int64)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=_control)
    return found.tolist()


def wait() -> None:
    """Until every process is here."""
    if count() > 1:
        import torch.distributed as dist

        dist.barrier(group=_control)


def failed(error: BaseException) -> BaseException:
    """What to raise in this process for an error of the run: the error where it is the first, else Elsewhere.

    An interruption is everybody's, and stays what it is.
    """
    if count() == 1 or _control is None or isinstance(error, (Elsewhere, KeyboardInterrupt, Terminated)):
        return error
    told = {"process": index(), "type": type(error).__name__, "error": said(error)}
    first = json.loads(_store().compare_set(_key(), "", json.dumps(told)))
    return error if first["process"] == index() else Elsewhere()


def failure() -> dict[str, Any] | None:
    """What the first process that failed in this run has told: process, type and error; None while none has."""
    if count() == 1 or not _store().check([_key()]):
        return None
    return json.loads(_store().get(_key()))


def said(error: BaseException) -> str:
    """An error in words; of a peer that is gone, what that means."""
    text = str(error)
    if count() > 1 and isinstance(error, RuntimeError) and any(word in text.lower() for word in _ENDED):
        return ("Another process of this run has ended without a word: killed, which is what the system does when "
                f"memory runs out, or unreachable. ({' '.join(text.split())[:160]})")  # fmt: skip
    return text


@contextlib.contextmanager
def unsharded(wanted: bool) -> Iterator[None]:
    """Within it, where `wanted`, every process holds the whole model (DDP), whatever the launcher was told."""
    names = [name for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED") if name in os.environ]
    before = {name: os.environ.pop(name) for name in names} if wanted else {}
    try:
        yield
    finally:
        os.environ.update(before)


def environment_alone() -> dict[str, str]:
    """This process's environment without what the launcher put there."""
    ours = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "ROLE_RANK", "GROUP_RANK")
    starts = ("ACCELERATE_", "FSDP_", "TORCHELASTIC_", "LOCAL_WORLD", "ROLE_", "GROUP_")
    return {key: value for key, value in os.environ.items() if key not in ours and not key.startswith(starts)}


def leave_quietly() -> None:
    """Ends a launched process that is not the main one: the main one says what was wrong with what was given.

    Returns where the main process does not fail too, and so does not end this one: then there is something to say.
    """
    if count() > 1 and not is_main():
        import threading

        threading.Event().wait(30)


def _key() -> str:
    return f"peft_recipes/failure/{_runs}"


def _store() -> Any:
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()


def say(text: str) -> None:
    """A line on stderr, of the main process alone."""
    if is_main():
        print(text, file=sys.stderr, flush=True)
