"""Train several adapter runs of a recipe in this process, on one resident base: `train_together`.

Which arms can be trained so: `why_alone`. How: shared_base.py.
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Collection, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from peft_recipes.errors import causes
from peft_recipes.recipe.arm import Arm
from peft_recipes.recipe.recipe import Recipe
from peft_recipes.runs.folder import Run
from peft_recipes.training.interruption import EXCEPTIONS, Interruption, interruptible
from peft_recipes.training.run import train
from peft_recipes.training.shared_base import Member, SharedBase

TASKS = ("sft", "language-modeling", "text-classification")


def why_alone(recipe: Recipe, arm: Arm) -> str | None:
    """Why an arm's runs need a base of their own, in a few words; None where they can share one."""
    config, training = arm.peft, recipe.training
    if recipe.task not in TASKS:
        return f"the task is {recipe.task}"
    if config is None:
        return "it trains weights of the base"
    if arm.method_name != "LORA":
        return f"its method is {arm.method_name}"
    if arm.quantise:
        return "its base is quantised"
    if config.bias != "none":
        return "it trains biases of the base"
    if config.init_lora_weights not in (True, False, "gaussian", "orthogonal"):
        return f"init_lora_weights '{config.init_lora_weights}' changes the base"
    for name in ("target_parameters", "trainable_token_indices", "layer_replication", "alora_invocation_tokens"):
        if getattr(config, name, None):
            return f"its config has {name}"
    for name in ("gradient_checkpointing", "torch_compile", "neftune_noise_alpha", "auto_find_batch_size"):
        if training.get(name):
            return f"training.{name} is set"
    if recipe.dataset.streaming:
        return "its data is streamed"
    return None


class _Interruptions(Interruption):
    """The signal of a process, for all runs that train in it: each ends after a step of its own."""

    def __init__(self, members: Collection[Member]):
        super().__init__()
        self.deferred, self._members = True, members

    def handle(self, number: int, frame: FrameType | None) -> None:
        super().handle(number, frame)
        for member in self._members:
            if member.interruption is not None:
                member.interruption.received = self.received


def train_together(
    recipe: Recipe, jobs: Sequence[tuple[str, int]], *, output: str | Path = "adapters", **options: Any
) -> dict[tuple[str, int], Run | BaseException]:
    """Train runs, each an arm and a seed, in lockstep on one base; return each one's run, or what stopped it.

    Each gets the losses, weights and run folder of `train` alone (up to rounding). Times and memory are those of all
    together: run.json says so in environment.shared_base. options: of `train`. Raises KeyboardInterrupt or Terminated
    after SIGINT or SIGTERM, once every run that trains has written a checkpoint; a second signal raises at once, with
    the runs still going.
    """
    shared, outcomes = SharedBase(len(jobs)), {}
    members = {job: Member(shared) for job in jobs}
    for member in members.values():
        shared.lockstep.add(member)

    def run(job: tuple[str, int]) -> None:
        with shared.lockstep.turn():
            try:
                outcomes[job] = train(recipe, job[0], seed=job[1], output=output, shared=members[job], **options)
            except BaseException as error:
                for cause in causes(error):  # the frames hold its model and batch, while the other runs go on
                    traceback.clear_frames(cause.__traceback__)
                outcomes[job] = error
            finally:
                shared.lockstep.leave(members[job])

    # Daemons: after a second signal the process ends without them.
    threads = [threading.Thread(target=run, args=(job,), name=f"{job[0]}, seed {job[1]}", daemon=True) for job in jobs]
    interruption = shared.interruption = _Interruptions(members.values())
    with interruptible(interruption):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if interruption.received is not None:
        raise EXCEPTIONS[interruption.received]
    return {job: outcomes[job] for job in jobs}
