"""steepest.optim.AdamW: torch's interface, checkpoints both ways, and a table that never goes stale."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

import steepest


def model_and_data():
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    return model, torch.randn(16, 6), torch.randn(16, 3)


def train(model, optimizer, data, steps, scheduler=None):
    x, y = data
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        if scheduler:
            scheduler.step()


def assert_equal_params(a, b):
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))


def assert_close_params(a, b):
    # Eight ulp at 0.1, the bound that the step itself is held to (test_adamw_step.py).
    for p, q in zip(a.parameters(), b.parameters()):
        torch.testing.assert_close(p, q, rtol=8 * 2**-23, atol=8 * 2**-27)


@pytest.mark.parametrize("first, second", [("torch", "steepest"), ("steepest", "torch"), ("steepest", "steepest")])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_checkpoints_continue_in_either_optimizer(first, second, amsgrad):
    kinds = {"torch": torch.optim.AdamW, "steepest": steepest.optim.AdamW}
    model, *data = model_and_data()
    whole = copy.deepcopy(model)
    train(whole, torch.optim.AdamW(whole.parameters(), lr=1e-2, amsgrad=amsgrad, foreach=False), data, 6)
    start = kinds[first](model.parameters(), lr=1e-2, amsgrad=amsgrad)
    train(model, start, data, 3)
    file = io.BytesIO()
    torch.save(start.state_dict(), file)
    file.seek(0)
    then = kinds[second](model.parameters(), lr=1.0)
    then.load_state_dict(torch.load(file, weights_only=True))
    train(model, then, data, 3)
    assert then.param_groups[0]["lr"] == 1e-2
    assert_close_params(model, whole)


def test_state_dict_has_the_keys_and_dtypes_of_torch():
    model, *data = model_and_data()
    other = copy.deepcopy(model)
    ours = steepest.optim.AdamW(model.parameters())
    theirs = torch.optim.AdamW(other.parameters())
    train(model, ours, data, 1)
    train(other, theirs, data, 1)
    a, b = ours.state_dict(), theirs.state_dict()
    ours_alone = {"cautious", "l1", "clip_value"}  # which torch's load_state_dict takes along
    assert a["param_groups"][0].keys() - ours_alone == b["param_groups"][0].keys()
    for i, entry in b["state"].items():
        assert entry.keys() == a["state"][i].keys()
        for key, value in entry.items():
            assert (value.dtype, value.shape) == (a["state"][i][key].dtype, a["state"][i][key].shape)


def test_lr_scheduler_groups_and_closure():
    model, *data = model_and_data()
    other = copy.deepcopy(model)

    def groups(m):
        return [{"params": m[0].parameters(), "lr": 3e-3, "weight_decay": 0.0}, {"params": m[2].parameters()}]

    ours = steepest.optim.AdamW(groups(model), lr=1e-2)
    theirs = torch.optim.AdamW(groups(other), lr=1e-2, foreach=False)
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 10) for o in (ours, theirs)]
    train(model, ours, data, 5, schedulers[0])
    train(other, theirs, data, 5, schedulers[1])
    assert_close_params(model, other)

    def closure():
        ours.zero_grad()
        loss = torch.nn.functional.mse_loss(model(data[0]), data[1])
        loss.backward()
        return loss

    assert ours.step(closure) > 0


def test_parameters_without_gradient_wait():
    a, b = torch.randn(3, requires_grad=True), torch.randn(4, requires_grad=True)
    optimizer = steepest.optim.AdamW([a, b])
    a.grad = torch.ones(3)
    before = b.detach().clone()
    optimizer.step()
    assert torch.equal(b, before) and b not in optimizer.state
    b.grad = torch.ones(4)
    optimizer.step()
    a.grad = None
    optimizer.step()
    assert (optimizer.state[a]["step"], optimizer.state[b]["step"]) == (2, 2)
    assert not torch.equal(b, before)


def test_group_added_later_is_stepped():
    a, b = torch.randn(3, requires_grad=True), torch.randn(4, requires_grad=True)
    optimizer = steepest.optim.AdamW([a])
    a.grad = b.grad = None
    a.grad = torch.ones(3)
    optimizer.step()
    optimizer.add_param_group({"params": [b], "lr": 0.5})
    b.grad = torch.ones(4)
    before = b.detach().clone()
    optimizer.step()
    assert (before - b > 0.4).all()
    with pytest.raises(ValueError, match="param group 2: lr is -1"):
        optimizer.add_param_group({"params": [torch.zeros(1, requires_grad=True)], "lr": -1})
    assert len(optimizer.param_groups) == 2


def reference_of(p, optimizer, grad):
    """What one more step must give, from copies of everything."""
    q, state = p.detach().clone(), {k: v.clone() for k, v in optimizer.state[p].items()}
    group = optimizer.param_groups[0]
    options = {k: group[k] for k in ("lr", "betas", "eps", "weight_decay")}
    steepest.adamw_([q], [grad], [state["exp_avg"]], [state["exp_avg_sq"]], step=int(state["step"]) + 1, **options)
    return q


def _replace_data(p, optimizer):
    p.data = p.detach().clone() * 2


def _replace_state(p, optimizer):
    optimizer.state[p]["exp_avg"] = torch.full_like(p, 0.5)


def _replace_state_data(p, optimizer):
    optimizer.state[p]["exp_avg"].data = torch.full_like(p, 0.25)


def _replace_entry(p, optimizer):
    optimizer.state[p] = {k: v.clone() + 1 for k, v in optimizer.state[p].items()}


def _replace_step(p, optimizer):
    optimizer.state[p]["step"] = torch.tensor(70.0)


def _write_step(p, optimizer):
    optimizer.state[p]["step"].fill_(41)


def _reload(p, optimizer):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def _change_lr(p, optimizer):
    optimizer.param_groups[0]["lr"] = 0.3


def _change_option_again(p, optimizer):
    """The group is known when its second option changes, and once more after a step with the first."""
    optimizer.param_groups[0]["eps"] = 1e-3
    optimizer.step()
    optimizer.param_groups[0]["weight_decay"] = 0.4


def _write_to_a_list(p, optimizer):
    optimizer.param_groups[0]["betas"] = [0.5, 0.6]
    optimizer.step()
    optimizer.param_groups[0]["betas"][0] = 0.8


CHANGES = [_replace_data, _replace_state, _replace_state_data, _replace_entry]
CHANGES += [_replace_step, _write_step, _reload, _change_lr, _change_option_again, _write_to_a_list]


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_is_replaced_between_steps_is_noticed(change):
    p = torch.randn(50, requires_grad=True)
    optimizer = steepest.optim.AdamW([p], lr=1e-2)
    for _ in range(2):
        p.grad = torch.randn(50)
        optimizer.step()
    change(p, optimizer)
    p.grad = torch.randn(50)
    expected = reference_of(p, optimizer, p.grad)
    optimizer.step()
    assert torch.equal(p, expected)


def test_pickle_and_deepcopy_keep_the_trajectory():
    model, *data = model_and_data()
    optimizer = steepest.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, optimizer, data, 2)
    model2, optimizer2 = copy.deepcopy((model, optimizer))
    model3, optimizer3 = pickle.loads(pickle.dumps((model, optimizer)))
    for m, o in ((model, optimizer), (model2, optimizer2), (model3, optimizer3)):
        train(m, o, data, 2)
    assert_equal_params(model, model2)
    assert_equal_params(model, model3)


def test_grad_scaler_skips_a_step_with_inf():
    p = torch.randn(5, requires_grad=True)
    optimizer = steepest.optim.AdamW([p])
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for value, moves in ((1.0, True), (float("inf"), False), (1.0, True)):
        before = p.detach().clone()
        optimizer.zero_grad()
        scaler.scale((p * value).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, p) != moves
    assert optimizer.state[p]["step"] == 2


def test_an_error_in_one_group_leaves_all_groups_unchanged():
    a, b = torch.randn(3, requires_grad=True), torch.randn(4, requires_grad=True, dtype=torch.float64)
    optimizer = steepest.optim.AdamW([a, b])
    a.grad, b.grad = torch.ones(3), torch.ones(4, dtype=torch.float64)
    before = a.detach().clone()
    with pytest.raises(TypeError, match=r"AdamW.step: params\[0\] has dtype torch.float64"):
        optimizer.step()
    assert torch.equal(a, before) and optimizer.state[a]["step"] == 0


def test_sparse_gradient_is_refused():
    table = torch.nn.Embedding(10, 4, sparse=True)
    optimizer = steepest.optim.AdamW(table.parameters())
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match=r"grads\[0\] is torch.sparse_coo"):
        optimizer.step()


@pytest.mark.parametrize(
    "options, words",
    [
        ({"lr": -1}, "param group 0: lr is -1"),
        ({"betas": (1.0, 0.9)}, "betas[0] is 1.0"),
        ({"eps": -1}, "eps is -1"),
        ({"weight_decay": -1}, "weight_decay is -1"),
        ({"differentiable": True}, "differentiable=True is not supported"),
    ],
)
def test_wrong_options_are_refused_at_construction(options, words):
    with pytest.raises(ValueError) as caught:
        steepest.optim.AdamW([torch.zeros(2, requires_grad=True)], **options)
    assert words in str(caught.value)


def test_non_leaf_parameter_is_refused():
    with pytest.raises(ValueError, match="non-leaf"):
        steepest.optim.AdamW([torch.zeros(2, requires_grad=True) * 2])
