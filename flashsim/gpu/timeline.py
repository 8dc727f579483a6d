"""What happens inside a CTA, as Chrome trace events (Perfetto, chrome://tracing): simulated, and as Proton records it.

Both count cycles and show one as a nanosecond, as Proton does. In the simulated timeline every role of the CTA has a
row, in which its own waits and register operations stand, with their signals as points; what it issued and did not
wait for has rows of its own, products one for each role, copies one for each place in shared memory.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flashsim.devices import DeviceSpec
from flashsim.errors import InputError
from flashsim.machine.options import Options
from flashsim.machine.trace import Touch, Trace
from flashsim.numerics.functional import refuse_large, run_tensors
from flashsim.numerics.inputs import random_inputs
from flashsim.problem import AttentionProblem
from flashsim.schedules import load_schedule
from flashsim.simulate import configured, naming_lines_of, run_kernels
from flashsim.units import TICKS_PER_CLK

PROBLEM = AttentionProblem(batch=1, heads_q=1, seqlen_q=2048, head_dim=128)
"""16 CTAs, 16 KV tiles each: a timeline that can be read."""
KEPT_CTAS = 4
"""Of a measured timeline."""
REGISTER_VERBS = ("map(", "reduce(", "convert(")

Event = dict[str, Any]


def simulated(
    problem: AttentionProblem,
    schedule: str,
    device: DeviceSpec,
    options: Mapping[str, Any],
    clock_mhz: float | None = None,
) -> dict[str, Any]:
    """The first CTA of the first kernel of a forward pass. `clock_mhz`: by default the datasheet's.

    Raises InputError for a problem that is too large to be simulated with numbers, or that the schedule refuses.
    """
    refuse_large(problem)
    kind, trace = load_schedule(schedule), Trace()
    tensors = run_tensors(problem, *random_inputs(problem, 0))
    chosen = configured(kind, replace(problem, direction="fwd"), device, options)
    with naming_lines_of(kind):
        run_kernels(
            problem, chosen, device, clock_mhz or device.clock.datasheet_mhz, Options(tensors=tensors, trace=trace)
        )
    cta = trace.touches[0].cta
    return of_touches([touch for touch in trace.touches if touch.cta is cta], cta.kernel.name)


def of_touches(touches: list[Touch], kernel: str) -> dict[str, Any]:
    """What was done in one CTA, as a trace that begins at 0."""
    start = min(touch.begin for touch in touches)
    events: list[Event] = []
    batches: dict[tuple[str, int, int], Event] = {}
    for touch in touches:
        end = touch.begin if touch.end is None else touch.end
        own = touch.what.startswith(REGISTER_VERBS)
        key = (touch.who, touch.begin, end)
        if own and key in batches:  # operations that were said together are served together
            batches[key]["args"]["operations"].append(touch.what)
        elif not touch.what.startswith("waits") or end > touch.begin:
            event = {
                "cat": "simulated",
                "ph": "X" if end > touch.begin else "i",
                "pid": f"{kernel} CTA 0, simulated",
                "tid": _row(touch),
                "ts": _us(touch.begin - start),
                "args": {"operations": [touch.what], "source": touch.where.replace("\\", "/").rpartition("/")[2]},
            }
            event |= {"dur": _us(end - touch.begin)} if end > touch.begin else {"s": "t"}
            if own:
                batches[key] = event
            events.append(event)
    events = [{"name": _name(event["args"]["operations"]), **event} for event in events]
    return {"displayTimeUnit": "ns", "traceEvents": sorted(events, key=lambda event: event["ts"])}


def _us(ticks: int) -> float:
    """A cycle as a nanosecond."""
    return ticks / TICKS_PER_CLK / 1e3


def _row(touch: Touch) -> str:
    verb, into = touch.what.partition("(")[0], re.search(r"into=(.*)\)$", touch.what)
    if verb == "gemm":
        return f"{touch.who}: products"
    if verb == "load" and into:
        return f"{touch.who}: {into[1]}"
    return f"{touch.who}: stores" if verb in ("store", "atomic_add") else touch.who


def _name(operations: list[str]) -> str:
    """In a few words; those of `proton.SCOPES` where it is the same thing."""
    first = operations[0]
    if any(operation.startswith("map(exp") for operation in operations):
        return "softmax"
    if first.startswith(REGISTER_VERBS):
        return ", ".join(
            dict.fromkeys(re.split(r"[(,]", operation)[int(operation[0] != "c")] for operation in operations)
        )
    if barrier := re.match(r"waits for phase -?\d+ of (.*?) \(", first):
        return f"wait {barrier[1]}"
    if first.startswith("waits for the turn"):
        return "turn"
    if first.startswith("waits for the end of gemm"):
        return "wait for products"
    verb = first.partition("(")[0]
    if verb in ("gemm", "load", "store", "atomic_add") and (into := re.search(r"\((.*), into=(.*)\)$", first)):
        given, result = (re.sub(r"\w+( \d+)?'s |\(batch .*| rows \d+ to \d+|,", "", text) for text in into.groups())
        return f"{result} = {given}" if verb == "gemm" else f"{verb} {result if verb == 'load' else given}"
    return first


def of_proton(trace: Mapping[str, Any], consumers: int) -> dict[str, Any]:
    """What Proton wrote of a run of `fa3`, of the first few CTAs, with the names of the roles beside the warps'.

    Raises InputError for what is not a trace.
    """
    events = trace.get("traceEvents")
    if not isinstance(events, list) or not all(isinstance(event, dict) for event in events) or not events:
        raise InputError("timeline: Proton recorded nothing")
    kept = set(list(dict.fromkeys(event.get("pid") for event in events))[:KEPT_CTAS])
    found = []
    for event in events:
        if event.get("pid") in kept:
            warp = re.search(r"warp\s*(\d+)", str(event.get("tid")))
            group = int(warp[1]) // 4 if warp else 0
            role = f"consumer {group}" if group < consumers else "producer"
            found.append({**event, "tid": f"{role} ({event['tid']})"} if warp else dict(event))
    return {**trace, "traceEvents": found}
