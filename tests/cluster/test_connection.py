"""Where runs are trained: wrong names, addresses and combinations are one line each, within seconds, without Ray."""

from __future__ import annotations

import os
import socket

import pytest
from typer.testing import CliRunner

from peft_recipes.cli.app import app
from peft_recipes.cluster import connection

WRONG = {
    ("--on", "rya"): "Unknown place to run 'rya' in --on. Did you mean 'ray'? Valid: local, ray.",
    ("--address", "auto"): "--address auto names a Ray cluster: add --on ray.",
    ("--on", "ray", "--jobs", "2"): "--jobs counts the runs on this machine",
    ("--on", "ray", "--launch", "ddp"): "One run over several nodes is Accelerate's",
    ("--on", "ray", "--measure"): "leave out --on ray, or --measure",
    ("--on", "ray", "--address", "head"): "--address head: expected ray://HOST:10001, HOST:6379, auto or local.",
    ("--on", "ray", "--address", "ray://head:port"): "expected ray://HOST:10001, HOST:6379, auto or local.",
    ("--on", "ray", "--address", "127.0.0.1:1"): "nothing answers there (Connection refused). Is the head node running",
    ("--on", "ray", "--address", "ray://127.0.0.1:1"): "--address ray://127.0.0.1:1: nothing answers there",
}


@pytest.fixture(scope="module")
def recipe(classify, tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    classify().to_yaml(path)
    return path


@pytest.mark.parametrize("options", WRONG, ids=" ".join)
def test_a_mistake_is_one_line_and_nothing_is_written(options, recipe, tmp_path):
    ended = CliRunner().invoke(app, ["compare", str(recipe), "--output", str(tmp_path / "out"), *options])
    assert ended.exit_code == 2 and WRONG[options] in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1 and not (tmp_path / "out").exists()


def test_a_missing_ray_names_the_extra(recipe, tmp_path, monkeypatch):
    find_spec = connection.importlib.util.find_spec
    monkeypatch.setattr(connection.importlib.util, "find_spec", lambda name: None if name == "ray" else find_spec(name))
    ended = CliRunner().invoke(app, ["compare", str(recipe), "--output", str(tmp_path), "--on", "ray"])
    assert ended.exit_code == 2
    assert ended.stderr == "Error: --on ray: Ray is not installed. Install it with: pip install 'peft_recipes[ray]'\n"


def test_auto_without_a_cluster_says_how_to_start_one(monkeypatch):
    pytest.importorskip("ray")
    import ray._private.utils

    monkeypatch.setattr(ray._private.utils, "read_ray_address", lambda *_: None)
    with pytest.raises(connection.RecipeError, match="no Ray cluster runs on this machine"):
        connection._chosen("auto")


@pytest.mark.parametrize("known", [None, "127.0.0.1:1"])
def test_without_an_address_a_cluster_that_is_gone_is_not_waited_for(known, monkeypatch):
    pytest.importorskip("ray")
    import ray._private.utils

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray._private.utils, "read_ray_address", lambda *_: known)
    assert connection._chosen(None) == "local"


@pytest.mark.parametrize(("owner", "joined"), [(0, True), (1000, True), (4242, False)])
def test_without_an_address_no_cluster_of_another_user_is_joined(owner, joined, tmp_path, monkeypatch):
    pytest.importorskip("ray")
    import ray._private.utils

    named, said = tmp_path / "ray_current_cluster", []
    monkeypatch.setattr(connection, "say", said.append)
    named.write_text("10.0.0.1:6379")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray._private.utils, "get_ray_address_file", lambda *_: str(named))
    monkeypatch.setattr(connection, "_why_not_reachable", lambda address: None)
    monkeypatch.setattr(connection.os, "getuid", lambda: 1000)
    stat = os.stat
    changed = os.stat_result([*stat(named)[:4], owner, *stat(named)[5:]])
    monkeypatch.setattr(
        connection.os, "stat", lambda path, **given: changed if path == str(named) else stat(path, **given)
    )
    assert connection._chosen(None) == ("10.0.0.1:6379" if joined else "local")
    assert connection._chosen("auto") == "10.0.0.1:6379"
    assert any("is another user's (--address auto joins it)" in line for line in said) is not joined


def test_an_address_where_something_else_answers_is_no_ray(monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setattr(connection, "_SECONDS", 0.2)
    refused = pytest.raises(connection.RecipeError, match=r"nothing answers there \(it is no Ray\)")
    with socket.create_server(("127.0.0.1", 0)) as server, refused:
        connection._chosen(f"127.0.0.1:{server.getsockname()[1]}")


def test_an_address_that_answers_is_taken_as_it_is():
    pytest.importorskip("ray")
    from concurrent.futures import ThreadPoolExecutor

    import grpc

    with ThreadPoolExecutor() as threads:
        server = grpc.server(threads)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}", f"ray://127.0.0.1:{port}/"):
            assert connection._chosen(address) == address
        server.stop(0)
