"""push with the real client over HTTP to a local server with the Hub's protocol; loading it back with plain PEFT."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from card_code import code_in
from hub_client import Client
from hub_server import Fault, Hub
from huggingface_hub import ModelCard
from malformed import change_tensors

from peft_recipes.runs.folder import read_run

TOKEN = "hf_this_token_is_marked_and_must_not_show"
SENT = {"README.md", "adapter_config.json", "adapter_model.safetensors", "run.json", "recipe.yaml",
        "predictions.parquet", "plots/loss.png", ".gitattributes"}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("publishing")


@pytest.fixture(scope="module")
def server(place, tiny):
    shutil.copytree(tiny("distilbert"), place / "hub" / "some" / "tiny")
    (place / "hub" / "some" / "tiny" / "README.md").write_text("---\nlicense: mit\n---\n# tiny\n")
    with Hub(place / "hub", token=TOKEN, owners=("me", "team")) as running:
        yield running


@pytest.fixture
def hub(server):
    """The Hub without the repositories and requests of other tests."""
    server.faults, server.requests, server.commits = [], [], []
    yield server
    for owner in ("me", "team"):
        shutil.rmtree(server.root / owner, ignore_errors=True)
    server.private.clear()
    server.blobs.clear()


@pytest.fixture(scope="module")
def client(server, place):
    with Client(server.url, place / "home", TOKEN) as running:
        yield running


@pytest.fixture(scope="module")
def recipe_file(place, reviews):
    """A recipe with some/tiny of that Hub and a local csv."""
    path = place / "mine.yaml"
    path.write_text(
        "name: mine\ntask: text-classification\nmodel: some/tiny\nmax_length: 16\n"
        f"dataset: {{path: {reviews}, train: 96, validation: 24, test: 40}}\n"
        "training: {num_train_epochs: 2, per_device_train_batch_size: 16, use_cpu: true}\n"
        "arms:\n  full: {learning_rate: 5.0e-3}\n  head: {method: head, learning_rate: 1.0e-2}\n"
        "  lora: {learning_rate: 2.0e-2, peft: {peft_type: LORA, r: 4, target_modules: [q_lin, v_lin]}}\n"
        "  ia3: {learning_rate: 2.0e-2, peft: {peft_type: IA3, target_modules: [q_lin, lin2],"
        " feedforward_modules: [lin2]}}\n"
    )
    return path


@pytest.fixture(scope="module")
def trained(client, recipe_file, place):
    """The folder of a run; trained once."""
    done = client("train", recipe_file, "--arm", "lora", "--output", place / "runs")
    assert done.code == 0, done.err
    return place / "runs" / "mine" / "lora" / "seed-0"


@pytest.fixture
def copy(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "copy")


def wrote(hub) -> list[str]:
    """The requests that could change the Hub."""
    return [path for method, path, _ in hub.requests if method != "GET" and method != "HEAD" and "validate" not in path]


def test_a_push_sends_the_adapter_with_its_evidence_in_one_commit(client, hub, trained):
    done = client("push", trained, "--repo-id", "me/mine")
    assert done.code == 0, done.err
    files = hub.files("me/mine")
    assert set(files) == SENT
    assert "me/mine" in hub.private and len(hub.commits) == 1
    for path in SENT - {".gitattributes"}:
        assert f"  {path}" in done.out  # with its size
    assert "private" in done.out and f"Sent to {hub.url}/me/mine" in done.out
    assert files["adapter_model.safetensors"] == (trained / "adapter_model.safetensors").read_bytes()
    card = ModelCard(files["README.md"].decode())
    assert (card.data.base_model, card.data.license, card.data.library_name) == ("some/tiny", "mit", "peft")
    assert 'adapter = "me/mine"' in code_in(str(card))


def test_no_path_and_no_local_data_is_sent(client, hub, trained, reviews, place):
    done = client("push", trained, "--repo-id", "me/mine")
    assert "verification.safetensors: it holds two examples of local data" in done.out
    texts = [line.partition(",")[0].encode() for line in reviews.read_text().splitlines()[1:]]
    for path, content in hub.files("me/mine").items():
        for secret in (str(reviews.parent), str(place), str(Path.home()), TOKEN):
            assert secret.encode() not in content, path
        assert not any(text in content for text in texts), path
    assert json.loads(hub.files("me/mine")["run.json"])["dataset"] == "./reviews.csv"


_PULL = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification
ids = torch.arange(6, 18).reshape(2, 6)
logits = []
for where in sys.argv[1:]:
    base = AutoModelForSequenceClassification.from_pretrained("some/tiny", num_labels=2)
    logits.append(PeftModel.from_pretrained(base, where).eval()(input_ids=ids).logits)
bare = AutoModelForSequenceClassification.from_pretrained("some/tiny", num_labels=2).eval()(input_ids=ids).logits
print(float((logits[0] - logits[1]).abs().max()), float((logits[0] - bare).abs().max()))
exec(sys.stdin.read(), {"__name__": "__main__"})
"""


def test_plain_peft_loads_it_with_the_same_logits_and_the_cards_code_runs(client, hub, trained, tmp_path):
    """In a process without this package and with empty caches, as on another machine."""
    assert client("push", trained, "--repo-id", "me/mine").code == 0
    environment = {**client.environment, "HF_HOME": str(tmp_path / "elsewhere"), "PYTHONPATH": ""}
    command = [sys.executable, "-c", _PULL, "me/mine", str(trained)]
    code = code_in(hub.files("me/mine")["README.md"].decode())
    done = subprocess.run(command, input=code, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    compared, label = done.stdout.splitlines()
    same, other = map(float, compared.split())
    assert same == 0 and other > 1e-3
    assert label in ("good", "bad"), done.stderr


def test_a_second_push_replaces_files_and_removes_old_ones(client, hub, trained, copy):
    assert client("push", trained, "--repo-id", "me/mine").code == 0
    (hub.root / "me" / "mine" / "plots" / "old.png").write_bytes(b"old")
    change = json.loads((copy / "run.json").read_text())
    change["notes"] = ["changed"]
    (copy / "run.json").write_text(json.dumps(change))
    done = client("push", copy, "--repo-id", "me/mine", "--json")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert result["removed"] == ["plots/old.png"] and result["sent"] and result["private"]
    assert set(hub.files("me/mine")) == SENT and len(hub.commits) == 2
    assert json.loads(hub.files("me/mine")["run.json"])["notes"] == ["changed"]
    assert "adapter_model.safetensors" not in hub.commits[1][2]  # unchanged files are not sent again


def test_a_repository_is_public_only_with_public(client, hub, trained):
    done = client("push", trained, "--repo-id", "me/mine", "--public")
    assert done.code == 0 and "(public)" in done.out and "me/mine" not in hub.private
    again = client("push", trained, "--repo-id", "me/mine")
    assert again.code == 0 and "is there already and is public; it stays so" in again.out


def test_a_dry_run_sends_no_request(client, hub, trained):
    done = client("push", trained, "--repo-id", "me/mine", "--dry-run", env={"HF_TOKEN": None})
    assert done.code == 0, done.err
    assert "adapter_model.safetensors" in done.out and "nothing was pushed" in done.out
    assert not wrote(hub) and not any("me/mine" in path for _, path, _ in hub.requests)


def test_without_a_token_the_error_names_the_login_before_any_work(client, hub, tmp_path):
    done = client("push", tmp_path, "--repo-id", "me/mine", env={"HF_TOKEN": None})
    assert done.code == 2 and "hf auth login" in done.said and "HF_TOKEN" in done.said
    assert not hub.requests


@pytest.mark.parametrize(
    ("repo_id", "message"),
    [
        ("me/my model", "a space is in it"),
        ("mine", "it has no owner"),
        ("me/", "it has no owner"),
        ("/mine", "ORG/NAME"),
        ("me/mine/deep", "more than one '/'"),
        ("me/a--b", "'--'"),
        ("me/" + "x" * 120, "too long"),
        ("../mine", "ORG/NAME"),
        ("me/naïve", "letters, digits"),
    ],
)
def test_an_invalid_repository_name(client, hub, tmp_path, repo_id, message):
    done = client("push", tmp_path, "--repo-id", repo_id)
    assert done.code == 2 and message in done.said and repo_id in done.said and not hub.requests


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault("api/whoami-v2", 401), "does not take the token"),
        (Fault("api/repos/create", 403, said="No rights here."), "no permission to write there (No rights here)"),
        (Fault("api/repos/create", 409, said="Already there."), "is taken"),
        (Fault("lfs/objects/batch", 403, said="Storage is full."), "no permission to write there (Storage is full)"),
        (Fault("lfs-storage", 400), "refused it with 400"),
        (Fault("/commit/", 500), "answered 500 (Internal Server Error)"),
        (Fault("/commit/", 413, said="Too large."), "refused it with 413 (Too large)"),
    ],
)
def test_a_failed_push_deletes_the_new_repository(client, hub, trained, fault, message):
    hub.faults = [fault]
    done = client("push", trained, "--repo-id", "me/mine")
    assert done.code == 2 and message in done.said, done.err
    assert len(done.err.strip().splitlines()) == 1
    assert ("Nothing was changed" in done.err) != ("whole or not at all" in done.err)
    assert not (hub.root / "me" / "mine").exists() and not hub.commits


@pytest.mark.parametrize("fault", [Fault("/commit/", 500), Fault("/commit/", 412), Fault("lfs-storage", 400)])
def test_a_failed_push_leaves_an_existing_repository_unchanged(client, hub, trained, copy, fault):
    assert client("push", trained, "--repo-id", "me/mine").code == 0
    before = hub.files("me/mine")
    hub.faults = [fault]
    change_tensors(copy, "other")
    (copy / "verification.safetensors").unlink()
    done = client("push", copy, "--repo-id", "me/mine")
    assert done.code == 2, done.err
    assert hub.files("me/mine") == before


def test_a_repository_of_another_owner_is_refused(client, hub, trained):
    done = client("push", trained, "--repo-id", "others/mine")
    assert done.code == 2 and "no permission to write there" in done.said and '"others"' in done.said


@pytest.mark.parametrize("held", [{"model.safetensors": b"x", "config.json": b"{}"}, {"run.json": b'{"recipe": "z"}'}])
def test_a_taken_name_is_not_overwritten(client, hub, trained, held):
    for path, content in held.items():
        (hub.root / "me" / "other").mkdir(parents=True, exist_ok=True)
        (hub.root / "me" / "other" / path).write_bytes(content)
    done = client("push", trained, "--repo-id", "me/other")
    assert done.code == 2 and "is taken" in done.said and len(done.err.strip().splitlines()) == 1
    assert hub.files("me/other") == held and not wrote(hub)


def test_folders_without_an_adapter_to_send(client, hub, recipe_file, trained, copy, place, tmp_path):
    def refused(folder: Path, message: str, *more: str) -> None:
        done = client("push", folder, "--repo-id", "me/mine", *more)
        assert done.code == 2 and message in done.said, done.err
        assert len(done.err.strip().splitlines()) == 1 and not hub.commits

    head = client("train", recipe_file, "--arm", "head", "--output", place / "runs", "--resume")
    assert head.code == 0, head.err
    refused(tmp_path / "nowhere", "is no folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "is no adapter")
    refused(place / "runs" / "mine" / "head" / "seed-0", "a run of the method 'head'")
    refused(place / "runs", "There are adapters in")
    refused(place / "runs", "holds no comparison.json", "--all")
    (copy / "recipe.yaml").rename(copy / "other.yaml")
    refused(copy, "no evidence to send")
    (copy / "other.yaml").rename(copy / "recipe.yaml")
    shutil.copy(copy / "adapter_model.safetensors", copy / "model.safetensors")
    refused(copy, "fails the check 'adapter-only'")
    (copy / "model.safetensors").unlink()
    change_tensors(copy, "nan")
    refused(copy, "fails the check 'finite'")


@pytest.fixture(scope="module")
def compared(client, recipe_file, place):
    """A comparison of two seeds, all trained in one process, once."""
    code = (
        "import sys; from pathlib import Path; from peft_recipes import load_recipe, train\n"
        "from peft_recipes.comparison.collecting import collect\n"
        "recipe, out = load_recipe(sys.argv[1]), Path(sys.argv[2])\n"
        "for arm, seed in [('base', 0)] + [(arm, seed) for arm in recipe.arms for seed in (0, 1)]:\n"
        "    train(recipe, arm, seed=seed, output=out)\n"
        "recipe.to_yaml(out / 'mine' / 'recipe.yaml')\n"
        "collect(recipe, list(recipe.arms), [0, 1], out)\n"
    )
    client.python(code, recipe_file, place / "compared")
    return place / "compared" / "mine"


def test_all_sends_every_adapter_and_an_index_of_them(client, hub, compared):
    done = client("push", compared, "--all", "--repo-id", "team/mine", "--json")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert [one["repo_id"] for one in result] == ["team/mine-lora", "team/mine-ia3", "team/mine"]
    assert sorted(os.listdir(hub.root / "team")) == ["mine", "mine-ia3", "mine-lora"]
    assert len(hub.commits) == 3 and hub.private == {"team/mine", "team/mine-lora", "team/mine-ia3"}
    index = ModelCard(hub.files("team/mine")["README.md"].decode())
    assert "team/mine-lora]" in index.text and "the median of 2" in index.text and "95 % interval" in index.text
    assert not any(path.endswith(".safetensors") for path in hub.files("team/mine"))
    card = ModelCard(hub.files("team/mine-lora")["README.md"].decode())
    assert "All arms of the comparison" in card.text and "Full fine-tuning" in card.text
    runs = [read_run(compared / "lora" / f"seed-{seed}") for seed in (0, 1)]
    lower = min(runs, key=lambda run: (run.metrics["test"]["accuracy"], run.data["seed"]))
    assert json.loads(hub.files("team/mine-lora")["run.json"])["seed"] == lower.data["seed"]
    sent = json.loads(hub.files("team/mine")["comparison.json"])
    assert "samples" not in sent and "asked" not in sent
    assert not any(str(compared.parents[1]).encode() in content for content in hub.files("team/mine").values())
    again = client("push", compared, "--all", "--repo-id", "team/mine")
    assert again.code == 0, again.err


def test_a_failure_of_all_lists_what_was_sent_before(client, hub, compared):
    hub.faults = [Fault("mine-ia3/commit", 500)]
    done = client("push", compared, "--all", "--repo-id", "me/mine")
    assert done.code == 2 and "me/mine-ia3: the Hub answered 500" in done.said
    assert "Sent before it: me/mine-lora." in done.said
    assert sorted(os.listdir(hub.root / "me")) == ["mine-lora"]


def test_a_comparison_without_all_names_the_flag(client, hub, compared):
    done = client("push", compared, "--repo-id", "me/mine")
    assert done.code == 2 and "--all" in done.said


def test_a_pushed_adapter_passes_check_and_can_be_reproduced_from_the_hub(client, hub, trained, reviews, tmp_path):
    assert client("push", trained, "--repo-id", "me/mine").code == 0
    pulled = tmp_path / "pulled"
    for path, content in hub.files("me/mine").items():
        (pulled / path).parent.mkdir(parents=True, exist_ok=True)
        (pulled / path).write_bytes(content)
    assert client("check", pulled).code == 0
    done = client("reproduce", "me/mine", "--set", f"dataset.path={reviews}")
    assert done.code == 0, done.err + done.out
    assert "test accuracy" in done.out and "Reproduced." in done.out
    shutil.copy(reviews, tmp_path / "reviews.csv")  # or at the path that the recipe names
    assert client("reproduce", pulled, cwd=tmp_path).code == 0
    missing = client("reproduce", "me/mine", cwd=pulled)
    assert missing.code == 2 and "reviews.csv" in missing.said
    gone = client("reproduce", "me/mien")
    assert gone.code == 2 and "does not exist on the Hub, or is private" in gone.said


def test_the_token_is_in_no_file_and_no_process_list(client, hub, trained, place):
    done = client("push", trained, "--repo-id", "me/mine")
    assert done.code == 0
    assert any(authorization == f"Bearer {TOKEN}" for *_, authorization in hub.requests)  # it was used
    stored = [auth for _, path, auth in hub.requests if path.startswith("lfs-storage")]
    assert not any(TOKEN in authorization for authorization in stored)
    for path in place.rglob("*"):
        if path.is_file():
            assert TOKEN.encode() not in path.read_bytes(), path
    assert TOKEN not in " ".join(psutil.Process(client.process.pid).cmdline())


def test_a_token_in_an_error_of_the_hub_is_masked(client, hub, trained):
    hub.faults = [Fault("/commit/", 403, said=f"Bad token {TOKEN}!")]
    done = client("push", trained, "--repo-id", "me/mine")
    assert done.code == 2 and "Bad token ***" in done.said


def test_publish_from_python(client, hub, trained):
    done = client.python("import sys, peft_recipes; print(peft_recipes.publish(sys.argv[1], 'me/python').url)", trained)
    assert done.out.strip() == f"{hub.url}/me/python", done.err
    assert set(hub.files("me/python")) == SENT
