"""FlashAttention-3 in Gluon, its own source run on the CPU: exact in every interleaving; what breaks it is noticed."""

from __future__ import annotations

import importlib
import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from kernel_tests import case_of, examples  # noqa: E402

from flashsim.errors import Deadlock, Hazard, Race  # noqa: E402
from flashsim.gpu import gluon_cpu  # noqa: E402
from flashsim.testing import AttentionCase, assert_attention_close, assert_gradients_close, attention_cases, layouts  # noqa: E402
from flashsim_kernels import fa3 as kernel  # noqa: E402
from flashsim_kernels import fa3_launch  # noqa: E402
from flashsim_kernels.arguments import ArgumentError  # noqa: E402
from flashsim_kernels.fa3 import fa3  # noqa: E402

HEAD_DIMS = (16, 32, 40, 64, 128)


@dataclass(frozen=True)
class Timing:
    """How a launch runs on the CPU."""

    seed: int = 0
    completion: gluon_cpu.Completion = "late"
    resident: int = 1
    multiprocessors: int = 2


@st.composite
def timings(draw: st.DrawFn) -> Timing:
    return Timing(
        draw(st.integers(0, 2**32 - 1)),
        draw(st.sampled_from(("late", "random"))),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 3)),
    )


@st.composite
def switches(draw: st.DrawFn) -> dict[str, Any]:
    """Any that fa3 takes together."""
    x: dict[str, Any] = {
        "BLOCK_M": draw(st.sampled_from((64, 128, 192))),
        "BLOCK_N": draw(st.sampled_from((16, 32, 64))),
        "num_stages": draw(st.integers(1, 3)),
        "build": draw(st.sampled_from(("2025-01", "2024-07"))),
        "intra_wg_overlap": draw(st.sampled_from((True, True, False))),
        "warp_specialized": draw(st.sampled_from((True, True, False))),
        "P_in_shared": draw(st.booleans()),
    }
    overlap, specialized = x["intra_wg_overlap"], x["warp_specialized"]
    x["persistent"] = draw(st.booleans()) and specialized
    x["pingpong"] = draw(st.booleans()) and (overlap or specialized)
    three = overlap and specialized and not x["P_in_shared"] and x["num_stages"] > 1
    x["overlap_stages"] = draw(st.sampled_from((2, 3))) if three else 2
    return x


@st.composite
def tiled_cases(draw: st.DrawFn) -> tuple[AttentionCase, dict[str, Any]]:
    x = draw(switches())
    tile = x["BLOCK_M"], x["BLOCK_N"]
    return draw(attention_cases(tile=tile, max_tiles=(2, 6), head_dims=HEAD_DIMS, max_flops=4e6)), x


def attend(case: AttentionCase, timing: Timing, layout: Any = None, **given: Any) -> tuple[Any, Any]:
    """(O, LSE) of the kernel on the CPU."""
    run = gluon_cpu.in_place_of_gpu(
        kernel.fa3_fwd, seed=timing.seed, completion=timing.completion, resident=timing.resident
    )
    with pytest.MonkeyPatch.context() as patch, run:
        patch.setattr(fa3_launch, "multiprocessors", lambda device: timing.multiprocessors)
        return fa3(*case.torch("cpu", layout), causal=case.causal, return_lse=True, **given)


@examples()
@given(tiled_cases(), layouts(alignment=8), timings())
def test_exact(drawn: tuple[AttentionCase, dict[str, Any]], layout: Any, timing: Timing) -> None:
    case, given = drawn
    o, lse = attend(case, timing, layout, **given)
    assert_attention_close(o, case, lse=lse)


SETTINGS = [
    {},
    {"build": "2024-07"},
    {"num_stages": 1},
    {"num_stages": 3},
    {"warp_specialized": False},
    {"warp_specialized": False, "intra_wg_overlap": False},
    {"warp_specialized": False, "BLOCK_M": 64},
    {"pingpong": False},
    {"intra_wg_overlap": False},
    {"intra_wg_overlap": False, "pingpong": False},
    {"overlap_stages": 3},
    {"persistent": False},
    {"P_in_shared": True},
    {"BLOCK_M": 64, "pingpong": True},
    {"BLOCK_M": 192},
    {"BLOCK_M": 192, "BLOCK_N": 16, "num_stages": 1},
]


@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("given", SETTINGS, ids=lambda given: " ".join(f"{k}={v}" for k, v in given.items()) or "as is")
def test_every_switch(given: dict[str, Any], mask: str) -> None:
    case = case_of("rising", 1, seqlen_q=200, seqlen_k=150, head_dim=16, mask=mask, batch=1, heads_q=2, heads_kv=1)
    for completion in ("late", "random"):
        o, lse = attend(case, Timing(completion=completion), **({"BLOCK_M": 128, "BLOCK_N": 32} | given))
        assert_attention_close(o, case, lse=lse)


@pytest.mark.parametrize("head_dim", [16, 24, 64, 128, 136, 256])
def test_tiles_of_the_table(head_dim: int) -> None:
    case = case_of(seqlen_q=70, seqlen_k=140, head_dim=head_dim, batch=1, heads_q=1, heads_kv=1)
    o, lse = attend(case, Timing())
    assert_attention_close(o, case, lse=lse)


def test_rows_without_keys() -> None:
    case = case_of(seqlen_q=150, seqlen_k=20, batch=1)
    o, lse = attend(case, Timing(), BLOCK_M=64, BLOCK_N=16)
    assert_attention_close(o, case, lse=lse)
    assert (lse[:, :, :130] == -torch.inf).all()
    assert (o[:, :130] == 0).all()


@pytest.mark.parametrize("sizes", [(0, 4, 4), (1, 0, 4), (1, 4, 0)])
def test_nothing_to_do(sizes: tuple[int, int, int]) -> None:
    batch, seqlen_q, seqlen_k = sizes
    q = torch.randn(batch, seqlen_q, 2, 32).half()
    k = v = torch.randn(batch, seqlen_k, 2, 32).half()
    with gluon_cpu.in_place_of_gpu(kernel.fa3_fwd):
        o, lse = fa3(q, k, v, return_lse=True)
    assert o.shape == q.shape
    assert (o == 0).all()
    assert lse.shape == (batch, 2, seqlen_q)
    assert (lse == -torch.inf).all()


def test_scale() -> None:
    case = case_of(mask="causal")
    with gluon_cpu.in_place_of_gpu(kernel.fa3_fwd):
        for scale in (0.0, 0.3):
            o, lse = fa3(*case.torch(), causal=True, scale=scale, return_lse=True)
            assert_attention_close(o, case, lse=lse, scale=scale)


def test_longest_tiles_first_in_sections_of_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fa3_launch, "L2_SECTION_BYTE", 2 * 150 * 2 * 32 * 2)  # two KV heads
    case = case_of(batch=1, heads_q=6, heads_kv=3, seqlen_q=150, seqlen_k=150)
    o, lse = attend(case, Timing(resident=3, multiprocessors=3), BLOCK_M=64, BLOCK_N=32)
    assert_attention_close(o, case, lse=lse)


def test_gradients() -> None:
    case = case_of()
    leaves = [x.requires_grad_() for x in case.torch()]
    with gluon_cpu.in_place_of_gpu(kernel.fa3_fwd):
        fa3(*leaves, causal=True).backward(case.torch_do())
    assert_gradients_close([x.grad for x in leaves], case)


def test_operator() -> None:
    arguments = (*case_of().torch(), None, 0, None, False, "2025-01", None, True, None, True, 2, None, None, None, None)
    with gluon_cpu.in_place_of_gpu(kernel.fa3_fwd):
        torch.library.opcheck(kernel.fa3_op, arguments)


def test_under_compile() -> None:
    case = case_of()
    compiled = torch.compile(lambda q, k, v: fa3(q, k, v, causal=True), backend="eager", fullgraph=True)
    with gluon_cpu.in_place_of_gpu(kernel.fa3_fwd):
        assert_attention_close(compiled(*case.torch()), case)


def test_same_seed_same_result() -> None:
    case = case_of(seqlen_q=150, heads_q=2, heads_kv=1, batch=1)
    timing = Timing(seed=5, completion="random", resident=2)
    first, second = (attend(case, timing, BLOCK_M=64, BLOCK_N=16) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


WRONG = [
    ({"BLOCK_M": 100}, "fa3: BLOCK_M: got 100, allowed are 64, 128, 192"),
    ({"BLOCK_N": 176}, "fa3: BLOCK_N: got 176, allowed are 16, 32, 64, 128, 256"),
    ({"num_stages": 0}, "fa3: num_stages: got 0, allowed are 1, 2, 3, 4, 5, 6, 7, 8"),
    ({"build": "2023"}, "fa3: build: got '2023', allowed are 2024-07, 2025-01"),
    ({"overlap_stages": 3, "num_stages": 1}, "fa3: overlap_stages: 3 needs warp_specialized, intra_wg_overlap"),
    ({"persistent": True, "warp_specialized": False}, "fa3: persistent: needs warp_specialized"),
    ({"pingpong": True, "warp_specialized": False, "intra_wg_overlap": False}, "fa3: pingpong: without intra_wg"),
    ({"num_stages": 8, "BLOCK_N": 256, "BLOCK_M": 64}, "bytes of shared memory at head dims 64 and 64, there are"),
    ({"BLOCK_M": 192, "BLOCK_N": 256}, "248 registers a thread at head dims 64 and 64, a consumer has 160"),
]


@pytest.mark.parametrize(("given", "message"), WRONG)
def test_wrong_switches(given: dict[str, Any], message: str) -> None:
    q = torch.zeros(1, 8, 2, 64, dtype=torch.float16)
    with gluon_cpu.in_place_of_gpu(kernel.fa3_fwd), pytest.raises(ArgumentError) as caught:
        fa3(q, q, q, **given)
    assert message in str(caught.value)


def test_wrong_tensors() -> None:
    q = torch.zeros(1, 8, 2, 64, dtype=torch.float16)
    with pytest.raises(ArgumentError, match="on cpu, must be on a CUDA GPU: Triton's interpreter does not run Gluon"):
        fa3(q, q, q)
    with gluon_cpu.in_place_of_gpu(kernel.fa3_fwd):
        with pytest.raises(ArgumentError, match=r"q: dtype torch.float32, allowed are"):
            fa3(q.float(), q.float(), q.float())
        with pytest.raises(ArgumentError, match="TMA needs all rows at multiples of 16 bytes"):
            fa3(torch.zeros(1, 8, 2, 65, dtype=torch.float16)[..., :64], q, q)


# What must not go unnoticed: one change to the source of the kernel at a time.


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    old: str
    new: str
    kinds: tuple[type[BaseException], ...]
    """What notices it; AssertionError: the numbers."""
    given: dict[str, Any] = field(default_factory=dict)
    mask: str = "full"


ROLES, SHARED, TILES, THREE = "fa3", "fa3_shared", "fa3_tiles", "fa3_three_stages"
STORE_POSITION = """\
            s.next_position.slot(index - 1).store(
                gl.full([1], position, gl.int32, gl.BlockedLayout([1], [32], [1], [0]))
            )
"""
COMMIT_POSITION = "            s.next_position.commit(index - 1)\n"
MUTANTS = [
    # Rings: who waits for what.
    Mutant("nobody waits for full slots", SHARED,
           "mbarrier.wait(self.full.index(j % self.num_stages), (j // self.num_stages) & 1, pred=pred)", "pass",
           (Race, Hazard)),
    Mutant("the phase of a full slot is never flipped", SHARED,
           "(j // self.num_stages) & 1, pred=pred", "0, pred=pred", (Race, Deadlock)),
    Mutant("nobody waits for empty slots", SHARED,
           "mbarrier.wait(self.empty.index(j % self.num_stages), ((j // self.num_stages) & 1) ^ 1)", "pass",
           (Race, Hazard)),
    Mutant("the first empty slot is waited for", SHARED, "& 1) ^ 1)", "& 1))", (Deadlock,)),
    Mutant("an empty slot needs one consumer", SHARED,
           "mbarrier.init(empty.index(i), count=consumers)", "mbarrier.init(empty.index(i), count=1)", (Hazard, Race)),
    Mutant("an empty slot needs one consumer too many", SHARED,
           "mbarrier.init(empty.index(i), count=consumers)", "mbarrier.init(empty.index(i), count=consumers + 1)",
           (Deadlock,)),
    Mutant("a full slot needs two arrivals", SHARED,
           "mbarrier.init(full.index(i), count=1)", "mbarrier.init(full.index(i), count=2)", (Deadlock,)),
    Mutant("another slot is released", SHARED,
           "mbarrier.arrive(self.empty.index(j % self.num_stages), count=1)",
           "mbarrier.arrive(self.empty.index(0), count=1)", (Hazard, Race, Deadlock)),
    Mutant("half the bytes are expected", SHARED,
           "mbarrier.expect(full, desc.block_type.nbytes)", "mbarrier.expect(full, desc.block_type.nbytes // 2)",
           (Hazard,)),
    Mutant("twice the bytes are expected", SHARED,
           "mbarrier.expect(full, desc.block_type.nbytes)", "mbarrier.expect(full, desc.block_type.nbytes * 2)",
           (Deadlock,)),
    Mutant("of Q one consumer's rows are expected", SHARED,
           "p.q.block_type.nbytes * p.CONSUMERS", "p.q.block_type.nbytes", (Race, Hazard)),
    # The producer.
    Mutant("K is loaded into a slot that is in use", ROLES,
           "            s.K.wait_empty(j)\n", "", (Race, Hazard)),
    Mutant("V is loaded while O leaves its memory", ROLES, "        s.O.wait_empty(index)", "        #", (Race,)),
    Mutant("Q is loaded while it is in use", ROLES, "        s.Q.wait_empty(index)\n", "", (Race, Hazard)),
    Mutant("V of the tile after", ROLES, "s.V.load(first - 1, p.v, tile.batch, head_kv, 0)",
           "s.V.load(first - 1, p.v, tile.batch, head_kv, p.BLOCK_N)", (AssertionError,)),
    # Algorithm 2.
    Mutant("Q is not waited for", ROLES, "    s.Q.wait_full(tile.index)  # 3\n", "", (Race, Hazard)),
    Mutant("V is not waited for", ROLES, "    s.V.wait_full(j - 1)  # 10\n", "", (Race, Hazard)),
    Mutant("K is waited for after the last tile, too", ROLES, "pred=j + 1 < tile.first + tile.count)",
           "pred=True)", (Deadlock,), {"persistent": False}),
    Mutant("K is released while it is read", ROLES,
           "    S = warpgroup_mma_wait(1, deps=[qk])  # 12\n    s.K.release(j)\n",
           "    s.K.release(j)\n    S = warpgroup_mma_wait(1, deps=[qk])\n", (Race,)),
    Mutant("V is released while it is read", ROLES,
           "    O, P = warpgroup_mma_wait(0, deps=[pv, P])  # 14\n    s.V.release(j - 1)  # 15\n",
           "    s.V.release(j - 1)\n    O, P = warpgroup_mma_wait(0, deps=[pv, P])\n", (Race,)),
    Mutant("V is released twice", ROLES, "    s.V.release(j - 1)  # 15\n",
           "    s.V.release(j - 1)\n    s.V.release(j - 1)\n", (Hazard, Race, Deadlock)),
    Mutant("V is never released", ROLES, "    s.V.release(last)\n", "", (Deadlock, Hazard)),
    Mutant("scores are used before their product has ended", ROLES,
           "warpgroup_mma_wait(1, deps=[qk])", "warpgroup_mma_wait(2, deps=[qk])", (Hazard,)),
    Mutant("O is used before its product has ended", ROLES,
           "warpgroup_mma_wait(0, deps=[pv, P])  # 14", "warpgroup_mma_wait(1, deps=[pv, P])", (Hazard,)),
    Mutant("O is not rescaled", ROLES, "        O = rescale(p, O, alpha)  # 14\n", "        pass\n",
           (AssertionError,)),
    Mutant("O is rescaled twice", ROLES, "    if p.RESCALE_EARLY:\n        O = rescale(p, O, alpha)\n    s.V",
           "    O = rescale(p, O, alpha)\n    s.V", (AssertionError,)),
    # Turns.
    Mutant("nobody has the first turn", ROLES,
           "        mbarrier.arrive(turn.index(0), count=1)", "        pass", (Deadlock,)),
    Mutant("the turn stays where it is", SHARED, "(INDEX + 1) % p.CONSUMERS", "INDEX", (Deadlock, Hazard)),
    Mutant("the turn is not passed on", ROLES, "    pass_turn(p, s, INDEX)\n    S = warpgroup_mma_wait(1",
           "    S = warpgroup_mma_wait(1", (Deadlock,)),
    Mutant("turns are not counted", ROLES, "return O, P, m, l, alpha, turns + 1", "return O, P, m, l, alpha, turns",
           (Deadlock, Hazard)),
    # The end of a work tile.
    Mutant("O is written over V that is read", ROLES, "    wait_for_consumers(s, 0)", "    #",
           (Race, Deadlock, Hazard)),
    Mutant("O leaves before all of it is there", ROLES, "    wait_for_consumers(s, 1)", "    #",
           (Race, Deadlock, Hazard)),
    Mutant("no fence between O and its store", ROLES,
           "    fence_async_shared()\n    wait_for", "    wait_for", (Race,)),
    Mutant("the store of O is not waited for", ROLES, "        tma.store_wait(0)\n", "", (Race, Hazard)),
    Mutant("the memory of O is never given back", ROLES, "        s.O.release(tile.index)\n", "", (Deadlock,)),
    Mutant("one consumer's O is not stored", ROLES,
           "        for i in gl.static_range(p.CONSUMERS):\n            tma_store",
           "        for i in gl.static_range(1):\n            tma_store", (AssertionError,)),
    Mutant("LSE in base 2", ROLES, "(m + gl.log2(l)) * LN2", "m + gl.log2(l)", (AssertionError,)),
    # Softmax and mask.
    Mutant("l is not rescaled", SHARED, "l * alpha + gl.sum(P, 1)", "l + gl.sum(P, 1)", (AssertionError,)),
    Mutant("the diagonal is masked", TILES, "<= gl.expand_dims(last, 1)", "< gl.expand_dims(last, 1)",
           (AssertionError,), mask="causal"),
    Mutant("a masked tile counts as unmasked", TILES, "row + 1 + shift", "row + self.BLOCK_M + shift",
           (AssertionError,), mask="causal"),
    Mutant("P in shared memory has no fence", SHARED, "        fence_async_shared()\n", "", (Race,),
           {"P_in_shared": True}),
    # Other switches.
    Mutant("the next position is never released", ROLES, "            s.next_position.release(index - 1)\n", "",
           (Deadlock,), mask="causal"),
    Mutant("the next position is told before it is there", ROLES, STORE_POSITION + COMMIT_POSITION,
           COMMIT_POSITION + STORE_POSITION, (Race, Hazard), mask="causal"),
    Mutant("without a producer, slots are filled that are in use", SHARED, "        ring.wait_empty(following)\n", "",
           (Race, Hazard), {"warp_specialized": False}),
    Mutant("without a producer, two consumers load", SHARED, "        if INDEX == 0:", "        if INDEX <= 1:",
           (Race, Hazard), {"warp_specialized": False}),
    Mutant("in order: V is not waited for", ROLES, "    s.V.wait_full(j)  # 20\n", "", (Race, Hazard),
           {"intra_wg_overlap": False}),
    Mutant("in order: the last turn is kept", ROLES, "    pass_turn(p, s, INDEX)\n    s.Q.release", "    s.Q.release",
           (Deadlock,), {"intra_wg_overlap": False}),
    Mutant("three stages: V of the tile before is not waited for", THREE, "    s.V.wait_full(j - 2)\n", "",
           (Race, Hazard), {"overlap_stages": 3}),
    Mutant("three stages: V is released while it is read", THREE,
           "    O, P = warpgroup_mma_wait(0, deps=[pv, P])\n    s.V.release(j - 2)\n",
           "    s.V.release(j - 2)\n    O, P = warpgroup_mma_wait(0, deps=[pv, P])\n", (Race,), {"overlap_stages": 3}),
]  # fmt: skip
_numbers = itertools.count()


def mutated(mutant: Mutant, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The kernel, from files of its own with one place changed."""
    prefix = f"mutant_{next(_numbers)}_"
    for name in (ROLES, SHARED, TILES, THREE):
        text = (Path(kernel.__file__).parent / f"{name}.py").read_text(encoding="utf-8")
        if name == ROLES:
            text = text[: text.index("@torch.library.custom_op")]
        if name == mutant.file:
            assert text.count(mutant.old) == 1, f"{mutant.old!r} comes {text.count(mutant.old)} times in {name}.py"
            text = text.replace(mutant.old, mutant.new)
        for other in (SHARED, TILES, THREE):
            text = text.replace(f"flashsim_kernels.{other} ", f"{prefix}{other} ")
        (folder / f"{prefix}{name}.py").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(str(folder))
    return importlib.import_module(f"{prefix}{ROLES}").fa3_fwd


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant(mutant: Mutant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of(
        "normal", 3, batch=1, heads_q=2, heads_kv=1, seqlen_q=200, seqlen_k=130, head_dim=16, mask=mutant.mask
    )
    monkeypatch.setattr(kernel, "fa3_fwd", mutated(mutant, tmp_path, monkeypatch))
    given = {"BLOCK_M": 128, "BLOCK_N": 32} | mutant.given
    for seed, completion in itertools.product(range(4), ("late", "random")):
        try:
            o, lse = attend(case, Timing(seed, completion), **given)
            assert_attention_close(o, case, lse=lse)
        except mutant.kinds:
            return
    pytest.fail("it went unnoticed")
