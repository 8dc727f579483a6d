"""Reads what nvdisasm prints: instructions, loops, the work of the tensor cores, and what overlaps with it.

The text is that of `nvdisasm -c`, with labels. Loops are found in the control flow graph, not in the layout: the
compiler moves the retry loop of a barrier wait behind the end of the function, and it belongs to the loop all the same.
"""

from __future__ import annotations

import re
import struct
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

_INSTRUCTION = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P(?:T|\d+))\s+)?([A-Z][A-Z0-9_]*(?:\.[A-Za-z0-9_]+)*)\s*(.*?)\s*;"
)
_LABEL = re.compile(r"^\s*(\.L_x_\d+):")
_TARGET = re.compile(r"\.L_x_\d+")
_MMA_SHAPE = {
    "warp": re.compile(r"^[HQIBDO]MMA(?:\.SP)?\.(8|16)(8)(4|8|16|32|64|128)\b"),
    "warpgroup": re.compile(r"^[HQIB]GMMA(?:\.SP)?\.(64)x(\d+)x(\d+)\b"),
}
_BLACKWELL_K = {"UTCHMMA": 16, "UTCQMMA": 32, "UTCIMMA": 32}
WIDTH = {".U8": 1, ".S8": 1, ".U16": 2, ".S16": 2, ".64": 8, ".128": 16, ".256": 32}
"""Bytes a lane that a load moves, by the part of its opcode; 4 where it has none of these."""
_ENDS = ("BRA", "BRX", "BRXU", "JMP", "JMX", "EXIT", "RET")

KINDS = {
    "exp": ("MUFU.EX2",),
    "fma": ("FFMA", "FMUL", "FADD", "FFMA2", "FMUL2", "FADD2"),
    "convert": ("F2FP", "F2F"),
    "alu": (
        *("FMNMX", "FMNMX3", "FSEL", "FSETP", "FSET", "SEL", "ISETP", "LOP3", "IADD3", "IADD", "VIADD", "VIADDMNMX"),
        *("IMNMX", "VIMNMX", "VIMNMX3", "IMAD", "IABS", "LEA", "SHF", "PRMT", "MOV", "SGXT", "BMSK", "PLOP3", "R2P"),
    ),
}
"""Warp instructions by the pipe that the simulator charges. Integer multiply-adds count as `alu`: they issue at that
rate. Uniform instructions, shuffles, barriers and memory are none of these."""
PACKED = frozenset({"FFMA2", "FMUL2", "FADD2"})
"""Two operations a lane."""
MMA_NAMES = frozenset({"HMMA", "QMMA", "IMMA", "DMMA", "HGMMA", "QGMMA", "IGMMA", "BGMMA", *_BLACKWELL_K, "UTCOMMA"})
SPILLS = frozenset({"LDL", "STL"})
_WORK = MMA_NAMES | {"MUFU.EX2", "UTMALDG", "LDGSTS", "LDTM", "STTM"}


@dataclass(frozen=True)
class Mma:
    """The shape of one instruction, and who issues it: a `warp`, a `warpgroup`, or one thread for the whole `cta`."""

    m: int
    n: int
    k: int
    issuer: str

    @property
    def flop(self) -> int:
        return 2 * self.m * self.n * self.k

    def shared_bytes(self, i: Instruction) -> int:
        """Bytes of operands that `i` reads from shared memory: 32 along k, of B, and of A if that is there too."""
        if self.issuer == "warp":
            return 0
        a = i.args[1 if self.issuer == "warpgroup" else 0]  # HGMMA's gdesc is that of both
        return 32 * (self.n + self.m * a.startswith("gdesc"))


@dataclass(frozen=True)
class Instruction:
    address: int
    opcode: str
    """With all its parts, such as HGMMA.64x128x16.F32."""
    operands: str = ""
    predicate: str = ""

    @cached_property
    def name(self) -> str:
        """The first part of the opcode; MUFU.EX2 and its kin have two."""
        parts = self.opcode.split(".")
        return ".".join(parts[:2]) if parts[0] == "MUFU" else parts[0]

    @property
    def operations(self) -> int:
        """A lane's; 2 for packed arithmetic."""
        return 2 if self.name in PACKED else 1

    @property
    def load_width(self) -> int:
        """Bytes a lane of LDG and LDGSTS; 0 for everything else."""
        return self._width if self.name in ("LDG", "LDGSTS") else 0

    @property
    def shared_bytes(self) -> int:
        """Bytes that a warp moves between registers and shared memory."""
        if self.name in ("LDSM", "STSM"):  # one, two or four 8 x 8 matrices of 16 bits
            return 128 * int(self.opcode[-1] if self.opcode.endswith((".2", ".4")) else 1)
        if self.name in ("LDS", "STS", "LDGSTS"):
            return 32 * self._width
        return 0

    @property
    def _width(self) -> int:
        return next((width for part, width in WIDTH.items() if f"{part}." in f"{self.opcode}."), 4)

    @cached_property
    def args(self) -> list[str]:
        return [part.strip() for part in self.operands.split(",")]


@dataclass(frozen=True)
class Group:
    """MMAs of a warpgroup that were committed together (wgmma.commit_group), in a loop's steady state."""

    mmas: int
    flop: int
    exps: int
    """Exponentials between the issue of the group's last MMA and the wait that completes it."""
    left: int
    """Groups that this wait leaves in flight."""


@dataclass(frozen=True)
class Loop:
    """A natural loop; instructions in the order of their addresses."""

    instructions: tuple[Instruction, ...]

    @cached_property
    def counts(self) -> Counter[str]:
        """Instructions by name."""
        return Counter(i.name for i in self.instructions)

    def kind(self, kind: str) -> int:
        """Operations a lane of one of KINDS."""
        names = KINDS[kind]
        return sum(i.operations for i in self.instructions if i.name in names)

    @property
    def other(self) -> int:
        """Instructions that are neither MMAs nor of one of KINDS."""
        known = MMA_NAMES.union(*KINDS.values())
        return sum(i.name not in known for i in self.instructions)

    @property
    def spills(self) -> int:
        return sum(self.counts[name] for name in SPILLS)

    @property
    def masked(self) -> bool:
        """Whether it selects among about as many elements as it exponentiates, as a loop over partial tiles does."""
        return 4 * self.counts["FSEL"] >= 3 * self.counts["MUFU.EX2"] > 0

    def groups(self) -> tuple[Group, ...]:
        """What stands between asynchronous MMAs and their waits (wgmma only), as the loop goes round and round."""
        in_flight: deque[tuple[int, int, int, int]] = deque()
        found: list[Group] = []
        exps = mmas = flop = 0
        for turn in range(3):
            for i in self.instructions:
                if i.name == "MUFU.EX2":
                    exps += 1
                elif i.name.endswith("GMMA"):
                    mmas, flop = mmas + 1, flop + (mma_of(i, ()).flop)
                    if "gsb0" in i.operands:
                        in_flight.append((turn, mmas, flop, exps))
                        mmas = flop = 0
                elif i.opcode.startswith("WARPGROUP.DEPBAR"):
                    left = int(i.args[-1], 0)
                    while len(in_flight) > left:
                        issued, count, work, before = in_flight.popleft()
                        if issued == 1:
                            found.append(Group(count, work, exps - before, left))
        return tuple(found)


@dataclass(frozen=True)
class Code:
    """A kernel."""

    instructions: tuple[Instruction, ...]
    loops: tuple[Loop, ...]
    """Innermost loops that do work: products, exponentials, copies. In the order of their addresses."""

    @cached_property
    def counts(self) -> Counter[str]:
        return Counter(i.name for i in self.instructions)

    def mma(self, instruction: Instruction) -> Mma:
        return mma_of(instruction, self.instructions)

    def whole(self) -> Loop:
        """The kernel as if it were one turn of a loop: for kernels whose CTAs have one tile each."""
        return Loop(self.instructions)

    def expected_bytes(self, loop: Loop) -> int | None:
        """Bytes that TMA brings in one turn: what mbarriers are told to expect. None if a number is no constant."""
        total = 0
        for i in loop.instructions:
            # A1T0: an arrival without bytes.
            if i.opcode.startswith("SYNCS.ARRIVE.TRANS64") and not i.opcode.endswith("T0"):
                value = constant(i.args[-1], i, self.instructions)
                if value is None:
                    return None
                total += value
        return total


def mma_of(i: Instruction, code: Sequence[Instruction]) -> Mma:
    """Shape of a tensor core instruction. Raises ValueError if it cannot be told.

    tcgen05's stands in its instruction descriptor (PTX ISA, table of the instruction descriptor: N / 8 in bits 17 to
    22, M / 16 in bits 24 to 28), which is a constant that some earlier instruction in `code` loads.
    """
    for issuer, pattern in _MMA_SHAPE.items():
        if shape := pattern.match(i.opcode):
            m, n, k = map(int, shape.groups())
            return Mma(m, n, k, issuer)
    register = re.search(r"idesc\[(UR\d+)\]", i.operands)
    if register and i.name in _BLACKWELL_K:
        value = constant(register[1], i, code)
        if value is not None:
            return Mma((value >> 24 & 0x1F) * 16, (value >> 17 & 0x3F) * 8, _BLACKWELL_K[i.name], "cta")
    raise ValueError(f"the shape of {i.opcode} {i.operands} at {i.address:#06x} cannot be told")


def constant(register: str, user: Instruction, code: Sequence[Instruction]) -> int | None:
    """What `register` holds at `user`, if the last instruction before it that writes it loads a constant; else None."""
    for i in reversed(code):
        if i.address >= user.address or not i.args or i.args[0] != register:
            continue
        if i.name in ("MOV", "UMOV") or i.opcode.startswith("IMAD.MOV"):
            return _integer(i.args[-1])
        if i.name == "HFMA2" and "-RZ" in i.args and i.args.count("RZ") == 1:  # a constant as two halves
            try:
                high, low = (struct.unpack("<H", struct.pack("<e", float(x)))[0] for x in i.args[-2:])
            except (ValueError, OverflowError):
                return None
            return int(high << 16 | low)
        return None
    return None


def _integer(text: str) -> int | None:
    if text in ("RZ", "URZ"):
        return 0
    try:
        return int(text, 0)
    except ValueError:
        return None


def parse(text: str) -> Code:
    """The kernel in the output of `nvdisasm -c`. Raises ValueError if there is no instruction in it."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := _INSTRUCTION.match(line):
            address, predicate, opcode, operands = found.groups()
            if predicate != "!PT":  # never executed
                instructions.append(
                    Instruction(int(address, 16), opcode, operands, "" if predicate in (None, "PT") else predicate)
                )
    if not instructions:
        raise ValueError("there is no machine code in what nvdisasm printed")
    code = tuple(instructions)
    return Code(code, tuple(_innermost(code, labels)))


def _innermost(code: Sequence[Instruction], labels: dict[str, int]) -> Iterable[Loop]:
    starts, successors = _blocks(code, labels)
    bounds = [*starts, len(code)]
    loops = []
    for blocks in _natural_loops(successors):
        loop = Loop(tuple(i for block in sorted(blocks) for i in code[bounds[block] : bounds[block + 1]]))
        if any(i.name in _WORK for i in loop.instructions):
            loops.append((blocks, loop))
    loops.sort(key=lambda one: min(one[0]))
    return [loop for blocks, loop in loops if not any(other < blocks for other, _ in loops)]


def _blocks(code: Sequence[Instruction], labels: dict[str, int]) -> tuple[list[int], list[set[int]]]:
    """First instruction of each basic block, and the blocks that may follow it."""
    jumps = {n for n, i in enumerate(code) if i.name in _ENDS or i.name == "CALL"}
    starts = sorted({0} | {n for n in labels.values() if n < len(code)} | {n + 1 for n in jumps if n + 1 < len(code)})
    block_at = {start: block for block, start in enumerate(starts)}
    successors: list[set[int]] = []
    for block, start in enumerate(starts):
        end = starts[block + 1] if block + 1 < len(starts) else len(code)
        follow = set()
        last = code[end - 1]
        # BRA.U UP0, target: the condition is an operand.
        conditional = last.predicate or last.name == "CALL" or re.match(r"!?U?P\d", last.operands)
        if end < len(code) and (last.name not in _ENDS or conditional):
            follow.add(block + 1)
        for i in code[start:end]:
            if i.name != "BSSY":  # names where lanes meet again, jumps nowhere
                follow |= {block_at[labels[x]] for x in _TARGET.findall(i.operands) if labels.get(x) in block_at}
        successors.append(follow)
    return starts, successors


def _natural_loops(successors: Sequence[set[int]]) -> list[frozenset[int]]:
    """The blocks of each loop: those that reach a jump back to the header, which dominates them."""
    count = len(successors)
    predecessors: list[set[int]] = [set() for _ in range(count)]
    for block, follow in enumerate(successors):
        for other in follow:
            predecessors[other].add(block)
    everything = (1 << count) - 1
    # Code that nothing jumps to (a subroutine, a jump through a register) is entered from outside, as block 0 is.
    roots = {0} | {block for block in range(count) if not predecessors[block] - {block}}
    dominators = [1 << block if block in roots else everything for block in range(count)]
    changed = True
    while changed:
        changed = False
        for block in range(count):
            if block not in roots:
                common = everything
                for other in predecessors[block]:
                    common &= dominators[other]
                if (common | 1 << block) != dominators[block]:
                    dominators[block], changed = common | 1 << block, True
    loops: dict[int, set[int]] = {}
    for block, follow in enumerate(successors):
        for header in follow:
            if dominators[block] >> header & 1:
                body = loops.setdefault(header, {header})
                pending = [block]
                while pending:
                    one = pending.pop()
                    if one not in body:
                        body.add(one)
                        pending += predecessors[one]
    return [frozenset(body) for body in loops.values()]
