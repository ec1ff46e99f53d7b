// Programs on arrays that end where their last element does, against sums in double; and every instruction set's loops
// against each other's definition.  Prints what is wrong; exit status 1 then.
#include "matrix/kernels.cpp"  // its instruction sets are in no header

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "matrix/ahead.h"
#include "matrix/product.h"
#include "steepest/matrix.h"

namespace {

int failures = 0;
std::mt19937 generator(7);

void fail(const char *what, int64_t m, int64_t n, int64_t k, double off, double bound) {
  std::printf("%s %lld x %lld x %lld: off by %g, at most %g\n", what, static_cast<long long>(m), static_cast<long long>(n),
              static_cast<long long>(k), off, bound);
  ++failures;
}

// rows x cols with `gap` elements of NaN between rows and none after the last, `shift` elements off its alignment.
template <class T>
struct Array {
  int64_t rows, cols, ld;
  std::unique_ptr<T[]> memory;
  T *at;
  Array(int64_t rows_, int64_t cols_, int64_t gap, int64_t shift) : rows(rows_), cols(cols_), ld(cols_ + gap) {
    const int64_t size = shift + (rows > 0 ? (rows - 1) * ld + cols : 0);
    memory.reset(new T[size > 0 ? size : 1]);
    std::fill_n(memory.get(), size, std::numeric_limits<T>::quiet_NaN());
    at = memory.get() + shift;
    std::normal_distribution<double> normal;
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < cols; ++j) at[i * ld + j] = static_cast<T>(normal(generator));
  }
  double get(int64_t i, int64_t j, bool transposed) const { return transposed ? at[j * ld + i] : at[i * ld + j]; }
  steepest_matrix_operand operand() {
    return {rows, cols, sizeof(T) == 8 ? STEEPEST_MATRIX_FLOAT64 : STEEPEST_MATRIX_FLOAT32, 0, at, ld, rows * ld};
  }
};

void must(steepest_status status) {
  if (status == STEEPEST_OK) return;
  std::printf("%s\n", steepest_last_error());
  std::exit(2);
}

void run(std::vector<steepest_matrix_operand> operands, std::vector<steepest_matrix_op> ops, int threads,
         int64_t batch = 1) {
  steepest_exec exec = {};
  exec.struct_size = sizeof exec;
  exec.num_threads = threads;
  const steepest_matrix_program program = {sizeof program,
                                           batch,
                                           static_cast<int64_t>(operands.size()),
                                           operands.data(),
                                           static_cast<int64_t>(ops.size()),
                                           ops.data()};
  uint64_t bytes = 0;
  must(steepest_matrix_workspace_size(&exec, &program, &bytes));
  std::vector<uint64_t> workspace(bytes / 8 + 1, ~uint64_t{0});  // NaN
  must(steepest_matrix_run(&exec, &program, workspace.data(), bytes, nullptr));
}

// d = alpha op(a) op(b) + beta c + gamma I straight from and to arrays, and by way of scratch.
template <class T>
void check_product(int64_t m, int64_t n, int64_t k, uint32_t flags, bool symmetric, int threads, bool by_scratch) {
  const bool ta = flags & STEEPEST_MATRIX_TRANSPOSE_A, tb = flags & STEEPEST_MATRIX_TRANSPOSE_B;
  Array<T> a(ta ? k : m, ta ? m : k, 3, 1), b(tb ? n : k, tb ? k : n, 0, 2), c(m, n, 1, 3), d(m, n, 5, 1);
  const int32_t kind = symmetric ? STEEPEST_MATRIX_SYMMETRIC : STEEPEST_MATRIX_PRODUCT;
  const double alpha = 0.5, beta = -2, gamma = symmetric ? 3 : 0;
  std::vector<steepest_matrix_operand> operands = {a.operand(), b.operand(), c.operand(), d.operand()};
  std::vector<steepest_matrix_op> ops = {{kind, flags, 3, 0, 1, 2, alpha, beta, gamma}};
  if (by_scratch) {
    for (int i = 0; i < 4; ++i) {
      operands.push_back(operands[i]);
      operands.back().data = nullptr;
    }
    const auto copy = [](int32_t to, int32_t from) {
      return steepest_matrix_op{STEEPEST_MATRIX_COMBINE, 0, to, from, -1, -1, 1, 0, 0};
    };
    ops = {copy(4, 0), copy(5, 1), copy(6, 2), {kind, flags, 7, 4, 5, 6, alpha, beta, gamma}, copy(3, 7)};
  }
  run(operands, ops, threads);
  const double unit = sizeof(T) == 8 ? 0x1p-53 : 0x1p-24;
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      const bool above = symmetric && j > i;  // comes from below
      const int64_t p = above ? j : i, q = above ? i : j;
      double sum = beta * c.get(p, q, false) + (p == q ? gamma : 0), size = std::fabs(beta * c.get(p, q, false)) + gamma;
      for (int64_t t = 0; t < k; ++t) {
        const double term = alpha * a.get(p, t, ta) * b.get(t, q, tb);
        sum += term, size += std::fabs(term);
      }
      const double off = std::fabs(d.get(i, j, false) - sum), bound = (static_cast<double>(k) + 4) * 2 * unit * size;
      if (!(off <= bound)) return fail(symmetric ? "symmetric" : "product", m, n, k, off, bound);
    }
}

// Every task of a product that is cut in squares of `side`, and the operations that they say they executed: strips of 8
// rows by whole granules of 16 columns, of a symmetric product those that reach to the diagonal.
template <class T>
void check_tasks(int64_t m, int64_t n, int64_t k, int64_t side, bool symmetric, bool of_itself, bool tb = true) {
  using namespace steepest::matrix;
  Array<T> a(m, k, 3, 1), b(tb ? n : k, tb ? k : n, 0, 2), c(m, n, 1, 3), d(m, n, 5, 1);
  const auto operand = [](const Array<T> &x) { return Operand<T>{x.at, x.rows, x.cols, x.ld, false}; };
  const Array<T> &right = of_itself ? a : b;
  const T gamma = symmetric ? T(1) : T(0);
  const Product<T> product = {operand(d), operand(a), operand(right), operand(c), false, tb,
                              symmetric,  T(0.5),     T(-2),          gamma,      k,     side};
  std::fill_n(d.at, (m - 1) * d.ld + n, std::numeric_limits<T>::quiet_NaN());
  const auto buffers = std::make_unique<Buffers<T>>();
  int64_t tasks = 0, executed = 0, expected = 0;
  for (int64_t top = 0; top < m; top += side)
    for (int64_t left = 0; left < n; left += side) {
      if (symmetric && left > top) continue;
      ++tasks;
      const int64_t bottom = std::min(m, top + side), edge = std::min(n, left + side);
      for (int64_t i = top; i < bottom; i += 8) {
        const int64_t end = symmetric ? std::min(edge, i + 8) : edge;
        expected += 2 * 8 * ((end + 15) / 16 * 16 - left) * k;
      }
    }
  if (product_tasks(m, n, symmetric, side) != tasks) return fail("tasks", m, n, side, product_tasks(m, n, symmetric, side), tasks);
  for (int64_t task = 0; task < tasks; ++task) executed += run_product_task(product, task, *buffers);
  if (executed != expected) return fail("operations", m, n, side, executed, expected);
  const double unit = sizeof(T) == 8 ? 0x1p-53 : 0x1p-24;
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      const int64_t p = symmetric ? std::max(i, j) : i, q = symmetric ? std::min(i, j) : j;
      double sum = -2 * c.get(p, q, false) + (p == q ? gamma : 0), size = std::fabs(2 * c.get(p, q, false)) + gamma;
      for (int64_t t = 0; t < k; ++t) {
        const double term = 0.5 * a.get(p, t, false) * right.get(t, q, tb);
        sum += term, size += std::fabs(term);
      }
      const double off = std::fabs(d.get(i, j, false) - sum), bound = (static_cast<double>(k) + 4) * 2 * unit * size;
      if (!(off <= bound)) return fail(of_itself ? "tasks of X and X" : "tasks", m, n, side, off, bound);
    }
}

// The loops of one instruction set, with the vectors' and the scalar edges.
template <class T>
void check_loops(const char *name, const steepest::matrix::Kernels<T> &loops) {
  const double unit = sizeof(T) == 8 ? 0x1p-53 : 0x1p-24;
  for (const int64_t width : {16, 32, 48})
    for (const int64_t k : {0, 1, 7, 100}) {
      Array<T> a(k, 8, 1, 1), b(k, width, 2, 3), c(8, width, 1, 1), d(8, width, 3, 2);
      for (const bool with_c : {false, true}) {
        loops.tile(a.at, a.ld, b.at, b.ld, k, width, T(2), T(-3), with_c ? c.at : nullptr, c.ld, d.at, d.ld, b.at);
        for (int64_t i = 0; i < 8; ++i)
          for (int64_t j = 0; j < width; ++j) {
            double sum = with_c ? -3 * c.get(i, j, false) : 0, size = std::fabs(sum);
            for (int64_t t = 0; t < k; ++t)
              sum += 2 * a.get(t, i, false) * b.get(t, j, false),
                  size += std::fabs(2 * a.get(t, i, false) * b.get(t, j, false));
            const double off = std::fabs(d.get(i, j, false) - sum), bound = (static_cast<double>(k) + 4) * 2 * unit * size;
            if (!(off <= bound)) return fail(name, 8, width, k, off, bound);
          }
      }
    }
  for (const int64_t rows : {1, 7, 8, 9, 24})
    for (const int64_t cols : {1, 8, 13, 16}) {
      Array<T> from(rows, cols, 1, 1), to(cols, rows, 2, 3);
      loops.transpose(from.at, from.ld, to.at, to.ld, rows, cols);
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < cols; ++j)
          if (to.get(j, i, false) != from.get(i, j, false)) return fail(name, rows, cols, 0, 1, 0);
    }
  for (const int64_t n : {1, 2, 8, 9, 16, 31, 48}) {
    Array<T> d(n, n, 1, 1), before(n, n, 0, 0);
    for (int64_t i = 0; i < n; ++i) std::copy_n(d.at + i * d.ld, n, before.at + i * n);
    loops.mirror(d.at, d.ld, n);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < n; ++j)
        if (d.get(i, j, false) != (j > i ? before.get(j, i, false) : before.get(i, j, false)))
          return fail("mirror", n, n, 0, 1, 0);
  }
  for (const int64_t n : {1, 31, 32, 33, 100}) {
    Array<T> x(1, n, 0, 1), y(1, n, 0, 3), z(1, n, 0, 0);
    double squares = 0, magnitudes = 0, averages = 0;
    for (int64_t j = 0; j < n; ++j) {
      const double p = x.at[j], q = y.at[j];
      squares += p * p, magnitudes += std::fabs(p + q) / 2, averages += (p + q) * (p + q) / 16;
    }
    const double found[3] = {loops.sum_squares(x.at, n), loops.sum_magnitudes(x.at, y.at, n),
                             loops.average(x.at, y.at, n, 0.25)};
    const double right[3] = {squares, magnitudes, averages};
    for (int i = 0; i < 3; ++i)
      if (!(std::fabs(found[i] - right[i]) <= (i == 2 ? 4 * unit : 1e-13) * right[i])) return fail(name, 1, n, i, found[i], right[i]);
    loops.scale(x.at, z.at, n, 3.0);
    for (int64_t j = 0; j < n; ++j)
      if (z.at[j] != static_cast<T>(3.0 * x.at[j])) return fail("scale", 1, n, 0, z.at[j], 3.0 * x.at[j]);
    loops.combine(x.at, y.at, z.at, n, T(2), T(-1));
    for (int64_t j = 0; j < n; ++j)
      if (std::fabs(z.at[j] - (2.0 * x.at[j] - y.at[j])) > 2 * unit * (2 * std::fabs(x.at[j]) + std::fabs(y.at[j])))
        return fail("combine", 1, n, 0, z.at[j], 2.0 * x.at[j] - y.at[j]);
  }
}

// What is given out covers every part once, in whole panels, and nothing else.
template <class T>
void check_ahead(int64_t piece) {
  using namespace steepest::matrix;
  constexpr int64_t kRows = 40, kApart = kRows * kPanel, kPanels = 5;
  // Rows from `top` on, columns from `left` on, and the panels that these lie in.
  struct Part {
    int64_t top, rows, left, cols, first, last;
  };
  const Part parts[] = {{3, 9, 47, 2, 0, 1}, {0, 40, 96, 97, 2, 4}, {7, 1, 100, 1, 2, 2}, {5, 3, 0, 96, 0, 1}, {39, 1, 48, 192, 1, 4}};
  std::vector<T> memory(kPanels * kApart);
  const Operand<T> x = {memory.data(), kRows, kPanels * kPanel, kPanel, kApart};
  for (const Part &one : parts)
    for (const Part &two : parts) {
      Ahead<T> ahead;
      ahead.add({memory.data(), kRows, 100, 100, 0}, 0, 8, 0, 48);  // not in panels
      ahead.add(x, 0, 0, 0, 48), ahead.add(x, 0, -3, 0, 48), ahead.add(x, 0, 8, 0, 0), ahead.add(x, 0, 8, 0, -1);
      ahead.add(x, one.top, one.rows, one.left, one.cols), ahead.add(x, two.top, two.rows, two.left, two.cols);
      for (const Part &part : {one, two})
        for (int64_t panel = part.first; panel <= part.last; ++panel)
          for (int64_t at = 0; at < part.rows * kPanel; at += piece) {
            const T *const expected = x.place(part.top, panel * kPanel) + at, *const found = ahead.take(piece);
            if (found != expected) return fail("ahead", part.top, part.left, piece, found - memory.data(), expected - memory.data());
          }
      if (ahead.take(piece)) return fail("ahead: more than was asked for", one.left, two.left, piece, 1, 0);
    }
}

// The workspace may begin at any byte; nothing before its first and behind its last is touched.
void check_workspace_places() {
  Array<float> a(30, 50, 3, 1), d(30, 50, 2, 1);
  steepest_matrix_operand scratch = a.operand();
  scratch.data = nullptr;
  const steepest_matrix_operand operands[] = {scratch, a.operand(), d.operand()};
  const steepest_matrix_op ops[] = {{STEEPEST_MATRIX_COMBINE, 0, 0, 1, -1, -1, 2, 0, 0},
                                    {STEEPEST_MATRIX_COMBINE, 0, 2, 0, -1, -1, 2, 0, 0}};
  const steepest_matrix_program program = {sizeof program, 1, 3, operands, 2, ops};
  steepest_exec exec = {};
  exec.struct_size = sizeof exec;
  exec.num_threads = 1;
  uint64_t bytes = 0;
  must(steepest_matrix_workspace_size(&exec, &program, &bytes));
  constexpr int64_t kBefore = 128;
  for (int64_t shift = 0; shift < 64; ++shift) {
    const auto memory = std::make_unique<unsigned char[]>(kBefore + shift + bytes);
    std::fill_n(memory.get(), kBefore + shift + bytes, 0xa5);
    std::fill_n(d.at, 29 * d.ld + 50, std::numeric_limits<float>::quiet_NaN());
    must(steepest_matrix_run(&exec, &program, memory.get() + kBefore + shift, bytes, nullptr));
    for (int64_t i = 0; i < kBefore + shift; ++i)
      if (memory[i] != 0xa5) return fail("before the workspace", shift, i - kBefore - shift, 0, memory[i], 0xa5);
    for (int64_t i = 0; i < 30; ++i)
      for (int64_t j = 0; j < 50; ++j)
        if (d.get(i, j, false) != 4 * a.get(i, j, false)) return fail("workspace", shift, i, j, d.get(i, j, false), 4 * a.get(i, j, false));
  }
}

// A part onto another, in rows and in panels, and nothing beside it.
template <class T>
void check_transpose_part(bool from_panels, bool to_panels) {
  using namespace steepest::matrix;
  constexpr int64_t kRows = 120, kCols = 152, kStored = 160;  // columns in whole panels: 144 and 192
  const auto operand = [](std::vector<T> &memory, bool panels) {
    return Operand<T>{memory.data(), kRows, kCols, panels ? kPanel : kStored, panels ? kRows * kPanel : 0};
  };
  const int64_t places[][6] = {{0, 0, 8, 16, 0, 0},   {3, 5, 1, 1, 7, 9},     {0, 0, 120, 100, 0, 32},
                               {1, 40, 60, 20, 2, 40}, {9, 47, 90, 100, 3, 47}, {50, 90, 17, 62, 48, 96},
                               {8, 96, 48, 48, 0, 48}, {31, 1, 2, 119, 1, 150}, {0, 49, 101, 50, 49, 51}};
  for (const auto &[top, left, rows, cols, row, col] : places) {
    std::vector<T> source(kRows * 192), target(kRows * 192, T(-1));
    for (size_t i = 0; i < source.size(); ++i) source[i] = static_cast<T>(i);
    const Operand<T> from = operand(source, from_panels), to = operand(target, to_panels);
    transpose_part(from, top, left, rows, cols, to, row, col);
    for (int64_t i = 0; i < kRows; ++i)
      for (int64_t j = 0; j < kCols; ++j) {
        const bool inside = i >= row && i < row + cols && j >= col && j < col + rows;
        const T expected = inside ? *from.place(top + j - col, left + i - row) : T(-1);
        if (*to.place(i, j) != expected) return fail("transposed part", top, left, i * 1000 + j, *to.place(i, j), expected);
      }
    int64_t written = 0;
    for (const T x : target) written += x != T(-1);
    if (written != rows * cols) return fail("transposed part: elements written", rows, cols, 0, written, rows * cols);
  }
}

// Y = (A + A^T) / (2 r) with its sizes, and A / ||A||, of matrices that several tasks share from some 130 rows on.
template <class T>
void check_of_whole_matrices(int64_t n, int64_t m, int threads) {
  Array<T> a(n, n, 3, 1), y(n, n, 5, 2), x(n, m, 1, 3), u(n, m, 2, 1);
  Array<double> sizes(1, 2, 0, 1);
  run({a.operand(), y.operand(), sizes.operand(), x.operand(), u.operand()},
      {{STEEPEST_MATRIX_SYMMETRISE, 0, 1, 0, -1, 2, 1, 0, 0}, {STEEPEST_MATRIX_NORMALISE, 0, 4, 3, -1, -1, 2, 0, 0}}, threads);
  double largest = 0, squares = 0, total = 0;
  for (int64_t i = 0; i < n; ++i) {
    double sum = 0;
    for (int64_t j = 0; j < n; ++j) sum += std::fabs(a.get(i, j, false) + a.get(j, i, false)) / 2;
    largest = std::max(largest, sum);
    for (int64_t j = 0; j < m; ++j) total += x.get(i, j, false) * x.get(i, j, false);
  }
  // Sums and quotients are of doubles; elements are rounded by their sum, by their quotient and at the end.
  const double unit = sizeof(T) == 8 ? 0x1p-53 : 0x1p-24, of_sums = static_cast<double>(n * n + n * m) * 0x1p-53;
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      const double expected = (a.get(i, j, false) + a.get(j, i, false)) / (2 * largest), off = y.get(i, j, false) - expected;
      const double bound = (4 * unit + of_sums) * (std::fabs(a.get(i, j, false)) + std::fabs(a.get(j, i, false))) / largest;
      squares += expected * expected;
      if (!(std::fabs(off) <= bound)) return fail("symmetrised", i, j, n, off, bound);
    }
    for (int64_t j = 0; j < m; ++j) {
      const double expected = 2 * x.get(i, j, false) / std::sqrt(total), off = u.get(i, j, false) - expected;
      const double bound = (2 * unit + of_sums) * std::fabs(expected);
      if (!(std::fabs(off) <= bound)) return fail("normalised", i, j, n, off, bound);
    }
  }
  const double expected[] = {largest, std::sqrt(squares)};
  for (int k = 0; k < 2; ++k)
    if (!(std::fabs(sizes.at[k] - expected[k]) <= (4 * unit + of_sums) * expected[k]))
      return fail("size", n, m, k, sizes.at[k], expected[k]);
}

// A chain of operations on a batch of matrices, by as many threads as come, equals that on each of them alone.
void check_batch(int64_t n, int64_t batch, int threads, bool products) {
  Array<float> a(batch * n, n, 0, 1), d(batch * n, n, 0, 2), alone(n, n, 0, 3);
  const auto operand = [&](float *at) {
    return steepest_matrix_operand{n, n, STEEPEST_MATRIX_FLOAT32, 0, at, n, n * n};
  };
  std::vector<steepest_matrix_operand> operands(5, operand(nullptr));
  std::vector<steepest_matrix_op> ops = {{STEEPEST_MATRIX_SYMMETRIC, STEEPEST_MATRIX_TRANSPOSE_B, 1, 0, 0, -1, 1, 0, 0},
                                         {STEEPEST_MATRIX_COMBINE, 0, 2, 1, -1, -1, 2, 0, 1},
                                         {STEEPEST_MATRIX_NORMALISE, 0, 3, 2, -1, -1, 1, 0, 0},
                                         {STEEPEST_MATRIX_PRODUCT, 0, 4, 3, 0, 1, 1, 1, 0}};
  if (!products) {
    ops.clear();
    for (int32_t i = 0; i < 4; ++i) ops.push_back({STEEPEST_MATRIX_COMBINE, 0, i + 1, i, -1, -1, 2, 0, 1});
  }
  const auto chain = [&](float *from, float *to, int64_t matrices, int with) {
    operands[0] = operand(from), operands[4] = operand(to);
    run(operands, ops, with, matrices);
  };
  std::fill_n(d.at, batch * n * n, std::numeric_limits<float>::quiet_NaN());
  chain(a.at, d.at, batch, threads);
  for (int64_t k = 0; k < batch; ++k) {
    chain(a.at + k * n * n, alone.at, 1, 1);
    for (int64_t i = 0; i < n * n; ++i)
      if (d.at[k * n * n + i] != alone.at[i]) return fail("batch: matrix", k, threads, i, d.at[k * n * n + i], alone.at[i]);
  }
}

}  // namespace

int main() {
  using namespace steepest::matrix;
  check_loops("base float", base::kSet<float>);
  check_loops("base double", base::kSet<double>);
#if STEEPEST_HAS_CLONES
  if (isa() != Isa::base) {
    check_loops("v3 float", v3::kSet<float>);
    check_loops("v3 double", v3::kSet<double>);
  }
  if (isa() == Isa::v4) {
    check_loops("v4 float", v4::kSet<float>);
    check_loops("v4 double", v4::kSet<double>);
  }
#endif
  const int64_t shapes[][3] = {{1, 1, 1}, {3, 5, 7}, {8, 16, 9}, {17, 50, 0}, {9, 100, 130}, {50, 33, 260}, {200, 60, 20}};
  for (const auto &[m, n, k] : shapes)
    for (uint32_t flags = 0; flags < 4; ++flags)
      for (const int threads : {1, 2})
        for (const bool by_scratch : {false, true}) {
          check_product<float>(m, n, k, flags, false, threads, by_scratch);
          check_product<float>(m, m, k, flags, true, threads, by_scratch);
          check_product<double>(m, n, k, flags, false, threads, by_scratch);
          check_product<double>(m, m, k, flags, true, threads, by_scratch);
        }
  // Shared by threads: several tasks, more than one packed run.
  for (const bool by_scratch : {false, true}) {
    check_product<float>(210, 410, 300, STEEPEST_MATRIX_TRANSPOSE_A, false, 3, by_scratch);
    check_product<float>(410, 410, 270, STEEPEST_MATRIX_TRANSPOSE_B, true, 3, by_scratch);
  }
  for (const int64_t side : {16, 48, 64, 96, 144})
    for (const int64_t n : {1, 16, 49, 63, 64, 65, 150, 200}) {
      check_tasks<float>(90, n, 300, side, false, false);
      check_tasks<float>(n, n, 70, side, true, false);
      check_tasks<float>(n, n, 300, side, true, true);
      check_tasks<float>(n, n, n, side, false, true, false);
      check_tasks<double>(n, 70, 20, side, false, false, false);
      check_tasks<double>(n, n, 150, side, true, true);
    }
  for (const bool from_panels : {false, true})
    for (const bool to_panels : {false, true}) {
      check_transpose_part<float>(from_panels, to_panels);
      check_transpose_part<double>(from_panels, to_panels);
    }
  for (const int64_t n : {1, 7, 50, 150, 300})
    for (const int threads : {1, 3}) {
      check_of_whole_matrices<float>(n, 2 * n + 1, threads);
      check_of_whole_matrices<double>(n, 2 * n + 1, threads);
    }
  check_workspace_places();
  for (int repeat = 0; repeat < 3; ++repeat) check_batch(40, 48, 4, true);  // matrices for threads that come free
  check_batch(200, 2, 3, true);                                            // threads that share each
  check_batch(1100, 2, 1, false);  // scratch beyond what is taken for one thread's
  for (const int64_t piece : {16, 48, 100, 432, 5000}) check_ahead<float>(piece), check_ahead<double>(piece);
  std::printf("%s, %d failures\n", clone_name(), failures);
  return failures != 0;
}
