// Threads over a batch of matrices, or over the parts of one matrix's operations.
#include "matrix/program.h"

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>

#include "matrix/product.h"

namespace steepest::matrix {
namespace {

constexpr int64_t kAlign = 64;
// A thread that is woken for less than this costs more than it saves (5 us at 100 GFLOP/s); so does meeting at the end of
// an operation that is shared.
constexpr double kLeastShare = 5e5;
constexpr double kLeastShared = 1e6;
constexpr int64_t kMostScratch = 4 << 20;
constexpr int64_t kElementsPerTask = 1 << 14;  // of elementwise operations

int64_t element_size(const steepest_matrix_operand &x) { return x.dtype == STEEPEST_MATRIX_FLOAT64 ? 8 : 4; }

// Elements from one panel of scratch to the next.
int64_t scratch_panel(const steepest_matrix_operand &x) { return round_up(std::max<int64_t>(1, x.rows), kStrip) * kPanel; }

int64_t scratch_bytes(const steepest_matrix_operand &x) {
  return x.data ? 0 : scratch_panel(x) * round_up(x.cols, kPanel) / kPanel * element_size(x);
}

bool is_product(const steepest_matrix_op &op) {
  return op.kind == STEEPEST_MATRIX_SYMMETRIC || op.kind == STEEPEST_MATRIX_PRODUCT;
}

// Threads that share an operation meet after each.
int phases(const steepest_matrix_op &op) {
  switch (op.kind) {
    case STEEPEST_MATRIX_SYMMETRISE: return 3;
    case STEEPEST_MATRIX_NORMALISE:
    case STEEPEST_MATRIX_NORM: return 2;
    default: return 1;
  }
}

// Whether the result is a number of the whole of a.
bool reads_whole(const steepest_matrix_op &op) {
  return op.kind == STEEPEST_MATRIX_NORM || op.kind == STEEPEST_MATRIX_SPECTRAL_BOUND;
}

// The operand whose rows are shared out.
const steepest_matrix_operand &shape_of(const steepest_matrix_program &p, const steepest_matrix_op &op) {
  return p.operands[reads_whole(op) ? op.a : op.d];
}

int64_t terms_of(const steepest_matrix_program &p, const steepest_matrix_op &op) {
  const steepest_matrix_operand &a = p.operands[op.a];
  return op.flags & STEEPEST_MATRIX_TRANSPOSE_A ? a.rows : a.cols;
}

// How a program is spread over threads.
struct Spread {
  int threads = 1;
  bool batched = true;  // a thread takes whole matrices; else all threads share each operation
  int64_t offsets = 0;  // bytes for where each scratch operand begins in its set
  int64_t scratch = 0;  // bytes of one set of scratch operands
  int64_t sums = 0;     // bytes for the rows' sums of squares
  int64_t thread_bytes = 0, shared_bytes = 0;

  Spread(const steepest_exec &exec, const steepest_matrix_program &p) {
    double work = 0, largest = 0;  // of one matrix, of one operation
    for (int64_t i = 0; i < p.num_ops; ++i) {
      const steepest_matrix_op &op = p.ops[i];
      const steepest_matrix_operand &d = shape_of(p, op);
      // An element of an elementwise operation takes about as long as 32 operations of a product.
      const double each = is_product(op) ? (op.kind == STEEPEST_MATRIX_SYMMETRIC ? 1.0 : 2.0) * terms_of(p, op) : 32.0;
      const double cost = each * static_cast<double>(d.rows) * static_cast<double>(d.cols);
      work += cost, largest = std::max(largest, cost);
      if (phases(op) > 1) sums = std::max<int64_t>(sums, round_up(2 * d.rows * 8, kAlign));
    }
    for (int64_t i = 0; i < p.num_operands; ++i) scratch += scratch_bytes(p.operands[i]);
    offsets = round_up(p.num_operands * 8, kAlign);
    const int allowed = exec.num_threads > 0 ? exec.num_threads : omp_get_max_threads();
    const int useful = static_cast<int>(std::clamp(work * static_cast<double>(p.batch) / kLeastShare, 1.0, 1e6));
    threads = std::min(allowed, useful);
    // Whole matrices, where they stay in cache and the last round leaves few threads without one.
    const int64_t rounds = (p.batch + threads - 1) / threads;
    batched = scratch <= kMostScratch && p.batch >= threads && rounds * threads - p.batch <= p.batch / 8;
    if (!batched && largest < kLeastShared) {
      batched = true;
      threads = static_cast<int>(std::min<int64_t>(threads, std::max<int64_t>(p.batch, 1)));
    }
    const int64_t buffers = round_up(std::max(sizeof(Buffers<float>), sizeof(Buffers<double>)), kAlign);
    thread_bytes = buffers + (batched ? scratch + sums : 0);
    shared_bytes = batched ? 0 : scratch + sums;
  }

  uint64_t bytes() const { return static_cast<uint64_t>(kAlign + offsets + shared_bytes + threads * thread_bytes); }
};

// One matrix of the batch with a set of scratch operands.
class Chain {
 public:
  Chain(const steepest_matrix_program &program, const int64_t *offsets, char *scratch, double *sums, int sharers)
      : p_(program), offsets_(offsets), scratch_(scratch), sums_(sums), sharers_(sharers) {}

  void take(int64_t matrix) { matrix_ = matrix; }

  int64_t tasks(const steepest_matrix_op &op) const {
    const steepest_matrix_operand &d = shape_of(p_, op);
    if (is_product(op)) return product_tasks(d.rows, d.cols, op.kind == STEEPEST_MATRIX_SYMMETRIC, side(op));
    return (d.rows + rows_per_task(d) - 1) / rows_per_task(d);
  }

  // Returns the floating-point operations of products.
  int64_t run(const steepest_matrix_op &op, int phase, int64_t task, char *buffers) const {
    return shape_of(p_, op).dtype == STEEPEST_MATRIX_FLOAT64 ? run_as<double>(op, phase, task, buffers)
                                                             : run_as<float>(op, phase, task, buffers);
  }

 private:
  // Shared operations want a few tasks for every thread.
  int64_t side(const steepest_matrix_op &op) const {
    if (sharers_ == 1) return kMostSide;
    const steepest_matrix_operand &d = p_.operands[op.d];
    for (const int64_t side : {kMostSide, int64_t{288}, int64_t{192}, int64_t{144}, int64_t{96}})
      if (product_tasks(d.rows, d.cols, op.kind == STEEPEST_MATRIX_SYMMETRIC, side) >= 5 * sharers_) return side;
    return kPanel;
  }

  static int64_t rows_per_task(const steepest_matrix_operand &x) {
    return std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, x.cols));
  }

  template <class T>
  Operand<T> operand(int32_t number) const {
    if (number < 0) return {};
    const steepest_matrix_operand &x = p_.operands[number];
    if (!x.data)
      return {reinterpret_cast<T *>(scratch_ + offsets_[number]), x.rows, x.cols, kPanel, scratch_panel(x)};
    return {static_cast<T *>(x.data) + matrix_ * x.stride, x.rows, x.cols, x.ld, 0};
  }

  template <class T>
  int64_t run_as(const steepest_matrix_op &op, int phase, int64_t task, char *buffers) const {
    if (is_product(op)) {
      const Product<T> product = {operand<T>(op.d),
                                  operand<T>(op.a),
                                  operand<T>(op.b),
                                  operand<T>(op.c),
                                  (op.flags & STEEPEST_MATRIX_TRANSPOSE_A) != 0,
                                  (op.flags & STEEPEST_MATRIX_TRANSPOSE_B) != 0,
                                  op.kind == STEEPEST_MATRIX_SYMMETRIC,
                                  static_cast<T>(op.alpha),
                                  static_cast<T>(op.beta),
                                  static_cast<T>(op.gamma),
                                  terms_of(p_, op),
                                  side(op)};
      return run_product_task(product, task, *reinterpret_cast<Buffers<T> *>(buffers));
    }
    const steepest_matrix_operand &shape = shape_of(p_, op);
    const int64_t begin = task * rows_per_task(shape), end = std::min(shape.rows, begin + rows_per_task(shape));
    switch (op.kind) {
      case STEEPEST_MATRIX_COMBINE: combine<T>(op, begin, end); break;
      case STEEPEST_MATRIX_NORMALISE: normalise<T>(op, phase, begin, end); break;
      case STEEPEST_MATRIX_NORM: norm<T>(op, phase, begin, end); break;
      case STEEPEST_MATRIX_DIVIDE: divide<T>(op, begin, end); break;
      case STEEPEST_MATRIX_SPECTRAL_BOUND: spectral_bound<T>(op, begin); break;
      default: symmetrise<T>(op, phase, begin, end);
    }
    return 0;
  }

  // what(i, j, n) for all rows in [begin, end), n elements from column j on, that lie one after another in all operands.
  template <class What, class... Operands>
  static void each_part(int64_t begin, int64_t end, int64_t cols, const What &what, const Operands &...x) {
    for (int64_t j = 0, n; j < cols; j += n) {
      n = std::min({cols - j, x.together(j)...});
      for (int64_t i = begin; i < end; ++i) what(i, j, n);
    }
  }

  template <class T>
  void combine(const steepest_matrix_op &op, int64_t begin, int64_t end) const {
    const Operand<T> d = operand<T>(op.d), c = operand<T>(op.c);
    if (p_.operands[op.a].dtype != p_.operands[op.d].dtype) {
      const Operand<OtherType<T>> a = operand<OtherType<T>>(op.a);
      const auto part = [&](int64_t i, int64_t j, int64_t n) {
        kernels<T>().convert(a.place(i, j), d.place(i, j), n, op.alpha);
      };
      each_part(begin, end, d.cols, part, a, d);
    } else {
      const Operand<T> a = operand<T>(op.a);
      const auto part = [&](int64_t i, int64_t j, int64_t n) {
        kernels<T>().combine(a.place(i, j), c.at ? c.place(i, j) : nullptr, d.place(i, j), n, static_cast<T>(op.alpha),
                             static_cast<T>(op.beta));
      };
      each_part(begin, end, d.cols, part, a, c.at ? c : d, d);
    }
    if (op.gamma != 0)
      for (int64_t i = begin; i < std::min(end, d.cols); ++i) *d.place(i, i) += static_cast<T>(op.gamma);
  }

  // The squares of float32 numbers, subnormal ones too, are within the range of double.
  template <class T>
  void sum_rows(const Operand<T> &a, int64_t begin, int64_t end) const {
    std::fill(sums_ + begin, sums_ + end, 0.0);
    const auto part = [&](int64_t i, int64_t j, int64_t n) { sums_[i] += kernels<T>().sum_squares(a.place(i, j), n); };
    each_part(begin, end, a.cols, part, a);
  }

  double total_of(int64_t rows) const {
    double total = 0;
    for (int64_t i = 0; i < rows; ++i) total += sums_[i];
    return total;
  }

  template <class T>
  void norm(const steepest_matrix_op &op, int phase, int64_t begin, int64_t end) const {
    const Operand<T> a = operand<T>(op.a);
    if (phase == 0) return sum_rows(a, begin, end);
    const double total = begin == 0 ? total_of(a.rows) : 0;
    if (begin == 0) *operand<double>(op.d).at = std::isfinite(total) ? std::sqrt(total) : std::nan("");
  }

  template <class T>
  void divide(const steepest_matrix_op &op, int64_t begin, int64_t end) const {
    const Operand<T> d = operand<T>(op.d), a = operand<T>(op.a);
    const double by = *operand<double>(op.b).at, factor = op.alpha / std::pow(by == 0 ? 1.0 : by, op.gamma);
    scale<T>(a, d, begin, end, factor);
  }

  template <class T>
  void scale(const Operand<T> &a, const Operand<T> &d, int64_t begin, int64_t end, double factor) const {
    const auto part = [&](int64_t i, int64_t j, int64_t n) {
      kernels<T>().scale(a.place(i, j), d.place(i, j), n, factor);
    };
    each_part(begin, end, d.cols, part, a, d);
  }

  template <class T>
  static double squares_of_row(const Operand<T> &x, int64_t row) {
    double sum = 0;
    const auto part = [&](int64_t i, int64_t j, int64_t n) { sum += kernels<T>().sum_squares(x.place(i, j), n); };
    each_part(row, row + 1, x.cols, part, x);
    return sum;
  }

  // A few rows: the first task does it all.
  template <class T>
  void spectral_bound(const steepest_matrix_op &op, int64_t begin) const {
    if (begin > 0) return;
    const Operand<T> after = operand<T>(op.a), before = operand<T>(op.b);
    double growth = 0;  // of squares
    for (int64_t i = 0; i < after.rows; ++i) {
      const double to = squares_of_row(after, i), from = squares_of_row(before, i);
      const double ratio = to / (from == 0 ? 1.0 : from);
      growth = std::isnan(ratio) || ratio > growth ? ratio : growth;
    }
    const double norm = operand<double>(op.c).at[1];
    double bound = norm > 1 ? 1.0 : norm;  // NaN stays
    const double grown = 2 * std::sqrt(growth);
    bound = std::isnan(grown) || grown < bound ? grown : bound;
    *operand<double>(op.d).at = bound * (1 + 0x1p-12);
  }

  template <class T>
  void normalise(const steepest_matrix_op &op, int phase, int64_t begin, int64_t end) const {
    const Operand<T> d = operand<T>(op.d), a = operand<T>(op.a);
    if (phase == 0) return sum_rows(a, begin, end);
    const double total = total_of(a.rows);
    const double factor = std::isfinite(total) ? op.alpha / std::sqrt(total > 0 ? total : 1.0)
                                               : std::numeric_limits<double>::quiet_NaN();
    scale<T>(a, d, begin, end, factor);
  }

  // The rows' sums of magnitudes come first, then those of squares.
  template <class T>
  void symmetrise(const steepest_matrix_op &op, int phase, int64_t begin, int64_t end) const {
    const Operand<T> d = operand<T>(op.d), a = operand<T>(op.a);
    double *const squares = sums_ + d.rows;
    if (phase == 0) {
      transpose_part(a, 0, begin, a.rows, end - begin, d, begin, 0);
      std::fill(sums_ + begin, sums_ + end, 0.0);
      const auto part = [&](int64_t i, int64_t j, int64_t n) {
        sums_[i] += kernels<T>().sum_magnitudes(a.place(i, j), d.place(i, j), n);
      };
      return each_part(begin, end, d.cols, part, a, d);
    }
    double largest = 0;
    for (int64_t i = 0; i < d.rows; ++i) largest = std::isnan(sums_[i]) || sums_[i] > largest ? sums_[i] : largest;
    if (phase == 1) {
      const double factor = std::isfinite(largest) ? 0.5 * op.alpha / (largest > 0 ? largest : 1.0)
                                                   : std::numeric_limits<double>::quiet_NaN();
      std::fill(squares + begin, squares + end, 0.0);
      const auto part = [&](int64_t i, int64_t j, int64_t n) {
        squares[i] += kernels<T>().average(a.place(i, j), d.place(i, j), n, factor);
      };
      each_part(begin, end, d.cols, part, a, d);
    } else if (begin == 0) {
      double total = 0;
      for (int64_t i = 0; i < d.rows; ++i) total += squares[i];
      double *const sizes = operand<double>(op.c).at;
      sizes[0] = largest, sizes[1] = std::sqrt(total);
    }
  }

  const steepest_matrix_program &p_;
  const int64_t *offsets_;
  char *scratch_;
  double *sums_;
  int sharers_;
  int64_t matrix_ = 0;
};

// Every thread takes matrices as it comes free.
uint64_t run_batched(const Spread &spread, const steepest_matrix_program &p, const int64_t *offsets, char *memory) {
  std::atomic<int64_t> taken{0};
  std::atomic<uint64_t> flops{0};
  const auto work = [&](int thread) {
    char *const mine = memory + thread * spread.thread_bytes;
    Chain chain(p, offsets, mine, reinterpret_cast<double *>(mine + spread.scratch), 1);
    char *const buffers = mine + spread.scratch + spread.sums;
    uint64_t count = 0;
    for (int64_t k = taken++; k < p.batch; k = taken++) {
      chain.take(k);
      for (int64_t i = 0; i < p.num_ops; ++i)
        for (int phase = 0; phase < phases(p.ops[i]); ++phase)
          for (int64_t task = 0, tasks = chain.tasks(p.ops[i]); task < tasks; ++task)
            count += static_cast<uint64_t>(chain.run(p.ops[i], phase, task, buffers));
    }
    flops += count;
  };
  if (spread.threads == 1) {
    work(0);
  } else {
#pragma omp parallel num_threads(spread.threads)
    work(omp_get_thread_num());
  }
  return flops;
}

// All threads work on one matrix and meet after every phase of an operation.
uint64_t run_shared(const Spread &spread, const steepest_matrix_program &p, const int64_t *offsets, char *memory) {
  // Phase i counts its tasks in place i % 3, cleared after phase i - 3: two meetings lie between.
  std::atomic<int64_t> taken[3] = {};
  std::atomic<uint64_t> flops{0};
#pragma omp parallel num_threads(spread.threads)
  {
    const int thread = omp_get_thread_num();
    Chain chain(p, offsets, memory, reinterpret_cast<double *>(memory + spread.scratch), spread.threads);
    char *const buffers = memory + spread.shared_bytes + thread * spread.thread_bytes;
    uint64_t count = 0;
    int64_t number = 0;
    for (int64_t k = 0; k < p.batch; ++k) {
      chain.take(k);
      for (int64_t i = 0; i < p.num_ops; ++i)
        for (int phase = 0; phase < phases(p.ops[i]); ++phase, ++number) {
          std::atomic<int64_t> &next = taken[number % 3];
          const int64_t tasks = chain.tasks(p.ops[i]);
          for (int64_t task = next++; task < tasks; task = next++)
            count += static_cast<uint64_t>(chain.run(p.ops[i], phase, task, buffers));
#pragma omp barrier
          if (thread == 0) taken[number % 3] = 0;
        }
    }
    flops += count;
  }
  return flops;
}

}  // namespace

uint64_t workspace_bytes(const steepest_exec &exec, const steepest_matrix_program &program) {
  return Spread(exec, program).bytes();
}

uint64_t run(const steepest_exec &exec, const steepest_matrix_program &program, void *workspace) {
  const Spread spread(exec, program);
  char *const memory = reinterpret_cast<char *>((reinterpret_cast<uintptr_t>(workspace) + kAlign - 1) / kAlign * kAlign);
  int64_t *const offsets = reinterpret_cast<int64_t *>(memory);
  int64_t at = 0;
  for (int64_t i = 0; i < program.num_operands; ++i) offsets[i] = at, at += scratch_bytes(program.operands[i]);
  return (spread.batched ? run_batched : run_shared)(spread, program, offsets, memory + spread.offsets);
}

}  // namespace steepest::matrix
