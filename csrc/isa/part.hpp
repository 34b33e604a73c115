// Parts of a row: some vectors of it, read from memory and written to it as the row's type.
#pragma once

#include "simd.hpp"

namespace layernorm::LAYERNORM_ISA {

// How many vectors a part of a row is, and how many of its elements belong to the row. A pair holds
// its elements in the order that is cheapest for the type of the row: side by side, but for
// bfloat16 first those at even places, then those at odd ones.
struct Pair {
  static constexpr int kVectors = 2;
};
struct Whole {
  static constexpr int kVectors = 1;
};
struct First {
  static constexpr int kVectors = 1;
  int64_t count;
};
// Some whole vectors, side by side whatever the type of the row.
template <int k>
struct Block {
  static constexpr int kVectors = k;
};

template <typename A, int kVectors>
struct Part {
  Vec<A> v[kVectors];
};

template <typename A, int kVectors, typename Function>
LAYERNORM_INLINE Part<A, kVectors> each(const Function& function) {
  Part<A, kVectors> result;
#pragma GCC unroll 8
  for (int k = 0; k < kVectors; ++k) result.v[k] = function(k);
  return result;
}

template <typename A, int k>
LAYERNORM_INLINE Part<A, k> operator+(const Part<A, k>& a, const Part<A, k>& b) {
  return each<A, k>([&](int i) { return a.v[i] + b.v[i]; });
}
template <typename A, int k>
LAYERNORM_INLINE Part<A, k> operator*(const Part<A, k>& a, const Part<A, k>& b) {
  return each<A, k>([&](int i) { return a.v[i] * b.v[i]; });
}
template <typename A, int k>
LAYERNORM_INLINE Part<A, k> operator-(const Part<A, k>& a, const Part<A, k>& b) {
  return each<A, k>([&](int i) { return a.v[i] - b.v[i]; });
}
template <typename A, int k>
LAYERNORM_INLINE Part<A, k> operator/(const Part<A, k>& a, const Part<A, k>& b) {
  return each<A, k>([&](int i) { return a.v[i] / b.v[i]; });
}
template <typename A, int k>
LAYERNORM_INLINE Part<A, k> operator-(const Part<A, k>& a) {
  return each<A, k>([&](int i) { return -a.v[i]; });
}
template <typename A, int k>
LAYERNORM_INLINE Part<A, k> operator*(const Part<A, k>& a, A b) {
  return each<A, k>([&](int i) { return a.v[i] * splat(b); });
}
template <typename A, int k>
LAYERNORM_INLINE Part<A, k> operator-(const Part<A, k>& a, A b) {
  return each<A, k>([&](int i) { return a.v[i] - splat(b); });
}
template <typename A, int k>
LAYERNORM_INLINE Part<A, k> fma(const Part<A, k>& a, const Part<A, k>& b, const Part<A, k>& c) {
  return each<A, k>([&](int i) { return fma(a.v[i], b.v[i], c.v[i]); });
}
template <typename A, int k>
LAYERNORM_INLINE Part<A, k> fma(const Part<A, k>& a, A b, const Part<A, k>& c) {
  return each<A, k>([&](int i) { return fma(a.v[i], splat(b), c.v[i]); });
}
template <typename A, int k>
LAYERNORM_INLINE Part<A, k> fma(const Part<A, k>& a, A b, A c) {
  return each<A, k>([&](int i) { return fma(a.v[i], splat(b), splat(c)); });
}

// Zeros in place of the elements beyond the row.
template <typename A, int k>
LAYERNORM_INLINE Part<A, k> keep(const Part<A, k>& a, auto) {
  return a;
}
template <typename A>
LAYERNORM_INLINE Part<A, 1> keep(const Part<A, 1>& a, First part) {
  using Mask = decltype(a.v[0] < a.v[0]);
  Mask lane;
  for (int i = 0; i < kLanes<A>; ++i) lane[i] = i;
  return {
      {lane < static_cast<std::remove_cvref_t<decltype(lane[0])>>(part.count) ? a.v[0] : Vec<A>{}}};
}

template <typename T>
inline constexpr bool kEvenOdd = std::is_same_v<T, bfloat16>;

// The even and the odd elements of two vectors, and back.
template <typename V, int... kIndex>
LAYERNORM_INLINE void to_even_odd(V& a, V& b, std::integer_sequence<int, kIndex...>) {
  const V even = __builtin_shufflevector(a, b, 2 * kIndex...);
  b = __builtin_shufflevector(a, b, 2 * kIndex + 1 ...);
  a = even;
}
template <typename V, int... kIndex>
LAYERNORM_INLINE void from_even_odd(V& even, V& odd, std::integer_sequence<int, kIndex...>) {
  constexpr int kCount = sizeof...(kIndex);
  const V a = __builtin_shufflevector(even, odd, kIndex / 2 + kIndex % 2 * kCount...);
  odd = __builtin_shufflevector(even, odd, kCount / 2 + kIndex / 2 + kIndex % 2 * kCount...);
  even = a;
}
template <typename A>
using Places = std::make_integer_sequence<int, kLanes<A>>;

// The elements at p.
template <typename T>
LAYERNORM_INLINE Part<Accumulate<T>, 1> load(const T* p, Whole) {
  Raw<T> raw;
  std::memcpy(&raw, p, sizeof raw);
  return {{widen(raw, T{})}};
}
template <typename T>
LAYERNORM_INLINE Part<Accumulate<T>, 2> load(const T* p, Pair) {
  if constexpr (kEvenOdd<T>) {
    Words both;
    std::memcpy(&both, p, sizeof both);
    return {{reinterpret_cast<Vec<float>>(both << 16),
             reinterpret_cast<Vec<float>>(both & 0xffff0000U)}};
  } else {
    return {{load(p, Whole{}).v[0], load(p + kLanes<Accumulate<T>>, Whole{}).v[0]}};
  }
}
template <typename T, int k>
LAYERNORM_INLINE Part<Accumulate<T>, k> load(const T* p, Block<k>) {
  return each<Accumulate<T>, k>(
      [&](int i) { return load(p + i * kLanes<Accumulate<T>>, Whole{}).v[0]; });
}
// The first part.count of them, 0 < part.count < lanes, and zeros.
template <typename T>
LAYERNORM_INLINE Part<Accumulate<T>, 1> load(const T* p, First part) {
#if defined(LAYERNORM_AVX512)
  const auto mask = (uint32_t{1} << part.count) - 1;
  if constexpr (std::is_same_v<T, double>)
    return {{_mm512_maskz_loadu_pd(static_cast<__mmask8>(mask), p)}};
  else if constexpr (std::is_same_v<T, float>)
    return {{_mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), p)}};
  else
    return {{widen(
        reinterpret_cast<Halves>(_mm256_maskz_loadu_epi16(static_cast<__mmask16>(mask), p)), T{})}};
#else
  Raw<T> raw{};
  std::memcpy(&raw, p, static_cast<size_t>(part.count) * sizeof(T));
  return {{widen(raw, T{})}};
#endif
}

// Writes a vector to p; past the caches where kStream is true, then p is a multiple of its size.
template <bool kStream, typename V>
LAYERNORM_INLINE void write(void* p, V raw) {
#if defined(__x86_64__)
  if constexpr (kStream && sizeof raw == 64)
#if defined(LAYERNORM_AVX512)
    return _mm512_stream_si512(static_cast<__m512i*>(p), reinterpret_cast<__m512i>(raw));
#else
    static_assert(sizeof raw != 64);
#endif
  if constexpr (kStream && sizeof raw == 32)
#if defined(LAYERNORM_AVX512) || defined(LAYERNORM_AVX2)
    return _mm256_stream_si256(static_cast<__m256i*>(p), reinterpret_cast<__m256i>(raw));
#else
    static_assert(sizeof raw != 32);
#endif
  if constexpr (kStream && sizeof raw == 16)
    return _mm_stream_si128(static_cast<__m128i*>(p), reinterpret_cast<__m128i>(raw));
#endif
  std::memcpy(p, &raw, sizeof raw);
}
// After writing past the caches, before another thread reads.
inline void end_stream() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

template <bool kStream, typename T>
LAYERNORM_INLINE void store(T* p, const Part<Accumulate<T>, 1>& a, Whole) {
  write<kStream>(p, narrow(a.v[0], T{}));
}
template <bool kStream, typename T>
LAYERNORM_INLINE void store(T* p, const Part<Accumulate<T>, 2>& a, Pair) {
  if constexpr (kEvenOdd<T>) {
    write<kStream>(p, narrow_even_odd(a.v[0], a.v[1]));
  } else {
    write<kStream>(p, narrow(a.v[0], T{}));
    write<kStream>(p + kLanes<Accumulate<T>>, narrow(a.v[1], T{}));
  }
}
template <bool kStream, typename T, int k>
LAYERNORM_INLINE void store(T* p, const Part<Accumulate<T>, k>& a, Block<k>) {
#pragma GCC unroll 8
  for (int i = 0; i < k; ++i) write<kStream>(p + i * kLanes<Accumulate<T>>, narrow(a.v[i], T{}));
}
template <bool kStream, typename T>
LAYERNORM_INLINE void store(T* p, const Part<Accumulate<T>, 1>& a, First part) {
  const Raw<T> raw = narrow(a.v[0], T{});
#if defined(LAYERNORM_AVX512)
  const auto mask = (uint32_t{1} << part.count) - 1;
  if constexpr (std::is_same_v<T, double>)
    _mm512_mask_storeu_pd(p, static_cast<__mmask8>(mask), raw);
  else if constexpr (std::is_same_v<T, float>)
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>(mask), raw);
  else
    _mm256_mask_storeu_epi16(p, static_cast<__mmask16>(mask), reinterpret_cast<__m256i>(raw));
#else
  std::memcpy(p, &raw, static_cast<size_t>(part.count) * sizeof(T));
#endif
}

// Elements of type P in the order of a row of type T.
template <typename T, typename P>
LAYERNORM_INLINE auto load_beside(const P* p, auto part) {
  auto a = load(p, part);
  if constexpr (part.kVectors == 2 && kEvenOdd<T> && !kEvenOdd<P>)
    to_even_odd(a.v[0], a.v[1], Places<Accumulate<P>>{});
  return a;
}
template <typename T, typename P>
LAYERNORM_INLINE void store_beside(P* p, auto a, auto part) {
  if constexpr (part.kVectors == 2 && kEvenOdd<T> && !kEvenOdd<P>)
    from_even_odd(a.v[0], a.v[1], Places<Accumulate<P>>{});
  store<false>(p, a, part);
}

// Calls body(i, part) for the parts of [begin, end).
template <typename A, typename Body>
LAYERNORM_INLINE void each_part(int64_t begin, int64_t end, Body&& body) {
  int64_t i = begin;
  for (; i + 2 * kLanes<A> <= end; i += 2 * kLanes<A>) body(i, Pair{});
  if (i + kLanes<A> <= end) {
    body(i, Whole{});
    i += kLanes<A>;
  }
  if (i < end) body(i, First{end - i});
}

// Calls body(i, part) for vectors of [0, count): kVectors together as often as that goes, then one,
// the last one perhaps in part.
template <typename A, int kVectors, typename Body>
LAYERNORM_INLINE void each_block(int64_t count, Body&& body) {
  int64_t i = 0;
  for (; i + kVectors * kLanes<A> <= count; i += kVectors * kLanes<A>) body(i, Block<kVectors>{});
  if constexpr (kVectors > 1)
    for (; i + kLanes<A> <= count; i += kLanes<A>) body(i, Block<1>{});
  if (i < count) body(i, First{count - i});
}
template <typename A, typename Body>
LAYERNORM_INLINE void each_vector(int64_t count, Body&& body) {
  each_block<A, 1>(count, body);
}

template <typename T>
LAYERNORM_INLINE void put(T* p, const auto& a, auto part) {
  store<false>(p, a, part);
}

// Adds to a sum, if there is one.
template <typename A>
LAYERNORM_INLINE void add_to(A* sum, const auto& a, auto part) {
  if (sum != nullptr) put(sum, load(sum, part) + a, part);
}
template <typename A>
void add_row(A* sum, const A* row, int64_t count) {
  if (sum == nullptr) return;
  each_block<A, 4>(count, [&](int64_t i, auto part)
                              LAYERNORM_LAMBDA { add_to(sum + i, load(row + i, part), part); });
}

}  // namespace layernorm::LAYERNORM_ISA
