"""Stop strings: the same result however the text is cut, and never a letter of a stop string too many."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bmojo_edge.stopping import StopStrings

SMALL = st.text(st.sampled_from("abé"), min_size=1, max_size=4)


def naive(text: str, stops: list[str]) -> tuple[str, bool]:
    """Letter by letter: the text before the first stop string that is complete."""
    for end in range(1, len(text) + 1):
        complete = [s for s in stops if text[:end].endswith(s)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


@given(text=st.text(st.sampled_from("abé"), max_size=30), stops=st.lists(SMALL, max_size=3), data=st.data())
def test_any_cut_gives_the_text_before_the_first_stop(text: str, stops: list[str], data: st.DataObject) -> None:
    expected, hit = naive(text, stops)
    stop, shown, rest = StopStrings(stops), "", text
    while rest:
        n = data.draw(st.integers(1, len(rest)))
        shown += stop.feed(rest[:n])
        rest = rest[n:]
        assert expected.startswith(shown)  # nothing that would have to be taken back
    assert (shown + stop.finish(), stop.hit) == (expected, hit)


def test_only_what_may_begin_a_stop_is_held_back() -> None:
    stop = StopStrings(["</end>", "###"])
    assert [stop.feed(piece) for piece in ("a", "b<", "/e", "x#", "#y")] == ["a", "b", "", "</ex", "##y"]


def test_one_string_is_one_stop() -> None:
    stop = StopStrings("ab")
    assert stop.feed("xa") + stop.feed("yab!") == "xay"
    assert stop.hit
    assert stop.feed("more") + stop.finish() == ""


@pytest.mark.parametrize("bad", ["", ["a", ""], [3], [None]])
def test_stops_are_checked(bad: Any) -> None:
    if bad == "":
        bad = [bad]
    with pytest.raises(ValueError, match="stop: must be strings of at least one character"):
        StopStrings(bad)


def test_the_empty_string_alone_is_refused_too() -> None:
    with pytest.raises(ValueError, match="stop: "):
        StopStrings("")
