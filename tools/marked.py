"""Tables between two marks of a page of the documentation."""


def with_table(page: str, name: str, table: str) -> str:
    """The page with ``table`` between ``<!-- NAME: begin -->`` and ``<!-- NAME: end -->``.

    Raises:
        ValueError: the page lacks one of the marks.
    """
    marks = begin_mark, end_mark = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, begin, rest = page.partition(begin_mark)
    _, end, after = rest.partition(end_mark)
    if not begin or not end:
        raise ValueError(f"the page must hold {' and '.join(marks)}")
    return f"{before}{begin}\n{table}\n{end}{after}"
