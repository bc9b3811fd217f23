"""Requests to a running comparison: each is answered, withdrawn or known to be lost, and nobody waits for the dead."""

from __future__ import annotations

import json
import threading

import pytest

from peft_recipes.comparison import requests
from peft_recipes.comparison.requests import Inbox, Request, Unanswered, ask, check_running, taking_requests
from peft_recipes.errors import RecipeError
from peft_recipes.runs.lock import locked


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "tiny").mkdir()
    return tmp_path / "tiny"


def answer_all(inbox: Inbox, threads: list[threading.Thread]) -> list[Request]:
    """Answer whatever is asked until the threads end."""
    taken = []
    while any(thread.is_alive() for thread in threads):
        for request in inbox.take():
            taken.append(request)
            request.answer(f"done: {request.data['arm']}")
    return taken


def test_two_people_who_ask_at_once_each_get_their_own_answer(folder):
    answers, start = {}, threading.Barrier(8)

    def person(number):
        start.wait()
        answers[number] = ask(folder, {"do": "stop", "arm": f"arm-{number}"})

    with locked(folder), taking_requests(folder) as inbox:
        threads = [threading.Thread(target=person, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        taken = answer_all(inbox, threads)
    assert answers == {number: f"done: arm-{number}" for number in range(8)} and len(taken) == 8
    assert not (folder / requests.FOLDER).exists()


def test_what_is_wrong_with_a_request_is_an_error_with_every_problem(folder):
    with locked(folder), taking_requests(folder) as inbox:
        found = []

        def person():
            try:
                ask(folder, {"arm": "x"})
            except RecipeError as error:
                found.append(error.problems)

        thread = threading.Thread(target=person)
        thread.start()
        while thread.is_alive():
            for request in inbox.take():
                request.answer(problems=["one", "two"])
    assert found == [["one", "two"]]


def person(folder, said):
    """A thread in which somebody asks for something, and is told that it was not done."""

    def ask_it():
        try:
            ask(folder, {"arm": "x"})
        except Unanswered as error:
            said.append(str(error))

    return threading.Thread(target=ask_it)


@pytest.mark.parametrize("end", ["closed", "killed"])
def test_a_request_that_nobody_took_is_withdrawn_when_the_comparison_ends(folder, end):
    said, waiting = [], threading.Event()
    thread, inbox = person(folder, said), Inbox(folder)
    with locked(folder):
        inbox.open()
        thread.start()
        while not list((folder / requests.FOLDER).glob("*.request")):
            waiting.wait(0.005)
        if end == "closed":
            inbox.close()
    thread.join()
    assert said == [requests.ENDED] and not list((folder / requests.FOLDER).glob("*.request"))


def test_a_comparison_killed_while_it_took_up_a_request_is_named(folder):
    said, taken = [], threading.Event()
    thread, inbox = person(folder, said), Inbox(folder)
    with locked(folder):
        inbox.open()
        thread.start()
        while not list(inbox.take()):
            taken.wait(0.005)
    thread.join()
    assert len(said) == 1 and "changes.json says what was changed" in said[0]


def test_the_next_comparison_answers_what_a_killed_one_left(folder):
    place = folder / requests.FOLDER
    place.mkdir()
    (place / "open").write_text("process 1")
    for name in ("1.request", "2.taken", "3.request"):
        (place / name).write_text('{"do": "stop"}' if name != "3.request" else '{"do"')
    inbox = Inbox(folder)
    inbox.open()
    answers = {path.stem: json.loads(path.read_text())["problems"][0] for path in place.glob("*.answer")}
    assert answers["1"] == requests.ENDED and "was killed while it took up" in answers["2"]
    assert "can't be read" in answers["3"] and list(inbox.take()) == []
    inbox.close()
    assert not (place / "open").exists()


def test_ctrl_c_withdraws_a_request_or_says_that_it_stays(folder, monkeypatch):
    place = folder / requests.FOLDER

    def interrupted(seconds):
        if stays:
            next(inbox.take())
        raise KeyboardInterrupt

    monkeypatch.setattr(requests.time, "sleep", interrupted)
    with locked(folder), taking_requests(folder) as inbox:
        stays = False
        with pytest.raises(KeyboardInterrupt, match="withdrawn: nothing was changed"):
            ask(folder, {"arm": "x"})
        assert [path.name for path in place.iterdir()] == ["open"]
        stays = True
        with pytest.raises(KeyboardInterrupt, match="it stays"):
            ask(folder, {"arm": "x"})


def test_without_a_comparison_that_runs_the_error_says_so_and_where_one_does(folder):
    with pytest.raises(RecipeError, match=r"No comparison runs in .*tiny\. Start one\."):
        check_running(folder, "Start one.")
    Inbox(folder).open()  # left by a killed one: its lock is free
    with pytest.raises(RecipeError, match="No comparison runs in"):
        check_running(folder, "Start one.")
    with locked(folder):
        check_running(folder, "Start one.")
        with pytest.raises(RecipeError, match=r"There is no folder .*tinny\. One runs in .*tiny\."):
            check_running(folder.parent / "tinny", "Start one.")
    with locked(folder), pytest.raises(RecipeError, match="takes no changes"):
        (folder / requests.FOLDER / "open").unlink()
        ask(folder, {"arm": "x"})
