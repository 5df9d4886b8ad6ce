"""Compiles the GPU's kernels for a card that need not be there: `compile_for_gpu.py 90`.

Prints for each kernel its name, the widest read in bits, and the bytes of registers that did not fit.
"""

from __future__ import annotations

import re
import sys
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from audioflamingo.kernels import triton_kernels as gpu
from audioflamingo.kernels.weight_layout import packed_int4_shape, packed_int8_shape, scale_bytes

NUM_IN, GROUP = 3584, 64
POINTERS = {
    "words_ptr": "*i32",
    "bytes_ptr": "*u8",
    "scales_ptr": "*fp32",
}


def compile_kernel(name: str, kernel: Any, constants: dict[str, Any], capability: int) -> None:
    names = kernel.arg_names
    signature = {
        arg: "constexpr"
        if arg in constants
        else POINTERS.get(arg, "*bf16" if arg.endswith("_ptr") else "i32")
        for arg in names
    }
    aligned = {(place,): [["tt.divisibility", 16]] for place, arg in enumerate(names) if arg not in constants}
    places = {(names.index(arg),): value for arg, value in constants.items()}
    source = ASTSource(kernel, signature, places, aligned)
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": 4})
    ptx = compiled.asm["ptx"]
    # What goes to shared memory by itself says its width in bytes, everything else in elements and their bits.
    widths = [int(n or 1) * int(bits) for n, bits in re.findall(r"ld\.global\S*?(?:\.v(\d))?\.b(\d+)", ptx)]
    widths += [8 * int(n, 0) for n in re.findall(r"cp\.async\.c[ag]\.shared\.global .*?, .*?, (\w+),", ptx)]
    print(name, max(widths), ptx.count(".local "))


def numbers(group: int | None, is_float: bool) -> dict[str, Any]:
    is_4_bit = group is not None
    width = (packed_int8_shape((16, NUM_IN)) if group is None else packed_int4_shape((16, NUM_IN), group))[1]
    return {
        "num_words": NUM_IN // (8 if is_4_bit else 4),
        "words_in_block": width // 4,
        "first_word": 0 if group is None else scale_bytes(NUM_IN // group) // 4,
        "words_in_group": 1 if group is None else group // 8,
        "is_4_bit": is_4_bit,
        "is_float": is_float,
    }


def main(capability: int) -> None:
    for kind, group, is_float in (("int8", None, False), ("int4", GROUP, False), ("float8", None, True)):
        for num_rows in (1, 16, 64):
            block_m, block_n, block_p = gpu.blocks(num_rows, group is not None)
            shape = {"block_m": block_m, "block_n": block_n, "block_p": block_p}
            constants = {**numbers(group, is_float), **shape, "has_bias": True, "dot_type": tl.bfloat16}
            compile_kernel(f"packed/{kind}/{num_rows}", gpu._packed_kernel, constants, capability)
        constants = {**numbers(group, is_float), "num_in": NUM_IN, "block_p": 64}
        compile_kernel(f"unpack/{kind}", gpu._unpack_kernel, constants, capability)
    if capability >= 90:
        POINTERS["out_ptr"] = "*fp8e4nv"
        compile_kernel("unpack/float8/float8", gpu._unpack_kernel, constants, capability)
        del POINTERS["out_ptr"]
    constants = {"num_in": NUM_IN, "has_bias": False, "block_n": 4, "block_k": 1024}
    compile_kernel("row", gpu._float_kernel, constants, capability)
    compile_kernel("silu", gpu._silu_kernel, {"block": 1024}, capability)
    compile_kernel("rotate", gpu._rotate_kernel, {"half": 64}, capability)


if __name__ == "__main__":
    main(int(sys.argv[1]))
