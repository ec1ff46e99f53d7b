"""Plans for work over ranks, without any ranks: who owns what, how evenly, who sends what to whom."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

from steepest.distributed import muon, owners
from steepest.distributed.exchange import Task
from steepest.distributed.layout import Layout, Team, merged, overlap, region_at, size

GPT2 = [(768, 2304), (768, 768), (768, 3072), (3072, 768)] * 12  # hidden matrices of GPT-2 small
LLAMA = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)] * 32


def layout(shape, mesh_shape, placements):
    coordinates = list(itertools.product(*map(range, mesh_shape)))
    regions = tuple(region_at(shape, mesh_shape, c, placements) for c in coordinates)
    kept = [tuple(x for x, p in zip(c, placements) if p.is_replicate()) for c in coordinates]
    copies = {key: i for i, key in enumerate(dict.fromkeys(kept))}
    return Layout(Team(tuple(range(len(coordinates)))), shape, regions, tuple(copies[key] for key in kept))


def fsdp_plan(shapes, ranks):
    entries = [muon.Entry(0, torch.empty(s, device="meta"), layout(s, (ranks,), [Shard(0)])) for s in shapes]
    return muon.make_plan(entries, {0: dict(schedule="polar-express", steps=5, norm="auto", matrices="whole")})


@pytest.mark.parametrize("ranks", [2, 3, 4, 8, 16])
def test_gpt2_is_balanced_within_ten_percent_where_matrices_suffice(ranks):
    made = fsdp_plan(GPT2, ranks)
    assert made.imbalance() <= 0.10, made.imbalance()
    assert sorted(i for places in made.rounds for i in places) == list(range(len(GPT2)))


@pytest.mark.parametrize("ranks", [8, 32, 64])
def test_an_8b_model_is_balanced_over_more_ranks(ranks):
    assert fsdp_plan(LLAMA, ranks).imbalance() <= 0.10


def test_a_plan_is_a_function_of_its_input():
    first, second = fsdp_plan(GPT2, 4), fsdp_plan(GPT2, 4)
    assert [t.owner for t in first.tasks] == [t.owner for t in second.tasks] and first.rounds == second.rounds


def test_rounds_bound_what_a_rank_holds():
    """Two neighbouring rounds of blocks and messages: 4 elements per element of an owner's round, and its parts."""
    made = fsdp_plan(LLAMA, 64)
    per_round = max(muon.ROUND_ELEMENTS, max(map(math.prod, LLAMA))) + max(map(math.prod, LLAMA))
    parts = max(sum(math.prod(made.tasks[i].shape) for i in places) for places in made.rounds) / 64 + 1
    for rank in (0, 63):
        assert 0 < made.buffer_elements(rank) <= 2 * (4 * per_round + 2 * parts)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 1000), max_size=40), st.integers(1, 9))
def test_no_owner_works_longer_than_the_mean_and_one_item(costs, ranks):
    found = owners.assign(costs, ranks)
    busiest = max(owners.loads(costs, found, ranks))
    assert busiest <= sum(costs) / ranks + max(costs, default=0)
    assert found == owners.assign(costs, ranks)


@settings(max_examples=300, deadline=None)
@given(
    st.integers(0, 13),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 4),
    st.sampled_from(["SSR", "RSS", "SRS", "SST"]),
)
def test_regions_are_those_of_torch_and_tile_the_tensor(rows, columns, first, second, kind):
    """T: FSDP2 over a tensor-parallel shard of the same dimension, as torch writes it."""
    placements = {
        "SSR": [Shard(0), Replicate()], "RSS": [Replicate(), Shard(1)], "SRS": [Shard(0), Shard(1)],
        "SST": [_StridedShard(0, split_factor=second), Shard(0)],
    }[kind]  # fmt: skip
    mesh, shape = (first, second), (rows, columns)
    if kind == "SST" and rows % (first * second):
        rows -= rows % (first * second)  # uneven cuts of this kind may leave ranges with gaps, which are refused
        shape = (rows, columns)
    counted = torch.zeros(shape)
    for coordinate in itertools.product(range(first), range(second)):
        region = region_at(shape, mesh, coordinate, placements)
        expected, offset = _compute_local_shape_and_global_offset(shape, mesh, list(coordinate), placements)
        assert tuple(b - a for a, b in region) == tuple(expected) or size(region) == math.prod(expected) == 0
        if size(region):
            assert tuple(a for a, _ in region) == tuple(offset)
        counted[tuple(slice(a, b) for a, b in region)] += 1
    copies = math.prod(n for n, p in zip(mesh, placements) if p.is_replicate())
    assert (counted == copies).all()


def test_a_shard_of_several_pieces_is_refused():
    with pytest.raises(NotImplementedError, match="several pieces"):
        region_at((8, 2), (2,), (0,), [_StridedShard(0, split_factor=2)])


def test_messages_carry_every_element_once_to_the_owner_and_to_every_holder():
    for mesh, placements in (((4,), [Shard(0)]), ((2, 2), [Replicate(), Shard(0)]), ((2, 2), [Shard(0), Shard(1)])):
        where = layout((7, 9), mesh, placements)
        for owner in range(4):
            task = Task(0, where, ((0, 7), (0, 9)), owner)
            there, back = torch.zeros(7, 9), torch.zeros(4, 7, 9)
            for _, region in task.parts():
                there[tuple(slice(a, b) for a, b in region)] += 1
            for rank, region in task.holders():
                back[(rank, *(slice(a, b) for a, b in region))] += 1
            assert (there == 1).all() and (back.sum(0) == (2 if placements[0].is_replicate() else 1)).all()
            assert {where.replicas[r] for r, _ in task.parts()} == {where.replicas[owner]}


def test_merged_dimensions_keep_regions():
    kernel = layout((6, 4, 3, 3), (4,), [Shard(0)])
    flat = torch.arange(216).view(6, 4, 3, 3)
    for shape in ((6, 36), (6, 4, 9), (216,)):
        for old, new in zip(kernel.regions, merged(kernel, shape).regions):
            a = flat[tuple(slice(*r) for r in old)].flatten()
            assert torch.equal(a, flat.view(shape)[tuple(slice(*r) for r in new)].flatten())
    with pytest.raises(NotImplementedError, match="merged with an earlier one"):
        merged(layout((6, 4, 3, 3), (2,), [Shard(1)]), (216,))
    assert merged(layout((6, 4, 3, 3), (2,), [Shard(1)]), (6, 36)).regions[1] == ((0, 6), (18, 36))


def test_overlap():
    assert overlap(((0, 4), (2, 5)), ((3, 9), (0, 3))) == ((3, 4), (2, 3))
    assert overlap(((0, 4), (2, 5)), ((4, 9), (0, 3))) is None
