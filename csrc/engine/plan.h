// The CPU work plan: the concatenation of all tensors is cut into shares of equal cost, wherever the cuts fall.
// Nothing is stored; each thread walks the sizes once and finds its shares (10,000 additions take about 5 us).
#pragma once

#include <algorithm>
#include <cstdint>

namespace steepest {

// Fixed cost of a tensor in units of elements (address loads, tile set-up), so that thousands of tiny tensors beside
// a large one are still split evenly.
constexpr int64_t kTensorCost = 64;
// Cuts inside a tensor fall on multiples of this many elements: no cache line and no 8-bit block (of 128) is written by two
// threads.
constexpr int64_t kCutMultiple = 128;

inline int64_t total_cost(const int64_t *numel, int64_t num_tensors) {
  int64_t cost = 0;
  for (int64_t i = 0; i < num_tensors; ++i) cost += numel[i] == 0 ? 0 : numel[i] + kTensorCost;
  return cost;
}

// Walks shares; each walk goes on, or back, from where the one before it ended.
class ShareWalk {
 public:
  ShareWalk(const int64_t *numel, int64_t num_tensors, int64_t cost, int parts)
      : numel_(numel), num_tensors_(num_tensors), cost_(cost), parts_(parts) {}

  // Calls visit(tensor, begin, end) for the element ranges of share `part`, in order.  Over all parts every element is
  // visited exactly once.
  template <class Visit>
  void visit(int part, Visit &&visit) {
    const int64_t first = cut(part), last = cut(part + 1);
    while (start_ > first) start_ -= cost_of(--tensor_);
    while (tensor_ < num_tensors_ && start_ < last) {
      const int64_t next = start_ + cost_of(tensor_);
      const int64_t begin = place(first, next), end = place(last, next);
      if (next > first && begin < end) visit(tensor_, begin, end);
      if (next > last) return;  // the rest of this tensor belongs to the next share
      start_ = next;
      ++tensor_;
    }
  }

 private:
  int64_t cost_of(int64_t tensor) const { return numel_[tensor] == 0 ? 0 : numel_[tensor] + kTensorCost; }
  int64_t cut(int k) const { return static_cast<int64_t>(static_cast<__int128>(cost_) * k / parts_); }
  // A cut's place inside the tensor is a function of the cut alone, so neighbours agree on it.
  int64_t place(int64_t at, int64_t next) const {
    if (at >= next) return numel_[tensor_];
    return std::clamp<int64_t>(at - start_ - kTensorCost, 0, numel_[tensor_]) / kCutMultiple * kCutMultiple;
  }

  const int64_t *numel_;
  int64_t num_tensors_, cost_;
  int parts_;
  int64_t tensor_ = 0, start_ = 0;  // the tensor to go on with, and the cost of all before it
};

}  // namespace steepest
