"""The elementwise optimizers against torch's own for-loops, their shared options, clipping and loss scaling."""

import copy
import math

import pytest
import torch

import steepest
from steepest import optim

SHAPES = [(5, 7), (33,), (), (64, 3), (0,), (3, 4, 5, 2)]
UNIT = 2.0**-24

TORCH = {
    "SGD": [
        dict(lr=0.1),
        dict(lr=0.1, momentum=0.9, dampening=0.1, weight_decay=0.1),
        dict(lr=0.1, momentum=0.9, nesterov=True, maximize=True),
    ],
    "Adagrad": [dict(lr=0.1), dict(lr=0.1, lr_decay=0.01, weight_decay=0.1, initial_accumulator_value=0.1, eps=1e-3)],
    "RMSprop": [
        dict(),
        dict(centered=True),
        dict(momentum=0.9, alpha=0.9),
        dict(centered=True, momentum=0.9, weight_decay=0.1, maximize=True),
    ],
    "Adam": [
        dict(weight_decay=0.1),
        dict(amsgrad=True, maximize=True),
        dict(weight_decay=0.1, decoupled_weight_decay=True),
    ],
    "AdamW": [dict(), dict(amsgrad=True)],
}
CASES = [(name, options) for name, all_options in TORCH.items() for options in all_options]


def ids(value):
    return value if isinstance(value, str) else ",".join(map(str, value)) or "default"


def parameters(seed=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    found = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in SHAPES]
    found[3].data = found[3].data.t().contiguous().t()
    found[5].data = found[5].data.contiguous(memory_format=torch.channels_last)
    return found


def give_gradients(lists, seed, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    for row in zip(*lists):
        grad = size * torch.randn(row[0].shape, generator=generator)
        for p in row:
            p.grad = grad.to(p.dtype).clone(memory_format=torch.preserve_format)


def allowed(steps: int, size: torch.Tensor) -> torch.Tensor:
    """Each step rounds a dozen intermediate results, each at most of the size of parameter and step together; where the
    two implementations round differently (torch's vectorised division and root, and their fused forms) they part by
    that much, and errors add up over the steps."""
    return steps * 12 * UNIT * (size.abs() + 1)


@pytest.mark.parametrize("name, options", CASES, ids=ids)
def test_follows_torch(name, options):
    mine, theirs = parameters(), parameters()
    ours = getattr(optim, name)(mine, **options)
    torchs = getattr(torch.optim, name)(theirs, foreach=False, **options)
    start = [p.detach().clone() for p in mine]
    for step in range(20):
        give_gradients([mine, theirs], step)
        ours.step()
        torchs.step()
    for p, q, s in zip(mine, theirs, start):
        assert ((p - q).abs() <= allowed(20, torch.maximum(p.abs(), s.abs()))).all()
        assert not p.numel() or not torch.equal(p, s)


@pytest.mark.parametrize("name, options", CASES, ids=ids)
def test_checkpoints_go_both_ways(name, options):
    mine, theirs = parameters(), parameters()
    ours = getattr(optim, name)(mine, **options)
    torchs = getattr(torch.optim, name)(theirs, foreach=False, **options)
    for step in range(3):
        give_gradients([mine, theirs], step)
        ours.step()
        torchs.step()
    swapped = copy.deepcopy(ours.state_dict())
    ours.load_state_dict(copy.deepcopy(torchs.state_dict()))
    torchs.load_state_dict(swapped)
    for p, q in zip(mine, theirs):
        p.data.copy_(q.data)
    for step in range(3, 6):
        give_gradients([mine, theirs], step)
        ours.step()
        torchs.step()
    for p, q in zip(mine, theirs):
        assert ((p - q).abs() <= allowed(6, p)).all()


@pytest.mark.parametrize("name", [*TORCH, "Lion"])
def test_a_checkpoint_continues_bit_for_bit(name, tmp_path):
    params = parameters(dtype=torch.bfloat16)
    optimizer = getattr(optim, name)(params, lr=0.1)
    for step in range(3):
        give_gradients([params], step)
        optimizer.step()
    torch.save(
        {"optimizer": optimizer.state_dict(), "params": [p.detach() for p in params]}, tmp_path / "checkpoint.pt"
    )
    loaded = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    others = [p.clone().requires_grad_() for p in loaded["params"]]
    resumed = getattr(optim, name)(others, lr=0.5)
    resumed.load_state_dict(loaded["optimizer"])
    give_gradients([params, others], 3)
    optimizer.step()
    resumed.step()
    assert all(torch.equal(p, q) for p, q in zip(params, others))


def test_lion_is_the_papers():
    params = parameters()
    optimizer = optim.Lion(params, lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)
    exact = [p.detach().double() for p in params]
    means = [torch.zeros_like(p) for p in exact]
    for step in range(10):
        give_gradients([params], step)
        for i, p in enumerate(params):
            g = p.grad.double()
            update = (0.9 * means[i] + 0.1 * g).sign()
            exact[i] = exact[i] - 0.01 * (update + 0.1 * exact[i])
            means[i] = 0.99 * means[i] + 0.01 * g
        optimizer.step()
    for p, q in zip(params, exact):
        assert ((p - q).abs() <= allowed(10, q)).all()


@pytest.mark.parametrize("name", [*TORCH, "Lion"])
@pytest.mark.parametrize("max_norm", [0.5, 1e4])
def test_clipping_by_norm_inside_the_step(name, max_norm):
    mine, theirs = parameters(), parameters()
    ours = getattr(optim, name)(mine, lr=0.01, max_grad_norm=max_norm)
    plain = getattr(optim, name)(theirs, lr=0.01)
    for step in range(5):
        give_gradients([mine, theirs], step, size=3.0)
        before = [p.grad.clone() for p in mine]
        ours.step()
        norm = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
        plain.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(mine, before)), "gradients were written"
        torch.testing.assert_close(ours.grad_norm, norm, rtol=1e-6, atol=0)
    # The coefficients differ by rounding alone; a sign that turns with it moves a weight of Lion's by 2 lr.
    different = sum(int(((p - q).abs() > 1e-5 * (1 + q.abs())).sum()) for p, q in zip(mine, theirs))
    assert different == 0


@pytest.mark.parametrize("name", [*TORCH, "Lion"])
def test_grad_scaler_unscales_and_skips_inside_the_step(name):
    mine, theirs = parameters(), parameters()
    ours, plain = getattr(optim, name)(mine, lr=0.01), getattr(optim, name)(theirs, lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    for step in range(4):
        give_gradients([mine, theirs], step)
        for p in mine:
            p.grad *= 1024.0
        if step == 2:
            mine[0].grad[0, 0] = math.inf
        scaler.scale(torch.tensor(1.0))  # as backward() would have done
        before = [p.detach().clone() for p in mine]
        scaler.step(ours)
        if step == 2:
            assert all(torch.equal(p, q) for p, q in zip(mine, before)), "an infinite gradient was stepped"
            assert {float(entry["step"]) for entry in ours.state.values()} == {2.0}
            break
        plain.step()
        assert all(torch.equal(p, q) for p, q in zip(mine, theirs)), "dividing by 1024 is exact"
        scaler.update()


def test_shared_options_reach_the_rule():
    for name in [*TORCH, "Lion"]:
        params = [torch.full((8,), 0.05, requires_grad=True)]
        params[0].grad = torch.zeros(8)
        getattr(optim, name)(params, lr=0.1, l1=1.0).step()
        assert torch.equal(params[0], torch.zeros(8)), f"{name}: l1 decay gives exact zeros"
    ends = [torch.tensor([0.5, -0.5, 0.75, -0.75], requires_grad=True)]  # 0.5 is what l1 takes away
    ends[0].grad = torch.zeros(4)
    optim.SGD(ends, lr=0.5, l1=1.0).step()
    assert torch.equal(ends[0].signbit(), torch.tensor([False, True, False, True])), "a zero keeps its sign"
    assert torch.equal(ends[0], torch.tensor([0.0, 0.0, 0.25, -0.25]))
    one, two = [torch.ones(4, requires_grad=True)], [torch.ones(4, requires_grad=True)]
    one[0].grad, two[0].grad = torch.tensor([5.0, -5.0, 0.1, -0.1]), torch.tensor([0.5, -0.5, 0.1, -0.1])
    optim.SGD(one, lr=0.1, clip_value=0.5).step()
    optim.SGD(two, lr=0.1).step()
    assert torch.equal(one[0], two[0]) and one[0].grad[0] == 5.0


def test_many_groups_are_one_call():
    params = [torch.randn(16).requires_grad_() for _ in range(50)]
    twins = [p.detach().clone().requires_grad_() for p in params]
    optimizer = optim.RMSprop([{"params": [p], "lr": 0.01 * (i + 1)} for i, p in enumerate(params)])
    give_gradients([params, twins], 0)
    optimizer.step()
    for i, q in enumerate(twins):
        optim.RMSprop([q], lr=0.01 * (i + 1)).step()
    assert all(torch.equal(p, q) for p, q in zip(params, twins))
    assert len(optimizer._tables["RMSprop"].tables) == 1


BAD = [
    (lambda p: optim.SGD(p, lr=-0.1), "lr is -0.1"),
    (lambda p: optim.SGD(p, lr=0.1, nesterov=True), "Nesterov momentum requires a momentum and zero dampening"),
    (lambda p: optim.RMSprop(p, alpha=1.5), "alpha is 1.5"),
    (lambda p: optim.Adagrad(p, initial_accumulator_value=-1), "initial_accumulator_value is -1"),
    (lambda p: optim.Adam(p, betas=(0.9, 1.0)), r"betas\[1\] is 1.0"),
    (lambda p: optim.Adam(p, cautious=True), "expected decoupled decay with it"),
    (lambda p: optim.Lion(p, l1=-1.0), "l1 is -1.0"),
    (lambda p: optim.Lion(p, clip_value=0), "clip_value is 0"),
    (lambda p: optim.Lion(p, max_grad_norm=-1), "max_grad_norm is -1"),
]


@pytest.mark.parametrize("make, message", BAD, ids=[message for _, message in BAD])
def test_wrong_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make([torch.zeros(3, requires_grad=True)])


@pytest.mark.parametrize("op", ["sgd_", "adagrad_", "rmsprop_", "adam_", "lion_"])
def test_wrong_lists_are_refused_before_any_change(op):
    states = 2 if op == "adam_" else 1
    options = dict(lr=0.1, step=1)

    def lists(**changed):
        roles = [[torch.ones(3), torch.ones(2)] for _ in range(2 + states)]
        for role, tensors in changed.items():
            roles[int(role[1:])] = tensors
        return roles

    function = getattr(steepest, op)
    for bad, error, message in (
        (lists(r1=[torch.ones(3)]), ValueError, "grads has 1 tensors, params has 2"),
        (lists(r1=[torch.ones(3), torch.ones(3)]), ValueError, r"grads\[1\] has shape \(3,\)"),
        (lists(r2=[torch.ones(3), torch.ones(2, dtype=torch.float64)]), TypeError, "float64"),
        (lists(r1=[torch.ones(3), torch.ones(2).to_sparse()]), ValueError, "sparse"),
    ):
        with pytest.raises(error, match=message):
            function(*bad, **options)
        assert all(torch.equal(t, torch.ones_like(t)) for t in bad[0])
    shared = lists()
    shared[2] = shared[0]
    with pytest.raises(ValueError, match="shares memory"):
        function(*shared, **options)
    with pytest.raises(ValueError, match="step is 0"):
        function(*lists(), **{**options, "step": 0})
    # Without Triton's interpreter CPU tensors cannot go to Triton at all; with it there is no kernel for these rules.
    with pytest.raises((ValueError, NotImplementedError), match=f"{op}.*riton"):
        function(*lists(), **options, backend="triton")


def test_momentum_needs_buffers():
    with pytest.raises(ValueError, match="expected momentum_buffers"):
        steepest.sgd_([torch.ones(3)], [torch.ones(3)], lr=0.1, momentum=0.9, step=1)
