"""The WebSocket of a page: the newest drawing is drawn, stale ones are named, bad messages are told why."""

import contextlib
import json
import random
import struct
import threading
import urllib.parse

import numpy as np
import pytest
import torch
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

import pages
from jdm.app.limits import Limits
from jdm.app.students import load_students
from jdm.app.studio import Studio
from jdm.app.worker import Worker
from jdm.evaluation.sampling import generator

LIMITS = Limits(bytes=100_000, prompt=100, pictures=6, pages=2, seconds=30)
DRAWING = np.zeros((32, 32, 3), np.uint8)
DRAWING[8:24, 8:24] = 255


@pytest.fixture(scope="module")
def studio(student, teacher, controlled):
    worker = Worker(LIMITS)
    yield Studio(load_students([str(student), str(teacher), str(controlled)], [], None, None, "cpu"), worker, LIMITS)
    worker.close()


@pytest.fixture(scope="module")
def address(studio):
    with pages.serving(studio) as found:
        yield found


def line(address: str, **more):
    return connect(address.replace("http", "ws") + "api/live", max_size=None, **more)


def message(id: int, body: bytes = DRAWING.tobytes(), **settings) -> bytes:
    head = json.dumps({"id": id, "prompt": "a coat", **settings}).encode()
    return struct.pack("<I", len(head)) + head + body


def drawn(received) -> tuple[dict, np.ndarray]:
    """(head, pictures [K, H, W, 3]) of an answer."""
    assert isinstance(received, bytes), received
    length = struct.unpack("<I", received[:4])[0]
    head = json.loads(received[4 : 4 + length])
    return head, np.frombuffer(received[4 + length:], np.uint8).reshape(-1, head["height"], head["width"], 3)


def test_an_answer_has_map_and_pictures(address, student):
    with line(address) as socket:
        socket.send(message(7, n=2, seed=4))
        head, found = drawn(socket.recv(timeout=30))
    assert (head["id"], head["maps"], head["n"], head["steps"]) == (7, ["canny"], 2, 1)
    picture = torch.from_numpy(DRAWING).permute(2, 0, 1)
    expected = generator(str(student))("a coat", picture, n=2, seed=4)
    assert np.array_equal(found[1:], expected.permute(0, 2, 3, 1))
    assert set(np.unique(found[0])) == {0, 255}


def test_of_waiting_drawings_the_newest_is_drawn(address, studio):
    gate = threading.Event()
    blocking = studio.worker._thread.submit(gate.wait, 20)
    with line(address) as socket:
        for id in range(5):
            socket.send(message(id))
        stale = [json.loads(socket.recv(timeout=30)) for _ in range(4)]
        gate.set()
        assert stale == [{"id": id, "stale": True} for id in range(4)]
        assert drawn(socket.recv(timeout=30))[0]["id"] == 4
        with pytest.raises(TimeoutError):
            socket.recv(timeout=0.3)
    blocking.result()


def test_a_comparison_leaves_the_drawing_alive(address):
    with line(address) as socket:
        socket.send(message(1, compare=True))
        socket.send(message(2, compare=True))
        socket.send(message(3))
        said = json.loads(socket.recv(timeout=60))
        assert said == {"id": 2, "error": "a comparison is being drawn already; try again in 2 seconds", "seconds": 2}
        heads = [drawn(socket.recv(timeout=60))[0] for _ in range(2)]
    assert {head["id"]: head["steps"] for head in heads} == {1: 50, 3: 1}


@pytest.mark.parametrize(("sent", "sentence"), [
    (b"", "a message must be the length of its head"), (b"\xff\xff\xff\xff{}", "a message must be"),
    ("text", "a message must be"), (message(1, b"abc"), "a drawing must have 32 x 32 pixels of 3 bytes, got 3 bytes"),
    (message(1, b""), "draws to a control; send a picture"), (message(1, n=7), "n must be at most 6"),
    (message(1, prompt="x" * 101), "a prompt may have 100 characters"), (message(-1), "id: input should be"),
    (message(1, model="other"), "there is no model 'other'"), (message(1, seed=1.5), "seed: input should be"),
])
def test_a_bad_message_is_told_why(address, sent, sentence):
    with line(address) as socket:
        socket.send(sent)
        assert sentence in json.loads(socket.recv(timeout=30))["error"]
        socket.send(message(2))
        assert drawn(socket.recv(timeout=30))[0]["id"] == 2


def test_a_fuzzed_line_goes_on(address):
    chance = random.Random(1)
    for _ in range(20):
        with contextlib.suppress(ConnectionClosed), line(address) as socket:
            for _ in range(10):
                sent = bytearray(message(1, strengths={"x": 1.0} if chance.random() < 0.1 else {}))
                for _ in range(chance.randint(0, 4)):
                    sent[chance.randrange(120)] = chance.randrange(256)
                socket.send(bytes(sent[: chance.choice([len(sent), chance.randrange(len(sent))])]))
                received = socket.recv(timeout=30)
                if isinstance(received, str):
                    assert "unexpectedly" not in received
                    assert "the drawing failed" not in received
    with line(address) as socket:
        socket.send(message(2))
        assert drawn(socket.recv(timeout=30))[0]["id"] == 2


def test_one_page_too_many_is_told_when(address):
    with line(address) as first, line(address) as second, line(address) as third:
        first.send(message(1))
        second.send(message(1))
        assert json.loads(third.recv(timeout=30)) == {
            "id": None, "error": "2 pages are drawing already; try again in 5 seconds", "seconds": 5}
        with pytest.raises(ConnectionClosed):
            third.recv(timeout=30)
        assert drawn(first.recv(timeout=30))[0]["id"] == drawn(second.recv(timeout=30))[0]["id"] == 1


def test_a_page_of_elsewhere_is_refused(address, studio):
    with pytest.raises(InvalidStatus, match="403"), line(address, origin="http://evil.example"):
        pass
    with pages.serving(studio, token="secret-1") as locked:
        with pytest.raises(InvalidStatus, match="403"), line(locked):
            pass
        place = urllib.parse.urlsplit(locked).netloc
        with connect(f"ws://{place}/api/live?token=secret-1", max_size=None) as socket:
            socket.send(message(1))
            assert drawn(socket.recv(timeout=30))[0]["id"] == 1


def test_a_message_beyond_the_limit_ends_the_line(address):
    with line(address) as socket:
        socket.send(message(1, b"x" * 200_000))
        with pytest.raises(ConnectionClosed) as closed:
            socket.recv(timeout=30)
    assert closed.value.rcvd.code == 1009
