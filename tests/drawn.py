"""What a reader of a figure would trip over: text that is cut off or runs over its neighbours."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.transforms import Bbox

SLACK = 3.0  # pixels, of 100 an inch


def misplaced(figure: Figure) -> list[str]:
    """Texts that leave the figure or their panel, and texts that overlap; empty if there are none.

    Constrained layout must have placed the panels: where it cannot, that is said first.
    """
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    axes = [axis for axis in figure.axes if axis.get_visible()]
    found = []
    for axis in axes:
        name = axis.get_title()
        panel = axis.get_window_extent(renderer)
        whole = axis.get_tightbbox(renderer)
        assert whole is not None
        if not _holds(figure.bbox, whole):
            found.append(f"past the figure: {name or axis.get_ylabel()}")
        found += [f"past its panel: {text}" for text in _past(axis, panel, renderer)]
        for one in (axis.xaxis, axis.yaxis):
            if _ticks_overlap(one, panel, renderer):
                found.append(f"ticks overlap: {name}, {one.axis_name}")
    for legend in figure.findobj(Legend):
        if not _holds(figure.bbox, legend.get_window_extent(renderer)):
            found.append("past the figure: a legend")
    boxes = [axis.get_tightbbox(renderer) for axis in axes]
    for place, box in enumerate(boxes):
        for other in range(place):
            both = Bbox.intersection(box, boxes[other])  # type: ignore[arg-type]
            if both is not None and min(both.width, both.height) > SLACK:
                found.append(f"overlap: {axes[other].get_title()} and {axes[place].get_title()}")
    return found


def _past(axis: Axes, panel: Bbox, renderer: Any) -> list[str]:
    found = [t.get_text() for t in axis.texts if not _holds(panel, t.get_window_extent(renderer))]
    label = axis.xaxis.label
    if label.get_window_extent(renderer).width > panel.width + SLACK:
        found.append(label.get_text())
    label = axis.yaxis.label
    if label.get_window_extent(renderer).height > panel.height + SLACK:
        found.append(label.get_text())
    return found


def _holds(outer: Bbox, inner: Bbox) -> bool:
    return (
        inner.x0 >= outer.x0 - SLACK
        and inner.x1 <= outer.x1 + SLACK
        and inner.y0 >= outer.y0 - SLACK
        and inner.y1 <= outer.y1 + SLACK
    )


def _ticks_overlap(axis: Axis, panel: Bbox, renderer: Any) -> bool:
    along = int(axis.axis_name == "y")
    low, high = panel.get_points()[:, along]
    ends = []
    for label in axis.get_ticklabels():
        start, end = label.get_window_extent(renderer).get_points()[:, along]
        if label.get_text() and low - SLACK <= (start + end) / 2 <= high + SLACK:
            ends.append((start, end))
    ends.sort()
    return any(after[0] < before[1] for before, after in zip(ends, ends[1:], strict=False))
