"""Compile every kernel for a device that is not here: python compile_ahead.py gfx942 [bfloat16].

The ops run on "meta" tensors with the launch replaced by a recorder, so that what is compiled is
what a device would be asked to run: the same signature, constants and settings. Prints a line of
JSON for each: name, shared memory and, of AMD code, the bytes of scratch.
"""

import json
import re
import sys
from typing import Any

import torch
import triton
from real_shapes import calls, widest
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction, create_function_from_signature

import eaglerun.kernels.launch
from eaglerun.kernels.attention_sparse import attention_sparse

TARGETS = {
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}


def compiled(kernel: Any, target: GPUTarget, args: Any, kwargs: Any) -> Any:
    backend = triton.compiler.make_backend(target)
    kwargs = {**kwargs, "debug": False}
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = binder(*args, **kwargs)
    options, signature, constants, attributes = kernel._pack_args(
        backend, kwargs, bound, specialization, options
    )
    source = triton.compiler.ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=options.__dict__)


def main(arch: str, dtype: str = "bfloat16") -> None:
    launches: dict[str, tuple[Any, Any, Any]] = {}

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        assert all(isinstance(n, int) and 0 < n < 2**31 for n in grid), grid
        assert all(n < 2**16 for n in grid[1:]), grid
        told = [str(a.dtype) if isinstance(a, torch.Tensor) else "" for a in args]
        # One of a kind: sizes that the compiler does not see make no other program.
        unseen = [a if isinstance(a, int) and a == 1 else 0 for a in args]
        launches.setdefault(
            f"{kernel.fn.__name__} {told} {unseen} {kwargs}", (kernel, args, kwargs)
        )

    JITFunction.run = record
    # Overlapping is the same programs with two instructions more, where the device knows them.
    launch = eaglerun.kernels.launch
    with launch.for_arch(arch), launch.overlapping(True):
        # The rows that limit registers are for sm_90.
        wide = widest(getattr(torch, dtype)) if arch.startswith("sm_") else ()
        for op, arguments in (*calls(getattr(torch, dtype)), *wide):
            op.kernel(*arguments)
            with launch.invariant(True):
                op.kernel(*arguments)
            if op is attention_sparse and arguments[3].cu_seqlens is not None:
                with launch.changed("attention_sparse_prefill", SHARE=1):
                    op.kernel(*arguments)
    for kernel, args, kwargs in launches.values():
        found = compiled(kernel, TARGETS[arch], args, kwargs)
        scratch = re.search(r"\.private_segment_fixed_size:\s*(\d+)", found.asm.get("amdgcn", ""))
        line = {
            "kernel": kernel.fn.__name__,
            "shared_bytes": found.metadata.shared,
            "scratch_bytes": int(scratch[1]) if scratch else 0,
            "settings": {k: v for k, v in kwargs.items() if isinstance(v, int)},
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
