"""`jdm demo` on the shipped models, cut short."""

import json

from jdm.demo import demo

KEYS = {"fd", "fd_floor", "fd_extractor", "consistency", "consistency_chance", "diversity", "prompt_agreement", "nfe",
        "seconds_per_image", "n"}


def test_the_demo_measures_four_generators_and_writes_a_page_that_needs_nothing_else(tmp_path):
    lines: list[str] = []
    metrics = demo(tmp_path, steps=2, n=32, say=lines.append)
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    assert set(metrics) == {"controlnet50", "shipped", "fresh_before", "fresh_after"}
    assert all(set(row) >= KEYS for row in metrics.values())
    assert metrics["shipped"]["consistency"] < metrics["fresh_before"]["consistency"]
    assert metrics["shipped"]["consistency"] < metrics["shipped"]["consistency_blank"]
    assert metrics["shipped"]["fd"] < metrics["fresh_before"]["fd"]
    assert metrics["controlnet50"]["seconds_per_image"] > 10 * metrics["shipped"]["seconds_per_image"]
    page = (tmp_path / "report.html").read_text()
    assert "data:image/png;base64" in page
    assert "jdm train nano-canny" in page
    assert "http" not in page
    assert any("50-step ControlNet" in line for line in lines)
