"""`--watch`: one page on loopback, nothing else, and a browser that is open gets the final one."""

from __future__ import annotations

import http.client
import threading
import time

import pytest

from peft_recipes.comparison import watch
from peft_recipes.comparison.watch import Watch, watched


@pytest.fixture
def served():
    server = Watch(lambda: b"<p>so far", refresh=1)
    server.start()
    yield server
    server.close()


def ask(server, path="/", method="GET", **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    return answer, answer.read()


def test_the_page_is_served_and_asks_for_itself_again(served):
    for path in ("/", "/comparison.html", "/?again"):
        answer, page = ask(served, path)
        assert (answer.status, page, answer.headers["Refresh"]) == (200, b"<p>so far", "1")
        assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'")
    assert ask(served, method="HEAD")[1] == b""


@pytest.mark.parametrize(
    "path",
    ["/comparison.json", "/../comparison.html", "/%2e%2e/etc/passwd", "/etc/passwd", "/full/seed-0/run.json"],
)
def test_nothing_else_is_served(served, path):
    assert ask(served, path)[0].status == 404


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8765", "", "127.0.0.1.evil.example"])
def test_a_page_elsewhere_that_resolves_to_this_machine_gets_nothing(served, host):
    assert ask(served, Host=host)[0].status == 403
    assert ask(served, Host=f"localhost:{served.port}")[0].status == 200


def test_nothing_can_be_sent_to_it(served):
    assert ask(served, method="POST")[0].status == 501
    assert served._server.server_address[0] == "127.0.0.1"


def test_an_open_browser_gets_the_final_page_before_the_server_ends(served):
    ask(served)
    ended = threading.Thread(target=served.finish, args=(b"<p>final",))
    ended.start()
    while served._final is None:
        time.sleep(0.01)
    answer, page = ask(served)
    assert page == b"<p>final" and "Refresh" not in answer.headers
    ended.join(timeout=1)
    assert not ended.is_alive()


def test_without_a_browser_it_ends_at_once_and_frees_its_port(capsys, monkeypatch):
    monkeypatch.setattr(watch, "REFRESH", 60)
    pages = []
    with watched(lambda: pages.append(1) or b"") as finish:
        first = capsys.readouterr().err
        with watched(lambda: b"") as other:
            second = capsys.readouterr().err
            other(b"")
        finish(b"")
    assert pages and first.startswith("Watch it at http://127.0.0.1:") and first != second
    with watched(lambda: b"", wanted=False) as finish:
        finish(b"")
    assert capsys.readouterr().err == ""
