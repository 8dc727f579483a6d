"""`validate`: are the kernels exact, how long do they take, and how far is that from what the simulator predicts?

On a GPU: random problems for every kernel that exists for it, times beside torch's own attention and the predictions,
timelines. Without one: random problems in Triton's interpreter and on the stand-in for Gluon, and the audit; what was
not run is said. Whatever runs kernels is a process of its own, and what is found is kept as it comes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from flashsim.analysis.parallel import in_order
from flashsim.devices import DeviceSpec, load_device
from flashsim.errors import FlashsimError, InputError
from flashsim.gpu.exactness import CUDA, EXAMPLES, PATIENCE_S, Subject, environment_of, subjects_of
from flashsim.gpu.measurements import Measurement, Writer, session_of
from flashsim.gpu.timeline import PROBLEM, of_proton, simulated
from flashsim.gpu.timing import Times
from flashsim.gpu.validation import Exactness, Prediction, Request, Validation, fields, words
from flashsim.gpu.variants import VARIANTS, chosen, problems
from flashsim.gpu.worker import WorkerDied, reports, require_torch_and_triton
from flashsim.paired import use_kernels
from flashsim.problem import AttentionProblem
from flashsim.schedules import schedule_names
from flashsim.simulate import simulate

BUDGET_S, QUICK_BUDGET_S = 1.5, 0.8
"""Of measuring, for one problem with all its variants."""
WORKERS = 8
"""Processes at a time that try kernels on one GPU: they wait for the compiler most of the time."""
GPUS = {
    "NVIDIA H200": "h200-sxm",
    "NVIDIA H100 80GB HBM3": "h100-sxm5",
    "NVIDIA H100 PCIe": "h100-pcie",
    "NVIDIA A100-SXM4-40GB": "a100-sxm4-40gb",
    "NVIDIA A100-SXM4-80GB": "a100-sxm4-80gb",
    "NVIDIA A100 80GB PCIe": "a100-pcie-80gb",
    "NVIDIA L4": "l4",
}
"""The device file of what torch calls a GPU."""
TARGETS = {"ampere": "sm_80", "hopper": "sm_90"}
"""What is audited for a device's architecture."""


Note = Callable[[Any], None]
"""Is given each finding as it comes: Exactness, Measurement, an audit's report, or a line of text."""


def prepare(request: Request) -> Validation:
    """Check everything that can be checked before anything runs. Raises InputError with every mistake."""
    problems: list[str] = []

    def checked(step: Callable[[], Any]) -> Any:
        try:
            return step()
        except InputError as error:
            problems.extend(error.problems)
            return None

    checked(lambda: require_torch_and_triton("validate"))
    subjects = checked(lambda: subjects_of(request.kernels))
    spec = None if request.gpu == "auto" else checked(lambda: load_device(request.gpu))
    checked(use_kernels)
    if request.output is not None:
        checked(lambda: Writer.check(Path(str(request.output))))
    if request.timelines is not None:
        checked(lambda: _folder(str(request.timelines)))
    if problems:
        raise InputError(problems)
    return Validation(request, subjects, spec)


def run(validation: Validation, note: Note) -> None:
    """Do what is asked, and fill in what is found. Raises InputError where the GPU is another one than asked for."""
    v = validation
    v.machine = next(reports("flashsim.gpu.clocks:describe", {}, environment_of(CUDA)))
    if v.on_gpu:
        if v.spec is None and v.machine["gpu"] in GPUS:
            v.spec = load_device(GPUS[v.machine["gpu"]])
        _compare(v)
        note(f"{v.machine['gpu']}, torch {v.machine['torch']}, triton {v.machine['triton']}")
    for one in _exactness(v):
        v.exactness.append(one)
        note(one)
    if v.on_gpu:
        _times(v, note)
        if v.request.timelines:
            _timelines(v, note)
    else:
        _audits(v, note)
        v.not_run.append(
            f"torch {v.machine['torch']} finds no CUDA GPU: kernels were not run on one, nothing was timed, "
            "and there are no timelines"
        )
    v.complete = True


def _folder(path: str) -> None:
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--timelines: cannot make the folder {path}: {error.strerror or error}") from None


def _compare(v: Validation) -> None:
    """Raises InputError where the device file is of another architecture than the GPU."""
    if v.spec is None:
        v.not_run.append(f"predictions: there is no device file for {v.machine['gpu']}; give one with --gpu FILE")
        return
    capability = v.machine["capability"]
    if v.spec.compute_capability != f"{capability // 10}.{capability % 10}":
        raise InputError(
            f"--gpu: {v.spec.name} is of compute capability {v.spec.compute_capability}, "
            f"the GPU here, {v.machine['gpu']}, is sm_{capability}"
        )


def _exactness(v: Validation) -> Iterator[Exactness]:
    capability = v.machine.get("capability", 0)
    subjects = [s for s in v.subjects if not v.on_gpu or capability in s.targets]
    v.not_run += [f"{s.kernel}: does not exist for sm_{capability}" for s in v.subjects if s not in subjects]
    workers = min(WORKERS, max(1, (os.cpu_count() or 1) // 2)) if v.on_gpu else min(2, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        try:
            yield from pool.map(partial(_tried, v), subjects)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _tried(v: Validation, subject: Subject) -> Exactness:
    place = CUDA if v.on_gpu else subject.elsewhere
    examples = v.request.examples or EXAMPLES[place] // (2 if v.request.quick else 1)
    asked = {"kernel": subject.kernel, "place": place, "examples": examples, "seed": v.request.seed}
    tried, last = 0, {}
    try:
        for last in reports("flashsim.gpu.exactness:work", asked, environment_of(place), PATIENCE_S[place]):
            tried = last.get("tried", tried)
    except WorkerDied as error:
        failure = {"kind": "WorkerDied", "message": str(error), "problem": None, "trial": None}
        return Exactness(subject.kernel, place, tried, failure)
    return Exactness(subject.kernel, place, last["examples"], last["failure"])


def _times(v: Validation, note: Note) -> None:
    """Time everything, writing as it comes; then predict it."""
    if "clock_unknown" in v.machine:
        v.not_run.append(f"clock, power and temperature are unknown: {v.machine['clock_unknown']}")
    # A kernel that takes its process with it would only do so again.
    dead = {one.kernel for one in v.exactness if one.failure and one.failure["kind"] == "WorkerDied"}
    v.not_run += [f"{kernel}: not timed, since its process died" for kernel in sorted(dead)]
    device = v.spec.name if v.spec else v.machine["gpu"].lower().replace(" ", "-")
    session = session_of(device)
    writer = Writer(v.request.output, session, device, v.machine)
    with writer:
        kernels = [s.kernel for s in v.subjects if s.kernel not in dead]
        for problem, name, times, state in _timed(v, kernels):
            if not times.cold_us:
                v.not_run.append(f"{name} at {words(problem)}: {times.failure}")
                continue
            number = len(v.measurements)
            m = Measurement(f"{session}-{number:03d}", name, problem, times, state)
            v.measurements.append(m)
            writer.write(m)
            note(m)
    _predict(v)


def _timed(
    v: Validation, kernels: Sequence[str]
) -> Iterator[tuple[AttentionProblem, str, Times, dict[str, Any] | None]]:
    """Problem, variant, times and state, of each that was measured or failed. A variant whose process dies is left out
    from there on, and a problem at which it does otherwise is."""
    capability = v.machine["capability"]
    waiting = [p for p in problems(v.request.quick) if chosen(p, kernels, capability)]
    left_out: set[str] = set()
    while waiting:
        done, trying = 0, ""
        asked = {
            "problems": [fields(p) for p in waiting],
            "kernels": list(kernels),
            "capability": capability,
            "uuid": v.machine["uuid"],
            "budget_s": QUICK_BUDGET_S if v.request.quick else BUDGET_S,
            "left_out": sorted(left_out),
        }
        try:
            for report in reports("flashsim.gpu.variants:work", asked, environment_of(CUDA)):
                if "trying" in report:
                    trying = report["trying"]
                    continue
                for name, times in report["times"].items():
                    yield waiting[report["problem"]], name, Times(**times), report["state"]
                done = report["problem"] + 1
            return
        except WorkerDied as error:
            problem, waiting = waiting[done], waiting[done:]
            reason = f"its process died: {str(error).splitlines()[-1][:200]}"
            if trying:
                left_out.add(trying)
                yield problem, trying, Times(failure=f"{reason}; it is left out from here on"), None
            else:
                waiting = waiting[1:]
                yield problem, "all of them", Times(failure=reason), None


def _predict(v: Validation) -> None:
    if v.spec is None:
        return
    work = [(m, v.spec) for m in v.measurements]
    workers = max(1, (os.cpu_count() or 1) - 1)
    for (m, _), found in zip(work, in_order(predicted, work, workers), strict=True):
        v.predictions[m.id] = found


def predicted(work: tuple[Measurement, DeviceSpec]) -> Prediction:
    """Simulate what was measured, at the clock that was read, or else the datasheet's."""
    m, spec = work
    use_kernels()  # the launch tables; this may be a process of its own
    variant = VARIANTS[m.variant]
    schedule = variant.schedule_at(m.problem)
    if schedule not in schedule_names():
        return Prediction(None, f"there is no schedule {schedule}")
    clock = m.state["sm_mhz"] if m.state else None
    try:
        result = simulate(m.problem, schedule, spec, clock_mhz=clock, options=variant.options)
    except FlashsimError as error:
        return Prediction(None, str(error).splitlines()[0])
    return Prediction(result.time_us)


def _timelines(v: Validation, note: Note) -> None:
    """Of `fa3`: one CTA as it is simulated, and a few as Proton records them."""
    folder = Path(str(v.request.timelines))
    if v.spec is None or "fa3" not in {s.kernel for s in v.subjects}:
        v.not_run.append("timelines: there are those of fa3 only, on a GPU that has a device file")
        return
    clock = next((m.state["sm_mhz"] for m in v.measurements if m.state), None)
    path = folder / f"fa3-{v.spec.name}-simulated.json"
    path.write_text(json.dumps(simulated(PROBLEM, "fa3", v.spec, {"impl": "gluon"}, clock)), encoding="utf-8")
    v.timelines.append(str(path))
    path = folder / f"fa3-{v.spec.name}-measured.json"
    asked = {"problem": fields(PROBLEM), "path": str(path)}
    try:
        found = next(reports("flashsim.gpu.proton:work", asked, environment_of(CUDA)))
        trace = of_proton(json.loads(path.read_text(encoding="utf-8")), found["consumers"])
        path.write_text(json.dumps(trace), encoding="utf-8")
    except (FlashsimError, StopIteration, ValueError) as error:
        v.not_run.append(f"measured timeline: {str(error).splitlines()[-1][:300] if str(error) else 'nothing came'}")
        return
    v.timelines.append(str(path))
    note(f"timelines of fa3 in {folder}")


def _audits(v: Validation, note: Note) -> None:
    from flashsim.gpu.audit import audit
    from flashsim.gpu.kernels import KERNELS

    target = TARGETS.get(v.spec.architecture, "sm_90") if v.spec else "sm_90"
    for subject in v.subjects:
        if subject.kernel in KERNELS:
            report = audit(subject.kernel, target)
            v.audits.append(report)
            note(report)
