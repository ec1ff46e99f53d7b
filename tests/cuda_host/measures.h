// Random lists of tensors to be measured.
#pragma once

#include "formula/survey.h"
#include "lists.h"

namespace lists {

// Lists of tensors and weights for a measure.
struct Measure {
  std::vector<std::vector<int64_t>> numel;
  std::vector<std::vector<Array>> tensors, weights;
  std::vector<std::vector<const void *>> tensor_address, weight_address;
  std::vector<steepest_survey_args> lists;
  float grad_scale = 1024.0f;
  steepest_measure_args args{};
  bool ties = false;  // several elements may be the largest

  // Many lists: as many as a measure may have, nearly all of them empty.
  Measure(Random &random, int64_t largest, bool many_lists = false) {
    static const double orders[] = {1.0, 2.0, 2.0, 2.0, 3.5, 1.25, std::numeric_limits<double>::infinity()};
    args.struct_size = sizeof args;
    args.q = orders[random.below(7)];
    args.inner = args.q == 1.0 && random.one_in(2);
    args.count_largest = std::isinf(args.q) && random.one_in(2);
    args.max_norm = random.uniform() * 10;
    if (random.one_in(2)) args.grad_scale = &grad_scale;
    const bool specials = random.one_in(4), zeros = random.one_in(8);
    ties = random.one_in(3);
    const int64_t count = many_lists ? 1024 : random.one_in(10) ? 0 : 1 + static_cast<int64_t>(random.below(3));
    numel.resize(count), tensors.resize(count), weights.resize(count);
    for (int64_t k = 0; k < count; ++k) {
      const bool many = !many_lists && random.one_in(10);
      const int64_t members = many_lists ? random.one_in(100) : many ? 900 + random.below(500) : 1 + random.below(6);
      steepest_survey_args list{};
      list.struct_size = sizeof list;
      list.q = args.q, list.scale = 1.0, list.inner = args.inner;
      list.dtype = static_cast<int32_t>(random.below(3)), list.weight_dtype = static_cast<int32_t>(random.below(3));
      list.alpha = random.uniform(), list.eps = random.uniform();
      list.num_tensors = members;
      const bool weighed = args.inner || random.one_in(3);
      for (int64_t i = 0; i < members; ++i) {
        numel[k].push_back(random.one_in(8) ? 0 : random.below(many ? 40 : largest));
        add(random, tensors[k], list.dtype, numel[k].back(), specials, zeros);
        if (weighed) add(random, weights[k], list.weight_dtype, numel[k].back(), false, false);
      }
      lists.push_back(list);
    }
    tensor_address.resize(count), weight_address.resize(count);
    for (int64_t k = 0; k < count; ++k) {
      for (const Array &array : tensors[k]) tensor_address[k].push_back(array.data());
      for (const Array &array : weights[k]) weight_address[k].push_back(array.data());
      lists[k].numel = numel[k].data(), lists[k].tensors = tensor_address[k].data();
      if (!weights[k].empty()) lists[k].weights = weight_address[k].data();
    }
    args.num_lists = count;
    args.lists = lists.data();
  }

  void add(Random &random, std::vector<Array> &to, int32_t dtype, int64_t numel, bool specials, bool zeros) {
    static const float infinity = std::numeric_limits<float>::infinity();
    static const float special[] = {0.0f, -0.0f, 1e-45f, 3e38f, -3e38f, infinity, -infinity, infinity - infinity};
    const size_t size = size_of(dtype);
    to.emplace_back(numel * size, random.below(4) * size);
    for (int64_t i = 0; i < numel; ++i) {
      const double exact = random.normal(), rounded = std::round(exact * 64) / 64;
      const float x = zeros ? 0.0f : static_cast<float>(ties ? rounded : exact);
      write(to.back().data() + i * size, dtype, specials && random.one_in(3000) ? special[random.below(8)] : x);
    }
  }

  // Blocks of elements of the list that has most.
  int64_t most_blocks() const {
    int64_t most = 0;
    for (const auto &list : numel) {
      int64_t blocks = 0;
      for (const int64_t n : list) blocks += (n + steepest::kSurveyBlock - 1) / steepest::kSurveyBlock;
      most = std::max(most, blocks);
    }
    return most;
  }
};

}  // namespace lists
