"""Stop texts: found wherever they lie, never given out, not even in part."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from audioflamingo.engine.stopping import StopText


@given(st.text("ab-", max_size=30), st.lists(st.text("ab-", min_size=1, max_size=4), max_size=3), st.data())
def test_pieces_joined_are_what_stands_before_the_first_stop(
    text: str, stops: list[str], data: st.DataObject
) -> None:
    """The stop that is complete first ends the text; the pieces do not matter."""
    watched = StopText(stops)
    given_out, place = "", 0
    while place < len(text) and not watched.is_found:
        size = 1 if stops else data.draw(st.integers(1, 5))
        given_out += watched.put(text[place : place + size])
        place += size
    assert not any(stop in given_out for stop in stops)
    if not watched.is_found:
        given_out += watched.end()
        assert given_out == text
    else:
        assert text.startswith(given_out)
        assert any(text[len(given_out) :].startswith(stop) for stop in stops)
    assert watched.is_found == any(stop in text for stop in stops)


def test_the_start_of_a_stop_is_held_back() -> None:
    watched = StopText(["END", "STOP"])
    assert [watched.put(piece) for piece in ("a E", "N", "x S", "TO", "P later")] == [
        "a ",
        "",
        "ENx ",
        "",
        "",
    ]
    assert watched.is_found
    assert watched.end() == ""
