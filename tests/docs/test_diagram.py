"""The picture of the method is what its script draws."""

import xml.etree.ElementTree as ElementTree

import diagram


def test_the_picture_is_that_of_the_script() -> None:
    assert diagram.OUT.read_text(encoding="utf-8") == diagram.picture(), "run `make docs`"


def test_nothing_lies_outside_the_card() -> None:
    for element in ElementTree.fromstring(diagram.picture()).iter():
        x, width = float(element.get("x", 0)), float(element.get("width", 0))
        y, height = float(element.get("y", 0)), float(element.get("height", 0))
        assert 0 <= x <= x + width <= diagram.WIDTH
        assert 0 <= y <= y + height <= diagram.HEIGHT
