"""The nodes of a cluster as the driver uses them: tasks, the object store and messages. All calls of Ray are here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

from peft_recipes.cluster import node
from peft_recipes.cluster.connection import connected
from peft_recipes.cluster.node import Driver, Sent
from peft_recipes.cluster.work import Work
from peft_recipes.errors import RecipeError, Terminated, causes

_CLEAN_SECONDS = 20

Event = tuple[int, str, Any]  # the number of a start, the kind of the event, its content


class Lost(Exception):
    """A process, or what it sent, was lost with its node. out_of_memory: Ray ended it, as the node's memory ran out."""

    def __init__(self, reason: str, out_of_memory: bool = False):
        super().__init__(reason)
        self.out_of_memory = out_of_memory


class Nodes(Protocol):
    """What the pool (pool.py) needs of a cluster; tests have one without Ray."""

    def start(self, work: Work, number: int, sent: Sent | None, driver: Driver) -> Any: ...
    def wait(self, tasks: Sequence[Any], seconds: float) -> list[Any]: ...
    def result(self, task: Any) -> dict[str, Any]: ...
    def events(self) -> list[Event]: ...
    def put(self, pieces: Iterable[bytes]) -> list[Any]: ...
    def fetch(self, pieces: Sequence[Any]) -> Iterator[bytes]: ...
    def cancel(self, task: Any, force: bool) -> None: ...
    def clean(self, content: str) -> None: ...


class _Mailbox:
    """An actor that keeps the processes' events until the driver takes them."""

    def __init__(self) -> None:
        self._events: list[Event] = []

    def put(self, number: int, kind: str, content: Any) -> None:
        self._events.append((number, kind, content))

    def take(self) -> list[Event]:
        taken, self._events = self._events, []
        return taken


def _on_node(work: Work, number: int, sent: Sent | None, driver: Driver, mailbox: Any) -> dict[str, Any]:
    """The Ray task: `node.run` with Ray's object store and the mailbox."""
    import ray

    def tell(kind: str, content: Any) -> None:
        arrived = mailbox.put.remote(number, kind, content)
        if kind == "checkpoint":  # perhaps the last one, of a task that is being cancelled
            ray.get(arrived)

    if not work.module:
        return node.run(work, sent, driver, tell, ray.put, ray.get, 1)
    here = ray.get_runtime_context().get_node_id()
    totals = next((each["Resources"] for each in ray.nodes() if each["NodeID"] == here), {})
    return node.run(work, sent, driver, tell, ray.put, ray.get, _at_a_time(totals, work))


def _at_a_time(totals: dict[str, float], work: Work) -> int:
    """How many processes like this one fit on a node of these resources."""
    asked = {"CPU": work.cpus, "GPU": work.gpus, "memory": work.memory}
    return max(int(min((totals.get(name, 0) // amount for name, amount in asked.items() if amount), default=1)), 1)


class RayNodes:
    """The nodes of a Ray cluster. Use it in a `with` block, which connects and disconnects."""

    def __init__(self, address: str | None):
        self._address, self._stack = address, contextlib.ExitStack()

    def __enter__(self) -> RayNodes:
        self.ray = self._stack.enter_context(connected(self._address))
        self.totals = [each["Resources"] for each in self.ray.nodes() if each["Alive"]]
        on_head = {"node:__internal_head__": 0.001}  # where the cluster ends with it
        resources = on_head if any("node:__internal_head__" in each for each in self.totals) else None
        self._mailbox = self.ray.remote(_Mailbox).options(num_cpus=0, resources=resources).remote()
        # Not Ray's "SPREAD", which was seen to queue a task at a busy node while another one was idle.
        self._task = self.ray.remote(max_retries=0)(_on_node)
        return self

    def __exit__(self, *_: Any) -> None:
        with contextlib.suppress(Exception):
            self.ray.kill(self._mailbox)
        self._stack.close()

    @property
    def memory(self) -> int:
        """Bytes of memory that the largest node offers."""
        return int(max((each.get("memory", 0) for each in self.totals), default=0))

    def resources(self, threads: int, gpu: bool) -> dict[str, int]:
        """`cpus` and `gpus` of a process, as `Work` takes them.

        gpu: whether to use one where the cluster has any. At most the CPUs that the largest node has for each GPU.
        """
        having = [each for each in self.totals if each.get("GPU", 0) >= 1] if gpu else []
        most = max((each.get("CPU", 0) // (each["GPU"] if having else 1) for each in having or self.totals), default=1)
        return {"cpus": max(min(threads, int(most)), 1), "gpus": int(bool(having))}

    def capacity(self, cpus: int, gpus: int) -> int:
        """How many such processes all nodes together run at a time; at least 1."""
        work = {"CPU": cpus, "GPU": gpus}
        return max(sum(int(min(each.get(k, 0) // v for k, v in work.items() if v)) for each in self.totals), 1)

    def start(self, work: Work, number: int, sent: Sent | None, driver: Driver) -> Any:
        memory = {"memory": work.memory} if work.memory else {}
        task = self._task.options(num_cpus=work.cpus, num_gpus=work.gpus, name=work.name, **memory)
        return task.remote(work, number, sent, driver, self._mailbox)

    def wait(self, tasks: Sequence[Any], seconds: float) -> list[Any]:
        """Return the tasks that have ended, after at most so many seconds."""
        with _signals_as_raised():
            ready, _ = self.ray.wait(list(tasks), num_returns=1, timeout=seconds)
            if ready and len(tasks) > 1:
                ready, _ = self.ray.wait(list(tasks), num_returns=len(tasks), timeout=0)
            return ready

    def result(self, task: Any) -> dict[str, Any]:
        with self._lost():
            return self.ray.get(task)

    def events(self) -> list[Event]:
        """Return the events since the last call; none while the mailbox's node can't be reached."""
        with contextlib.suppress(self.ray.exceptions.RayError), _signals_as_raised():
            return self.ray.get(self._mailbox.take.remote(), timeout=10)
        return []

    def put(self, pieces: Iterable[bytes]) -> list[Any]:
        return [self.ray.put(piece) for piece in pieces]

    def fetch(self, pieces: Sequence[Any]) -> Iterator[bytes]:
        for piece in pieces:
            with self._lost():
                yield self.ray.get(piece)

    def cancel(self, task: Any, force: bool) -> None:
        with contextlib.suppress(Exception):  # it has ended, or its node has
            self.ray.cancel(task, force=force, recursive=False)  # its message with the last checkpoint is a task too

    def clean(self, content: str) -> None:
        """Delete on every node what a driver has sent there."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        task = self.ray.remote(max_retries=0, num_cpus=0)(node.clean)
        with contextlib.suppress(self.ray.exceptions.RayError):  # a node that has died meanwhile
            alive = [each["NodeID"] for each in self.ray.nodes() if each["Alive"]]
            places = [NodeAffinitySchedulingStrategy(each, soft=False) for each in alive]
            self.ray.wait(
                [task.options(scheduling_strategy=place).remote(content) for place in places],
                num_returns=len(places), timeout=_CLEAN_SECONDS,
            )  # fmt: skip

    @contextlib.contextmanager
    def _lost(self) -> Iterator[None]:
        """Raise Lost for what Ray raises where a process, an object or a node is gone."""
        errors = self.ray.exceptions
        try:
            with _signals_as_raised():
                yield
        except errors.TaskCancelledError:
            raise Lost("it was cancelled") from None
        except errors.OutOfMemoryError:
            raise Lost("its node ran out of memory, and Ray ended it", out_of_memory=True) from None
        except errors.RayTaskError as error:
            cause = error.cause or error
            if isinstance(cause, errors.TaskCancelledError):
                raise Lost("it was cancelled") from None
            if isinstance(cause, ModuleNotFoundError) or "No module named 'peft_recipes" in str(error):
                raise RecipeError(_NOT_INSTALLED) from None
            raise Lost(f"on its node: {type(cause).__name__}: {' '.join(str(cause).split())[:200]}") from None
        except errors.RuntimeEnvSetupError as error:
            raise RecipeError(f"Ray can't prepare its nodes: {' '.join(str(error).split())[:300]}") from None
        except errors.RayError as error:
            raise Lost(f"its node died ({type(error).__name__})") from None


@contextlib.contextmanager
def _signals_as_raised() -> Iterator[None]:
    """Raise what a signal handler has raised within a call of Ray, which turns it into a SystemError."""
    try:
        yield
    except SystemError as error:
        for cause in causes(error):
            if isinstance(cause, (KeyboardInterrupt, Terminated)):
                raise cause from None
        raise


_NOT_INSTALLED = "A node of the cluster has no peft_recipes. Install the same version there as on this machine."
