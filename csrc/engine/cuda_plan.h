// The CUDA work plan: as many tensors as a kernel's argument holds go into one launch, one block per tile of a tensor.
// Host code without a CUDA call, so the number of launches can be asked for on any machine.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>

#include "engine/engine.h"
#include "engine/live.h"
#include "formula/storage.h"

// Tests on the host make blocks and grids small: to run faster, and to have tensors cut between launches.
#ifndef STEEPEST_CUDA_BLOCK
#define STEEPEST_CUDA_BLOCK 256
#endif
#ifndef STEEPEST_CUDA_MAX_GRID
#define STEEPEST_CUDA_MAX_GRID 0x7fffffff
#endif

namespace steepest::cuda {

constexpr int kBlock = STEEPEST_CUDA_BLOCK;           // threads
constexpr int kTile = 16 * kBlock;                    // elements of one tensor that a block steps
constexpr int64_t kMaxGrid = STEEPEST_CUDA_MAX_GRID;  // CUDA's limit on gridDim.x
constexpr int kWord = 16;                             // bytes of the widest memory access
constexpr size_t kArgumentBytes = 32764;              // limit on kernel arguments from CUDA 12.1 and sm_70 on

// --- what a kernel is told ---------------------------------------------------------------------------------------------
// Calls whose parameters, gradients and states are numbers of the usual types: every access is 16 bytes wide.
enum Role { kParam, kGrad, kFirstState };  // of PlainTensor::address; states follow

// `shift` of a tensor whose roles do not reach 16-byte boundaries at the same elements.
constexpr int16_t kApart = -1;

template <int kRoles>
struct PlainTensor {
  void *address[kRoles];
  int64_t numel;        // >= 1
  uint32_t first_tile;  // tiles of this launch that come before this tensor's
  uint16_t scalars;     // slot of its scalars
  int16_t shift;        // elements from the last 16-byte boundary to element 0, the same for every role; or kApart
};

// All other calls: anything that steepest_step_args can say.
template <int kStates>
struct GeneralTensor {
  void *param, *grad, *state[kStates > 0 ? kStates : 1];
  void *kept;  // master or residual
  void *source, *average, *exponents[kStates > 0 ? kStates : 1];
  uint64_t first_index;
  int64_t numel;        // >= 1
  uint32_t first_tile;  // tiles of this launch that come before this tensor's
  uint16_t scalars;     // slot of its scalars
};

// What is the same for all tensors of a launch.
struct LaunchHeader {
  const float *grad_scale;        // device memory or null
  const float *clip_coefficient;  // device memory or null
  const float *found_inf;         // device memory or null
  const void *rows;               // scalars that were derived on the device, of type Launch::Row; null: in the slots
  float clip_value;               // inf: none
  uint32_t num_tensors;
  uint32_t maximize;
  uint32_t shrinks;  // whether any row of scalars asks, or may ask, for shrink_after
};

// Tensors fill the slots from the front, scalars from the back, so that neither a list with few hyper-parameter rows nor
// one with a row per tensor wastes room.
template <class Tensor, class Row>
union Slot {
  Tensor tensor;
  Row scalars;
};

// A kernel's argument.
template <class Rule_>
struct PlainLaunch {
  using Rule = Rule_;
  static constexpr int kRoles = kFirstState + Rule::kStates;
  using Tensor = PlainTensor<kRoles>;
  using Row = typename Rule::Scalars;
  static constexpr int kSlots = static_cast<int>((kArgumentBytes - sizeof(LaunchHeader)) / sizeof(Slot<Tensor, Row>));

  LaunchHeader header;
  Slot<Tensor, Row> slots[kSlots];

  void prepare(const steepest_step_args &) {}

  static Row row(const StepCall &call, int32_t hyper) { return call.rows<Rule>()[hyper]; }

  static int64_t size_of(const steepest_step_args &a, int role) {
    const int32_t dtype = role == kParam ? a.param_dtype : role == kGrad ? a.grad_dtype : a.state_dtype;
    return dtype == STEEPEST_FLOAT32 ? 4 : 2;
  }

  static Tensor describe(const steepest_step_args &a, int64_t i) {
    Tensor tensor{};
    tensor.address[kParam] = a.params[i];
    tensor.address[kGrad] = const_cast<void *>(a.grads[i]);
    for (int k = 0; k < Rule::kStates; ++k) tensor.address[kFirstState + k] = a.states[k][i];
    tensor.numel = a.numel[i];
    // No supported type is smaller than the parameter's, so its shift is known modulo the longest vector.
    const auto place = [&](int role) { return reinterpret_cast<uintptr_t>(tensor.address[role]); };
    tensor.shift = static_cast<int16_t>(place(kParam) % kWord / size_of(a, kParam));
    for (int role = 0; role < kRoles; ++role)
      if ((place(role) - tensor.shift * size_of(a, role)) % kWord != 0) {
        tensor.shift = kApart;
        break;
      }
    return tensor;
  }

  // Elements before the first tile's begin that are not the tensor's.
  static int64_t shift(const Tensor &tensor) { return tensor.shift == kApart ? 0 : tensor.shift; }

  // What is left of a tensor behind its first `count` elements.
  static void advance(Tensor &tensor, const steepest_step_args &a, int64_t count) {
    // Parts end where tiles end: what is left begins at a boundary, if the tensor has them.
    for (int role = 0; role < kRoles; ++role)
      tensor.address[role] = static_cast<char *>(tensor.address[role]) + count * size_of(a, role);
    if (tensor.shift != kApart) tensor.shift = 0;
  }
};

template <class Rule_>
struct GeneralLaunch {
  using Rule = Rule_;
  using Tensor = GeneralTensor<Rule::kStates>;
  struct Row {
    typename Rule::Scalars scalars;
    Extras extras;
  };
  // Types and options, the same for all tensors.
  struct Storage {
    int8_t param_dtype, grad_dtype, state_dtype;
    int8_t residual_bits;  // 0: `kept`, if any, is a master
    bool stochastic, draws;
  };
  static constexpr int kSlots =
      static_cast<int>((kArgumentBytes - sizeof(LaunchHeader) - sizeof(int64_t)) / sizeof(Slot<Tensor, Row>));

  LaunchHeader header;
  Storage storage;
  Slot<Tensor, Row> slots[kSlots];

  void prepare(const steepest_step_args &a) {
    storage.param_dtype = static_cast<int8_t>(a.param_dtype);
    storage.grad_dtype = static_cast<int8_t>(a.grad_dtype);
    storage.state_dtype = static_cast<int8_t>(a.state_dtype);
    storage.residual_bits = a.residuals ? static_cast<int8_t>(a.residual_bits) : 0;
    storage.stochastic = a.rounding == STEEPEST_STOCHASTIC;
    storage.draws = storage.stochastic || a.state_dtype == STEEPEST_BLOCK8;
  }

  static Row row(const StepCall &call, int32_t hyper) { return {call.rows<Rule>()[hyper], call.extras[hyper]}; }

  static Tensor describe(const steepest_step_args &a, int64_t i) {
    Tensor tensor{};
    tensor.param = a.params[i];
    tensor.grad = const_cast<void *>(a.grads[i]);
    for (int k = 0; k < Rule::kStates; ++k) {
      tensor.state[k] = a.states[k][i];
      if (a.state_dtype == STEEPEST_BLOCK8) tensor.exponents[k] = a.state_exponents[k][i];
    }
    tensor.kept = a.masters ? a.masters[i] : a.residuals ? a.residuals[i] : nullptr;
    tensor.source = a.sources ? const_cast<void *>(a.sources[i]) : nullptr;
    tensor.average = a.averages ? a.averages[i] : nullptr;
    tensor.first_index = a.first_index ? static_cast<uint64_t>(a.first_index[i]) : 0;
    tensor.numel = a.numel[i];
    return tensor;
  }

  static int64_t shift(const Tensor &) { return 0; }

  static void advance(Tensor &tensor, const steepest_step_args &a, int64_t count) {
    const auto size_of = [](int32_t dtype) { return dtype == STEEPEST_FLOAT32 ? 4 : dtype == STEEPEST_BLOCK8 ? 1 : 2; };
    const auto move = [](void *&address, int64_t bytes) {
      if (address) address = static_cast<char *>(address) + bytes;
    };
    move(tensor.param, count * size_of(a.param_dtype));
    move(tensor.source, count * size_of(a.param_dtype));
    move(tensor.grad, count * size_of(a.grad_dtype));
    for (int k = 0; k < Rule::kStates; ++k) {
      move(tensor.state[k], count * size_of(a.state_dtype));
      move(tensor.exponents[k], count / kBlock8);  // parts are whole tiles, tiles whole blocks
    }
    move(tensor.kept, count * (a.residuals ? a.residual_bits / 8 : 4));
    move(tensor.average, count * 4);
    tensor.first_index += static_cast<uint64_t>(count);
  }
};

static_assert(kTile % kBlock8 == 0, "an 8-bit block must not be cut by a tile");
static_assert(sizeof(LaunchHeader) == 48, "header larger than assumed");
static_assert(sizeof(PlainLaunch<Sgd<false>>) <= kArgumentBytes && sizeof(PlainLaunch<Adam<true>>) <= kArgumentBytes &&
                  sizeof(GeneralLaunch<Sgd<false>>) <= kArgumentBytes &&
                  sizeof(GeneralLaunch<Adam<true>>) <= kArgumentBytes,
              "too large for an argument");

// --- packing -----------------------------------------------------------------------------------------------------------
// Fills one launch after another and calls emit(launch, tiles) with each.
template <class Launch, class Emit>
class Packer {
 public:
  // call.scalars is null when only the number of launches is wanted.
  Packer(const StepCall &call, Emit emit) : call_(call), args_(*call.args), emit_(emit) {
    LaunchHeader &header = launch_.header;
    header.grad_scale = args_.grad_scale;
    header.clip_coefficient = args_.clip_coefficient;
    header.found_inf = args_.found_inf;
    header.clip_value =
        args_.clip_value > 0 ? static_cast<float>(args_.clip_value) : std::numeric_limits<float>::infinity();
    header.num_tensors = 0;
    header.maximize = args_.flags & STEEPEST_MAXIMIZE;
    header.rows = nullptr;
    header.shrinks = live_shrinks();
    launch_.prepare(args_);
  }

  void pack() {
    for (int64_t i = 0; i < args_.num_tensors; ++i)
      if (args_.numel[i] > 0) add(i);
    if (launch_.header.num_tensors > 0) flush();
  }

 private:
  using Tensor = typename Launch::Tensor;
  static constexpr int kSlots = Launch::kSlots;

  // Appends tensor i, cut where a grid ends.
  void add(int64_t i) {
    const int32_t hyper = args_.hyper_index ? args_.hyper_index[i] : 0;
    Tensor rest = Launch::describe(args_, i);
    while (rest.numel > 0) {
      const uint16_t scalars = args_.counters ? make_room(i) : make_room(find_row(hyper), hyper);

      const int64_t shift = Launch::shift(rest);
      const int64_t tiles = std::min((rest.numel - 1 + shift) / kTile + 1, kMaxGrid - tiles_);
      Tensor part = rest;
      part.numel = std::min(rest.numel, tiles * kTile - shift);
      part.first_tile = static_cast<uint32_t>(tiles_);
      part.scalars = scalars;
      launch_.slots[launch_.header.num_tensors++].tensor = part;
      tiles_ += tiles;
      Launch::advance(rest, args_, part.numel);
      rest.numel -= part.numel;
    }
  }

  // Makes room for one more tensor with the hyper-parameter row given, whose place among the launch's rows, if it has one
  // there, is `row`; returns the slot of its scalars.
  uint16_t make_room(int row, int32_t hyper) {
    const int needed = row < 0 ? 2 : 1;
    if (full(rows_ + needed)) {
      flush();
      row = -1;
    }
    if (row < 0) row = add_row(hyper);
    return static_cast<uint16_t>(kSlots - 1 - row);
  }

  // The same for tensor i of a call whose scalars are derived on the device, one row per tensor.
  uint16_t make_room(int64_t i) {
    if (launch_.header.num_tensors > 0 && (full(1) || i - first_ > UINT16_MAX)) flush();
    if (launch_.header.num_tensors == 0) {
      first_ = i;
      launch_.header.rows = static_cast<const typename Launch::Row *>(args_.device_rows) + i;
    }
    return static_cast<uint16_t>(i - first_);
  }

  bool full(int needed) const {
    return static_cast<int>(launch_.header.num_tensors) + needed > kSlots || tiles_ == kMaxGrid;
  }

  uint32_t live_shrinks() const { return args_.counters && may_shrink_after(args_); }

  // Rows are looked for from the newest: tensors of one group usually follow each other.
  int find_row(int32_t hyper) const {
    for (int row = rows_ - 1; row >= 0; --row)
      if (hyper_[row] == hyper) return row;
    return -1;
  }

  int add_row(int32_t hyper) {
    hyper_[rows_] = hyper;
    if (call_.scalars) {
      launch_.slots[kSlots - 1 - rows_].scalars = Launch::row(call_, hyper);
      launch_.header.shrinks |= shrinks_after(call_.rows<typename Launch::Rule>()[hyper].shrink);
    }
    return rows_++;
  }

  void flush() {
    emit_(launch_, tiles_);
    launch_.header.num_tensors = 0;
    launch_.header.shrinks = live_shrinks();
    rows_ = 0;
    tiles_ = 0;
  }

  const StepCall &call_;
  const steepest_step_args &args_;
  Emit emit_;
  int64_t tiles_ = 0;
  int64_t first_ = 0;  // tensor of this launch, where scalars are derived on the device
  int rows_ = 0;
  int32_t hyper_[kSlots];  // hyper-parameter row of each row of scalars in the launch
  Launch launch_;
};

template <class Launch, class Emit>
void for_launches(const StepCall &call, Emit emit) {
  Packer<Launch, Emit>(call, emit).pack();
}

}  // namespace steepest::cuda
