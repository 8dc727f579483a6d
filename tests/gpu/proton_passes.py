"""Compiles `fa3` with Proton's scopes where there is no GPU: `proton.start` needs a driver, its passes do not."""

from __future__ import annotations

from typing import Any

import triton
import triton.profiler.mode as mode
from triton._C.libtriton import passes, proton
from triton.profiler.flags import flags

from flashsim.gpu.proton import instrument

SHARED_BYTE = 232448


def compile_with_scopes(q: Any, k: Any, v: Any, causal: bool = False) -> None:
    register(mode.Default(optimizations="clock32,time_shift", sampling_strategy="selective", sampling_options="0,4,8"))
    instrument()
    from flashsim_kernels.fa3 import fa3

    fa3(q, k, v, causal=causal)


def register(how: Any) -> None:
    """What `InstrumentationHook.activate` of triton.profiler does, without its questions to a driver."""
    flags.instrumentation_on = True

    def to_llvm_ir(pm: Any) -> None:
        proton.add_convert_proton_to_protongpu(
            pm, how.metric_type, how.sampling_strategy, how.sampling_options, how.granularity, how.buffer_strategy,
            how.buffer_type, how.buffer_size, SHARED_BYTE, 1, 128, False,
        )  # fmt: skip
        passes.common.add_cse(pm)
        proton.add_allocate_proton_shared_memory(pm)

    def to_llvm(pm: Any) -> None:
        if hasattr(proton, "add_allocate_proton_global_scratch_buffer"):
            proton.add_allocate_proton_global_scratch_buffer(pm)
        proton.add_convert_proton_nvidia_gpu_to_llvm(pm)

    try:  # from Triton 3.9 on
        from triton._instrumentation import register_instrumentation
    except ImportError:
        from triton.backends import backends
        from triton.profiler.hooks.instrumentation import Instrumentation

        hooks = Instrumentation({"ttgpuir_to_llvmir": to_llvm_ir, "llvmir_to_llvm": to_llvm})
        backends["nvidia"].compiler.instrumentation = hooks
    else:
        for point, callback in (
            ("load-dialects", proton.load_dialects),
            ("ttgpuir-to-llvmir", to_llvm_ir),
            ("llvmir-to-llvm", to_llvm),
        ):
            register_instrumentation(point=point, backend="nvidia", callback=callback)
    triton.knobs.compilation.instrumentation_mode = str(how)
