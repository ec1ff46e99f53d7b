// SIMD clones of a loop.
#pragma once

// One clone per x86-64 level, chosen at load time.  v3 is AVX2, v4 AVX-512; contraction is off (see CMakeLists.txt), so
// all clones round alike.  Elsewhere than GCC on ELF x86-64 the default build is used.
#if defined(__x86_64__) && defined(__ELF__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define STEEPEST_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define STEEPEST_HAS_CLONES 1
#else
#define STEEPEST_CLONES
#define STEEPEST_HAS_CLONES 0
#endif
