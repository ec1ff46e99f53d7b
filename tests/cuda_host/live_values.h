// Numbers of hyper-parameters that are read where the tensors live: each field is, and what cannot be is refused by name.
#pragma once

#include <string>

#include "calls.h"

// Each field as a live value, alone: both devices must step as when the host knows it, and some rule must read it.
inline int read_live_fields() {
  constexpr int kFields = 10;
  struct Rule {
    int32_t rule;
    uint32_t flags;
    int states;
  };
  const Rule rules[] = {{STEEPEST_SGD, STEEPEST_MOMENTUM, 1}, {STEEPEST_RMSPROP, STEEPEST_MOMENTUM, 2},
                        {STEEPEST_ADAGRAD, 0, 1}, {STEEPEST_ADAM, STEEPEST_DECOUPLED, 2}};
  const int64_t numel = 1;
  const double value = 0.375;
  bool read[kFields] = {};
  for (const auto &[rule, flags, states] : rules)
    for (int32_t field = 0; field < kFields; ++field) {
      alignas(16) char rows[STEEPEST_DEVICE_ROW_BYTES];
      const auto stepped = [&](steepest_device device, bool live_field, bool known_field) {
        float memory[4] = {2.0f, 1.5f, 0.25f, 0.5f}, count = 4;  // parameter, gradient, states
        void *address[4];
        for (int role = 0; role < 4; ++role) address[role] = &memory[role];
        float *counter = &count;
        steepest_hyper h{};
        double *const fields[] = {&h.lr,  &h.weight_decay, &h.l1,        &h.beta1, &h.beta2,
                                  &h.eps, &h.momentum,     &h.dampening, &h.alpha, &h.lr_decay};
        for (double *number : fields) *number = 0.125;
        if (known_field) *fields[field] = value;
        h.step = 5, h.average_decay = 1;
        const steepest_live live{0, field, 1, 0, &value};
        steepest_step_args a{};
        a.struct_size = sizeof a;
        a.num_tensors = 1, a.numel = &numel;
        a.rule = rule, a.flags = flags;
        a.params = &address[0], a.grads = &address[1];
        for (int k = 0; k < states; ++k) a.states[k] = &address[2 + k];
        a.param_dtype = a.grad_dtype = a.state_dtype = STEEPEST_FLOAT32;
        a.num_hyper = 1, a.hyper = &h;
        if (live_field) a.num_live = 1, a.live = &live, a.counters = &counter, a.device_rows = rows;
        EXPECT(step(on(device), a) == STEEPEST_OK, "%s", steepest_last_error());
        return std::vector<float>(memory, memory + 4);
      };
      const auto known = stepped(STEEPEST_CPU, false, true);
      EXPECT(stepped(STEEPEST_CPU, true, false) == known, "rule %d: field %d is not read on the CPU", rule, field);
      EXPECT(stepped(STEEPEST_CUDA, true, false) == known, "rule %d: field %d is not read by CUDA", rule, field);
      read[field] |= known != stepped(STEEPEST_CPU, false, false);
    }
  for (int field = 0; field < kFields; ++field) EXPECT(read[field], "no rule reads field %d", field);
  std::printf("{\"checked\": %zu}\n", kFields * sizeof rules / sizeof rules[0]);
  return 0;
}

// Live values that cannot be read are refused by name on both devices, and nothing is stepped.
inline int refuse_live_values() {
  float param = 1, grad = 1, rate = 0.5f, count = 0;
  alignas(16) char rows[STEEPEST_DEVICE_ROW_BYTES];
  void *params = &param, *grads = &grad;
  float *counter = &count;
  const int64_t numel = 1;
  steepest_hyper hyper{};
  hyper.lr = 0.25, hyper.step = 1;
  int checked = 0;
  const auto call = [&](const steepest_live &live, bool counted, void *device_rows, const std::string &expected) {
    steepest_step_args a{};
    a.struct_size = sizeof a;
    a.num_tensors = 1, a.numel = &numel;
    a.rule = STEEPEST_SGD;
    a.params = &params, a.grads = &grads;
    a.param_dtype = a.grad_dtype = a.state_dtype = STEEPEST_FLOAT32;
    a.num_hyper = 1, a.hyper = &hyper;
    a.num_live = 1, a.live = &live, a.counters = counted ? &counter : nullptr, a.device_rows = device_rows;
    for (const steepest_device device : {STEEPEST_CPU, STEEPEST_CUDA}) {
      if (device == STEEPEST_CPU && device_rows != rows) continue;  // the CPU needs none
      param = 1;
      const steepest_status status = step(on(device), a);
      const std::string message = status == STEEPEST_OK ? "accepted" : steepest_last_error();
      const bool as_expected = expected.empty() ? status == STEEPEST_OK && param == 0.5f
                                                : status == STEEPEST_ERROR_INVALID && param == 1 &&
                                                      message.find(expected) != std::string::npos;
      EXPECT(as_expected, "\"%s\", expected \"%s\"", message.c_str(), expected.c_str());
      ++checked;
    }
  };
  const auto live = [&](int32_t row, int32_t field, void *value) { return steepest_live{row, field, 0, 0, value}; };
  call(live(0, 0, &rate), true, rows, "");
  for (const int32_t field : {-1, 10})
    call(live(0, field, &rate), true, rows,
         "live[0].field is " + std::to_string(field) + ", expected 0 (lr) to 9 (lr_decay)");
  for (const int32_t row : {-1, 1})
    call(live(row, 0, &rate), true, rows,
         "live[0].row is " + std::to_string(row) + ", expected rows in order and below 1");
  call(live(0, 0, nullptr), true, rows, "live[0] is NULL");
  call(live(0, 0, &rate), false, rows, "live values need counters");
  call(live(0, 0, &rate), true, rows + 8, "expected device memory aligned to 16 bytes");
  std::printf("{\"checked\": %d}\n", checked);
  return 0;
}
