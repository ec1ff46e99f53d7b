// Packs random lists of counted tensors into launches (csrc/engine/cuda_live.h) and checks each launch: every tensor once,
// in order, with its row of hyper-parameters and the live values that belong to it, in as few launches as arguments allow.
// Addresses are numbers here.  Prints one line of JSON, or what is wrong; exit status 1 then.
#include "engine/cuda_live.h"

#include <cstring>
#include <vector>

#include "plan_checks.h"

namespace {

using namespace steepest;
using namespace steepest::cuda;

struct {
  long long launches, full, values, records;
} seen;

struct List {
  steepest_step_args args{};
  std::vector<float *> counters;
  std::vector<int32_t> hyper_index;
  std::vector<steepest_hyper> hyper;
  std::vector<steepest_live> live;

  List() {
    const struct {
      int32_t rule;
      uint32_t flags;
    } rules[] = {{STEEPEST_SGD, STEEPEST_MOMENTUM}, {STEEPEST_ADAM, STEEPEST_AMSGRAD}, {STEEPEST_LION, 0}};
    const auto &[rule, flags] = rules[below(3)];
    const int64_t count = one_in(10) ? 0 : one_in(3) ? 1 + below(6000) : 1 + below(40);
    const int64_t rows = one_in(3) ? 1 : 1 + below(one_in(2) ? 500 : 9);
    const bool jumping = one_in(3);
    for (int64_t i = 0; i < count; ++i) {
      counters.push_back(static_cast<float *>(place(4, i)));
      hyper_index.push_back(static_cast<int32_t>(jumping ? below(rows) : i * rows / count));
    }
    for (int32_t r = 0; r < rows; ++r) {
      steepest_hyper h{};
      h.lr = static_cast<double>(below(1 << 20)), h.eps = r;
      hyper.push_back(h);
      for (int32_t field = 0; field < 10; ++field)
        if (one_in(rows > 20 ? 20 : 2)) live.push_back({r, field, static_cast<int32_t>(below(2)), 0, place(8, 0)});
    }
    args.rule = rule, args.flags = flags, args.seed = generator();
    args.num_tensors = count, args.counters = counters.data();
    args.hyper = hyper.data(), args.num_hyper = rows;
    if (rows > 1 || one_in(2)) args.hyper_index = hyper_index.data();
    args.live = live.data(), args.num_live = static_cast<int64_t>(live.size());
    args.device_rows = place(1, 0);
    if (one_in(2)) args.found_inf = static_cast<float *>(place(4, 0));
  }

  int32_t hyper_of(int64_t i) const { return args.hyper_index ? hyper_index[i] : 0; }
  std::vector<steepest_live> values_of(int32_t row) const {
    std::vector<steepest_live> values;
    for (const steepest_live &value : live)
      if (value.row == row) values.push_back(value);
    return values;
  }
  // Words of 8 bytes that a row takes with its values.
  int64_t words_of(int32_t row) const {
    return static_cast<int64_t>((sizeof(LiveRecord) + values_of(row).size() * sizeof(LiveValue)) / 8);
  }
};

int64_t row_bytes(const steepest_step_args &a, bool general) {
  if (a.rule == STEEPEST_SGD)
    return general ? sizeof(GeneralLaunch<Sgd<true>>::Row) : sizeof(PlainLaunch<Sgd<true>>::Row);
  if (a.rule == STEEPEST_ADAM)
    return general ? sizeof(GeneralLaunch<Adam<true>>::Row) : sizeof(PlainLaunch<Adam<true>>::Row);
  return general ? sizeof(GeneralLaunch<Lion>::Row) : sizeof(PlainLaunch<Lion>::Row);
}

void check_record(const LiveLaunch &launch, int64_t at, const List &list, int32_t row) {
  LiveRecord record;
  std::memcpy(&record, launch.words + at, sizeof record);
  EXPECT(std::memcmp(&record.hyper, &list.hyper[row], sizeof record.hyper) == 0);
  const std::vector<steepest_live> values = list.values_of(row);
  EXPECT(record.num_values == values.size());
  for (size_t k = 0; k < values.size(); ++k) {
    LiveValue value;
    std::memcpy(&value, reinterpret_cast<const char *>(launch.words + at) + sizeof record + k * sizeof value, sizeof value);
    EXPECT(value.value == values[k].value && value.field == values[k].field && value.is_float64 == values[k].is_float64);
    ++seen.values;
  }
}

void check(const List &list, bool general) {
  const steepest_step_args &a = list.args;
  constexpr int64_t kWords = (32764 - sizeof(LiveHeader)) / 8, kItem = sizeof(LiveItem) / 8;
  EXPECT(sizeof(LiveLaunch) <= 32764 && sizeof(LiveLaunch) + 8 > 32764);
  int64_t next = 0, left = 0;  // the tensor that comes next; words that the launch before had left
  int32_t last = -1;           // the row that it ended with
  for_live_launches(a, general, [&](const LiveLaunch &launch) {
    const LiveHeader &header = launch.header;
    EXPECT(header.num_items >= 1 && next + header.num_items <= a.num_tensors);
    EXPECT(header.rows == static_cast<const char *>(a.device_rows) + next * row_bytes(a, general));
    EXPECT(header.found_inf == a.found_inf && header.seed == a.seed && header.rule == a.rule && header.flags == a.flags);
    EXPECT(header.general == general);
    // The launch before had no room for what comes now.
    if (next > 0) EXPECT(kItem + (list.hyper_of(next) == last ? 0 : list.words_of(list.hyper_of(next))) > left);
    seen.full += next > 0;
    int64_t back = kWords;
    last = -1;
    for (uint32_t k = 0; k < header.num_items; ++k, ++next) {
      LiveItem item;
      std::memcpy(&item, reinterpret_cast<const char *>(launch.words) + k * sizeof item, sizeof item);
      EXPECT(item.counter == list.counters[next]);
      if (list.hyper_of(next) != last) {
        last = list.hyper_of(next), back -= list.words_of(last);
        ++seen.records;
      }
      EXPECT(item.record == back && back >= static_cast<int64_t>(header.num_items) * kItem);
      check_record(launch, back, list, last);
    }
    left = back - static_cast<int64_t>(header.num_items) * kItem;
    ++seen.launches;
  });
  EXPECT(next == a.num_tensors);
  ++lists;
}

}  // namespace

int main(int, char **arguments) {
  generator.seed(std::strtoull(arguments[1], nullptr, 10));
  while (lists < std::atoi(arguments[2])) check(List(), one_in(2));
  std::printf("{");
  print("launches", seen.launches), print("full", seen.full), print("values", seen.values), print("records", seen.records);
  std::printf("\"lists\": %d}\n", lists);
}
