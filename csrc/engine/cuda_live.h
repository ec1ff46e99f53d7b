// The plan of the launches that derive scalars on the device (cuda_live.cu): one thread per tensor, and as many tensors as
// an argument holds with the rows of hyper-parameters that they refer to.
#pragma once

#include <cstring>

#include "engine/cuda_plan.h"
#include "engine/live.h"

namespace steepest::cuda {

struct LiveHeader {
  void *rows;              // of the launch's first tensor: Launch::Row of the kernel that will step it
  const float *found_inf;  // device memory or null
  uint64_t seed;
  int32_t rule;
  uint32_t flags;
  uint32_t num_items;
  uint32_t general;  // which kernel: the general one, or that of the usual types
};

struct LiveItem {
  float *counter;
  uint32_t record;  // place of its LiveRecord among the words
  uint32_t reserved;
};

struct LiveValue {
  const void *value;
  int32_t field, is_float64;
};

// One row of hyper-parameters; its live values follow it.
struct LiveRecord {
  steepest_hyper hyper;
  uint64_t num_values;
};

constexpr int kItemWords = sizeof(LiveItem) / 8, kValueWords = sizeof(LiveValue) / 8;
constexpr int kRecordWords = sizeof(LiveRecord) / 8;

// Items fill the words from the front, records from the back.
struct LiveLaunch {
  static constexpr int kWords = static_cast<int>((kArgumentBytes - sizeof(LiveHeader)) / 8);
  LiveHeader header;
  uint64_t words[kWords];
};

static_assert(sizeof(LiveLaunch) <= kArgumentBytes, "too large for an argument");
static_assert(kRecordWords + kLiveFields * kValueWords + kItemWords <= LiveLaunch::kWords, "a tensor must fit");

template <class Rule>
constexpr bool kRowFits = sizeof(typename GeneralLaunch<Rule>::Row) <= STEEPEST_DEVICE_ROW_BYTES &&
                          alignof(typename GeneralLaunch<Rule>::Row) <= 16;
static_assert(kRowFits<Sgd<true>> && kRowFits<Adagrad> && kRowFits<Rmsprop<true, true>> && kRowFits<Adam<true>> &&
                  kRowFits<Lion> && kRowFits<Sign> && kRowFits<Perturb<true, true>> && kRowFits<Restore>,
              "STEEPEST_DEVICE_ROW_BYTES is too small");

inline int64_t live_row_bytes(const steepest_step_args &a, bool general) {
  return with_rule(a.rule, a.flags, [&](auto rule) {
    using Rule = decltype(rule);
    return static_cast<int64_t>(general ? sizeof(typename GeneralLaunch<Rule>::Row)
                                        : sizeof(typename PlainLaunch<Rule>::Row));
  });
}

// Fills one launch after another and calls emit(launch) with each.
template <class Emit>
class LivePacker {
 public:
  LivePacker(const steepest_step_args &args, bool general, Emit emit)
      : args_(args), row_bytes_(live_row_bytes(args, general)), emit_(emit) {
    launch_.header = {args.device_rows, args.found_inf, args.seed, args.rule, args.flags, 0, general};
  }

  void pack() {
    for (int64_t i = 0; i < args_.num_tensors; ++i) add(i);
    if (launch_.header.num_items > 0) flush();
  }

 private:
  void add(int64_t i) {
    const int32_t hyper = args_.hyper_index ? args_.hyper_index[i] : 0;
    const int64_t front = launch_.header.num_items * kItemWords;
    if (front + kItemWords + (hyper == hyper_ ? 0 : seek(hyper)) > back_) flush();
    if (hyper != hyper_) add_record(hyper);
    LiveItem &item = reinterpret_cast<LiveItem *>(launch_.words)[launch_.header.num_items++];
    item = {args_.counters[i], static_cast<uint32_t>(back_), 0};
  }

  // Tensors of one group usually follow each other: a row that comes again is written again.
  void add_record(int32_t hyper) {
    back_ -= seek(hyper);
    const LiveRecord record{args_.hyper[hyper], static_cast<uint64_t>(last_value_ - first_value_)};
    std::memcpy(launch_.words + back_, &record, sizeof record);
    uint64_t *to = launch_.words + back_ + kRecordWords;
    for (const steepest_live *live = first_value_; live != last_value_; ++live, to += kValueWords) {
      const LiveValue value{live->value, live->field, live->is_float64};
      std::memcpy(to, &value, sizeof value);
    }
    hyper_ = hyper;
  }

  // Finds the live values of a row, which are listed in the order of rows; returns the words of its record.
  int64_t seek(int32_t hyper) {
    const auto before = [](const steepest_live &live, int32_t row) { return live.row < row; };
    first_value_ = std::lower_bound(args_.live, args_.live + args_.num_live, hyper, before);
    last_value_ = std::lower_bound(first_value_, args_.live + args_.num_live, hyper + 1, before);
    return kRecordWords + (last_value_ - first_value_) * kValueWords;
  }

  void flush() {
    emit_(launch_);
    launch_.header.rows = static_cast<char *>(launch_.header.rows) + launch_.header.num_items * row_bytes_;
    launch_.header.num_items = 0;
    hyper_ = -1;
    back_ = LiveLaunch::kWords;
  }

  const steepest_step_args &args_;
  const int64_t row_bytes_;
  Emit emit_;
  int32_t hyper_ = -1;                  // the row of hyper-parameters of the record written last
  int64_t back_ = LiveLaunch::kWords;   // where it begins
  const steepest_live *first_value_ = nullptr, *last_value_ = nullptr;
  LiveLaunch launch_;
};

template <class Emit>
void for_live_launches(const steepest_step_args &args, bool general, Emit emit) {
  LivePacker<Emit>(args, general, emit).pack();
}

// Before a step whose args have counters.
steepest_status launch_live(const StepCall &call, bool general);

}  // namespace steepest::cuda
