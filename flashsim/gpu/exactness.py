"""Every kernel on random problems, on a GPU or without one, held to the rule of `flashsim.testing`.

What a kernel leaves unwritten is NaN, and so is all that lies between the rows of its inputs. A kernel that fails is
data: the smallest problem found on which it does.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from hypothesis import HealthCheck, Phase, Verbosity, configuration, given, seed, settings
from hypothesis import strategies as st

from flashsim.errors import InputError, unknown
from flashsim.gpu.timing import is_fatal
from flashsim.gpu.trials import Trial, blocks, forward, fp8, gluon, gradients
from flashsim.testing import KINDS, AttentionCase, attention_cases, layouts

CUDA, INTERPRETER, STAND_IN = "cuda", "interpreter", "stand-in"
PLACES = {
    CUDA: "on the GPU",
    INTERPRETER: "in Triton's interpreter, corrected",
    STAND_IN: "on the CPU stand-in for Gluon",
}
EXAMPLES = {CUDA: 60, INTERPRETER: 10, STAND_IN: 10}
ROUND = 20
"""Examples between two reports."""
PATIENCE_S = {CUDA: 180.0, INTERPRETER: 900.0, STAND_IN: 900.0}
"""Seconds without a report after which a kernel counts as one that does not end."""
SHRINKING_S = 20.0
"""Seconds for which a smaller failing problem is looked for."""
SHAPES = (
    (64, 64, "fp16", "full"),
    (128, 128, "fp16", "causal"),
    (128, 128, "bf16", "full"),
    (40, 72, "fp16", "causal"),
    (256, 256, "bf16", "causal"),
    (128, 64, "bf16", "window"),
    (192, 128, "fp16", "window"),
    (16, 16, "bf16", "full"),
)
"""(head_dim, head_dim_v, dtype, mask) on a GPU: each is compiled anew, so there are few of them."""
GPU_TILE, GPU_TILES, GPU_FLOPS = (128, 128), (8, 10), 5e8
SMALL_HEAD_DIMS, SMALL_FLOPS = (16, 32, 40, 64), 2e6
STORED = tuple(kind for kind in KINDS if kind not in ("huge_scores", "overflow", "outliers"))
"""Kinds of values that leave scores within fp16."""


@dataclass(frozen=True)
class Subject:
    """A kernel, what it is tried on, and what it is held to."""

    kernel: str
    check: Callable[[Trial, str], None]
    """Runs it on a device; raises AssertionError."""
    masks: tuple[str, ...] = ("full", "causal")
    kinds: tuple[str, ...] = KINDS
    alignment: int = 1
    """Of rows, in elements."""
    options: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Drawn wherever it runs."""
    shipped: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Drawn on a GPU, where tiles are as they ship."""
    small: Mapping[str, Sequence[Any]] = field(default_factory=lambda: {"BLOCK_M": (16, 32), "BLOCK_N": (16, 32)})
    """Drawn without a GPU, in place of the tiles that ship."""
    targets: range = range(80, 130)
    """Compute capabilities, such as 90."""
    gluon: bool = False

    @property
    def elsewhere(self) -> str:
        """Where it runs without a GPU."""
        return STAND_IN if self.gluon else INTERPRETER

    def trials(self, place: str) -> st.SearchStrategy[Trial]:
        """Shrinks to one query and one key, in contiguous tensors."""
        drawn = dict(self.options) | dict(self.shipped if place == CUDA else self.small)
        options = st.fixed_dictionaries({name: st.sampled_from(list(values)) for name, values in drawn.items()})
        return st.builds(Trial, self._cases(place), layouts(alignment=self.alignment), options)

    def _cases(self, place: str) -> st.SearchStrategy[AttentionCase]:
        if place != CUDA:
            tile = (max(self.small.get("BLOCK_M", (32,))), max(self.small.get("BLOCK_N", (32,))))
            return attention_cases(
                kinds=self.kinds, masks=self.masks, tile=tile, head_dims=SMALL_HEAD_DIMS, max_flops=SMALL_FLOPS
            )
        return st.one_of([self._shaped(*shape) for shape in SHAPES if shape[3] in (*self.masks, "window")])

    def _shaped(self, head_dim: int, head_dim_v: int, dtype: str, mask: str) -> st.SearchStrategy[AttentionCase]:
        mask = mask if mask in self.masks else self.masks[0]
        cases = attention_cases(
            kinds=self.kinds,
            masks=(mask,),
            dtypes=(dtype,),
            head_dims=(head_dim,),
            tile=GPU_TILE,
            max_tiles=GPU_TILES,
            max_flops=GPU_FLOPS,
        )
        return cases.map(lambda case: replace(case, problem=replace(case.problem, head_dim_v=head_dim_v)))


_SUBJECTS = (
    Subject("standard", partial(forward, "standard", lse=False), kinds=STORED),
    Subject("fa1", partial(forward, "fa1")),
    Subject("fa2", partial(forward, "fa2"), masks=("full", "causal", "window")),
    Subject(
        "fa2_backward",
        partial(gradients, "fa2"),
        masks=("full", "causal", "window"),
        options={"deterministic": (False, True)},
    ),
    Subject(
        "split_kv", partial(forward, "split_kv"), options={"num_splits": (None, 1, 2, 5), "pack_gqa": (True, False)}
    ),
    Subject("block_sparse", blocks, masks=("full",), shipped={"mask_block": (128,)}, small={"mask_block": (16, 32)}),
    Subject("fa3_triton", partial(forward, "fa3_triton"), alignment=8, targets=range(90, 130)),
    Subject(
        "fa3",
        partial(gluon, "fa3"),
        alignment=8,
        small={"BLOCK_M": (64, 128), "BLOCK_N": (16, 32), "num_stages": (1, 2, 3)},
        targets=range(90, 91),
        gluon=True,
    ),
    Subject(
        "fa3_fp8",
        fp8,
        options={"incoherent": (False, True)},
        small={"BLOCK_M": (16, 32), "BLOCK_N": (32,), "block": (32, 64)},
        shipped={"block": (128, 256)},
        targets=range(90, 110),
    ),
)
SUBJECTS = {subject.kernel: subject for subject in _SUBJECTS}


def subjects_of(kernels: Sequence[str]) -> list[Subject]:
    """Those that are named; all of them, if none is. Raises InputError for names that are none."""
    wrong = [f"kernel: {unknown('kernel', name, SUBJECTS)}" for name in kernels if name not in SUBJECTS]
    if wrong:
        raise InputError(wrong)
    return [SUBJECTS[name] for name in dict.fromkeys(kernels)] or list(SUBJECTS.values())


ALLOCATORS = ("empty", "empty_like", "empty_strided")


@contextmanager
def poisoned_outputs() -> Iterator[None]:
    """Let whatever torch allocates without values be NaN, or the largest number of its dtype."""
    import torch

    def poisoning(allocate: Callable[..., Any]) -> Callable[..., Any]:
        def poisoned(*args: Any, **kwargs: Any) -> Any:
            x = allocate(*args, **kwargs)
            return x.fill_(float("nan") if x.dtype.is_floating_point else torch.iinfo(x.dtype).max)

        return poisoned

    with ExitStack() as stack:
        for name in ALLOCATORS:
            stack.enter_context(mock.patch.object(torch, name, poisoning(getattr(torch, name))))
        stack.enter_context(mock.patch.object(torch.Tensor, "new_empty", poisoning(torch.Tensor.new_empty)))
        yield


def environment_of(place: str) -> dict[str, str | None]:
    """What the process in which kernels run there must find, before it imports triton."""
    # There are several such processes at a time.
    threads = "2" if place == CUDA else "1"
    return {"TRITON_INTERPRET": None if place == CUDA else "1", "OPENBLAS_NUM_THREADS": threads}


def work(request: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Tries one kernel; runs in a process of its own, whose environment is `environment_of` the place.

    `request`: kernel, place, examples, seed. Yields {tried} after every few examples, and at last {examples, failure}:
    how many were tried, up to the first that failed, and None or {kind, message, problem, trial}.
    """
    subject, place = SUBJECTS[request["kernel"]], request["place"]
    with tempfile.TemporaryDirectory() as folder, _ready(place) as device, poisoned_outputs():
        configuration.set_hypothesis_home_dir(Path(folder))
        search = _Search(lambda trial: subject.check(trial, device))
        # Hypothesis calls back, and a report is a yield: a round has a few examples.
        for number, count in enumerate(_rounds(request["examples"])):
            search.look(subject.trials(place), count, request["seed"] + number)
            if search.worst is not None:
                break
            yield {"tried": search.tried}
        yield {"examples": search.tried, "failure": search.failure}


def _rounds(examples: int) -> list[int]:
    return [min(ROUND, examples - begin) for begin in range(0, examples, ROUND)]


@contextmanager
def _ready(place: str) -> Iterator[str]:
    """Where tensors go, once kernels run there."""
    import torch

    if place == CUDA:
        yield "cuda"
        return
    torch.set_num_threads(1)
    if place == INTERPRETER:
        from flashsim.gpu.interpreter import correct_interpreter

        correct_interpreter()
    yield "cpu"


class _Search:
    """Runs trials for Hypothesis, which looks for the smallest that fails, and ends the looking in time."""

    def __init__(self, check: Callable[[Trial], None]) -> None:
        self.tried = 0
        self.worst: tuple[Trial, BaseException] | None = None
        """The last that failed: Hypothesis ends with the smallest."""
        self._check = check
        self._failed: dict[str, BaseException] = {}
        self._until = 0.0

    def look(self, trials: st.SearchStrategy[Trial], examples: int, seed_: int) -> None:
        quiet = settings(
            max_examples=examples,
            database=None,
            deadline=None,
            derandomize=False,
            print_blob=False,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.generate, Phase.shrink),
            verbosity=Verbosity.quiet,
        )
        try:
            seed(seed_)(quiet(given(trial=trials)(self._run)))()
        except Exception:
            if self.worst is None:
                raise

    def _run(self, trial: Trial) -> None:
        name = repr(trial)
        error = self._failed.get(name)
        if error is None:
            if self._failed and time.monotonic() > self._until:
                return  # looked for long enough: nothing fails any more but what has failed before
            try:
                self.tried += not self._failed
                self._check(trial)
                return
            except Exception as found:
                error = found
            if not self._failed:
                self._until = 0.0 if is_fatal(error) else time.monotonic() + SHRINKING_S
            self._failed[name] = error
        self.worst = trial, error
        raise error.with_traceback(None)

    @property
    def failure(self) -> dict[str, Any] | None:
        if self.worst is None:
            return None
        trial, error = self.worst
        p = trial.case.problem
        return {
            "kind": "NotAccepted" if isinstance(error, AssertionError) else type(error).__name__,
            "message": str(error)[:2000],
            "problem": {name: getattr(p, name) for name in p.__dataclass_fields__},
            "trial": repr(trial),
        }
