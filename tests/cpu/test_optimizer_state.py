"""State that moves between steps: every way to reach a state must be noticed, however late it is used."""

import copy
import pickle

import pytest
import torch

from steepest.optim import AdamW
from steepest.optim.state import ParamState

ROWS = 3


def settled_optimizer():
    """An optimizer whose step no longer reads its states' addresses, and its parameters."""
    torch.manual_seed(0)
    params = [torch.randn(5, requires_grad=True) for _ in range(ROWS)]
    for p in params:
        p.grad = torch.randn(5)
    optimizer = AdamW(params, lr=0.1)
    for _ in range(4):
        optimizer.step()
    assert open_rows(optimizer) == set()
    return optimizer, params


def open_rows(optimizer) -> set[int]:
    (table,) = optimizer._tables["AdamW"].tables
    return table.open | table.touched


def move(state: torch.Tensor) -> None:
    """The state's memory becomes another one, of other values; the old one must not be used again."""
    old = state.data
    state.data = torch.full_like(old, 0.25)
    old.fill_(torch.nan)


REACH = {
    "item": lambda entry: entry["exp_avg"],
    "get": lambda entry: entry.get("exp_avg"),
    "values": lambda entry: list(entry.values())[list(entry).index("exp_avg")],
    "items": lambda entry: dict(entry.items())["exp_avg"],
    "dict()": lambda entry: dict(entry)["exp_avg"],
    "unpacked": lambda entry: {**entry}["exp_avg"],
    "update of another": lambda entry: [d := {}, d.update(entry)] and d["exp_avg"],
    "copy": lambda entry: entry.copy()["exp_avg"],
    "copy.copy": lambda entry: copy.copy(entry)["exp_avg"],
    "union": lambda entry: (entry | {})["exp_avg"],
    "reversed union": lambda entry: ({} | entry)["exp_avg"],
    "setdefault": lambda entry: entry.setdefault("exp_avg", None),
}


@pytest.mark.parametrize("reach", REACH)
@pytest.mark.parametrize("row", [0, ROWS - 1])
def test_a_moved_state_is_followed(reach, row):
    optimizer, params = settled_optimizer()
    state = REACH[reach](optimizer.state[params[row]])
    move(state)
    optimizer.step()
    assert all(p.isfinite().all() for p in params)
    expected = 0.9 * 0.25 + 0.1 * params[row].grad
    torch.testing.assert_close(optimizer.state[params[row]]["exp_avg"], expected)


@pytest.mark.parametrize("keep", ["state", "view", "detached", "storage", "items view", "values view", "iterator"])
def test_a_reference_that_is_kept_keeps_the_row_open(keep):
    optimizer, params = settled_optimizer()
    entry = optimizer.state[params[1]]
    kept = {
        "state": lambda: entry["exp_avg"],
        "view": lambda: entry["exp_avg"][1:],
        "detached": lambda: entry["exp_avg"].detach(),
        "storage": lambda: entry["exp_avg"].untyped_storage(),
        "items view": entry.items,
        "values view": entry.values,
        "iterator": lambda: iter(entry.items()),
    }[keep]()
    for _ in range(3):
        optimizer.step()
    if keep in ("items view", "iterator"):
        state = next(value for key, value in kept if key == "exp_avg")
    elif keep == "values view":
        state = list(kept)[list(entry).index("exp_avg")]
    elif keep == "state":
        state = kept
    else:
        assert open_rows(optimizer) == {1}
        del kept
        for _ in range(2):
            optimizer.step()
        assert open_rows(optimizer) == set()
        return
    move(state)
    optimizer.step()
    assert params[1].isfinite().all()


def test_storage_resized_through_an_alias():
    """Offloading as some frameworks do it: the memory is freed and allocated again behind the tensor."""
    optimizer, params = settled_optimizer()
    storage = optimizer.state[params[0]]["exp_avg"].untyped_storage()
    for _ in range(3):
        optimizer.step()
    saved, size = storage.clone(), storage.nbytes()
    storage.resize_(0)
    blocker = torch.full((5,), torch.nan)
    storage.resize_(size)
    storage.copy_(saved)
    optimizer.step()
    assert params[0].isfinite().all() and blocker.isnan().all()


def test_an_entry_replaced_by_a_plain_dict_stays_live():
    optimizer, params = settled_optimizer()
    plain = dict(optimizer.state[params[2]])
    optimizer.state[params[2]] = plain
    for _ in range(3):
        optimizer.step()
    assert optimizer.state[params[2]] is plain
    plain["exp_avg"] = torch.zeros(5)
    optimizer.step()
    torch.testing.assert_close(plain["exp_avg"], 0.1 * params[2].grad)


@pytest.mark.parametrize("change", ["replaced", "moved", "filled"])
def test_a_changed_counter_counts(change):
    optimizer, params = settled_optimizer()
    twin = copy.deepcopy(optimizer)
    entry = optimizer.state[params[1]]
    if change == "replaced":
        entry["step"] = torch.tensor(100.0)
    elif change == "moved":
        entry["step"].data = torch.tensor(100.0)
    else:
        entry["step"].fill_(100.0)
    optimizer.step()
    assert entry["step"].item() == 101.0
    mine = next(p for p in twin.param_groups[0]["params"] if torch.equal(p.grad, params[1].grad))
    twin.step()
    assert not torch.equal(mine, params[1])  # the bias correction is another


def test_parameters_that_change_layout_or_device_reopen_their_rows():
    optimizer = AdamW([torch.nn.Parameter(torch.randn(4, 6))], lr=0.1)
    (p,) = optimizer.param_groups[0]["params"]
    p.grad = torch.randn(4, 6)
    for _ in range(3):
        optimizer.step()
    reference = copy.deepcopy(optimizer)
    (q,) = reference.param_groups[0]["params"]
    q.grad = p.grad.clone()
    p.data = p.data.t().contiguous().t()  # the states keep the old layout
    for o in (optimizer, reference):
        o.step()
    assert torch.equal(p, q)


def test_saved_and_copied_states_are_plain():
    optimizer, params = settled_optimizer()
    assert all(isinstance(optimizer.state[p], ParamState) for p in params)
    assert all(type(entry) is dict for entry in optimizer.state_dict()["state"].values())
    assert type(pickle.loads(pickle.dumps(optimizer.state[params[0]]))) is dict
    assert type(copy.deepcopy(optimizer.state[params[0]])) is dict
    other = copy.deepcopy(optimizer)
    assert all(isinstance(entry, ParamState) for entry in other.state.values())
    loaded = pickle.loads(pickle.dumps(optimizer))
    assert all(isinstance(entry, ParamState) for entry in loaded.state.values())


def test_looking_at_a_state_does_not_cost_the_next_steps():
    optimizer, _ = settled_optimizer()
    norms = [entry["exp_avg"].norm() for entry in optimizer.state.values()]
    assert len(norms) == ROWS and open_rows(optimizer) == set(range(ROWS))
    for _ in range(2):
        optimizer.step()
    assert open_rows(optimizer) == set()
