"""Checkpoints of apex and bitsandbytes as state dicts for this library's optimizers (torch.optim's load as they are).

    optimizer.load_state_dict(from_apex(optimizer, torch.load("apex.pt")))

apex, `state_dict()` of its fused optimizers: states in float32 under torch's names, step counters in the param groups
(FusedAdam: an int, or an int tensor if capturable; lr may be a tensor).  Masters (`master_weights=True`, amp O2) are
attributes and not in it: they are given apart.  FP16_Optimizer's holds it as "optimizer_state_dict", and masters by
group as "fp32_from_fp16", for which it has put a group's 16-bit parameters before its float32 ones.

bitsandbytes: "state1", "state2" and an int "step"; since 0.49 all but "step" inside "__bnb_optimizer_quant_state__".
8-bit states are uint8 codes c with a code book "qmap1" of 256 numbers in [-1, 1]: x = qmap1[c] absmax1[i // b] for
element i in memory order, b = 256 (2048 before 0.45); without blocks x = qmap1[c] max1.  Tensors of less than 4096
elements stay float32.

Sources: NVIDIA/apex, optimizers/fused_{adam,sgd,adagrad}.py and fp16_utils/fp16_optimizer.py; Dettmers et al. 2022
(arXiv 2110.02861) and bitsandbytes/optim/optimizer.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from steepest.optim.adagrad import Adagrad
from steepest.optim.adam import Adam
from steepest.optim.adamw import AdamW
from steepest.optim.base import FusedOptimizer
from steepest.optim.lion import Lion
from steepest.optim.options import SIXTEEN_BIT
from steepest.optim.rmsprop import RMSprop
from steepest.optim.sgd import SGD
from steepest.reference import storage as codec

WRAPPED = "__bnb_optimizer_quant_state__"
BLOCKS = (256, 2048)
# What state1 and state2 are called here, and what betas[0] is.
BNB_STATES = {
    Adam: ("exp_avg", "exp_avg_sq"), AdamW: ("exp_avg", "exp_avg_sq"), Lion: ("exp_avg",), SGD: ("momentum_buffer",),
    RMSprop: ("square_avg",), Adagrad: ("sum",),
}  # fmt: skip
BNB_BETA = {SGD: "momentum", RMSprop: "alpha"}
# What stands in the way of a continuation, and its meaning.
BNB_REFUSED = {
    "gnorm_vec": "percentile clipping (remove it to go on without)",
    "unorm_vec": "LAMB or LARS, or max_unorm",
}
APEX_STATES = {
    Adam: ("exp_avg", "exp_avg_sq"), AdamW: ("exp_avg", "exp_avg_sq"), SGD: ("momentum_buffer",), Adagrad: ("sum",),
}  # fmt: skip
APEX_REFUSED = {
    "grad_averaging": "FusedLAMB's or FusedNovoGrad's", "exp_avg_sq": "FusedNovoGrad's", "reg_inside_moment":
    "FusedNovoGrad's", "trust_coefficient": "FusedLARS's",
}  # fmt: skip
OPTIONS = ("lr", "betas", "alpha", "eps", "weight_decay", "momentum", "dampening", "nesterov")


def from_apex(
    optimizer: FusedOptimizer, state_dict: dict, masters: Iterable[Tensor] | Sequence[dict] | None = None
) -> dict:
    """What `optimizer.load_state_dict` takes, from the checkpoint of an apex optimizer over the same parameters.

    Args:
        optimizer: AdamW for FusedAdam (Adam if it had adam_w_mode=False, which its checkpoint does not say), SGD for
            FusedSGD, Adagrad for FusedAdagrad.  Its options stay but for those that the checkpoint has.
        state_dict: of the fused optimizer, or of FP16_Optimizer around one.
        masters: float32 masters, one for each parameter (for float32 ones they are not looked at), or groups like
            `FusedAdam.param_groups_master`.  The optimizer must have been made with master_weights=True.

    Raises ValueError for checkpoints of other optimizers and what does not fit; nothing is changed.
    """
    where, keys = "from_apex", _keys("from_apex", optimizer, APEX_STATES)
    held, order = state_dict, [list(group["params"]) for group in optimizer.param_groups]
    if "optimizer_state_dict" in state_dict:
        held = state_dict["optimizer_state_dict"]
        order = [sorted(params, key=lambda p: p.dtype == torch.float32) for params in order]
        if masters is None:
            masters = [
                {"params": [*kept, *([None] * (len(params) - len(kept)))]}
                for kept, params in zip(state_dict.get("fp32_from_fp16", ()), order)
            ]
    saved = _saved_groups(where, optimizer, held)
    entries = {}
    for number, (group, params) in enumerate(zip(saved, order)):
        for name, whose in APEX_REFUSED.items():
            if name in group:
                raise ValueError(f"{where}: param group {number} has {name!r}, {whose}; {_expected(APEX_STATES)}")
        if not group.get("bias_correction", True):
            raise ValueError(f"{where}: param group {number} has bias_correction=False, expected True")
        for key, p in zip(group["params"], params):
            entry = held["state"].get(key)
            if entry:
                entries[p] = _apex_entry(f"{where}: state {key}", entry, keys, group, p)
    if masters is not None:
        _add_masters(where, optimizer, entries, order, masters)
    return _packed(optimizer, saved, entries)


def from_bitsandbytes(optimizer: FusedOptimizer, state_dict: dict) -> dict:
    """What `optimizer.load_state_dict` takes, from the checkpoint of a bitsandbytes optimizer over the same parameters.

    optimizer: the class of the same name (AdamW for AdamW8bit, PagedAdamW32bit, ...).  Its options stay but for those
        that the checkpoint has: lr, betas (SGD's momentum and RMSprop's alpha among them), eps, weight_decay.  8-bit
        states are decoded exactly; with state_dtype="block8" they are encoded anew in the first step.

    bitsandbytes decays Adam's weights decoupled from the gradient: its Adam with weight_decay needs AdamW here.
    AdamW here decays before the step and there after it; SGD's and Adagrad's eps and decay agree.

    Raises ValueError for checkpoints of other optimizers (LAMB, LARS, AdEMAMix), of percentile clipping, and for what
    does not fit; nothing is changed.
    """
    where, keys = "from_bitsandbytes", _keys("from_bitsandbytes", optimizer, BNB_STATES)
    saved = [dict(group) for group in _saved_groups(where, optimizer, state_dict)]
    entries = {}
    for number, (group, own) in enumerate(zip(saved, optimizer.param_groups)):
        if type(optimizer) is Adam and group.get("weight_decay"):
            raise ValueError(
                f"{where}: param group {number} has weight_decay={group['weight_decay']}, which bitsandbytes' Adam "
                "decouples from the gradient; expected steepest.optim.AdamW"
            )
        if type(optimizer) in BNB_BETA:
            group[BNB_BETA[type(optimizer)]] = group["betas"][0]
        for key, p in zip(group["params"], own["params"]):
            entry = state_dict["state"].get(key)
            if entry:
                entries[p] = _bnb_entry(f"{where}: state {key}", entry, keys, p)
    return _packed(optimizer, saved, entries)


def _expected(known: dict) -> str:
    return f"expected one of {', '.join(kind.__name__ for kind in known)}"


def _keys(where: str, optimizer, known: dict) -> tuple[str, ...]:
    if type(optimizer) not in known:
        raise ValueError(f"{where}: optimizer is {type(optimizer).__name__}, {_expected(known)} of steepest.optim")
    return known[type(optimizer)]


def _saved_groups(where: str, optimizer, held: dict) -> list[dict]:
    if not {"state", "param_groups"} <= set(held):
        raise ValueError(f"{where}: the checkpoint has {sorted(held)}, expected 'state' and 'param_groups'")
    found = [len(group["params"]) for group in held["param_groups"]]
    expected = [len(group["params"]) for group in optimizer.param_groups]
    if found != expected:
        raise ValueError(f"{where}: the checkpoint has groups of {found} parameters, the optimizer of {expected}")
    return held["param_groups"]


def _checked(where: str, name: str, value, p: Tensor) -> Tensor:
    if not isinstance(value, Tensor) or value.shape != p.shape:
        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{where}: {name} is {found}, its parameter {tuple(p.shape)}")
    return value.detach().clone()  # torch's load_state_dict would take the checkpoint's own memory


def _apex_entry(where: str, entry: dict, keys: tuple[str, ...], group: dict, p: Tensor) -> dict:
    found = {key: value for key, value in entry.items() if isinstance(value, Tensor) and key != "step"}
    if set(found) != set(keys):
        raise ValueError(f"{where} has {sorted(found)}, expected {sorted(keys)}")
    step = entry.get("step", group.get("step"))
    if step is None:
        if "exp_avg" in keys:
            raise ValueError(f"{where}: neither it nor its group has 'step', expected the number of steps taken")
        step = 1  # apex's SGD and Adagrad count none, and need none
    return {"step": _counter(step), **{key: _checked(where, key, found[key], p) for key in keys}}


def _counter(step) -> Tensor:
    return torch.tensor(float(step), dtype=torch.float32)


def _bnb_entry(where: str, entry: dict, keys: tuple[str, ...], p: Tensor) -> dict:
    entry = {**entry, **entry.get(WRAPPED, {})}
    for name, what in BNB_REFUSED.items():
        if name in entry:
            raise ValueError(f"{where} has {name!r}, of {what}, which has no counterpart here")
    names = tuple(f"state{i}" for i in range(1, 1 + len(keys)))
    found = tuple(name for name in ("state1", "state2") if name in entry)
    if found != names or "step" not in entry:
        raise ValueError(f"{where} has {sorted(set(entry) - {WRAPPED})}, expected {', '.join(names)} and step")
    values = {key: _bnb_state(where, entry, i, p) for i, key in enumerate(keys, start=1)}
    return {"step": _counter(entry["step"]), **values}


def _bnb_state(where: str, entry: dict, i: int, p: Tensor) -> Tensor:
    """state1 or state2 in float32."""
    codes = _checked(where, f"state{i}", entry[f"state{i}"], p)
    if codes.dtype != torch.uint8:
        return codes
    if f"qmap{i}" not in entry or entry[f"qmap{i}"].numel() != 256:
        raise ValueError(f"{where}: state{i} is uint8, expected a code book qmap{i} of 256 numbers with it")
    book = entry[f"qmap{i}"].to(codes.device, torch.float32)
    scale = entry.get(f"absmax{i}")
    if scale is None:
        if f"max{i}" not in entry:
            raise ValueError(f"{where}: state{i} is uint8, expected absmax{i} (by blocks) or max{i} with it")
        return book[codes.long()] * entry[f"max{i}"].to(codes.device, torch.float32)
    fitting = [block for block in BLOCKS if -(-codes.numel() // block) == scale.numel()]
    if not fitting:
        raise ValueError(
            f"{where}: absmax{i} has {scale.numel()} numbers for {codes.numel()} elements, expected one for each "
            f"{' or '.join(map(str, BLOCKS))}"
        )
    index = codec.memory_index(codes).to(codes.device)
    return book[codes.long()] * scale.to(codes.device, torch.float32)[index // fitting[0]]


def _add_masters(where: str, optimizer, entries: dict, order: list[list[Tensor]], masters) -> None:
    given: list[Tensor | None] = []
    for held in masters:
        given += held["params"] if isinstance(held, dict) else [held]
    params = [p for group in order for p in group]
    if len(given) != len(params):
        raise ValueError(f"{where}: there are {len(given)} masters for {len(params)} parameters")
    keeping = {p for group in optimizer.param_groups if group.get("master_weights") for p in group["params"]}
    for i, (p, master) in enumerate(zip(params, given)):
        if p.dtype not in SIXTEEN_BIT or master is None or p not in entries:
            continue
        if p not in keeping:
            raise ValueError(f"{where}: there are masters, expected an optimizer with master_weights=True")
        if master.dtype != torch.float32:
            raise ValueError(f"{where}: masters[{i}] is {master.dtype}, expected torch.float32")
        entries[p]["master"] = _checked(where, f"masters[{i}]", master, p)


def _packed(optimizer, saved: list[dict], entries: dict[Tensor, dict]) -> dict:
    """A state dict of the optimizer with the entries for its states, and what its groups share with the saved ones."""
    out = optimizer.state_dict()
    number = {
        p: n
        for own, packed in zip(optimizer.param_groups, out["param_groups"])
        for p, n in zip(own["params"], packed["params"])
    }
    out["state"] = {number[p]: entry for p, entry in entries.items()}
    for group, other in zip(out["param_groups"], saved):
        for name in OPTIONS:
            if name in group and name in other:
                value = other[name]
                value = value.item() if isinstance(value, Tensor) else value
                group[name] = tuple(value) if name == "betas" else value
    return out
