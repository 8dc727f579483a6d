"""Runs Gluon kernels on the CPU: their own Python source, unchanged.

    from flashsim.gpu import gluon_cpu

    gluon_cpu.run(kernel, grid=(2, 1), arguments={"x": tensor, "d": TensorDescriptor(...), "BLOCK": 64}, seed=7)

or, for host code that launches it as `kernel[grid](...)`,

    with gluon_cpu.in_place_of_gpu(kernel, seed=7):
        function_that_launches(...)

Every partition of `warp_specialize` is a thread, of which one runs at a time. Whenever one could meet another, who goes
next is drawn: `seed` gives the interleaving. mbarriers have phases, counts and bytes; a TMA load lands whenever it may,
and NaN is in its slot until then. With `completion="late"` asynchronous operations end as late as something that waits
for them allows, and products and stores read their operands then, so that a missing wait is a wrong number; with
"random" they end at any time.

Whatever the timing was, two accesses to the same bytes of shared memory of which one is a write have to be ordered by a
chain of signals and waits (`flashsim.engine.causality`, as in the simulator): Race, also where only
`fence_async_shared` is missing between an ordinary store and an asynchronous operation. Deadlock says who waits for
which phase of what, and where. Hazard: more arrivals than a barrier's count, more bytes than expected, a phase left
unfinished, an operation that nobody has waited for, a result used too early, memory out of bounds. All three are of
`flashsim.errors`. Another error in the kernel is a SimulationError with its file and line, as is an operation that is
not supported.

Arithmetic is torch's: products in fp32 of operands in their dtype, conversions rounded to nearest even. Not modeled:
layouts, registers, warps within a partition, clusters of more than one CTA, races in global memory.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch

from flashsim.errors import InputError
from flashsim.gpu.gluon_cpu.asynchronous import Descriptor
from flashsim.gpu.gluon_cpu.language import Cta, Language
from flashsim.gpu.gluon_cpu.scheduler import Scheduler
from flashsim.gpu.gluon_cpu.source import Source, constexpr_names
from flashsim.gpu.gluon_cpu.tensors import Int, Pointer

Completion = Literal["late", "random"]

__all__ = ["Completion", "in_place_of_gpu", "run"]


def run(
    kernel: Any,
    grid: Sequence[int],
    arguments: Mapping[str, Any],
    *,
    seed: int = 0,
    completion: Completion = "late",
    resident: int = 1,
) -> None:
    """Run `kernel`, a `gluon.jit` function, for all CTAs of `grid` (one to three numbers).

    arguments: by the names of the kernel's parameters: CPU tensors, host TensorDescriptors, numbers; those of the
        launch alone, such as num_warps, are ignored.
    seed: of the interleaving, and of the order of the CTAs.
    resident: so many CTAs run at a time; those that follow start when one of them ends.

    Raises InputError for arguments that do not fit the kernel, and flashsim.errors.SimulationError (Race, Deadlock,
    Hazard among them) for what the kernel does wrong.
    """
    if completion not in ("late", "random"):
        raise InputError(f"completion: got {completion!r}, allowed are late and random")
    names = list(kernel.arg_names)
    defaults = {name: p.default for name, p in kernel.signature.parameters.items() if p.default is not inspect._empty}
    given = defaults | {name: value for name, value in arguments.items() if name in names}
    if missing := [name for name in names if name not in given]:
        raise InputError(f"arguments: {kernel.__name__} needs {', '.join(missing)}")
    x, y, z = (*(int(n) for n in grid), *[1] * (3 - len(grid)))
    scheduler = Scheduler(seed, late=completion == "late")
    language = Language(scheduler, (x, y, z))
    source = Source(language.operations)
    known = constexpr_names(kernel)
    values = [source.stand_in(given[n]) if n in known else _argument(n, given[n]) for n in names]
    body = source.function(kernel.fn)
    places = list(itertools.product(range(x), range(y), range(z)))
    scheduler.random.shuffle(places)
    running: list[Cta] = []

    def start() -> bool:
        """Start CTAs where others have ended; True if there are any left."""
        for cta in list(running):
            if all(party.finished for party in cta.queues):
                running.remove(cta)
                cta.check_ended()
        while places and len(running) < resident:
            cta = Cta(scheduler, places.pop())
            running.append(cta)
            cta.party(kernel.__name__, lambda: body(*values))
        return bool(running)

    scheduler.between = start
    scheduler.run()


@contextmanager
def in_place_of_gpu(*kernels: Any, seed: int = 0, completion: Completion = "late", resident: int = 1) -> Iterator[None]:
    """Inside, `kernel[grid](...)` runs on the CPU, as `run` does; every launch has another seed, which follows from
    `seed`."""
    launches = itertools.count()

    def replacement(kernel: Any) -> Any:
        def launch(*args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
            arguments = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
            size = grid(arguments) if callable(grid) else grid
            turn = seed + (next(launches) << 32)
            run(kernel, size, arguments, seed=turn, completion=completion, resident=resident)

        return launch

    try:
        for kernel in kernels:
            kernel.run = replacement(kernel)
        yield
    finally:
        for kernel in kernels:
            vars(kernel).pop("run", None)


def _argument(name: str, x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        if x.device.type != "cpu":
            raise InputError(f"{name}: on {x.device}, must be on the CPU")
        return Pointer(x)
    if hasattr(x, "block_shape") and hasattr(x, "base"):
        return Descriptor(x.base, x.shape, x.strides, x.block_shape, x.layout)
    if isinstance(x, int) and not isinstance(x, bool):
        return Int(x)
    return x
