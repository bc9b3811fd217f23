"""README.md of an exported folder: what it is, how it is served, and what was verified."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from peft_recipes.cards.metadata import hub_base
from peft_recipes.exporting.subject import Subject

_FORMATS = {
    "gguf": "GGUF, for llama.cpp and Ollama",
    "vllm": "a PEFT folder for vLLM and SGLang",
    "lora": "a LoRA in PEFT's format",
}


def write_card(subject: Subject, folder: Path, evidence: dict[str, Any]) -> None:
    """Write README.md: front matter for the Hub, files, commands, verification."""
    base = hub_base(subject.opened.recipe) if subject.opened else None
    front = {"library_name": "gguf" if evidence["to"] == "gguf" else "peft", "tags": ["peft-recipes", evidence["to"]]}
    front |= {"base_model": base} if base else {}
    lines = ["---", yaml.safe_dump(front, sort_keys=False).strip(), "---", "", f"# {evidence['adapter']}", ""]
    lines += [f"{_title(evidence)} of base `{evidence['base']}`: {_FORMATS[evidence['to']]}.", ""]
    lines += _lora_section(evidence) if evidence["to"] == "lora" else []
    if commands := evidence.get("commands"):
        lines += ["## Serve it", "", "In this folder, with a name of your own for NAME:", "", "```sh"]
        lines += [
            *(command.replace("DIR", ".").replace("BASE", evidence["base"]) for command in commands.values()),
            "```",
            "",
        ]
    lines += ["## Verified", "", *(f"- {line}" for line in verification_lines(evidence)), ""]
    lines += ["All of it is in `export.json`.", ""]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")


def _title(evidence: dict[str, Any]) -> str:
    if evidence["method"] == "full":
        return "A full fine-tune"
    return f"{'The merged model' if evidence.get('merged') else 'An adapter'} ({evidence['method']})"


def _lora_section(evidence: dict[str, Any]) -> list[str]:
    lines = ["## What the conversion loses", "", *(f"- {line}" for line in conversion_lines(evidence)), ""]
    return lines


def conversion_lines(evidence: dict[str, Any]) -> list[str]:
    """What a LoRA made of another method is, and how it does on the test set next to the original."""
    kept = evidence["kept_of_change"]
    share = f", which keeps {kept:.2%} of the squared change of the weights" if kept is not None else ""
    lines = [f"{evidence['method']} to a LoRA of rank {evidence['rank']} by {evidence['converted_by']}{share}."]
    if row := evidence["test"]:
        lines.append(f"Test {row['metric']}: {row['original']:.4f} before, {row['lora']:.4f} as LoRA"
                     f"{_interval(row)} ({row['examples']} examples).")  # fmt: skip
    else:
        lines.append("Not measured on a test set: the adapter comes without a run's data.")
    gap = evidence["logits"]
    lines.append(f"Largest logit difference {gap['largest_logit_difference']:.3g} "
                 f"({gap['share_of_outputs']:.2g} of their size) on {evidence['inputs']['count']} inputs "
                 f"({evidence['inputs']['source']}).")  # fmt: skip
    return lines


def _interval(row: dict[str, Any]) -> str:
    difference = row.get("difference")
    if not difference:
        return ""
    low, high = difference["ci95"]
    return f", difference {difference['estimate']:+.4f}, 95 % interval {low:+.4f} to {high:+.4f}: {row['verdict']}"


def verification_lines(evidence: dict[str, Any]) -> list[str]:
    """What was compared with the model in PEFT, a line each; one line that says so if nothing was."""
    found = evidence.get("verification")
    if not found:
        return [f"Not verified: {evidence['not_verified']}"]
    if found.get("reloaded"):
        return ["Loaded again by PEFT, it gives the same logits."]
    lines = [f"By {found['engine']}, next to the model in PEFT (fp32): {_outcome(found)}."]
    if logits := found.get("logits"):
        lines.append(f"Logits: largest difference {logits['share_of_outputs']:.2g} of their size.")
    tokens = found["tokens"]
    lines.append(f"Tokens: {tokens['same']} of {tokens['texts']} texts are tokenised alike.")
    if template := found.get("template"):
        lines.append(f"Chat template: {template['same']} of {template['chats']} conversations are rendered alike.")
    if end := found.get("end_token"):
        turn = f", a turn ends with {end['end_of_turn']!r}" if end["end_of_turn"] else ""
        lines.append(f"End token: {end['transformers']!r} and {end['llama.cpp']!r}{turn}.")
    answers = found["answers"]
    lines.append(f"Greedy answers: {answers['same']} of {answers['prompts']} are the same in all tokens (up to "
                 f"{answers['new_tokens']} each, {answers['tokens']} compared).")  # fmt: skip
    lines += [_difference(each) for each in answers["differing"]]
    return lines


def _outcome(found: dict[str, Any]) -> str:
    """ "passed" or "DIFFERS"; and how many answers part, if they do so where rounding decides."""
    if not found["passed"]:
        return "DIFFERS"
    parting, prompts = len(found["answers"]["differing"]), found["answers"]["prompts"]
    return f"passed, but {parting} of {prompts} answers part at a near tie" if parting else "passed"


def _difference(each: dict[str, Any]) -> str:
    gap = "one of them has ended" if each["gap"] is None else f"{each['gap']:.2g} apart in PEFT's logits"
    near = ", a near tie" if each["tie"] else ""
    return (f"`{_one_line(each['prompt'])}` differs first at token {each['position']}: `{each['peft']}` in PEFT, "
            f"`{each['exported']}` exported ({gap}{near}).")  # fmt: skip


def _one_line(text: str) -> str:
    return " ".join(text.replace("`", "'").split())
