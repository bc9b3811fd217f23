"""Which attention kernel runs a model's packed batches: of those that are exact on a first batch, the fastest.

A kernel is exact where the packed batch has the padded one's losses. What a model makes of the segments is compared in
fp32; flash attention's kernels take half precision alone, so their own rounding is compared with another kernel's.
Where several are exact, each is timed on a few steps of the first batch (a GPU; on the CPU the first one is fastest).
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from peft_recipes.distributed import processes
from peft_recipes.hardware.device import random_state_kept, release_memory, synchronise
from peft_recipes.kernels.packed_attention import MASK, PARTS, VARLEN, kernels_for
from peft_recipes.runs.files import write_json

if TYPE_CHECKING:
    import torch.nn as nn

    from peft_recipes.data.packing import SharedPrefixCollator

SAME_LOSS = 1e-4  # relative: fp32 rounding over a few hundred positions stays near 1e-6
_SAME_GRADIENTS = {False: 1e-3, True: 5e-2}  # relative, of their norm; by whether the precision is half
_ROUNDING = 3  # a kernel may round so many times as much as one kernel in half precision does against fp32
_TRIAL_STEPS = 3  # timed after one that compiles and one that warms up
_OUT_OF_MEMORY = "it runs out of memory"
_FILE = "packed_attention.json"
_FASTER = 0.95  # of a step's time: by less than 5 % no kernel is preferred to one before it


@dataclass
class AttentionChoice:
    """kernel: the chosen one; None where none is exact. why: in a few words, for run.json.

    gaps: the largest relative difference of an example's loss from the padded batch's, of each kernel that was tried.
    milliseconds: of a step of the first batch, of each kernel that was timed. left_out: why others were not chosen.
    """

    kernel: str | None = None
    why: str = ""
    gaps: dict[str, float] = field(default_factory=dict)
    milliseconds: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """For run.json, without what is empty."""
        return {name: value for name, value in vars(self).items() if value}


@dataclass
class Trial:
    """What is tried: a model, and how a kernel's batch of the same examples is made.

    gap: (model, batch, batch) -> the largest relative difference of an example's loss. losses: (model, batch) -> the
    losses. half: the dtype of a run in half precision; None: fp32. compiled: whether the model will be compiled, which
    takes a BlockMask or a dense mask.
    """

    model: nn.Module
    config: Any
    collator: Callable[[str], SharedPrefixCollator]
    examples: Sequence[dict[str, Any]]
    padded: dict[str, Any]
    gap: Callable[[Any, dict[str, Any], dict[str, Any]], float]
    losses: Callable[[Any, dict[str, Any]], torch.Tensor]
    half: torch.dtype | None = None
    compiled: bool = False

    @property
    def device(self) -> str:
        return next(self.model.parameters()).device.type

    def batch(self, kernel: str) -> dict[str, Any]:
        return self.collator(kernel)(self.examples)

    def autocast(self) -> Any:
        return torch.autocast(self.device, dtype=self.half, enabled=self.half is not None)


def choose_attention(trial: Trial, forced: str | None = None) -> AttentionChoice:
    """Choose the kernel. forced: the recipe's, which is chosen wherever it is exact."""
    choice = AttentionChoice()
    kernels = kernels_for(trial.config, trial.device, trial.half is not None)
    if trial.compiled and trial.device == "cuda":
        kernels = [kernel for kernel in kernels if kernel != VARLEN]
    if forced is not None:
        choice.left_out = dict.fromkeys((kernel for kernel in kernels if kernel != forced), "the recipe sets another")
        kernels = [forced]
    exact = []
    for kernel in kernels:
        try:
            choice.gaps[kernel] = gap = _gap(trial, kernel)
        except torch.OutOfMemoryError:
            if kernel == kernels[-1] and not exact:
                raise
            choice.left_out[kernel] = _OUT_OF_MEMORY
            continue
        if gap <= SAME_LOSS or (kernel == VARLEN and gap <= _rounding(trial)):
            exact.append(kernel)
        else:
            failed = "it fails on a first batch"
            choice.left_out[kernel] = failed if gap == float("inf") else f"its losses differ by {gap:.1e}"
        if exact and trial.device != "cuda":
            break
    if len(exact) > 1:
        _time(trial, exact, choice)
        exact = [kernel for kernel in exact if kernel in choice.milliseconds] or exact[-1:]
        choice.kernel = _fastest(exact, choice.milliseconds)
        choice.why = f"the fastest of {len(exact)} that are exact on a first batch"
    elif exact:
        choice.kernel = exact[0]
        choice.why = "the recipe sets it" if forced else "exact on a first batch"
    return choice


def as_before(
    folders: Sequence[Path], kernel: str | None, choose: Callable[[str | None], Any]
) -> tuple[Any, dict[str, Any] | None]:
    """Choose the recipe's kernel, or the one that a trial ended with before, where that is exact here, or anew.

    Another trial may end otherwise, and a resumed run goes on as it began; the arms of a comparison run alike. folders:
    of the run's checkpoints, and of the comparison. choose: kernel -> a result with `attention`, the choice's facts.
    Returns the result and those facts.
    """
    earlier = {} if kernel else processes.from_rank_zero(lambda: _read(folders))
    chosen = choose(kernel or earlier.get("kernel"))
    if earlier and not (chosen.attention or {}).get("kernel"):
        earlier, chosen = {}, choose(None)
    facts = earlier or chosen.attention
    if facts and facts.get("milliseconds") and processes.is_rank_zero():
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / _FILE, facts)
    return chosen, facts


def _read(folders: Sequence[Path]) -> dict[str, Any]:
    files = (folder / _FILE for folder in folders)
    return next((json.loads(file.read_text()) for file in files if file.is_file()), {})


def _fastest(kernels: Sequence[str], milliseconds: dict[str, float]) -> str:
    best = kernels[0]
    for kernel in kernels[1:]:
        if milliseconds.get(kernel, float("inf")) < _FASTER * milliseconds.get(best, float("inf")):
            best = kernel
    return best


def _gap(trial: Trial, kernel: str) -> float:
    """The gap of a kernel's losses from the padded batch's, in fp32 where the kernel takes it."""
    with _as_sdpa(trial):
        structure = trial.gap(trial.model, trial.batch(PARTS if kernel == VARLEN else kernel), trial.padded)
    if kernel != VARLEN or structure > SAME_LOSS:
        return structure
    with trial.autocast():
        return trial.gap(trial.model, trial.batch(VARLEN), trial.batch(PARTS))


def _rounding(trial: Trial) -> float:
    """How far two exact batches may be apart in half precision: as padded and packed ones are, and some more."""
    with trial.autocast(), _as_sdpa(trial):
        return _ROUNDING * trial.gap(trial.model, trial.batch(PARTS), trial.padded)


@contextlib.contextmanager
def _as_sdpa(trial: Trial) -> Iterator[None]:
    """Run a model of flash attention by sdpa, which takes fp32."""
    implementation = trial.config._attn_implementation
    if "flash" not in implementation:
        yield
        return
    trial.config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        trial.config._attn_implementation = implementation


def _time(trial: Trial, kernels: Sequence[str], choice: AttentionChoice) -> None:
    """Time a step with each kernel; one that fails, or whose gradients differ from most, is left out."""
    norms: dict[str, float] = {}
    for kernel in kernels:
        try:
            choice.milliseconds[kernel], norms[kernel] = _step(trial, kernel)
        except torch.OutOfMemoryError:
            choice.left_out[kernel] = _OUT_OF_MEMORY
        except Exception as error:
            choice.left_out[kernel] = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        finally:
            trial.model.zero_grad(set_to_none=True)
            release_memory(trial.device)
    if not norms:
        return
    # The dense mask is torch's own attention; without it the middle one is as good a measure.
    wanted = norms.get(MASK, sorted(norms.values())[len(norms) // 2])
    for kernel, norm in norms.items():
        if abs(norm - wanted) > _SAME_GRADIENTS[trial.half is not None] * wanted:
            choice.left_out[kernel] = f"its gradients' norm is {norm:.4g} instead of {wanted:.4g}"
            del choice.milliseconds[kernel]


def _step(trial: Trial, kernel: str) -> tuple[float, float]:
    """Milliseconds of a step's forward and backward pass, and the norm of the gradients, of one step."""
    from accelerate.utils import send_to_device

    batch = send_to_device(trial.batch(kernel), next(trial.model.parameters()).device)
    norm, best = 0.0, float("inf")
    with random_state_kept(trial.device), _without_dropout(trial.model):
        for step in range(2 + _TRIAL_STEPS):
            trial.model.zero_grad(set_to_none=True)
            synchronise(trial.device)
            start = time.perf_counter()
            with trial.autocast():
                total = trial.losses(trial.model, batch).sum()
            total.backward()
            synchronise(trial.device)
            best = min(best, time.perf_counter() - start) if step > 1 else best
            if step == 0:
                gradients = [p.grad for p in trial.model.parameters() if p.grad is not None]
                norm = float(torch.linalg.vector_norm(torch.stack([g.float().norm() for g in gradients])))
    return best * 1000, norm


@contextlib.contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    """Kernels may lay a batch out in other rows, so that dropout would give each other gradients."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
