"""The HTTP API: pictures as `jdm sample` draws them, sentences for whatever else, and no more than its limits."""

import asyncio
import base64
import json
import random
import re
import socket
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import pages
from hostile import hold
from jdm.app.limits import BusyError, Limits
from jdm.app.students import load_students
from jdm.app.studio import Studio
from jdm.app.worker import Worker, stopped_at
from jdm.data.pictures import load_picture
from jdm.errors import UsageError
from jdm.evaluation.sampling import generator

LIMITS = Limits(bytes=200_000, pixels=100_000, prompt=200, pictures=6, waiting=2, pages=2, seconds=30)


@pytest.fixture(scope="module")
def students(student, teacher, controlled):
    return load_students([str(student), str(teacher), str(controlled)], [], None, None, "cpu")


@pytest.fixture(scope="module")
def studio(students):
    worker = Worker(LIMITS)
    yield Studio(students, worker, LIMITS)
    worker.close()


@pytest.fixture(scope="module")
def address(studio):
    with pages.serving(studio) as found:
        yield found


def test_models_say_their_controls_and_yardstick(address, student, controlled):
    status, found, _ = pages.asked(address, "api/models")
    assert status == 200
    first, plain, slow = found["models"]
    assert first["name"] == str(student)
    assert (first["width"], first["height"], first["steps"]) == (32, 32, 1)
    assert first["controls"] == [{"model": str(student), "label": "canny", "spec": None, "hand": False}]
    assert first["compare"] == {"name": str(controlled), "steps": 50}
    assert plain["controls"] == []
    assert slow["compare"] is None
    assert found["limits"] == {"prompt": 200, "pictures": 6, "bytes": 200_000, "pixels": 100_000}
    assert found["device"] == "cpu"


def test_an_answer_is_what_python_draws(address, student, tmp_path):
    asked = {"prompt": "a coat", "seed": 3, "n": 2, "to_seed": 5, "blend": 0.25, "strengths": {str(student): 0.5}}
    status, found, _ = pages.asked(address, "api/draw", {**asked, "image": pages.picture()})
    assert status == 200
    file = tmp_path / "drawing.png"
    file.write_bytes(base64.b64decode(pages.picture()))
    draw = generator(str(student), strengths=[0.5])
    expected = draw("a coat", load_picture(file, 32), n=2, seed=3, to_seed=5, blend=0.25)
    assert np.array_equal(np.stack([pages.pixels(one) for one in found["images"]]), expected.permute(0, 2, 3, 1))
    assert [one["control"] for one in found["maps"]] == ["canny"]
    assert set(np.unique(pages.pixels(found["maps"][0]["image"]))) == {0, 255}
    assert found["steps"] == 1
    assert found["milliseconds"] > 0
    assert found["notes"] == []


def test_a_comparison_runs_the_slow_model(address, controlled):
    asked = {"prompt": "a coat", "image": pages.picture()}
    status, found, _ = pages.asked(address, "api/compare", asked)
    assert (status, found["steps"]) == (200, 50)
    assert found["images"] == pages.asked(address, "api/draw", {**asked, "model": str(controlled)})[1]["images"]


def test_a_map_is_taken_as_it_is(address):
    status, found, _ = pages.asked(address, "api/draw", {"image": pages.picture(seed=3), "as_map": True})
    assert status == 200
    assert set(np.unique(pages.pixels(found["maps"][0]["image"]))) == {0, 225}


def test_an_empty_drawing_is_drawn_with_a_note(address):
    empty = pages.encoded(Image.new("RGB", (32, 32)))
    status, found, _ = pages.asked(address, "api/draw", {"prompt": "a coat " * 20, "image": empty})
    assert status == 200
    assert found["notes"][0] == "The drawing is empty, so it says nothing: the picture follows the prompt alone."
    assert re.fullmatch(r"The prompt is long: the model does not read '(a coat )+a coat', its end.", found["notes"][1])


@pytest.mark.parametrize(("change", "sentence"), [
    ({"prompt": "x" * 201}, "a prompt may have 200 characters, got 201; shorten it"),
    ({"n": 7}, "n must be at most 6, got 7"),
    ({"n": 0}, "n: input should be greater than or equal to 1"),
    ({"n": True}, "n: input should be a valid integer"),
    ({"blend": 1.5}, "blend: input should be less than or equal to 1"),
    ({"seed": 2**40}, "seed: input should be less than"),
    ({"seed": 10**400}, "seed: "),
    ({"model": "../../etc"}, "there is no model '../../etc'; choose"),
    ({"strengths": {"other": 1.0}}, "has no control 'other'"),
    ({"strengths": {"other": float("nan")}}, "strengths.other: input should be a finite number"),
    ({"prompt": "\ud800"}, "prompt: "),
    ({"path": "/etc/passwd"}, "path: extra inputs are not permitted"),
    ({"image": None}, "draws to a control; send a picture"),
    ({"image": "/etc/passwd"}, "image: "),
    ({"image": "%%%"}, "image: it is not base64"),
    ({"image": base64.b64encode(b"no picture").decode()}, "image: not a picture that Pillow reads (10 bytes)"),
    ({"image": pages.picture((400, 300))}, "image: 300 x 400 are more than 100,000 pixels, the limit here"),
    ({"image": pages.picture((4, 4))}, "image: both sides must be at least 8 pixels"),
])
@pytest.mark.hostile("web")
def test_a_bad_request_is_told_why(address, change, sentence):
    status, found, _ = pages.asked(address, "api/draw", {"prompt": "a coat", "image": pages.picture(), **change})
    assert status == 422
    assert sentence in found["error"]
    assert "\n" not in found["error"]


def test_any_proportions_and_scripts_are_drawn(address):
    asked = {"prompt": "ботинок 靴子 👢", "image": pages.encoded(Image.new("RGB", (300, 20), "white"), "JPEG")}
    assert pages.asked(address, "api/draw", asked)[0] == 200


@pytest.mark.hostile("web")
def test_a_body_beyond_the_limit_is_refused(address):
    status, found, _ = pages.asked(address, "api/draw", raw=b" " * 300_000)
    assert (status, found["error"]) == (413, "a request may have 200,000 bytes; send a smaller picture")


@pytest.mark.parametrize(("headers", "status"), [
    ({"Host": "evil.example"}, 403), ({"Host": "localhost:1"}, 200), ({"Host": "[::1]:5"}, 200),
    ({"Host": "a@b["}, 403),
    ({"Origin": "http://evil.example"}, 403), ({"Origin": "null"}, 403),
    ({"Host": "localhost:9", "Origin": "http://localhost:9"}, 200),
])
@pytest.mark.hostile("web")
def test_other_pages_cannot_drive_the_server(address, headers, status):
    assert pages.asked(address, "api/models", headers=headers)[0] == status


@pytest.mark.parametrize(("path", "headers", "status"), [
    ("api/models", {}, 401), ("api/models?token=secret-1", {}, 200), ("api/models?token=secret-2", {}, 401),
    ("api/models", {"Authorization": "Bearer secret-1"}, 200), ("api/models", {"Authorization": "Bearer é"}, 401),
    ("", {}, 200),
])
def test_the_api_needs_the_token(studio, path, headers, status):
    with pages.serving(studio, token="secret-1") as address:
        headers = {key: value.encode().decode("latin-1") for key, value in headers.items()}
        assert pages.asked(address, path, headers=headers)[0] == status


def test_the_page_loads_nothing_from_elsewhere(address):
    status, text, headers = pages.asked(address, "")
    assert status == 200
    assert "http" not in text.replace("http://www.w3.org", "")
    assert "default-src 'self'" in headers["content-security-policy"]
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    docs = pages.asked(address, "docs")[1]
    assert "//" not in docs.split("<script src=")[1].split(">")[0]
    paths = pages.asked(address, "api/openapi.json")[1]["paths"]
    assert set(paths) == {"/api/models", "/api/draw", "/api/compare"}
    assert pages.asked(address, "../../pyproject.toml")[0] == 404


# Load


def test_more_than_the_queue_holds_is_told_when(students):
    limits = replace(LIMITS, waiting=1)
    worker, gate = Worker(limits), threading.Event()

    async def crowd() -> list:
        loop = asyncio.get_running_loop()
        first = loop.create_task(worker.run(lambda deadline: gate.wait(20)))
        await asyncio.sleep(0.05)
        with pytest.raises(BusyError, match="1 requests are waiting already; try again in 1 second") as busy:
            await worker.run(lambda deadline: 0)
        gate.set()
        return [await first, busy.value.seconds]

    assert asyncio.run(crowd()) == [True, 1]
    with pages.serving(Studio(students, worker, limits)) as address:
        gate.clear()
        blocking = worker._thread.submit(gate.wait, 20)
        found = []
        calls = [threading.Thread(target=lambda: found.append(pages.asked(address, "api/draw", {
            "image": pages.picture()}))) for _ in range(6)]
        for call in calls:
            call.start()
        time.sleep(1)
        gate.set()
        for call in calls:
            call.join()
        blocking.result()
    assert sorted(status for status, *_ in found) == [200, *[503] * 5]
    assert all(headers["retry-after"] == "1" for status, _, headers in found if status == 503)
    worker.close()


def test_a_drawing_ends_at_its_time(students, controlled):
    slow = next(s for s in students if s.name == str(controlled))
    net = slow._drawing((slow.name,)).sampler.net
    late = time.monotonic() - 1
    with pytest.raises(BusyError, match="longer than its limit, 30 seconds"), stopped_at(late, net, LIMITS):
        net(None, None, None)
    assert not net._forward_pre_hooks


def test_a_late_turn_is_refused():
    worker = Worker(replace(LIMITS, seconds=0))
    with pytest.raises(BusyError, match="waited 0 seconds for its turn"):
        asyncio.run(worker.run(lambda deadline: 0))
    worker.close()


@pytest.mark.hostile("web")
def test_a_fuzzed_api_answers_without_500(fuzz_seed, address, record_property):
    chance = random.Random(fuzz_seed)
    odd = [None, True, -1, 0, 1, 3, 2**63, 1e308, float("nan"), float("inf"), "", "x", "\x00", "\ud83d", "é" * 300, [],
           {}, [[]], {"a": 1}, pages.picture(), pages.picture()[:-9], "A" * 5000, "[" * 3000]
    good = {"model": "", "prompt": "a coat", "seed": 1, "to_seed": 2, "blend": 0.5, "n": 1, "strengths": {},
            "as_map": False, "image": pages.picture()}
    seen, outcomes = set(), []
    for _ in range(300):
        body = dict(good)
        for key in chance.sample([*good, "more"], chance.randint(0, 3)):
            body[key] = chance.choice(odd)
        raw = json.dumps(body).encode()
        if chance.random() < 0.3:
            at = chance.randrange(len(raw))
            raw = raw[:at] + bytes([chance.randrange(256)]) + raw[at + chance.randint(0, 3):]
        path = chance.choice(["api/draw", "api/draw", "api/compare" if chance.random() < 0.05 else "api/draw", "api/x"])
        status, answer, _ = pages.asked(address, path, raw=raw)
        seen.add(status)
        told = status == 200 or (status in (400, 404, 405, 413, 422) and set(answer) == {"error"})
        outcomes.append((str(raw[:300]), "" if told else f"{status} {answer}"))
    hold(outcomes, record_property)
    assert {200, 422} <= seen


def test_bytes_that_are_no_http_do_no_harm(address):
    host, port = address.removeprefix("http://").rstrip("/").split(":")
    for sent in (b"\x00" * 100, b"GET / HTTP/1.1\r\nHost: \xff\r\n\r\n",
                 b"POST /api/draw HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\nab"):
        with socket.create_connection((host, int(port)), timeout=10) as line:
            line.sendall(sent)
    assert pages.asked(address, "api/models")[0] == 200


def test_a_port_in_use_is_one_sentence(address, capsys):
    from jdm.cli.parser import main

    port = address.rstrip("/").rpartition(":")[2]
    assert main(["app", "nano-canny", "--port", port]) == 2
    assert "(Address already in use); choose another --port, or --port 0 for any" in capsys.readouterr().err
    assert main(["app", "--host", "300.1.1.1"]) == 2
    assert "cannot be listened on" in capsys.readouterr().err


def test_a_missing_extra_names_the_pip_line(monkeypatch, capsys):
    import sys

    from jdm.cli.parser import main

    for name in [name for name in sys.modules if name.startswith(("jdm.app.server", "jdm.app.live", "uvicorn"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delattr("jdm.app.server", raising=False)
    assert main(["app"]) == 2
    assert "jdm app needs uvicorn; run: pip install 'jdm[app]'" in capsys.readouterr().err


# Models


def test_students_of_one_unet_share_their_controls():
    found = load_students(["nano-silhouette", "nano-lowres"], [], None, None, "cpu")
    assert [[named.model for named in one.controls] for one in found] == [["nano-silhouette", "nano-lowres"],
                                                                          ["nano-lowres", "nano-silhouette"]]
    assert found[0].model.backbone is found[1].model.backbone
    assert [one.yardstick.name for one in found] == ["nano-controlnet-silhouette", "nano-controlnet-lowres"]
    assert found[0].model.card["page"]["paper"] == "#000000"


def test_a_yardstick_of_another_control_is_refused(student):
    with pytest.raises(UsageError, match=r"nano-controlnet-lowres cannot be compared with any of .*student"):
        load_students([str(student)], [], None, "nano-controlnet-lowres", "cpu")


def test_further_controls_come_with_also(student, tmp_path):
    found = load_students([str(student)], [str(student)], None, None, "cpu")[0]
    assert len(found.controls) == 2
    assert torch.equal(*(next(iter(named.net.parameters())) for named in found.controls))
