"""Double descent: least squares through the interpolation threshold, with random features and polynomials, and ridge.

Without ridge the fit is the least-squares solution of least norm; with it w = Φᵀ (ΦΦᵀ + λ n I)⁻¹ y, by
`steepest.inverse_root` of all draws at once.  Test error is the mean square error against the noiseless target.
"""

from __future__ import annotations

import math

import common
import torch

import steepest

F64 = torch.float64
RIDGES = (0.0, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


def random_features(draws: int, n: int, tests: int, p: int, generator):
    """ReLU features of 20 normal inputs of a linear teacher with noise 0.5; p features by p random directions."""
    d = 20

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=F64)

    teacher, x = draw(draws, d, 1) / math.sqrt(d), draw(draws, n + tests, d)
    y = (x @ teacher)[..., 0]
    phi = torch.relu(x @ draw(draws, d, p) / math.sqrt(d)) / math.sqrt(p)
    return phi[:, :n], y[:, :n] + 0.5 * draw(draws, n), phi[:, n:], y[:, n:]


def polynomials(draws: int, n: int, tests: int, p: int, generator):
    """Legendre polynomials of degree 0 to p - 1 on [-1, 1], of norm 1; the target is sin(6 x) + noise 0.2."""
    x = torch.rand(draws, n + tests, generator=generator, dtype=F64) * 2 - 1
    columns = [torch.ones_like(x), x]
    for k in range(1, p - 1):
        columns.append(((2 * k + 1) * x * columns[-1] - k * columns[-2]) / (k + 1))
    phi = torch.stack([c * math.sqrt(2 * k + 1) for k, c in enumerate(columns[:p])], -1)
    y = torch.sin(6 * x)
    noise = 0.2 * torch.randn(draws, n, generator=generator, dtype=F64)
    return phi[:, :n], y[:, :n] + noise, phi[:, n:], y[:, n:]


def errors(data, ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(training, test) mean square errors, one per draw."""
    phi, y, phi_test, y_test = data
    n = phi.shape[1]
    if ridge:
        kernel = phi @ phi.mT
        inverse = steepest.inverse_root(kernel, 1, ridge=ridge * n, absolute=True)
        w = phi.mT @ (inverse @ y[..., None])
    else:
        w = torch.linalg.pinv(phi, rtol=1e-12) @ y[..., None]
    return ((phi @ w)[..., 0] - y).square().mean(1), ((phi_test @ w)[..., 0] - y_test).square().mean(1)


def sweep(report, kind, sizes, options, n: int) -> dict[float, list[tuple[float, float]]]:
    """ridge -> median (training, test) error at every p, over the draws."""
    found = {ridge: [] for ridge in RIDGES}
    for p in report.progress(sizes, kind.__name__.replace("_", " ")):
        data = kind(options.draws, n, options.tests, p, torch.Generator().manual_seed(options.seed))
        for ridge in RIDGES:
            found[ridge].append(tuple(e.median().item() for e in errors(data, ridge)))
    return found


def judge(report, name: str, sizes, found, n: int) -> None:
    test = [e for _, e in found[0.0]]
    peak = max(range(len(sizes)), key=lambda i: test[i])
    before = min(test[: peak + 1])
    report.claim(
        f"{name}: without ridge the test error peaks where the number of features is that of samples (within 20 %)",
        abs(sizes[peak] / n - 1) <= 0.2,
        f"peak {test[peak]:.3g} at p = {sizes[peak]}, n = {n}",
    )
    report.claim(
        f"{name}: it falls again beyond, to less than a tenth of the peak",
        test[-1] < 0.1 * test[peak],
        f"{test[-1]:.3g} at p = {sizes[-1]}",
    )
    report.claim(
        f"{name}: the second descent goes below the first",
        min(test[peak:]) < before,
        f"least error {min(test[peak:]):.3g} after the peak, {before:.3g} before",
    )
    tuned = [min(found[ridge][i][1] for ridge in RIDGES) for i in range(len(sizes))]
    worst = max(range(len(sizes) - 1), key=lambda i: tuned[i + 1] / tuned[i])
    report.claim(
        f"{name}: with the ridge tuned for each p there is no peak "
        "(the error never rises by over 10 % from one p to the next)",
        tuned[worst + 1] <= 1.1 * tuned[worst],
        f"largest step {tuned[worst]:.3g} to {tuned[worst + 1]:.3g}, at p = {sizes[worst]} to {sizes[worst + 1]}; "
        f"at p = n {tuned[sizes.index(n)]:.3g}",
    )


def main(argv=None) -> dict:
    options = common.options(
        __doc__, argv, draws=30, tests=300, features=1600, degree=400,
        tiny={"draws": 2, "tests": 50, "features": 200, "degree": 60},
    )  # fmt: skip
    report = common.Report("double_descent", options)
    cases = (
        ("Random features", random_features, 100, options.features),
        ("Polynomials", polynomials, 30, options.degree),
    )
    results = {}
    for name, kind, n, most in cases:
        ratios = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2, 3, 5, 8, 13, 20)
        sizes = [size for size in sorted({max(2, round(r * n)) for r in ratios}) if size <= most]
        results[name] = (sizes, found := sweep(report, kind, sizes, options, n))
        judge(report, name, sizes, found, n)
        shown = [i for i, size in enumerate(sizes) if size / n in (0.2, 0.6, 1.0, 1.5, 3.0, 13.0)]
        report.table(
            f"{name}: median test error of {options.draws} draws, n = {n}",
            ["λ", *(f"p = {sizes[i]}" for i in shown)],
            [(f"{ridge:g}", *(found[ridge][i][1] for i in shown)) for ridge in RIDGES],
        )
    with report.figure(2, "Double descent in least squares", width=5.5) as axes:
        for ax, (name, _, n, _) in zip(axes, cases):
            sizes, found = results[name]
            for ridge, color in zip(RIDGES, common.COLORS):
                ax.loglog(sizes, [e for _, e in found[ridge]], color=color, label=f"λ = {ridge:g}")
            train = [max(e, 1e-4) for e, _ in found[0.0]]
            ax.loglog(sizes, train, ":", color=common.COLORS[0], label="training, λ = 0")
            ax.axvline(n, color="#999999", linewidth=0.8)
            ax.set(xlabel=f"features p (n = {n})", ylabel="mean square error", title=name, ylim=(1e-3, None))
        axes[0].legend(frameon=False, fontsize=8)
    return report.save()


if __name__ == "__main__":
    main()
