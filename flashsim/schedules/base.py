"""What a schedule is: switches, a list of kernels, and for each kernel its roles, its shared memory and its grid."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from flashsim.errors import InputError, unknown
from flashsim.masks import SPELLING
from flashsim.problem import AttentionProblem
from flashsim.schedules.tensors import TENSORS, Tensor
from flashsim.schedules.verbs import Program

OTHER_REGISTERS = 24
"""Registers a thread needs beside its tiles: addresses, loop counters, row statistics. Assumed: a round number with
which every tile that the published kernels ship fits."""


@dataclass(frozen=True)
class Role:
    """Warpgroups of one CTA that run the same program."""

    name: str
    program: Callable[..., Program]
    """Called with the warpgroup, what `Kernel.shared` returned, and what `registers` returned."""
    count: int = 1
    warps: int = 4
    registers: Callable[..., Any] | None = None
    """Declares the register tiles of one warpgroup; called with a `verbs.Registers`."""
    registers_per_thread: int = 255
    """The limit that the kernel sets, by launch bounds or by `setmaxnreg`."""


@dataclass(frozen=True)
class Grid:
    """What a work tile is, which CTA works on which, and when.

    over: a work tile is a block of `queries` with the KV tiles that it visits, or a block of `keys` with its Q tiles.
    order: `rows` walks the blocks of one head, then the next head (CUDA's block order with x the block);
    `longest_first` walks, within a section of as many heads as the L2 holds, all heads' longest blocks first.
    launch: `cta` starts one CTA for each tile, when an SM has room; `head` one for each head of each batch entry, with
    all its tiles in order; `static` starts as many CTAs as fit and gives CTA i the tiles i, i + n, ...; `dynamic` gives
    the next tile to whichever of them asks first.
    """

    order: Literal["rows", "longest_first"] = "rows"
    launch: Literal["cta", "head", "static", "dynamic"] = "cta"
    section_byte: int = 0
    """For `longest_first`: K and V bytes of a section of heads."""
    over: Literal["queries", "keys"] = "queries"
    heads: Literal["q", "kv"] = "q"
    """Whether there is a work tile for each query head or for each KV head."""
    splits: int | None = None
    """Work tiles into which the KV tiles of one are divided; None where the kernel knows of no splits."""


@dataclass(frozen=True)
class Kernel:
    """One launch."""

    name: str
    roles: tuple[Role, ...]
    shared: Callable[..., Any]
    """Declares what the warpgroups share; called with a `verbs.CTA`."""
    grid: Grid
    BLOCK_M: int
    BLOCK_N: int
    mma: Literal["mma.sync", "wgmma"]
    copy: Literal["cp.async", "tma"]
    head_dim: int = 0
    """Columns of the tiles of Q and K, of which those beyond the problem's head dim are zero; 0: the problem's."""
    head_dim_v: int = 0
    cluster: int = 1
    """CTAs that load K and V together, each a part, by multicast."""
    overhead_instructions: int = 0
    """Warp instructions a KV tile costs beside those that the verbs stand for: addresses, predicates, the loop."""
    walk: Literal["mask", "all", "none"] = "mask"
    """Which tiles of the inner loop a work tile visits: those that the mask leaves, all of them, or none."""
    masks: bool = True
    """Asks which of its KV tiles need masking; to a kernel that never does, all are alike."""
    scaled_scores: bool = False
    """The scores that it reads have been multiplied by the softmax scale."""
    library: bool = False
    """A framework's kernel, which moves data at the rate that such kernels reach, not at the best there is."""
    indexed: bool = False
    """Such a kernel that finds each element's place by divisions: an operand is broadcast or permuted."""
    flop_per_byte: float = 0.0
    """Of a framework's product: what it computes for each byte that it moves."""
    kv_dtype: str = ""
    """Of K and V in HBM, where it is not the problem's."""
    workspace: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    """Tensors in HBM that are neither given nor wanted, by name."""

    def widths(self, problem: AttentionProblem) -> tuple[int, int]:
        """Columns of the tiles of Q and K, and of V and O."""
        return self.head_dim or problem.head_dim, self.head_dim_v or problem.head_dim_v

    def tensor(self, name: str) -> Tensor:
        """Raises AttributeError if the kernel knows no tensor of this name."""
        tensor = TENSORS.get(name) or self.workspace.get(name)
        if tensor is None:
            raise AttributeError(unknown("tensor", name, [*TENSORS, *self.workspace]))
        return tensor._replace(dtype=self.kv_dtype) if self.kv_dtype and name in ("K", "V") else tensor

    def arguments(self, name: str) -> tuple[str, ...]:
        """The axes of a tensor that a work tile does not fix, of `head`, `split` and `block`, in this order."""
        tensor = self.tensor(name)
        free = (
            ("head", tensor.heads == "q" and self.grid.heads == "kv"),
            ("split", tensor.splits and self.grid.splits is None),
            ("block", tensor.rows != self.grid.over or tensor.columns == "keys"),
        )
        return tuple(axis for axis, is_free in free if is_free)

    def streams(self, name: str) -> bool:
        """True if every tile of the inner loop has a part of the tensor."""
        return "block" in self.arguments(name)

    def is_common(self, name: str) -> bool:
        """True if work tiles of one head have parts of the tensor in common."""
        return self.streams(name) and self.tensor(name).columns != "keys"


@dataclass(frozen=True)
class Switch:
    """One option of a schedule, as `flashsim schedules` lists it."""

    name: str
    type_name: str
    default: Any
    choices: tuple[str, ...]
    help: str


def switch(default: Any, help: str, choices: tuple[str, ...] = ()) -> Any:
    """Declare an option as a dataclass field. Default None: decided by `Schedule.defaults`."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class Schedule:
    """Base of all schedules: a frozen dataclass whose fields are its switches."""

    title: ClassVar[str] = ""
    source: ClassVar[str] = ""
    directions: ClassVar[tuple[str, ...]] = ("fwd",)
    masks: ClassVar[tuple[str, ...]] = tuple(SPELLING)
    """Kinds of masks, without their numbers."""
    dtypes: ClassVar[tuple[str, ...]] = ("fp16", "bf16")
    dropout: ClassVar[bool] = False
    """Whether it can drop elements of P."""
    stores_scores: ClassVar[bool] = False
    """Whether S goes through memory in the problem's dtype, which is one more rounding."""
    architectures: ClassVar[tuple[str, ...]] = ("ampere", "ada", "hopper")

    BLOCK_M: int = switch(None, "query rows of a CTA's tile")
    BLOCK_N: int = switch(None, "keys of a KV tile")
    pack_gqa: bool = switch(False, "query heads that share a KV head in one tile of the forward pass")

    def kernels(self, problem: AttentionProblem) -> tuple[Kernel, ...]:
        """The launches of one call, in order."""
        raise NotImplementedError

    def defaults(self, problem: AttentionProblem, architecture: str) -> dict[str, Any]:
        """Values for the switches that were left at None."""
        raise NotImplementedError

    def by_sms(self, problem: AttentionProblem, sms: int) -> dict[str, Any]:
        """Values for switches that are still at None and that the host chooses by the number of SMs."""
        return {}

    def complaints(self, problem: AttentionProblem) -> list[str]:
        """What is wrong with this combination of switches, one line each."""
        return []

    def workspace_byte(self, problem: AttentionProblem) -> int:
        """Device memory that a call needs beside its inputs and outputs: the workspace of its kernels."""
        sizes = {
            name: tensor.size_byte(problem, kernel.grid.splits or 1)
            for kernel in reversed(self.kernels(problem))  # of a split tensor, the kernel that writes it says how many
            for name, tensor in kernel.workspace.items()
        }
        return sum(sizes.values())

    @classmethod
    def name(cls) -> str:
        """How the command line calls it."""
        return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", cls.__name__).lower()

    @classmethod
    def switches(cls) -> tuple[Switch, ...]:
        """All options, in the order of their declaration."""
        types = typing.get_type_hints(cls)
        return tuple(
            Switch(f.name, _type_name(types[f.name]), f.default, f.metadata["choices"], f.metadata["help"])
            for f in dataclasses.fields(cls)
        )

    @classmethod
    def configure(cls, problem: AttentionProblem, architecture: str, options: Mapping[str, Any], sms: int = 1) -> Self:
        """The schedule with `options` (values or text) set and the rest decided, for a GPU of so many SMs.

        Raises InputError with everything that does not fit: unknown switches, values of the wrong type, a mask,
        direction, dtype, dropout or architecture that the schedule has not.
        """
        problems = [
            f"schedule {cls.name()} has no {kind} {given!r} (it has: {', '.join(has)})"
            for kind, given, has in (
                ("direction", problem.direction, cls.directions),
                ("mask", problem.mask_rule.kind, cls.masks),
                ("dtype", problem.dtype, cls.dtypes),
            )
            if str(given) not in has
        ]
        if problem.dropout and not cls.dropout:
            problems.append(f"schedule {cls.name()} has no dropout, got {problem.dropout:g}")
        if architecture not in cls.architectures:
            problems.append(
                f"schedule {cls.name()} does not run on {architecture} (it runs on: {', '.join(cls.architectures)})"
            )
        switches = {s.name: s for s in cls.switches()}
        values: dict[str, Any] = {}
        for key, given in options.items():
            if key not in switches:
                problems.append(unknown(f"switch of {cls.name()}", key, switches))
                continue
            try:
                values[key] = _parse(switches[key], given)
            except ValueError as error:
                problems.append(f"switch {key} of {cls.name()}: {error}")
        if problems:
            raise InputError(problems)
        asked = cls(**values)
        for key, value in asked.defaults(problem, architecture).items():
            if getattr(asked, key) is None:
                values[key] = value
        schedule = cls(**values)
        complaints = schedule.complaints(problem)
        special = problem.direction != "fwd" or problem.dropout or problem.dtype == "fp8"
        if schedule.pack_gqa and problem.heads_per_kv > 1 and special:
            complaints.append("pack_gqa is for a forward pass in 16 bits, without dropout")
        if complaints:
            raise InputError([f"schedule {cls.name()}: {line}" for line in complaints])
        for key, value in schedule.by_sms(problem, sms).items():
            if getattr(schedule, key) is None:
                values[key] = value
        return cls(**values)

    def options(self) -> dict[str, Any]:
        """All switches with their values."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}


def _type_name(annotation: Any) -> str:
    """`int` of int and of int | None. Raises InputError for what no text on a command line can be turned into."""
    kinds = [kind for kind in typing.get_args(annotation) or (annotation,) if kind is not type(None)]
    if len(kinds) != 1 or kinds[0] not in (bool, int, str):
        raise InputError(f"a switch has type {annotation}, it must be bool, int or str")
    return str(kinds[0].__name__)


def _parse(switch: Switch, given: Any) -> Any:
    """Raises ValueError with what was given and what is allowed."""
    text = str(given).strip()
    if switch.type_name == "bool":
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{text!r} is neither true nor false")
        return text.lower() == "true"
    if switch.type_name == "int":
        if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 4096:
            raise ValueError(f"{text!r} is not a whole number from 1 to 4096")
        return int(text)
    if text not in switch.choices:
        raise ValueError(unknown("value", text, switch.choices))
    return text
