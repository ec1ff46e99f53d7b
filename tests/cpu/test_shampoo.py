"""steepest.optim.Shampoo: the published rule, blocks, refreshing in turn, bad blocks, checkpoints, refusals."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import steepest
from steepest.optim.shampoo_blocks import Bucket, block_slices, make_buckets, merged_shape, spread
from steepest.reference.shampoo import shampoo_

F64 = torch.float64
GRAFTINGS = ("none", "sgd", "adagrad", "rmsprop", "adam")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Model(nn.Module):
    def __init__(self, width=12, vocabulary=11):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.hidden = nn.Linear(width, 2 * width)
        self.mix = nn.Linear(2 * width, width, bias=False)
        self.conv = nn.Conv1d(width, width, 3)
        self.lm_head = nn.Linear(width, vocabulary)

    def forward(self, tokens):
        x = self.embed(tokens)
        x = x + self.mix(torch.tanh(self.hidden(x)))
        x = self.conv(x.mT).mT
        return self.lm_head(x)


def backward(model, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 11, (4, 8), generator=generator)
    model.zero_grad()
    nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens[:, 1:-1].flatten()).backward()


# --- the rule ---------------------------------------------------------------------------------------------------------


def follow(shape, steps=20, due=None, *, seed=0, **options):
    """(ours, the reference's, the start) after some steps in float64 with an absolute ridge, as papers have."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(shape, generator=generator, dtype=F64)
    p, q, state = start.clone().requires_grad_(), start.clone(), {}
    optimizer = steepest.optim.Shampoo(
        [{"params": [p], "algorithm": "shampoo"}], lr=0.01, ridge=1e-4, absolute_ridge=True, merge_dims=False, **options
    )
    optimizer_only = ("precondition_frequency", "large_dim", "large_dim_fallback", "packed_statistics")
    options = {key: value for key, value in options.items() if key not in optimizer_only}
    if due is not None:
        options["due"] = due
    for _ in range(steps):
        g = torch.randn(shape, generator=generator, dtype=F64)
        p.grad = g.clone()
        optimizer.step()
        assert torch.equal(p.grad, g)
        shampoo_(q, g, state, lr=0.01, ridge=1e-4, **options)
    return p.detach(), q, start


def assert_same_path(ours, reference, start):
    """20 steps of roots of condition 1e4 at most, in float64: 1e4 * 1e-16 per step, and room for 100 of these."""
    assert (ours - reference).norm() <= 1e-10 * (reference - start).norm()
    assert (reference - start).norm() > 0.01


@pytest.mark.parametrize("grafting", GRAFTINGS)
@pytest.mark.parametrize("shape, block_size", [((6, 9), 1024), ((6, 9), 4), ((7,), 3), ((3, 4, 5), 8), ((3, 4, 5), 3)])
def test_twenty_steps_are_the_published_rule(shape, block_size, grafting):
    assert_same_path(*follow(shape, block_size=block_size, grafting=grafting, precondition_frequency=1))


@pytest.mark.parametrize("betas", [(0.0, 0.9), (0.9, 1.0), (0.5, 0.99)])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}])
def test_averages_sums_momentum_and_decay(betas, options):
    assert_same_path(*follow((5, 8), betas=betas, precondition_frequency=1, **options))


@pytest.mark.parametrize("exponent", [1, 2, 3])
def test_exponent_override(exponent):
    assert_same_path(*follow((5, 8), exponent=exponent, precondition_frequency=1))


@pytest.mark.parametrize("grafting", ["none", "adam"])
def test_roots_refreshed_in_turn(grafting):
    """6 blocks of 3 x 3 over 3 slots; without grafting all get a root in the first step."""

    def due(step, block):
        return (step - 1) % 3 == block % 3 or (grafting == "none" and step == 1)

    options = {"block_size": 3, "precondition_frequency": 3, "grafting": grafting}
    assert_same_path(*follow((6, 9), due=due, **options))


@pytest.mark.parametrize("grafting", ["none", "adam"])
@pytest.mark.parametrize("shape, block_size", [((6, 9), 1024), ((9, 6), 1024), ((6, 9), 4), ((5, 5), 8)])
def test_without_a_memory_one_root_of_the_shorter_side_gives_the_published_step(
    monkeypatch, shape, block_size, grafting
):
    from steepest.optim import shampoo_step

    calls, real = [], shampoo_step.inverse_root
    monkeypatch.setattr(
        shampoo_step, "inverse_root", lambda a, p, **options: calls.append((p, a.shape[-1])) or real(a, p, **options)
    )
    options = {"block_size": block_size, "grafting": grafting, "betas": (0.0, 0.0)}
    assert_same_path(*follow(shape, precondition_frequency=1, **options))
    assert {p for p, _ in calls} == {2} and max(n for _, n in calls) <= min(shape)
    calls.clear()
    assert_same_path(*follow(shape, precondition_frequency=1, exponent=4, **options))
    assert {p for p, _ in calls} == {4}


def test_without_a_memory_and_with_a_small_ridge_the_step_is_the_polar_factor():
    g = torch.randn(12, 20)
    p = torch.zeros(12, 20, requires_grad=True)
    p.grad = g
    steepest.optim.Shampoo([p], lr=1.0, betas=(0.0, 0.0), precondition_frequency=1, grafting="none").step()
    exact = steepest.reference.polar_svd(g.double())
    # The root's tol and rounding, and the ridge: 1e-6 / 2 of lambda over the smallest s^2.
    small = torch.linalg.svdvals(g.double())
    assert (p.detach() + exact).norm() <= (1e-3 + 1e-6 * (small.max() / small.min()) ** 2) * exact.norm()


@pytest.mark.parametrize("grafting", ["none", "adam"])
@pytest.mark.parametrize("shape, block_size", [((6, 9), 1024), ((6, 9), 4), ((7,), 3), ((3, 4, 5), 8)])
def test_the_kl_statistic_is_its_rule(shape, block_size, grafting):
    options = {"block_size": block_size, "grafting": grafting, "statistic": "kl"}
    assert_same_path(*follow(shape, precondition_frequency=1, **options))


def test_the_kl_statistic_with_roots_refreshed_in_turn():
    """6 blocks of 3 x 3 over 3 slots: blocks without a root are whitened by their size alone."""

    def due(step, block):
        return (step - 1) % 3 == block % 3

    options = {"block_size": 3, "precondition_frequency": 3, "statistic": "kl", "betas": (0.9, 0.9)}
    assert_same_path(*follow((6, 9), due=due, **options))


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_the_kl_statistics_find_a_covariance_that_is_a_kronecker_product(size):
    """G = A^(1/2) N B^(1/2), N normal: S_1 x S_2 comes to A x B, whose size and shape both are right.

    An average over some 1 / (1 - b2) = 200 gradients of 20 elements deviates by (200 x 4)^(-1/2) in each of its 5 or 4
    rows: by 5 % or so.
    """
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.diag(torch.logspace(0, -1, n, dtype=F64)) for n in (5, 4))
    p = torch.zeros(5, 4, dtype=F64, requires_grad=True)
    optimizer = steepest.optim.Shampoo(
        [p], lr=0.0, betas=(0.0, 0.995), ridge=1e-9, precondition_frequency=5, statistic="kl"
    )
    for _ in range(1500):
        p.grad = size * a.sqrt() @ torch.randn(5, 4, generator=generator, dtype=F64) @ b.sqrt()
        optimizer.step()
    left, right = (optimizer.state[p][f"statistic.{i}.0"] for i in (0, 1))
    exact = size**2 * torch.kron(a, b)
    assert (torch.kron(left, right) - exact).norm() <= 0.15 * exact.norm()
    assert 0.2 < left.trace() / (a.trace() / b.trace() * right.trace()) < 5  # the scale of G is shared


@pytest.mark.parametrize("options", [{}, {"statistic": "kl"}, {"betas": (0.9, 1.0), "grafting": "none"}])
@pytest.mark.parametrize("shape, block_size", [((6, 9), 1024), ((6, 9), 4), ((3, 4, 5), 8)])
def test_packed_statistics_are_the_published_rule_in_half_the_memory(shape, block_size, options):
    options = {"block_size": block_size, "precondition_frequency": 1, **options}
    assert_same_path(*follow(shape, packed_statistics=True, **options))
    p = torch.zeros(shape, requires_grad=True)
    states = []
    for packed in (False, True):
        p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        optimizer = steepest.optim.Shampoo(
            [{"params": [p], "algorithm": "shampoo"}], merge_dims=False, packed_statistics=packed, **options
        )
        optimizer.step()
        states.append({k: v for k, v in optimizer.state[p].items() if k.startswith("statistic")})
    for key, full in states[0].items():
        n = len(full)
        rows, columns = torch.tril_indices(n, n)
        assert torch.equal(states[1][key], full[rows, columns]) and states[1][key].numel() == n * (n + 1) // 2


def test_packed_statistics_are_saved_loaded_and_monitored():
    p = torch.randn(8, 6, requires_grad=True)
    make = [lambda packed=packed: steepest.optim.Shampoo([p], packed_statistics=packed) for packed in (False, True)]
    full, packed = (m() for m in make)
    for optimizer in (full, packed):
        p.grad = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
        optimizer.step()
    found = [steepest.dynamics.factor_dimensions(optimizer) for optimizer in (full, packed)]
    assert found[0].keys() == found[1].keys() and len(found[0]) == 2
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])
    again = make[1]()
    again.load_state_dict(packed.state_dict())
    assert torch.equal(again.state[p]["statistic.0.0"], packed.state[p]["statistic.0.0"])
    before = p.detach().clone()
    again.param_groups[0]["packed_statistics"] = False
    with pytest.raises(
        ValueError, match=r"state statistic\.0\.0 .* it was saved with another block_size or other options"
    ):
        again.step()
    assert torch.equal(p, before)


def test_a_checkpoint_from_before_an_option_takes_its_default():
    p = torch.randn(4, 4, requires_grad=True)
    saved = steepest.optim.Shampoo([p]).state_dict()
    for name in ("statistic", "packed_statistics"):
        del saved["param_groups"][0][name]
    optimizer = steepest.optim.Shampoo([p], statistic="kl")
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["statistic"] == "shampoo"
    p.grad = torch.randn(4, 4)
    optimizer.step()


def test_relative_ridge_in_float32():
    """With a ridge of 1e-3 of the bound that `inverse_root` reports, against the formula in float64."""
    g = torch.randn(10, 6)
    p = torch.zeros(10, 6, requires_grad=True)
    p.grad = g
    steepest.optim.Shampoo([p], lr=1.0, ridge=1e-3, precondition_frequency=1, grafting="none").step()
    roots = []
    for a in (g @ g.mT, g.mT @ g):
        scale = steepest.inverse_root(a, ridge=1e-3, return_status=True)[1].scale
        roots.append(steepest.reference.inverse_root(a.double(), ridge=1e-3, scale=scale))
    exact = -roots[0] @ g.double() @ roots[1]
    # Both roots within tol, and roundings of condition 1e3.
    assert (p.detach() - exact).norm() <= (2 * 1e-3 + 1e3 * 2**-20) * exact.norm()


def test_one_sided_and_diagonal_large_dimensions():
    """A side of 9 over large_dim 6: left (G G^T)^(-1/2) G, or with the diagonal of G^T G to the power -1/4."""
    g = torch.randn(4, 9, dtype=F64)
    for fallback in ("one-sided", "diagonal"):
        p = torch.zeros(4, 9, dtype=F64, requires_grad=True)
        p.grad = g.clone()
        options = {"ridge": 1e-6, "absolute_ridge": True, "grafting": "none", "precondition_frequency": 1}
        steepest.optim.Shampoo([p], lr=1.0, large_dim=6, large_dim_fallback=fallback, **options).step()
        left = steepest.reference.inverse_root(g @ g.mT, 2 if fallback == "one-sided" else 4, ridge=1e-6, absolute=True)
        exact = left @ g
        if fallback == "diagonal":
            exact = exact * (g.square().sum(0) + 1e-6) ** -0.25
        assert (p.detach() + exact).norm() <= 1e-9 * exact.norm()


# --- blocks -----------------------------------------------------------------------------------------------------------


def test_merged_shapes():
    assert merged_shape((64, 32, 3, 3), 64) == (64, 32, 9)
    assert merged_shape((64, 32, 3, 3), 288) == (64, 288)
    assert merged_shape((64, 32, 3, 3), 64, merge=False) == (64, 32, 3, 3)
    assert merged_shape((1, 7, 1), 4) == (7,)
    assert merged_shape((5, 7), 1000) == (5, 7)
    assert merged_shape((1, 1), 4) == (1,)


@pytest.mark.parametrize("shape, size", [((7,), 3), ((6, 9), 4), ((3, 4, 5), 2), ((8, 8), 8)])
def test_blocks_cover_every_element_once(shape, size):
    covered = torch.zeros(shape)
    for where in block_slices(shape, size, large_dim=10**6):
        covered[where] += 1
        assert all(s.stop - s.start <= size for s in where)
    assert (covered == 1).all()


def test_every_slot_gets_the_same_work():
    group = {"block_size": 16, "large_dim": 10**6, "large_dim_fallback": "none", "precondition_frequency": 5}
    params = [torch.zeros(64, 48), torch.zeros(40, 16), torch.zeros(20, 30)]
    buckets = make_buckets(params, {**group, "merge_dims": True})
    load = [0] * 5
    for bucket in buckets:
        for block in bucket.blocks:
            load[block.slot] += bucket.cost
    assert max(load) - min(load) <= max(bucket.cost for bucket in buckets)
    spread(buckets, 1)
    assert {block.slot for bucket in buckets for block in bucket.blocks} == {0}


def test_trace_of_refreshed_blocks_is_flat(monkeypatch):
    """12 equal blocks, frequency 4: three blocks in every step, from the first on."""
    found = []
    original = Bucket.due

    def due(self, *arguments):
        result = original(self, *arguments)
        found.append(len(result))
        return result

    monkeypatch.setattr(Bucket, "due", due)
    p = torch.randn(24, 32, requires_grad=True)
    optimizer = steepest.optim.Shampoo([p], block_size=8, precondition_frequency=4)
    for _ in range(9):
        p.grad = torch.randn(24, 32)
        optimizer.step()
    assert found == [3] * 9
    assert {optimizer.state[p][f"refreshed.{b}"].item() for b in range(12)} == {6, 7, 8, 9}


def test_channels_last_weights_are_stepped_like_contiguous_ones():
    w = torch.randn(6, 5, 3, 3)
    p, q = w.clone().requires_grad_(), w.clone().to(memory_format=torch.channels_last).requires_grad_()
    for x in (p, q):
        optimizer = steepest.optim.Shampoo([x], lr=0.1, block_size=64, precondition_frequency=1)
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            x.grad = torch.randn(w.shape, generator=generator)
            optimizer.step()
    assert torch.equal(p, q) and not torch.equal(p, w)


# --- safety -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
def test_a_block_with_a_bad_gradient_is_skipped_and_the_others_are_untouched(value):
    """Two parameters of two blocks each; one element of one block is bad in the second step."""
    starts = [torch.randn(16, 8), torch.randn(16, 8)]
    runs = []
    for bad in (False, True):
        params = [w.clone().requires_grad_() for w in starts]
        optimizer = steepest.optim.Shampoo(params, lr=0.1, block_size=8, precondition_frequency=1, momentum=0.5)
        generator = torch.Generator().manual_seed(1)
        for step in range(4):
            for p in params:
                p.grad = torch.randn(16, 8, generator=generator)
            before = params[0].detach().clone()
            state = optimizer.state[params[0]]
            kept = {key: state[key].clone() for key in state if key.endswith(".0") and not key.startswith("root")}
            if bad and step == 1:
                params[0].grad[3, 2] = value
            optimizer.step()
            if bad and step == 1:
                assert torch.equal(params[0][:8], before[:8])
                kept.pop("refreshed.0")
                assert len(kept) == 5 and all(torch.equal(state[key], old) for key, old in kept.items())
        runs.append([p.detach() for p in params])
    clean, hit = runs
    assert torch.equal(clean[1], hit[1]) and torch.equal(clean[0][8:], hit[0][8:])
    assert hit[0].isfinite().all() and not torch.equal(clean[0][:8], hit[0][:8])


def test_a_statistic_without_a_root_keeps_the_previous_one():
    p = torch.randn(8, 8, requires_grad=True)
    optimizer = steepest.optim.Shampoo([p], lr=0.1, precondition_frequency=1)
    for step in range(3):
        p.grad = torch.randn(8, 8)
        if step == 2:
            optimizer.state[p]["statistic.0.0"].fill_(torch.nan)
            kept = {i: optimizer.state[p][f"root.{i}.0"].clone() for i in (0, 1)}
        optimizer.step()
    assert torch.equal(optimizer.state[p]["root.0.0"], kept[0])
    assert not torch.equal(optimizer.state[p]["root.1.0"], kept[1])
    assert optimizer.state[p]["refreshed.0"] == 2
    assert p.isfinite().all()


def test_the_ridge_is_not_written_into_statistics():
    p = torch.zeros(4, 4, requires_grad=True)
    p.grad = torch.randn(4, 4)
    optimizer = steepest.optim.Shampoo([p], betas=(0.9, 1.0), ridge=0.1, precondition_frequency=1)
    g = p.grad.clone()
    for _ in range(3):
        optimizer.step()
    torch.testing.assert_close(optimizer.state[p]["statistic.0.0"], 3 * g @ g.mT)


def test_zero_gradients_and_parameters_without_one():
    p, q = torch.randn(6, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    before = p.detach().clone(), q.detach().clone()
    optimizer = steepest.optim.Shampoo([p, q], lr=0.1, weight_decay=0.5, precondition_frequency=2)
    for _ in range(3):
        p.grad = torch.zeros(6, 4)
        optimizer.step()
    torch.testing.assert_close(p.detach(), before[0] * 0.95**3)
    assert torch.equal(q, before[1])
    assert (optimizer.state[p]["step"], optimizer.state[q]["step"]) == (3, 0)
    assert optimizer.state[q]["refreshed.0"] == 0 and torch.equal(optimizer.state[q]["root.0.0"], torch.eye(6))
    q.grad = torch.randn(6, 4)
    optimizer.step()
    assert optimizer.state[q]["step"] == 1 and not torch.equal(q, before[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_parameters_have_float32_states(dtype):
    p = torch.randn(8, 8).to(dtype).requires_grad_()
    optimizer = steepest.optim.Shampoo([p], lr=0.01, precondition_frequency=1)
    p.grad = torch.randn(8, 8).to(dtype)
    optimizer.step()
    assert optimizer.state[p]["statistic.0.0"].dtype is torch.float32
    again = steepest.optim.Shampoo([p], lr=0.01)
    again.load_state_dict(optimizer.state_dict())
    assert torch.equal(again.state[p]["statistic.0.0"], optimizer.state[p]["statistic.0.0"])


# --- the optimizer ----------------------------------------------------------------------------------------------------


def test_split_sends_matrices_and_kernels_to_shampoo_and_the_rest_to_adamw():
    optimizer = steepest.optim.Shampoo(Model().named_parameters())
    assert {a.name for a in optimizer.split if a.algorithm == "shampoo"} == {
        "hidden.weight",
        "mix.weight",
        "conv.weight",
    }
    reasons = {a.name: a.reason for a in optimizer.split}
    assert reasons["embed.weight"] == "embedding, by its name" and reasons["conv.weight"] == "3-D"
    assert len(optimizer.split) == sum(1 for _ in Model().parameters())


def test_adamw_part_equals_adamw():
    model = Model()
    other = copy.deepcopy(model)
    shampoo = steepest.optim.Shampoo(model.named_parameters(), lr=0.02, adamw=dict(lr=3e-3, weight_decay=0.05))
    names = {a.name for a in shampoo.split if a.algorithm == "adamw"}
    adamw = steepest.optim.AdamW([p for n, p in other.named_parameters() if n in names], lr=3e-3, weight_decay=0.05)
    for step in range(3):
        backward(model, step)
        for p, q in zip(model.parameters(), other.parameters()):
            q.grad = None if p.grad is None else p.grad.clone()
        shampoo.step()
        adamw.step()
    for (name, p), q in zip(model.named_parameters(), other.named_parameters()):
        assert torch.equal(p, q[1]) == (name in names)


def test_checkpoint_resumes_exactly_and_loads_weights_only():
    whole = Model()
    cut = copy.deepcopy(whole)
    options = dict(lr=0.02, block_size=8, precondition_frequency=3, momentum=0.9)
    a = steepest.optim.Shampoo(whole.named_parameters(), **options)
    for step in range(8):
        backward(whole, step)
        a.step()
    b = steepest.optim.Shampoo(cut.named_parameters(), **options)
    for step in range(8):
        if step == 4:
            file = io.BytesIO()
            torch.save(b.state_dict(), file)
            file.seek(0)
            b = steepest.optim.Shampoo(cut.named_parameters(), **{**options, "lr": 0.5})
            b.load_state_dict(torch.load(file, weights_only=True))
        backward(cut, step)
        b.step()
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), cut.parameters()))


def test_loading_a_checkpoint_of_another_block_size_is_refused():
    p = torch.randn(8, 8, requires_grad=True)
    p.grad = torch.randn(8, 8)
    first, second = (steepest.optim.Shampoo([p], block_size=size) for size in (8, 4))
    first.step()
    second.load_state_dict(first.state_dict())
    second.param_groups[0]["block_size"] = 4
    before = p.detach().clone()
    with pytest.raises(ValueError, match="it was saved with another block_size"):
        second.step()
    assert torch.equal(p, before)


def test_saved_states_have_memory_of_their_own():
    """In the optimizer they are views of stacks, which would be saved whole."""
    p = torch.randn(8, 8, requires_grad=True)
    p.grad = torch.randn(8, 8)
    optimizer = steepest.optim.Shampoo([p], block_size=4)
    optimizer.step()
    saved = optimizer.state_dict()["state"][0]
    assert saved["statistic.0.0"].untyped_storage().nbytes() == 4 * 16
    for name in ("statistic.0.0", "root.1.0", "refreshed.0", "exp_avg.0", "graft_sq.0", "step"):
        assert name in saved


def test_learning_rate_schedules_and_closures():
    p = torch.randn(4, 4, requires_grad=True)
    optimizer = steepest.optim.Shampoo([p], lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    before = p.detach().clone()
    assert optimizer.step(closure) == before.square().sum()
    scheduler.step()
    assert torch.equal(p, before)


def test_it_minimises_an_ill_conditioned_quadratic_faster_than_gradient_descent():
    """Curvatures over four decades on either side: grafted SGD of the same length in the same number of steps."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.diag(torch.logspace(0, -2, 16)) for _ in range(2))
    start = torch.randn(16, 16, generator=generator)
    losses = {}
    for name in ("shampoo", "sgd"):
        p = start.clone().requires_grad_()
        if name == "shampoo":
            optimizer = steepest.optim.Shampoo([p], lr=0.5, betas=(0.0, 0.99), precondition_frequency=1, grafting="sgd")
        else:
            optimizer = torch.optim.SGD([p], lr=0.5)
        for _ in range(60):
            optimizer.zero_grad()
            loss = 0.5 * (a @ p @ b).square().sum()
            loss.backward()
            optimizer.step()
        losses[name] = loss.item()
    assert losses["shampoo"] < 0.5 * losses["sgd"]


@pytest.mark.parametrize(
    "options, words",
    [
        ({"lr": -1}, "lr is -1"),
        ({"betas": (1.0, 0.9)}, r"betas\[0\] is 1.0"),
        ({"betas": (0.9, 1.1)}, r"betas\[1\] is 1.1"),
        ({"ridge": -1.0}, "ridge is -1.0"),
        ({"block_size": 0}, "block_size is 0, expected a positive integer"),
        ({"precondition_frequency": 1.5}, "precondition_frequency is 1.5"),
        ({"grafting": "lion"}, "grafting is 'lion', expected one of none, sgd"),
        ({"large_dim_fallback": "both"}, "large_dim_fallback is 'both'"),
        ({"statistic": "adagrad"}, "statistic is 'adagrad', expected one of shampoo, kl"),
        ({"statistic": "kl", "betas": (0.9, 1.0)}, r"expected betas\[1\] below 1"),
        ({"packed_statistics": 1}, "packed_statistics is 1, expected True or False"),
        ({"exponent": 5}, "exponent is 5"),
        ({"nesterov": True}, "nesterov=True needs momentum"),
        ({"adamw": {"learning_rate": 1}}, r"unknown options \['learning_rate'\]"),
    ],
)
def test_wrong_options_are_refused_at_construction(options, words):
    with pytest.raises(ValueError, match=words):
        steepest.optim.Shampoo(Model().named_parameters(), **options)


def test_wrong_parameters_and_gradients_are_refused():
    with pytest.raises(ValueError, match="empty parameter list"):
        steepest.optim.Shampoo([])
    with pytest.raises(ValueError, match="algorithm is 'sgd'"):
        steepest.optim.Shampoo([{"params": [torch.zeros(3, 3, requires_grad=True)], "algorithm": "sgd"}])
    five = torch.zeros(3, 3, 3, 3, 3, requires_grad=True)
    with pytest.raises(ValueError, match="has 5 sides after merging"):
        steepest.optim.Shampoo([five], block_size=2)
    table = nn.Embedding(10, 4, sparse=True)
    w = torch.randn(4, 4, requires_grad=True)
    optimizer = steepest.optim.Shampoo([w, table.weight])
    (table(torch.tensor([1, 2])) @ w).sum().backward()
    before = w.detach().clone()
    with pytest.raises(ValueError, match=r"params\[1\]: gradient is torch.sparse_coo"):
        optimizer.step()
    assert torch.equal(w, before) and not optimizer.state[w]
