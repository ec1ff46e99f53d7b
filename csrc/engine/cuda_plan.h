// The CUDA work plan: as many tensors as a kernel's argument holds go into one launch, one block per tile of a tensor.
// Host code without a CUDA call, so the number of launches can be asked for on any machine.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>

#include "engine/rules.h"

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

// Memory roles of a tensor in TensorSlot::address; states follow.
enum Role { kParam, kGrad, kFirstState };

// `shift` of a tensor whose roles do not reach 16-byte boundaries at the same elements.
constexpr int16_t kApart = -1;

template <int kRoles>
struct TensorSlot {
  void *address[kRoles];
  int64_t numel;        // >= 1
  uint32_t first_tile;  // tiles of this launch that come before this tensor's
  uint16_t scalars;     // slot of its scalars
  int16_t shift;        // elements from the last 16-byte boundary to element 0, the same for every role; or kApart
};

template <class Rule>
union Slot {
  TensorSlot<kFirstState + Rule::kStates> tensor;
  typename Rule::Scalars scalars;
};

// The kernel's argument.  Tensors fill the slots from the front, scalars from the back, so that neither a list with few
// hyper-parameter rows nor one with a row per tensor wastes room.
template <class Rule>
struct Launch {
  static constexpr int kHeaderBytes = 40;
  static constexpr int kSlots = static_cast<int>((kArgumentBytes - kHeaderBytes) / sizeof(Slot<Rule>));

  const float *grad_scale;        // device memory or null
  const float *clip_coefficient;  // device memory or null
  const float *found_inf;         // device memory or null
  float clip_value;               // inf: none
  uint32_t num_tensors;
  uint32_t maximize;
  uint32_t shrinks;  // whether any row of scalars asks for shrink_after
  Slot<Rule> slots[kSlots];
};

static_assert(sizeof(Launch<Sgd<false>>) <= kArgumentBytes && sizeof(Launch<Adam<true>>) <= kArgumentBytes,
              "too large for an argument");
static_assert(offsetof(Launch<Adam<true>>, slots) == Launch<Adam<true>>::kHeaderBytes, "header larger than assumed");

// Fills one launch after another and calls emit(launch, tiles) with each.
template <class Rule, class Emit>
class Packer {
 public:
  using Scalars = typename Rule::Scalars;
  // `scalars` is null when only the number of launches is wanted.
  Packer(const steepest_step_args &args, const Scalars *scalars, Emit emit)
      : args_(args), scalars_(scalars), emit_(emit) {
    launch_.grad_scale = args.grad_scale;
    launch_.clip_coefficient = args.clip_coefficient;
    launch_.found_inf = args.found_inf;
    launch_.clip_value =
        args.clip_value > 0 ? static_cast<float>(args.clip_value) : std::numeric_limits<float>::infinity();
    launch_.num_tensors = 0;
    launch_.maximize = args.flags & STEEPEST_MAXIMIZE;
    launch_.shrinks = 0;
    for (int role = 0; role < kRoles; ++role)
      size_[role] = size_of(role == kParam ? args.param_dtype : role == kGrad ? args.grad_dtype : args.state_dtype);
  }

  void pack() {
    for (int64_t i = 0; i < args_.num_tensors; ++i)
      if (args_.numel[i] > 0) add(i);
    if (launch_.num_tensors > 0) flush();
  }

 private:
  static constexpr int kRoles = kFirstState + Rule::kStates;
  using Tensor = TensorSlot<kRoles>;
  static constexpr int kSlots = Launch<Rule>::kSlots;

  static int64_t size_of(int32_t dtype) { return dtype == STEEPEST_FLOAT32 ? 4 : 2; }

  // Appends tensor i, cut where a grid ends.
  void add(int64_t i) {
    const int32_t hyper = args_.hyper_index ? args_.hyper_index[i] : 0;
    Tensor rest = describe(i);
    while (rest.numel > 0) {
      int row = find_row(hyper);
      const int needed = row < 0 ? 2 : 1;
      if (static_cast<int>(launch_.num_tensors) + rows_ + needed > kSlots || tiles_ == kMaxGrid) {
        flush();
        row = -1;
      }
      if (row < 0) row = add_row(hyper);

      const int64_t shift = rest.shift == kApart ? 0 : rest.shift;
      const int64_t tiles = std::min((rest.numel - 1 + shift) / kTile + 1, kMaxGrid - tiles_);
      Tensor part = rest;
      part.numel = std::min(rest.numel, tiles * kTile - shift);
      part.first_tile = static_cast<uint32_t>(tiles_);
      part.scalars = static_cast<uint16_t>(kSlots - 1 - row);
      launch_.slots[launch_.num_tensors++].tensor = part;
      tiles_ += tiles;

      // Parts end where tiles end: what is left begins at a boundary, if the tensor has them.
      for (int role = 0; role < kRoles; ++role)
        rest.address[role] = static_cast<char *>(rest.address[role]) + part.numel * size_[role];
      rest.numel -= part.numel;
      if (rest.shift != kApart) rest.shift = 0;
    }
  }

  Tensor describe(int64_t i) const {
    Tensor tensor{};
    tensor.address[kParam] = args_.params[i];
    tensor.address[kGrad] = const_cast<void *>(args_.grads[i]);
    for (int k = 0; k < Rule::kStates; ++k) tensor.address[kFirstState + k] = args_.states[k][i];
    tensor.numel = args_.numel[i];
    // No supported type is smaller than the parameter's, so its shift is known modulo the longest vector.
    const auto place = [&](int role) { return reinterpret_cast<uintptr_t>(tensor.address[role]); };
    tensor.shift = static_cast<int16_t>(place(kParam) % kWord / size_[kParam]);
    for (int role = 0; role < kRoles; ++role)
      if ((place(role) - tensor.shift * size_[role]) % kWord != 0) {
        tensor.shift = kApart;
        break;
      }
    return tensor;
  }

  // Rows are looked for from the newest: tensors of one group usually follow each other.
  int find_row(int32_t hyper) const {
    for (int row = rows_ - 1; row >= 0; --row)
      if (hyper_[row] == hyper) return row;
    return -1;
  }

  int add_row(int32_t hyper) {
    hyper_[rows_] = hyper;
    if (scalars_) {
      launch_.slots[kSlots - 1 - rows_].scalars = scalars_[hyper];
      launch_.shrinks |= shrinks_after(scalars_[hyper].shrink);
    }
    return rows_++;
  }

  void flush() {
    emit_(launch_, tiles_);
    launch_.num_tensors = 0;
    launch_.shrinks = 0;
    rows_ = 0;
    tiles_ = 0;
  }

  const steepest_step_args &args_;
  const Scalars *scalars_;
  Emit emit_;
  int64_t size_[kRoles];
  int64_t tiles_ = 0;
  int rows_ = 0;
  int32_t hyper_[kSlots];  // hyper-parameter row of each row of scalars in the launch
  Launch<Rule> launch_;
};

template <class Rule, class Emit>
void for_launches(const steepest_step_args &args, const typename Rule::Scalars *scalars, Emit emit) {
  Packer<Rule, Emit>(args, scalars, emit).pack();
}

}  // namespace steepest::cuda
