"""Every figure of a comparison, in the report's order. A new one: a builder that gives a `Plot` or None, named here."""

from __future__ import annotations

import io

from peft_recipes.reporting import details, figure_style
from peft_recipes.reporting.arm_plots import against_full, checkpoint_bars, forgetting, memory_bars
from peft_recipes.reporting.curves import loss_curves, validation_curves
from peft_recipes.reporting.facts import Comparison
from peft_recipes.reporting.figure_style import Plot
from peft_recipes.reporting.quality_plots import quality_by_parameters, quality_by_time, rank_curve

BUILDERS = (
    against_full,
    quality_by_parameters,
    loss_curves,
    validation_curves,
    quality_by_time,
    rank_curve,
    forgetting,
    memory_bars,
    checkpoint_bars,
)
NAMES = (
    "difference",
    "parameters",
    "loss",
    "validation",
    "time",
    "rank",
    "forgetting",
    "memory",
    "checkpoint",
    "samples",
)


def plots(comparison: Comparison) -> list[Plot]:
    """Every figure that the comparison has data for, in the report's order."""
    with figure_style.look():
        built = [build(comparison) for build in BUILDERS]
    return [plot for plot in built if plot is not None]


def sample_sheet(comparison: Comparison) -> Plot | None:
    """The sample images in two rows, before and after the shift, for the Markdown (the page shows them itself)."""
    found = details.samples(comparison)[:8]
    if not found:
        return None
    with figure_style.look():
        from matplotlib.figure import Figure
        from matplotlib.image import imread

        figure = Figure(figsize=(figure_style.WIDTH, figure_style.WIDTH / len(found) * 2 + 0.5), layout="constrained")
        cells = figure.subplots(2, len(found), squeeze=False)
        for column, sample in enumerate(found):
            for row, image in enumerate((sample.before, sample.after)):
                axes = cells[row][column]
                axes.imshow(imread(io.BytesIO(image)), cmap="gray", interpolation="nearest")
                axes.set(xticks=[], yticks=[])
            cells[0][column].set_title(sample.label, fontsize=11)
        cells[0][0].set_ylabel("before")
        cells[1][0].set_ylabel("after")
    alt = (
        f"{len(found)} examples, above before and below after the shift: {', '.join(sample.label for sample in found)}."
    )
    return Plot("samples", "Examples before and after the shift", "", alt, figure)
