"""steepest.optim.Muon: the rule, the split between Muon and AdamW, checkpoints, refusals."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import steepest
from steepest.optim.split import assign


class Block(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.multi_head_out = nn.Linear(width, width, bias=False)


class Model(nn.Module):
    def __init__(self, width=16, vocabulary=11):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.pos_emb = nn.Parameter(torch.randn(5, width))
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.conv = nn.Conv2d(1, 2, 3)
        self.lm_head = nn.Linear(width, vocabulary)

    def forward(self, tokens):
        x = self.embed(tokens) + self.pos_emb
        for block in self.blocks:
            q, k, v = block.qkv(block.norm(x)).chunk(3, -1)
            x = x + block.multi_head_out(torch.tanh(q) * k + v)
        return self.lm_head(x)


def backward(model, seed):
    torch.manual_seed(seed)
    tokens = torch.randint(0, 11, (4, 5))
    model.zero_grad()
    nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()


def test_named_split_sends_hidden_matrices_to_muon_and_the_rest_to_adamw():
    optimizer = steepest.optim.Muon(Model().named_parameters())
    muon = {a.name for a in optimizer.split if a.algorithm == "muon"}
    assert muon == {f"blocks.{i}.{layer}.weight" for i in (0, 1) for layer in ("qkv", "multi_head_out")}
    reasons = {a.name: a.reason for a in optimizer.split}
    assert reasons["embed.weight"] == reasons["pos_emb"] == "embedding, by its name"
    assert reasons["lm_head.weight"] == "output head, by its name"
    assert reasons["blocks.0.norm.weight"] == "1-D, not a matrix"
    assert reasons["conv.weight"] == "4-D, not a matrix"
    assert len(optimizer.split) == sum(1 for _ in Model().parameters())


@pytest.mark.parametrize(
    "name, algorithm",
    [
        ("transformer.wte.weight", "adamw"), ("module.model.tok_embeddings.weight", "adamw"),
        ("model.embed_tokens.weight", "adamw"), ("head.weight", "adamw"), ("output.weight", "adamw"),
        ("encoder.layer.0.attention.output.dense.weight", "muon"), ("h.0.attn.c_attn.weight", "muon"),
        ("layers.3.multi_head_attn.in_proj_weight", "muon"), ("_orig_mod.model.layers.0.mlp.gate_proj.weight", "muon"),
    ],
)  # fmt: skip
def test_names_of_known_models(name, algorithm):
    assert assign(name, torch.zeros(4, 6)).algorithm == algorithm


def test_without_names_every_matrix_gets_muon():
    optimizer = steepest.optim.Muon(Model().parameters())
    assert {a.algorithm for a in optimizer.split if len(a.shape) == 2} == {"muon"}
    assert {a.algorithm for a in optimizer.split if len(a.shape) != 2} == {"adamw"}


def transcription(w, grads, lr, momentum, nesterov, weight_decay, scale):
    """The rule as the docstring states it, in float64, with the reference polar factor."""
    w, b = w.double(), torch.zeros_like(w, dtype=torch.float64)
    for g in grads:
        g = g.double()
        b = b + (1 - momentum) * (g - b)
        u = g + momentum * (b - g) if nesterov else b
        w = w * (1 - lr * weight_decay) - lr * scale * steepest.reference.polar(u)
    return w


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("scale, factor", [("keller", 2.0), ("match-adamw-rms", 0.2 * 48**0.5), ("spectral", 2.0),
                                           ("none", 1.0), (lambda rows, columns: rows / columns, 4.0)])  # fmt: skip
def test_trajectory_equals_a_float64_transcription(nesterov, scale, factor):
    w = torch.randn(48, 12)
    grads = [torch.randn(48, 12) for _ in range(10)]
    expected = transcription(w, grads, 0.02, 0.95, nesterov, 0.1, factor)
    p = w.clone().requires_grad_()
    optimizer = steepest.optim.Muon([p], lr=0.02, momentum=0.95, nesterov=nesterov, weight_decay=0.1, scale=scale)
    kept = [g.clone() for g in grads]
    for g in grads:
        p.grad = g
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(grads, kept))
    # Each step adds lr * scale times a polar factor that is right to 1e-5 of its norm, sqrt(12), and rounds the
    # parameter three times.
    bound = 10 * 0.02 * factor * 1e-5 * 12**0.5 + 30 * 2**-24 * w.norm().item()
    assert (p.detach().double() - expected).norm() <= bound


def test_keller_coefficients_follow_torch_muon_in_float64():
    w = torch.randn(24, 16, dtype=torch.float64)
    p, q = w.clone().requires_grad_(), w.clone().float().requires_grad_()
    options = dict(lr=0.02, momentum=0.95, nesterov=True, weight_decay=0.1)
    ours = steepest.optim.Muon([q], schedule="keller", steps=5, **options)
    theirs = torch.optim.Muon([p], **options)
    for _ in range(5):
        p.grad = torch.randn(24, 16, dtype=torch.float64)
        q.grad = p.grad.float()
        ours.step()
        theirs.step()
    # torch computes the polynomial in bfloat16 whatever the parameter's dtype: unit 2^-8 per product, five steps, on
    # an update of norm at most 1.2 sqrt(16) (Keller's largest singular value times the root of the rank).
    update = 5 * 0.02 * (24 / 16) ** 0.5 * 1.2 * 4
    assert (p.detach() - q.detach().double()).norm() <= 0.1 * update
    assert (p.detach() - w).norm() > 0.5 * update / 1.2 * 0.68


def test_adamw_part_equals_adamw():
    model = Model()
    other = copy.deepcopy(model)
    muon = steepest.optim.Muon(model.named_parameters(), lr=0.02, adamw=dict(lr=3e-3, weight_decay=0.05))
    names = {a.name for a in muon.split if a.algorithm == "adamw"}
    adamw = steepest.optim.AdamW([p for n, p in other.named_parameters() if n in names], lr=3e-3, weight_decay=0.05)
    for step in range(3):
        backward(model, step)
        for p, q in zip(model.parameters(), other.parameters()):
            q.grad = None if p.grad is None else p.grad.clone()
        muon.step()
        adamw.step()
    for (name, p), q in zip(model.named_parameters(), other.parameters()):
        assert torch.equal(p, q) == (name in names or p.grad is None)


def test_batching_same_shapes_changes_nothing_beyond_rounding():
    w = [torch.randn(12, 20) for _ in range(5)]
    grads = [torch.randn(12, 20) for _ in w]
    together = [t.clone().requires_grad_() for t in w]
    alone = [t.clone().requires_grad_() for t in w]
    for p, q, g in zip(together, alone, grads):
        p.grad = q.grad = g
        steepest.optim.Muon([q], lr=0.1).step()
    steepest.optim.Muon(together, lr=0.1).step()
    for p, q in zip(together, alone):
        # Two float32 evaluations of one polynomial, each right to 1e-5 of sqrt(12).
        assert (p - q).norm() <= 0.1 * 2e-5 * 12**0.5


def test_checkpoint_resumes_exactly_and_loads_weights_only():
    whole = Model()
    cut = copy.deepcopy(whole)
    a = steepest.optim.Muon(whole.named_parameters(), lr=0.02)
    for step in range(4):
        backward(whole, step)
        a.step()
    b = steepest.optim.Muon(cut.named_parameters(), lr=0.02)
    for step in range(4):
        if step == 2:
            file = io.BytesIO()
            torch.save(b.state_dict(), file)
            file.seek(0)
            b = steepest.optim.Muon(cut.named_parameters(), lr=0.5)
            b.load_state_dict(torch.load(file, weights_only=True))
        backward(cut, step)
        b.step()
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), cut.parameters()))


def test_lr_scheduler_scales_both_kinds_of_group():
    model = Model()
    optimizer = steepest.optim.Muon(model.named_parameters(), lr=0.02, adamw=dict(lr=1e-3))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    backward(model, 0)
    optimizer.step()
    scheduler.step()
    assert sorted(group["lr"] for group in optimizer.param_groups) == [5e-4, 0.01]


def test_groups_may_state_their_algorithm_and_options():
    a, b, c = (torch.randn(6, 6, requires_grad=True) for _ in range(3))
    optimizer = steepest.optim.Muon(
        [{"params": [a], "lr": 0.3}, {"params": [b], "algorithm": "adamw", "lr": 0.2, "eps": 1e-6}], momentum=0.5
    )
    optimizer.add_param_group({"params": [c], "momentum": 0.1})
    found = [(g["algorithm"], g["lr"], g.get("momentum"), g.get("eps")) for g in optimizer.param_groups]
    assert found == [("muon", 0.3, 0.5, None), ("adamw", 0.2, None, 1e-6), ("muon", 1e-3, 0.1, None)]


@pytest.mark.parametrize(
    "options, words",
    [
        ({"lr": -1}, "lr is -1"),
        ({"momentum": 1.0}, "momentum is 1.0"),
        ({"weight_decay": -1}, "weight_decay is -1"),
        ({"scale": "big"}, "scale is 'big'"),
        ({"schedule": "unknown"}, "unknown"),
        ({"schedule": "cans", "steps": 9}, "9"),
        ({"adamw": {"learning_rate": 1}}, "unknown options ['learning_rate']"),
        ({"adamw": {"lr": -1}}, "lr is -1"),
    ],
)
def test_wrong_options_are_refused_at_construction(options, words):
    with pytest.raises(ValueError) as caught:
        steepest.optim.Muon(Model().named_parameters(), **options)
    assert words in str(caught.value)


def test_wrong_parameters_are_refused():
    with pytest.raises(ValueError, match="is not a matrix"):
        steepest.optim.Muon([{"params": [torch.zeros(3, requires_grad=True)], "algorithm": "muon"}])
    with pytest.raises(ValueError, match="empty parameter list"):
        steepest.optim.Muon([])
    with pytest.raises(ValueError, match="algorithm is 'sgd'"):
        steepest.optim.Muon([{"params": [torch.zeros(3, 3, requires_grad=True)], "algorithm": "sgd"}])


def test_an_error_in_one_gradient_leaves_everything_unchanged():
    table = nn.Embedding(10, 4, sparse=True)
    w = torch.randn(4, 4, requires_grad=True)
    optimizer = steepest.optim.Muon([w, table.weight])
    (table(torch.tensor([1, 2])) @ w).sum().backward()
    before = w.detach().clone()
    with pytest.raises(ValueError, match=r"params\[1\]: gradient is torch.sparse_coo"):
        optimizer.step()
    assert torch.equal(w, before) and not optimizer.state[w]


def test_a_grad_scaler_unscales_and_skips():
    plain, scaled = ([torch.randn(8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_(),
                      torch.ones(8).requires_grad_()] for _ in range(2))  # fmt: skip
    optimizers = [steepest.optim.Muon([("weight", w), ("bias", b)], lr=0.02) for w, b in (plain, scaled)]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    for step in range(3):
        for (w, b), optimizer in zip((plain, scaled), optimizers):
            optimizer.zero_grad()
            loss = (x @ w + b).square().mean()
            (loss if optimizer is optimizers[0] else scaler.scale(loss)).backward()
        if step == 1:
            scaled[0].grad[0, 0] = float("inf")
            plain[0].grad = plain[1].grad = None
        optimizers[0].step()
        scaler.step(optimizers[1])
        scaler.update()
        for a, b in zip(plain, scaled):
            # Powers of two: scaling and unscaling change no bit.
            assert torch.equal(a, b)
