"""Load test of `peft-recipes serve`: many clients at once, each answer compared with that of the request alone.

    python benchmarks/serve_load.py                        # SmolLM2-135M with its kept adapters: 50 clients, a minute
    python benchmarks/serve_load.py --tiny                 # small random models: whether it works

The server is a process of its own. Each distinct request (model, prompt, length, seed) is asked once alone; then the
clients ask at once, by OpenAI's client, half of them streamed, each the next request as soon as it has an answer: a
warm-up, then the measured time, in which the clients finish what they began. Memory is the server's resident memory
before the load, after the warm-up, and every few seconds to the end. Requests go to 127.0.0.1 only. Prints the result
as JSON; --keep writes benchmarks/serve_load.json.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness import result_parser, write_result

KEPT = Path(__file__).with_suffix(".json")
ROOT = Path(__file__).parents[1]
ADAPTERS = [ROOT / "adapters" / name / "lora" / "seed-0" for name in ("smollm2-alpaca", "smollm2-arithmetic")]
PROMPTS = [
    "What does numpy.cumsum do?",
    "Tom has 3 boxes with 12 pens each. He gives 7 pens away. How many are left?",
    "Name three primary colours.",
    "A train runs 60 km in one hour. How far does it run in three hours?",
    "Explain in one sentence what a dictionary is in Python.",
    "Ann had 20 coins and lost 4. Then she found 9. How many has she now?",
    "Write a short greeting for a colleague who returns from holiday, and ask how the mountains were this year.",
    "What is the difference between a list and a tuple?",
]
_EVERY = 2.0  # seconds between two readings of the memory


def main() -> None:
    given = _arguments()
    with tempfile.TemporaryDirectory(prefix="load-") as folder:
        adapters = _tiny_adapters(Path(folder)) if given.tiny else [str(path) for path in ADAPTERS]
        result = _measured(given, adapters)
    summary = {key: result[key] for key in ("requests", "errors", "different", "latency_seconds", "tokens_per_second",
                                            "server_resident_bytes")}  # fmt: skip
    write_result(given, KEPT, result, summary)
    print(_table(result), file=sys.stderr)
    if result["errors"] or result["different"]:
        raise SystemExit(1)


def _arguments() -> argparse.Namespace:
    parser = result_parser(__doc__)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--warmup", type=float, default=20.0, help="seconds of load before the measured time")
    parser.add_argument("--tokens", type=int, default=24, help="tokens of the longest answers")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--tiny", action="store_true", help="small random models")
    return parser.parse_args()


def _measured(given: argparse.Namespace, adapters: list[str]) -> dict[str, Any]:
    from peft_recipes.hardware.device import choose
    from peft_recipes.hardware.environment import environment

    with _server(adapters, given) as (process, url):
        models = _models(url)
        requests = _requests(models, given.tokens)
        print(f"{len(models)} models, {len(requests)} distinct requests, each alone", file=sys.stderr, flush=True)
        before = _resident(process.pid)
        alone_start = time.perf_counter()
        expected = asyncio.run(_each_alone(url, requests))
        alone_seconds = time.perf_counter() - alone_start
        load = _Load(url, requests, expected, process.pid)
        print(f"{given.clients} clients", file=sys.stderr, flush=True)
        asyncio.run(load.run(given.clients, given.warmup))
        load.clear()
        warm, machine = _resident(process.pid), _machine_load()
        seconds = asyncio.run(load.run(given.clients, given.seconds))
        ended = _end(process)
    tokens = sum(row["tokens"] for row in load.rows)
    return {
        "clients": given.clients,
        "seconds": seconds,
        "models": models,
        "distinct_requests": len(requests),
        "batch_size": given.batch_size,
        "requests": len(load.rows) + sum(load.errors.values()),
        "errors": sum(load.errors.values()),
        "errors_by_kind": dict(load.errors),
        "different": len(load.different),
        "first_differences": load.different[:5],
        "latency_seconds": _percentiles([row["seconds"] for row in load.rows]),
        "first_token_seconds": _percentiles([row["first"] for row in load.rows if row["first"]]),
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "tokens_per_second_alone": sum(answer["tokens"] for answer in expected) / alone_seconds,
        "server_resident_bytes": {
            "before": before,
            "warm": warm,
            "end": load.resident[-1],
            "largest": max(load.resident),
        },
        "server_resident_bytes_over_time": load.resident,
        "exit_code_after_sigterm": ended,
        "load_average_before": machine,
        "load_average_after": _machine_load(),
        "environment": environment(choose()),
    }


@contextlib.contextmanager
def _server(adapters: list[str], given: argparse.Namespace) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The server's process and its address."""
    words = [sys.executable, "-m", "peft_recipes", "serve", *adapters, "--port", "0", "--queue", str(given.clients),
             "--batch-size", str(given.batch_size)]  # fmt: skip
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    said = ""
    try:
        for line in process.stderr:
            said += line
            if " at http://127.0.0.1:" in line:
                yield process, line.split(" at ")[1].split()[0]
                return
        raise SystemExit(f"The server did not start:\n{said[-2000:]}")
    finally:
        process.kill()
        process.wait()


def _end(process: subprocess.Popen[str]) -> int:
    process.send_signal(signal.SIGTERM)
    return process.wait(60)


def _models(url: str) -> list[str]:
    from openai import OpenAI

    with OpenAI(base_url=url, api_key="none") as client:
        return [model.id for model in client.models.list().data]


def _requests(models: list[str], tokens: int) -> list[dict[str, Any]]:
    """Every model with every prompt, in unequal lengths, each third sampled with a seed of its own."""
    requests: list[dict[str, Any]] = []
    for prompt in PROMPTS:
        for model in models:
            number = len(requests)
            sampling = {"temperature": 1.0, "top_p": 0.9, "seed": number} if number % 3 == 2 else {"temperature": 0}
            messages = [{"role": "user", "content": prompt}]
            requests.append({"model": model, "messages": messages, "max_tokens": tokens - 5 * (number % 4), **sampling})
    return requests


async def _ask(client: Any, request: dict[str, Any], streamed: bool) -> dict[str, Any]:
    start, first, pieces, tokens, reason = time.perf_counter(), None, [], 0, None
    if streamed:
        stream = await client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True})
        async for chunk in stream:
            tokens = chunk.usage.completion_tokens if chunk.usage else tokens
            for choice in chunk.choices:
                reason = choice.finish_reason or reason
                if choice.delta.content:
                    first = first or time.perf_counter() - start
                    pieces.append(choice.delta.content)
    else:
        answer = await client.chat.completions.create(**request)
        tokens, reason = answer.usage.completion_tokens, answer.choices[0].finish_reason
        pieces.append(answer.choices[0].message.content)
    return {"text": "".join(pieces), "tokens": tokens, "reason": reason, "first": first,
            "seconds": time.perf_counter() - start}  # fmt: skip


def _client(url: str) -> Any:
    from openai import AsyncOpenAI

    return AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=300)


async def _each_alone(url: str, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    async with _client(url) as client:
        return [await _ask(client, request, streamed=False) for request in requests]


class _Load:
    """Clients that ask until the time is over, and what they saw."""

    def __init__(self, url: str, requests: list[dict[str, Any]], expected: list[dict[str, Any]], pid: int):
        self._url, self._requests, self._expected, self._pid = url, requests, expected, pid
        self.clear()

    def clear(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.errors: Counter[str] = Counter()
        self.different: list[dict[str, Any]] = []
        self.resident: list[int] = []

    async def run(self, clients: int, seconds: float) -> float:
        """Returns the seconds until the last answer."""
        start = time.perf_counter()
        async with _client(self._url) as client:
            watching = asyncio.ensure_future(self._watch())
            await asyncio.gather(*(self._ask_until(client, start + seconds, i) for i in range(clients)))
            watching.cancel()
        self.resident.append(_resident(self._pid))
        return time.perf_counter() - start

    async def _watch(self) -> None:
        while True:
            self.resident.append(_resident(self._pid))
            await asyncio.sleep(_EVERY)

    async def _ask_until(self, client: Any, end: float, seed: int) -> None:
        draw = random.Random(seed)
        while time.perf_counter() < end:
            number = draw.randrange(len(self._requests))
            try:
                answer = await _ask(client, self._requests[number], streamed=draw.random() < 0.5)
            except Exception as error:
                self.errors[f"{type(error).__name__}: {str(error)[:100]}"] += 1
                continue
            self.rows.append({key: answer[key] for key in ("tokens", "first", "seconds")})
            alone = self._expected[number]
            if any(answer[key] != alone[key] for key in ("text", "tokens", "reason")):
                self.different.append({"request": self._requests[number], "alone": alone["text"],
                                       "in_a_batch": answer["text"]})  # fmt: skip


def _percentiles(values: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {"p50": cuts[49], "p90": cuts[89], "p99": cuts[98], "largest": max(values)}


def _resident(pid: int) -> int:
    import psutil

    return psutil.Process(pid).memory_info().rss


def _machine_load() -> float:
    """The load average of the last minute, of all processes of the machine."""
    return os.getloadavg()[0]


def _table(result: dict[str, Any]) -> str:
    memory, times = result["server_resident_bytes"], result["latency_seconds"]
    names = ("requests", "errors", "different answers", "p50", "p99", "tokens/s", "memory when warm", "at the end")
    values = (
        f"{result['requests']}", f"{result['errors']}", f"{result['different']}", f"{times['p50']:.1f} s",
        f"{times['p99']:.1f} s", f"{result['tokens_per_second']:.0f}", f"{memory['warm'] / 1e6:,.0f} MB",
        f"{memory['end'] / 1e6:,.0f} MB",
    )  # fmt: skip
    return f"| {' | '.join(names)} |\n|{'---:|' * len(names)}\n| {' | '.join(values)} |"


def _tiny_adapters(folder: Path) -> list[str]:
    """Three random adapters on a small random Llama."""
    sys.path.append(str(ROOT / "tests" / "helpers"))
    import transformers
    from saved_adapters import lora, saved
    from small import tiny_config, tokenizer

    words = tokenizer(chat=True)
    transformers.set_seed(0)
    config = tiny_config("llama", len(words))
    config.initializer_range, config.tie_word_embeddings = 0.6, False
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "base")
    words.save_pretrained(folder / "base")
    return [str(saved(folder / "base", folder / f"adapter-{seed}", lora(), seed)) for seed in range(3)]


if __name__ == "__main__":
    main()
