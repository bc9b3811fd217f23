"""A comparison that is changed while it runs: arms are stopped and added, and the next call goes on with that."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial

import pytest

import peft_recipes.comparison.compare as comparing
from peft_recipes import RecipeError, compare, load_recipe
from peft_recipes.comparison.by_hand import ByHand, Team, check_added, variant_name
from peft_recipes.comparison.changes import Changes, read_changes
from peft_recipes.comparison.orders import Order
from peft_recipes.comparison.requests import ask, taking_requests
from peft_recipes.comparison.schedule import Schedule
from peft_recipes.reporting.commands import compare_command
from peft_recipes.runs.files import write_json
from peft_recipes.runs.lock import locked
from peft_recipes.training.resolve import resolve

STEPS = 60


@pytest.fixture(scope="module")
def recipe(classify):
    """Full, head and lora; a run takes a second."""
    training = {"max_steps": STEPS, "per_device_train_batch_size": 16, "use_cpu": True, "bf16": False}
    return classify(training=training, skip_checks=["fresh-process", "reload", "merge"])


def command(*words):
    """Start `peft-recipes ...` as a user at another terminal does."""
    words = [sys.executable, "-m", "peft_recipes", *map(str, words)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


class People:
    """Who act once when a run is at its first step: `acts` by (arm, seed). said: what each got for an answer."""

    def __init__(self, folder, acts):
        self.folder, self.acts, self.said, self.states, self._threads = folder, acts, {}, [], []

    def __call__(self, news):
        self.states.append((*news.job, news.state))
        if news.step and news.job in self.acts:
            for name, request in self.acts.pop(news.job).items():
                self._threads.append(threading.Thread(target=self._ask, args=(name, request)))
                self._threads[-1].start()

    def _ask(self, name, request):
        try:
            self.said[name] = ask(self.folder, request)
        except RecipeError as error:
            self.said[name] = str(error)

    def end(self):
        for thread in self._threads:
            thread.join()


def stop(arm):
    return {"do": "stop", "arm": arm}


def add(arm, *changes, name=None):
    return {"do": "add", "arm": arm, "changes": list(changes), "name": name}


@pytest.fixture(scope="module")
def changed(recipe, tmp_path_factory):
    """Arms are stopped before they begin and in the middle, added in between and while the last run trains."""
    output = tmp_path_factory.mktemp("changed")
    acts = {
        ("full", 0): {"head": stop("head"), "r2": add("lora", "peft.r=2"), "again": add("lora", "arms.lora.peft.r=2")},
        ("lora", 0): {"lora": stop("lora")},
        ("lora-r2", 0): {"slow": add("lora", "learning_rate=1e-3", name="slow")},
        ("slow", 0): {"back": add("lora")},
    }
    people = People(output / "tiny", acts)
    made = compare(recipe, ["full", "head", "lora"], output=output, on_progress=people)
    people.end()
    return made, people


def test_each_of_several_people_gets_one_line_and_nothing_is_lost(changed):
    _, people = changed
    assert people.acts == {}
    assert people.said["head"] == "head is stopped before the first step of seed 0; no seed of it is finished."
    assert re.fullmatch(
        rf"lora is stopped at step \d+ of {STEPS} of seed 0; no seed of it is finished\.", people.said["lora"]
    )
    last = "after the runs that are planned."
    added = f"lora-r2 will be trained with seed 0, {last}"
    exists = "There is an arm 'lora-r2' already: name the new one with --as."
    assert sorted([people.said["r2"], people.said["again"]]) == sorted([added, exists])
    assert people.said["slow"] == f"slow will be trained with seed 0, {last}"
    step = re.search(r"step (\d+)", people.said["lora"])[1]
    assert (
        people.said["back"] == f"lora goes on from step {step} of {STEPS} of seed 0, after the runs that are planned."
    )


def test_the_table_has_stopped_and_added_arms_as_what_they_are(changed):
    made, _ = changed
    arms, folder = made.data["arms"], made.folder
    assert {name: arm["status"] for name, arm in arms.items()} == {
        "full": "ok", "head": "stopped", "lora": "ok", "lora-r2": "ok", "slow": "ok"
    }  # fmt: skip
    assert arms["head"]["error"] is None and arms["head"]["failures"] == [] and arms["head"]["metric"] is None
    assert arms["head"]["progress"] == {"state": "stopped", "step": 0, "of": None, "validation": []}
    assert "head" not in made.data["differences"] and {"lora", "lora-r2", "slow"} <= {*made.data["differences"]}
    assert arms["lora-r2"]["rank"] == 2 and arms["slow"]["learning_rate"] == 1e-3 and made.failed == []
    page = (folder / "comparison.md").read_text()
    assert "stopped by hand" in page
    assert "Arm 'slow' was added while the comparison ran: 'lora' with learning_rate=1e-3." in made.data["notes"]
    assert "lora-r2:" in (folder / "recipe.yaml").read_text() and (folder / "slow" / "seed-0" / "README.md").is_file()


def test_a_run_that_was_stopped_and_taken_up_went_on_from_its_checkpoint(changed):
    made, people = changed
    run = json.loads((made.folder / "lora" / "seed-0" / "run.json").read_text())
    assert run["training"]["steps"] == STEPS
    assert run["training"]["resumed_at_steps"] == [int(re.search(r"step (\d+)", people.said["lora"])[1])]


def test_the_next_call_goes_on_with_the_same_arms_until_overwrite(changed, recipe, caplog):
    made, _ = changed
    stored = json.loads((made.folder / "changes.json").read_text())
    assert [each["arm"] for each in stored["stopped"]] == ["head"]
    assert [(each["arm"], each["of"], each["changes"]) for each in stored["added"]] == [
        ("lora-r2", "lora", {"peft.r": "2"}), ("slow", "lora", {"learning_rate": "1e-3"})
    ]  # fmt: skip
    states = []
    caplog.set_level("INFO", "peft_recipes")
    again = compare(
        recipe,
        ["full", "head", "lora"],
        output=made.folder.parent,
        on_progress=lambda p: states.append((p.job[0], p.state)),
    )
    assert states == [
        ("base", "kept"),
        ("full", "kept"),
        ("head", "stopped"),
        ("lora", "kept"),
        ("lora-r2", "kept"),
        ("slow", "kept"),
    ]
    assert again.data["arms"].keys() == made.data["arms"].keys() and again.data["arms"]["head"]["status"] == "stopped"
    said = caplog.text
    assert "What was changed while an earlier call ran stays" in said and "Arm 'head' was stopped by hand" in said


def test_a_suggested_command_about_an_added_arm_names_the_recipe_that_has_it(changed):
    data = {**changed[0].data, "asked": {"recipe": "mine", "embedded": True, "output": "out", "added": ["slow"]}}
    suggested = compare_command(data, "full,slow", "arms.slow.peft.r=8")
    expected = "peft-recipes compare out/tiny/recipe.yaml --arms full,slow --set arms.slow.peft.r=8 --output out"
    assert suggested == expected
    assert compare_command(data, "full,lora") == "peft-recipes compare mine --arms full,lora --embedded --output out"
    recipe = load_recipe(changed[0].folder / "recipe.yaml", changes=["arms.slow.peft.r=8"])
    assert recipe.arms["slow"].method.r == 8


def test_overwrite_forgets_what_was_changed(changed, tmp_path):
    (tmp_path / "changes.json").write_bytes((changed[0].folder / "changes.json").read_bytes())
    assert len(read_changes(tmp_path).added) == 2
    Changes(tmp_path).begin(overwrite=True)
    assert not (tmp_path / "changes.json").exists()


@pytest.mark.parametrize(
    "content", ["[]", "{", '{"stopped": [{}], "added": []}', '{"stopped": [], "added": [{"arm": "x"}]}']
)
def test_a_broken_file_is_an_error_that_says_what_to_do(recipe, tmp_path, content):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "changes.json").write_text(content)
    with pytest.raises(
        RecipeError, match=r"changes\.json can't be read .*or delete it, and no arm is stopped or added"
    ):
        compare(recipe, output=tmp_path)


# --- what can't be done, with runs that never end ---------------------------------------------------------------------


class Held:
    """An executor whose runs wait."""

    def __init__(self, *_, **__):
        self.notes, self.orders, self.room = [], [], True

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def spread_of(self, arm, hardware):
        return None

    def submit(self, order):
        if not self.room:
            raise RecipeError("no node of the cluster offers more than 1.0 GB")
        self.orders.append(order)

    def cancel(self, order):
        self.orders.remove(order)

    def finished(self):
        return iter(())

    def rest(self):
        pass


class Forever(Held):
    """Runs that never end, in a comparison's process that lives until it is killed."""

    def finished(self):
        while True:
            threading.Event().wait(0.01)
            yield None


@pytest.fixture(scope="module")
def resolved(recipe):
    return resolve(recipe, ["full", "head", "lora"])


@pytest.fixture
def asked(resolved, tmp_path):
    """asked(request) -> the answer, or the problems, of a comparison of full, head and lora whose runs wait."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    executor, recipe = Held(), resolved.recipe
    team = Team(recipe, ["full", "head", "lora"], [0, 1, 2], {})
    recipe.to_yaml(folder / "recipe.yaml")
    jobs = [("base", 0), *((arm, seed) for seed in team.seeds for arm in team.names)]

    def order(job, number):
        return Order(tmp_path, team.recipe, job, folder / "recipe.yaml", number)

    runs, changes = Schedule(executor, jobs, order, resolved.fingerprint), Changes(folder)
    runs.train(jobs)
    checked = partial(check_added, executor, None, folder, None)

    with locked(folder), taking_requests(folder) as inbox:

        def ask_it(request, design=None):
            by_hand = ByHand(team, runs, changes, inbox, folder / "recipe.yaml", checked, design)
            write_json(folder / ".changes" / "1.request", request)
            by_hand.take_requests()
            reply = json.loads((folder / ".changes" / "1.answer").read_text())
            return reply["said"] or reply["problems"]

        ask_it.executor, ask_it.runs, ask_it.folder, ask_it.team = executor, runs, folder, team
        yield ask_it


@pytest.mark.parametrize(
    ("request_", "problems"),
    [
        (stop("lorra"), [r"Unknown arm 'lorra' in the comparison\. Did you mean 'lora'\?"]),
        (stop("base"), ["The base is not trained"]),
        (stop("full"), [r"full can't be stopped: head and lora are compared with it, seed by seed\. Stop them first"]),
        (add("lorra", "peft.r=2"), ["Did you mean 'lora'"]),
        (add("lora"), ["lora is an arm of the comparison already, and not stopped.*--set learning_rate=1e-3"]),
        (add("lora", name="x"), ["--as x names a variant of lora: say what differs"]),
        (add("lora", "peft.r=4"), ["--set peft.r=4 changes nothing: lora has it so"]),
        (add("head", "method=full", "learning_rate=5e-3"), ["would be the same as full"]),
        (add("lora", "peft.r=2", name="head"), ["There is an arm 'head' already: name the new one with --as"]),
        (add("lora", "training.max_steps=3"), ["'training' is the same for all arms.*: method, peft, learning_r"]),
        (add("lora", "arms.head.learning_rate=3"), ["it names another arm; here 'lora' is changed: --set lea"]),
        (add("lora", "peft.r=2", name="a b"), ["'a b' can't name an arm"]),
        (
            add("lora", "peft.rr=2", "learning_rate=-1", "r", name="head"),
            ["There is an arm 'head'", "--set r: expected KEY=VALUE", "'rr'.*Did you mean 'r'"],
        ),
        (add("lora", "peft.target_modules=[q_lim]", name="x"), ["'q_lim' hits no module.*Nearest: q_lin"]),
        (add("lora", "peft.r=0", "learning_rate=-1"), [r"peft\.r: the rank must be", "learning_rate: expected a num"]),
        ({"do": "dance"}, ["does not know the request 'dance'"]),
        ({"do": "stop"}, ["KeyError"]),
    ],
)  # fmt: skip
def test_what_can_not_be_done_is_said_with_every_problem_and_changes_nothing(asked, request_, problems):
    before = (asked.folder / "recipe.yaml").read_text()
    found = asked(request_)
    assert isinstance(found, list) and len(found) == len(problems), found
    for problem in problems:
        assert any(re.search(problem, one) for one in found), found
    assert len(asked.executor.orders) == 10 and asked.team.names == ["full", "head", "lora"]
    assert not (asked.folder / "changes.json").exists() and (asked.folder / "recipe.yaml").read_text() == before


def test_an_arm_is_stopped_once_and_full_last(asked):
    assert asked(stop("lora")) == "lora is stopped before the first step of seed 0; no seed of it is finished."
    (again,) = asked(stop("lora"))
    assert again == "lora is stopped already: it was stopped by hand before seed 0."
    assert [order.job[0] for order in asked.executor.orders].count("lora") == 0
    (refused,) = asked(stop("full"))
    assert "head is compared with it" in refused
    asked(stop("head"))
    assert asked(stop("full")).startswith("full is stopped before the first step")  # nothing else is left
    assert [order.job for order in asked.executor.orders] == [("base", 0)]


def test_the_runs_of_an_arm_that_have_ended_are_not_stopped(asked):
    asked.runs._under_way.clear()
    assert asked(stop("lora")) == ["All runs of lora have ended: there is nothing to stop."]


def test_a_run_that_has_its_figures_is_verified_to_its_end(asked, monkeypatch):
    from peft_recipes.comparison import schedule

    asked.runs._steps["lora", 0] = (STEPS, STEPS)
    monkeypatch.setattr(schedule, "_can_be_kept", lambda order: order.job == ("lora", 0))
    assert asked(stop("lora")) == "lora is stopped before the first step of seed 1; no seed of it is finished."
    assert [order.job for order in asked.executor.orders if order.job[0] == "lora"] == [("lora", 0)]


def test_an_arm_that_was_taken_up_is_pending_and_kept(asked):
    states = []
    asked.runs._order = lambda job, number, order=asked.runs._order: replace(
        order(job, number), on_progress=lambda news: states.append((news.job, news.state))
    )
    asked(stop("lora"))
    asked(add("lora"))
    assert [state for job, state in states if job == ("lora", 0)][-1] == "pending"
    assert read_changes(asked.folder).kept == ["lora"] and read_changes(asked.folder).stopped == []


def test_runs_that_share_a_process_are_not_stopped_alone_and_those_to_come_are(asked):
    said, left, jobs, runs = [], set(), asked.runs.jobs, asked.runs
    runs._under_way.clear()
    asked.executor.orders.clear()

    def share(orders, wanted):
        next(order for order in orders if order.job[0] == "lora").report("running")
        yield None
        left.update(order.job[0] for order in orders if wanted(order))

    runs._share, runs.on_event = share, lambda ended: said.extend([asked(stop("lora")), asked(stop("head"))])
    runs.train(jobs)
    (refused,), stopped = said
    assert "lora is trained in one process with others (--share-base)" in refused
    assert stopped == "head is stopped before the first step of seed 0; no seed of it is finished."
    assert "lora" in left and "head" not in left  # of a later group
    assert {order.job[0] for order in asked.executor.orders} == {"base", "full", "lora"}


def test_an_arm_that_no_machine_has_room_for_is_not_added(asked):
    asked.executor.room = False
    assert asked(add("lora", "peft.r=2")) == ["no node of the cluster offers more than 1.0 GB"]
    assert "lora-r2" not in asked.team.recipe.arms and "lora-r2" not in (asked.folder / "recipe.yaml").read_text()
    assert not (asked.folder / "changes.json").exists()
    asked.executor.room = True
    assert (
        asked(add("lora", "peft.r=2")) == "lora-r2 will be trained with seeds 0, 1, 2, after the runs that are planned."
    )


def test_seeds_until_it_is_decided_are_a_plan_in_which_nothing_is_added(asked):
    class Design:
        data: dict = {"decided": {"head": {}}, "given_up": []}  # noqa: RUF012

    (refused,) = asked(add("lora", "peft.r=2"), Design)
    assert "With --until-decided no arm is added" in refused and "--output ANOTHER" in refused
    assert asked(stop("lora"), Design).startswith("lora is stopped")
    assert "taken up again by the next call" in asked(add("lora"), Design)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        (["peft.r=32"], "lora-r32"),
        (["learning_rate=1e-3"], "lora-lr1e-3"),
        (["arms.lora.peft.r=8", "learning_rate=0.001"], "lora-r8-lr0_001"),
        (["peft.target_modules=[q_lin, v_lin]"], "lora-target_modules_q_lin_v_lin"),
    ],
)
def test_a_variant_is_named_by_what_differs(changes, name):
    assert variant_name("lora", changes) == name


# --- a comparison that is killed --------------------------------------------------------------------------------------


def test_a_killed_comparison_goes_on_with_what_was_answered(recipe, tmp_path, monkeypatch):
    from workspace import ThisProcess

    folder, child = tmp_path / "tiny", os.fork()
    if child == 0:
        comparing.executor_of = Forever
        with contextlib.suppress(BaseException):
            compare(recipe, ["full", "head", "lora"], output=tmp_path)
        os._exit(0)
    while not (folder / ".changes" / "open").exists():
        threading.Event().wait(0.01)
    people = [command("stop", folder, "head"), command("add", folder, "lora", "--set", "peft.r=2", "--json")]
    (said, _), (document, _) = (each.communicate() for each in people)  # two at the same moment
    assert said == "head is stopped before the first step of seed 0; no seed of it is finished.\n"
    assert json.loads(document)["said"].startswith("lora-r2 will be trained with seed 0")
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    late = command("stop", folder, "lora")
    _, error = late.communicate()
    assert late.returncode == 2 and error.startswith(f"Error: No comparison runs in {folder}. The next")
    monkeypatch.setattr(comparing, "executor_of", ThisProcess)
    made = compare(recipe, ["full", "head", "lora"], output=tmp_path)
    assert {name: arm["status"] for name, arm in made.data["arms"].items()} == {
        "full": "ok", "head": "stopped", "lora": "ok", "lora-r2": "ok"
    }  # fmt: skip
    assert not (folder / ".changes").exists()


def test_an_arm_without_any_seed_is_shown_as_stopped(recipe, tmp_path):
    from peft_recipes.runs.folder import Run, not_planned
    from peft_recipes.statistics.results import _arm

    entry = _arm(recipe, "lora", {0: Run(tmp_path, not_planned("lora", 0))}, [], None)
    assert (entry["status"], entry["error"], entry["progress"]["state"]) == ("stopped", None, "stopped")
