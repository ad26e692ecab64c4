"""The broken builds of the chaos test: each still finds in the service what it replaces."""

import multiprocessing
from inspect import getmembers, isfunction

import pytest

from chaos import breaks

BREAKS = {
    name: made
    for name, made in getmembers(breaks, isfunction)
    if made.__module__ == breaks.__name__ and not name.startswith("_")
}


@pytest.mark.parametrize("name", BREAKS)
def test_each_broken_build_finds_what_it_breaks(name: str) -> None:
    """In a process of its own, since it stays broken."""
    process = multiprocessing.get_context("fork").Process(target=BREAKS[name])
    process.start()
    process.join(timeout=10)

    assert process.exitcode == 0


def test_there_are_as_many_as_the_document_says() -> None:
    assert len(BREAKS) == 15
