"""Cases of how steps keep their tensors: masters, correction bits, sources, averages, noise, 8 bits, random rounding.

All of them equal the reference bit for bit.  Where the stored numbers still are one float32 each (masters, 16
correction bits, sources, averages, noise) they are also held against the exact trajectory, within the rule's bound.
"""

from __future__ import annotations

import torch

from steepest.reference import storage

AVERAGE_DECAY, SHORT_DECAY = 0.9, 0.3  # either form of lerp
NOISE = (0.23, 0.55)  # rounding either to a float changes what steps 1 and 2 add
SEED = 2**40 + 12345
# What a case may keep; "block8" means that all states are 8-bit codes, "short" that averages are of few steps.
KEEPS = ("masters", "residual16", "residual8", "sources", "averages", "short", "noise", "block8", "stochastic")


def lists(case, values: dict[str, list[torch.Tensor]], generator) -> dict[str, list[torch.Tensor]]:
    """The lists that a case adds, and states as codes; `values` has the usual roles and is changed in place."""
    params, added = values["params"], {}

    def nearby(p):  # what a parameter's float32 original may have been
        return p.float() * (1 + 2**-9 * (torch.rand(p.shape, generator=generator) - 0.5))

    if "masters" in case.keeps:
        added["masters"] = [nearby(p) for p in params]
    for keep, dtype in (("residual16", torch.int16), ("residual8", torch.int8)):
        if keep in case.keeps:
            split = [storage.split(nearby(p), dtype) for p in params]
            values["params"], added["residuals"] = [high for high, _ in split], [low for _, low in split]
    if "sources" in case.keeps:
        added["sources"] = [p.clone() for p in values["params"]]
        values["params"] = [p + 1 for p in params]
    if "averages" in case.keeps:
        added["averages"] = [nearby(p) for p in params]
    if "block8" in case.keeps:
        for role in case.states:
            magnitude, exponents, codes = role_is_magnitude(role), [], []
            for x in values[role]:
                index, value = torch.arange(x.numel()).reshape(x.shape), x.float()
                exponents.append(storage.block8_exponents(value, index, magnitude))
                half = torch.full_like(index, 0x7FFF)
                codes.append(storage.block8_encode(value, exponents[-1], index, magnitude, half))
            values[role], added[f"{role}_exponents"] = codes, exponents
    return added


def role_is_magnitude(role: str) -> bool:
    return role in ("state_sums", "square_avgs", "exp_avg_sqs", "max_exp_avg_sqs")


def keywords(case, tensors: dict) -> dict:
    """The op's keyword arguments for what a case keeps."""
    given = {name: tensors[name] for name in ("masters", "residuals", "sources", "averages") if name in tensors}
    if "averages" in case.keeps:
        given["average_decay"] = average_decay(case)
    if "noise" in case.keeps:
        given["gradient_noise"] = NOISE
    if "block8" in case.keeps:
        given["state_exponents"] = [tensors[f"{role}_exponents"] for role in case.states]
    if "stochastic" in case.keeps:
        given["stochastic_rounding"] = True
    if {"noise", "block8", "stochastic"} & set(case.keeps):
        given["seed"] = SEED
    return given


def average_decay(case) -> float:
    return SHORT_DECAY if "short" in case.keeps else AVERAGE_DECAY


def added_roles(case) -> list[str]:
    """Names of the lists in `lists`, in its order."""
    found = [keep for keep in ("masters", "sources", "averages") if keep in case.keeps]
    if {"residual16", "residual8"} & set(case.keeps):
        found.insert(0, "residuals")
    return found + [f"{role}_exponents" for role in case.states if "block8" in case.keeps]


def is_tracked(case) -> bool:
    """Whether the exact trajectory bounds the results."""
    return not {"residual8", "block8", "stochastic"} & set(case.keeps)


def logical_start(case, start: dict[str, list[torch.Tensor]]) -> list[torch.Tensor]:
    """The parameters that the first step works on."""
    if "masters" in case.keeps:
        return start["masters"]
    if "residual16" in case.keeps:
        return [storage.join(*pair) for pair in zip(start["params"], start["residuals"])]
    return start["sources" if "sources" in case.keeps else "params"]


def logical(case, outputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The parameters that the steps have left."""
    count = range(len(case.shapes))
    if "masters" in case.keeps:
        return [outputs[f"masters[{i}]"] for i in count]
    if "residual16" in case.keeps:
        return [storage.join(outputs[f"params[{i}]"].cpu(), outputs[f"residuals[{i}]"].cpu()) for i in count]
    return [outputs[f"params[{i}]"] for i in count]


def noise(case, step: int, dtype) -> torch.Tensor | None:
    """What is added to the gradients of all tensors, one after another, in a step; contiguous tensors only."""
    if "noise" not in case.keeps:
        return None
    index = torch.arange(sum(torch.Size(shape).numel() for shape in case.shapes))
    words, _ = storage.random_words(index, seed=SEED, step=step, purpose=storage.NOISE)
    deviation = torch.tensor(storage.noise_deviation(*NOISE, step), dtype=dtype).double()
    return deviation * storage.normal(words).double()
