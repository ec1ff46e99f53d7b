"""A monitor that attaches to any optimizer through its step hooks."""

from __future__ import annotations

import torch
from torch import Tensor

from steepest import check
from steepest.dynamics.spectra import _labelled, buckets, factor_dimensions, spectra
from steepest.norms import survey


class Monitor:
    """Records norms and dimensions of what an optimizer does, every few of its steps.

    With g all gradients and w all parameters as one vector, and G the gradient of one matrix:

    every `every` steps: gradient_norm = ‖g‖_q as the step left it in `.grad` (after SAM: the second pass's), and
        update_norm = ‖w_after - w_before‖_q, decay included;
    every `spectra_every` steps: for each parameter of two or more dimensions, as the matrix of its first by all others,
        dimension = (tr F)² / tr(F²) of F = G Gᵀ and stable_rank = ‖G‖_F² / ‖G‖₂² (within 1 %); for each factor of a
        Shampoo optimizer factor_dimension, the same of the factor.

    The first step counts as number 1, and step 1 is recorded.  Records stay on the parameters' device until `history()`
    is called: no step waits for it.  Works with any torch optimizer, ours or not; `remove()` detaches it.

        monitor = steepest.dynamics.Monitor(optimizer, spectra_every=100)
        ...                                   # train
        monitor.history()["update_norm"]      # one number for each of monitor.history()["step"]

    Args:
        optimizer: whose parameters are on one device.
        every: steps between two norms; None: none.  spectra_every: steps between two spectra; None: none.
        update: False leaves out update_norm, which needs a copy of the parameters.
        q: of the norms, >= 1 or inf.

    Raises ValueError for other values.  Cost of a recorded step, per float32 element: 4 bytes read for gradient_norm;
    for update_norm 24 bytes of traffic and 4 of memory; for spectra see `gradient_dimension` and `stable_rank`.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, *, every: int | None = 100, spectra_every: int | None = None,
        update: bool = True, q: float = 2.0,
    ):  # fmt: skip
        for name, value in (("every", every), ("spectra_every", spectra_every)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"Monitor: {name} is {value!r}, expected a positive integer or None")
        if q != float("inf") and check.number("Monitor", "q", q, 0) < 1:
            raise ValueError(f"Monitor: q is {q}, expected a number >= 1 or inf")
        devices = {p.device for group in optimizer.param_groups for p in group["params"]}
        if len(devices) > 1:
            raise ValueError(f"Monitor: parameters are on {sorted(map(str, devices))}, expected one device")
        self.optimizer, self.every, self.spectra_every, self.update, self.q = optimizer, every, spectra_every, update, q
        self.steps = 0
        self.names: list[str] = []  # of the matrices in `dimension` and `stable_rank`
        self.factor_names: list[str] = []
        self._before: list[Tensor] = []
        self._norms: list[tuple[int, Tensor, Tensor | None]] = []
        self._spectra: list[tuple[int, Tensor, Tensor, Tensor | None]] = []
        self._handles = [optimizer.register_step_post_hook(self._after_step)]
        if every is not None and update:
            self._handles.append(optimizer.register_step_pre_hook(self._before_step))

    def remove(self) -> None:
        """Detaches the monitor; what it has recorded stays."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._before = [], []

    def history(self) -> dict[str, Tensor]:
        """Everything recorded, on the CPU, in float64; reading it waits for the device once per entry.

        step, gradient_norm, update_norm: (records,).  spectra_step: (records,); dimension, stable_rank: (records,
        matrices), in the order of `names`; factor_dimension: (records, factors), in the order of `factor_names`.
        """
        found = {"step": _column([step for step, _, _ in self._norms]), "gradient_norm": _rows(self._norms, 1)}
        if self.update:
            found["update_norm"] = _rows(self._norms, 2)
        if self.spectra_every is not None:
            found["spectra_step"] = _column([entry[0] for entry in self._spectra])
            found |= {"dimension": _rows(self._spectra, 1), "stable_rank": _rows(self._spectra, 2)}
            if self.factor_names:
                found["factor_dimension"] = _rows(self._spectra, 3)
        return found

    def _due(self, every: int | None, number: int) -> bool:
        return every is not None and (number - 1) % every == 0

    def _before_step(self, optimizer, args, kwargs) -> None:
        if self._due(self.every, self.steps + 1):
            params = _parameters(optimizer)
            if [p.shape for p in self._before] != [p.shape for p in params]:
                self._before = [torch.empty_like(p) for p in params]
            torch._foreach_copy_(self._before, params)

    def _after_step(self, optimizer, args, kwargs) -> None:
        self.steps += 1
        if self._due(self.every, self.steps):
            self._record_norms(optimizer)
        if self._due(self.spectra_every, self.steps):
            self._record_spectra(optimizer)

    @torch.no_grad()
    def _record_norms(self, optimizer) -> None:
        change = None
        if self.update:
            torch._foreach_sub_(self._before, _parameters(optimizer))
            change = _norm(self._before, self.q)
        self._norms.append((self.steps, _norm(_gradients(optimizer), self.q), change))

    @torch.no_grad()
    def _record_spectra(self, optimizer) -> None:
        labelled = [(name, p) for name, p in _labelled(optimizer) if p.dim() >= 2 and p.numel()]
        if not self.names:
            self.names = [name for name, _ in labelled]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for _, p in labelled]
        matrices = [g.reshape(g.shape[0], -1) for g in grads]
        rows: list[tuple] = [()] * len(matrices)
        for indices in buckets(matrices):
            values = spectra(torch.stack([matrices[i] for i in indices]), tol=1e-2)
            for i, *row in zip(indices, *(value.unbind() for value in values)):
                rows[i] = tuple(row)
        dimension, rank = (torch.stack(column) for column in zip(*rows)) if rows else (torch.empty(0), torch.empty(0))
        factors = factor_dimensions(optimizer)
        self.factor_names = self.factor_names or list(factors)
        self._spectra.append((self.steps, dimension, rank, torch.stack(list(factors.values())) if factors else None))


def _parameters(optimizer) -> list[Tensor]:
    return [p.detach() for group in optimizer.param_groups for p in group["params"] if p.numel()]


def _gradients(optimizer) -> list[Tensor]:
    return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None and p.numel()]


def _norm(tensors: list[Tensor], q: float) -> Tensor:
    if any(t.dtype == torch.float64 for t in tensors):  # `survey` has kernels for the dtypes of training alone
        return torch.linalg.vector_norm(torch.stack([n.double() for n in torch._foreach_norm(tensors, q)]), q)
    return survey(tensors, q=q).norm


def _column(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def _rows(entries: list[tuple], place: int) -> Tensor:
    values = [entry[place] for entry in entries if entry[place] is not None]
    return torch.stack(values).double().cpu() if values else torch.empty(0, dtype=torch.float64)
