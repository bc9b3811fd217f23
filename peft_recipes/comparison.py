"""Many runs of one recipe, each in a fresh process; finished ones are not repeated; collected into one honest table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_recipes.arm_names import choose_arms
from peft_recipes.data.stored import stored
from peft_recipes.distributed.batches import check_spreadable, shared_out
from peft_recipes.distributed.launching import Launch, installed, read_launch, slots
from peft_recipes.errors import RecipeError, unknown
from peft_recipes.interruption import terminable
from peft_recipes.recipe import Recipe
from peft_recipes.runs import (
    BASE,
    Run,
    check_output,
    locked,
    make_folder,
    read_comparison_file,
    read_run,
    run_folder,
    signature,
    with_precision,
    write_json,
)
from peft_recipes.workers import Job, Order, Progress, check_in_fresh_process, run_in_fresh_processes, teller

if TYPE_CHECKING:
    import pandas

    from peft_recipes.tasks.base import Prepared


class Comparison:
    """A finished comparison: `data` is comparison.json, `folder` where it lies."""

    def __init__(self, data: dict[str, Any], folder: Path):
        self.data, self.folder = data, folder

    @property
    def failed(self) -> list[str]:
        """The arms of which at least one run did not finish."""
        base = [BASE] if self.data["base"]["status"] != "ok" else []
        return base + [name for name, arm in self.data["arms"].items() if arm["failures"]]

    def verdict(self, arm: str) -> str:
        """What giving up full fine-tuning for this arm cost, in one sentence with its interval."""
        if arm not in self.data["arms"]:
            raise RecipeError(unknown("arm", arm, self.data["arms"], f"the comparison of {self.data['recipe']}"))
        from peft_recipes.reporting.words import verdict_sentence

        return verdict_sentence(self.data, arm)

    def table(self) -> str:
        """The table as Markdown."""
        from peft_recipes.reporting.markdown import table_markdown

        return table_markdown(self.data)

    def to_pandas(self) -> pandas.DataFrame:
        """One row an arm (and the base), plain numbers."""
        import pandas

        from peft_recipes.reporting.rows import records

        return pandas.DataFrame(records(self.data))

    def show(self) -> None:
        """The report inside a notebook; in a terminal its table."""
        try:
            from IPython import get_ipython
            from IPython.display import HTML, display
        except ImportError:
            get_ipython = None
        if get_ipython is not None and get_ipython() is not None:
            display(HTML(self._repr_html_()))
            return
        from rich.console import Console

        from peft_recipes.reporting import render_terminal

        render_terminal(self.data, Console())

    def _repr_html_(self) -> str:
        """The report in a frame of its own, so that its style is not the notebook's."""
        from html import escape

        from peft_recipes.reporting.html import render_html

        page = escape(render_html(self.data), quote=True)
        return f'<iframe srcdoc="{page}" style="width: 100%; height: 40em; border: 0"></iframe>'

    def __repr__(self) -> str:
        return f"Comparison({self.data['recipe']}: {', '.join(self.data['arms'])}; seeds {self.data['seeds']})"


def compare(
    recipe: Recipe,
    arms: Iterable[str] | None = None,
    seeds: Sequence[int] = (0,),
    *,
    output: str | Path = "adapters",
    overwrite: bool = False,
    wait: bool = False,
    launch: str | Path | None = None,
    processes: int | None = None,
    jobs: int = 1,
    asked: dict[str, Any] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Comparison:
    """Trains every arm with every seed, each in a fresh process, and writes comparison.json, .md and .html.

    arms: names (default: all of the recipe's), as `arm_names.choose_arms` takes them: also the table's, also "all". The
    untrained base is evaluated as well. Runs that are finished and whose recipe, data and code are the same are kept,
    unfinished ones go on from their last checkpoint; overwrite trains them anew. wait: until no other process writes
    the folder. launch: the name or file of an Accelerate configuration under which each run is trained, by so many
    `processes` (default: the file's). jobs: how many runs at a time, each on a GPU of its own, or sharing the CPU,
    which the notes then say. asked: how the command line was called (recipe, embedded, changes, arms, output), so that
    what the report suggests is that call with a change. A run that fails is a row of the table, not the end. Raises
    RecipeError, before anything is written, for whatever is wrong with what was given; KeyboardInterrupt or Terminated
    after SIGINT or SIGTERM, when the run under way has written a checkpoint.
    """
    seeds = _chosen_seeds(seeds)
    chosen = choose_arms(recipe, arms)
    recipe, names = chosen.recipe, chosen.names
    launched, places = _chosen_launch(recipe, names, launch, processes, jobs), slots(jobs)
    output = Path(output)
    check_output(output)
    folder = output / recipe.name
    recipe, prepared, estimates = preflight(recipe, names, None if overwrite else folder, launched, jobs)
    make_folder(folder)
    todo: list[Job] = [(BASE, seeds[0]), *((arm, seed) for seed in seeds for arm in names)]
    with terminable(), locked(folder, wait=wait), stored(prepared, folder / ".data") as data:
        recipe.to_yaml(folder / "recipe.yaml")
        orders = []
        for number, job in enumerate(todo, 1):
            tell = teller(on_progress, job, number, len(todo))
            if _finished(output, recipe, job, prepared.fingerprint, launched) and not overwrite:
                tell("kept")
            else:
                orders.append(
                    Order(output, recipe, job, folder / "recipe.yaml", tell, data, anew=overwrite, launch=launched)
                )
        run_in_fresh_processes(orders, places)
        _check_adapters(output, recipe, todo)
        known = {"estimates": estimates, "asked": asked, "notes": chosen.notes}
        return collect(recipe, names, seeds, output, known)


def _chosen_launch(
    recipe: Recipe, names: Sequence[str], launch: str | Path | None, processes: int | None, jobs: int
) -> Launch | None:
    if launch is None:
        if processes is not None:
            raise RecipeError(f"--processes {processes}: say how they share the work, too: --launch ddp, or fsdp2.")
        return None
    if jobs != 1:
        raise RecipeError("--launch and --jobs contradict each other: one run on all devices, or one device a run.")
    chosen = installed(read_launch(launch, processes))
    shared_out(recipe.training, chosen.processes)
    for arm in names:
        check_spreadable(recipe, arm, chosen.shares(recipe.arms[arm]))
    return chosen


def _check_adapters(output: Path, recipe: Recipe, jobs: list[Job]) -> None:
    """Every adapter of a finished run is loaded once in another process than the one that trained it."""
    if {"reload", "fresh-process"} & set(recipe.skip_checks):
        return
    adapters = [job for job in jobs if job[0] != BASE and recipe.arms[job[0]].peft is not None]
    runs = [_run_or_failure(output, recipe, job) for job in adapters]
    unchecked = [run for run in runs if run.ok and "fresh-process" not in run.data["checks"]]
    check_in_fresh_process(unchecked, recipe.trust_remote_code)


def collect(
    recipe: Recipe,
    arms: Sequence[str],
    seeds: Sequence[int],
    output: Path,
    known: dict[str, Any] | None = None,
) -> Comparison:
    """The comparison of the runs that lie below `output`, written to their recipe's folder, and the runs' cards.

    known: what the runs do not: "estimates", each arm's memory by the plan, "asked", how the comparison was called, and
    "notes" beside the runs' own.
    """
    from peft_recipes.cards import write_cards
    from peft_recipes.evidence import comparison_data
    from peft_recipes.reporting import write_reports

    folder = output / recipe.name
    runs = {(arm, seed): _run_or_failure(output, recipe, (arm, seed)) for arm in arms for seed in seeds}
    base = _run_or_failure(output, recipe, (BASE, seeds[0]))
    data = comparison_data(recipe, runs, base, list(arms), list(seeds))
    known = known or {}
    data["asked"] = known.get("asked")
    data["notes"] += known.get("notes") or []
    for arm, estimate in (known.get("estimates") or {}).items():
        data["arms"][arm]["estimated_memory"] = estimate
    write_json(folder / "comparison.json", data)
    write_reports(data, folder)
    write_cards(data, folder)
    return Comparison(data, folder)


def read_comparison(folder: str | Path) -> Comparison:
    """The comparison of a folder. Raises RecipeError where there is none or it can't be read."""
    return Comparison(read_comparison_file(folder), Path(folder))


def preflight(
    recipe: Recipe, arms: Sequence[str], folder: Path | None = None, launch: Launch | None = None, jobs: int = 1
) -> tuple[Recipe, Prepared, dict[str, dict[str, Any]]]:
    """Finds what can be found wrong before the first run: data, columns, targets, memory.

    folder: of an earlier call of the comparison, whose precision is kept. Returns the recipe as it will run (targets
    fitted to its base), its data, and each arm's memory by the plan.
    """
    from peft_recipes import planning
    from peft_recipes.arms import fit_targets
    from peft_recipes.hardware import choose
    from peft_recipes.models import bases
    from peft_recipes.tasks import task_of
    from peft_recipes.tasks.method_training import fit_schedules

    recipe = with_precision(recipe, folder)
    hardware = choose(recipe.training, recipe.threads)
    task = task_of(recipe)
    prepared = task.prepare()
    config = bases.load_config(recipe, **task.base_options(prepared))
    recipe, notes = fit_targets(recipe, config)
    recipe, more = fit_schedules(recipe, planning.steps(recipe, prepared.rows))
    prepared.notes += notes + more
    task.recipe = recipe
    task.check_arguments(None, hardware)
    problems, estimates = [], {}
    for name in arms:
        try:
            task.check_arguments(recipe.arms[name], hardware)
            spread = planning.spread_of(recipe.arms[name], hardware, launch, jobs)
            estimates[name] = planning.memory(task, prepared, config, recipe.arms[name], name, spread)
        except RecipeError as error:
            problems += error.problems
            continue
        if not estimates[name]["fits"] and "memory" not in recipe.skip_checks:
            problems.append(planning.too_large(name, estimates[name], recipe))
    if problems:
        raise RecipeError(*problems)
    return recipe, prepared, estimates


def _chosen_seeds(seeds: Sequence[int]) -> list[int]:
    wrong = [seed for seed in seeds if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32]
    if wrong or not seeds:
        raise RecipeError(f"seeds: expected whole numbers of 0 or more, got {list(seeds)}.")
    return list(dict.fromkeys(seeds))


def _finished(output: Path, recipe: Recipe, job: Job, fingerprint: str, launch: Launch | None) -> bool:
    """Whether a run need not be done again: the same recipe, data and code, by as many processes."""
    run = read_run(run_folder(output, recipe, *job))
    if run is None or not run.ok or run.data.get("signature") != signature(recipe, *job, fingerprint):
        return False
    where = run.data["environment"]
    wanted = (launch.processes, launch.shares(recipe.arms.get(job[0]))) if launch else (1, None)
    return (where.get("processes", 1), where.get("distributed")) == wanted


def _run_or_failure(output: Path, recipe: Recipe, job: Job) -> Run:
    folder = run_folder(output, recipe, *job)
    run = read_run(folder)
    missing = {"status": "failed", "error": "There is no run in its folder.", "arm": job[0], "seed": job[1]}
    return run if run is not None else Run(folder, missing)
