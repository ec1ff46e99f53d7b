// Trains a network with one hidden layer on handwritten digits: forward and backward in a few loops, clipping by the
// joint norm, AdamW by libsteepest.  Usage: train DATA STEPS; DATA is written by digits.py.  Prints a loss per step.
#include <steepest/steepest.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <vector>

using Floats = std::vector<float>;

// What the library says went wrong ends the program with its status.
void must(steepest_status status) {
  if (status == STEEPEST_OK) return;
  std::fprintf(stderr, "%s: %s\n", steepest_status_name(status), steepest_last_error());
  std::exit(10 + status);
}

template <class T>
std::vector<T> read(std::ifstream &file, size_t count) {
  std::vector<T> out(count);
  file.read(reinterpret_cast<char *>(out.data()), static_cast<std::streamsize>(count * sizeof(T)));
  if (!file) {
    std::fprintf(stderr, "the data file ends too early\n");
    std::exit(2);
  }
  return out;
}

struct Network {
  int features, hidden, classes;
  Floats w1, b1, w2, b2;
};

// Mean cross-entropy of all samples; its gradient goes to `gradient`, whose tensors stay where they are.
double loss_and_gradient(const Network &net, const Floats &x, const std::vector<int32_t> &labels, Network &gradient) {
  const size_t samples = labels.size();
  for (Floats *g : {&gradient.w1, &gradient.b1, &gradient.w2, &gradient.b2}) g->assign(g->size(), 0.0f);
  Floats h(net.hidden), dh(net.hidden), z(net.classes);
  double loss = 0;
  for (size_t s = 0; s < samples; ++s) {
    const float *in = &x[s * net.features];
    for (int j = 0; j < net.hidden; ++j) {
      float sum = net.b1[j];
      for (int i = 0; i < net.features; ++i) sum += net.w1[j * net.features + i] * in[i];
      h[j] = sum > 0 ? sum : 0;
      dh[j] = 0;
    }
    float top = -INFINITY, total = 0;
    for (int k = 0; k < net.classes; ++k) {
      z[k] = net.b2[k];
      for (int j = 0; j < net.hidden; ++j) z[k] += net.w2[k * net.hidden + j] * h[j];
      top = std::fmax(top, z[k]);
    }
    for (int k = 0; k < net.classes; ++k) total += std::exp(z[k] - top);
    loss += std::log(total) + top - z[labels[s]];
    for (int k = 0; k < net.classes; ++k) {
      const float dz = (std::exp(z[k] - top) / total - (k == labels[s] ? 1.0f : 0.0f)) / static_cast<float>(samples);
      gradient.b2[k] += dz;
      for (int j = 0; j < net.hidden; ++j) {
        gradient.w2[k * net.hidden + j] += dz * h[j];
        dh[j] += dz * net.w2[k * net.hidden + j];
      }
    }
    for (int j = 0; j < net.hidden; ++j) {
      if (h[j] == 0) continue;
      gradient.b1[j] += dh[j];
      for (int i = 0; i < net.features; ++i) gradient.w1[j * net.features + i] += dh[j] * in[i];
    }
  }
  return loss / static_cast<double>(samples);
}

// AdamW over a fixed list of tensors; the library owns nothing, so the states live here.
class AdamW {
 public:
  AdamW(const std::vector<Floats *> &params, const std::vector<Floats *> &grads) {
    for (size_t i = 0; i < params.size(); ++i) {
      numel_.push_back(static_cast<int64_t>(params[i]->size()));
      states_.emplace_back(params[i]->size(), 0.0f);  // exp_avg
      states_.emplace_back(params[i]->size(), 0.0f);  // exp_avg_sq
      params_.push_back(params[i]->data());
      grads_.push_back(grads[i]->data());
    }
    for (size_t i = 0; i < params.size(); ++i) {
      exp_avgs_.push_back(states_[2 * i].data());
      exp_avg_sqs_.push_back(states_[2 * i + 1].data());
    }
  }

  // Clips by the joint norm inside the step: the gradients are not written.
  void step(double lr, double max_norm) {
    const float coefficient = clip(max_norm);
    steepest_hyper hyper = {};
    hyper.lr = lr;
    hyper.weight_decay = 0.01;
    hyper.beta1 = 0.9;
    hyper.beta2 = 0.999;
    hyper.eps = 1e-8;
    hyper.step = ++steps_;
    steepest_step_args args = {};
    args.struct_size = sizeof args;
    args.rule = STEEPEST_ADAM;
    args.flags = STEEPEST_DECOUPLED;
    args.num_tensors = static_cast<int64_t>(numel_.size());
    args.numel = numel_.data();
    args.params = params_.data();
    args.grads = grads_.data();
    args.states[0] = exp_avgs_.data();
    args.states[1] = exp_avg_sqs_.data();
    args.num_hyper = 1;
    args.hyper = &hyper;
    args.clip_coefficient = &coefficient;
    uint64_t bytes = 0;
    must(steepest_step_workspace_size(&exec_, &args, &bytes));
    workspace_.resize(bytes / 8 + 1);
    must(steepest_step(&exec_, &args, workspace_.data(), 8 * workspace_.size()));
  }

 private:
  float clip(double max_norm) {
    steepest_survey_args args = {};
    args.struct_size = sizeof args;
    args.num_tensors = static_cast<int64_t>(numel_.size());
    args.numel = numel_.data();
    args.tensors = grads_.data();
    args.q = 2;
    args.scale = 1;
    uint64_t bytes = 0;
    must(steepest_survey_workspace_size(&exec_, &args, &bytes));
    workspace_.resize(bytes / 8 + 1);
    steepest_survey_result found;
    must(steepest_survey(&exec_, &args, workspace_.data(), 8 * workspace_.size(), &found));
    if (found.nonfinite) std::fprintf(stderr, "step %lld: a gradient is not finite\n", static_cast<long long>(steps_ + 1));
    const double norm = std::sqrt(found.power_sum);
    return static_cast<float>(std::fmin(1.0, max_norm / (norm + 1e-6)));
  }

  steepest_exec exec_ = {sizeof(steepest_exec), STEEPEST_CPU, 0, nullptr, 0, 0};
  std::vector<int64_t> numel_;
  std::vector<Floats> states_;
  std::vector<void *> params_, exp_avgs_, exp_avg_sqs_;
  std::vector<const void *> grads_;
  std::vector<uint64_t> workspace_;
  int64_t steps_ = 0;
};

int main(int argc, char **argv) {
  must(steepest_check_abi(STEEPEST_ABI_VERSION));
  const long steps = argc == 3 ? std::strtol(argv[2], nullptr, 10) : 0;
  if (steps < 1) {
    std::fprintf(stderr, "usage: train DATA STEPS\n");
    return 1;
  }
  std::ifstream file(argv[1], std::ios::binary);
  const auto sizes = read<int32_t>(file, 4);
  const size_t samples = sizes[0], features = sizes[1], hidden = sizes[2], classes = sizes[3];
  const auto x = read<float>(file, samples * features);
  const auto labels = read<int32_t>(file, samples);
  Network net = {sizes[1], sizes[2], sizes[3], {}, {}, {}, {}};
  net.w1 = read<float>(file, hidden * features);
  net.b1 = read<float>(file, hidden);
  net.w2 = read<float>(file, classes * hidden);
  net.b2 = read<float>(file, classes);

  Network gradient = net;
  AdamW optimizer({&net.w1, &net.b1, &net.w2, &net.b2},
                  {&gradient.w1, &gradient.b1, &gradient.w2, &gradient.b2});
  for (long step = 0; step < steps; ++step) {
    std::printf("%.9g\n", loss_and_gradient(net, x, labels, gradient));
    optimizer.step(1e-2, 1.0);
  }
  return 0;
}
