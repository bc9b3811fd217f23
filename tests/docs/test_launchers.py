"""docs/examples: the files for Slurm, SkyPilot and Kubeflow parse, and the commands in them are ours."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from blocks import ROOT, blocks
from typer.main import get_command

from peft_recipes import load_recipe
from peft_recipes.cli.app import app

EXAMPLES = ROOT / "docs" / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.sbatch"))
FILES = sorted(EXAMPLES.iterdir())
PAGE = ROOT / "docs" / "guides" / "launchers.md"
# A command line of ours, up to the end of the line; a backslash continues it.
_COMMAND = re.compile(r"(?:peft-recipes|-m peft_recipes) ((?:[^\n\\]|\\\n)*)")
SETTINGS = {"RECIPE": "smollm2-alpaca", "OUTPUT": "/shared/adapters", "arm": "lora", "seed": "0", "ARMS": "full,lora",
            "SEEDS": "0,1,2", "SKYPILOT_NUM_GPUS_PER_NODE": "4"}  # fmt: skip


def commands(file: Path) -> list[list[str]]:
    """The command lines of ours in a file, with its variables filled in."""
    lines = [line for line in file.read_text("utf-8").splitlines() if not line.lstrip().startswith("#")]
    found = []
    for line in _COMMAND.findall("\n".join(lines)):
        filled = re.sub(r"\$\{?(\w+)\}?", lambda match: SETTINGS[match[1]], line.replace("\\\n", " "))
        found.append(shlex.split(filled.rstrip("'")))
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_command_is_known_with_its_options_recipe_and_arms(file):
    given = commands(file)
    assert given
    for name, *arguments in given:
        command = get_command(app).commands[name]
        context = command.make_context(name, list(arguments))  # raises for an unknown option or a missing argument
        if "recipe" in context.params:
            recipe = load_recipe(context.params["recipe"])
            arms = [context.params["arm"]] if "arm" in context.params else context.params["arms"].split(",")
            assert set(arms) <= set(recipe.arms)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda file: file.name)
def test_a_script_is_bash_and_slurm_reads_its_options(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    lines = script.read_text("utf-8").splitlines()
    assert lines[0] == "#!/bin/bash"
    options = [index for index, line in enumerate(lines) if line.startswith("#SBATCH")]
    first = next(index for index, line in enumerate(lines) if line and not line.startswith("#"))
    assert options and max(options) < first  # Slurm stops reading options at the first command
    assert all(re.fullmatch(r"#SBATCH( --[a-z-]+(=\S+)?)+", lines[index]) for index in options)


@pytest.fixture
def slurm(tmp_path):
    """slurm(script, **variables) runs a script with stand-ins for Slurm's commands: (exit code, their calls)."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("srun", "scontrol", "peft-recipes", "accelerate"):
        text = '#!/bin/bash\necho "$(basename "$0") $*" >> "$CALLS"\n'
        text += {"srun": '"$@"\n', "peft-recipes": 'exit "${CODE:-0}"\n', "scontrol": "echo node0; echo node1\n"}.get(
            name, ""
        )
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)

    def run(script: str, **variables: str) -> tuple[int, list[str]]:
        calls = tmp_path / "calls"
        calls.write_text("")
        env = os.environ | {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "CALLS": str(calls)} | variables
        done = subprocess.run(["bash", str(EXAMPLES / script)], env=env, cwd=tmp_path, check=False)
        return done.returncode, calls.read_text().splitlines()

    return run


def test_the_array_trains_every_arm_with_every_seed_once(slurm):
    first, last = re.search(r"--array=(\d+)-(\d+)", (EXAMPLES / "slurm_array.sbatch").read_text("utf-8")).groups()
    done = [slurm("slurm_array.sbatch", SLURM_ARRAY_TASK_ID=str(task)) for task in range(int(first), int(last) + 1)]
    assert {code for code, _ in done} == {0}
    runs = {re.search(r"--arm (\S+) --seed (\S+)", calls[-1]).groups() for _, calls in done}
    assert runs == {(arm, seed) for arm in ("full", "lora") for seed in "012"} and len(done) == len(runs)


@pytest.mark.parametrize(("code", "requeued"), [("143", True), ("1", False), ("0", False)])
def test_a_run_that_was_stopped_is_queued_again_and_a_failed_one_is_not(slurm, code, requeued):
    exit_code, calls = slurm("slurm_array.sbatch", SLURM_ARRAY_TASK_ID="3", SLURM_JOB_ID="77", CODE=code)
    assert exit_code == int(code) and ("scontrol requeue 77" in calls) == requeued


def test_the_table_follows_from_the_same_arms_seeds_and_folder(slurm):
    code, calls = slurm("slurm_table.sbatch", OUTPUT="/elsewhere")
    assert (
        code == 0 and "peft-recipes compare smollm2-alpaca --arms full,lora --seeds 0,1,2 --output /elsewhere" in calls
    )
    assert calls[-1] == "peft-recipes gallery /elsewhere --output /elsewhere/gallery"
    assert slurm("slurm_table.sbatch", CODE="1")[0] == 1


def test_each_machine_starts_its_own_rank_of_all_processes(slurm):
    variables = {"SLURM_JOB_NODELIST": "node[0-3]", "SLURM_NNODES": "4", "SLURM_PROCID": "2"}
    code, calls = slurm("slurm_nodes.sbatch", **variables)
    assert code == 0 and "--num_machines 4 --num_processes 32 --machine_rank 2 --main_process_ip node0" in calls[-1]
    assert (ROOT / re.search(r"--config_file (\S+)", calls[-1])[1]).is_file()


def test_the_files_of_skypilot_and_kubeflow_have_what_they_need():
    sky = yaml.safe_load((EXAMPLES / "skypilot.yaml").read_text("utf-8"))
    assert set(sky) == {"name", "resources", "envs", "secrets", "file_mounts", "setup", "run"}
    assert sky["secrets"] == {"HF_TOKEN": None} and "/adapters" in sky["file_mounts"]
    job = yaml.safe_load((EXAMPLES / "kubeflow.yaml").read_text("utf-8"))
    assert (job["apiVersion"], job["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    (patch,) = job["spec"]["runtimePatches"]
    (node,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["volumeMounts"][0]["name"] == pod["volumes"][0]["name"]
    for text in (sky["setup"], sky["run"], job["spec"]["trainer"]["args"][0]):
        subprocess.run(["bash", "-n", "-c", text], check=True)


def test_the_command_for_jobs_has_options_of_hf_before_the_file_and_ours_behind_it():
    hf = shutil.which("hf", path=f"{Path(shutil.which('peft-recipes') or '/').parent}{os.pathsep}{os.environ['PATH']}")
    (words,) = [w for block in blocks(PAGE) if block.language == "bash" for w in block.commands() if w[0] == "hf"]
    file = next(index for index, word in enumerate(words) if word.endswith(".py"))
    ours = get_command(app).commands["train"].make_context("train", ["smollm2-alpaca", *words[file + 1 :]])
    assert ours.params["arm"] == "lora" and str(ours.params["output"]) == "/adapters"
    if hf is None:
        pytest.skip("there is no hf here")
    options = [*words[1:file], "--dry-run", "--namespace", "me"]
    env = os.environ | {"HF_TOKEN": "hf_none"}
    done = subprocess.run([hf, *options, *words[file:]], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"args\s+--arm lora --resume --output /adapters", done.stdout) and "/adapters" in done.stdout
