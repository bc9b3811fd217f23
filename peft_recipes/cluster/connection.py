"""The connection to a Ray cluster: made within seconds or refused in one line, without Ray's own messages."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import re
import signal
import socket
import threading
import warnings
from collections.abc import Iterator
from typing import Any

from peft_recipes.embedded.cache import say
from peft_recipes.errors import RecipeError

CLIENT = "ray://"
_SECONDS = 5  # to reach an address


def check_installed() -> None:
    """Raise RecipeError where Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise RecipeError("--on ray: Ray is not installed. Install it with: pip install 'peft_recipes[ray]'")


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[Any]:
    """Connect to the cluster at an address; yield the module `ray`, and disconnect at the end.

    address: "ray://host:10001" (from outside of the cluster), "host:6379" or "auto" (from one of its nodes); None:
    $RAY_ADDRESS, this user's cluster that this machine belongs to, or else a Ray of this machine alone, ended with the
    block. Where a cluster was found, and not named, the message says how to have another one.
    A program that has called `ray.init` itself keeps its connection. Raises RecipeError where nothing answers.
    """
    check_installed()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # without it, Ray warns of its next version
    import ray

    if ray.is_initialized():
        yield ray
        return
    given, address = address, _chosen(address)
    found = not given and address not in ("local", os.environ.get("RAY_ADDRESS"))
    how = ", which runs on this machine (--address local starts one for this command alone)" if found else ""
    with _quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with _kept_signal_handler():
                _init(ray, address)
            say(f"Ray: {'started on this machine' if address == 'local' else f'joined the cluster at {address}'}{how}.")
        except (ConnectionError, RuntimeError, ValueError, OSError, TimeoutError, AssertionError) as error:
            with contextlib.suppress(Exception):
                ray.shutdown()
            raise RecipeError(_refusal(address, error)) from None
    try:
        yield ray
    finally:
        with _quiet():
            ray.shutdown()


def _init(ray: Any, address: str) -> None:
    options: dict[str, Any] = {"logging_level": logging.CRITICAL, "log_to_driver": False}
    if address == "local":
        options["include_dashboard"] = False
    ray.init(address=address, **options)


@contextlib.contextmanager
def _kept_signal_handler() -> Iterator[None]:
    """Keep this program's handler of SIGTERM, which Ray replaces by its own in the main thread."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what Ray logs and prints of its nodes off the terminal; it stays in Ray's own log files."""
    from ray._private import worker

    logging.getLogger("ray").setLevel(logging.CRITICAL)
    if hasattr(worker, "_worker_logs_enabled"):
        worker._worker_logs_enabled = False
    yield


def _chosen(address: str | None) -> str:
    """The address to connect to, which answers; "local" starts a Ray of this machine alone.

    A connection is opened first: Ray itself would try for a minute, and print stack traces.
    """
    from ray._private.utils import read_ray_address

    address = address or os.environ.get("RAY_ADDRESS") or None
    if address == "local":
        return address
    if address in (None, "auto"):
        running = None
        with contextlib.suppress(Exception):
            running = read_ray_address()
        if running and _why_not_reachable(running) is None:
            if address is not None or not _of_another_user():
                return running
            say(f"Ray: the cluster at {running} on this machine is another user's (--address auto joins it).")
        if address is None:
            return "local"
        raise RecipeError(
            "--address auto: no Ray cluster runs on this machine. Start one (`ray start --head`), or name another: "
            "ray://HOST:10001."
        )
    if (reason := _why_not_reachable(address)) is not None:
        raise RecipeError(
            f"--address {address}: nothing answers there ({reason}). Is the head node running (`ray start --head`), "
            "and can its port be reached from here?"
        )
    return address


def _of_another_user() -> bool:
    """Whether the cluster that Ray finds on this machine was started by another user than root, by its file's owner."""
    with contextlib.suppress(Exception):  # of an older or a newer Ray
        from ray._private.utils import get_ray_address_file

        return os.stat(get_ray_address_file(None)).st_uid not in (0, os.getuid())
    return False


def _why_not_reachable(address: str) -> str | None:
    match = re.fullmatch(rf"(?:{CLIENT})?\[?([^\s/\[\]]+?)\]?:(\d+)/?", address)
    if match is None:
        raise RecipeError(f"--address {address}: expected ray://HOST:10001, HOST:6379, auto or local.")
    host, port = match[1], int(match[2])
    try:
        with socket.create_connection((host, port), timeout=_SECONDS):
            pass
    except (OSError, OverflowError) as error:
        return getattr(error, "strerror", None) or str(error)
    return None if os.environ.get("RAY_USE_TLS") == "1" or _speaks_grpc(f"{host}:{port}") else "it is no Ray"


def _speaks_grpc(target: str) -> bool:
    """Whether a server of gRPC answers, which Ray's head and its client server are."""
    import grpc

    with grpc.insecure_channel(target) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=_SECONDS)
            return True
        except grpc.FutureTimeoutError:
            return False


def _refusal(address: str, error: Exception) -> str:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return f"--address {address}: no connection to Ray: {reason}"
