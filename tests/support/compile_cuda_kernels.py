"""Compiles every kernel of the cuda backend for GPUs that need not be here; prints one line for each.

Run by test_cuda_interpreter.py in a process of its own, since kernels that were imported for triton's interpreter
cannot be compiled. Also: python tests/support/compile_cuda_kernels.py [--resources]
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from air.loss import cuda as loss_cuda
from air.optimization import cuda_kernels as optimize_kernels
from air.optimization import rule_cuda
from air.rendering import cuda_kernels

BLOCKS = {"ROWS": cuda_kernels.BLOCK_ROWS, "COLUMNS": cuda_kernels.BLOCK_COLUMNS}
STRIPS = {"STRIP": loss_cuda.LANES, "ROWS": loss_cuda.SEGMENTS[0]}

# Types of arguments; those not named here are pointers to float32.
TYPES = {
    **dict.fromkeys(["image_of", "first_age", "clock", "work", "starts", "members"], "*i32"),
    **dict.fromkeys(["count", "height", "width", "tile_columns", "num_images", "learned_updates"], "i32"),
    **dict.fromkeys(["patch_size", "beta1", "beta2", "eps", "opposed_fraction", "squared_fraction"], "fp32"),
    "images": "*i64",
    "map_size": "i32",
    **dict.fromkeys(["sums", "first_errors"], "*fp64"),
}

# (kernel, its constants, warps)
KERNELS = [
    (cuda_kernels.draw, BLOCKS, 1),
    (cuda_kernels.gather, BLOCKS, 1),
    (cuda_kernels.derive_geometry, {"BLOCK": 128}, 4),
    (cuda_kernels.draw_tiles, {"SIDE": cuda_kernels.TILE}, 4),
    (loss_cuda.blur_targets, STRIPS, 4),
    (loss_cuda.differentiate_ssim, STRIPS, 4),
    (loss_cuda.finish_gradient, {**STRIPS, "SQUARED": False}, 4),
    (loss_cuda.finish_gradient, {**STRIPS, "SQUARED": True}, 4),
    (optimize_kernels.activate_raw, {"BLOCK": 64}, 4),
    (optimize_kernels.gather_and_step, BLOCKS, 1),
    (rule_cuda.learned_step, {"BLOCK": rule_cuda.LEARNED_BLOCK}, 1),
]


def compile_kernel(kernel, constants: dict[str, int], warps: int, capability: int):
    signature = {name: "constexpr" if name in constants else TYPES.get(name, "*fp32") for name in kernel.arg_names}
    # Tensors start at multiples of 16 bytes, which lets pixels move whole.
    aligned = {
        (place,): [["tt.divisibility", 16]] for place, name in enumerate(signature) if signature[name].startswith("*")
    }
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, "enable_fp_fusion": True}
    )


def main() -> None:
    for capability in (80, 90):
        for kernel, constants, warps in KERNELS:
            compiled = compile_kernel(kernel, constants, warps, capability)
            print(f"sm_{capability} {kernel.__name__} {len(compiled.asm['cubin'])}")  # noqa: T201
            if "--resources" in sys.argv:
                show_resources(compiled)


def show_resources(compiled) -> None:
    """What a kernel takes of a multiprocessor, and how many conversions of layout and vector accesses it has."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    print("   ", next(line.strip() for line in text.splitlines() if "REG" in line))  # noqa: T201
    counts = {word: compiled.asm["ttgir"].count(word) for word in ("convert_layout", "tt.reduce", "atomic_rmw")}
    counts |= {word: compiled.asm["ptx"].count(word) for word in ("red.", "add.v4.f32", ".v4.", "ex2", "shfl")}
    print("   ", counts)  # noqa: T201


if __name__ == "__main__":
    main()
