// The CPU work plan: the concatenation of all tensors is cut into shares of equal cost, wherever the cuts fall.
// Nothing is stored; each thread walks the sizes and finds its own share (10,000 additions take about 5 us).
#pragma once

#include <algorithm>
#include <cstdint>

namespace steepest {

// Fixed cost of a tensor in units of elements (address loads, tile set-up), so that thousands of tiny tensors beside
// a large one are still split evenly.
constexpr int64_t kTensorCost = 64;
// Cuts inside a tensor fall on multiples of this many elements: no cache line is written by two threads.
constexpr int64_t kCutMultiple = 64;

inline int64_t total_cost(const int64_t *numel, int64_t num_tensors) {
  int64_t cost = 0;
  for (int64_t i = 0; i < num_tensors; ++i) cost += numel[i] == 0 ? 0 : numel[i] + kTensorCost;
  return cost;
}

// Calls visit(tensor, begin, end) for the element ranges of share `part` of `parts`, in order.  Over all parts every
// element is visited exactly once.
template <class Visit>
void for_share(const int64_t *numel, int64_t num_tensors, int64_t cost, int part, int parts, Visit &&visit) {
  const auto cut = [&](int k) {
    return static_cast<int64_t>(static_cast<__int128>(cost) * k / parts);
  };
  const int64_t first = cut(part), last = cut(part + 1);
  int64_t start = 0;  // cost of all tensors before this one
  for (int64_t i = 0; i < num_tensors && start < last; ++i) {
    if (numel[i] == 0) continue;
    const int64_t next = start + numel[i] + kTensorCost;
    if (next > first) {
      // A cut's place inside the tensor is a function of the cut alone, so neighbours agree on it.
      const auto place = [&](int64_t at) {
        const int64_t element = std::clamp<int64_t>(at - start - kTensorCost, 0, numel[i]);
        return at >= next ? numel[i] : element / kCutMultiple * kCutMultiple;
      };
      const int64_t begin = place(first), end = place(last);
      if (begin < end) visit(i, begin, end);
    }
    start = next;
  }
}

}  // namespace steepest
