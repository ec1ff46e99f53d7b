"""Mode connectivity: two trained networks, a straight line and a quadratic Bézier curve between their weights.

φ(t) = (1-t)² w₁ + 2 t (1-t) θ + t² w₂, its bend θ trained on ∫ L(φ(t)) dt by one random t per step (Garipov et al.
2018).
"""

from __future__ import annotations

import common
import torch
from torch import nn
from torch.func import functional_call

import steepest

WIDTH = 48


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10))


class Flat:
    """A network as a function of one vector of all its weights."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.shapes = {name: p.shape for name, p in model.named_parameters()}
        self.vector = torch.cat([p.detach().flatten() for p in model.parameters()])

    def __call__(self, w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        parts = w.split([shape.numel() for shape in self.shapes.values()])
        weights = {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts)}
        return functional_call(self.model, weights, (x,))

    @torch.no_grad()
    def losses(self, points, x, y) -> tuple[list[float], list[float]]:
        """(cross entropy, error) at each of the points."""
        scores = [self(w, x) for w in points]
        return (
            [nn.functional.cross_entropy(s, y).item() for s in scores],
            [(s.argmax(1) != y).double().mean().item() for s in scores],
        )


def batches(count: int, size: int, steps: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield torch.randint(count, (size,), generator=generator)


def train(seed: int, x, y, steps: int) -> Flat:
    model = network(seed)
    optimizer = steepest.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    for index in batches(len(x), 128, steps, seed):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[index]), y[index]).backward()
        optimizer.step()
    return Flat(model)


def bezier(t, start, bend, end):
    return (1 - t) ** 2 * start + 2 * t * (1 - t) * bend + t**2 * end


def train_bend(report, net: Flat, start, end, x, y, steps: int, seed: int) -> torch.Tensor:
    bend = ((start + end) / 2).requires_grad_()
    optimizer = steepest.optim.Adam([bend], lr=1e-2)
    generator = torch.Generator().manual_seed(seed + 100)
    for step, index in enumerate(report.progress(batches(len(x), 128, steps, seed + 100), "bend")):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / steps)
        t = torch.rand((), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(bezier(t, start, bend, end), x[index]), y[index]).backward()
        optimizer.step()
    return bend.detach()


def plane(net: Flat, start, bend, end, x, y, points: int):
    """Loss on the plane through the three, in an orthonormal frame; coordinates of the three, and of the grid."""
    u = (end - start) / (end - start).norm()
    v = bend - start - ((bend - start) @ u) * u
    v = v / v.norm()
    places = [((w - start) @ u, (w - start) @ v) for w in (start, bend, end)]
    places = [(a.item(), b.item()) for a, b in places]
    width, height = places[2][0], places[1][1]
    across = torch.linspace(-0.2 * width, 1.2 * width, points)
    up = torch.linspace(-0.2 * height, 1.2 * height, points)
    grid = [start + a * u + b * v for b in up for a in across]
    loss, _ = net.losses(grid, x, y)
    return places, across, up, torch.tensor(loss).view(points, points)


def main(argv=None) -> dict:
    options = common.options(
        __doc__, argv, steps=600, bend_steps=3000, points=41, grid=31, samples=1000,
        tiny={"steps": 20, "bend_steps": 30, "points": 7, "grid": 5, "samples": 200},
    )  # fmt: skip
    report = common.Report("mode_connectivity", options)
    x, y, x_test, y_test = common.digits(options.seed, options.samples)
    first, second = (train(options.seed + k, x, y, options.steps) for k in (1, 2))
    start, end = first.vector, second.vector
    bend = train_bend(report, first, start, end, x, y, options.bend_steps, options.seed)
    t = torch.linspace(0, 1, options.points)
    paths = {"line": [(1 - s) * start + s * end for s in t], "curve": [bezier(s, start, bend, end) for s in t]}
    found = {}
    for name, path in paths.items():
        for part, data in (("training", (x, y)), ("test", (x_test, y_test))):
            found[name, part] = first.losses(path, *data)
    rows = []
    for name in paths:
        loss, error = found[name, "training"]
        test_error = found[name, "test"][1]
        rows.append(
            (name, max(loss[0], loss[-1]), max(loss), max(error), max(test_error[0], test_error[-1]), max(test_error))
        )
    report.table(
        "Largest values along the two paths",
        ["path", "loss at the ends", "largest loss", "largest error", "test error at the ends", "largest test error"],
        rows,
    )
    ends = rows[0][1]
    report.claim(
        "The straight line crosses a barrier (its largest loss is over ten times the ends')",
        rows[0][2] > 10 * ends,
        f"{rows[0][2]:.3g} against {ends:.3g}",
    )
    report.claim(
        "The curve has none (at most 5 % of the line's rise, no more training errors than 1 %)",
        rows[1][2] - ends <= 0.05 * (rows[0][2] - ends) and rows[1][3] <= 0.01,
        f"rises by {rows[1][2] - ends:.3g}, the line by {rows[0][2] - ends:.3g}; error {rows[1][3]:.2%}",
    )
    report.claim(
        "All of the curve generalises like its ends (test error within 1 percentage point)",
        rows[1][5] <= rows[1][4] + 0.01,
        f"{rows[1][5]:.2%} against {rows[1][4]:.2%} at the ends, {rows[0][5]:.2%} on the line",
    )
    places, across, up, loss = plane(first, start, bend, end, x, y, options.grid)
    with report.figure(3, "Two networks of 64-48-48-10 on digits, and the paths between them") as axes:
        for ax, part in ((axes[0], "training"), (axes[1], "test")):
            for name, color in zip(paths, (common.COLORS[1], common.COLORS[0])):
                ax.plot(t, found[name, part][0], color=color, label=name)
            ax.set(xlabel="t", ylabel="loss", title=f"{part} loss")
        axes[0].legend(frameon=False)
        filled = axes[2].contourf(across, up, loss.clamp(min=1e-3).log10(), levels=20, cmap="viridis")
        line = bezier(t[:, None], *(torch.tensor(place) for place in places))
        axes[2].plot(line[:, 0], line[:, 1], color="white", linewidth=1.5)
        axes[2].plot(*zip(places[0], places[2]), "--", color="white", linewidth=1)
        axes[2].plot(*zip(*places), "o", color="white", markersize=4)
        axes[2].set(title="log₁₀ training loss in the plane of the curve")
        axes[2].figure.colorbar(filled, ax=axes[2])
    return report.save()


if __name__ == "__main__":
    main()
