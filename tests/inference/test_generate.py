"""generate with a base, its adapters and the merged models; the chat, in a real terminal."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys

import pytest
import torch
from peft import IA3Config, PeftModel
from saved_adapters import lora, saved
from small import tokenizer
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from peft_recipes.adapters.open import open_adapter
from peft_recipes.cli.app import app
from peft_recipes.inference.generate import Sampling, generate_answer, length_and_speed, prompt_tokens


@pytest.fixture(scope="module")
def chatty(tiny, tmp_path_factory):
    """A base with a chat template, and two LoRAs and an IA3 of it."""
    root = tmp_path_factory.mktemp("chatty")
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    model.config.eos_token_id = model.generation_config.eos_token_id = None  # or answers would be empty
    model.save_pretrained(root / "base")
    tokenizer(chat=True).save_pretrained(root / "base")
    ia3 = IA3Config(target_modules=["v_proj"], feedforward_modules=[], task_type="CAUSAL_LM", init_ia3_weights=False)
    for seed, (name, config) in enumerate({"first": None, "second": lora(r=4), "third": ia3}.items()):
        saved(root / "base", root / name, config, seed)
    return root


def call(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def plain(root, folder, text, **options):
    """The answer of plain transformers and PEFT."""
    words, model = tokenizer(chat=True), AutoModelForCausalLM.from_pretrained(root / "base")
    model = PeftModel.from_pretrained(model, root / folder).eval() if folder else model.eval()
    ids = words.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, tokenize=True,
                                    return_dict=True, return_tensors="pt")  # fmt: skip
    torch.manual_seed(0)
    made = model.generate(**ids, max_new_tokens=6, **options)
    return words.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()


@pytest.mark.parametrize("options", [[], ["--do-sample", "--temperature", "0.8", "--top-k", "5", "--top-p", "0.9"]])
def test_each_variant_answers_as_plain_peft_does(chatty, options):
    folders = [chatty / name for name in ("first", "second", "third")]
    done = call("generate", *folders, "--prompt", "good film", "--prompt", "so it was", "--merged", "--json",
                "--max-new-tokens", "6", *options)  # fmt: skip
    assert done.exit_code == 0, done.stderr
    rows = json.loads(done.stdout)
    variants = ["base", "first", "second", "third", "first-merged", "second-merged", "third-merged"]
    assert [row["prompt"] for row in rows] == ["good film", "so it was"]
    same = {"do_sample": True, "temperature": 0.8, "top_k": 5, "top_p": 0.9} if options else {"do_sample": False}
    for row in rows:
        assert list(row["answers"]) == variants
        assert all(made["tokens"] and made["tokens_per_second"] > 0 for made in row["answers"].values())
        for name in variants[:4]:
            wanted = plain(chatty, None if name == "base" else name, row["prompt"], **same)
            assert row["answers"][name]["text"] == wanted, name
        if not options:
            for name in variants[1:4]:
                assert row["answers"][f"{name}-merged"]["text"] == row["answers"][name]["text"]


def test_prompts_from_a_file_are_answered_on_the_terminal(chatty, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "good film"}\n{"prompt": "bad film"}\n')
    shown = call("generate", chatty / "first", "--file", tmp_path / "in.jsonl", "--max-new-tokens", "3").stdout
    assert shown.count("tokens/s") == 4 and "good film" in shown and "bad film" in shown and "first" in shown


def test_an_answer_cut_off_by_max_new_tokens_is_marked(chatty):
    adapter = open_adapter(chatty / "first")
    model = adapter.attach(adapter.load_base())
    tokens = prompt_tokens(adapter, [{"role": "user", "content": "good film"}])
    answer = generate_answer(model, adapter, tokens, Sampling(4))
    assert answer["cut_off"] and length_and_speed(answer).startswith("4 tokens, cut off there, ")
    with torch.no_grad():
        model.generation_config.eos_token_id = [int(model(tokens).logits[0, -1].argmax())]  # its first token
    ended = generate_answer(model, adapter, tokens, Sampling(4))
    assert not ended["cut_off"] and length_and_speed(ended).startswith("1 token, ")
    assert not generate_answer(model, adapter, tokens, Sampling(1))["cut_off"]


def test_a_sampling_option_switches_sampling_on():
    assert not Sampling().samples and Sampling(top_p=0.5).samples and not Sampling(do_sample=False, top_k=3).samples


def test_a_base_without_a_chat_template_gets_the_prompt_alone(tiny, tmp_path):
    config = lora(target_modules=["c_attn"], fan_in_fan_out=True)
    adapter = open_adapter(saved(tiny("gpt2"), tmp_path / "plain", config))
    messages = [{"role": "user", "content": "good film"}]
    assert adapter.recipe.task == "language-modeling"
    assert adapter.processor.decode(prompt_tokens(adapter, messages)[0]) == "good film"


def test_user_mistakes(chatty, tiny, tmp_path):
    other = saved(tiny("gpt2"), tmp_path / "other", lora(target_modules=["c_attn"], fan_in_fan_out=True))
    labels = saved(tiny("distilbert"), tmp_path / "l", lora(target_modules=["q_lin"], task_type="SEQ_CLS"), labels=2)
    first = chatty / "first"
    for words, message in (
        ([first], "nothing was given to ask"),
        ([first, "--prompt", "x", "--chat"], "contradict each other"),
        ([first, "--chat", "--json"], "contradict each other"),
        ([first, other, "--prompt", "x"], f"{first} was made for '{chatty / 'base'}', {other} for '{tiny('gpt2')}'"),
        ([first, first, "--prompt", "x"], "given twice"),
        ([labels, "--prompt", "x"], "use `predict`"),
        ([tmp_path / "none", "--prompt", "x"], "no folder"),
        ([first, "--prompt", " "], "Prompt 1 is empty"),
        ([first, "--prompt", "good " * 80], "the model takes 64"),
        ([first, "--file", tmp_path / "none.csv"], "is not there"),
        ([first, "--prompt", "x", "--temperature", "0"], "above 0"),
        ([first, "--prompt", "x", "--top-p", "1.5", "--top-k", "0"], "--top-k 0: expected 1 or more"),
        ([first, "--prompt", "x", "--max-new-tokens", "0"], "1 or more"),
        ([first, "--prompt", "x", "--base", "./none"], "no config.json"),
    ):
        done = call("generate", *words)
        assert done.exit_code == 2 and message in " ".join(done.stderr.split()), (words, done.stderr)
        assert "Traceback" not in done.output and done.stdout == ""


class Terminal:
    """A process on a pseudo-terminal: `type` writes a line to it, `until` reads its output up to some words."""

    def __init__(self, *words):
        self.own, other = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "peft_recipes", *map(str, words)], stdin=other, stdout=other, stderr=other,
            env=os.environ | {"TERM": "dumb", "COLUMNS": "200"}, start_new_session=True,
        )  # fmt: skip
        os.close(other)
        self.shown = ""

    def until(self, words: str) -> str:
        start = len(self.shown)
        while words not in self.shown[start:]:
            try:
                piece = os.read(self.own, 4096).decode(errors="replace")
            except OSError:  # the process has ended
                piece = ""
            assert piece, f"ended before {words!r}: {self.shown}"
            self.shown += piece
        return self.shown[start:]

    def type(self, line: str) -> None:
        os.write(self.own, f"{line}\n".encode())


@pytest.fixture
def terminal():
    opened = []
    yield lambda *words: opened.append(Terminal(*words)) or opened[-1]
    for made in opened:
        made.process.kill()
        made.process.wait()
        os.close(made.own)


def test_a_chat_in_a_real_terminal(terminal, chatty):
    chat = terminal("generate", chatty / "first", chatty / "second", "--chat", "--max-new-tokens", "6")
    chat.until("you > first: ")
    chat.type("good film")
    answer = chat.until("you > first: ")
    assert (
        plain(chatty, "first", "good film", do_sample=False) in answer
        and "6 tokens," in answer
        and "tokens/s" in answer
    )
    chat.type("/adapter secnd")
    assert "Did you mean 'second'" in chat.until("you > first: ")
    chat.type("/reset")
    chat.until("you > first: ")
    chat.type("/adapter second")
    chat.until("you > second: ")
    chat.type("so it was")
    assert plain(chatty, "second", "so it was", do_sample=False) in chat.until("you > second: ")
    chat.type("/base")
    chat.until("you > base: ")
    chat.type("/adapter")
    assert "base (answers now), first, second" in chat.until("you > base: ")
    chat.type("/hlep")
    assert "Did you mean '/help'" in chat.until("you > base: ")
    chat.type("/help")
    assert "/reset" in chat.until("you > base: ")
    chat.type("\x03")
    chat.until("you > base: ")  # Ctrl-C on an empty line ends nothing
    chat.type("/quit")
    assert chat.process.wait(timeout=60) == 0
    assert "Traceback" not in chat.shown


def test_a_chat_keeps_its_history_and_drops_the_oldest_turns_when_it_is_full(chatty):
    from peft_recipes.adapters.open import open_adapters
    from peft_recipes.inference.chat import Chat

    shown: list[str] = []
    chat = Chat(open_adapters([chatty / "first", chatty / "second"]), Sampling(6), merged=True, write=shown.append)
    chat.handle("good film")
    chat.handle("so it was")
    assert [m["role"] for m in chat.messages] == ["user", "assistant"] * 2
    assert chat.messages[0]["content"] == "good film"
    for name in ("second", "base", "first-merged"):
        chat.handle(f"/adapter {name}")
        assert chat.active == name
    for _ in range(12):
        chat.handle("the day was warm and lovely")
    assert "oldest" in "".join(shown) and chat.messages[0]["content"] != "good film"
    chat.handle("/reset")
    assert chat.messages == []
    before = len(shown)
    with pytest.raises(Exception, match="the model takes 64"):
        chat.handle("good " * 80)
    assert chat.messages == [] and len(shown) == before
