"""What the simulation says of published claims: their quantities, and the HBM traffic that the papers' theorems give.

A quantity is a function of what was found for one case. The traffic of the theorems is worked out here from the
algorithms alone, with the constants that the schedules' tiles give, for a GPU without an L2; `hbm_formula_ratio` holds
the bytes that a simulation moves against it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flashsim.analysis.fp8_error import one_seed
from flashsim.analysis.parallel import in_order
from flashsim.devices import DeviceSpec
from flashsim.errors import InputError, SimulationError
from flashsim.io.case import Case
from flashsim.io.claims import QUANTITIES, Claim, ClaimFile, Point
from flashsim.io.experiment import Experiment
from flashsim.problem import DTYPES, LSE_BYTES, AttentionProblem, kv_tiles, num_k_tiles, num_q_tiles
from flashsim.result import Result
from flashsim.schedules.base import Schedule
from flashsim.simulate import configured, simulate

TOLERANCE = 0.005
"""A value that is outside of a claim by less agrees with it: published numbers are rounded."""


@dataclass(frozen=True)
class Job:
    """One simulation; claims that need the same one share it."""

    problem: AttentionProblem
    schedule: type[Schedule]
    gpu: DeviceSpec
    clock_mhz: float | None
    options: tuple[tuple[str, Any], ...]
    full: bool


@dataclass(frozen=True)
class Answer:
    """What came of a job: a result, or the RMSE by variant, or why there is none."""

    result: Result | None = None
    errors: Mapping[str, float] | None = None
    refused: tuple[str, ...] = ()
    failure: str | None = None


Answers = Mapping[Job | str, Answer]
"""By jobs; the FP8 error experiment is one, too, as the JSON of what it computes."""


@dataclass(frozen=True)
class Verdict:
    """A claim beside what is simulated: its values, or the mistakes for which there are none, or what failed."""

    claim: Claim
    values: tuple[tuple[Point, float], ...] = ()
    refused: tuple[str, ...] = ()
    failure: str | None = None

    @property
    def simulated(self) -> tuple[float, float] | None:
        """From the lowest to the highest value; the highest twice, if the claim is about that. None without values."""
        if not self.values:
            return None
        values = [value for _, value in self.values]
        return max(values) if self.claim.up_to else min(values), max(values)

    @property
    def below(self) -> float:
        """Part by which the lowest value is below what the claim says; 0 if it is not."""
        return 0.0 if self.simulated is None else max(0.0, 1 - self.simulated[0] / self.claim.says[0])

    @property
    def above(self) -> float:
        """Part by which the highest value is above what the claim says; 0 if it is not."""
        return 0.0 if self.simulated is None else max(0.0, self.simulated[1] / self.claim.says[1] - 1)

    @property
    def within(self) -> bool:
        """Whether the two agree, but for rounding."""
        return self.simulated is not None and max(self.below, self.above) < TOLERANCE

    def to_json(self) -> dict[str, Any]:
        """Plain data with stable keys."""
        claim = self.claim
        said = {key: getattr(claim, key) for key in ("claim", "source", "quantity", "l2", "up_to", "why")}
        found = None if self.simulated is None else list(self.simulated)
        differs = {key: None if found is None else getattr(self, key) for key in ("within", "below", "above")}
        values = [
            {"case": _keys(point.case), "than": _keys(point.than), "value": value} for point, value in self.values
        ]
        unit, says = QUANTITIES[claim.quantity].unit, list(claim.says)
        numbers = {"unit": unit, "says": says, "simulated": found, **differs, "values": values}
        return {**said, **numbers, "failure": self.failure}


def _keys(case: Case | Experiment | None) -> dict[str, Any] | None:
    return case.model_dump() if isinstance(case, Experiment) else None if case is None else case.keys


def jobs_of(claims: Iterable[Claim]) -> list[Job | str]:
    """What has to be run, each once, in the order in which claims need it."""
    return list(dict.fromkeys(job for claim in claims for job in _jobs_of(claim)))


def _jobs_of(claim: Claim) -> Iterator[Job | str]:
    for point in claim.points:
        for case in (point.case, point.than):
            if isinstance(case, Experiment):
                yield case.model_dump_json()
            elif case is not None and QUANTITIES[claim.quantity].of in ("result", "traffic"):
                yield _job_of(case, claim.l2)


def _job_of(case: Case, l2: bool) -> Job:
    """Without an L2 heads have nothing in common, so that one of them, simulated in full, stands for all."""
    options = tuple(sorted(case.options.items()))
    if l2:
        return Job(case.problem, case.schedule, case.gpu, case.clock_mhz, options, full=False)
    gpu = replace(case.gpu, memory=replace(case.gpu.memory, l2_share_byte=0))
    one = replace(case.problem, batch=1, heads_q=1, heads_kv=1)
    return Job(one, case.schedule, gpu, case.clock_mhz, options, full=True)


def run_jobs(jobs: Sequence[Job | str], workers: int = 1) -> Iterator[tuple[Job | str, Answer]]:
    """Run jobs, on `workers` processes, in their order."""
    return zip(jobs, in_order(run_job, jobs, workers), strict=False)


def run_job(job: Job | str) -> Answer:
    """Run one job. Raises nothing that belongs to it."""
    if isinstance(job, str):
        experiment = Experiment.model_validate_json(job)
        seeds = [one_seed(experiment, seed) for seed in range(experiment.seeds)]
        return Answer(errors={name: statistics.median(seed[name] for seed in seeds) for name in experiment.variants})
    options = dict(job.options)
    try:
        result = simulate(job.problem, job.schedule, job.gpu, clock_mhz=job.clock_mhz, options=options, full=job.full)
    except InputError as error:
        return Answer(refused=error.problems)
    except SimulationError as error:
        return Answer(failure=f"{type(error).__name__}: {error}")
    return Answer(result)


def judge(claims: Sequence[Claim], answers: Answers) -> list[Verdict]:
    """The verdicts of the claims whose jobs have all been run."""
    return [_judged(claim, answers) for claim in claims if all(job in answers for job in _jobs_of(claim))]


def _judged(claim: Claim, answers: Answers) -> Verdict:
    needed = [answers[job] for job in _jobs_of(claim)]
    refused = tuple(dict.fromkeys(line for answer in needed for line in answer.refused))
    failure = next((answer.failure for answer in needed if answer.failure), None)
    if refused or failure:
        return Verdict(claim, refused=refused, failure=failure)
    try:
        values = [(point, VALUES[claim.quantity](Found(claim, point, answers))) for point in claim.points]
    except InputError as error:
        return Verdict(claim, refused=error.problems)
    except SimulationError as error:  # in a schedule of the user's
        return Verdict(claim, failure=f"{type(error).__name__}: {error}")
    return Verdict(claim, tuple(values))


def raise_refused(file: ClaimFile, verdicts: Iterable[Verdict]) -> None:
    """Raises InputError with every reason for which a claim cannot be simulated, if there is one."""
    numbers = {id(claim): number for number, claim in enumerate(file.claims, start=1)}
    problems = [
        f"{file.path}: claim[{numbers[id(verdict.claim)]}]: {line}" for verdict in verdicts for line in verdict.refused
    ]
    if problems:
        raise InputError(problems)


def run_claims(file: ClaimFile, workers: int = 1) -> list[Verdict]:
    """All verdicts. Raises InputError if a case does not fit its GPU."""
    verdicts = judge(file.claims, dict(run_jobs(jobs_of(file.claims), workers)))
    raise_refused(file, verdicts)
    return verdicts


@dataclass(frozen=True)
class Found:
    """What a quantity is computed from: one case of a claim, what it is compared with, and the answers."""

    claim: Claim
    point: Point
    answers: Answers

    @property
    def case(self) -> Case:
        assert isinstance(self.point.case, Case)
        return self.point.case

    @property
    def than(self) -> Case:
        assert self.point.than is not None
        return self.point.than

    def result(self, case: Case) -> Result:
        result = self.answers[_job_of(case, self.claim.l2)].result
        assert result is not None
        return result

    def hbm_byte(self, case: Case) -> int:
        """Read and written, by all heads."""
        moved, p = self.result(case).hbm_bytes, case.problem
        return (moved.read + moved.written) * (1 if self.claim.l2 else p.batch * p.heads_q)


def time_us(found: Found) -> float:
    """Of the whole call."""
    return found.result(found.case).time_us


def tflops(found: Found) -> float:
    """By the convention of the README."""
    return found.result(found.case).tflops


def fraction(found: Found) -> float:
    """Of the datasheet's peak."""
    return found.result(found.case).datasheet_fraction


def time_ratio(found: Found) -> float:
    """How many times faster `case` is than `than`."""
    return found.result(found.than).time_us / found.result(found.case).time_us


def hbm_gb(found: Found) -> float:
    """Read and written by the whole call, in 10^9 bytes."""
    return found.hbm_byte(found.case) / 1e9


def hbm_ratio(found: Found) -> float:
    """How many times less `case` reads and writes."""
    return found.hbm_byte(found.than) / found.hbm_byte(found.case)


def hbm_formula_ratio(found: Found) -> float:
    """Bytes that the simulation moves / bytes that the theorem's closed form gives."""
    return found.hbm_byte(found.case) / formula_byte(found.case)


def memory_mib(found: Found) -> float:
    """Inputs, outputs and what the schedule keeps beside them, in 2^20 bytes; `Result.peak_memory_bytes`."""
    return _memory_byte(found.case) / 2**20


def memory_ratio(found: Found) -> float:
    """How many times less memory `case` needs."""
    return _memory_byte(found.than) / _memory_byte(found.case)


def kernels(found: Found) -> float:
    """Launches of one call."""
    return float(len(_schedule_of(found.case).kernels(found.case.problem)))


def flop_per_exp(found: Found) -> float:
    """FLOPs of matrix products, at the datasheet's peak, in the time of one exponential."""
    gpu = found.case.gpu
    exp_per_us = gpu.pipes.exp_op_per_clk * gpu.sm.count * gpu.clock.datasheet_mhz
    return gpu.tensor.fp16_tflops * 1e6 / exp_per_us


def flop_per_fp32_flop(found: Found) -> float:
    """FLOPs of matrix products in the time of one FLOP of fp32 outside of them; an FMA is two."""
    gpu = found.case.gpu
    return gpu.tensor.fp16_flop_per_clk / (2 * gpu.pipes.fma_op_per_clk)


def exp_time_fraction(found: Found) -> float:
    """Time of the exponentials of the forward pass / time of its products, both at their peaks."""
    return flop_per_exp(found) / (2 * replace(found.case.problem, direction="fwd").products_depth)


def error_ratio(found: Found) -> float:
    """RMSE of fp8 attention with one scale for each tensor / RMSE of FlashAttention-3 in fp8; medians over seeds."""
    assert isinstance(found.point.case, Experiment)
    errors = found.answers[found.point.case.model_dump_json()].errors
    assert errors is not None
    return errors["fp8-per-tensor"] / errors["fp8-fa3"]


VALUES: Mapping[str, Callable[[Found], float]] = {name: globals()[name] for name in QUANTITIES}
"""The functions above, by their names."""


def _schedule_of(case: Case) -> Schedule:
    return configured(case.schedule, case.problem, case.gpu, case.options)


def _memory_byte(case: Case) -> int:
    p, schedule = case.problem, _schedule_of(case)
    if any(kernel.kv_dtype for kernel in schedule.kernels(p)):
        raise InputError("memory of K and V in another dtype than the problem's is not counted here")
    return p.memory_bytes + schedule.workspace_byte(p)


# HBM traffic of the papers' theorems, in bytes of one head, without an L2.


def formula_byte(case: Case) -> int:
    """Bytes read and written by the whole call, from the algorithm and its tiles.

    Raises InputError for a case that no closed form is written down for.
    """
    schedule, p = _schedule_of(case), case.problem
    forms = {name: FORMULAS.get((schedule.name(), name)) for name in p.passes}
    build = schedule.options().get("build", "paper")
    plain = p.heads_per_kv == 1 and not p.dropout and not p.mask_rule.by_batch
    plain &= schedule.name() != "standard" or p.mask_rule.kind == "full"
    if not plain or build != "paper" or None in forms.values():
        raise InputError(
            f"there is no closed form for {schedule.name()} with this direction, mask, build, dropout or grouped heads"
        )
    of_head = sum(form(p, schedule) for form in forms.values() if form is not None)
    return of_head * p.batch * p.heads_q


def standard_fwd(p: AttentionProblem, schedule: Schedule) -> int:
    """Theta(N d + N^2), FA1 theorem 2: S and P, each written and read once.

    Beside that, copies of Q, K and V, and products of b x b tiles, which read K and V again for each of N / b blocks
    of queries.
    """
    N, M, d, dv = p.seqlen_q, p.seqlen_k, p.head_dim, p.head_dim_v
    blocks = num_q_tiles(p, schedule.BLOCK_M)
    copies = 2 * (N * d + M * d + M * dv)
    products = N * d + blocks * M * (d + dv) + N * dv
    return (4 * N * M + copies + products) * p.element_bytes + LSE_BYTES * N


def standard_bwd(p: AttentionProblem, schedule: Schedule) -> int:
    """The same: P, dP and dS written 2 times in all and read 5 times."""
    N, M, d, dv = p.seqlen_q, p.seqlen_k, p.head_dim, p.head_dim_v
    blocks, key_blocks = num_q_tiles(p, schedule.BLOCK_M), num_k_tiles(p, schedule.BLOCK_N)
    dP, dV = N * dv + blocks * M * dv, key_blocks * N * dv + M * dv
    dQ, dK = blocks * M * d + N * d, key_blocks * N * d + M * d
    scaled_and_copied = 2 * (N * d + M * d) + 2 * (N * d + M * d + M * dv)
    return (7 * N * M + dP + dV + dQ + dK + scaled_and_copied) * p.element_bytes


def fa1_fwd(p: AttentionProblem, schedule: Schedule) -> int:
    """Theta(N^2 d^2 / M), FA1 theorem 2: with M the SRAM in elements, Q, O and the statistics go through HBM for each
    of N / B_c = 4 N d / M blocks of keys, which makes 12 N^2 d^2 / M elements.

    With a mask that leaves a part s of the blocks, that many times less: Theta(N d + N^2 d^2 s / M), proposition 4.
    """
    rows = visited_rows(p, schedule.BLOCK_M, schedule.BLOCK_N)
    kv = p.seqlen_k * (p.head_dim + p.head_dim_v)
    elements = rows * (p.head_dim + 2 * p.head_dim_v) + kv + p.seqlen_q * p.head_dim_v  # the last: O = 0 at first
    return elements * p.element_bytes + LSE_BYTES * (2 * rows + p.seqlen_q)


def fa1_bwd(p: AttentionProblem, schedule: Schedule) -> int:
    """Theta(N^2 d^2 / M), FA1 theorem 5: Q, O, dO and dQ, which is read and written, for each block of keys."""
    options = schedule.options()
    rows = visited_rows(p, options["bwd_BLOCK_M"], options["bwd_BLOCK_N"])
    kv = 2 * p.seqlen_k * (p.head_dim + p.head_dim_v)  # and dK, dV
    elements = rows * (3 * p.head_dim + 2 * p.head_dim_v) + kv + p.seqlen_q * p.head_dim  # the last: dQ = 0 at first
    return elements * p.element_bytes + LSE_BYTES * rows


def fa2_fwd(p: AttentionProblem, schedule: Schedule) -> int:
    """Q and O once, K and V for each of N / B_r blocks of queries that sees them: FA2 algorithm 1."""
    keys = visited_keys(p, schedule.BLOCK_M, schedule.BLOCK_N)
    own = p.seqlen_q * (p.head_dim * p.element_bytes + p.head_dim_v * DTYPES[p.output_dtype] + LSE_BYTES)
    return own + keys * (p.head_dim + p.head_dim_v) * p.element_bytes


FORMULAS: Mapping[tuple[str, str], Callable[[AttentionProblem, Schedule], int]] = {
    ("standard", "fwd"): standard_fwd,
    ("standard", "bwd"): standard_bwd,
    ("fa1", "fwd"): fa1_fwd,
    ("fa1", "bwd"): fa1_bwd,
    ("fa2", "fwd"): fa2_fwd,
}


def visited_rows(p: AttentionProblem, BLOCK_M: int, BLOCK_N: int) -> int:
    """Rows of Q, each counted as often as a block of keys is visited by its block: N * ceil(N / BLOCK_N) if all are."""
    sizes = (min(BLOCK_M, p.seqlen_q - m * BLOCK_M) for m in range(num_q_tiles(p, BLOCK_M)))
    return sum(kv_tiles(p, m, BLOCK_M, BLOCK_N).count * size for m, size in enumerate(sizes))


def visited_keys(p: AttentionProblem, BLOCK_M: int, BLOCK_N: int) -> int:
    """Rows of K, each counted as often as a block of queries visits its block: N * ceil(N / BLOCK_M) if all do."""
    blocks = (n for m in range(num_q_tiles(p, BLOCK_M)) for n in kv_tiles(p, m, BLOCK_M, BLOCK_N).blocks)
    return sum(min(BLOCK_N, p.seqlen_k - n * BLOCK_N) for n in blocks)
