"""What Triton's compiler makes of the kernels for GPUs that need not be here: spills, load widths, tensor cores."""

from __future__ import annotations

import dataclasses
import os
import re

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 leaves nothing to compile", allow_module_level=True)

from steepest.conformance.aot.triton import EXPECTATIONS, faults
from steepest.kernels import adamw, aot, chain, grouped, long, symmetric

# Of every kernel the variants that need most registers; the exhaustive test takes all.
CORE = {
    "adamw_kernel": r"float32 float32 float32 aligned amsgrad|float32 float32 float32 (un)?aligned"
    r"|b?float16 b?float16 \w+ aligned",
    "chain_kernel": r"float16 .*|float32 tf32x3 .*",
    "grouped_kernel": r"float16 128.* aligned rows",
    "long_kernel": r"float16 128.* aligned wide to bfloat16|float32 tf32x3 .* aligned wide",
    "momentum_kernel": r"float32 float32 float16 aligned",
    "move_kernel": r"(float32|bfloat16) aligned nesterov",
    "norm_kernel": r"final",
    "product_kernel": r"float32 tf32x3 .* aligned( to bfloat16)?",
    "statistics_kernel": r"float32 tf32x3 .* aligned",
    "symmetric_kernel": r"float16 128.* aligned rows \+ C|bfloat16 128.* aligned columns|float16 64.* aligned rows \+ C"
    r"|bfloat16 .* unaligned rows \+ C|float32 ieee .* rows \+ C|float32 tf32x3 .* aligned rows \+ C",
}


def core(variant):
    return re.fullmatch(CORE[variant.kernel.fn.__name__], variant.name)


@pytest.fixture(scope="module")
def rows():
    return aot.report(variants=[variant for variant in aot.all_variants() if core(variant)])


def test_nothing_spills_and_vectors_and_tensor_cores_are_used(rows):
    assert {row.arch for row in rows} == set(aot.ARCHS)
    assert {row.kernel for row in rows} == set(EXPECTATIONS)
    assert [(row, faults(row)) for row in rows if faults(row)] == []


@pytest.mark.exhaustive
@pytest.mark.parametrize("arch", aot.ARCHS)
@pytest.mark.parametrize("kernel", sorted(EXPECTATIONS))
def test_no_variant_has_faults(kernel, arch):
    chosen = [variant for variant in aot.all_variants() if variant.kernel.fn.__name__ == kernel]
    assert len({variant.name for variant in chosen}) == len(chosen) > 0
    rows = aot.report([arch], chosen)
    assert len(rows) == len(chosen)
    assert [(row, faults(row)) for row in rows if faults(row)] == []


def test_every_variant_is_of_a_kernel_with_expectations():
    """So that the tests above, kernel by kernel, leave none out."""
    assert {variant.kernel.fn.__name__ for variant in aot.all_variants()} == set(EXPECTATIONS) == set(CORE)


GOOD = [
    aot.Row("adamw_kernel", "bfloat16 bfloat16 float32 aligned", "sm_90", 76, 0, 0, 4096, 16, 6, ""),
    aot.Row("symmetric_kernel", "float16 128x128x64 aligned rows", "sm_100", 210, 0, 0, 98320, 16, 32, "UTCHMMA"),
    aot.Row("symmetric_kernel", "float32 ieee 64x64x32 aligned rows", "sm_120", 73, 0, 0, 32768, 16, 12, ""),
    aot.Row("symmetric_kernel", "float32 tf32 64x64x32 aligned columns", "sm_90", 115, 0, 0, 49152, 4, 0, "HGMMA"),
]
BAD = [
    (0, {"spills": 2}, "spill"),
    (0, {"stack": 8}, "stack"),
    (0, {"wide_loads": 4}, "4 loads of 16 bytes, expected 6"),
    (0, {"variant": "bfloat16 bfloat16 float32 unaligned"}, "6 loads of 16 bytes, expected 0"),
    (1, {"tensor_core": "HMMA"}, "tensor-core class HMMA, expected UTCHMMA"),
    (1, {"tensor_core": ""}, "tensor-core class none"),
    (1, {"widest_load": 8}, "widest load 8 bytes"),
    (1, {"shared": 240_000}, "bytes of shared memory"),
    (2, {"tensor_core": "HMMA"}, "expected none"),
    (3, {"variant": "float32 tf32 64x64x32 aligned rows"}, "widest load 4 bytes"),
    (3, {"arch": "sm_80", "tensor_core": "HMMA"}, "widest load 4 bytes"),
]


def test_good_code_has_no_faults():
    assert [faults(row) for row in GOOD] == [[]] * len(GOOD)


@pytest.mark.parametrize("row, change, fault", BAD)
def test_faults_are_found(row, change, fault):
    found = faults(dataclasses.replace(GOOD[row], **change))
    assert len(found) == 1 and fault in found[0]


@pytest.mark.parametrize("arch", aot.ARCHS)
def test_adamw_rounds_like_the_cpp_kernel(arch):
    """No contraction, no flush to zero, correctly rounded division and root, conversions to nearest."""
    bf16 = next(v for v in aot.adamw_variants() if v.name == "bfloat16 bfloat16 bfloat16 aligned")
    with aot.ahead_of_time() as compiling:
        ptx = compiling.compile(bf16, arch).asm["ptx"]
    assert "fma." not in ptx and ".ftz" not in ptx and ".approx" not in ptx and "div.full" not in ptx
    assert "div.rn.f32" in ptx and "sqrt.rn.f32" in ptx and re.search(r"cvt\.rn\.bf16(x2)?\.f32", ptx)


def test_shapes_and_coefficients_compile_nothing_new():
    variants = []
    for n, m, batch, numbers in [
        (256, 8, 64, (1.0, 0.0, 0.0)),
        (2048, 4096, 1, (1, 1, 1)),
        (1600, 24, 3, (-0.3, 2, 1e9)),
    ]:
        a = torch.empty(n, m, dtype=torch.bfloat16).expand(batch, n, m)
        d = torch.empty(n, n, dtype=torch.bfloat16).expand(batch, n, n)
        scalars = torch.empty(batch, 3) if batch > 1 else None
        _, arguments, options = symmetric.launch_arguments(a, a, None, d, numbers, True, "ieee", scalars)
        assert options["TILE"] == 128
        variants.append(aot.Variant(symmetric.symmetric_kernel, "", arguments, options))
    rows = np.array([[0, 16, 32, 48, 0, 1, 0, 0], [64, 16, 32, 48, 0, 70000, 0, 1]], dtype=np.int64)
    for count, flags in [(1, (0, 0, 0)), (2, (1, 4096, 1)), (2, (2**40, 0, 1))]:
        table = torch.empty(8 * count)
        _, arguments, options = adamw.launch_arguments(rows[:count], table, flags, (torch.float32,) * 3, True)
        variants.append(aot.Variant(adamw.adamw_kernel, "", arguments, options))
    with aot.ahead_of_time() as compiling:
        kernels = [id(compiling.compile(variant, "sm_90")) for variant in variants]
    assert len(set(kernels[:3])) == 1 and len(set(kernels[3:])) == 1


def test_chains_groups_and_long_products_compile_once_per_dtype_and_tile():
    """Other shapes, strides, coefficients and step counts are other numbers."""
    variants = []
    for shape, steps in (((3, 64, 200), 5), ((1, 128, 24), 9)):
        x = torch.empty(shape, dtype=torch.float16)
        tables, size = chain.device_tables(
            np.ones((steps, 10)) * 8, np.ones((steps, 4)), (shape[1:],) * 3, shape[0], x.dtype, x.device
        )
        _, arguments, options = chain.launch_arguments(tables, x, x, torch.empty(size, dtype=x.dtype), "ieee")
        variants.append(aot.Variant(chain.chain_kernel, "", arguments, options))
    for sizes, alphas in (([256] * 64, None), ([512, 1024, 128] * 4, [0.5] * 12)):
        xs = [torch.empty(n, 64, dtype=torch.bfloat16) for n in sizes]
        ((_, arguments, options),) = grouped.group_of_grams(xs, alphas=alphas).parts
        variants.append(aot.Variant(grouped.grouped_kernel, "", arguments, options))
    for n, m, numbers in ((512, 1024, (1.0, 0.0)), (1024, 2048, (0.3, 1e9))):
        x, q = torch.empty(8, n, m, dtype=torch.float16), torch.empty(8, n, n, dtype=torch.float16)
        _, arguments, options = long.launch_arguments(q, x, x, torch.empty(2), numbers, None, None, True, "ieee")
        variants.append(aot.Variant(long.long_kernel, "", arguments, options))
    with aot.ahead_of_time() as compiling:
        kernels = [id(compiling.compile(variant, "sm_90")) for variant in variants]
    assert kernels[0] == kernels[1] and kernels[2] == kernels[3] and kernels[4] == kernels[5]
    assert len(set(kernels)) == 3


def test_one_specialization_per_variant():
    """Variants with equal names are equal; different ones differ: the table lists all that can be compiled."""
    variants = [v for v in aot.symmetric_variants() if v.name.startswith("bfloat16 64")]
    assert len({v.name for v in variants}) == len(variants) == 3
    with aot.ahead_of_time() as compiling:
        compiled = {id(compiling.compile(v, "sm_80")) for v in variants for _ in range(2)}
    assert len(compiled) == 3 <= aot.specializations(symmetric.symmetric_kernel, "sm_80")


def test_reading_of_the_disassembly():
    code = """
        /*0100*/  LDG.E.128 R4, [R2] ;          /*0110*/  @P0 LDG.E.128.CONSTANT R4, [R2] ;
        /*0120*/  LDGSTS.E.LTC128B [R1], [R2] ; /*0130*/  LDGSTS.E.BYPASS.LTC128B.128 [R1], [R2] ;
        /*0140*/  LDG.E.U16 R4, [R2] ;          /*0150*/  LDG.E R4, desc[UR4][R2.64] ;
        /*0160*/  STG.E.128 [R2], R4 ;          /*0170*/  UTCHMMA gdesc[UR4], R3 ;
        /*0180*/  STL [R1], R2 ;                /*0190*/  LDL.64 R2, [R1] ;
    """
    assert aot.load_widths(code) == {16: 3, 4: 2, 2: 1}
    assert aot.TENSOR_CORE.findall(code) == ["UTCHMMA"]
    assert aot.SPILLS.findall(code) == ["STL", "LDL"]


def test_table(monkeypatch, capsys):
    row = aot.Row("adamw_kernel", "float32", "sm_90", 86, 0, 0, 0, 16, 8, "")
    monkeypatch.setattr(aot, "report", lambda archs: [row] if archs == ["sm_90"] else [])
    monkeypatch.setattr("sys.argv", ["aot", "sm_90"])
    aot.main()
    header, line = capsys.readouterr().out.splitlines()
    assert header.split()[:4] == ["kernel", "variant", "arch", "registers"]
    assert line.split() == ["adamw_kernel", "float32", "sm_90", "86", "0", "0", "0", "16", "8"]


def test_cpu_tensors_are_refused_outside_the_interpreter():
    x = torch.ones(4, 4)
    with pytest.raises(ValueError, match="gram: the tensors are on cpu; Triton kernels need a CUDA device"):
        symmetric.gram(x)
    with pytest.raises(ValueError, match="adamw_step: the tensors are on cpu"):
        adamw.adamw_step([x], [x], [x], [x], None, [(0.0,) * 8], None)
    assert torch.equal(x, torch.ones(4, 4))
