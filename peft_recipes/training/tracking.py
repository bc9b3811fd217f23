"""Report a run to the trackers that its recipe names (training.report_to): steps, validation, final figures, card."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from peft_recipes.cards.write import CARD
from peft_recipes.runs.files import write_json
from peft_recipes.trackers import choice
from peft_recipes.trackers.figures import configuration, final_metrics, last_step
from peft_recipes.trackers.session import PLACES_FILE, Session, closing, read_places
from peft_recipes.trackers.tensorboard import EVENTS
from peft_recipes.trackers.tracker import FINISHED, KILLED

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from peft_recipes.runs.checkpoints import Checkpoint
    from peft_recipes.training.setup import Setup

_EVENTS = (
    "on_init_end", "on_train_begin", "on_epoch_begin", "on_step_end", "on_log", "on_evaluate", "on_save",
    "on_epoch_end", "on_train_end",
)  # fmt: skip


class TrackingCallback(TrainerCallback):
    """Pass the events of training to the trackers; later evaluations have events of their own, which are not."""

    def __init__(self, session: Session):
        self.session, self._training = session, False

    def pass_on(self, name: str, args: Any, state: Any, control: Any, more: dict[str, Any]) -> None:
        self._training = self._training or name == "on_train_begin"
        if self._training or name == "on_init_end":
            self.session.event(name, args, state, control, **more)
        self._training = self._training and name != "on_train_end"


def _method(name: str) -> Any:
    def passed_on(self: TrackingCallback, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.pass_on(name, args, state, control, more)

    return passed_on


for _name in _EVENTS:
    setattr(TrackingCallback, _name, _method(_name))


def kept_files(folder: Path) -> list[str]:
    """The names of a tracker's own files in a run's folder, which a resumed run continues."""
    return [path.name for path in folder.glob(f"{EVENTS}*")]


def earlier_places(setup: Setup) -> dict[str, Any]:
    """Where the tracker runs of the unfinished run that this one continues are."""
    return read_places(setup.run.folder, setup.signature) if setup.run.resume else {}


def open_session(
    setup: Setup, places: dict[str, Any], checkpoint: Checkpoint | None, held: contextlib.ExitStack
) -> None:
    """Open the trackers of a run until `held` is closed; write where their runs are to the run's folder."""
    recipe, run = setup.recipe, setup.run
    names = choice.requested(recipe.training)
    if not names:
        return
    session = Session(names, choice.identity(recipe.training, recipe.name, run.arm, run.seed), run.folder)
    held.enter_context(closing(session))
    with setup.watch("trackers"):
        plain = configuration(recipe.to_dict(), run.arm, run.seed)
        session.open(plain, places, checkpoint.step if checkpoint else 0)
    write_json(run.folder / PLACES_FILE, {"signature": setup.signature, "places": session.places})
    setup.session = session


def callbacks(setup: Setup, arguments: TrainingArguments) -> list[TrainerCallback]:
    """The callback of a run that reports to trackers; `arguments` get the run's names, which some callbacks use."""
    if setup.session is None:
        return []
    names = choice.identity(setup.recipe.training, setup.recipe.name, setup.run.arm, setup.run.seed)
    arguments.project, arguments.run_name = names.project, names.name_in(names.project)
    return [TrackingCallback(setup.session)]


def finish_session(setup: Setup, data: dict[str, Any]) -> bool:
    """Report the final figures of a run and its card, and end its tracker runs; return whether `data` has changed.

    data: the content of run.json, which gets a note for each tracker that failed.
    """
    session = setup.session
    if session is None:
        return False
    alone = setup.run.data is None  # a comparison adds the cards, which it writes at its end
    with setup.watch("trackers"):
        session.add(final_metrics(data), {}, [setup.run.folder / CARD] if alone else [], last_step(data))
        session.close(FINISHED)
    for name in session.ended:
        session.places[name]["complete"] = True
    data |= facts(setup)
    data["notes"] = [*data["notes"], *session.notes]
    (setup.run.folder / PLACES_FILE).unlink(missing_ok=True)  # run.json has them
    return True


def pause_session(setup: Setup) -> None:
    """Close the tracker runs of a paused run, which its next chunk opens again."""
    if setup.session is not None:
        setup.session.close(KILLED)


def facts(setup: Setup) -> dict[str, Any]:
    """The entry of run.json: of each tracker, the id of its run and its address without credentials."""
    return {} if setup.session is None else {"trackers": setup.session.places}
