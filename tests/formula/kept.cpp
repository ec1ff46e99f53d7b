// Random numbers, powers and ways of keeping numbers (random.h, power.h, storage.h, survey.h) as functions over arrays.
#include "formula/power.h"
#include "formula/random.h"
#include "formula/storage.h"
#include "formula/survey.h"

#include <vector>

using namespace steepest;

extern "C" {

void words(uint64_t seed, int64_t step, int32_t purpose, const uint64_t *index, uint32_t *a, uint32_t *b, int64_t n) {
  const RandomStream stream = random_stream(seed, step, static_cast<RandomPurpose>(purpose));
  for (int64_t i = 0; i < n; ++i) {
    const RandomWords both = stream(index[i]);
    a[i] = both.a, b[i] = both.b;
  }
}
void normals(const uint32_t *word, float *out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = normal(word[i]);
}
void logs(const float *x, float *out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = log_of(x[i]);
}
void total(const double *sum, const uint32_t *largest, int64_t n, double *out, uint32_t *most) {
  std::vector<SurveyPart> parts;
  for (int64_t i = 0; i < n; ++i) parts.push_back({sum[i], largest[i]});
  parts.push_back({1e300, 0xffffffffu});  // not to be read
  const SurveyPart all = total_part(parts.data(), n);
  *out = all.power_sum, *most = all.largest;
}
void logs2(const double *x, double *out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = log2_normal(x[i]);
}
void powers2(const double *y, double *out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = exp2_negative(y[i]);
}
void powers(const double *x, double a, double *out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = power01(x[i], a);
}
void stochastic(const float *x, const uint32_t *random, uint16_t *out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = narrow_stochastic(x[i], random[i]).bits;
}
void split(const float *x, int32_t bits, uint16_t *high, int32_t *residual, int64_t n) {
  for (int64_t i = 0; i < n; ++i) high[i] = split_residual(x[i], bits, residual[i]).bits;
}
void join(const uint16_t *high, const int32_t *residual, int32_t bits, float *out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = join_residual(bfloat16{high[i]}, residual[i], bits);
}
void block_exponent(const uint32_t *largest, int32_t is_signed, uint32_t *out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = block8_exponent(largest[i], is_signed != 0);
}
void block_encode(const float *x, uint32_t exponent, const uint32_t *random, int32_t is_signed, uint8_t *out, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    out[i] = is_signed ? block8_encode_signed(x[i], exponent, random[i])
                       : block8_encode_magnitude(x[i], exponent, random[i]);
}
void block_decode(const uint8_t *code, uint32_t exponent, int32_t is_signed, float *out, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    out[i] = is_signed ? block8_signed(code[i], exponent) : block8_magnitude(code[i], exponent);
}
}
