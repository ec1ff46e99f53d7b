// Mutants of C++ sources behind run-time switches: mutation_switches.py writes these names into a copy of the sources.
// An operator stands between two halves of its mutant, `a + Op(...) + b`, which leaves precedence as it is.
#pragma GCC system_header
#ifndef STEEPEST_MUTATION_SWITCHES
#define STEEPEST_MUTATION_SWITCHES

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

// Vectors wider than the default target's must not be passed to functions.
#define MUTATION_INLINE __attribute__((always_inline)) inline constexpr

namespace mutation {

// The number of the mutant that is switched on, in a file that all processes share; 0 is none, and -1 is nobody's.
// Beside it: whether that mutant has been executed.
inline int none[2] = {};
inline volatile int *current = none;
struct Open {
  Open() {
    if (current != none) return;
    const int file = open(STEEPEST_MUTANT_FILE, O_RDWR);
    void *const page = mmap(nullptr, sizeof none, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (page == MAP_FAILED) __builtin_abort();
    current = static_cast<volatile int *>(page);
  }
};
static const Open opened;

// What the compiler computes is never switched; such mutants are compiled one by one.
MUTATION_INLINE bool on(int k) {
  if (__builtin_is_constant_evaluated() || *current != k) return false;
  return current[1] = 1;
}

template <class T, class U>
MUTATION_INLINE T pick(int k, T number, U other) {
  return on(k) ? static_cast<T>(other) : number;
}

template <class T>
MUTATION_INLINE T rounded(int k, T x) {
  return on(k) ? static_cast<T>(static_cast<float>(x)) : x;
}

struct Op {
  int swapped, dropped;  // the other operator; the left side alone
  constexpr Op(int a, int b) : swapped(a), dropped(b) {}  // braces would end a macro's argument at the comma
};
struct Comparison {
  int negated, shifted;
  constexpr Comparison(int a, int b) : negated(a), shifted(b) {}
};
struct Negate {
  int k;
  constexpr explicit Negate(int a) : k(a) {}
};

template <class X>
MUTATION_INLINE auto operator-(Negate sign, X x) {
  using R = decltype(-x);
  return on(sign.k) ? static_cast<R>(x) : -x;
}

#define MUTATION_OPERATOR(name, o, other) \
  template <class A> \
  struct name { \
    A a; \
    Op op; \
  }; \
  template <class A> \
  MUTATION_INLINE name<A> operator o(A a, Op op) { \
    return {a, op}; \
  } \
  template <class A, class B> \
  MUTATION_INLINE auto operator o(name<A> left, B b) { \
    using R = decltype(left.a o b); \
    if (on(left.op.swapped)) return static_cast<R>(left.a other b); \
    if constexpr (__is_constructible(R, A)) \
      if (on(left.op.dropped)) return static_cast<R>(left.a); \
    return static_cast<R>(left.a o b); \
  }
MUTATION_OPERATOR(Sum, +, -)
MUTATION_OPERATOR(Difference, -, +)
MUTATION_OPERATOR(Product, *, /)
MUTATION_OPERATOR(Quotient, /, *)
MUTATION_OPERATOR(Remainder, %, /)
MUTATION_OPERATOR(Left, <<, >>)
MUTATION_OPERATOR(Right, >>, <<)
MUTATION_OPERATOR(And, &, |)
MUTATION_OPERATOR(Or, |, &)

#define MUTATION_COMPARISON(name, o, negated_o, shifted_o) \
  template <class A> \
  struct name { \
    A a; \
    Comparison c; \
  }; \
  template <class A> \
  MUTATION_INLINE name<A> operator o(A a, Comparison c) { \
    return {a, c}; \
  } \
  template <class A, class B> \
  MUTATION_INLINE bool operator o(name<A> left, B b) { \
    if (on(left.c.negated)) return left.a negated_o b; \
    if (on(left.c.shifted)) return left.a shifted_o b; \
    return left.a o b; \
  }
MUTATION_COMPARISON(Less, <, >=, <=)
MUTATION_COMPARISON(LessEqual, <=, >, <)
MUTATION_COMPARISON(Greater, >, <=, >=)
MUTATION_COMPARISON(GreaterEqual, >=, <, >)
MUTATION_COMPARISON(Equal, ==, !=, !=)
MUTATION_COMPARISON(NotEqual, !=, ==, ==)

#define MUTATION_ASSIGNMENT(name, o, other) \
  template <class B> \
  struct name { \
    B b; \
    int k; \
  }; \
  template <class B> \
  MUTATION_INLINE name<B> operator o(Op op, B b) { \
    return {b, op.swapped}; \
  } \
  template <class A, class B> \
  MUTATION_INLINE A &operator o(A &a, name<B> right) { \
    if (on(right.k)) return a other right.b; \
    return a o right.b; \
  }
MUTATION_ASSIGNMENT(Add, +=, -=)
MUTATION_ASSIGNMENT(Subtract, -=, +=)
MUTATION_ASSIGNMENT(Multiply, *=, /=)
MUTATION_ASSIGNMENT(Divide, /=, *=)

}  // namespace mutation
#endif
