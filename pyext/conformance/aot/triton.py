"""What is wanted of the machine code of the Triton kernels; steepest.kernels.aot compiles and measures."""

from __future__ import annotations

from steepest.conformance.aot.cuda import BYTES, SHARED_KIB
from steepest.kernels import adamw
from steepest.kernels.aot import Row

# Tensor-core instructions of a large 16-bit product: mma, wgmma, tcgen05.mma.
TENSOR_CORE = {"sm_8": "HMMA", "sm_9": "HGMMA", "sm_10": "UTCHMMA", "sm_12": "HMMA"}


def faults(row: Row) -> list[str]:
    """What is wrong with a kernel's machine code; empty when it is as it should be."""
    found = []
    if row.stack or row.spills:
        found.append(f"{row.stack} bytes of stack, {row.spills} spill instructions")
    if row.shared > SHARED_KIB[row.arch] * 1024:
        found.append(f"{row.shared} bytes of shared memory; {row.arch} has {SHARED_KIB[row.arch] * 1024}")
    return found + EXPECTATIONS[row.kernel](row)


def adamw_faults(row: Row) -> list[str]:
    """Loads of 16 bytes where addresses allow, and only there."""
    param, grad, state, alignment, *amsgrad = row.variant.split()
    bytes_per_tile = adamw.TILE * (BYTES[param] + BYTES[grad] + (2 + len(amsgrad)) * BYTES[state])
    wanted = bytes_per_tile // (16 * 32 * adamw.WARPS) if alignment == "aligned" else 0
    return [] if row.wide_loads == wanted else [f"{row.wide_loads} loads of 16 bytes, expected {wanted}"]


def symmetric_faults(row: Row) -> list[str]:
    """The architecture's tensor cores for all but plain float32, and loads of 16 bytes where addresses allow."""
    large = next(name for family, name in TENSOR_CORE.items() if row.arch[:-1] == family)
    if " ieee " in row.variant:
        wanted = ""  # float32 units: tensor cores would round the operands
    elif "unaligned" in row.variant:
        wanted = "HMMA"  # a small tile, for which Hopper and Blackwell take the older instruction
    else:
        wanted = large
    found = []
    if row.tensor_core != wanted:
        found.append(f"tensor-core class {row.tensor_core or 'none'}, expected {wanted or 'none'}")
    # wgmma and tcgen05.mma read 32-bit operands along k only: columns are transposed on their way, 4 bytes each.
    transposed = "tf32 " in row.variant and row.variant.endswith("columns") and large not in ("", "HMMA")
    if " aligned" in row.variant and not transposed and row.widest_load != 16:
        found.append(f"widest load {row.widest_load} bytes, expected 16")
    return found


def chain_faults(row: Row) -> list[str]:
    """The architecture's large tensor cores for all but plain float32, and loads of 16 bytes."""
    large = next(name for family, name in TENSOR_CORE.items() if row.arch[:-1] == family)
    wanted = "" if " ieee " in row.variant else large
    found = []
    if row.tensor_core != wanted:
        found.append(f"tensor-core class {row.tensor_core or 'none'}, expected {wanted or 'none'}")
    if row.widest_load != 16:
        found.append(f"widest load {row.widest_load} bytes, expected 16")
    return found


def momentum_faults(row: Row) -> list[str]:
    """Loads of 16 bytes (8 where one role has half the size of the other) for aligned tensors."""
    if " aligned" in row.variant and row.widest_load < 16:
        return [f"widest load {row.widest_load} bytes, expected 16"]
    return []


def no_faults(row: Row) -> list[str]:
    """Spills and shared memory are all that matters."""
    return []


# A kernel without an entry cannot be reported: say here what its machine code must be like.
EXPECTATIONS = {
    "adamw_kernel": adamw_faults,
    "chain_kernel": chain_faults,
    "grouped_kernel": symmetric_faults,
    "long_kernel": symmetric_faults,
    "momentum_kernel": momentum_faults,
    "move_kernel": momentum_faults,
    "norm_kernel": no_faults,
    "product_kernel": symmetric_faults,
    "statistics_kernel": symmetric_faults,
    "symmetric_kernel": symmetric_faults,
}
