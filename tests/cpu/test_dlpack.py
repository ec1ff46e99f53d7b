"""steepest_step_dlpack on the tensors that torch exports: the bits of the Python functions; refusals."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from torch.utils.dlpack import to_dlpack

import steepest

LIBRARY = next(iter((Path(steepest.__file__).parent / "lib").glob("libsteepest.so")), None)
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="libsteepest.so lies elsewhere")
STATES, ADAM, SGD, DECOUPLED, STOCHASTIC = 3, 3, 0, 2, 1
OK, INVALID, UNSUPPORTED, WORKSPACE = 0, 1, 2, 3
address = ctypes.c_void_p


class Exec(ctypes.Structure):
    _fields_ = [("struct_size", ctypes.c_uint64), ("device", ctypes.c_int32), ("index", ctypes.c_int32),
                ("stream", address), ("num_threads", ctypes.c_int32), ("reserved", ctypes.c_int32)]  # fmt: skip


HYPER = ("lr", "weight_decay", "l1", "beta1", "beta2", "eps", "momentum", "dampening", "alpha", "lr_decay", "noise_eta",
         "noise_gamma", "average_decay", "q")  # fmt: skip


class Hyper(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_double) for name in HYPER), ("step", ctypes.c_int64)]


class Args(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_uint64), ("rule", ctypes.c_int32), ("flags", ctypes.c_uint32),
        ("num_tensors", ctypes.c_int64), ("numel", address), ("params", address), ("grads", address),
        ("states", address * STATES), ("param_dtype", ctypes.c_int32), ("grad_dtype", ctypes.c_int32),
        ("state_dtype", ctypes.c_int32), ("reserved", ctypes.c_int32), ("num_hyper", ctypes.c_int64),
        ("hyper", ctypes.POINTER(Hyper)), ("hyper_index", address), ("grad_scale", address),
        ("clip_coefficient", address), ("found_inf", address), ("clip_value", ctypes.c_double), ("masters", address),
        ("residuals", address), ("sources", address), ("averages", address), ("state_exponents", address * STATES),
        ("residual_bits", ctypes.c_int32), ("rounding", ctypes.c_int32), ("seed", ctypes.c_uint64),
        ("first_index", address), ("counters", address), ("live", address), ("num_live", ctypes.c_int64),
        ("device_rows", address),
    ]  # fmt: skip


class Rows(ctypes.Structure):
    _fields_ = [("struct_size", ctypes.c_uint64), ("params", address), ("grads", address), ("states", address * STATES),
                ("masters", address), ("residuals", address), ("sources", address), ("averages", address),
                ("state_exponents", address * STATES)]  # fmt: skip


@pytest.fixture(scope="module")
def lib():
    found = ctypes.CDLL(str(LIBRARY))
    found.steepest_last_error.restype = ctypes.c_char_p
    return found


class Call:
    """One call; keeps alive what its structs point to."""

    def __init__(self, lib, lists, *, rule=ADAM, flags=DECOUPLED, bits=None, **hyper):
        self.lib, self.kept = lib, []
        self.exec = Exec(ctypes.sizeof(Exec), 0, 0, None, 0, 0)
        self.hyper = Hyper(**{"step": 1, **hyper})
        self.args = Args(struct_size=ctypes.sizeof(Args), rule=rule, flags=flags, num_hyper=1)
        self.args.hyper = ctypes.pointer(self.hyper)
        self.args.num_tensors = len(lists["params"])
        self.args.param_dtype = self.args.grad_dtype = 77  # are not to be looked at
        self.rows = Rows(struct_size=ctypes.sizeof(Rows))
        for name, tensors in lists.items():
            base, _, place = name.partition(".")
            if place:
                getattr(self.rows, base)[int(place)] = self.list(tensors)
            else:
                setattr(self.rows, base, self.list(tensors))

    def list(self, tensors):
        get = ctypes.pythonapi.PyCapsule_GetPointer
        get.restype, get.argtypes = address, [ctypes.py_object, ctypes.c_char_p]
        capsules = [to_dlpack(t) for t in tensors]
        found = (address * len(tensors))(*(get(capsule, b"dltensor") for capsule in capsules))
        self.kept += [capsules, found]
        return ctypes.addressof(found)

    def __call__(self, *, short=0):
        needed = ctypes.c_uint64()
        a, e = ctypes.byref(self.args), ctypes.byref(self.exec)
        status = self.lib.steepest_step_dlpack_workspace_size(e, a, ctypes.byref(needed))
        if status:
            return status, self.lib.steepest_last_error().decode()
        workspace = (ctypes.c_uint64 * (needed.value // 8 + 1))()
        given = ctypes.c_uint64(needed.value - short)
        status = self.lib.steepest_step_dlpack(e, a, ctypes.byref(self.rows), workspace, given)
        return status, self.lib.steepest_last_error().decode()


NUMBERS = dict(lr=0.1, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1)


def adamw_lists(shapes=((7, 5), (3,), (0, 4), ()), dtype=torch.float32, format=lambda t: t):
    generator = torch.Generator().manual_seed(0)
    draw = lambda s: format(torch.randn(s, generator=generator)).to(dtype)  # noqa: E731
    lists = {name: [draw(s) for s in shapes] for name in ("params", "grads", "states.0", "states.1")}
    lists["states.1"] = [v.abs() for v in lists["states.1"]]
    return lists


def copied(lists):
    return {name: [t.clone() for t in tensors] for name, tensors in lists.items()}


def expected_adamw(lists, **more):
    steepest.adamw_(*lists.values(), lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, step=1, **more)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["rows", "columns", "channels last", "offset"])
def test_adamw_has_the_bits_of_python(lib, dtype, layout):
    shapes, make = [(7, 5), (3, 4), (0, 4)], lambda t: t
    if layout == "columns":
        make = lambda t: t.t().contiguous().t()  # noqa: E731
    elif layout == "channels last":
        shapes, make = [(2, 3, 4, 5)], lambda t: t.contiguous(memory_format=torch.channels_last)
    elif layout == "offset":  # torch puts the offset into the address, others into byte_offset
        shapes, make = [(6, 4)], lambda t: torch.cat([t, t])[6:]
    mine = adamw_lists(shapes, dtype, make)
    theirs = copied(mine)
    call = Call(lib, mine, **NUMBERS)
    if layout == "offset":
        tensor = ctypes.cast(call.rows.params, ctypes.POINTER(ctypes.POINTER(ctypes.c_uint64)))[0]
        tensor[0] -= 4 * mine["params"][0].element_size()  # data; the last field is byte_offset
        tensor[5] += 4 * mine["params"][0].element_size()
    assert call() == (OK, "")
    expected_adamw(theirs)
    for name in mine:
        assert all(torch.equal(a, b) for a, b in zip(mine[name], theirs[name])), name


def test_other_rules_masters_averages_and_8bit_states(lib):
    p, g, b = (torch.randn(5, 4) for _ in range(3))
    q, c = p.clone(), b.clone()
    call = Call(lib, {"params": [p], "grads": [g], "states.0": [b]}, rule=SGD, flags=64, lr=0.1, momentum=0.9, step=2)
    assert call() == (OK, "")
    steepest.sgd_([q], [g], [c], lr=0.1, momentum=0.9, step=2)
    assert torch.equal(p, q) and torch.equal(b, c)

    mine = adamw_lists([(40, 10)], torch.bfloat16)
    mine |= {"states.0": [torch.zeros(40, 10)], "states.1": [torch.zeros(40, 10)]}
    mine |= {"masters": [mine["params"][0].float()], "averages": [torch.zeros(40, 10)]}
    theirs = copied(mine)
    assert Call(lib, mine, average_decay=0.9, **NUMBERS)() == (OK, "")
    more = {name: theirs.pop(name) for name in ("masters", "averages")}
    expected_adamw(theirs, average_decay=0.9, **more)
    theirs |= more
    assert all(torch.equal(mine[name][0], theirs[name][0]) for name in mine)

    mine = adamw_lists([(300,)])
    mine |= {f"states.{i}": [torch.zeros(300, dtype=torch.uint8)] for i in (0, 1)}
    mine |= {f"state_exponents.{i}": [torch.zeros(3, dtype=torch.uint8)] for i in (0, 1)}
    theirs = copied(mine)
    call = Call(lib, mine, **NUMBERS)
    first = (ctypes.c_int64 * 1)(0)
    call.args.first_index, call.args.seed = ctypes.addressof(first), 7
    assert call() == (OK, "")
    exponents = [theirs.pop(f"state_exponents.{i}") for i in (0, 1)]
    expected_adamw(theirs, state_exponents=exponents, seed=7, first_index=[0])
    assert all(torch.equal(mine[name][0], theirs[name][0]) for name in theirs)
    assert all(torch.equal(mine[f"state_exponents.{i}"][0], exponents[i][0]) for i in (0, 1)) and exponents[0][0].any()


def test_refusals_name_list_and_row_and_change_nothing(lib):
    good = adamw_lists([(7, 5), (3, 4)])
    with_ = lambda name, tensors: {**copied(good), name: tensors}  # noqa: E731
    gap = torch.zeros(14, 5)[::2], torch.zeros(3, 4)
    cases = [
        (with_("grads", [torch.ones(7, 5), torch.ones(4, 3)]), INVALID, "grads[1] has another shape"),
        (with_("grads", [torch.ones(5, 7).t(), torch.ones(3, 4)]), INVALID, "other strides than params[0]"),
        ({name: list(gap) for name in good}, UNSUPPORTED, "params[0] has gaps"),
        (with_("params", [torch.ones(7, 5), torch.ones(3, 4).half()]), UNSUPPORTED, "params[1] has another type"),
        (with_("params", [t.double() for t in good["params"]]), UNSUPPORTED, "params have type code 2, 64 bits"),
        (with_("states.1", [t.half() for t in good["params"]]), UNSUPPORTED, "states[1] have type code 2, 16 bits"),
        (with_("masters", [t.half() for t in good["params"]]), UNSUPPORTED, "masters have type code 2"),
        (with_("residuals", [t.int() for t in good["params"]]), UNSUPPORTED, "expected int16 or int8"),
        ({k: v for k, v in good.items() if k != "states.1"}, INVALID, "states[1]"),
        ({**good, "state_exponents.0": [torch.zeros(2, dtype=torch.uint8)] * 2}, INVALID, "has 2 elements, expected 1"),
    ]  # fmt: skip
    for lists, code, message in cases:
        before = copied(lists)
        status, said = Call(lib, lists, **NUMBERS)()
        assert status == code and message in said, (message, status, said)
        assert all(torch.equal(a, b) for name in lists for a, b in zip(lists[name], before[name]))
    call = Call(lib, copied(good), **NUMBERS)
    assert call(short=8)[0] == WORKSPACE
    call.exec.device = 9
    assert call()[0] == INVALID
    call = Call(lib, copied(good), **NUMBERS)
    tensor = ctypes.cast(call.rows.grads, ctypes.POINTER(ctypes.POINTER(ctypes.c_int32)))[1]
    tensor[2] = 2  # CUDA
    status, said = call()
    assert status == INVALID and "grads[1] is on DLPack device type 2" in said
    call = Call(lib, copied(good), **NUMBERS)
    call.rows.struct_size = 8
    assert "rows is NULL, or its struct_size" in call()[1]
    call = Call(lib, copied(good), **NUMBERS)
    ctypes.cast(call.rows.grads, ctypes.POINTER(address))[1] = None
    assert "grads[1] is NULL" in call()[1]


def test_counters_of_the_caller_are_used(lib):
    mine = adamw_lists([(7, 5), (3, 4)])
    theirs = copied(mine)
    counts = torch.tensor([4.0, 9.0])
    call = Call(lib, mine, **NUMBERS)
    addresses = (address * 2)(counts.data_ptr(), counts.data_ptr() + 4)
    call.args.counters = ctypes.addressof(addresses)
    assert call() == (OK, "")
    assert call(short=8)[0] == WORKSPACE
    steepest.adamw_(*theirs.values(), lr=0.1, weight_decay=0.1, step=[5, 10])
    assert all(torch.equal(a, b) for name in mine for a, b in zip(mine[name], theirs[name]))
    assert counts.tolist() == [5.0, 10.0]


def test_abi_versions_are_compared(lib):
    version = lib.steepest_abi_version()
    assert lib.steepest_check_abi(version) == OK
    assert lib.steepest_check_abi(version + 1) == UNSUPPORTED
    assert f"compiled for ABI version {version + 1}, libsteepest" in lib.steepest_last_error().decode()


def test_no_tensors_are_no_work(lib):
    assert Call(lib, {"params": [], "grads": []}, **NUMBERS)() == (OK, "")
