"""Our optimizers on torch's own optimizer database: its inputs and its error inputs."""

import pytest
import torch

from steepest import optim

common = pytest.importorskip("torch.testing._internal.common_optimizers")

NAMES = ("SGD", "Adagrad", "RMSprop", "Adam", "AdamW")
INFOS = {info.optim_cls.__name__: info for info in common.optim_db if info.optim_cls.__name__ in NAMES}
STEPS = 6
UNIT = 2.0**-24
# What of the database does not apply, and why.
NOT_OURS = {
    "differentiable": "differentiable=True is refused: the step is one kernel",
}


def inputs():
    for name, info in sorted(INFOS.items()):
        # Those for "cuda" are capturable=True, with numbers in tensors; ours takes them on the CPU too.
        more = [case for case in info.optim_inputs_func(device="cuda") if case.kwargs.get("capturable")]
        for k, case in enumerate([*info.optim_inputs_func(device="cpu"), *more]):
            yield pytest.param(name, case, id=f"{name}-{k}-{case.desc}")


def errors():
    for name, info in sorted(INFOS.items()):
        for k, case in enumerate(info.optim_error_inputs_func(device="cpu", dtype=torch.float32)):
            yield pytest.param(name, case, id=f"{name}-{k}-{case.optimizer_error_input.desc}")


def parameters():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in ((3, 4), (7,), (2, 2, 2))]


@pytest.mark.parametrize("name, case", list(inputs()))
def test_inputs(name, case):
    kwargs = dict(case.kwargs)
    capturable = kwargs.get("capturable", False)
    for option, why in NOT_OURS.items():
        if kwargs.get(option):
            with pytest.raises(ValueError, match=f"{option}=True is not supported"):
                getattr(optim, name)(parameters(), **kwargs)
            pytest.skip(why)
    mine, theirs = parameters(), parameters()
    ours = getattr(optim, name)(mine, **kwargs)
    for_loop = {"foreach": False} if name == "RMSprop" else {"foreach": False, "fused": None}
    # torch has no capturable steps on the CPU: its plain ones are what they must equal.
    torchs = getattr(torch.optim, name)(
        theirs, **{**kwargs, **for_loop, **({"capturable": False} if capturable else {})}
    )
    start = [p.detach().abs() + 1 for p in mine]
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step + 1)
        for p, q in zip(mine, theirs):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        ours.step()
        torchs.step()
    for p, q, s in zip(mine, theirs, start):
        # A dozen roundings a step, each of a number no larger than parameter and step together.
        size = torch.maximum(torch.maximum(p.abs(), q.abs()), s)
        assert ((p - q).abs() <= STEPS * 12 * UNIT * size).all()
        assert case.kwargs.get("lr") == 0 or not torch.equal(p.abs() + 1, s)


@pytest.mark.parametrize("name, case", list(errors()))
def test_error_inputs(name, case):
    given = case.optimizer_error_input
    if issubclass(case.error_type, Warning):
        with pytest.warns(case.error_type, match=case.error_regex):
            getattr(optim, name)(given.params, **given.kwargs)
    elif case.error_on == common.OptimizerErrorEnum.CONSTRUCTION_ERROR:
        with pytest.raises((ValueError, TypeError)):
            getattr(optim, name)(given.params, **given.kwargs)
    else:
        optimizer = getattr(optim, name)(given.params, **given.kwargs)
        with pytest.raises((RuntimeError, ValueError, TypeError)):
            optimizer.step()
