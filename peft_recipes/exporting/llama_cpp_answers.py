"""Ask llama.cpp: how it tokenises texts and renders a chat, and what it answers, greedily.

A script for a process of its own, so that an abort of the engine ends no export, and its threads and torch's do not
meet. It imports nothing of peft_recipes. Reads one request from stdin and writes one reply to the file that it names:

    {"engine": str, "model": path, "adapter": path | null, "reply": path, "context": int, "threads": int, "new": int,
     "texts": [str], "chats": [[{"role": str, "content": str}]], "prompts": [[int]]}
    {"tokens": [[int]], "rendered": [str | null], "chat_tokens": [[int]], "bos": str, "eos": str,
     "answers": [{"tokens": [int], "logits": [{token: float}]}]}

logits: at each position the likeliest tokens, up to a constant. Both engines stop at an end token, which is kept.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

_TOP = 10  # of the likeliest tokens at each position


def with_xllamacpp(request: dict[str, Any]) -> dict[str, Any]:
    """Ask xllamacpp, which is llama.cpp's own server in this process."""
    import urllib.request

    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = request["model"]
    params.n_ctx, params.n_parallel, params.warmup = request["context"], 1, False
    params.n_gpu_layers, params.fit_params = 0, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = request["threads"]
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    if request["adapter"]:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(request["adapter"], 1.0)]
    server = xllamacpp.Server(params)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback: never through a proxy

    def ask(path: str, data: Any = None) -> Any:
        body = None if data is None else json.dumps(data).encode()
        call = urllib.request.Request(server.listening_address + path, body, {"Content-Type": "application/json"})
        with opener.open(call) as reply:
            return json.load(reply)

    def tokens(text: str) -> list[int]:
        return ask("/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]

    def answer(prompt: list[int]) -> dict[str, Any]:
        options = {"n_predict": request["new"], "temperature": 0, "n_probs": _TOP, "return_tokens": True}
        reply = ask("/completion", {"prompt": prompt, **options, "cache_prompt": False})
        steps = reply.get("completion_probabilities", [])
        aligned = [step["id"] for step in steps] == reply["tokens"]  # not where a token is a part of a character
        tops = [{str(top["id"]): top["logprob"] for top in step["top_logprobs"]} for step in steps if aligned]
        return {"tokens": reply["tokens"], "logits": tops}

    rendered = [ask("/apply-template", {"messages": chat})["prompt"] for chat in request["chats"]]
    facts = ask("/props")
    return {
        "tokens": [tokens(text) for text in request["texts"]],
        "rendered": rendered,
        "chat_tokens": [tokens(text) for text in rendered],
        "bos": facts["bos_token"],
        "eos": facts["eos_token"],
        "answers": [answer(prompt) for prompt in request["prompts"]],
    }


def with_llama_cpp_python(request: dict[str, Any]) -> dict[str, Any]:
    """Ask llama-cpp-python."""
    import llama_cpp
    import numpy
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    llama = llama_cpp.Llama(
        request["model"], lora_path=request["adapter"], n_ctx=request["context"], n_batch=request["context"],
        n_threads=request["threads"], n_threads_batch=request["threads"], n_gpu_layers=0, verbose=False,
        type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32,
    )  # fmt: skip
    vocabulary, size = llama_cpp.llama_model_get_vocab(llama.model), llama.n_vocab()

    def text_of(token: int) -> str:
        return llama._model.token_get_text(token) if token >= 0 else ""

    bos, eos = text_of(llama.token_bos()), text_of(llama.token_eos())

    def render(chat: list[dict[str, str]]) -> str | None:
        template = llama.metadata.get("tokenizer.chat_template")
        return template and Jinja2ChatFormatter(template, eos, bos)(messages=chat).prompt

    def answer(prompt: list[int]) -> dict[str, Any]:
        llama.reset()
        new: list[int] = []
        logits = []
        while len(new) < request["new"]:
            llama.eval([new[-1]] if new else prompt)
            row = numpy.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llama.ctx, -1), shape=(size,))
            logits.append({str(token): float(row[token]) for token in numpy.argsort(-row)[:_TOP]})
            new.append(int(row.argmax()))
            if llama_cpp.llama_vocab_is_eog(vocabulary, new[-1]):
                break
        return {"tokens": new, "logits": logits}

    rendered = [render(chat) for chat in request["chats"]]
    begins = [bool(bos) and (text or "").startswith(bos) for text in rendered]  # the template brings the BOS token
    return {
        "tokens": [llama.tokenize(text.encode(), add_bos=True, special=True) for text in request["texts"]],
        "rendered": rendered,
        "chat_tokens": [
            llama.tokenize((text or "").encode(), add_bos=not begun, special=True)
            for text, begun in zip(rendered, begins, strict=True)
        ],
        "bos": bos,
        "eos": eos,
        "answers": [answer(prompt) for prompt in request["prompts"]],
    }


ENGINES = {"xllamacpp": with_xllamacpp, "llama-cpp-python": with_llama_cpp_python}

if __name__ == "__main__":
    sys.path.pop(0)  # this folder, whose llama_cpp.py is not the package
    asked = json.load(sys.stdin)
    Path(asked["reply"]).write_text(json.dumps(ENGINES[asked["engine"]](asked)), encoding="utf-8")
