"""The compiled kernels: a shared library with a plain C interface, which needs neither torch nor Python to build.

So one wheel serves every Python from 3.11 on (tag `cp311-abi3`).
Optional: without a C++ compiler the package installs all the same, and quantized layers run in plain torch.
"""

from glob import glob

from setuptools import Extension, setup

SOURCES = "audioflamingo/kernels/csrc"

setup(
    ext_modules=[
        Extension(
            "audioflamingo.kernels._native",
            sources=sorted(glob(f"{SOURCES}/*.cpp")),
            depends=sorted(glob(f"{SOURCES}/*.h")),
            # Instruction sets are chosen per function, so no -march. Without -ffp-contract=off the float steps
            # would be fused, and results would differ between processors.
            extra_compile_args=["-std=c++17", "-O3", "-ffp-contract=off", "-fvisibility=hidden", "-w"],
            libraries=["dl"],
            language="c++",
            optional=True,
            py_limited_api=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
