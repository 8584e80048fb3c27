"""Who is told everything, and what others are told."""

from __future__ import annotations

import asyncio
import json
from contextlib import nullcontext

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer, make_mocked_request
from prometheus_client.parser import text_string_to_metric_families as parsed

from comfy_xdit_patch.errors import HttpError
from comfy_xdit_patch.host.guest import routes
from comfy_xdit_patch.host.guest.settings_routes import check
from comfy_xdit_patch.report.schema import Counts, Reason, Status

STATUS = Status(
    state="broken",
    reason="Rank 1 (pid 42) is gone. /tmp/logs",
    settings={"XDIT_GPUS": "cpu:2"},
    totals=Counts(steps_parallel=7, steps_fell_back=2, loads=3),
    fell_back=[Reason("a node put SecretNode around the whole model", 2, "Bypass it.")],
)


@pytest.mark.parametrize(
    ("address", "is_ours"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        (None, True),
        ("", True),
        ("192.168.0.7", False),
        ("::ffff:192.168.0.7", False),
        ("fe80::1%eth0", False),
        ("10.0.0.1", False),
        ("somebody", False),
    ],
)
def test_loopback_is_this_machine_and_nothing_else_is(address, is_ours):
    assert routes.is_of_this_machine(address) is is_ours


@pytest.mark.parametrize(
    ("peer", "host", "may"),
    [
        ("127.0.0.1", "localhost:8188", True),
        ("::ffff:127.0.0.1", "localhost:8188", True),  # A server that listens on "::".
        ("::1", "[::1]:8188", True),
        ("::ffff:192.168.0.7", "localhost:8188", False),
        ("127.0.0.1", "mine.example:8188", False),
        ("", "localhost", False),
    ],
)
def test_whoever_comes_over_loopback_may_change_settings(peer, host, may):
    request = make_mocked_request(
        "POST", "/xdit/settings", headers={"Host": host, "Content-Type": "application/json"}
    ).clone(remote=peer)
    with nullcontext() if may else pytest.raises(HttpError, match="Only this machine"):
        check(request, takes_remote=False)


def answers(*, is_open: bool) -> list[str]:
    """What status and metrics say over HTTP."""

    class Server:
        routes = web.RouteTableDef()

    async def ask() -> list[str]:
        routes.add_routes(Server, lambda: STATUS, lambda: is_open)
        app = web.Application()
        app.add_routes(Server.routes)
        async with TestClient(TestServer(app)) as client:
            found = [await client.get(f"/xdit/{name}") for name in ("status", "metrics")]
            assert [each.status for each in found] == [200, 200]
            assert found[1].headers["Content-Type"].startswith("text/plain; version=0.0.4")
            return [await each.text() for each in found]

    return asyncio.run(ask())


def test_this_machine_is_told_everything():
    status, metrics = answers(is_open=False)
    assert json.loads(status) == STATUS.to_dict()
    assert "xdit_loads_total 3.0" in metrics


@pytest.mark.parametrize("is_open", [False, True])
def test_other_machines_are_told_counts_only_unless_a_setting_opens_it(monkeypatch, is_open):
    monkeypatch.setattr(routes, "is_of_this_machine", lambda _: False)
    status, metrics = answers(is_open=is_open)
    assert json.loads(status) == (STATUS.to_dict() if is_open else STATUS.short())
    for secret in ("SecretNode", "pid", "/tmp", "cpu:2"):
        assert is_open or secret not in status + metrics
    named = {family.name for family in parsed(metrics)}
    assert named >= {"xdit_state", "xdit_ranks", "xdit_steps"}
    assert ("xdit_loads" in named) is is_open
