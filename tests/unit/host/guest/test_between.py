"""What must not meet a sampling run is done at once, or at the end of what runs."""

from __future__ import annotations

import logging
import threading

import pytest

from comfy_xdit_patch.host.guest.between import Between
from comfy_xdit_patch.report.log import begin_prompt


@pytest.fixture
def between():
    return Between()


def test_where_nothing_runs_it_is_done_at_once(between):
    done = []
    assert between.do("a change", lambda: done.append(1), "what")
    assert (done, between.waiting("a change")) == ([1], None)
    with pytest.raises(ValueError, match="told"):
        between.do("a change", lambda: int("told"))


def test_it_waits_for_the_outermost_end_and_the_latest_of_a_name_is_done(between):
    done = []
    with between.busy():
        with between.busy():
            assert not between.do("a change", lambda: done.append("first"), "1")
            assert not between.do("another", lambda: done.append("another"))
            assert not between.do("a change", lambda: done.append("second"), "2")
        assert (done, between.waiting("a change")) == ([], "2")
    assert (sorted(done), between.waiting("a change")) == (["another", "second"], None)
    with between.busy():
        """Nothing waits any more."""
    assert len(done) == 2


def test_what_can_be_left_is_done_where_nothing_runs_and_does_not_wait(between):
    done = []
    with between.busy():
        between.unless_busy(lambda: done.append("while busy"))
    assert done == []
    between.unless_busy(lambda: done.append("between"))
    assert done == ["between"]


@pytest.mark.usefixtures("interrupt")
def test_a_fault_in_it_is_logged_and_the_next_is_done(between, caplog):
    begin_prompt()
    done = []
    with caplog.at_level(logging.ERROR), between.busy():
        between.do("a change", lambda: int("planted"))
        between.do("another", lambda: done.append(1))
    assert done == [1]
    assert "a fault of comfy-xdit-patch in a change" in caplog.text


def test_whoever_asks_is_told_that_it_waits_until_it_is_done(between):
    seen = []
    with between.busy():
        between.do("a change", lambda: seen.append(between.waiting("a change")), "what")
    assert seen == ["what"]


def test_a_prompt_that_begins_meanwhile_waits(between):
    begun, may_end, order = threading.Event(), threading.Event(), []

    def change():
        begun.set()
        assert may_end.wait(10)
        order.append("change")

    def prompt():
        with between.busy():
            order.append("prompt")

    threads = [threading.Thread(target=between.do, args=("a change", change))]
    threads[0].start()
    assert begun.wait(10)
    threads.append(threading.Thread(target=prompt))
    threads[1].start()
    threads[1].join(0.1)
    assert order == []
    may_end.set()
    for thread in threads:
        thread.join(10)
    assert order == ["change", "prompt"]
