"""Write the measured figures into README.md, the pages of docs/ and the READMEs of adapters/ and benchmarks/.

`make readme` runs it. Nothing is computed here: the figures come from adapters/*/comparison.json and from the files
that the scripts in benchmarks/ wrote. A block stands between `<!-- NAME: ... -->` and `<!-- /NAME -->`; a `results`
block names the comparison.json that it shows. tests/docs/test_figures.py checks that pages and files agree.
"""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

from peft_recipes.reporting import formats
from peft_recipes.reporting.markdown import escape_inline, table_markdown
from peft_recipes.reporting.rows import DECIDES
from peft_recipes.reporting.sentences import forgetting, headline_arm, verdict_sentence

HERE = Path(__file__).parent
BENCHMARKS = HERE.parent / "benchmarks"
_NAMES = "results|speed|trust|cost|load|cluster|gpu|turns|shared|scans"
_BLOCK = re.compile(rf"(<!-- ({_NAMES}):([^\n]*?)-->\n).*?(<!-- /\2 -->)", re.DOTALL)
_COMPARISON = re.compile(r"adapters/([\w.-]+)/comparison\.json")
_LINK = re.compile(r"(\]\(|src=\")((?:adapters|benchmarks)/)")
_MODELS = {"smollm2-135m": "SmolLM2-135M", "gpt2": "GPT-2 small"}


def results(comparison: dict[str, Any]) -> str:
    """The results block of README.md: verdict, plot, table and forgetting."""
    folder = f"adapters/{comparison['recipe']}"
    lines = [
        f"> {escape_inline(verdict_sentence(comparison, headline_arm(comparison)))}",
        "",
        f'<img src="{folder}/plots/parameters.png" alt="Quality against trained parameters" width="520">',
        "",
        table_markdown(comparison, most=DECIDES),
        "",
        *(f"- {escape_inline(line)}" for line in forgetting(comparison)),
        "",
        f"Written from [{folder}/comparison.json]({folder}/comparison.json), which `make kept` made; the whole report "
        f"is [comparison.md]({folder}/comparison.md).",
        "",
    ]
    return "\n".join(lines)


def speed(measured: list[dict[str, Any]]) -> str:
    """The speed block of README.md: three rows for each benchmark file."""
    lines = ["| LoRA r=16 | tokens/s | peak memory |", "|:---|---:|---:|"]
    for one in measured:
        model = _MODELS[one.get("model", "smollm2-135m")]
        setting = f"{one['task']}, {model}, {one['data']}, batch {one['batch']}"
        for arm, title in (("trl-default", "trl, its defaults"), ("trl-best", "trl, its best flags here"),
                           ("peft-recipes", "peft_recipes")):  # fmt: skip
            row = one["arms"][arm]
            memory = f"{row['peak_memory_bytes'] / 1e9:.1f} GB"
            busy = ", on a busy machine" if arm in one.get("disturbed", {}) else ""
            lines.append(f"| {setting}: {title}{busy} | {row['tokens_per_second']:.0f} | {memory} |")
    machine = measured[0]["environment"]
    gap = max(one["largest_loss_difference"] for one in measured)
    share = formats.listed([f"{one['fraction_of_limit']:.0%}" for one in measured if "fraction_of_limit" in one])
    lines += [
        "",
        f"The same losses at every step (largest difference {gap:.0e}). Of SFT {share} of what the needed matrix "
        f"products alone would allow. {machine['threads']} threads of an {machine['device_name']}, "
        f"{machine['precision']}; written from [benchmarks/sft_throughput](benchmarks/sft_throughput) and "
        "[benchmarks/dpo_throughput](benchmarks/dpo_throughput) by `make readme`.",
        "",
    ]
    return "\n".join(lines)


def trust() -> str:
    """The trust block of README.md: injected faults and malformed inputs, and how many were handled."""
    faults, inputs = _benchmark("fault_injection"), _benchmark("malformed_inputs")
    killed = {stage: count for stage, count in faults["killed_in"].items() if stage != "done already"}
    moments = ", ".join(f"{stage} {count}" for stage, count in sorted(killed.items(), key=lambda item: -item[1]))
    kinds = ", ".join(f"{count} {kind}s" for kind, count in inputs["tried"].items())
    scripts = ["fault_injection", "malformed_inputs", *(["soak"] if (BENCHMARKS / "soak.json").is_file() else [])]
    commands = formats.listed([f"`python benchmarks/{script}.py`" for script in scripts])
    lines = [
        "| test | tried | passed |",
        "|:---|---:|---:|",
        f"| runs killed by SIGKILL (at: {moments}) and resumed: equal to undisturbed ones | {faults['tried']} "
        f"| {faults['held']} |",
        f"| malformed inputs ({kinds}): the right exit code, one message, nothing written | {inputs['total']} "
        f"| {inputs['answered']} |",
        *([_soaked(_benchmark("soak"))] if "soak" in scripts else []),
        "",
        f"Written by `make readme` from the results of {commands}.",
        "",
    ]
    return "\n".join(lines)


def cost() -> str:
    """The cost block of benchmarks/README.md: growth of time and memory."""
    growth = _benchmark("cost_growth")
    lines = ["| batch | length | step | tokens/s | memory at its peak | estimated |", "|---:|---:|---:|---:|---:|---:|"]
    for row in growth["steps"]:
        lines.append(
            f"| {row['batch']} | {row['length']} | {formats.seconds(row['seconds'])} "
            f"| {formats.rate(row['tokens_per_second'])} | {formats.human_bytes(row['peak_memory_bytes'])} "
            f"| {formats.human_bytes(row['estimated_bytes'])} |"
        )
    lines += ["", "| rows of data | tokenised in | memory for them |", "|---:|---:|---:|"]
    for row in growth["rows"]:
        size = formats.human_bytes(row["memory_bytes"])
        lines.append(f"| {row['rows']:,} | {formats.seconds(row['seconds'])} | {size} |")
    machine = growth["environment"]
    lines += ["", f"{machine['threads']} threads of an {machine['device_name']}, {machine['precision']}.", ""]
    return "\n".join(lines)


def load() -> str:
    """The load block of docs/guides/serve.md: clients at once, and what they saw."""
    tested = _benchmark("serve_load")
    times, first, memory = (tested[name] for name in ("latency_seconds", "first_token_seconds",
                                                           "server_resident_bytes"))  # fmt: skip
    names = ("clients", "requests", "errors", "answers unlike alone", "p50", "p99", "first token, p50", "tokens/s",
             "tokens/s, one at a time", "memory when warm", "at the end")  # fmt: skip
    values = (
        tested["clients"], tested["requests"], tested["errors"], tested["different"], formats.seconds(times["p50"]),
        formats.seconds(times["p99"]), formats.seconds(first["p50"]), formats.rate(tested["tokens_per_second"]),
        formats.rate(tested["tokens_per_second_alone"]), formats.human_bytes(memory["warm"]),
        formats.human_bytes(memory["end"]),
    )  # fmt: skip
    machine = tested["environment"]
    threads = f"{machine['threads']} thread{'' if machine['threads'] == 1 else 's'}"
    lines = [f"| {' | '.join(names)} |", "|---:" * len(names) + "|", f"| {' | '.join(map(str, values))} |", ""]
    lines.append(
        f"{', '.join(tested['models'])} for {tested['seconds']:.0f} s, {tested['batch_size']} answers at a time; "
        f"{threads} of an {machine['device_name']}, {machine['precision']}, load average "
        f"{tested['load_average_before']:.1f} of the machine before.\n"
    )
    return "\n".join(lines)


def cluster() -> str:
    """The cluster block of docs/guides/cluster.md: what Ray adds to each run, and the driver's memory."""
    measured = _benchmark("ray_overhead")
    lines = ["| runs of nothing | together | each | memory of the driver |", "|---:|---:|---:|---:|"]
    for row in measured["runs_of_nothing"]:
        size = formats.human_bytes(row["driver_bytes"])
        lines.append(f"| {row['runs']:,} | {row['seconds']:.2f} s | {1e3 * row['seconds_per_run']:.1f} ms | {size} |")
    if compared := measured["comparison"]:
        seconds, equal = compared["seconds"], "the same figures" if compared["equal_figures"] else "OTHER FIGURES"
        lines += ["", f"A comparison of {compared['runs']} runs of a tiny model on the two nodes took "
                  f"{seconds['ray']:.0f} s, with `--jobs 2` {seconds['local']:.0f} s, and gave {equal}."]  # fmt: skip
    machine, load = measured["environment"], measured["load_before"]
    lines += ["", f"{measured['cpus']} cores of an {machine['device_name']}, Ray {machine['ray']}, load {load:g} "
              "before the start; written from [benchmarks/ray_overhead.json](benchmarks/ray_overhead.json) by "
              "`make readme`.", ""]  # fmt: skip
    return "\n".join(lines)


def turns() -> str:
    """The turns block of docs/guides/seeds-and-verdicts.md: how soon a comparison shows something."""
    measured = _benchmark("live_comparison")
    ways = [measured["in_turns"], measured["one_after_another"]]
    names = {"every_arm_validated_seconds": "every arm validated", "right_top_seconds": "the best three, in order",
             "total_seconds": "the end"}  # fmt: skip
    lines = [f"| seconds to | `--chunks {measured['chunks']}` | one after another |", "|:---|---:|---:|"]
    lines += [f"| {name} | {ways[0][key]:.0f} | {ways[1][key]:.0f} |" for key, name in names.items()]
    kept, fresh = (measured["turn"][which] for which in ("kept_process", "fresh_process"))
    equal = "The figures of both are equal." if measured["equal_figures"] else "THE FIGURES DIFFER."
    cost = [each["median_seconds_beyond_steps"] for each in (kept, fresh)]
    lines += ["", f"{len(measured['arms'])} arms of {measured['recipe']} on embedded data, {len(measured['seeds'])} "
              f"seeds. {equal} Beyond its steps a turn costs {cost[0]:.2f} s, in a process of its own {cost[1]:.1f} s. "
              f"{_measured_on(measured, 'live_comparison')}", ""]  # fmt: skip
    return "\n".join(lines)


def shared() -> str:
    """The shared block of docs/guides/shared-base.md: adapters trained together, and one after another."""
    measured = _benchmark("shared_base")
    names = (
        "runs",
        "a step of all, together",
        "one after another",
        "all of it, together",
        "one after another",
        "memory",
    )
    lines = [f"| {' | '.join(names)} |", "|---:" * len(names) + "|"]
    for row in measured["rows"]:
        seconds = (row[key] for key in ("step_seconds", "step_seconds_alone"))
        whole = (row[key] for key in ("process_seconds", "process_seconds_alone"))
        cells = [*(f"{value:.2f} s" for value in seconds), *(f"{value:.0f} s" for value in whole)]
        lines.append(f"| {row['runs']} | {' | '.join(cells)} | {formats.human_bytes(row['peak_memory_bytes'])} |")
    gap = measured["largest_loss_difference"]
    losses = f"losses differ by at most {gap:.0e}" if gap else "equal losses"
    about = f"SmolLM2-135M, LoRA, batch {measured['batch']}, {measured['steps']} steps; {losses}."
    lines += ["", f"{about} {_measured_on(measured, 'shared_base')}", ""]
    return "\n".join(lines)


def scans() -> str:
    """The scans block of docs/guides/learning-rate-and-rank.md: a scan in one process, and in one for each core."""
    measured = _benchmark("scan_jobs")
    rows = [
        f"{name} {row['one_process']['seconds']:.0f} and {row['process_a_core']['seconds']:.0f} s"
        for name, row in measured["models"].items()
    ]
    return (f"A scan of two arms, in one process and in {measured['jobs']} of one thread each: {'; '.join(rows)}. "
            f"{_measured_on(measured, 'scan_jobs')}\n")  # fmt: skip


def _measured_on(measured: dict[str, Any], name: str) -> str:
    machine, plural = measured["environment"], "" if measured["environment"]["threads"] == 1 else "s"
    return (f"{machine['threads']} thread{plural} of an {machine['device_name']}, {machine['precision']}; written from "
            f"[benchmarks/{name}.json](benchmarks/{name}.json) by `make readme`.")  # fmt: skip


def gpu() -> str:
    """The gpu block of benchmarks/README.md: the kept results of benchmarks/on_gpu.py."""
    spec = importlib.util.spec_from_file_location("gpu_page", BENCHMARKS / "gpu" / "page.py")
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    return page.block()


def _benchmark(name: str) -> dict[str, Any]:
    return json.loads((BENCHMARKS / f"{name}.json").read_text(encoding="utf-8"))


def _soaked(soak: dict[str, Any]) -> str:
    kills = soak["kills"]
    return (
        f"| a comparison of {soak['runs']} short runs, killed {sum(kills.values())} times (a worker "
        f"{kills['worker']}, itself {kills['comparison']}), called {soak['calls']} times: every run there once, "
        f"no files left behind, its memory x {soak['parent_memory_growth']:g} | 1 | {int(soak['held'])} |"
    )


def benchmarks() -> list[dict[str, Any]]:
    """The kept throughput benchmarks."""
    return [
        {"task": task, **json.loads(path.read_text(encoding="utf-8"))}
        for task in ("SFT", "DPO")
        for path in sorted((BENCHMARKS / f"{task.lower()}_throughput").glob("*-batch*-cpu.json"))
        if "compiled" not in path.name
    ]


def pages() -> list[Path]:
    """The files with blocks: README.md, benchmarks/README.md and every page of docs/."""
    root = HERE.parent
    return [root / "README.md", BENCHMARKS / "README.md", *sorted((root / "docs").rglob("*.md"))]


def filled(path: Path) -> str:
    """The text of a page with its blocks written again; links start from the page's own folder."""
    up = "../" * (len(path.relative_to(HERE.parent).parts) - 1)

    def block(match: re.Match[str]) -> str:
        return match[1] + _LINK.sub(rf"\1{up}\2", _block(match[2], match[3])) + match[4]

    return _BLOCK.sub(block, path.read_text(encoding="utf-8"))


def _block(name: str, source: str) -> str:
    if name == "results":
        recipe = _COMPARISON.search(source)[1]
        return results(json.loads((HERE / recipe / "comparison.json").read_text(encoding="utf-8")))
    blocks = {"trust": trust, "cost": cost, "load": load, "cluster": cluster, "gpu": gpu}
    blocks |= {"turns": turns, "shared": shared, "scans": scans}
    return blocks[name]() if name in blocks else speed(benchmarks())


def index(comparisons: list[dict[str, Any]]) -> str:
    """The text of adapters/README.md: a section for each kept comparison."""
    lines = [
        "# Kept adapters",
        "",
        "Small adapters with the evidence of their comparison, for `peft-recipes check` and `peft-recipes reproduce`. "
        "Written by `make readme`.",
        "",
    ]
    for comparison in comparisons:
        name = comparison["recipe"]
        lines += [
            f"## [{name}]({name}/comparison.md)",
            "",
            f"{escape_inline(comparison['title'])}. Base `{comparison['model']}`, data `{comparison['dataset']}`, "
            f"seeds {', '.join(map(str, comparison['seeds']))}.",
            "",
            table_markdown(comparison, most=DECIDES),
            "",
            *_folders(HERE / name),
            "",
        ]
    return "\n".join(lines)


def _folders(comparison: Path) -> list[str]:
    """A line for the first adapter of each arm whose weights are kept, from its run.json."""
    lines = []
    for path in sorted(comparison.glob("*/seed-0/run.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        if (path.parent / "adapter_config.json").is_file():
            folder, metric = path.parent.relative_to(HERE).as_posix(), run["metric"]
            quality = formats.quality(run["metrics"]["test"][metric], metric)
            size = formats.human_bytes(run["checkpoint_bytes"])
            lines.append(f"- [{folder}]({folder}): {size}, test {formats.metric_title(metric).lower()} {quality}")
    return lines


def kept() -> list[dict[str, Any]]:
    """The comparisons kept in this folder."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(HERE.glob("*/comparison.json"))]


def main() -> None:
    for path in pages():
        path.write_text(filled(path), encoding="utf-8")
    (HERE / "README.md").write_text(index(kept()), encoding="utf-8")


if __name__ == "__main__":
    main()
