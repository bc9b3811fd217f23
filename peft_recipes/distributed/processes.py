"""The ranks of a run under `accelerate launch`: collectives over Python objects, and one failure that ends all ranks.

Training uses Accelerate's process group. The functions here use a second one, over gloo, which can carry any object
and waits up to a day while rank 0 evaluates, saves and verifies. Ranks that wait for each other end earlier: see
watchdog.py.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from peft_recipes.distributed.watchdog import Watchdog, hang_of, timeout
from peft_recipes.errors import RecipeError, Terminated
from peft_recipes.models import hub

T = TypeVar("T")

JOBS = "PEFT_RECIPES_JOBS"  # environment variable: how many runs share this machine at a time
DEVICE_JOBS = "PEFT_RECIPES_DEVICE_JOBS"  # how many of them share a CUDA GPU

_TIMEOUT = datetime.timedelta(days=1)
_group: Any = None  # the gloo group, once joined
_watchdog: Watchdog | None = None
_runs = 0  # runs this process has joined; failures are stored under a run's number
_LOST_PEER = ("closed by peer", "connection reset", "connection refused", "nccl", "socket", "broken pipe")


class OtherRankFailed(Exception):
    """Another rank of the run has failed and reports why; this rank ends without a message."""


def count() -> int:
    """The world size; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def rank() -> int:
    """The rank of this process; 0 without a launcher."""
    return int(os.environ["RANK"]) if count() > 1 else 0


def is_rank_zero() -> bool:
    """Whether this process prints, writes and accesses the Hub."""
    return rank() == 0


def local_count() -> int:
    """How many ranks run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", count())) if count() > 1 else 1


def distributed_type() -> str | None:
    """How the ranks share the work: "DDP", "FSDP2", "ZeRO-2"; None for one process."""
    if count() == 1:
        return None
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        return f"ZeRO-{os.environ.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', '2')}"
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        return f"FSDP{os.environ.get('FSDP_VERSION', '1')}"
    return "DDP"


def facts() -> dict[str, Any]:
    """The entries of run.json's environment about ranks.

    jobs: how many runs shared the machine at a time; device_jobs: how many of them shared a CUDA GPU.
    """
    return {
        "processes": count(),
        "machines": count() // local_count(),
        "distributed": distributed_type(),
        "jobs": int(os.environ.get(JOBS, "1")),
        "device_jobs": int(os.environ.get(DEVICE_JOBS, "1")),
    }


def join(device: str, on_hang: Callable[[], None] = lambda: None) -> None:
    """Join Accelerate's process group and the gloo group. Does nothing for one process.

    on_hang: called on rank 0 when all ranks wait for each other, before the run fails.
    """
    global _group, _runs, _watchdog
    if count() == 1:
        return
    timeout()  # a mistake in it is reported before anything starts
    if distributed_type() in ("FSDP1", "ZeRO-3"):
        raise RecipeError(f"{distributed_type()} is not supported: an adapter's weights come back in parts. Use FSDP2 "
                          "instead: recipes/accelerate/fsdp2.yaml.")  # fmt: skip
    import torch.distributed as dist
    from accelerate import PartialState

    if not dist.is_initialized():
        PartialState(cpu=device == "cpu")
    if _group is None:
        _group = dist.new_group(backend="gloo", timeout=_TIMEOUT)
    _runs += 1
    if _watchdog is None:
        _watchdog = Watchdog(_store().clone(), rank(), count(), _key)  # a connection of its own: calls on one wait
        _watchdog.start()
    _watchdog.on_hang = on_hang


def joined() -> bool:
    """Whether this process can reach the other ranks of its run."""
    return _group is not None


def all_gather(value: T) -> list[T]:
    """The values of all ranks, in rank order, on every rank."""
    if count() == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * count()
    dist.all_gather_object(values, value, group=_group)
    return values


def from_rank_zero(work: Callable[[], T]) -> T:
    """Run `work` on rank 0 and broadcast its result. Where it raises, the other ranks raise OtherRankFailed."""
    if count() == 1:
        return work()
    import torch.distributed as dist

    message: list[Any] = [None, False]  # the result, and whether rank 0 failed
    error: BaseException | None = None
    if is_rank_zero():
        try:
            message[0] = work()
        except BaseException as raised:
            error, message = raised, [None, True]
    dist.broadcast_object_list(message, src=0, group=_group)
    if error is not None:
        raise error
    if message[1]:
        raise OtherRankFailed
    return message[0]


def local_rank_zero_first(work: Callable[[], T]) -> T:
    """Run `work` on the first rank of each machine, which may download; then, offline, on the other ranks."""
    if count() == 1:
        return work()
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    result: Any = None
    error: Exception | None = None
    if first:
        try:
            result = work()
        except Exception as raised:
            error = raised
    failed = any(all_gather(error is not None))
    if error is not None:
        raise error
    if failed:
        raise OtherRankFailed
    if not first:
        hub.work_offline()
        result = work()
    return result


def all_reduce_max(*numbers: int) -> list[int]:
    """The maximum of each number over all ranks, so that what one rank requests, all do at the same step."""
    if count() == 1:
        return list(numbers)
    import torch
    import torch.distributed as dist

    maxima = torch.tensor(numbers, dtype=torch.int64)
    dist.all_reduce(maxima, dist.ReduceOp.MAX, group=_group)
    return maxima.tolist()


def barrier() -> None:
    """Wait until every rank is here."""
    if count() > 1:
        import torch.distributed as dist

        dist.barrier(group=_group)


def report_failure(error: BaseException) -> BaseException:
    """Record an error of the run for all ranks; return what to raise on this one.

    That is the error itself on the first rank that fails and OtherRankFailed on the others; on rank 0 RanksHang, where
    a hang was why its connections closed. An interruption reaches every rank by itself and is returned as it is.
    """
    if count() == 1 or _group is None or isinstance(error, (OtherRankFailed, KeyboardInterrupt, Terminated)):
        return error
    failure = {"process": rank(), "type": type(error).__name__, "error": error_message(error)}
    first = json.loads(_store().compare_set(_key(), "", json.dumps(failure)))
    return (hang_of(first) or error) if first["process"] == rank() else OtherRankFailed()


def first_failure() -> dict[str, Any] | None:
    """The process, type and error of the first rank that failed in this run; None while none has."""
    if count() == 1 or not _store().check([_key()]):
        return None
    return json.loads(_store().get(_key()))


def error_message(error: BaseException) -> str:
    """An error's message; for a lost connection, that another rank was killed or is unreachable."""
    text = str(error)
    if count() > 1 and isinstance(error, RuntimeError) and any(words in text.lower() for words in _LOST_PEER):
        return ("Another process of this run has ended without a message: killed, which is what the system does when "
                f"memory runs out, or unreachable. ({' '.join(text.split())[:160]})")  # fmt: skip
    return text


@contextlib.contextmanager
def unsharded(wanted: bool) -> Iterator[None]:
    """Within it, where `wanted`, every rank holds the complete model (DDP), whatever the launch configuration."""
    names = [name for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED") if name in os.environ]
    before = {name: os.environ.pop(name) for name in names} if wanted else {}
    try:
        yield
    finally:
        os.environ.update(before)


def environment_without_launcher() -> dict[str, str]:
    """This process's environment without the launcher's variables, for a subprocess that trains alone."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "ROLE_RANK", "GROUP_RANK")
    prefixes = ("ACCELERATE_", "FSDP_", "TORCHELASTIC_", "LOCAL_WORLD", "ROLE_", "GROUP_")
    return {key: value for key, value in os.environ.items() if key not in names and not key.startswith(prefixes)}


def wait_for_rank_zero_to_fail() -> None:
    """On the other ranks, wait 30 s: rank 0 reports the same mistake and its exit ends this process.

    Returns where rank 0 did not fail, so that this rank reports the mistake itself.
    """
    if not is_rank_zero():
        import threading

        threading.Event().wait(30)


def _key() -> str:
    return f"peft_recipes/failure/{_runs}"


def _store() -> Any:
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()
