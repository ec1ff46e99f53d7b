// What the checks of work plans share: random numbers, addresses, and how a failure is said.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>

#include "steepest/steepest.h"

// Says what is wrong and ends with status 1.
#define EXPECT(condition)                                                                  \
  do {                                                                                     \
    if (!(condition)) {                                                                    \
      std::fprintf(stderr, "%s:%d: list %d: %s\n", __FILE__, __LINE__, lists, #condition); \
      std::exit(1);                                                                        \
    }                                                                                      \
  } while (0)

inline std::mt19937_64 generator;
inline int lists = 0;

inline int64_t below(int64_t n) { return static_cast<int64_t>(generator() % static_cast<uint64_t>(n)); }
inline bool one_in(int64_t n) { return below(n) == 0; }
inline int bytes_of(int32_t dtype) { return dtype == STEEPEST_FLOAT32 ? 4 : dtype == STEEPEST_BLOCK8 ? 1 : 2; }

// An address at `elements` elements of `size` bytes from a multiple of 16, never dereferenced.
inline void *place(int size, int64_t elements) {
  return reinterpret_cast<void *>((1 + below(int64_t{1} << 40)) * 64 + elements * size);
}
inline const void *after(const void *address, int64_t bytes) {
  return address ? static_cast<const char *>(address) + bytes : nullptr;
}

inline void print(const char *name, long long n) { std::printf("\"%s\": %lld, ", name, n); }
