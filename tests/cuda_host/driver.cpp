// Runs the CUDA engine on the host through the C interface.  One command per test; each prints one line of JSON and
// exits with 0, or says on stderr what was wrong and exits with 1.
#include <sys/mman.h>

#include <cstdio>

#include "calls.h"
#include "cuda_shim.h"
#include "formula/survey.h"
#include "lists.h"
#include "live_values.h"
#include "measures.h"

namespace {

int64_t launches(const steepest_step_args &args) {
  const steepest_exec exec = on(STEEPEST_CUDA);
  int64_t count = -1;
  EXPECT(steepest_step_launches(&exec, &args, &count) == STEEPEST_OK, "%s", steepest_last_error());
  return count;
}

// Random lists through both engines: every element and guard byte must come out the same.
int compare_lists(uint64_t seed, int count, int64_t largest) {
  lists::Coverage seen;
  lists::Random random{std::mt19937_64(seed)};
  for (int i = 0; i < count; ++i) {
    lists::List cuda(random, largest, seen);
    lists::List cpu(cuda);
    const lists::List before(cuda);
    const steepest_step_args cuda_args = cuda.args(), cpu_args = cpu.args();
    const int64_t expected = launches(cuda_args);
    shim::launches = 0;
    EXPECT(step(on(STEEPEST_CUDA), cuda_args) == STEEPEST_OK, "list %d: %s", i, steepest_last_error());
    EXPECT(step(on(STEEPEST_CPU), cpu_args) == STEEPEST_OK, "list %d: %s", i, steepest_last_error());
    if (cpu.counted()) {
      lists::List known = before.known_to_the_host();
      EXPECT(step(on(STEEPEST_CPU), known.args()) == STEEPEST_OK, "list %d: %s", i, steepest_last_error());
      const std::string difference = cpu.difference(known);
      EXPECT(difference.empty(), "list %d: counted, known to the host: %s", i, difference.c_str());
    }
    const std::string difference = cuda.difference(cpu);
    EXPECT(difference.empty(), "list %d: CUDA, CPU: %s", i, difference.c_str());
    if (cuda.skipped())
      EXPECT(cuda.difference(before).empty(), "list %d was changed in spite of found_inf", i);
    EXPECT(shim::launches == expected, "list %d: %d launches, foretold %lld", i, shim::launches,
           static_cast<long long>(expected));
    seen.launches += expected;
    seen.lists_of_several_launches += expected > 1;
  }
  const auto print = [](const char *name, int64_t n) {
    std::printf("\"%s\": %lld, ", name, static_cast<long long>(n));
  };
  std::printf("{");
  print("tensors", seen.tensors), print("elements", seen.elements), print("empty", seen.empty);
  print("aligned", seen.aligned), print("shifted", seen.shifted), print("apart", seen.apart);
  print("skipped", seen.skipped), print("scaled", seen.scaled), print("clipped", seen.clipped);
  print("masters", seen.masters), print("residuals", seen.residuals), print("sources", seen.sources);
  print("averages", seen.averages), print("block8", seen.block8), print("stochastic", seen.stochastic);
  print("noise", seen.noise), print("mixed", seen.mixed);
  print("counted", seen.counted), print("live", seen.live);
  for (int rule = 0; rule < lists::kRuleCount; ++rule) print(("rule " + std::to_string(rule)).c_str(), seen.rules[rule]);
  print("launches", seen.launches), print("lists_of_several_launches", seen.lists_of_several_launches);
  std::printf("\"lists\": %lld}\n", static_cast<long long>(seen.lists));
  return 0;
}

steepest_measure_result result_of(const lists::Measure &measure, const steepest_exec &exec) {
  uint64_t bytes = 0;
  steepest_measure_result result;
  std::memset(&result, 0xa5, sizeof result);
  EXPECT(steepest_measure_workspace_size(&exec, &measure.args, &bytes) == STEEPEST_OK, "%s", steepest_last_error());
  std::vector<steepest::SurveyPart> workspace(bytes / sizeof(steepest::SurveyPart));
  EXPECT(steepest_measure(&exec, &measure.args, workspace.data(), bytes, &result) == STEEPEST_OK, "%s",
         steepest_last_error());
  return result;
}

bool same(double a, double b) { return a == b || (std::isnan(a) && std::isnan(b)); }

// Random lists through both engines: every number must come out the same.
int compare_measures(uint64_t seed, int count, int64_t largest, bool many_lists) {
  lists::Random random{std::mt19937_64(seed)};
  int64_t nonfinite = 0, launched = 0, relative = 0, clipped = 0, empty = 0, blocks = 0;
  for (int i = 0; i < count; ++i) {
    const lists::Measure measure(random, largest, many_lists);
    int64_t expected = -1;
    const steepest_exec exec = on(STEEPEST_CUDA);
    EXPECT(steepest_measure_launches(&exec, &measure.args, &expected) == STEEPEST_OK, "%s", steepest_last_error());
    shim::launches = 0;
    const steepest_measure_result cuda = result_of(measure, exec), cpu = result_of(measure, on(STEEPEST_CPU));
    EXPECT(same(cuda.norm, cpu.norm) && same(cuda.norm32, cpu.norm32) && same(cuda.largest, cpu.largest) &&
               same(cuda.clip_coefficient, cpu.clip_coefficient) && same(cuda.steepness, cpu.steepness) &&
               cuda.nonfinite == cpu.nonfinite,
           "measure %d, q %g: CUDA %.17g %g %g %g %g %u, CPU %.17g %g %g %g %g %u", i, measure.args.q, cuda.norm,
           cuda.norm32, cuda.largest, cuda.clip_coefficient, cuda.steepness, cuda.nonfinite, cpu.norm, cpu.norm32,
           cpu.largest, cpu.clip_coefficient, cpu.steepness, cpu.nonfinite);
    EXPECT(shim::launches == expected, "measure %d: %d launches, foretold %lld", i, shim::launches,
           static_cast<long long>(expected));
    nonfinite += cpu.nonfinite, launched += expected, clipped += cpu.clip_coefficient < 1, empty += cpu.largest == 0;
    relative += measure.args.q == 3.5 || measure.args.count_largest;
    blocks = std::max(blocks, measure.most_blocks());
  }
  const auto print = [](const char *name, int64_t n) { std::printf("\"%s\": %lld, ", name, static_cast<long long>(n)); };
  std::printf("{");
  print("nonfinite", nonfinite), print("launches", launched), print("relative", relative), print("clipped", clipped);
  print("empty", empty);
  std::printf("\"most_blocks\": %lld}\n", static_cast<long long>(blocks));
  return 0;
}

// Launches for `tensors` tensors of `numel` elements with `rows` hyper-parameter rows.  Only addresses are looked at.
int count_launches(int64_t tensors, int64_t numel, int64_t rows, bool amsgrad) {
  std::vector<int64_t> sizes(tensors, numel);
  std::vector<void *> addresses(tensors, reinterpret_cast<void *>(uintptr_t{4096}));
  steepest_hyper row{};
  row.lr = 1e-3, row.step = 1;
  std::vector<steepest_hyper> hyper(rows, row);
  std::vector<int32_t> index(tensors);
  for (int64_t i = 0; i < tensors; ++i) index[i] = static_cast<int32_t>(i % rows);
  steepest_step_args a{};
  a.struct_size = sizeof a;
  a.num_tensors = tensors;
  a.numel = sizes.data();
  a.rule = STEEPEST_ADAM;
  a.flags = STEEPEST_DECOUPLED | (amsgrad ? STEEPEST_AMSGRAD : 0);
  a.params = a.states[0] = a.states[1] = addresses.data();
  a.grads = const_cast<const void *const *>(addresses.data());
  if (amsgrad) a.states[2] = addresses.data();
  a.num_hyper = rows;
  a.hyper = hyper.data();
  a.hyper_index = index.data();
  std::printf("{\"launches\": %lld}\n", static_cast<long long>(launches(a)));
  return 0;
}

// More elements than 32 bits count, in memory that is only reserved: the last blocks of the grid run, and the elements
// that they step must equal a short tensor stepped by the CPU engine.
int step_far_end(int64_t tile) {
  // Three blocks step at least two whole tiles and one element, and at most three tiles.
  const int64_t far_numel = (int64_t{1} << 32) + 3 * tile + 5, near_numel = 3 * tile, checked = 2 * tile + 1;
  const size_t bytes = static_cast<size_t>(far_numel) * 2;
  void *far[4];
  std::vector<uint16_t> near[4];
  std::mt19937_64 random(7);
  for (int role = 0; role < 4; ++role) {
    far[role] = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (far[role] == MAP_FAILED) {
      std::printf("{\"skip\": \"cannot reserve %zu bytes of address space\"}\n", bytes);
      return 0;
    }
    for (int64_t i = 0; i < near_numel; ++i) near[role].push_back(static_cast<uint16_t>(0x3c00 + random() % 512));
    std::memcpy(static_cast<uint16_t *>(far[role]) + far_numel - near_numel, near[role].data(), near_numel * 2);
  }
  steepest_hyper hyper{};
  hyper.lr = 1e-2, hyper.beta1 = 0.9, hyper.beta2 = 0.99, hyper.eps = 1e-8, hyper.weight_decay = 0.1, hyper.step = 3;
  int64_t numel = far_numel;
  steepest_step_args a{};
  a.struct_size = sizeof a;
  a.num_tensors = 1;
  a.numel = &numel;
  a.rule = STEEPEST_ADAM, a.flags = STEEPEST_DECOUPLED;
  a.params = &far[0], a.grads = &far[1], a.states[0] = &far[2], a.states[1] = &far[3];
  a.param_dtype = a.grad_dtype = a.state_dtype = STEEPEST_FLOAT16;
  a.num_hyper = 1;
  a.hyper = &hyper;
  shim::blocks_at_end = 3;
  EXPECT(step(on(STEEPEST_CUDA), a) == STEEPEST_OK, "%s", steepest_last_error());

  void *short_ones[4];
  for (int role = 0; role < 4; ++role) short_ones[role] = near[role].data();
  numel = near_numel;
  a.params = &short_ones[0], a.grads = &short_ones[1], a.states[0] = &short_ones[2], a.states[1] = &short_ones[3];
  EXPECT(step(on(STEEPEST_CPU), a) == STEEPEST_OK, "%s", steepest_last_error());
  for (int role = 0; role < 4; ++role) {
    const int wrong = std::memcmp(static_cast<uint16_t *>(far[role]) + far_numel - checked,
                                  near[role].data() + near_numel - checked, checked * 2);
    EXPECT(!wrong, "%s differs beyond 2^32 elements", lists::kRoleNames[role]);
    munmap(far[role], bytes);
  }
  std::printf("{\"checked\": %lld}\n", static_cast<long long>(checked));
  return 0;
}

// Every whole vector between a tensor's ends is accessed 16 bytes at a time: which elements are makes no difference to
// results.
int count_wide_accesses() {
  struct Types {
    int32_t rule, param, state;
  };
  const Types types[] = {{STEEPEST_SGD, STEEPEST_FLOAT32, STEEPEST_FLOAT32},
                         {STEEPEST_LION, STEEPEST_BFLOAT16, STEEPEST_FLOAT32},
                         {STEEPEST_LION, STEEPEST_FLOAT16, STEEPEST_FLOAT32},
                         {STEEPEST_ADAM, STEEPEST_FLOAT32, STEEPEST_FLOAT32},
                         {STEEPEST_ADAM, STEEPEST_BFLOAT16, STEEPEST_FLOAT32},
                         {STEEPEST_ADAM, STEEPEST_FLOAT16, STEEPEST_FLOAT16}};
  steepest_hyper hyper{};
  hyper.lr = 1e-2, hyper.beta1 = 0.9, hyper.beta2 = 0.99, hyper.eps = 1e-8, hyper.step = 1;
  int64_t checked = 0;
  for (const auto &[rule, param, state] : types)
    for (const int64_t numel : {1, 3, 4, 7, 8, 9, 15, 16, 23, 40, 127, 128, 129, 136, 300})
      for (int64_t shift = 0; shift < static_cast<int64_t>(16 / lists::size_of(param)); ++shift)
        for (const bool apart : {false, true}) {
          const int64_t vector = 16 / lists::size_of(param), states = rule == STEEPEST_ADAM ? 2 : rule == STEEPEST_LION ? 1 : 0;
          const auto bytes = [&](int32_t dtype) { return numel * lists::size_of(dtype); };
          const auto offset = [&](int32_t dtype) { return shift * lists::size_of(dtype); };
          lists::Array memory[] = {{bytes(param), offset(param)},
                                   {bytes(param), (offset(param) + apart * lists::size_of(param)) % 16},
                                   {bytes(state), offset(state) % 16},
                                   {bytes(state), offset(state) % 16}};
          void *address[4];
          for (int role = 0; role < 4; ++role) std::memset(address[role] = memory[role].data(), 0, memory[role].bytes());
          steepest_step_args a{};
          a.struct_size = sizeof a;
          a.num_tensors = 1, a.numel = &numel;
          a.rule = rule;
          a.params = &address[0], a.grads = &address[1];
          for (int k = 0; k < states; ++k) a.states[k] = &address[2 + k];
          a.param_dtype = a.grad_dtype = param, a.state_dtype = state;
          a.num_hyper = 1, a.hyper = &hyper;
          shim::wide_loads = shim::wide_stores = 0;
          EXPECT(step(on(STEEPEST_CUDA), a) == STEEPEST_OK, "%s", steepest_last_error());
          const int64_t head = (vector - shift) % vector, whole = apart || numel < head ? 0 : (numel - head) / vector;
          const int64_t of_states = states * static_cast<int64_t>(lists::size_of(state) / lists::size_of(param));
          EXPECT(shim::wide_loads == whole * (2 + of_states) && shim::wide_stores == whole * (1 + of_states),
                 "%lld elements from %lld on, %s: %lld wide loads and %lld stores, expected %lld and %lld",
                 static_cast<long long>(numel), static_cast<long long>(shift), apart ? "apart" : "together",
                 shim::wide_loads.load(), shim::wide_stores.load(), static_cast<long long>(whole * (2 + of_states)),
                 static_cast<long long>(whole * (1 + of_states)));
          ++checked;
        }
  std::printf("{\"checked\": %lld}\n", static_cast<long long>(checked));
  return 0;
}

// A call that cannot use its device, or whose launches are refused, says so and leaves nothing changed or pending.
template <class Call, class Unchanged>
void refuse(const char *function, const Call &call, const Unchanged &unchanged) {
  const std::string name = function;
  EXPECT(call(on(STEEPEST_CUDA, 7)) == STEEPEST_ERROR_CUDA, "%s: a device that is not there was accepted", function);
  std::string message = steepest_last_error();
  EXPECT(message == name + ": device 7 cannot be used: invalid device ordinal", "%s", message.c_str());
  EXPECT(unchanged() && shim::device == 0, "%s: the refused call left traces", function);

  shim::launch_result = cudaErrorLaunchFailure;
  EXPECT(call(on(STEEPEST_CUDA, 1)) == STEEPEST_ERROR_CUDA, "%s: a refused launch went unnoticed", function);
  message = steepest_last_error();
  EXPECT(message == name + ": launch on device 1 failed: launch failure", "%s", message.c_str());
  EXPECT(unchanged() && shim::device == 0, "%s: the refused launch left traces", function);
  EXPECT(shim::last_error == cudaSuccess, "%s: a reported error is still pending", function);
  shim::launch_result = cudaSuccess;
}

template <class Call>
void accept(const char *function, const Call &call) {
  steepest_exec exec = on(STEEPEST_CUDA, 1);
  exec.stream = &exec;
  shim::launch_device = -1, shim::launch_stream = nullptr;
  EXPECT(call(exec) == STEEPEST_OK, "%s: %s", function, steepest_last_error());
  EXPECT(shim::launch_device == 1 && shim::device == 0, "%s: launched on device %d, left on %d", function,
         shim::launch_device, shim::device);
  EXPECT(static_cast<void *>(shim::launch_stream) == &exec, "%s: launched on another stream", function);
}

// Devices, streams, and what the runtime refuses: steps whose number the host knows and others, and measures.
int use_devices() {
  lists::Coverage seen;
  int known = 0, counted = 0;
  for (uint64_t seed = 5; known == 0 || counted == 0; ++seed) {
    lists::Random random{std::mt19937_64(seed)};
    lists::List list(random, 100, seen);
    const lists::List before(list);
    const steepest_step_args args = list.args();
    if (list.skipped() || launches(args) == 0 || (list.counted() ? counted : known) > 0) continue;
    ++(list.counted() ? counted : known);
    const auto call = [&](const steepest_exec &exec) { return step(exec, args); };
    refuse("steepest_step", call, [&] { return list.difference(before).empty(); });
    accept("steepest_step", call);
    EXPECT(!list.difference(before).empty(), "nothing was stepped");
  }
  lists::Random random{std::mt19937_64(5)};
  const lists::Measure measure(random, 5000);
  steepest_measure_result result, untouched;
  std::memset(&result, 0xa5, sizeof result), std::memset(&untouched, 0xa5, sizeof untouched);
  const auto call = [&](const steepest_exec &exec) {
    uint64_t bytes = 0;
    EXPECT(steepest_measure_workspace_size(&exec, &measure.args, &bytes) == STEEPEST_OK, "%s", steepest_last_error());
    std::vector<steepest::SurveyPart> workspace(bytes / sizeof(steepest::SurveyPart));
    return steepest_measure(&exec, &measure.args, workspace.data(), bytes, &result);
  };
  const auto unchanged = [&] { return std::memcmp(&result, &untouched, sizeof result) == 0; };
  refuse("steepest_measure", call, unchanged);
  accept("steepest_measure", call);
  EXPECT(!unchanged(), "nothing was measured");
  std::printf("{\"ok\": true}\n");
  return 0;
}

}  // namespace

int main(int argc, char **argv) {
  const std::string command = argc > 1 ? argv[1] : "";
  const auto number = [&](int i) { return std::atoll(argv[i]); };
  if (command == "lists" && argc == 5) return compare_lists(number(2), static_cast<int>(number(3)), number(4));
  if (command == "measures" && argc == 5) return compare_measures(number(2), static_cast<int>(number(3)), number(4), false);
  if (command == "many-lists" && argc == 5) return compare_measures(number(2), static_cast<int>(number(3)), number(4), true);
  if (command == "launches" && argc == 6) return count_launches(number(2), number(3), number(4), number(5) != 0);
  if (command == "far" && argc == 3) return step_far_end(number(2));
  if (command == "vectors" && argc == 2) return count_wide_accesses();
  if (command == "devices" && argc == 2) return use_devices();
  if (command == "live-fields" && argc == 2) return read_live_fields();
  if (command == "refusals" && argc == 2) return refuse_live_values();
  std::fprintf(stderr,
               "usage: lists SEED COUNT LARGEST | measures SEED COUNT LARGEST | many-lists SEED COUNT LARGEST | "
               "launches TENSORS NUMEL ROWS AMSGRAD | far TILE | vectors | devices | live-fields | refusals\n");
  return 2;
}
