"""The benchmarks run, at a small size; their figures are nobody's business here."""

import json
import math

from scripts import succeed


def test_preparing_event_recordings(tmp_path):
    sizes = "--recordings 2 --events 300 --repeats 1".split()
    output = succeed("-m", "benchmarks.events", *sizes, "--output", tmp_path)
    (path,) = tmp_path.glob("events-*.json")
    assert str(path) in output
    report = json.loads(path.read_text())
    assert report["versions"]["torch"]
    for name, samples in (("CIFAR10-DVS", 20), ("DVS128 Gesture", 24)):
        result = report["data_sets"][name]
        assert result["samples"] == samples
        both = result["recordings_per_s"]
        for side in ("spikingjelly", "ours"):
            assert both[side]["median"] > 0
        ratio = both["ours"]["median"] / both["spikingjelly"]["median"]
        assert math.isclose(both["ours"]["ratio"], ratio)
    assert "Found no valid file" in report["data_sets"]["CIFAR10-DVS"]["failure_without_patch"]
