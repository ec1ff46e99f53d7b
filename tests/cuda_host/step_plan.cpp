// Packs random lists into launches (csrc/engine/cuda_plan.h) and checks each launch against what the list asks for:
// every element once, in order, at its address, with its scalars, in as few launches as arguments and grids allow.
// Addresses are numbers here: nothing is read or written.  Prints one line of JSON, or what is wrong; exit status 1 then.
#include "engine/cuda_plan.h"

#include <cstring>
#include <map>
#include <vector>

#include "plan_checks.h"

namespace {

using namespace steepest;
using namespace steepest::cuda;

struct {
  long long launches, cut, shifted, apart, several_rows, live, full, far_apart;
} seen;

template <class Rule>
struct List {
  static constexpr int kStates = Rule::kStates;
  steepest_step_args args{};
  std::vector<int64_t> numel, first_index;
  std::vector<int32_t> hyper_index;
  std::vector<void *> params, states[STEEPEST_MAX_STATES], kept, averages, exponents[STEEPEST_MAX_STATES];
  std::vector<const void *> grads, sources;
  std::vector<float *> counters;
  std::vector<steepest_hyper> hyper;
  std::vector<typename Rule::Scalars> scalars;
  std::vector<Extras> extras;
  std::vector<steepest_live> live;
  float numbers[3] = {};

  int32_t hyper_of(int64_t i) const { return args.hyper_index ? hyper_index[i] : 0; }

  List(bool general, bool counted) {
    add_types(general);
    const bool many = one_in(4);
    const int64_t rows = one_in(2) ? 1 : 1 + below(many ? 900 : 9);
    if (counted && one_in(8)) add_two_far_apart(rows);
    add_tensors(many ? 500 + below(2500) : below(40), rows);
    if (counted && one_in(3)) add_tensors(70000, rows, 500);  // nearly all of them empty
    add_options(general, rows);
    add_rows(rows);
    if (counted) add_live();
  }

  void add_types(bool general) {
    const int32_t types[] = {STEEPEST_FLOAT32, STEEPEST_BFLOAT16, STEEPEST_FLOAT16};
    args.param_dtype = types[below(3)];
    args.grad_dtype = one_in(4) ? STEEPEST_FLOAT32 : args.param_dtype;  // float32: a master that is restored
    args.state_dtype = args.param_dtype == STEEPEST_FLOAT32 || one_in(2) ? STEEPEST_FLOAT32 : args.param_dtype;
    if (!general) return;
    args.grad_dtype = types[below(3)];
    args.state_dtype = one_in(3) ? STEEPEST_BLOCK8 : types[below(3)];
    args.residual_bits = one_in(2) ? 0 : one_in(2) ? 8 : 16;
  }

  void add_tensors(int64_t count, int64_t rows, int64_t one_is_not_empty_in = 1) {
    const bool huge = one_in(2);
    const int64_t empty = one_in(4) ? 200 : 6;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t around = below(3) * kTile * (huge && one_in(3) ? kMaxGrid : 1) + below(5) - 2;
      const bool none = one_in(empty) || !one_in(one_is_not_empty_in);
      numel.push_back(none ? 0 : one_in(3) ? std::max<int64_t>(1, around) : 1 + below(3 * kTile));
      first_index.push_back(below(int64_t{1} << 50));
      hyper_index.push_back(static_cast<int32_t>(one_in(3) ? below(rows) : i % rows));
      // Roles that begin together, at a boundary or after it, or anywhere.
      const bool anywhere = one_in(3);
      const int64_t shift = one_in(2) ? 0 : below(9);
      const auto at = [&](int32_t dtype) { return place(bytes_of(dtype), anywhere ? below(9) : shift); };
      params.push_back(at(args.param_dtype)), sources.push_back(at(args.param_dtype)), grads.push_back(at(args.grad_dtype));
      for (auto &state : states) state.push_back(at(args.state_dtype));
      for (auto &exponent : exponents) exponent.push_back(place(1, below(9)));
      kept.push_back(place(args.residual_bits ? args.residual_bits / 8 : 4, below(9)));
      averages.push_back(place(4, below(9)));
      counters.push_back(static_cast<float *>(place(4, 0)));
    }
  }

  // The second is as far from the first as a launch's 16 bits reach, or one tensor further.
  void add_two_far_apart(int64_t rows) {
    const int64_t all_are_empty = int64_t{1} << 62;
    add_tensors(one_in(2) ? 70000 : 0, rows, all_are_empty);
    add_tensors(1, rows), numel.back() = 5;
    add_tensors(UINT16_MAX - 1 + below(2), rows, all_are_empty);
    add_tensors(1, rows), numel.back() = 5;
  }

  void add_options(bool general, int64_t rows) {
    args.num_tensors = static_cast<int64_t>(numel.size());
    args.numel = numel.data(), args.params = params.data(), args.grads = grads.data();
    for (int k = 0; k < kStates; ++k) {
      args.states[k] = states[k].data();
      if (args.state_dtype == STEEPEST_BLOCK8) args.state_exponents[k] = exponents[k].data();
    }
    const bool masters = general && !args.residual_bits && one_in(2);
    if (masters) args.masters = kept.data();
    if (args.residual_bits) args.residuals = kept.data();
    if (general && !masters && one_in(2)) args.sources = sources.data();
    if (general && one_in(2)) args.averages = averages.data();
    if (general && one_in(2)) args.first_index = first_index.data();
    args.rounding = general && one_in(2) ? STEEPEST_STOCHASTIC : STEEPEST_NEAREST;
    if (one_in(2)) args.flags |= STEEPEST_MAXIMIZE;
    if (one_in(2)) args.grad_scale = &numbers[0];
    if (one_in(2)) args.clip_coefficient = &numbers[1];
    if (one_in(2)) args.found_inf = &numbers[2];
    if (one_in(2)) args.clip_value = 0.5;
    if (rows > 1 || one_in(2)) args.hyper_index = hyper_index.data();
  }

  void add_rows(int64_t rows) {
    const int64_t shrinking = one_in(2) ? 1 + below(20) : int64_t{1} << 40;
    for (int64_t r = 0; r < rows; ++r) {
      typename Rule::Scalars row;
      unsigned char bytes[sizeof row];
      for (auto &byte : bytes) byte = static_cast<unsigned char>(below(256));
      std::memcpy(&row, bytes, sizeof row);
      row.shrink = {1.0f, 0.0f, one_in(shrinking) ? 0.5f : 0.0f, one_in(shrinking) ? 0.25f : 0.0f};
      scalars.push_back(row);
      Extras extra;
      std::memset(&extra, static_cast<int>(below(256)), sizeof extra);
      extra.noise = static_cast<float>(r);
      extras.push_back(extra);
      hyper.push_back(steepest_hyper{});
    }
    args.num_hyper = rows, args.hyper = hyper.data();
  }

  void add_live() {
    args.counters = counters.data();
    args.device_rows = place(1, 0);
    if (one_in(3)) args.flags |= STEEPEST_CAUTIOUS;
    if (one_in(3)) hyper[below(args.num_hyper)].l1 = 0.5;
    for (int32_t field : {0, 2, 3})
      if (one_in(2)) live.push_back(steepest_live{}), live.back().field = field;
    args.live = live.data(), args.num_live = static_cast<int64_t>(live.size());
  }

  bool may_shrink() const {
    bool may = args.flags & STEEPEST_CAUTIOUS;
    for (const steepest_hyper &h : hyper) may |= h.l1 > 0;
    for (const steepest_live &l : live) may |= l.field == 2;
    return may;
  }
};

// The elements from a boundary of 16 bytes to element 0, the same for all roles; kApart when there is no such number.
template <class Rule>
int64_t shift_of(const PlainTensor<kFirstState + Rule::kStates> &tensor, const steepest_step_args &a) {
  for (int64_t shift = 0; shift < kWord / bytes_of(a.param_dtype); ++shift) {
    bool all = true;
    for (int role = 0; role < kFirstState + Rule::kStates; ++role) {
      const int size = bytes_of(role == kParam ? a.param_dtype : role == kGrad ? a.grad_dtype : a.state_dtype);
      all = all && (reinterpret_cast<intptr_t>(tensor.address[role]) - shift * size) % kWord == 0;
    }
    if (all) return shift;
  }
  return kApart;
}

// Checks a part of tensor i that begins with its element `done`; returns the elements before it in its first tile.
template <class Rule>
int64_t check_part(const PlainTensor<kFirstState + Rule::kStates> &part, const List<Rule> &list, int64_t i, int64_t done) {
  const steepest_step_args &a = list.args;
  EXPECT(part.address[kParam] == after(a.params[i], done * bytes_of(a.param_dtype)));
  EXPECT(part.address[kGrad] == after(a.grads[i], done * bytes_of(a.grad_dtype)));
  for (int k = 0; k < Rule::kStates; ++k)
    EXPECT(part.address[kFirstState + k] == after(a.states[k][i], done * bytes_of(a.state_dtype)));
  EXPECT(part.shift == shift_of<Rule>(part, a));
  seen.shifted += part.shift > 0, seen.apart += part.shift == kApart;
  return part.shift == kApart ? 0 : part.shift;
}

template <class Rule>
int64_t check_part(const GeneralTensor<Rule::kStates> &part, const List<Rule> &list, int64_t i, int64_t done) {
  const steepest_step_args &a = list.args;
  EXPECT(part.param == after(a.params[i], done * bytes_of(a.param_dtype)));
  EXPECT(part.grad == after(a.grads[i], done * bytes_of(a.grad_dtype)));
  for (int k = 0; k < Rule::kStates; ++k) {
    EXPECT(part.state[k] == after(a.states[k][i], done * bytes_of(a.state_dtype)));
    EXPECT(part.exponents[k] == after(a.state_exponents[k] ? a.state_exponents[k][i] : nullptr, done / kBlock8));
  }
  const void *kept = a.masters ? a.masters[i] : a.residuals ? a.residuals[i] : nullptr;
  EXPECT(part.kept == after(kept, done * (a.masters ? 4 : a.residual_bits / 8)));
  EXPECT(part.source == after(a.sources ? a.sources[i] : nullptr, done * bytes_of(a.param_dtype)));
  EXPECT(part.average == after(a.averages ? a.averages[i] : nullptr, done * 4));
  // Without numbers of its own a tensor's elements are counted too: nothing reads these.
  EXPECT(part.first_index == static_cast<uint64_t>((a.first_index ? a.first_index[i] : 0) + done));
  return 0;
}

template <class Rule>
void check_kind(const PlainLaunch<Rule> &, const steepest_step_args &) {}

template <class Rule>
void check_kind(const GeneralLaunch<Rule> &launch, const steepest_step_args &a) {
  const auto &storage = launch.storage;
  EXPECT(storage.param_dtype == a.param_dtype && storage.grad_dtype == a.grad_dtype && storage.state_dtype == a.state_dtype);
  EXPECT(storage.residual_bits == (a.residuals ? a.residual_bits : 0));
  EXPECT(storage.stochastic == (a.rounding == STEEPEST_STOCHASTIC));
  EXPECT(storage.draws == (storage.stochastic || a.state_dtype == STEEPEST_BLOCK8));
}

template <class Rule>
bool equal_rows(const typename PlainLaunch<Rule>::Row &row, const List<Rule> &list, int32_t hyper) {
  return std::memcmp(&row, &list.scalars[hyper], sizeof row) == 0;
}
template <class Rule>
bool equal_rows(const typename GeneralLaunch<Rule>::Row &row, const List<Rule> &list, int32_t hyper) {
  return equal_rows<Rule>(row.scalars, list, hyper) && std::memcmp(&row.extras, &list.extras[hyper], sizeof(Extras)) == 0;
}

// Follows the launches of a list.
template <class Launch>
class Follower {
  using Rule = typename Launch::Rule;

 public:
  explicit Follower(const List<Rule> &list) : list_(list), a_(list.args) { next(); }

  void operator()(const Launch &launch, int64_t tiles) {
    const LaunchHeader &header = launch.header;
    EXPECT(header.num_tensors >= 1 && tiles <= kMaxGrid && !ended());
    EXPECT(header.grad_scale == a_.grad_scale && header.clip_coefficient == a_.clip_coefficient);
    EXPECT(header.found_inf == a_.found_inf && (header.maximize != 0) == ((a_.flags & STEEPEST_MAXIMIZE) != 0));
    EXPECT(header.clip_value == (a_.clip_value > 0 ? 0.5f : std::numeric_limits<float>::infinity()));
    check_kind(launch, a_);
    if (must_be_full_) EXPECT(full());
    ++launches, ++seen.launches;
    first_ = at_, count_ = header.num_tensors, tiles_ = 0, slots_.clear();
    bool shrinks = a_.counters && list_.may_shrink();
    for (uint32_t k = 0; k < header.num_tensors; ++k) take(launch, launch.slots[k].tensor, shrinks);
    EXPECT((header.shrinks != 0) == shrinks);
    EXPECT(tiles_ == tiles);
    EXPECT(static_cast<int64_t>(count_ + slots_.size()) <= Launch::kSlots);
    seen.several_rows += slots_.size() > 1, seen.full += count_ + slots_.size() == Launch::kSlots;
    must_be_full_ = true;
  }

  bool ended() const { return at_ == a_.num_tensors; }
  int64_t launches = 0;

 private:
  void next() {
    while (at_ < a_.num_tensors && a_.numel[at_] == 0) ++at_;
  }

  void take(const Launch &launch, const typename Launch::Tensor &part, bool &shrinks) {
    EXPECT(!ended());
    EXPECT(part.numel >= 1 && part.numel <= a_.numel[at_] - done_);
    const int64_t shift = check_part<Rule>(part, list_, at_, done_), end = shift + part.numel;
    EXPECT(part.first_tile == tiles_);
    tiles_ += (end + kTile - 1) / kTile;
    if (a_.counters) {
      EXPECT(at_ - first_ <= UINT16_MAX && part.scalars == at_ - first_);
      EXPECT(launch.header.rows == static_cast<const typename Launch::Row *>(a_.device_rows) + first_);
      seen.live += 1;
    } else {
      check_scalars(launch, part.scalars, shrinks);
    }
    done_ += part.numel;
    if (done_ < a_.numel[at_]) {  // cut where a grid and a tile end
      EXPECT(tiles_ == kMaxGrid && end % kTile == 0);
      ++seen.cut;
      return;
    }
    done_ = 0, ++at_;
    next();
  }

  void check_scalars(const Launch &launch, uint16_t slot, bool &shrinks) {
    const int32_t hyper = list_.hyper_of(at_);
    EXPECT(launch.header.rows == nullptr && slot >= count_ && slot < Launch::kSlots);
    EXPECT(equal_rows<Rule>(launch.slots[slot].scalars, list_, hyper));
    if (slots_.count(hyper)) EXPECT(slots_[hyper] == slot);  // a row lies in a launch once
    slots_[hyper] = slot;
    const Shrink &shrink = list_.scalars[hyper].shrink;
    shrinks |= shrink.cautious != 0 || shrink.l1 != 0;
  }

  // Whether the launch before could not take what comes now.
  bool full() const {
    if (tiles_ == kMaxGrid) return true;
    seen.far_apart += a_.counters && at_ - first_ > UINT16_MAX;
    if (a_.counters) return count_ + 1 > Launch::kSlots || at_ - first_ > UINT16_MAX;
    const int64_t needed = slots_.count(list_.hyper_of(at_)) ? 1 : 2;
    return static_cast<int64_t>(count_ + slots_.size()) + needed > Launch::kSlots;
  }

  const List<Rule> &list_;
  const steepest_step_args &a_;
  int64_t at_ = 0, done_ = 0;  // the tensor that comes next, and how much of it is behind
  // Of the launch before:
  bool must_be_full_ = false;
  int64_t first_ = 0, tiles_ = 0, count_ = 0;
  std::map<int32_t, uint16_t> slots_;
};

template <class Launch>
void check(bool general) {
  using Rule = typename Launch::Rule;
  // As many slots as fit into an argument.
  EXPECT(sizeof(Launch) <= 32764 && sizeof(Launch) + sizeof(Launch::slots[0]) > 32764);
  const List<Rule> list(general, one_in(3));
  Follower<Launch> follower(list);
  const StepCall call{nullptr, &list.args, list.scalars.data(), list.extras.data()};
  const auto emit = [&](const Launch &launch, int64_t tiles) { follower(launch, tiles); };
  for_launches<Launch>(call, emit);
  EXPECT(follower.ended());
  int64_t counted = 0;  // as without scalars
  for_launches<Launch>(StepCall{nullptr, &list.args, nullptr, nullptr}, [&](const Launch &, int64_t) { ++counted; });
  EXPECT(counted == follower.launches);
  ++lists;
}

}  // namespace

int main(int, char **arguments) {
  generator.seed(std::strtoull(arguments[1], nullptr, 10));
  const int count = std::atoi(arguments[2]);
  while (lists < count) {
    check<PlainLaunch<Sgd<false>>>(false), check<PlainLaunch<Sgd<true>>>(false), check<PlainLaunch<Adam<true>>>(false);
    check<GeneralLaunch<Sgd<false>>>(true), check<GeneralLaunch<Sgd<true>>>(true), check<GeneralLaunch<Adam<true>>>(true);
  }
  std::printf("{");
  print("launches", seen.launches), print("cut", seen.cut), print("shifted", seen.shifted), print("apart", seen.apart);
  print("several_rows", seen.several_rows), print("live", seen.live), print("full", seen.full);
  print("far_apart", seen.far_apart);
  std::printf("\"lists\": %d}\n", lists);
}
