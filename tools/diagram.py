"""Draws docs/images/idea.svg, the picture of the method: `make docs` calls it.

The picture has a light card of its own behind it, so it is legible on light and dark pages.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

OUT = Path(__file__).resolve().parent.parent / "docs" / "images" / "idea.svg"
WIDTH, HEIGHT = 960, 312
INK, QUIET, DASHED = "#1f2933", "#52606d", "#b4500b"
PLAIN, BLUE, ORANGE, GREEN = "#eef1f4", "#d7e6f5", "#ffe2c6", "#d8eedd"


def box(x: int, y: int, width: int, height: int, fill: str, *lines: str) -> str:
    """A rounded box with a bold first line and quieter lines below it."""
    parts = [
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" fill="{fill}" '
        f'stroke="{QUIET}"/>'
    ]
    top = y + height / 2 - 8 * (len(lines) - 1) + 5
    for number, line in enumerate(lines):
        look = f'font-weight="600" fill="{INK}"' if number == 0 else f'font-size="12" fill="{INK}"'
        parts.append(
            f'<text x="{x + width / 2:g}" y="{top + 17 * number:g}" text-anchor="middle" {look}>'
            f"{escape(line)}</text>"
        )
    return "".join(parts)


def arrow(path: str, dashed: bool = False) -> str:
    """A line with a head; dashed ones are the trial step."""
    look = f'stroke="{DASHED}" stroke-dasharray="6 5"' if dashed else f'stroke="{QUIET}"'
    head = "dashed-head" if dashed else "head"
    return f'<path d="{path}" fill="none" stroke-width="2" {look} marker-end="url(#{head})"/>'


def note(x: int, y: int, text: str, colour: str = QUIET) -> str:
    return (
        f'<text x="{x}" y="{y}" text-anchor="middle" font-size="12" fill="{colour}">'
        f"{escape(text)}</text>"
    )


def marker(name: str, colour: str) -> str:
    return (
        f'<marker id="{name}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" '
        f'markerHeight="7" orient="auto-start-reverse"><path d="M0 0 10 5 0 10z" '
        f'fill="{colour}"/></marker>'
    )


def picture() -> str:
    """The whole SVG file."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="14" role="img" '
        'aria-label="Two views go through the backbone; the mask weighs each feature dimension; '
        "two heads and their losses follow. A trial step leads from the contrastive loss back to "
        'the mask.">',
        f"<defs>{marker('head', QUIET)}{marker('dashed-head', DASHED)}</defs>",
        f'<rect x="1" y="1" width="{WIDTH - 2}" height="{HEIGHT - 2}" rx="14" fill="#ffffff" '
        'stroke="#d0d7de"/>',
        box(28, 62, 96, 50, PLAIN, "view 1"),
        box(28, 136, 96, 50, PLAIN, "view 2"),
        note(76, 212, "two random crops"),
        note(76, 228, "of each image"),
        arrow("M124 87 L170 112"),
        arrow("M124 161 L170 136"),
        box(174, 92, 124, 64, BLUE, "backbone", "ResNet, ViT, …"),
        arrow("M298 124 L376 124"),
        note(337, 114, "features"),
        box(380, 82, 140, 84, ORANGE, "mask", "one weight for", "each dimension"),
        arrow("M520 112 L584 82"),
        arrow("M520 136 L584 168"),
        box(588, 50, 138, 56, BLUE, "redundancy head"),
        box(588, 142, 138, 56, BLUE, "contrastive head"),
        arrow("M726 78 L774 78"),
        arrow("M726 170 L774 170"),
        box(778, 50, 154, 56, GREEN, "Barlow Twins loss", "no repeated dimensions"),
        box(778, 142, 154, 56, GREEN, "NT-Xent loss", "views find each other"),
        note(838, 34, "their sum trains backbone and heads"),
        arrow("M855 198 L855 262 L734 262", dashed=True),
        box(500, 232, 230, 60, PLAIN, "trial step", "on a copy; the weights stay"),
        arrow("M500 262 L450 262 L450 170", dashed=True),
        note(330, 254, "the mask changes so that the", DASHED),
        note(330, 271, "NT-Xent loss after the step is lower", DASHED),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(picture(), encoding="utf-8")
