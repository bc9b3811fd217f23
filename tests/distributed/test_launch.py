"""Launch configurations, batch splitting, the order of examples, several jobs at a time; all in one process."""

from __future__ import annotations

import itertools

import pytest
from torch.utils.data import SequentialSampler

from peft_recipes import RecipeError, compare
from peft_recipes.distributed.batches import effective_batch_size, split_batch
from peft_recipes.distributed.launch import check_installed, launch_files, read_launch
from peft_recipes.tasks.step_sampler import StepShardSampler


def test_accelerates_parser_reads_the_shipped_configurations():
    launches = {name: read_launch(name) for name in launch_files()}
    types = {name: launch.distributed_type for name, launch in launches.items()}
    assert types == {"ddp": "DDP", "fsdp2": "FSDP2", "deepspeed_zero2": "ZeRO-2"}
    assert all(launch.processes == 2 for launch in launches.values())
    assert read_launch("fsdp2", 8).processes == 8
    command = read_launch("ddp", 4).command("peft_recipes.comparison.worker", "r.yaml")
    assert command[command.index("--num_processes") + 1] == "4"
    assert command[-3:] == ["-m", "peft_recipes.comparison.worker", "r.yaml"]


def test_accelerate_launch_validates_the_shipped_configurations():
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    for name, flag in (("ddp", "multi_gpu"), ("fsdp2", "use_fsdp"), ("deepspeed_zero2", "use_deepspeed")):
        parsed = launch_command_parser().parse_args(["--config_file", str(launch_files()[name]), "train.py"])
        checked, defaults, _ = _validate_launch_command(parsed)
        assert getattr(checked, flag) is True and checked.num_processes == 2 and defaults is not None
        if name == "fsdp2":
            assert str(checked.fsdp_version) == "2" and checked.fsdp_auto_wrap_policy == "TRANSFORMER_BASED_WRAP"
        if name == "deepspeed_zero2":
            assert checked.zero_stage == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("distributed_type: MULTI_GPU\nnum_machines: 4\nnum_processes: 32\n", "4 machines.*on each"),
        ("distributed_type: FSDP\nfsdp_config: {fsdp_version: 1}\n", "FSDP of version 1 is not supported.*fsdp2"),
        ("distributed_type: DEEPSPEED\ndeepspeed_config: {zero_stage: 3}\n", "beyond ZeRO-2"),
        ("distributed_type: 'NO'\n", "NO is not supported"),
        ("distributed_type: MULTI_GPU\nnum_process: 2\n", "can't read it.*num_process"),
        ("distributed_type: MULTI_GPU\nnum_processes: 1\n", "needs 2 processes or more, got 1"),
        ("distributed_type: [\n", "not valid YAML"),
    ],
)
def test_an_unsupported_configuration_says_why(tmp_path, text, message):
    file = tmp_path / "mine.yaml"
    file.write_text(f"compute_environment: LOCAL_MACHINE\nmixed_precision: 'no'\nuse_cpu: false\n{text}")
    with pytest.raises(RecipeError, match=message):
        read_launch(file)


def test_a_comparison_refuses_an_impossible_launch_before_it_writes(classify, tmp_path, monkeypatch):
    cases = [
        ({"launch": "fspd2"}, "Did you mean 'fsdp2'"),
        ({"launch": "ddp", "jobs": 2}, "contradict each other"),
        ({"processes": 2}, "--launch ddp"),
        ({"launch": "ddp", "processes": 3}, r"16 a step, which 3 processes can't share evenly. The nearest.* 15 "),
        ({"jobs": 0}, "--jobs 0"),
        ({"jobs": "two"}, "--jobs two: expected a whole number of 1 or more, or auto"),
    ]
    for options, message in cases:
        with pytest.raises(RecipeError, match=message):
            compare(classify(), ["lora"], output=tmp_path / "o", **options)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match="pip install deepspeed"):
        check_installed(read_launch("deepspeed_zero2"))
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("batch", "accumulated", "processes", "split"),
    [(8, 1, 2, (4, 1)), (8, 4, 2, (8, 2)), (8, 1, 8, (1, 1)), (6, 3, 2, (3, 3)), (1, 8, 4, (1, 2)), (4, 2, 1, (4, 2))],
)
def test_splitting_keeps_the_effective_batch_size(batch, accumulated, processes, split):
    training = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated}
    assert split_batch(training, processes) == split
    assert split[0] * split[1] * processes == effective_batch_size(training) and split[0] <= batch


def test_an_indivisible_batch_names_the_nearest_divisible_one():
    with pytest.raises(RecipeError, match=r"8 a step, which 3 .* 9 \(--set training\..*=9 .*; or 2 processes"):
        split_batch({}, 3)
    with pytest.raises(RecipeError, match="The nearest that they can: 16 "):
        split_batch({}, 16)


@pytest.mark.parametrize("examples", [1, 5, 16, 33, 43])
@pytest.mark.parametrize(("batch", "accumulated"), [(8, 1), (4, 2), (2, 4)])
@pytest.mark.parametrize("processes", [2, 4])
def test_the_ranks_together_see_the_steps_of_one_process(examples, batch, accumulated, processes):
    each, steps = split_batch(
        {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated}, processes
    )
    shares = [StepShardSampler(SequentialSampler(range(examples)), each, steps, processes, i) for i in range(processes)]
    made = [list(share) for share in shares]
    assert {len(batches) for batches in made} == {len(shares[0])}  # every rank has as many batches
    seen = []
    for number in range(0, len(shares[0]), steps):
        step = [place for batches in made for part in batches[number : number + steps] for place in part]
        real = sorted(place for place in step if place >= 0)
        assert real == list(range(len(seen), min(len(seen) + batch * accumulated, examples)))  # the same step
        assert all(len(part) <= each for batches in made for part in batches)
        seen += real
    assert seen == list(range(examples))
    ignored = [part for part in itertools.chain(*made) if part[0] < 0]
    assert all(len(part) == 1 for part in ignored)  # a rank without examples gets one whose labels are ignored


def test_two_jobs_at_a_time_are_noted_in_the_comparison(classify, tmp_path, monkeypatch):
    monkeypatch.setattr("peft_recipes.planning.together.cpu_cores", lambda: 2)
    recipe = classify().with_changes({"training": {"num_train_epochs": 1}})
    events = []
    made = compare(recipe, ["full", "lora"], output=tmp_path, jobs="auto", on_progress=events.append)
    assert made.failed == [] and set(made.data["arms"]) == {"full", "lora"}
    first_end = next(i for i, event in enumerate(events) if event.state == "ok")
    assert len({event.job for event in events[:first_end]}) == 2  # both had started before one ended
    assert any("2 runs at a time shared this machine" in note for note in made.data["notes"])
    assert made.data["environment"]["jobs"] == 2
    assert "2 runs at a time" in (made.folder / "comparison.md").read_text()


def test_what_fsdp2_can_not_shard_names_ddp(classify):
    from peft_recipes import Arm
    from peft_recipes.distributed.batches import check_shardable

    recipe = classify(arms={"full": Arm(), "head": Arm("head")})
    check_shardable(recipe, "full", "FSDP2")
    recipe.task = "image-classification"
    check_shardable(recipe, "head", "FSDP2")
    check_shardable(recipe, "full", "DDP")
    with pytest.raises(RecipeError, match=r"patch embedding of an image model.*Launch with ddp"):
        check_shardable(recipe, "full", "FSDP2")
