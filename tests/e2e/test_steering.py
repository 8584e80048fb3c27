"""Settings of a running ComfyUI: changed between prompts, by whoever may, with nothing left over.

``STEERING_CHANGES`` says how many changes by chance; ``STEERING_SEED`` seeds chance.
"""

from __future__ import annotations

import json
import os
import random
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rig import graphs
from rig.breadth import how_many
from rig.checkpoints import Sizes, models_directory
from rig.compare import Difference, compare_all
from rig.faults import descendants, is_running, num_fds, num_threads
from rig.pair import STRICT, latent_error, run, run_stock
from rig.server import Server, base_directory
from rig.sockets import internet_sockets
from rig.trees import Tree

DEADLINE_S = 300.0
END_S = 20.0
CHANGES = how_many(50, whole=50, variable="STEERING_CHANGES")
SEED = how_many(1, whole=1, variable="STEERING_SEED")
STRATEGIES = ("auto", "ulysses", "ring", "tensor", "fsdp", "off")
NAMES = ("XDIT_GPUS", "XDIT_STRATEGY", "XDIT_BALANCE", "XDIT_GPU_MEMORY", "XDIT_START")
NAMES += ("XDIT_IDLE_TIMEOUT", "XDIT_TRANSFER_DTYPE")
OURS = "/memfd:comfy-xdit"
# Of the image and of the latent after 4 steps, on random weights in float32.
MIN_DB_IN_8_BITS = {"int8": 50.0, "fp8": 35.0}
MAX_ERROR_IN_8_BITS = {"int8": 0.01, "fp8": 0.05}

Servers = Callable[..., Server]
Values = dict[str, Any]


@pytest.fixture
def ranks(servers: Servers, tree: Tree) -> Iterator[Server]:
    """The server with ranks that all tests share, whose settings are the environment's again."""
    server = servers(tree, XDIT_GPUS="cpu:2", **STRICT)
    yield server
    change(server, dict.fromkeys(NAMES))


def change(server: Server, values: Values) -> Values:
    """Change settings between prompts."""
    wait_until(lambda: not server.queued(), "a prompt still runs")
    status, answer = send(server, values)
    if status == 202:  # The prompt has left the queue and is not quite at its end.
        wait_until(lambda: not settings(server)["is_pending"], "it waits without a prompt")
        return settings(server)
    assert status == 200, answer
    return answer


def settings(server: Server) -> Values:
    return server.request("/xdit/settings")


def send(
    server: Server,
    body: Any,
    path: str = "/xdit/settings",
    *,
    url: str = "",
    **headers: str,
) -> tuple[int, Values]:
    """POST a body; return the status of the answer and its JSON."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request((url or server.url) + path, data)
    for name, value in {"Content_Type": "application/json", **headers}.items():
        request.add_header(name.replace("_", "-"), value)
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, json.loads(reply.read())
    except urllib.error.HTTPError as error:
        text = error.read()
        return error.code, json.loads(text) if text.startswith(b"{") else {}


def wait_until(is_so: Callable[[], bool], complaint: str) -> None:
    end = time.monotonic() + END_S
    while not is_so():
        assert time.monotonic() < end, complaint
        time.sleep(0.02)


def graph_of(seed: int, steps: int = 2, workflow: str = "ksampler_dev") -> graphs.Graph:
    graph = graphs.load(workflow)
    return graphs.with_values(graph, seed=seed, size=(128, 128), steps=steps, save_latent=True)


def value(server: Server, name: str) -> str:
    return str(settings(server)["variables"][name]["value"])


def pids_of(status: Values) -> list[int]:
    return [rank["pid"] for rank in status["ranks"]]


class Watched:
    """A server whose images are compared with stock's, and where everything has its place."""

    def __init__(self, servers: Servers, tree: Tree, server: Server) -> None:
        self.stock = servers(tree, XDIT_STRATEGY="off")
        self.server = server
        assert server.process is not None
        self.pid = server.process.pid
        self.logs: Path | None = None

    def image(self, seed: int, workflow: str = "ksampler_dev") -> Values:
        """Make an image that is stock's; return the status after it."""
        graph = graph_of(seed, workflow=workflow)
        expected = run_stock(self.stock, graph)
        before = self.server.status()
        found = run(self.server, graph)
        difference = compare_all(expected.images, found.images)
        status = self.server.status()
        assert difference.is_equal, f"{difference} with {settings(self.server)}"
        if status["state"] != "off":
            assert status["last_run"]["steps_parallel"] == 2, status
            self.logs = Path(status["ranks"][0]["log"]).parent
        else:
            assert status["totals"] == before["totals"], "a step of ours while switched off"
        return status

    def image_beside_a_change(self, seed: int, values: Values, wait_s: float) -> None:
        """Make an image that is stock's, and change settings some time after it is queued."""
        expected = run_stock(self.stock, graph_of(seed))
        prompt = self.server.post_prompt(graph_of(seed))
        time.sleep(wait_s)
        status, answer = send(self.server, values)
        assert status in (200, 202), answer
        found = self.server.images(self.server.wait(prompt, DEADLINE_S))
        difference = compare_all(expected.images, found)
        assert difference.is_equal, f"{difference} while {values} were asked for"
        wait_until(lambda: not settings(self.server)["is_pending"], "the prompt has ended")

    def look(self, status: Values) -> None:
        """See that just what belongs to these settings is there."""
        is_off, is_idle = (status["state"] == state for state in ("off", "idle"))
        pids = {rank["pid"] for rank in status["ranks"]} - {None}
        wanted = value(self.server, "XDIT_GPUS")  # "0" switches off
        assert len(pids) == (0 if is_off or is_idle else int(wanted.removeprefix("cpu:")))
        has_ended = is_off or (is_idle and value(self.server, "XDIT_START") == "first")
        of_nursery = 0 if has_ended else 1
        wait_until(
            lambda: len(descendants(self.pid) - pids) == of_nursery,
            f"{descendants(self.pid)} beside {pids}",
        )
        assert pids <= descendants(self.pid)
        if is_off or is_idle:
            assert self.memory_files() == 0
            listening = {s.port for s in internet_sockets(self.pid) if s.is_listening}
            assert listening == {int(self.server.url.rsplit(":", 1)[1])}

    def memory_files(self) -> int:
        """How many files without a name, of ours, the host maps or has open."""
        handles = Path(f"/proc/{self.pid}/fd")
        found = [os.readlink(handle) for handle in handles.iterdir() if handle.is_symlink()]
        mapped = Path(f"/proc/{self.pid}/maps").read_text().splitlines()
        return sum(OURS in text for text in (*found, *mapped))


def test_settings_change_between_prompts_and_every_image_is_stocks(
    servers: Servers, tree: Tree, ranks: Server
) -> None:
    watched = Watched(servers, tree, ranks)
    status = watched.image(600)
    first, before = pids_of(status), status["totals"]

    change(ranks, {"XDIT_STRATEGY": "ring"})
    status = watched.image(601)
    assert status["plan"]["strategy"] == "ring"
    assert pids_of(status) == first, "the ranks went on"
    assert status["totals"]["loads"] == before["loads"], "and kept the model"

    change(ranks, {"XDIT_GPUS": "cpu:3"})
    wait_until(lambda: ranks.status()["state"] == "ready", "ranks do not start before a prompt")
    status = watched.image(602)
    watched.look(status)
    assert not any(map(is_running, first))
    assert (status["plan"]["name"], status["plan"]["world_size"]) == ("ring=3", 3)

    change(ranks, {"XDIT_STRATEGY": "off"})
    status = watched.image(603, "ksampler_schnell")
    watched.look(status)
    assert value(ranks, "XDIT_GPUS") == "cpu:3"

    change(ranks, {"XDIT_STRATEGY": None})
    wait_until(lambda: ranks.status()["state"] == "ready", "ranks do not return before a prompt")
    status = watched.image(604, "ksampler_schnell")
    assert status["plan"]["world_size"] == 3
    same = status["totals"]["bytes_weights"] == before["bytes_weights"]
    assert same, "from the file that was read while switched off"

    change(ranks, {"XDIT_GPUS": None, "XDIT_BALANCE": "weighted", "XDIT_GPU_MEMORY": 8})
    status = watched.image(605)
    watched.look(status)
    assert status["plan"]["world_size"] == 2
    given = settings(ranks)["variables"]
    assert (given["XDIT_BALANCE"]["value"], given["XDIT_BALANCE"]["environment"]) == (
        "weighted",
        "even",
    )
    assert given["XDIT_GPU_MEMORY"]["value"] == "8"


@pytest.mark.slow  # fifty changes, an image after each
@pytest.mark.thorough
@pytest.mark.newest_only
def test_many_changes_by_chance_leave_nothing_over(
    servers: Servers,
    tree: Tree,
    ranks: Server,
    record_property: Callable[[str, object], None],
) -> None:
    watched = Watched(servers, tree, ranks)
    chance = random.Random(SEED)
    watched.image(620)
    assert watched.logs is not None
    left: list[tuple[int, int]] = []
    for number in range(CHANGES + 2):
        # Two visits of the state in which nothing of ours is there lie around everything else.
        if number in (0, CHANGES + 1):
            values: Values = {"XDIT_STRATEGY": "off"}
        else:
            values = {
                "XDIT_STRATEGY": chance.choice((*STRATEGIES, None)),
                "XDIT_GPUS": chance.choice(("cpu:2", "cpu:3", "0", None)),
                "XDIT_BALANCE": chance.choice(("even", "adaptive", "least_loaded", None)),
            }
            for name in chance.sample(sorted(values), chance.randrange(3)):
                del values[name]
        if number % 3 == 1:
            watched.image_beside_a_change(700 + number, values, chance.uniform(0, 0.5))
        else:
            change(ranks, values)
        status = watched.image(621 + number)
        watched.look(status)
        if number in (0, CHANGES + 1):
            left.append((num_fds(watched.pid), num_threads(watched.pid)))
            left_logs = {path.name for path in watched.logs.iterdir()}
    record_property("descriptors and threads, switched off, before and after", left)
    assert all(after <= before for before, after in zip(*left, strict=True)), left
    names = [
        f"{of}.log{old}"
        for of in ("nursery", *map("worker-{}".format, range(3)))
        for old in ("", ".1")
    ]
    assert left_logs <= {"lock", *names}


def test_a_change_during_a_prompt_waits_for_its_end(
    servers: Servers, tree: Tree, ranks: Server
) -> None:
    watched = Watched(servers, tree, ranks)
    watched.image(640)
    pids = pids_of(ranks.status())
    graph = graph_of(641, steps=30)
    expected = run_stock(watched.stock, graph)
    prompt = ranks.post_prompt(graph)
    ranks.wait_for_steps(prompt, 2, DEADLINE_S)
    status, answer = send(ranks, {"XDIT_STRATEGY": "off"})
    assert (status, answer["is_pending"]) == (202, True)
    assert answer["variables"]["XDIT_STRATEGY"]["pending"] == "off"
    status, answer = send(ranks, {"XDIT_GPUS": "cpu:3"})
    assert status == 202, "a later one takes its place"
    assert answer["variables"]["XDIT_STRATEGY"]["pending"] is None
    assert answer["variables"]["XDIT_GPUS"]["pending"] == "cpu:3"
    assert send(ranks, {"XDIT_GPUS": "cpu:none"})[0] == 400
    assert settings(ranks)["variables"]["XDIT_GPUS"]["pending"] == "cpu:3", "what waits waits on"
    assert send(ranks, {}, "/xdit/measure")[0] == 202
    assert ranks.poll(prompt) is None
    assert all(map(is_running, pids))
    found = ranks.images(ranks.wait(prompt, DEADLINE_S))
    assert compare_all(expected.images, found).is_equal
    assert "30 steps on 2 CPU ranks" in ranks.log_text()
    wait_until(lambda: not settings(ranks)["is_pending"], "the prompt has ended")
    assert value(ranks, "XDIT_GPUS") == "cpu:3"
    assert watched.image(642)["plan"]["world_size"] == 3


def become_idle(watched: Watched) -> Values:
    """Wait until the ranks have ended because nobody uses them, and look at what is left."""
    server = watched.server
    wait_until(lambda: server.status()["state"] == "idle", "nobody uses the ranks, and they stay")
    status = server.status()
    watched.look(status)
    assert [rank["state"] for rank in status["ranks"]] == ["idle"] * 2
    return status


def test_ranks_that_nobody_uses_end_and_the_next_image_brings_them_back(
    servers: Servers, tree: Tree, ranks: Server
) -> None:
    watched = Watched(servers, tree, ranks)
    first = watched.image(660)
    change(ranks, {"XDIT_IDLE_TIMEOUT": 3})
    status = watched.image(661)
    assert pids_of(status) == pids_of(first), "the ranks go on under another timeout"
    become_idle(watched)
    time.sleep(1.0)
    become_idle(watched)  # None was started by itself.
    status = watched.image(662)
    assert not set(pids_of(status)) & set(pids_of(first))
    watched.look(status)
    counts, before = status["totals"], first["totals"]
    assert counts["loads"] == before["loads"] + 1
    assert counts["bytes_weights"] == before["bytes_weights"], "from the file"
    restarts = [[rank["restarts"] for rank in each["ranks"]] for each in (first, status)]
    assert restarts[0] == restarts[1], "no loss"
    assert ranks.log_text().count("no FLUX image for XDIT_IDLE_TIMEOUT=3 s: 2 CPU ranks end") == 1

    # The ranks are unused for longer than that between any two steps.
    change(ranks, {"XDIT_IDLE_TIMEOUT": 0.001, "XDIT_START": "early"})
    become_idle(watched)
    num_starts = ranks.log_text().count("2 workers joined")
    graph = graph_of(663, steps=20)
    expected = run_stock(watched.stock, graph)
    assert compare_all(expected.images, run(ranks, graph).images).is_equal
    status = become_idle(watched)
    assert status["last_run"]["steps_parallel"] == 20
    assert ranks.log_text().count("2 workers joined") == num_starts + 1


@pytest.mark.newest_only
def test_transfers_in_8_bits_are_close_to_the_exact_image_and_are_called_approximate(
    servers: Servers,
    tree: Tree,
    ranks: Server,
    record_property: Callable[[str, object], None],
) -> None:
    watched = Watched(servers, tree, ranks)

    def made(seed: int) -> tuple[Difference, float, int]:
        """How far image and latent are from stock's, and what ranks sent each other for them."""
        graph = graph_of(seed, steps=4)  # The same one would not be computed twice.
        expected = run_stock(watched.stock, graph)
        before = ranks.status()["totals"]["bytes_between_ranks"]
        found = run(ranks, graph)
        after = ranks.status()["totals"]["bytes_between_ranks"]
        difference = compare_all(expected.images, found.images)
        return difference, latent_error(expected.latents, found.latents), after - before

    difference, _, exact = made(690)
    assert difference.is_equal
    for seed, (dtype, least_db) in enumerate(MIN_DB_IN_8_BITS.items(), start=691):
        change(ranks, {"XDIT_TRANSFER_DTYPE": dtype})
        difference, error, narrow = made(seed)
        record_property(dtype, f"{difference}, {error:.1e}, {narrow / exact:.3f} of the bytes")
        assert difference.psnr_db >= least_db, difference
        assert 1e-5 < error <= MAX_ERROR_IN_8_BITS[dtype]
        assert narrow < 0.4 * exact, "float32, with a scale for 16 or 32 values"
        report = ranks.status()["last_run"]
        assert (report["transfer_dtype"], report["is_exact"]) == (dtype, False)
        line = f"4 steps on 2 CPU ranks (ulysses=2, transfers in {dtype}, approximate)"
        assert line in ranks.log_text()

    status, answer = send(ranks, {"XDIT_TRANSFER_DTYPE": "fp4"})
    assert status == 400
    assert "Legal: exact, int8 or fp8." in str(answer)

    change(ranks, {"XDIT_STRATEGY": "ring"})
    report = watched.image(694)["last_run"]
    assert (report["transfer_dtype"], report["is_exact"]) == ("exact", True)
    assert ranks.log_text().count("XDIT_TRANSFER_DTYPE changes nothing with ring=2.") == 1
    change(ranks, {"XDIT_STRATEGY": None, "XDIT_TRANSFER_DTYPE": None})
    watched.image(695)


@pytest.mark.slow  # ten waits for a timeout, and a start of ranks after most
@pytest.mark.thorough
@pytest.mark.newest_only
def test_a_prompt_that_begins_when_the_ranks_end_is_as_any_other(
    servers: Servers,
    tree: Tree,
    ranks: Server,
    record_property: Callable[[str, object], None],
) -> None:
    watched = Watched(servers, tree, ranks)
    change(ranks, {"XDIT_IDLE_TIMEOUT": 1})
    stays = []
    before = watched.image(670)["totals"]
    for number in range(10):
        graph = graph_of(671 + number)
        expected = run_stock(watched.stock, graph)
        watched.image(670)
        pids = pids_of(ranks.status())
        time.sleep(0.75 + 0.05 * number)
        assert compare_all(expected.images, run(ranks, graph).images).is_equal
        status = ranks.status()
        assert status["last_run"]["steps_parallel"] == 2
        stays.append(pids_of(status) == pids)
    record_property("whether the ranks lived on", stays)
    assert not stays[-1], "the last one came after the timeout"
    assert status["totals"]["losses"] == before["losses"]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"XDIT_GPUS": "many"}, 'XDIT_GPUS="many" is not legal. Legal: all, a count'),
        ({"XDIT_GPUS": "cpu:3", "XDIT_BALANCE": "odd"}, 'XDIT_BALANCE="odd" is not legal.'),
        ({"XDIT_GPUS": "cpu:3", "XDIT_STRATEGY": "ring=2"}, "does not fit 3 ranks"),
        ({"XDIT_GPUS": "cpu:900"}, "is more than this machine takes"),
        ({"XDIT_GPUS": "all"}, "leave nothing active: "),
        ({"XDIT_GPUS": "0,1"}, "XDIT_GPUS"),
        ({"XDIT_BALANCE": ["even"]}, "XDIT_BALANCE=['even'] is not legal."),
        ({"XDIT_BALANCE": True}, 'XDIT_BALANCE="True" is not legal.'),
        ({"XDIT_STRATEGIE": "ring"}, "XDIT_STRATEGIE is not a setting of ours."),
        ({"PATH": "/tmp"}, "PATH is not a setting of ours."),
        ({"XDIT_LOG_DIR": "/tmp/elsewhere"}, "is read when ComfyUI starts"),
        ({"XDIT_REMOTE_SETTINGS": "1"}, "is read when ComfyUI starts"),
        (b"{", "must be a JSON object"),
        ([], "must be a JSON object"),
    ],
)
def test_a_wrong_value_changes_nothing(ranks: Server, values: Any, said: str) -> None:
    before = settings(ranks)
    status, answer = send(ranks, values)
    assert (status, said in answer["error"]) == (400, True), answer
    if isinstance(values, dict):
        assert answer["asked"] == values
    assert settings(ranks) == before
    assert {name: answer[name] for name in before} == before


OTHER_ORIGINS = ("http://evil.example", "null", "http://127.0.0.1:1", "https://localhost")


@pytest.mark.parametrize("path", ["/xdit/settings", "/api/xdit/settings", "/xdit/measure"])
def test_only_json_of_the_same_origin_changes_anything(ranks: Server, path: str) -> None:
    before = settings(ranks)
    for kind in ("application/x-www-form-urlencoded", "text/plain", "multipart/form-data"):
        status, answer = send(ranks, {"XDIT_STRATEGY": "off"}, path, Content_Type=kind)
        assert (status, "application/json" in answer["error"]) == (415, True)
    for origin in OTHER_ORIGINS:
        assert send(ranks, {"XDIT_STRATEGY": "off"}, path, Origin=origin)[0] == 403
    # A page's name that leads to this machine.
    rebound = {"Host": "evil.example:8188", "Origin": "http://evil.example:8188"}
    assert send(ranks, {"XDIT_STRATEGY": "off"}, path, **rebound)[0] == 403
    assert send(ranks, {"XDIT_STRATEGY": "off"}, path, X_Forwarded_For="192.0.2.9")[0] == 403
    assert settings(ranks) == before
    body = {} if path.endswith("measure") else {"XDIT_STRATEGY": None}
    assert send(ranks, body, path, Origin=ranks.url)[0] in (200, 202)


def own_address() -> str:
    """This machine's address that is not loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # Sends nothing.
        except OSError:
            pytest.skip("this machine has no network")
        return str(probe.getsockname()[0])


def test_strangers_change_nothing_where_comfyui_listens_to_the_network(
    tree: Tree, tmp_path: Path
) -> None:
    """ComfyUI looks at no origin with --enable-cors-header, and at no peer ever."""
    options = ("--listen", "0.0.0.0", "--enable-cors-header")
    address = own_address()
    models = models_directory(Sizes(hidden=512, variants=True))
    with (
        base_directory(tmp_path, models) as base,
        Server(tree, base, env={"XDIT_GPUS": "cpu:2"}, extra_args=options) as server,
    ):
        away = server.url.replace("127.0.0.1", address)
        status, answer = send(server, {"XDIT_STRATEGY": "off"}, url=away)
        assert (status, "Only this machine" in answer["error"]) == (403, True)
        for origin in OTHER_ORIGINS:
            status, answer = send(server, {"XDIT_STRATEGY": "off"}, Origin=origin)
            assert (status, "another origin" in answer["error"]) == (403, True)
        assert value(server, "XDIT_STRATEGY") == "ulysses"
        server.have({**server.env, "XDIT_REMOTE_SETTINGS": "1"})
        assert send(server, {"XDIT_STRATEGY": "off"}, url=away, Origin="http://evil")[0] == 403
        assert send(server, {"XDIT_STRATEGY": "off"}, url=away, Origin=away)[0] == 200
        assert value(server, "XDIT_STRATEGY") == "off"


@pytest.mark.thorough
@pytest.mark.newest_only
def test_a_process_that_was_refused_says_that_a_restart_is_needed(
    tree: Tree, tmp_path: Path
) -> None:
    models = models_directory(Sizes(hidden=512, variants=True))
    with (
        base_directory(tmp_path, models) as base,
        Server(tree, base, env={"XDIT_GPUS": "cpu:none"}) as server,
    ):
        status, answer = send(server, {"XDIT_GPUS": "cpu:2"})
        assert status == 409
        assert "before a restart of ComfyUI" in answer["error"]
        assert 'XDIT_GPUS="cpu:none" is not legal' in answer["error"]
        assert answer["refused"] == server.status()["reason"]
