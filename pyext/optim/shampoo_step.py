"""One step of Shampoo for a param group: batched operations on stacks of blocks, nothing read back from the device."""

from __future__ import annotations

import torch
from torch import Tensor

from steepest.matrix.native import NativeVerbs, native_wins
from steepest.matrix.roots import inverse_root
from steepest.matrix.verbs import TorchVerbs, full_float32
from steepest.optim import shampoo_fused
from steepest.optim.shampoo_blocks import DIAGONAL, FULL, Bucket, make_buckets, order_of

STRUCTURE = ("block_size", "precondition_frequency", "large_dim", "large_dim_fallback", "merge_dims")
STRUCTURE += ("packed_statistics",)
# Gradients above these are taken as not finite: sums of their squares would overflow.
LARGEST = {torch.float32: 1e18, torch.float64: 1e150}


def state_names(group: dict) -> tuple[str, ...]:
    """Stacks of the blocks' own shape that these options need."""
    needed = {
        "exp_avg": group["betas"][0] > 0,
        "graft_sq": group["grafting"] in ("adagrad", "rmsprop", "adam"),
        "momentum_buffer": group["momentum"] > 0,
    }
    return tuple(name for name, yes in needed.items() if yes)


class ShampooStep:
    """Stacks of one group, the step counters of its parameters, and the update rule over them."""

    def __init__(self, params: list[Tensor], group: dict, state: dict, fallback: str):
        self.params = list(params)
        self.state = state
        self.key = self._key(group)
        # One tensor holds all counters; each state["step"] is a 0-dim view of it.
        self.steps = torch.tensor([float(state[p].get("step", 0)) for p in self.params])
        self.counts = self.steps.numpy()
        self.place = {p: i for i, p in enumerate(self.params)}
        self.buckets = self.make_buckets({**group, "large_dim_fallback": fallback})
        for bucket in self.buckets:
            dtype = torch.promote_types(bucket.blocks[0].param.dtype, torch.float32)
            bucket.allocate(state_names(group), dtype, group["packed_statistics"])
        self._adopt()
        self.entries = [state[p] for p in self.params]

    # What a step over ranks does otherwise (distributed/shampoo.py).
    def make_buckets(self, group: dict) -> list[Bucket]:
        return make_buckets([p for p in self.params if p.numel()], group)

    def has_grad(self, p: Tensor) -> bool:
        return p.grad is not None

    def decay(self, given: list[Tensor], factor: float) -> None:
        torch._foreach_mul_(given, factor)

    def _key(self, group: dict) -> tuple:
        dtypes = [(p.dtype, p.device, p.shape) for p in self.params]
        return (*(group[name] for name in STRUCTURE), state_names(group), *dtypes)

    def _adopt(self) -> None:
        """Copies states that exist already (a checkpoint's) into the stacks, and makes all states views of them."""
        for p, counter in zip(self.params, self.steps.unbind()):
            self.state[p]["step"] = counter
        for bucket in self.buckets:
            for name, stack in bucket.stacks.items():
                for block, row in zip(bucket.blocks, stack.unbind()):
                    entry, key = self.state[block.param], f"{name}.{block.number}"
                    if key in entry:
                        if entry[key].shape != row.shape:
                            found, expected = tuple(entry[key].shape), tuple(row.shape)
                            raise ValueError(
                                f"Shampoo: state {key} of a parameter of shape {tuple(block.param.shape)} is {found}, "
                                f"expected {expected}; it was saved with another block_size or other options"
                            )
                        row.copy_(entry[key])
                    entry[key] = row

    def fits(self, params: list[Tensor], group: dict, state: dict) -> bool:
        return (
            self.state is state
            and len(params) == len(self.params)
            and all(a is b for a, b in zip(params, self.params))
            and self.key == self._key(group)
            and all(state.get(p) is entry for p, entry in zip(params, self.entries))
        )

    def run(self, group: dict) -> None:
        given = [p for p in self.params if self.has_grad(p)]
        for p in given:
            self.counts[self.place[p]] += 1
        written = self._written(group)
        here = {id(block.param) for bucket in written for block in bucket.blocks}
        others = [p for p in given if id(p) not in here]
        if group["weight_decay"] and others:
            self.decay(others, 1 - float(group["lr"]) * group["weight_decay"])
        # Statistics and roots feed on each other for thousands of steps: no silent bfloat16 products.
        for bucket in self.buckets:
            with torch.autocast(bucket.blocks[0].param.device.type, enabled=False), full_float32():
                self._step_bucket(bucket, group, any(bucket is b for b in written))

    def _written(self, group: dict) -> list[Bucket]:
        """The buckets whose parameters kernels write and decay; a parameter's blocks are in these or in none."""
        if not all(p.is_contiguous() for p in self.params):
            return []
        return [b for b in self.buckets if shampoo_fused.writes(b) and not _is_one_gradient(b, group)]

    def _step_bucket(self, bucket: Bucket, group: dict, written: bool) -> None:
        with_grad = [self.has_grad(block.param) for block in bucket.blocks]
        if not any(with_grad):
            return
        counts = [int(self.counts[self.place[block.param]]) for block in bucket.blocks]
        g = bucket.gather()
        device, dtype = g.device, g.dtype
        ok = g.flatten(1).abs().amax(1) <= LARGEST[dtype]  # False for NaN
        if not all(with_grad):
            ok &= torch.tensor(with_grad, device=device)
        g = _chosen(ok, g, 0.0)
        step = torch.tensor(counts, dtype=torch.float64).clamp_(min=1)
        on = ok.to(dtype)
        _update_statistics(bucket, g, group["betas"][1], on, group["statistic"])
        m = _filtered(bucket, g, group["betas"][0], step, on)
        graft = _graft(bucket, g, m, group, step, on)
        if _is_one_gradient(bucket, group):
            direction = _as_long(*_polar(bucket, m, group), m, graft, group)
        else:
            self._refresh(bucket, group, counts, step, with_grad)
            if written:
                shampoo_fused.step(bucket, m, graft, group, on, with_grad)
                return
            direction = _preconditioned(bucket, m, graft, group)
        direction = _chosen(ok, direction, 0.0)
        if group["momentum"]:
            buffer = bucket.stacks["momentum_buffer"]
            kept = 1 + (group["momentum"] - 1) * on  # a block that is skipped keeps its buffer
            buffer.mul_(_per_block(kept, buffer)).add_(direction)
            moved = direction.add(buffer, alpha=group["momentum"]) if group["nesterov"] else buffer
            direction = _chosen(ok, moved, 0.0)
        bucket.scatter(direction, float(group["lr"]), with_grad)

    def _refresh(self, bucket: Bucket, group: dict, counts: list[int], step: Tensor, with_grad: list[bool]) -> None:
        """New roots for the blocks whose turn it is; one that fails keeps its previous root."""
        due = bucket.due(counts, group["precondition_frequency"], group["grafting"] == "none")
        due = [i for i in due if with_grad[i]]
        if not due or not bucket.sides:
            return
        stacks = bucket.stacks
        whole = len(due) == len(counts)
        index = slice(None) if whole else torch.tensor(due, device=stacks["refreshed"].device)
        p = group["exponent"] or (2 if group["statistic"] == "kl" else 2 * order_of(bucket.kinds))
        beta2 = group["betas"][1]
        seen = step + (group["statistic"] == "kl")  # gradients, and what KL-Shampoo starts from
        correction = (1 - beta2**seen if beta2 < 1 else torch.ones_like(step))[due]
        good = None
        for i in bucket.sides:
            statistic, root = bucket.statistic(i, index), stacks[f"root.{i}"]
            corrected = statistic / _per_block(correction.to(statistic), statistic)
            options = {"ridge": group["ridge"], "absolute": group["absolute_ridge"]}
            previous = root[index]
            if bucket.kinds[i] == FULL:
                found, status = inverse_root(
                    corrected, p, tol=group["tol"], previous=previous, return_status=True, **options
                )
                ok = status.ok
            else:
                found, ok = _diagonal_root(corrected, p, previous, **options)
            root[index] = found
            good = ok if good is None else good & ok
        now = step[due].to(stacks["refreshed"])
        stacks["refreshed"][index] = torch.where(good, now, stacks["refreshed"][index])


def _per_block(x: Tensor, like: Tensor) -> Tensor:
    """(blocks,) shaped to broadcast against (blocks, ...)."""
    return x.view(-1, *(1,) * (like.dim() - 1))


def _chosen(yes: Tensor, x: Tensor, other) -> Tensor:
    """x in the blocks where yes, else `other`; on a CPU, where looking costs nothing, x itself if that is all."""
    if not yes.is_cuda and bool(yes.all()):
        return x
    return torch.where(_per_block(yes, x), x, other)


def _update_statistics(bucket: Bucket, g: Tensor, beta2: float, on: Tensor, kind: str) -> None:
    """L <- b2 L + (1 - b2) G G^T along every side; blocks that are skipped have g = 0 and a weight of 0."""
    if kind == "shampoo" and not bucket.packed and shampoo_fused.takes(bucket, g):
        weight = on if beta2 == 1 else (1 - beta2) * on
        shampoo_fused.update_statistics(bucket, g, torch.ones_like(on) if beta2 == 1 else 1 - weight, weight)
        return
    verbs = _verbs(g)
    both = verbs.run(_both_grams, (g,)) if _is_matrix(bucket) and kind == "shampoo" else None
    if kind == "kl":
        _begin(bucket, g, 1 - beta2)
    for i in bucket.sides:
        if both is not None:
            new = both[i]
        else:
            seen = _whitened(bucket, g, i) if kind == "kl" else g
            unfolded = seen.movedim(1 + i, 1).reshape(len(g), g.shape[1 + i], -1)
            new = verbs.gram(unfolded) if bucket.kinds[i] == FULL else unfolded.square().sum(-1)
        new = bucket.stored(i, new)
        statistic = bucket.stacks[f"statistic.{i}"]
        if beta2 == 1:
            statistic.add_(new)
        else:
            statistic.lerp_(new, _per_block((1 - beta2) * on, new))


def _begin(bucket: Bucket, g: Tensor, weight: float) -> None:
    """Statistics that are still zero become weight r^(2/k) I: what one more gradient would have added that has the size
    of G and no direction.  Without it directions that no gradient had yet would be enlarged by ridge^(-1/2)."""
    if not g.is_cuda and bool((bucket.stacks["refreshed"] > 0).all()):
        return
    size = weight * _rms(g) ** (2 / len(bucket.sides))
    for i in bucket.sides:
        statistic = bucket.stacks[f"statistic.{i}"]
        start = size[:, None].expand(-1, g.shape[1 + i])
        start = start.diag_embed() if bucket.kinds[i] == FULL else start
        empty = statistic.flatten(1).abs().amax(1) == 0
        statistic.copy_(torch.where(_per_block(empty, statistic), bucket.stored(i, start), statistic))


def _rms(g: Tensor) -> Tensor:
    """Root mean square of each block."""
    return torch.linalg.vector_norm(g.flatten(1), dim=1) / max(g[0].numel(), 1) ** 0.5


def _whitened(bucket: Bucket, g: Tensor, i: int) -> Tensor:
    """G / sqrt(d), d the product of the other extents, multiplied by S_j^(-1/2) along every other side j.

    Those are the roots of the last refresh.  Until the first one S_j counts as r^(2/k) I, r the root mean square of G
    and k the number of sides, so that the scale of G is shared out evenly from the start.
    """
    others = [j for j in bucket.sides if j != i]
    rms = _rms(g)
    first = rms.where(rms > 0, 1) ** (-len(others) / len(bucket.sides))
    ready = bucket.stacks["refreshed"] > 0
    factor = torch.where(ready, 1.0, first) / (g[0].numel() / g.shape[1 + i]) ** 0.5
    g = g * _per_block(factor, g)
    for j in others:
        g = _multiplied(bucket, g, j)
    return g


def _multiplied(bucket: Bucket, x: Tensor, i: int) -> Tensor:
    """X multiplied along dimension i by the root of that side."""
    root, moved = bucket.stacks[f"root.{i}"], x.movedim(1 + i, 1)
    if bucket.kinds[i] == DIAGONAL:
        return x * root.view(len(x), *(root.shape[1] if k == i else 1 for k in range(x.dim() - 1)))
    if x.dim() == 3 and i == 1:
        return torch.bmm(x, root)  # the root is symmetric
    return _verbs(x).long_product(root, moved.reshape(*moved.shape[:2], -1)).view(moved.shape).movedim(1, 1 + i)


def _is_matrix(bucket: Bucket) -> bool:
    """Two full sides: what the verbs do to both of a block is one pass over it."""
    return bucket.kinds == (FULL, FULL) and 0 not in bucket.shape


def _both_grams(verbs, g):
    return verbs.gram(g), verbs.gram(g.mT)


def _both_sides(verbs, left, x, right):
    """L X R for symmetric L and R."""
    return verbs.long_product(left, verbs.long_product(right, x.mT).mT)


def _verbs(g: Tensor):
    if not g.is_cuda and native_wins(g.dtype):
        return NativeVerbs()
    if not g.is_cuda or g.dtype == torch.float64:
        return TorchVerbs()
    from steepest.matrix.triton_verbs import TritonVerbs

    return TritonVerbs("tf32x3")


def _filtered(bucket: Bucket, g: Tensor, beta1: float, step: Tensor, on: Tensor) -> Tensor:
    """M / (1 - b1^t)."""
    if not beta1:
        return g
    m = bucket.stacks["exp_avg"].lerp_(g, _per_block((1 - beta1) * on, g))
    return m / _per_block((1 - beta1**step).to(m), m)


def _graft(bucket: Bucket, g: Tensor, m: Tensor, group: dict, step: Tensor, on: Tensor) -> Tensor:
    """The step whose length, block by block, the preconditioned step gets."""
    kind, beta = group["grafting"], group["grafting_beta"]
    if kind in ("none", "sgd"):
        return m
    v = bucket.stacks["graft_sq"]
    if kind == "adagrad":
        v.addcmul_(g, g)
    else:
        v.lerp_(g.square(), _per_block((1 - beta) * on, g))
    if kind == "adam":
        v = v / _per_block((1 - beta**step).to(v), v)
    return m / (v.sqrt() + group["grafting_eps"])


def _preconditioned(bucket: Bucket, m: Tensor, graft: Tensor, group: dict) -> Tensor:
    """M multiplied by its roots, as long as the graft; the graft itself where there is no root yet."""
    direction, norm = m, None
    sides = bucket.sides
    if shampoo_fused.takes(bucket, m):
        direction, norm = shampoo_fused.precondition(bucket, m)
        sides = []
    elif _is_matrix(bucket):
        direction = _verbs(m).run(_both_sides, (bucket.stacks["root.0"], m, bucket.stacks["root.1"]))
        sides = []
    for i in sides:
        direction = _multiplied(bucket, direction, i)
    return _as_long(direction, bucket.stacks["refreshed"] > 0, m, graft, group, norm)


def _as_long(direction: Tensor, ready: Tensor, m: Tensor, graft: Tensor, group: dict, norm: Tensor | None = None):
    """The direction as long as the graft; the graft itself where it is not ready, since there is no root."""
    if group["grafting"] == "none":
        return direction
    tiny = torch.finfo(m.dtype).tiny
    ratio = torch.linalg.vector_norm(graft.flatten(1), dim=1)
    norm = torch.linalg.vector_norm(direction.flatten(1), dim=1) if norm is None else norm
    return _chosen(ready, direction * _per_block(ratio / norm.clamp(min=tiny), m), graft)


def _is_one_gradient(bucket: Bucket, group: dict) -> bool:
    """Whether the statistics are M M^T and M^T M in every step, and are taken up in every step."""
    plain = group["statistic"] == "shampoo" and group["exponent"] is None and group["precondition_frequency"] == 1
    return plain and tuple(group["betas"]) == (0.0, 0.0) and _is_matrix(bucket)


def _polar(bucket: Bucket, m: Tensor, group: dict) -> tuple[Tensor, Tensor]:
    """((M M^T + ridge lambda I)^(-1/2) M, where it is ok).

    That is what (M M^T)^(-1/4) M (M^T M)^(-1/4) with the ridge in both comes to, M's polar factor for ridge 0: one root
    of the shorter side instead of two.
    """
    i = int(m.shape[1] > m.shape[2])
    options = {"ridge": group["ridge"], "absolute": group["absolute_ridge"], "tol": group["tol"]}
    root, status = inverse_root(bucket.statistic(i, slice(None)), 2, return_status=True, **options)
    product = torch.bmm(m, root) if i else _verbs(m).long_product(root, m)
    return _chosen(status.ok, product, m), status.ok


def _diagonal_root(d: Tensor, p: int, previous: Tensor, *, ridge: float, absolute: bool) -> tuple[Tensor, Tensor]:
    """(d + ridge lambda)^(-1/p) for the diagonals d (blocks, n), lambda the largest element, 1 for zeros."""
    largest = d.amax(1, keepdim=True)
    shifted = d + (ridge if absolute else ridge * largest.where(largest != 0, 1))
    root = shifted ** (-1 / p)
    ok = torch.isfinite(root).all(1)
    return torch.where(ok[:, None], root, previous), ok
