// Random tensor lists in guarded memory, for comparing two engines.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "formula/number.h"
#include "formula/storage.h"
#include "steepest/steepest.h"

// Present only in a program linked with AddressSanitizer.
extern "C" void __asan_poison_memory_region(const volatile void *address, size_t size) __attribute__((weak));
extern "C" void __asan_unpoison_memory_region(const volatile void *address, size_t size) __attribute__((weak));

namespace lists {

// An array at a chosen distance from a 16-byte boundary.  Bytes around it are checked for changes; with
// AddressSanitizer there are none after it, and those before it are poisoned, as far as its 8-byte granules allow.
class Array {
 public:
  Array(size_t bytes, size_t offset) : bytes_(bytes), before_(kGuard + offset), after_(sanitized() ? 0 : kGuard) {
    memory_ = static_cast<unsigned char *>(std::malloc(before_ + bytes_ + after_));
    std::memset(memory_, kPattern, before_ + bytes_ + after_);
    if (sanitized()) __asan_poison_memory_region(memory_, before_ / 8 * 8);
  }
  Array(const Array &other) : Array(other.bytes_, other.before_ - kGuard) { std::memcpy(data(), other.data(), bytes_); }
  ~Array() {
    if (sanitized()) __asan_unpoison_memory_region(memory_, before_);
    std::free(memory_);
  }
  Array &operator=(const Array &) = delete;

  unsigned char *data() const { return memory_ + before_; }
  size_t bytes() const { return bytes_; }
  bool guards_intact() const {
    for (size_t i = sanitized() ? before_ / 8 * 8 : 0; i < before_; ++i)
      if (memory_[i] != kPattern) return false;
    for (size_t i = 0; i < after_; ++i)
      if (memory_[before_ + bytes_ + i] != kPattern) return false;
    return true;
  }

 private:
  static constexpr size_t kGuard = 64;
  static constexpr unsigned char kPattern = 0xa5;
  static bool sanitized() { return __asan_poison_memory_region != nullptr; }
  size_t bytes_, before_, after_;
  unsigned char *memory_;
};

struct Random {
  std::mt19937_64 engine;
  uint64_t below(uint64_t n) { return engine() % n; }
  bool one_in(uint64_t n) { return below(n) == 0; }
  double uniform() { return static_cast<double>(engine() >> 11) * 0x1p-53; }
  double normal() { return std::sqrt(-2 * std::log(1 - uniform())) * std::cos(6.283185307179586 * uniform()); }
};

// Types of residuals, numbered on from steepest_dtype.
enum { kInt8 = 4, kInt16 = 5 };

inline bool is_float(int32_t dtype) { return dtype < STEEPEST_BLOCK8; }
inline size_t size_of(int32_t dtype) {
  return dtype == STEEPEST_FLOAT32 ? 4 : dtype == STEEPEST_BLOCK8 || dtype == kInt8 ? 1 : 2;
}

inline void write(unsigned char *to, int32_t dtype, float x) {
  using namespace steepest;
  if (dtype == STEEPEST_FLOAT32) {
    std::memcpy(to, &x, 4);
  } else {
    const uint16_t bits = dtype == STEEPEST_BFLOAT16 ? narrow<bfloat16>(x).bits : narrow<float16>(x).bits;
    std::memcpy(to, &bits, 2);
  }
}

inline float read(const unsigned char *from, int32_t dtype) {
  using namespace steepest;
  float x;
  uint16_t bits;
  if (dtype == STEEPEST_FLOAT32) return std::memcpy(&x, from, 4), x;
  std::memcpy(&bits, from, 2);
  return dtype == STEEPEST_BFLOAT16 ? widen(bfloat16{bits}) : widen(float16{bits});
}

enum {
  kParam,
  kGrad,
  kFirstState,
  kKept = kFirstState + STEEPEST_MAX_STATES,  // master or residual
  kSource,
  kAverage,
  kFirstExponents,
  kRoles = kFirstExponents + STEEPEST_MAX_STATES
};
inline const char *const kRoleNames[kRoles] = {"param",  "grad",    "state 0",     "state 1",     "state 2",    "kept",
                                               "source", "average", "exponents 0", "exponents 1", "exponents 2"};

struct RuleChoice {
  int32_t rule;
  uint32_t flags;
  int states;
};
constexpr RuleChoice kRules[] = {{STEEPEST_SGD, 0, 0},
                                 {STEEPEST_SGD, STEEPEST_MOMENTUM, 1},
                                 {STEEPEST_SGD, STEEPEST_MOMENTUM | STEEPEST_NESTEROV, 1},
                                 {STEEPEST_ADAGRAD, 0, 1},
                                 {STEEPEST_RMSPROP, 0, 1},
                                 {STEEPEST_RMSPROP, STEEPEST_MOMENTUM, 2},
                                 {STEEPEST_RMSPROP, STEEPEST_CENTERED, 2},
                                 {STEEPEST_RMSPROP, STEEPEST_CENTERED | STEEPEST_MOMENTUM, 3},
                                 {STEEPEST_LION, 0, 1},
                                 {STEEPEST_SIGN, 0, 0},
                                 {STEEPEST_PERTURB, 0, 0},
                                 {STEEPEST_PERTURB, STEEPEST_BACKUP, 1},
                                 {STEEPEST_PERTURB, STEEPEST_POWER, 0},
                                 {STEEPEST_PERTURB, STEEPEST_BACKUP | STEEPEST_POWER, 1},
                                 {STEEPEST_RESTORE, 0, 0},
                                 {STEEPEST_ADAM, 0, 2},
                                 {STEEPEST_ADAM, STEEPEST_AMSGRAD, 3}};
constexpr int kRuleCount = sizeof kRules / sizeof kRules[0];

// How often each situation that the engine treats differently came up.
struct Coverage {
  int64_t lists = 0, tensors = 0, elements = 0, launches = 0, lists_of_several_launches = 0;
  int64_t empty = 0, aligned = 0, shifted = 0, apart = 0;  // tensors
  int64_t skipped = 0, scaled = 0, clipped = 0;            // lists
  int64_t masters = 0, residuals = 0, sources = 0, averages = 0, block8 = 0, stochastic = 0, noise = 0, mixed = 0;
  int64_t counted = 0, live = 0;
  int64_t rules[kRuleCount] = {};                          // lists
};

// The arguments of one call and the memory behind them.
class List {
 public:
  List(Random &random, int64_t largest, Coverage &coverage) {
    static const int32_t triples[5][3] = {{STEEPEST_FLOAT32, STEEPEST_FLOAT32, STEEPEST_FLOAT32},
                                          {STEEPEST_BFLOAT16, STEEPEST_BFLOAT16, STEEPEST_BFLOAT16},
                                          {STEEPEST_FLOAT16, STEEPEST_FLOAT16, STEEPEST_FLOAT16},
                                          {STEEPEST_BFLOAT16, STEEPEST_BFLOAT16, STEEPEST_FLOAT32},
                                          {STEEPEST_FLOAT16, STEEPEST_FLOAT16, STEEPEST_FLOAT32}};
    const int32_t *triple = triples[random.below(5)];
    set_types(triple[0], triple[1], triple[2]);
    // Half of the lists are Adam's, where most of the engine's own cases are.
    const int chosen = random.one_in(2) ? kRuleCount - 1 - static_cast<int>(random.below(2))
                                        : static_cast<int>(random.below(kRuleCount));
    choice_ = kRules[chosen];
    if (random.one_in(3)) choice_.flags |= STEEPEST_MAXIMIZE;
    if (random.one_in(2)) choice_.flags |= STEEPEST_DECOUPLED;
    if (choice_.flags & STEEPEST_DECOUPLED && random.one_in(3)) choice_.flags |= STEEPEST_CAUTIOUS;
    clip_value_ = random.one_in(4) ? 0.02 : 0.0;
    if (random.one_in(2)) choose_storage(random, coverage);
    special_values_ = random.one_in(4);
    const bool long_list = random.one_in(20);
    const int64_t tensors = long_list ? 600 + random.below(900) : 1 + random.below(12);
    const int64_t rows = random.one_in(8) ? tensors : 1 + random.below(3);
    for (int64_t i = 0; i < rows; ++i) add_hyper(random);
    for (int64_t i = 0; i < tensors; ++i) {
      numel_.push_back(random_numel(random, long_list ? 40 : largest));
      hyper_index_.push_back(rows == tensors ? static_cast<int32_t>(i) : static_cast<int32_t>(random.below(rows)));
      add_arrays(random, coverage);
    }
    if (random.one_in(2)) {
      static const float scales[] = {1.0f, 65536.0f, 0.37f, 3.0f};
      scale_.push_back(scales[random.below(4)]);
    }
    if (random.one_in(4)) coefficient_.push_back(random.one_in(2) ? 0.125f : 0.7f);
    if (random.one_in(2)) {
      static const float flags[] = {1.0f, std::numeric_limits<float>::quiet_NaN()};
      found_inf_.push_back(random.one_in(4) ? flags[random.below(2)] : 0.0f);
    }
    if (random.one_in(3)) count_on_device(random, coverage);
    coverage.lists += 1;
    coverage.tensors += tensors;
    coverage.rules[chosen] += 1;
    coverage.scaled += !scale_.empty();
    coverage.clipped += !coefficient_.empty() || clip_value_ > 0;
    coverage.skipped += skipped();
  }

  bool skipped() const { return !found_inf_.empty() && found_inf_[0] != 0.0f; }

  // Valid while this list lives and is not copied over.
  steepest_step_args args() {
    steepest_step_args a{};
    a.struct_size = sizeof a;
    a.num_tensors = static_cast<int64_t>(numel_.size());
    a.numel = numel_.data();
    for (int role = 0; role < kRoles; ++role) {
      address_[role].clear();
      for (const Array &array : arrays_[role]) address_[role].push_back(array.data());
    }
    for (size_t i = 0; i < numel_.size(); ++i) first_index_.push_back(static_cast<int64_t>(i) << 33 | 7);
    a.first_index = first_index_.data();
    a.seed = 1234567890123;
    a.rounding = stochastic_ ? STEEPEST_STOCHASTIC : STEEPEST_NEAREST;
    if (master_) a.masters = address_[kKept].data();
    if (residual_bits_) a.residuals = address_[kKept].data();
    a.residual_bits = residual_bits_;
    if (source_) a.sources = const_cast<const void *const *>(address_[kSource].data());
    if (average_) a.averages = address_[kAverage].data();
    for (int k = 0; k < choice_.states; ++k)
      if (dtype_[kFirstState] == STEEPEST_BLOCK8) a.state_exponents[k] = address_[kFirstExponents + k].data();
    a.params = address_[kParam].data();
    a.grads = const_cast<const void *const *>(address_[kGrad].data());
    for (int k = 0; k < choice_.states; ++k) a.states[k] = address_[kFirstState + k].data();
    a.param_dtype = dtype_[kParam];
    a.grad_dtype = dtype_[kGrad];
    a.state_dtype = dtype_[kFirstState];
    a.rule = choice_.rule;
    a.flags = choice_.flags;
    a.clip_value = clip_value_;
    a.clip_coefficient = coefficient_.empty() ? nullptr : coefficient_.data();
    a.num_hyper = static_cast<int64_t>(hyper_.size());
    a.hyper = hyper_.data();
    a.hyper_index = hyper_index_.data();
    a.grad_scale = scale_.empty() ? nullptr : scale_.data();
    a.found_inf = found_inf_.empty() ? nullptr : found_inf_.data();
    if (counters_.empty() || !counting_) return a;
    counter_address_.clear();
    for (size_t i = 0; i < numel_.size(); ++i) counter_address_.push_back(&counters_[i]);
    for (size_t k = 0; k < live_.size(); ++k)
      live_[k].value = live_[k].is_float64 ? static_cast<const void *>(&values_[k].wide) : &values_[k].narrow;
    rows_.resize(numel_.size());
    a.counters = counter_address_.data();
    a.num_live = static_cast<int64_t>(live_.size());
    a.live = live_.data();
    a.device_rows = rows_.data();
    return a;
  }

  bool counted() const { return !counters_.empty(); }

  // The same call with what the device would read written into its rows, one per tensor.
  List known_to_the_host() const {
    List out(*this);
    out.hyper_.clear();
    for (size_t i = 0; i < numel_.size(); ++i) {
      steepest_hyper hyper = hyper_[hyper_index_[i]];
      double *const fields[] = {&hyper.lr,  &hyper.weight_decay, &hyper.l1,        &hyper.beta1, &hyper.beta2,
                                &hyper.eps, &hyper.momentum,     &hyper.dampening, &hyper.alpha, &hyper.lr_decay};
      for (size_t k = 0; k < live_.size(); ++k)
        if (live_[k].row == hyper_index_[i])
          *fields[live_[k].field] = live_[k].is_float64 ? values_[k].wide : static_cast<double>(values_[k].narrow);
      hyper.step = static_cast<int64_t>(counters_[i]) + 1;
      out.hyper_.push_back(hyper);
      out.hyper_index_[i] = static_cast<int32_t>(i);
      out.counters_[i] += skipped() ? 0.0f : 1.0f;  // what they must become
    }
    out.counting_ = false;
    return out;
  }

  // "" when every element and guard byte of both lists is the same; NaN equals NaN, whatever its payload, since which
  // operand's payload survives is up to the compiler.
  std::string difference(const List &other) const {
    for (size_t i = 0; i < counters_.size(); ++i)
      if (counters_[i] != other.counters_[i])
        return "counter " + std::to_string(i) + " differs: " + std::to_string(counters_[i]) + ", " +
               std::to_string(other.counters_[i]);
    for (int role = 0; role < kRoles; ++role)
      for (size_t tensor = 0; tensor < arrays_[role].size(); ++tensor) {
        const Array &a = arrays_[role][tensor], &b = other.arrays_[role][tensor];
        const std::string name = std::string(kRoleNames[role]) + "[" + std::to_string(tensor) + "]";
        if (!a.guards_intact() || !b.guards_intact()) return name + ": memory around it was written to";
        const size_t size = size_of(dtype_[role]);
        for (size_t at = 0; at < a.bytes(); at += size) {
          if (std::memcmp(a.data() + at, b.data() + at, size) == 0) continue;
          if (!is_float(dtype_[role])) return name + " differs at element " + std::to_string(at / size);
          const float x = read(a.data() + at, dtype_[role]), y = read(b.data() + at, dtype_[role]);
          if (std::isnan(x) && std::isnan(y)) continue;
          return name + " differs at element " + std::to_string(at / size) + " of " + std::to_string(a.bytes() / size) +
                 ": " + std::to_string(x) + ", " + std::to_string(y);
        }
      }
    return "";
  }

 private:
  void set_types(int32_t param, int32_t grad, int32_t state) {
    const int32_t dtypes[kRoles] = {param, grad,  state, state, state, STEEPEST_FLOAT32, param, STEEPEST_FLOAT32,
                                    STEEPEST_BLOCK8, STEEPEST_BLOCK8, STEEPEST_BLOCK8};
    std::memcpy(dtype_, dtypes, sizeof dtype_);
  }

  // What the general kernel is for: other combinations of types, and every way to keep tensors that goes with them.
  void choose_storage(Random &random, Coverage &coverage) {
    const int32_t param = random.one_in(2) ? STEEPEST_BFLOAT16 : static_cast<int32_t>(random.below(3));
    const bool low = param != STEEPEST_FLOAT32, brain = param == STEEPEST_BFLOAT16;
    const bool block8 = random.one_in(3);
    const int32_t state = block8 ? STEEPEST_BLOCK8 : random.one_in(2) ? STEEPEST_FLOAT32 : param;
    set_types(param, random.one_in(3) ? static_cast<int32_t>(random.below(3)) : param, state);
    const uint64_t kept = random.below(4);
    master_ = low && kept == 0;
    residual_bits_ = brain && kept == 1 ? 8 : brain && kept == 2 ? 16 : 0;
    if (residual_bits_) dtype_[kKept] = residual_bits_ == 8 ? kInt8 : kInt16;
    source_ = !master_ && random.one_in(4);
    average_ = random.one_in(4);
    stochastic_ = brain && !residual_bits_ && !master_ && !random.one_in(4);
    noise_ = random.one_in(3);
    coverage.masters += master_, coverage.residuals += residual_bits_ != 0, coverage.sources += source_;
    coverage.averages += average_, coverage.block8 += block8 && choice_.states > 0;
    coverage.stochastic += stochastic_, coverage.noise += noise_;
    coverage.mixed += dtype_[kGrad] != param;
  }

  bool has(int role) const {
    if (role == kKept) return master_ || residual_bits_;
    if (role == kSource) return source_;
    if (role == kAverage) return average_;
    if (role >= kFirstExponents) return dtype_[kFirstState] == STEEPEST_BLOCK8 && role - kFirstExponents < choice_.states;
    return role < kFirstState + choice_.states;
  }

  static int64_t random_numel(Random &random, int64_t largest) {
    switch (random.below(8)) {
      case 0: return 0;
      case 1: return 1 + static_cast<int64_t>(random.below(20));
      case 2: return 16 * (1 + static_cast<int64_t>(random.below(20)));
      case 3: return static_cast<int64_t>(random.below(largest + 1));
      default: return static_cast<int64_t>(random.below(std::min<int64_t>(largest, 700) + 1));
    }
  }

  // Counters of steps, and some numbers of the rows, where the tensors live.
  void count_on_device(Random &random, Coverage &coverage) {
    for (size_t i = 0; i < numel_.size(); ++i)
      counters_.push_back(static_cast<float>(random.one_in(3) ? 0 : random.below(1000)));
    for (size_t row = 0; row < hyper_.size(); ++row)
      for (int32_t field = 0; field < 10; ++field) {
        if (!random.one_in(3)) continue;
        const bool perturbs = choice_.rule == STEEPEST_PERTURB, wide = random.one_in(2);
        if (perturbs && field != 0) continue;
        const double value = field == 3 || field == 4 ? 0.9 : 0.5 * random.uniform();
        values_.push_back({value, static_cast<float>(value)});
        live_.push_back({static_cast<int32_t>(row), field, wide, 0, nullptr});
      }
    coverage.counted += 1;
    coverage.live += !live_.empty();
  }

  void add_hyper(Random &random) {
    static const double beta1[] = {0.0, 0.3, 0.9, 0.95}, beta2[] = {0.0, 0.95, 0.999};
    steepest_hyper hyper{};
    hyper.lr = std::pow(10.0, -4 + 3 * random.uniform());
    hyper.weight_decay = random.one_in(2) ? 0.0 : 0.1 * random.uniform();
    hyper.l1 = random.one_in(4) ? random.uniform() : 0.0;
    hyper.beta1 = beta1[random.below(4)];
    hyper.beta2 = beta2[random.below(3)];
    hyper.eps = 1e-8;
    hyper.momentum = beta1[1 + random.below(3)];
    hyper.dampening = random.one_in(2) ? 0.0 : random.uniform();
    hyper.alpha = beta2[random.below(3)];
    hyper.lr_decay = random.one_in(2) ? 0.0 : 0.01;
    hyper.noise_eta = noise_ ? 0.01 : 0.0;
    hyper.noise_gamma = 0.55;
    hyper.average_decay = random.one_in(2) ? 0.99 : 0.25;
    if (choice_.rule == STEEPEST_PERTURB) {
      static const double orders[] = {1.0, 2.0, std::numeric_limits<double>::infinity()};
      hyper.q = choice_.flags & STEEPEST_POWER ? 1.0 + std::pow(10.0, 2 * random.uniform() - 1) : orders[random.below(3)];
      hyper.eps = random.one_in(2) ? 1.0 : 0.01;
    }
    hyper.step = 1 + static_cast<int64_t>(random.one_in(4) ? 0 : random.below(1000));
    hyper_.push_back(hyper);
  }

  // One array per role for the newest tensor: all on boundaries, all shifted alike, or each on its own.
  void add_arrays(Random &random, Coverage &coverage) {
    const int64_t numel = numel_.back();
    const uint64_t lanes = 16 / size_of(dtype_[kParam]);
    const uint64_t kind = random.below(3), shift = kind == 0 ? 0 : random.below(lanes);
    bool apart = false;
    for (int role = 0; role < kRoles; ++role) {
      if (!has(role)) continue;
      const size_t size = size_of(dtype_[role]);
      if (!is_float(dtype_[role])) {
        const int64_t count = role >= kFirstExponents ? (numel + steepest::kBlock8 - 1) / steepest::kBlock8 : numel;
        arrays_[role].emplace_back(count * size, random.below(8) * size);
        // Exponents around 127, codes and residuals of all kinds.
        for (size_t i = 0; i < count * size; ++i)
          arrays_[role].back().data()[i] =
              static_cast<unsigned char>(role >= kFirstExponents ? 100 + random.below(40) : random.below(256));
        continue;
      }
      const uint64_t own = role > 0 && kind == 2 ? random.below(lanes) : shift;
      apart |= (own - shift) * size % 16 != 0;
      arrays_[role].emplace_back(numel * size, own * size % 16);
      unsigned char *const data = arrays_[role].back().data();
      for (int64_t i = 0; i < numel; ++i) write(data + i * size, dtype_[role], value(random, role));
    }
    coverage.elements += numel;
    if (numel == 0)
      ++coverage.empty;
    else
      ++(apart ? coverage.apart : shift != 0 ? coverage.shifted : coverage.aligned);
  }

  float value(Random &random, int role) const {
    if (special_values_ && random.one_in(10)) {
      static const float infinity = std::numeric_limits<float>::infinity(), nan = infinity - infinity;
      static const float specials[] = {0.0f, -0.0f, 1e-45f, 1e-39f, 3e38f, infinity, -infinity, nan};
      return specials[random.below(8)];
    }
    const double x = random.normal();
    // Sums of squares, and a mean whose square is smaller.
    const bool squares = role == kFirstState + 1 || role == kFirstState + 2;
    if (choice_.rule != STEEPEST_ADAM) return static_cast<float>(role == kFirstState ? x * x : role == kParam ? x : 0.03 * x);
    return static_cast<float>(squares ? 1e-3 * x * x : role == kParam ? x : 0.03 * x);
  }

  int32_t dtype_[kRoles];
  RuleChoice choice_;
  bool special_values_;
  double clip_value_;
  bool master_ = false, source_ = false, average_ = false, stochastic_ = false, noise_ = false;
  int32_t residual_bits_ = 0;
  std::vector<int64_t> first_index_;
  std::vector<int64_t> numel_;
  std::vector<int32_t> hyper_index_;
  std::vector<steepest_hyper> hyper_;
  std::vector<float> scale_, coefficient_, found_inf_;
  struct Value {
    double wide;
    float narrow;
  };
  struct alignas(16) DeviceRow {
    char bytes[STEEPEST_DEVICE_ROW_BYTES];
  };
  bool counting_ = true;
  std::vector<float> counters_;
  std::vector<float *> counter_address_;
  std::vector<steepest_live> live_;
  std::vector<Value> values_;
  std::vector<DeviceRow> rows_;
  std::vector<Array> arrays_[kRoles];
  std::vector<void *> address_[kRoles];
};

}  // namespace lists
