"""What a reader of a figure would trip over: text that is cut off or runs over its neighbours."""

from itertools import combinations

from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.transforms import Bbox

SLACK = 3.0  # pixels, of 100 an inch


def misplaced(figure: Figure) -> list[str]:
    """Texts that leave the figure or their panel, and panels that overlap."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    axes = [axis for axis in figure.axes if axis.get_visible()]
    wrong = []
    for axis in axes:
        panel = axis.get_window_extent(renderer)
        for text in axis.texts:
            if not _holds(panel, text.get_window_extent(renderer)):
                wrong.append(f"past its panel: {text.get_text()}")
        for one, side in ((axis.xaxis, "width"), (axis.yaxis, "height")):
            extent = one.label.get_window_extent(renderer)
            if getattr(extent, side) > getattr(panel, side) + SLACK:
                wrong.append(f"past its panel: {one.label.get_text()}")
            if _ticks_overlap(one, panel, renderer):
                wrong.append(f"ticks overlap: {axis.get_title()}, {one.axis_name}")
    boxes = [(axis.get_title(), axis.get_tightbbox(renderer)) for axis in axes]
    for (left, left_box), (right, right_box) in combinations(boxes, 2):
        both = Bbox.intersection(left_box, right_box)
        if both is not None and min(both.width, both.height) > SLACK:
            wrong.append(f"overlap: {left} and {right}")
    boxes += [("legend", one.get_window_extent(renderer)) for one in figure.findobj(Legend)]
    return wrong + [f"past the figure: {n}" for n, box in boxes if not _holds(figure.bbox, box)]


def _holds(outer: Bbox, inner: Bbox) -> bool:
    (x0, y0), (x1, y1) = outer.get_points() + [[-SLACK, -SLACK], [SLACK, SLACK]]
    return x0 <= inner.x0 and y0 <= inner.y0 and inner.x1 <= x1 and inner.y1 <= y1


def _ticks_overlap(axis: Axis, panel: Bbox, renderer: object) -> bool:
    along = int(axis.axis_name == "y")
    low, high = panel.get_points()[:, along]
    ends = []
    for label in axis.get_ticklabels():
        start, end = label.get_window_extent(renderer).get_points()[:, along]
        if label.get_text() and low - SLACK <= (start + end) / 2 <= high + SLACK:
            ends.append((start, end))
    ends.sort()
    return any(after[0] < before[1] for before, after in zip(ends, ends[1:], strict=False))
