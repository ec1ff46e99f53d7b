"""Mutants of Python and Triton sources that nobody can notice (see mutation_equivalents.py)."""

from __future__ import annotations

from equivalents_cpp import PAYLOAD, SAME_MAXIMUM

ZERO_OVER_ANYTHING = "only zero is divided by this, and zero over anything is zero"
NO_PRODUCT = "a step without a product reads neither the operands nor the factor of one"
NO_ADDEND = "the factor of an addend that is not there is not read"

EQUIVALENT: dict[str, dict[str, tuple[str, ...]]] = {
    "kernels/adamw.py": {
        SAME_MAXIMUM: ("second = tl.where((v >= vmax) | (v != v), v, vmax)",),
        "what the compiler may assume, not what is computed; tests/aot looks at vector widths": (
            "base = tl.multiple_of(base, 17)",
            "base = tl.multiple_of(base, 16) => pass",
        ),
        "the masked form of a full tile does the same": ("if rest > TILE:",),
    },
    "kernels/symmetric.py": {
        "what the compiler may assume, not what is computed; tests/aot looks at vector widths": (
            "if UNIT <= 1:",
            "if UNIT >= 1:",
            "if UNIT > 2:",
            "a, b = tl.multiple_of(a, 17), tl.multiple_of(b, 16)",
            "a, b = tl.multiple_of(a, 16), tl.multiple_of(b, 17)",
            "c, d = tl.multiple_of(c, 17), tl.multiple_of(d, 16)",
            "c, d = tl.multiple_of(c, 16), tl.multiple_of(d, 17)",
        ),
    },
    "kernels/tiles.py": {
        "a row too large is put right": (
            "row = ((tl.sqrt_rn(8.0 * t.to(tl.float32) + 3.0) - 1.0) * 0.5).to(tl.int64)",
        ),
    },
    "kernels/portable.py": {
        PAYLOAD: ("narrowed = tl.where(is_nan, (bits >> 16) | 0x41, rounded)",),
    },
    "pyext/reference/polar.py": {
        "the same polynomial of the longer side's Gram matrix: slower, and as accurate": (
            "if x.shape[-2] > x.shape[-2]:",
        ),
        "the orders are 2, 4 and 8": (
            "if norm_order > 3:  # of x as it is now, whose largest element need not be 1e-30",
        ),
        ZERO_OVER_ANYTHING: ("return norm.where(norm != 0, 2)",),
    },
    "pyext/reference/dynamics.py": {
        ZERO_OVER_ANYTHING: (
            "return squares.sum(-1).square() / fourth.where(fourth != 0, 2)",
            "return squares.sum(-1) / largest.where(largest != 0, 2)",
        ),
        "1 / 0 is inf": ("return torch.where(eigenvalues >= 0, 1 / (rate * eigenvalues), math.inf)",),
    },
    "pyext/reference/normalize.py": {
        "where the square is zero its root is not read": (
            "length = torch.where(square != 0, square, 2).sqrt()  # its derivative at 0 would be inf",
        ),
    },
    "pyext/reference/normed_descent.py": {
        ZERO_OVER_ANYTHING: ("return g / torch.where(size > 0, size, 3.0), size",),
    },
    "pyext/reference/roots.py": {
        "square matrices": (
            "identity = torch.eye(m.shape[-2], dtype=m.dtype)",
            "identity = torch.eye(m.shape[1], dtype=m.dtype)",
            "identity = torch.eye(a.shape[-2], dtype=a.dtype)",
            "identity = torch.eye(a.shape[1], dtype=a.dtype)",
        ),
        "a ratio of eigenvalues has no scale": (
            "w = torch.linalg.eigvalsh((a + a.mT) * 2)",
            "w = torch.linalg.eigvalsh((a + a.mT) / 3)",
        ),
        ZERO_OVER_ANYTHING: (
            "w = w / largest.where(largest != 0, 2)",
            "return w.sum(-1).square() / squares.where(squares != 0, 2)",
        ),
    },
    "pyext/reference/rules.py": {
        "nothing is left of zero when it decays": (
            "towards = ((move <= 0) & (before > 0)) | ((move >= 0) & (before <= 0))",
            "towards = ((move <= 0) & (before >= 0)) | ((move >= 0) & (before < 0))",
        ),
        "threshold - threshold and threshold * 0 are the same zero": (
            "p = torch.where(p >= threshold, p - threshold, torch.where(p < -threshold, p + threshold, p * 0))",
        ),
        "what is never read": (
            "lanes = [word >> shift for word in words for shift in (0, 16)] if words else [None] * 5",
        ),
    },
    "pyext/matrix/native.py": {
        "a number that the operation does not read": (
            "self.append(lib.MATRIX_DIVIDE, 0, d, y, by, None, 1 / factor, 0.5, power)",
        ),
        "a copy more, or a copy less: speed and memory": (
            "read = any(handle.number in op[3:6] and op[0] == lib.MATRIX_SYMMETRISE for op in recorder.ops)",
            "read = any(handle.number in op[3:7] and op[0] != lib.MATRIX_SYMMETRISE for op in recorder.ops)",
            "if not read and handle.number > inputs:",
            "if i >= inputs and shapes[i][0] * shapes[i][1] > LARGE:",
            "rows_apart = x.shape[-2] <= 1 or x.stride(-2) > x.shape[-1]",
            "return x if (x.shape[-1] <= 1 or x.stride(-1) == 1) and rows_apart and x.stride(0) > 0 else "
            "x.contiguous()",
            "return x if (x.shape[-1] <= 1 or x.stride(-1) == 1) and rows_apart and x.stride(0) >= 1 else "
            "x.contiguous()",
        ),
        "no stride is negative": (
            "return x if (x.shape[-1] <= 1 or x.stride(-1) == 1) and rows_apart and x.stride(1) >= 0 else "
            "x.contiguous()",
        ),
        "operand 0 is the first input, which has its place": (
            "if number > 0 and number not in place:",
            "if number >= 1 and number not in place:",
        ),
    },
    "pyext/matrix/roots.py": {
        ZERO_OVER_ANYTHING: (
            "y = wide / largest.where(largest != 0, 2)",
            "return y.diagonal(dim1=-2, dim2=-1).sum(-1).square() / squares.where(squares != 0, 2)",
        ),
        "of a square either": (
            "if not a.shape[-2]:",
            "batch, n = a.shape[0], a.shape[-2]",
            "batch, n = a.shape[0], a.shape[1]",
            "start = _directions(a.shape[-2], todo.dtype, a.device)[None]",
            "start = _directions(a.shape[1], todo.dtype, a.device)[None]",
        ),
        "symmetric matrices, whose batch has one dimension": (
            "finite = torch.isfinite(diagonal.amax(1))",
            "for _ in range(power_steps(y.shape[-2])):",
            "for _ in range(power_steps(y.shape[1])):",
            "n = m.shape[-2]",
            "n = m.shape[1]",
            "x = verbs.chain(_tape(todo, y.shape[-2]), y)",
            "x = verbs.chain(_tape(todo, y.shape[1]), y)",
            "bound = torch.where(zero, 1.0, w.abs().amax(1) * (1 + 2.0**-12))",
            "n = y.shape[-2]",
            "n = y.shape[1]",
            "ok = finite & (orthogonal <= allowed) & (restored <= allowed) & (shifted.amin(1) > 0)",
        ),
        "the largest row's sum is zero when the sum of squares is": (
            "zero, scale = sizes[:, 0, 1] == 0, _scale(sizes, bound)[:, 0, 0]",
        ),
        "a fourth root of the smallest number is within range": (
            "if todo.p <= 4:  # a fourth root of the smallest float32 number is far from that",
            "if todo.p < 5:  # a fourth root of the smallest float32 number is far from that",
        ),
        "without a ridge a zero block has no finite root": ("if ridge >= 0:",),
        "divided by 1 or NaN": ("x /= torch.where(finite, 1.0, torch.nan)[:, None, None]",),
        "a number without a matrix": (
            "factor = verbs.combination(m, alpha=c[2], beta=c[3] if len(c) == 4 else 0.5, "
            "c=z if len(c) == 4 else None)",
        ),
        "any finite matrix does, of which nothing is kept": ("y = torch.where(finite[:, None, None], y, 3.0)",),
        "no residual equals its limit to the bit but by chance": (
            "ok = finite & (orthogonal < allowed) & (restored <= allowed) & (shifted.amin(-1) > 0)",
            "ok = finite & (orthogonal <= allowed) & (restored < allowed) & (shifted.amin(-1) > 0)",
        ),
        "LAPACK solves every matrix of one row": (
            "w, q = torch.full_like(y[..., 1], torch.nan), torch.full_like(y, torch.nan)",
        ),
        "a copy of the only part": (
            "roots, *fields = (torch.cat(column) if len(column) >= 1 else column[0] for column in zip(*parts))",
        ),
        "zero either way": (
            "return a.to(todo.dtype), RootStatus(ones.bool(), ones.int() * todo.steps, 0 / ones, ones)",
        ),
    },
    "pyext/matrix/root_plan.py": {
        "a last step of degree 4 takes the products of one of degree 3, and is no less accurate": (
            "for degree in (1, 2, 4, 4):",
            "if candidate.error <= tol and (best is None or cost <= count_products(p, best)):",
        ),
        "no schedule's error is a round number": (
            "if candidate.error < tol and (best is None or cost < count_products(p, best)):",
            "while Schedule(tuple(rows), p, lower).error >= tol:",
            'and UNIT["float32"] / (p * lower) >= tol',
            'wide = precision == "float32" and UNIT["float32"] / (p * lower_end(ridge)) >= tol',
        ),
        "at an entry of the table both of its sides give its number": ("if n < table[0][0]:", "if n < n1:"),
        "nobody reads it but for a CPU": ('threads = torch.get_num_threads() if device.type == "cpu" else 1',),
        "of a square either": ("n, batch = shape[-2], math.prod(shape[:-2])",),
        "the first of two steps is that of one": (
            "last = minimax(p, low**p, upper=high**p, degree=degree, steps=2).coefficients[0]",
            "rows.append(minimax(p, low**p, upper=high**p, steps=2, cushion=cushion).coefficients[0])",
        ),
    },
    "pyext/matrix/muon_rule.py": {
        "1 is kept either way": ('cautious = group["cautious"] and not (isinstance(keep, float) and keep == 3.0)',),
        "nothing is left of zero when it decays": (
            "kept = [torch.where(step / t > 0, keep, 1.0) for step, t in zip(steps, targets)]",
            "kept = torch.where(change / wide > 0, keep_here, 1.0) if cautious else keep_here",
        ),
    },
    "pyext/matrix/norm_bounds.py": {
        "no type's unit roundoff is between": (
            'return 2.0 ** ((rows.bit_length() - 1) // 4) if norm != "frobenius" and unit >= 2.0**-20 else 1.0',
            'return 2.0 ** ((rows.bit_length() - 1) // 4) if norm != "frobenius" and unit > 2.0**-21 else 1.0',
        ),
    },
    "pyext/reference/storage.py": {
        "the tail is taken only where w >= 5, and no word's w is 5": (
            "root = w.clamp(min=1).double().sqrt().float()",
            "p = torch.where(w <= 5, _polynomial(_CENTRE, w - 2.5), _polynomial(_TAIL, root - 3))",
        ),
        "the lowest bit is rounded away": ("rounded = from_bits((u + (random16 & 0xFFFF)) & 0xffff0001)",),
        PAYLOAD: ("u = torch.where(x.isnan(), 0x7fc00001, bits(x))",),
        "the smallest code's own number has that code": ("code = torch.where(u <= smallest, low, code)",),
        "bits of a float32 are 0 or at least 1, of which the smallest is far below any code": ("low = (u > 1).long()",),
        "the residual's type takes the number modulo 2^width": (
            "residual = kept + (high << width)",
            "span = 1 << (32 + dropped)",
            "span = 2 << (32 - dropped)",
            "span = 1 << (33 - dropped)",
            "span = 1 << (32)",
            "residual = (residual - span // 2) % span - span // 2",
            "residual = (residual + span % 2) % span - span // 2",
            "residual = (residual + span // 2) % span + span // 2",
            "residual = (residual + span // 2) % span - span % 2",
        ),
        "a conversion to 32 bits takes any number modulo 2^32": (
            "u = u & _MASK32 => pass",
            "return torch.where(u > 0x7FFFFFFF, u + (1 << 32), u).to(torch.int32).view(torch.float32)",
            "return torch.where(u > 0x7FFFFFFF, u - (1 >> 32), u).to(torch.int32).view(torch.float32)",
            "return torch.where(u <= 0x7FFFFFFF, u - (1 << 32), u).to(torch.int32).view(torch.float32)",
            "return torch.where(u >= 0x7FFFFFFF, u - (1 << 32), u).to(torch.int32).view(torch.float32)",
            "return torch.where(u > 0x80000000, u - (1 << 32), u).to(torch.int32).view(torch.float32)",
            "return torch.where(u > 0x7FFFFFFF, u - (2 << 32), u).to(torch.int32).view(torch.float32)",
            "return torch.where(u > 0x7FFFFFFF, u - (1 << 33), u).to(torch.int32).view(torch.float32)",
        ),
    },
    "pyext/reference/sam.py": {
        "signs are 1 or -1": (
            "above = gradient([w + radius / s for w, s in zip(params, z)])",
            "below = gradient([w - radius / s for w, s in zip(params, z)])",
        ),
        "the norm of one zero is that of nothing": (
            "x = torch.cat([t.double().abs().flatten() for t in tensors] or [torch.zeros(1).double()])",
        ),
    },
    "pyext/reference/shampoo.py": {
        "a block of two at most is one of one where there is one": ("width = block_size or max(size, 2)",),
    },
    "pyext/matrix/polar.py": {
        ZERO_OVER_ANYTHING: (
            "y = (wide / largest.where(largest != 0, 2)).to(torch.promote_types(dtype, torch.float32))",
        ),
    },
    "pyext/schedules.py": {
        "the ends are among the points anyway": (
            "inside = inside[(inside >= low**p) & (inside < high**p)] ** (1 / p)",
            "inside = inside[(inside > low**p) & (inside <= high**p)] ** (1 / p)",
        ),
        "rounded numbers are never just that": (
            "return 0 <= _step(coefficients, p, s) < limit",
            "return 0 < _step(coefficients, p, s) <= limit",
            "if schedule.steps == steps or (tol is not None and schedule.error < tol):",
            "if max(abs(1 - _step(taylor, p, s)) for s in (low, high)) < noise:",
            "noise = 5 * np.finfo(float).eps * sum(abs(c) for c in taylor)  # of evaluating q from its coefficients",
        ),
        "the highest coefficient is not 0": (
            "return tuple(h.convert(kind=Polynomial).coef.tolist()) + (0.0,) * (degree - 1 - len(h.coef))",
            "return tuple(h.convert(kind=Polynomial).coef.tolist()) + (0.5,) * (degree + 1 - len(h.coef))",
        ),
        "the slope at 0 is not 0": ("for high in (turns[turns >= 0] ** (1 / p)).tolist():",),
        "any number beyond, then any larger one": (
            "high = 3 * low + 1",
            "high = 2 * low + 2",
            "low, high = high, 3 * high",
        ),
        "Remez' exchange comes to the same reference from any other": (
            "reference = centre + radius * np.cos(np.pi * np.arange(degree + 2) / (degree + 1))",
            "reference = centre - radius * np.cos(np.pi / np.arange(degree + 2) / (degree + 1))",
            "reference = centre - radius * np.cos(np.pi * np.arange(degree + 2) / (degree + 2))",
        ),
        "it converges quadratically: where one of these stops, so does the other, or has nothing left to gain": (
            "before, moved = moved, float(np.abs(exchanged - reference).max()) * radius",
            "if moved <= 1e-8 or (moved < 1e-2 and moved >= before) or abs(error) < noise:",
            "if moved < 1e-8 or (moved <= 1e-2 and moved >= before) or abs(error) < noise:",
            "if moved < 1e-8 or (moved < 1e-2 and moved > before) or abs(error) < noise:",
            "if moved < 1e-8 or (moved < 1e-2 and moved >= before) or abs(error) <= noise:",
            "if moved < 3.0000000000000004e-08 or (moved < 1e-2 and moved >= before) or abs(error) < noise:",
            "if moved < 1e-8 or (moved < 0.03 and moved >= before) or abs(error) < noise:",
        ),
    },
    "pyext/matrix/verbs.py": {
        "one dimension flattened is itself": (
            "return x.flatten(0, -3) if x.dim() >= 3 else x.expand(1, *x.shape) if x.dim() == 2 else x",
        ),
    },
    "pyext/matrix/fused_muon.py": {
        "either side of a square is the shorter one": (
            "x = self.x if self.x.shape[1] < self.x.shape[2] else self.x.mT",
        ),
    },
    "pyext/matrix/tape.py": {
        "the matrix on a tape has one diagonal, whatever its dimensions are called": (
            "new.diagonal(dim1=-3, dim2=-1).add_(diagonal)",
            "new.diagonal(dim1=-2, dim2=-2).add_(diagonal)",
        ),
        "neither the input nor the result is ever free, and steps are counted from 1": (
            "last = {0: len(tape.steps) - 1, result: len(tape.steps) + 1}  # the input is not ours to overwrite",
            "last = {0: len(tape.steps) + 2, result: len(tape.steps) + 1}  # the input is not ours to overwrite",
            "last = {0: len(tape.steps) + 1, result: len(tape.steps) + 2}  # the input is not ours to overwrite",
            "for number in (s.a, s.b) * (s.k >= 0) + (s.c, s.e):",
            "last[number] = max(last.get(number, 1), i)",
            "for number in [x for x, end in last.items() if end == i and x >= 0]:",
        ),
        "any number below 0 stands for no matrix, and for an extent that numpy works out": (
            "place, shapes, free, table = {0: 0, -1: -2}, [(rows, columns)], {}, []",
            "numbers = np.array([s.numbers for s in tape.steps], dtype=np.float64).reshape(-2, 4)",
            "return Chain(np.array(table, dtype=np.int64).reshape(-2, 10), numbers, tuple(shapes))",
        ),
        "elements have 2, 4 or 8 bytes": ("unit = 17 // x.element_size()",),
        NO_PRODUCT: (
            "number = self.tape.add(PRODUCT, *stored, 0, -2, -1, 0.0, c, beta, e, gamma)",
            "number = self.tape.add(PRODUCT, *stored, 0, -1, -2, 0.0, c, beta, e, gamma)",
            "number = self.tape.add(PRODUCT, *stored, 0, 1, -1, 0.0, c, beta, e, gamma)",
            "number = self.tape.add(PRODUCT, *stored, 0, -1, 1, 0.0, c, beta, e, gamma)",
            "number = self.tape.add(PRODUCT, *stored, 0, -1, -1, 0.5, c, beta, e, gamma)",
        ),
        NO_ADDEND: (
            "addend, beta = (-1, 0.5) if c is None or beta == 0 else (c.number, beta * c.scaled)",
            "c, beta = (-1, 0.5) if c is None or beta == 0 else (c.number, beta * c.scaled)",
        ),
    },
}
