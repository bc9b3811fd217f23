"""All plots of a comparison, in the report's order. To add one, add a builder that returns a `Plot` or None here."""

from __future__ import annotations

import io

from peft_recipes.reporting import details, figure_style
from peft_recipes.reporting.arm_plots import against_full, checkpoint_bars, forgetting, memory_bars
from peft_recipes.reporting.curves import loss_curves, validation_curves
from peft_recipes.reporting.facts import Comparison
from peft_recipes.reporting.figure_style import Plot
from peft_recipes.reporting.quality_plots import quality_by_parameters, quality_by_time, rank_curve

BUILDERS = {
    "difference": against_full,
    "parameters": quality_by_parameters,
    "loss": loss_curves,
    "validation": validation_curves,
    "time": quality_by_time,
    "rank": rank_curve,
    "forgetting": forgetting,
    "memory": memory_bars,
    "checkpoint": checkpoint_bars,
}
NAMES = (*BUILDERS, "samples")
PROVISIONAL = ("difference", "loss", "validation")  # what changes while runs are trained


def plots(comparison: Comparison) -> list[Plot]:
    """Return every plot that the comparison has data for; of a provisional one those of `PROVISIONAL`."""
    names = PROVISIONAL if comparison.get("provisional") else BUILDERS
    with figure_style.look():
        built = [BUILDERS[name](comparison) for name in names]
    return [plot for plot in built if plot is not None]


def sample_sheet(comparison: Comparison) -> Plot | None:
    """Return the sample images for the Markdown report, before the shift above after it; the HTML page embeds them."""
    samples = details.samples(comparison)[:8]
    if not samples:
        return None
    with figure_style.look():
        from matplotlib.figure import Figure
        from matplotlib.image import imread

        width = figure_style.WIDTH
        figure = Figure(figsize=(width, width / len(samples) * 2 + 0.5), layout="constrained")
        cells = figure.subplots(2, len(samples), squeeze=False)
        for column, sample in enumerate(samples):
            for row, image in enumerate((sample.before, sample.after)):
                axes = cells[row][column]
                axes.imshow(imread(io.BytesIO(image)), cmap="gray", interpolation="nearest")
                axes.set(xticks=[], yticks=[])
            cells[0][column].set_title(sample.label, fontsize=11)
        cells[0][0].set_ylabel("before")
        cells[1][0].set_ylabel("after")
    labels = ", ".join(sample.label for sample in samples)
    alt = f"{len(samples)} examples, above before and below after the shift: {labels}."
    return Plot("samples", "Examples before and after the shift", "", alt, figure)
