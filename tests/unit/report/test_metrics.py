"""The status as Prometheus reads it."""

from __future__ import annotations

import pytest
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families as parsed

from comfy_xdit_patch.report.metrics import metrics_text
from comfy_xdit_patch.report.schema import Counts, Memory, RankStatus, Reason, Speedup, Status


def rank(number, **more):
    facts = {name: None for name in RankStatus.__slots__}
    facts |= {"rank": number, "device": "cuda:0", "name": "a GPU", "state": "ready"}
    facts |= {"restarts": 1, "memory": Memory(4, 3, 1, 2), "busy_share": 0.5, "forwards": 7}
    return RankStatus(**(facts | {"busy_total_s": 2.5} | more))


STATUS = Status(
    state="computing",
    ranks=[rank(0, utilisation=0.25), rank(1)],
    totals=Counts(steps_parallel=7, steps_fell_back=2, steps_chose_one_gpu=3, bytes_to_workers=9),
    fell_back=[Reason('a node put "x"\nin the way', 2, None)],
    speedup=Speedup(1.5, 1.0, 60.0),
)


def samples(text):
    return {
        (each.name, *sorted(each.labels.items())): each.value
        for family in parsed(text.decode())
        for each in family.samples
    }


@pytest.mark.parametrize(
    ("sample", "value"),
    [
        (("xdit_state", ("state", "computing")), 1),
        (("xdit_state", ("state", "broken")), 0),
        (("xdit_ranks",), 2),
        (("xdit_steps_total", ("how", "parallel")), 7),
        (("xdit_steps_total", ("how", "fell_back")), 2),
        (("xdit_steps_total", ("how", "chose_one_gpu")), 3),
        (("xdit_fall_backs_total", ("reason", 'a node put "x"\nin the way')), 2),
        (("xdit_moved_bytes_total", ("way", "to_workers")), 9),
        (("xdit_speedup_ratio",), 1.5),
        (("xdit_rank_memory_bytes", ("kind", "used"), ("rank", "1")), 3),
        (("xdit_rank_utilisation_ratio", ("rank", "0")), 0.25),
        (("xdit_rank_busy_seconds_total", ("rank", "1")), 2.5),
        (("xdit_rank_restarts_total", ("rank", "0")), 1),
    ],
)
def test_a_figure_of_the_status_is_a_sample(sample, value):
    assert samples(metrics_text(STATUS, is_short=False))[sample] == value


def test_what_is_unknown_has_no_sample():
    found = samples(metrics_text(STATUS, is_short=False))
    assert ("xdit_rank_utilisation_ratio", ("rank", "1")) not in found
    assert ("xdit_step_seconds",) not in found


def test_units_and_counters_are_named_as_prometheus_wants_them():
    for family in parsed(metrics_text(STATUS, is_short=False).decode()):
        assert family.documentation, family.name
        assert family.type in ("counter", "gauge"), family.name
        for each in family.samples:
            assert each.name.endswith("_total") is (family.type == "counter"), each.name


def test_nothing_is_registered_for_the_process():
    before = {each.name for each in REGISTRY.collect()}
    metrics_text(STATUS, is_short=False)
    assert {each.name for each in REGISTRY.collect()} == before
