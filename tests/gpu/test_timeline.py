"""Timelines of a CTA: simulated ones, and `fa3` with Proton's scopes, compiled where there is no GPU."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from flashsim.devices import load_device
from flashsim.errors import InputError
from flashsim.gpu.timeline import KEPT_CTAS, PROBLEM, of_proton, simulated
from flashsim.problem import AttentionProblem

SMALL = AttentionProblem(batch=1, heads_q=1, seqlen_q=512, head_dim=128)
TILES = 4
FROM_FILE = Path(__file__).parent / "proton_passes.py"


@pytest.fixture(scope="module")
def trace() -> dict[str, Any]:
    return simulated(SMALL, "fa3", load_device("h200-sxm"), {"impl": "gluon"}, 1700)


def rows(trace: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    found = defaultdict(list)
    for event in trace["traceEvents"]:
        if event["ph"] == "X":
            found[event["tid"]].append(event)
    return found


def test_every_role_has_a_row_and_what_it_does_not_wait_for_rows_of_its_own(trace: dict[str, Any]) -> None:
    found = rows(trace)
    roles = {"consumer 0", "consumer 1", "producer"}
    assert {row.partition(":")[0] for row in found} == roles
    assert {"consumer 0: products", "consumer 1: products", "producer: K[0]", "producer: V[1]"} <= set(found)


def test_what_stands_in_one_row_comes_one_after_the_other(trace: dict[str, Any]) -> None:
    for row, events in rows(trace).items():
        for before, after in pairwise(sorted(events, key=lambda event: event["ts"])):
            overlap = before["ts"] + before["dur"] - after["ts"]
            # The next product is issued before the last instruction of the one before has left the tensor cores.
            assert overlap <= (0.05 if row.endswith("products") else 1e-9), (row, before, after)


def test_what_is_computed_is_there_once_a_tile(trace: dict[str, Any]) -> None:
    for consumer in ("consumer 0", "consumer 1"):
        own = [event["name"] for event in rows(trace)[consumer]]
        products = [event["name"].partition(" ")[0] for event in rows(trace)[f"{consumer}: products"]]
        assert own.count("softmax") == TILES
        assert (products.count("S"), products.count("O")) == (TILES, TILES)
    loads = [event["name"] for row, events in rows(trace).items() for event in events if row.startswith("producer:")]
    assert len([name for name in loads if name.startswith("load K")]) == TILES


def test_the_softmax_of_one_tile_runs_under_the_product_of_the_tile_before(trace: dict[str, Any]) -> None:
    softmax = [event for event in rows(trace)["consumer 0"] if event["name"] == "softmax"][1]
    products = [event for event in rows(trace)["consumer 0: products"] if event["name"].startswith("O = P")]
    begin, end = softmax["ts"], softmax["ts"] + softmax["dur"]
    assert any(begin < event["ts"] + event["dur"] and event["ts"] < end for event in products)


def test_it_begins_at_zero_and_names_its_source(trace: dict[str, Any]) -> None:
    events = trace["traceEvents"]
    assert events[0]["ts"] == 0
    assert [event["ts"] for event in events] == sorted(event["ts"] for event in events)
    assert {event["pid"] for event in events} == {"fa3_fwd CTA 0, simulated"}
    assert all(re.fullmatch(r"\w+\.py:\d+", event["args"]["source"]) for event in events)
    assert all(event["args"]["operations"] for event in events)


def test_another_schedule(trace: dict[str, Any]) -> None:
    other = simulated(SMALL, "fa2", load_device("a100-sxm4-80gb"), {})
    assert any(event["name"] == "softmax" for event in other["traceEvents"])


def test_what_is_too_large_is_refused() -> None:
    large = replace(PROBLEM, heads_q=64, heads_kv=64)
    with pytest.raises(InputError, match="GFLOP"):
        simulated(large, "fa3", load_device("h200-sxm"), {})


def test_names_of_warps() -> None:
    events = [
        {"name": "softmax", "pid": f"fa3_fwd Core{cta} CTA{cta}", "tid": f"warp {warp} ", "ts": 1.0, "dur": 2.0}
        for cta in range(6)
        for warp in (0, 4, 8)
    ]
    found = of_proton({"displayTimeUnit": "ns", "traceEvents": events}, consumers=2)
    assert found["displayTimeUnit"] == "ns"
    assert {event["tid"].partition(" (")[0] for event in found["traceEvents"]} == {
        "consumer 0",
        "consumer 1",
        "producer",
    }
    assert len({event["pid"] for event in found["traceEvents"]}) == KEPT_CTAS
    assert events[0]["tid"] == "warp 0 "


@pytest.mark.parametrize("trace", [{}, {"traceEvents": []}, {"traceEvents": [1]}, {"traceEvents": "x"}])
def test_no_trace(trace: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="Proton recorded nothing"):
        of_proton(trace, 2)


def test_the_kernel_compiles_with_scopes() -> None:
    pytest.importorskip("triton")
    from flashsim.gpu.compile import Call, Failure, Tensor, compile_call
    from flashsim.gpu.proton import SCOPES

    x = Tensor((2, 4096, 16, 128))
    found = compile_call(Call(f"{FROM_FILE}:compile_with_scopes", {"q": x, "k": x, "v": x}), 90)
    assert not isinstance(found, Failure), found
    kernel = found[0]
    recorded = re.findall(r'proton\.record (start|end) "([^"]+)"', kernel.ttgir)
    assert {name for _, name in recorded} == set(SCOPES)
    assert len([1 for kind, _ in recorded if kind == "start"]) * 2 == len(recorded)
    # Each is a clock that is read, and the roles are what they are without.
    assert len(re.findall(r"SR_CLOCK|CS2R", kernel.sass)) >= len(recorded)
    assert kernel.total_warps == 12
    assert kernel.shared <= 232448


def test_a_device_function_that_has_moved_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from flashsim.gpu import proton

    monkeypatch.setattr(proton, "SCOPES", {"x": "no_such_function", "y": "Ring.nor_this"})
    with pytest.raises(InputError) as caught:
        proton.instrument()
    assert caught.value.problems == (
        "timeline: flashsim_kernels.fa3 has no no_such_function",
        "timeline: flashsim_kernels.fa3 has no Ring.nor_this",
    )
