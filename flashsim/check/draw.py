"""Hypothesis draws examples for a schedule. What a schedule accepts is not declared anywhere: it is asked."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import hypothesis
from hypothesis import configuration, reject
from hypothesis import strategies as st
from hypothesis.internal.conjecture.providers import HypothesisProvider

from flashsim.check.example import KINDS, MODES, Example, Latencies
from flashsim.devices import load_device
from flashsim.errors import EndlessRun, InputError, SimulationError
from flashsim.machine.feasibility import fit
from flashsim.masks import SPELLING
from flashsim.problem import DTYPES, AttentionProblem
from flashsim.schedules import Schedule, Switch
from flashsim.simulate import configured
from flashsim.testing.cases import attention_inputs
from flashsim.testing.problems import attention_problems

GPUS = {"hopper": "h100-sxm5", "ampere": "a100-sxm4-80gb", "ada": "l4"}
"""One for each architecture."""
SMS = (1, 1, 2, 3)
TILES = {
    "BLOCK_M": (16, 64, 128, 192, 256),
    "BLOCK_N": (16, 32, 48, 64, 80, 128, 256),
    "bwd_BLOCK_M": (64, 80, 128),
    "bwd_BLOCK_N": (64, 80, 128),
}
"""Tried, from the smallest; what the schedule refuses is left out."""
IMPL, OTHER_IMPL = "impl", (0, 0, 0, 1, 2)
"""Twice in five examples it is another one than the published kernel, if there are others."""
ROUND, FAR_APART = 10, 2**32
"""Hypothesis draws ten examples, and from then on five variations of each: in rounds of ten, all are different."""
FEW, MANY = 4, 16
"""A whole number that is no tile is tried from 1 to the first of these, and at the largest up to the second."""
SHIPPED = (False, False, False, False, True)
"""Once in five examples, the tile is the one that the schedule ships with, and the head dims go with it."""
HEAD_DIMS, SHIPPED_HEAD_DIMS = (16, 32, 40, 64), (64, 96, 128, 192, 256)
MAX_TILES, SHIPPED_MAX_TILES = (3, 6), (2, 3)
MAX_FLOPS, SHIPPED_MAX_FLOPS = 2e7, 1e8
"""Of a problem: some milliseconds in float64."""
DROPOUT = (0.0, 0.17)
NARROW = (False, False, False, True)
"""How often a schedule that takes fp8 is tried in it."""
PLAIN = {"batch": 1, "heads_q": 1, "seqlen_q": 512, "head_dim": 64}


class NothingAccepted(Exception):
    """The schedule refuses every problem and every combination of switches that is tried."""


def dtypes_of(schedule: type[Schedule]) -> tuple[str, ...]:
    """Of the dtypes with the same switches, one each."""
    return (schedule.dtypes[0], "fp8") if "fp8" in schedule.dtypes[1:] else schedule.dtypes[:1]


def impls_of(schedule: type[Schedule], architecture: str, dtype: str) -> tuple[str | None, ...]:
    """Whose kernels the schedule can be there; (None,) for one that has no such switch."""
    return _values_of(schedule, architecture, dtype, None).get(IMPL) or (None,)  # type: ignore[arg-type]


def values_of(
    schedule: type[Schedule], architecture: str, dtype: str, impl: str | None = None
) -> dict[str, tuple[Any, ...]]:
    """For each switch, the values that the schedule accepts with all others left alone, but for `impl`."""
    return _values_of(schedule, architecture, dtype, impl)  # type: ignore[arg-type]


@cache
def _values_of(schedule: type[Schedule], architecture: str, dtype: str, impl: str | None) -> dict[str, tuple[Any, ...]]:
    plain = AttentionProblem(**PLAIN, dtype=dtype, mask=schedule.masks[0])  # type: ignore[arg-type]
    whose, accepted = {IMPL: impl} if impl else {}, {}
    for switch in schedule.switches():
        if whose and switch.name == IMPL:
            continue
        possible = _candidates(switch)
        found = tuple(
            value for value in possible if _accepts(schedule, plain, architecture, {**whose, switch.name: value})
        )
        accepted[switch.name] = _few(switch, found)
    return accepted


def _candidates(switch: Switch) -> tuple[Any, ...]:
    if switch.name in TILES:
        return TILES[switch.name]
    if switch.type_name == "bool":
        return (False, True)
    return tuple(range(1, MANY + 1)) if switch.type_name == "int" else switch.choices


def _few(switch: Switch, accepted: tuple[Any, ...]) -> tuple[Any, ...]:
    """Of many whole numbers the smallest, and the largest."""
    if switch.type_name != "int" or switch.name in TILES:
        return accepted
    return tuple(value for value in accepted if value <= FEW or value == accepted[-1])


def architectures_of(schedule: type[Schedule]) -> list[str]:
    """Those on which the schedule is tried. Raises InputError for one that says of itself that it runs nowhere."""
    problems = [
        f"schedule {schedule.name()} names no {what} that is known (it names: {', '.join(map(str, has)) or 'none'})"
        for what, has, known in (
            ("architecture", schedule.architectures, GPUS),
            ("dtype", schedule.dtypes, DTYPES),
            ("mask", schedule.masks, SPELLING),
        )
        if not set(has) & set(known)
    ]
    if problems:
        raise InputError(problems)
    return [name for name in GPUS if name in schedule.architectures]


def _accepts(schedule: type[Schedule], problem: AttentionProblem, architecture: str, options: dict[str, Any]) -> bool:
    try:
        configured(schedule, problem, load_device(GPUS[architecture]), options)
    except InputError:
        return False
    except EndlessRun:
        raise
    except SimulationError:  # the schedule's own mistake, which a run will report with file and line
        return True
    return True


def examples_of(schedule: type[Schedule]) -> st.SearchStrategy[Example]:
    """Problems, tiles, switches, numbers and latencies; shrinks to one query, one key and hardware's latencies."""
    return _examples(schedule)


@st.composite
def _examples(draw: st.DrawFn, schedule: type[Schedule]) -> Example:
    architecture = draw(st.sampled_from(architectures_of(schedule)))
    gpu = GPUS[architecture]
    shipped = draw(st.sampled_from(SHIPPED))
    narrow = "fp8" in dtypes_of(schedule) and draw(st.sampled_from(NARROW))
    dtype = dtypes_of(schedule)[-1 if narrow else 0]
    options = draw(_options(schedule, architecture, dtype, tile=not shipped))
    problem = draw(
        attention_problems(
            tile=_tile(schedule, architecture, dtype, options),
            max_tiles=SHIPPED_MAX_TILES if shipped else MAX_TILES,
            head_dims=SHIPPED_HEAD_DIMS if shipped else HEAD_DIMS,
            masks=[kind for kind in schedule.masks if kind != "blocks"],
            dtypes=[dtype for dtype in schedule.dtypes if dtype != "fp8"],
            max_flops=SHIPPED_MAX_FLOPS if shipped else MAX_FLOPS,
            dropout=DROPOUT if schedule.dropout else DROPOUT[:1],
        )
    )
    problem = replace(problem, direction=draw(st.sampled_from(schedule.directions)))
    if narrow:  # the inputs have 16 bits, and are quantized
        problem = replace(problem, dtype="fp8", direction="fwd", dropout=0.0)
    device = load_device(gpu)
    try:
        chosen = configured(schedule, problem, device, options)
        # A backward pass computes the forward pass first; fp8 has none.
        for direction in schedule.directions if problem.dtype != "fp8" else ("fwd",):
            for kernel in chosen.kernels(replace(problem, direction=direction)):
                fit(kernel, problem, device)
    except InputError:
        reject()
    except SimulationError:
        pass  # the schedule's own mistake, which a run will report with file and line
    sms, attention = draw(st.sampled_from(SMS)), draw(attention_inputs(problem))
    # Scores that are stored in fp16 overflow where such values mean them to.
    rounded = draw(st.booleans()) and not (schedule.stores_scores and attention.kind == "huge_scores")
    return Example(schedule, gpu, sms, options, attention, draw(_latencies()), rounded)


@st.composite
def _options(draw: st.DrawFn, schedule: type[Schedule], architecture: str, dtype: str, tile: bool) -> dict[str, Any]:
    """Values for the tile, if it is not to be the schedule's own, and for some of the other switches."""
    # Other kernels of the same algorithm have other switches, so this one is drawn before the rest.
    impls = impls_of(schedule, architecture, dtype)
    impl = impls[draw(st.sampled_from(OTHER_IMPL)) % len(impls)]
    options: dict[str, Any] = {} if impl == impls[0] else {IMPL: impl}
    for name, values in values_of(schedule, architecture, dtype, impl).items():
        if not values:
            continue
        # A tile is drawn in any case: Hypothesis makes an example smaller draw by draw.
        wanted, value = (tile if name in TILES else draw(st.booleans())), draw(st.sampled_from(values))
        if wanted:
            options[name] = value
    return options


def _tile(schedule: type[Schedule], architecture: str, dtype: str, options: dict[str, Any]) -> tuple[int, int]:
    plain = AttentionProblem(**PLAIN, dtype=dtype, mask=schedule.masks[0])  # type: ignore[arg-type]
    try:
        kernel = configured(schedule, plain, load_device(GPUS[architecture]), options).kernels(plain)[0]
    except InputError:
        reject()
    except SimulationError:
        return TILES["BLOCK_M"][0], TILES["BLOCK_N"][0]
    return kernel.BLOCK_M, kernel.BLOCK_N


@st.composite
def _latencies(draw: st.DrawFn) -> Latencies:
    modes = [(kind, draw(st.sampled_from(MODES))) for kind in KINDS]
    seed = draw(st.integers(0, 2**32 - 1))
    return Latencies(tuple((kind, mode) for kind, mode in modes if mode != "hardware"), seed)


def drawn_examples(kind: type[Schedule], count: int, seed: int = 0) -> list[Example]:
    """The first examples that a check of the schedule draws."""
    found: list[Example] = []
    for_examples(kind, count, seed, found.append)
    return found


def for_examples(kind: type[Schedule], count: int, seed: int, action: Callable[[Example], None]) -> None:
    """Let Hypothesis call `action` with `count` examples, and with smaller ones if it raises an exception.

    Raises that of the smallest, and NothingAccepted if the schedule takes none.
    """
    with _nothing_left_behind(), _no_constants():
        for begin in range(0, count, ROUND):
            _round(kind, min(ROUND, count - begin), seed + begin * FAR_APART, action)


def _round(kind: type[Schedule], count: int, seed: int, action: Callable[[Example], None]) -> None:
    def holds(example: Example) -> None:
        action(example)

    settings = hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        derandomize=False,
        print_blob=False,
        report_multiple_bugs=False,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
        verbosity=hypothesis.Verbosity.quiet,
    )
    try:
        hypothesis.seed(seed)(settings(hypothesis.given(example=examples_of(kind))(holds)))()
    except hypothesis.errors.Unsatisfiable:
        raise NothingAccepted from None


@contextmanager
def _nothing_left_behind() -> Iterator[None]:
    """Let Hypothesis keep its notes in a temporary folder, not in the user's."""
    with tempfile.TemporaryDirectory() as folder:
        before = getattr(configuration.storage_directory(intent_to_write=False), "home_directory", None)
        configuration.set_hypothesis_home_dir(Path(folder))
        try:
            yield
        finally:
            configuration.set_hypothesis_home_dir(before)


@contextmanager
def _no_constants() -> Iterator[None]:
    """Keep Hypothesis from drawing constants, its own and those of whatever modules are loaded: a seed says all."""
    with mock.patch.object(HypothesisProvider, "_maybe_draw_constant", return_value=None, create=True):
        yield
