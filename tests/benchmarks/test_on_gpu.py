"""benchmarks/on_gpu.py runs whole on the CPU with a tiny model; what it would do on a GPU is listed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
TINY = ["--device", "cpu", "--tiny"]


@pytest.fixture(scope="module")
def on_gpu():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import on_gpu

        yield on_gpu
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def whole(on_gpu, tmp_path_factory):
    """The folder of one whole run on the CPU, and what it holds."""
    out = tmp_path_factory.mktemp("results")
    on_gpu.main(["--out", str(out), "--work", str(out.parent / "work"), "--minutes", "60", *TINY])
    return out, json.loads((out / "on_gpu.json").read_text())["steps"]


def cells(step: dict) -> dict[str, dict]:
    return {cell["cell"]: cell for cell in step["cells"]}


def test_every_step_has_a_result_and_a_file(on_gpu, whole):
    out, steps = whole
    assert list(steps) == [step.name for step in on_gpu.steps_of(tiny=True)]
    for name, made in steps.items():
        assert made["status"] == "ok", (name, made.get("error"))
        assert json.loads((out / "steps" / f"{name}.json").read_text()) == made
        states = {cell["status"] for cell in made["cells"]}
        assert states == ({"not installed"} if name.endswith(("unsloth", "llama-factory")) else {"ok"}), (name, made)


def test_the_result_says_what_it_was_measured_on(whole):
    environment = whole[1]["device"]["environment"]
    assert environment["device"] == "cpu" and environment["precision"] == "fp32" and environment["versions"]["torch"]
    assert environment["device_name"] and environment["installed"].keys() >= {"flash_attn", "liger_kernel", "unsloth"}
    assert all(cell.get("flops_per_second", 1) > 0 for cell in whole[1]["device"]["cells"])


def test_all_tools_see_the_same_tokens_and_have_the_same_losses(whole):
    ours = cells(whole[1]["sft-tiny-lora-peft-recipes"])
    for tool in ("trl-default", "trl-best"):
        for name, theirs in cells(whole[1][f"sft-tiny-lora-{tool}"]).items():
            assert theirs["tokens"] == ours[name]["tokens"] and theirs["matrix_operations"] > 0
            assert theirs["losses"] == pytest.approx(ours[name]["losses"], abs=1e-4), (tool, name)
    packed = cells(whole[1]["sft-tiny-lora-trl-packed"])["alpaca-batch4"]
    assert sum(packed["tokens"]) <= sum(ours["alpaca-batch4"]["tokens"]) and len(packed["losses"]) >= 4
    by_tool = {tool: cells(whole[1][f"dpo-tiny-{tool}"])["alpaca-batch4"] for tool in
               ("peft-recipes", "trl-default", "trl-best")}  # fmt: skip
    for theirs in by_tool.values():
        assert theirs["losses"] == pytest.approx(by_tool["peft-recipes"]["losses"], abs=1e-4)


def test_rows_have_the_length_they_are_named_by(whole):
    assert cells(whole[1]["sft-tiny-lora-peft-recipes"])["64-batch4"]["tokens"] == [4 * 64] * 8


def test_the_plan_is_close_to_the_measured_peak(whole):
    for cell in whole[1]["plan-tiny"]["cells"]:
        assert 0.8 < cell["ratio"] < 1.2, cell


def test_the_host_of_a_packed_step_waits_for_nothing(whole):
    waits = {name: cell["waits_a_step"] for name, cell in cells(whole[1]["waiting-tiny"]).items()}
    assert waits["sft"] == waits["dpo"] == 0 < waits["sft padded"] <= 2


def test_batches_and_lora_layers_are_measured_each_way_with_equal_losses(whole):
    for name, ways in (("loading-tiny", ["in-process", "in-workers"]), ("lora-tiny", ["peft", "one operation"])):
        made = whole[1][name]["cells"]
        assert [cell.get("how", cell.get("way")) for cell in made] == ways
        assert made[0]["losses"] == pytest.approx(made[1]["losses"], abs=1e-5)


def test_an_arm_without_memory_is_a_row_beside_one_that_ran(whole):
    made = whole[1]["out-of-memory"]["cells"][0]
    assert made["arms"] == {"huge": "out-of-memory", "lora": "ok"}
    assert "memory" in made["errors"]["huge"]


def test_one_launched_process_has_a_group_and_the_losses_of_one_without(whole):
    made = whole[1]["launch"]["cells"][0]
    assert (made["backend"], made["world_size"]) == ("gloo", 1) and made["largest_loss_difference"] < 1e-5


def test_gpu_tests_are_counted_in_a_step_a_file(whole):
    found = {name: made["cells"][0] for name, made in whole[1].items() if name.startswith("tests-")}
    assert "tests-training-test-gpu" in found and found["tests-training-test-gpu"]["skipped"] == 7
    assert all(made["failed"] == made["passed"] == 0 for made in found.values())


def test_no_path_of_this_machine_is_in_the_results(whole):
    text = (whole[0] / "on_gpu.json").read_text()
    assert str(ROOT) not in text and str(whole[0]) not in text and str(Path.home()) + "/" not in text


def test_a_step_that_has_a_result_is_kept_also_from_the_one_file_alone(on_gpu, whole, tmp_path, capsys):
    (tmp_path / "on_gpu.json").write_text((whole[0] / "on_gpu.json").read_text())
    on_gpu.main(["--out", str(tmp_path), *TINY])
    said = capsys.readouterr()
    assert said.err.count("kept (ok)") == len(whole[1]) and json.loads(said.out)["left_out"] == []
    on_gpu.main(["--out", str(tmp_path), "--again", "sft-tiny-lora-unsloth", "--only", "sft-*", *TINY])
    assert "sft-tiny-lora-unsloth: ok" in capsys.readouterr().err


def test_a_step_beyond_the_minutes_is_left_out_and_named(on_gpu, tmp_path, capsys):
    on_gpu.main(["--out", str(tmp_path), "--minutes", "0", *TINY])
    said = capsys.readouterr()
    assert json.loads(said.out) == {"device": "cpu", "steps": {},
                                    "left_out": [step.name for step in on_gpu.steps_of(tiny=True)]}  # fmt: skip
    assert "left out, 0.1 min are estimated" in said.err


def test_a_crash_and_a_step_without_end_are_results_and_the_next_step_runs(on_gpu, tmp_path, monkeypatch):
    from gpu import running
    from gpu.steps import Step

    code = {"crash": "import os; os.abort()", "endless": "while True: pass", "fine": "pass"}

    def start(self, words, log, quantised):
        import subprocess

        file, name = words[2], words[0]
        done = f"import json; json.dump({{'step': {name!r}, 'status': 'ok', 'cells': []}}, open({file!r}, 'w'))"
        script = done if name == "fine" else code[name]
        return subprocess.Popen([sys.executable, "-c", script], start_new_session=True)

    monkeypatch.setattr(running.Running, "_start", start)
    monkeypatch.setattr(running, "_LEAST_SECONDS", 0.5)
    made = running.Running(tmp_path, tmp_path, "cpu", True, 5, lambda line: None)
    made.run([Step(name, "x", "", 0.001) for name in code], lambda name: False)
    results = json.loads((tmp_path / "on_gpu.json").read_text())["steps"]
    assert [results[name]["status"] for name in code] == ["failed", "failed", "ok"]
    assert "code -6" in results["crash"]["error"] and "the time limit of 0 s" in results["endless"]["error"]


def test_a_step_without_minutes_left_and_one_that_was_killed_go_on_with_their_next_cell(on_gpu, tmp_path, monkeypatch):
    from gpu import running
    from gpu.step import Result
    from gpu.steps import Step

    step, measured = Step("two", "x", "", 0.001), []

    def start(self, words, log, quantised):
        """A step of two cells, whose first call ends in the second."""
        import subprocess

        result = Result(step, Path(words[2]), tmp_path, "cpu", True)
        result.cell("first", lambda: measured.append(1) or {"tokens": 1})
        if len(measured) == 1:
            return subprocess.Popen([sys.executable, "-c", "while True: pass"], start_new_session=True)
        result.cell("second", lambda: {"tokens": 2})
        result.data["status"] = "ok"
        result.write()
        return subprocess.Popen([sys.executable, "-c", ""], start_new_session=True)

    def call(seconds):
        made = running.Running(tmp_path, tmp_path, "cpu", True, seconds / 60, lambda line: None)
        made.run([step], lambda name: False)
        return made.results["two"]

    monkeypatch.setattr(running.Running, "_start", start)
    made = call(0.5)
    assert made["status"] == "interrupted" and [cell["cell"] for cell in made["cells"]] == ["first"]
    (tmp_path / "steps" / "two.json").unlink()  # the one file alone is enough
    measured.append("again")
    made = call(60)
    assert made["status"] == "ok" and [cell["cell"] for cell in made["cells"]] == ["first", "second"]
    assert measured == [1, "again"]

    file = tmp_path / "killed" / "steps" / "two.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({**made, "status": "running", "cells": made["cells"][:1]}))
    assert not running.read_results(tmp_path / "killed")
    assert list(Result(step, file, tmp_path, "cpu", True).earlier) == ["first"]


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
def test_a_killed_call_leaves_no_step_behind(tmp_path):
    import subprocess

    step = ("import sys, time; sys.path.insert(0, sys.argv[1]); from gpu.step import _end_with_parent; "
            "_end_with_parent(); print('up', flush=True); time.sleep(120)")  # fmt: skip
    call = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]])"
    started = subprocess.Popen([sys.executable, "-c", call, step, str(BENCHMARKS)], stdout=subprocess.PIPE, text=True)
    assert started.stdout.readline() == "up\n"
    started.kill()
    assert started.communicate(timeout=60)[0] == ""  # the pipe's end: nobody holds it any more


def test_runs_on_one_device_are_compared_by_how_many_share_it(on_gpu, tmp_path, monkeypatch):
    from gpu import page, step_parts
    from gpu.step import Result
    from gpu.steps import Step

    import peft_recipes

    def compare(recipe, arms, seeds, output, jobs, overwrite):
        assert list(arms) == ["full", "lora"] and jobs in (1, 2) and overwrite and recipe.training["max_steps"] == 20
        arm = {"status": "ok", "metrics": {"test": {"loss": 1.0}}}
        return type("Made", (), {"data": {"arms": dict.fromkeys(arms, arm)}})

    monkeypatch.setattr(peft_recipes, "compare", compare)
    result = Result(Step("sharing-tiny", "x", "", 1), tmp_path / "one.json", tmp_path, "cpu", True)
    step_parts.sharing(result, "tiny", (1, 2))
    assert [cell["status"] for cell in result.data["cells"]] == ["ok", "ok"], result.data
    assert result.data["cells"][1]["test_losses"] == {"full": 1.0, "lora": 1.0}
    (line,) = page._step_parts({"sharing-tiny": result.data})
    assert "1 at a time 0, 2 at a time 0" in line


def test_the_list_has_every_measurement_that_the_page_promises(on_gpu, capsys):
    on_gpu.main(["--list"])
    lines = capsys.readouterr().out.splitlines()[1:]
    names = [line.split()[0] for line in lines]
    assert names[0] == "device" and names[1].startswith("tests-") and len(set(names)) == len(names)
    for arm in ("full", "lora", "qlora"):
        for tool in ("peft-recipes", "trl-default", "trl-best"):
            assert {f"sft-{shape}-{arm}-{tool}" for shape in ("smollm2-135m", "qwen3-0.6b")} <= set(names)
    assert all(float(line.split()[1]) > 0 for line in lines)


def test_the_list_says_which_steps_have_a_result(on_gpu, whole, capsys):
    on_gpu.main(["--list", "--out", str(whole[0]), "--tiny"])
    lines = capsys.readouterr().out.splitlines()[1:]
    assert all(line.endswith(" s)") and "(ok in " in line for line in lines)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--out DIR is needed"),
        (["--out", "x"], "--device cpu --tiny runs the same steps"),
        (["--out", "x", "--device", "cpu"], "--device cpu needs --tiny"),
        (["--out", "x", "--only", "sft-llama2*"], "no step matches 'sft-llama2*'"),
    ],
)
def test_a_wrong_call_says_what_to_do(on_gpu, words, message, capsys, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        on_gpu.main(words)
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_a_cpus_results_are_not_kept_as_a_gpus(on_gpu, whole, tmp_path, capsys):
    with pytest.raises(SystemExit):
        on_gpu.main(["--out", str(whole[0]), "--keep", "--tiny"])
    assert "these are of a CPU" in capsys.readouterr().err
    on_gpu.main(["--out", str(whole[0]), "--output", str(tmp_path / "one.json"), "--tiny"])
    document = json.loads((tmp_path / "one.json").read_text())
    assert len(document["steps"]) == len(whole[1]) and document["environment"]["device"] == "cpu"


def test_the_page_has_a_row_for_each_cell_and_tool(on_gpu, whole, tmp_path):
    from gpu import page

    on_gpu.main(["--out", str(whole[0]), "--output", str(tmp_path / "one.json"), "--tiny"])
    text = page.block(tmp_path)
    rows = [line for line in text.splitlines() if line.startswith(("| SFT", "| DPO"))]
    assert len(rows) == 7 + 3 + 1 and all(row.count("|") == 8 for row in rows)
    assert "| SFT, tiny Llama, lora, Alpaca x 4 | trl, best flags |" in text and " skipped" in text
    assert "sft 0, " in text and "batches collated: Alpaca x 4 in-process" in text
    assert "huge out-of-memory, lora ok" in text and "one process on gloo" in text and "2 arms" in text


def test_ratios_of_disturbed_steps_are_not_shown_and_memory_that_ran_out_is():
    from gpu import page

    quiet = {"status": "ok", "tokens_per_second": 200.0, "peak_memory_bytes": 2e9, "losses": [1.0, 0.5],
             "matrix_operations": 8e12, "seconds": 2.0}  # fmt: skip
    default = {**quiet, "tokens_per_second": 100.0, "losses": [1.0, 0.501]}
    assert page._figures("peft-recipes", quiet, default, 1e13, 2e13)[3] == "40% (20% of the peak)"
    busy = {**quiet, "disturbance": {"verdict": "disturbed"}}
    assert page._figures("peft-recipes", quiet, default, 1e13) == ["200", "2.00", "2.0 GB", "40%", "1e-03"]
    assert page._figures("peft-recipes", busy, default, 1e13)[:2] == ["200, disturbed", ""]
    assert page._figures("trl-best", {"status": "out-of-memory"}, default, 1e13) == ["out of memory", "", "", "", ""]


def test_without_a_kept_file_the_page_says_that_there_is_no_figure(on_gpu, tmp_path):
    from gpu import page

    assert page.block(tmp_path).startswith("**No figure of a GPU exists yet.**")


def test_ctrl_c_keeps_what_is_finished(on_gpu, tmp_path, monkeypatch, capsys):
    from gpu.running import Running

    def interrupted(self, steps, again):
        raise KeyboardInterrupt

    monkeypatch.setattr(Running, "run", interrupted)
    with pytest.raises(SystemExit) as ended:
        on_gpu.main(["--out", str(tmp_path), *TINY])
    assert ended.value.code == 130 and capsys.readouterr().err.startswith("Interrupted. 0 results are in")


def test_a_folder_holds_the_results_of_one_device(on_gpu, tmp_path, capsys):
    made = {"device": {"status": "ok", "step": "device", "cells": [], "environment": {"device_name": "NVIDIA H100"}}}
    (tmp_path / "on_gpu.json").write_text(json.dumps({"steps": made}))
    with pytest.raises(SystemExit):
        on_gpu.main(["--out", str(tmp_path), *TINY])
    assert "holds results of NVIDIA H100" in capsys.readouterr().err


def test_wheels_are_pins_that_torch_and_transformers_do_not_bring(on_gpu, capsys):
    on_gpu.main(["--wheels", "--python", "3.12"])
    lines = capsys.readouterr().out.splitlines()
    names = {line.partition("==")[0].lower() for line in lines}
    pins = (ROOT / "constraints.txt").read_text()
    assert {"trl", "datasets", "bitsandbytes", "peft"} <= names and not names & {"torch", "transformers", "numpy"}
    assert all(line in pins for line in lines)
    on_gpu.main(["--wheels", "--have", "torch,transformers,peft,trl"])
    assert not {"trl", "datasets", "peft"} & {line.partition("==")[0] for line in capsys.readouterr().out.splitlines()}


def test_the_shapes_are_those_of_the_models_they_are_named_after(on_gpu):
    import torch
    from gpu.workspace import configuration
    from transformers import AutoModelForCausalLM

    counts = {"smollm2-135m": 134_515_008, "qwen3-0.6b": 596_049_920, "llama3-8b": 8_030_261_248}
    for shape, count in counts.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(configuration(shape))
        assert sum(p.numel() for p in model.parameters()) == count, shape


def test_made_rows_have_alpacas_lengths(on_gpu):
    from gpu import workspace

    steps, prefix, share = workspace.alpaca()
    made = workspace.lengths("alpaca", 96)
    assert sum(map(sum, made)) == pytest.approx(sum(steps), rel=0.01) and 20 < prefix < 30
    assert sum(answer for _, answer in made) / sum(map(sum, made)) == pytest.approx(share, abs=0.02)
