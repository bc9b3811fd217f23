"""Folders as streams of pieces: they arrive as they were, complete or not at all."""

from __future__ import annotations

import pytest

from peft_recipes.cluster.packing import digest, pack, receive, receive_parts, unpack


def content(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def run(tmp_path):
    """A run's folder: small files, one of many pieces, an empty one, a checkpoint, a held lock."""
    folder = tmp_path / "lora" / "seed-0"
    (folder / "trainer" / "checkpoint-2").mkdir(parents=True)
    (folder / "trainer" / "checkpoint-2" / "state.json").write_text("{}")
    (folder / "run.json").write_text('{"status": "ok"}')
    (folder / "weights").write_bytes(bytes(range(256)) * 41)
    (folder / "log.txt").touch()
    (folder / ".lock").touch()
    return folder


@pytest.mark.parametrize("piece", [100, 512, 10_000, 2**20])
def test_a_folder_arrives_as_it_was_without_its_locks(run, tmp_path, piece):
    pieces = list(pack(run, piece=piece))
    assert all(len(each) == piece for each in pieces[:-1])
    unpack(pieces, tmp_path / "arrived")
    assert content(tmp_path / "arrived") == {name: b for name, b in content(run).items() if name != ".lock"}


def test_a_stream_that_breaks_off_leaves_the_folder_as_it_was(run, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "run.json").write_text("old")

    def breaks_off():
        yield next(pack(run, piece=600))
        raise ConnectionError

    with pytest.raises(ConnectionError):
        receive(breaks_off(), copy, last="run.json")
    assert content(copy) == {"run.json": b"old"} and [p.name for p in tmp_path.iterdir()].count("copy") == 1
    assert not list(tmp_path.glob(".*"))
    receive(pack(run), copy, last="run.json")
    assert content(copy) == {name: b for name, b in content(run).items() if name != ".lock"}


def test_a_checkpoint_replaces_the_earlier_ones_and_leaves_the_rest(run, tmp_path):
    copy = tmp_path / "copy"
    for step in (1, 2):
        (copy / "trainer" / f"checkpoint-{step}").mkdir(parents=True)
        (copy / "trainer" / f"checkpoint-{step}" / "state.json").write_text("old")
    (copy / ".lock").touch()
    names = ["trainer/checkpoint-2", "log.txt"]
    receive_parts(pack(run, names), copy, names, instead_of=[copy / "trainer" / "checkpoint-1"])
    assert content(copy) == {"trainer/checkpoint-2/state.json": b"{}", "log.txt": b"", ".lock": b""}


def test_an_archive_can_not_write_outside_of_its_folder(tmp_path):
    import io
    import tarfile

    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("../outside"))
    with pytest.raises(tarfile.FilterError):
        unpack([archive.getvalue()], tmp_path / "inside")
    assert list(tmp_path.iterdir()) == []


def test_a_digest_changes_with_names_and_contents(run):
    before = digest(run)
    (run / "log.txt").write_text("x")
    changed = digest(run)
    (run / "log.txt").rename(run / "log2.txt")
    assert len({before, changed, digest(run)}) == 3
