// The norm kernels of one instruction set. CMakeLists.txt compiles this file once for each, with
// the set's flags and its name as LAYERNORM_ISA.
#include "extreme_row.hpp"
#include "row_norm.hpp"

namespace layernorm::LAYERNORM_ISA {
namespace {

// Rows are worked on together where they are not wide, which do better alone, and come from a cache
// and not from memory (all measured): what is read and written of them should stay in the first
// cache.
constexpr int64_t kWide = 3072;                // bytes of a row
constexpr int64_t kCached = int64_t{1} << 20;  // bytes of a tensor
// From this size on a tensor is written past the caches, which spares fetching it first.
constexpr int64_t kStreamed = int64_t{8} << 20;  // bytes

// Where a row begins; null where there is no tensor. Not in norm.hpp: of an inline function that
// all instruction sets share the linker keeps one, perhaps that of a set the machine does not have.
template <typename T>
const T* row_of(const void* data, const RowLayout& rows, int64_t row) {
  if (data == nullptr) return nullptr;
  int64_t offset = 0;
  for (int dim = rows.dims - 1; dim > 0; --dim) {
    offset += row % rows.sizes[dim] * rows.strides[dim];
    row /= rows.sizes[dim];
  }
  return static_cast<const T*>(data) + (offset + row * rows.strides[0]);
}

template <typename T, typename P, bool kCentred, bool kStream, int kRows>
LAYERNORM_INLINE void output(const T* const (&a)[kRows], const P* gain, const P* bias,
                             T* const (&y)[kRows], int64_t width,
                             const RowStats<Accumulate<T>> (&stats)[kRows]) {
  if constexpr (kCentred)
    if (bias != nullptr)
      return row_output<T, P, true, true, true, kStream, kRows>(a, gain, bias, y, width, stats);
  if (gain != nullptr)
    row_output<T, P, kCentred, true, false, kStream, kRows>(a, gain, bias, y, width, stats);
  else
    row_output<T, P, kCentred, false, false, kStream, kRows>(a, gain, bias, y, width, stats);
}

template <typename T, typename P, bool kCentred>
[[gnu::noinline, gnu::cold]] void extreme_forward(const Forward& f, const T* a, int64_t row) {
  using A = Accumulate<T>;
  const auto stats = extreme_statistics<T, kCentred>(a, f.width, f.eps);
  extreme_output(a, static_cast<const P*>(f.gain), static_cast<const P*>(f.bias),
                 static_cast<T*>(f.output) + row * f.width, f.width, stats);
  if (f.mean != nullptr) static_cast<A*>(f.mean)[row] = static_cast<A>(stats.mean / stats.scale);
  if (f.rstd != nullptr) static_cast<A*>(f.rstd)[row] = static_cast<A>(stats.rstd * stats.scale);
}

// Statistics and output of rows whose elements begin at a[r].
template <typename T, typename P, bool kCentred, bool kStream, int kRows>
LAYERNORM_INLINE bool normalize(const Forward& f, const T* const (&a)[kRows], int64_t row) {
  using A = Accumulate<T>;
  RowStats<A> stats[kRows];
  if (__builtin_expect(!(row_statistics<T, kCentred, kRows>(a, f.width, f.eps, stats)), 0))
    return false;
  T* y[kRows];
  for (int r = 0; r < kRows; ++r) y[r] = static_cast<T*>(f.output) + (row + r) * f.width;
  output<T, P, kCentred, kStream, kRows>(a, static_cast<const P*>(f.gain),
                                         static_cast<const P*>(f.bias), y, f.width, stats);
  for (int r = 0; r < kRows; ++r) {
    if (f.mean != nullptr) static_cast<A*>(f.mean)[row + r] = stats[r].mean + stats[r].rest;
    if (f.rstd != nullptr) static_cast<A*>(f.rstd)[row + r] = stats[r].rstd;
  }
  return true;
}

template <typename T, typename P, bool kCentred>
[[gnu::noinline]] void normalize_one(const Forward& f, const T* a, int64_t row) {
  const T* const one[1] = {a};
  if (!normalize<T, P, kCentred, false, 1>(f, one, row)) extreme_forward<T, P, kCentred>(f, a, row);
}

template <typename T, typename P, bool kCentred, bool kStream, int kRows>
LAYERNORM_INLINE void some_rows_forward(const Forward& f, int64_t row) {
  const T* a[kRows];
  for (int r = 0; r < kRows; ++r) {
    a[r] = row_of<T>(f.input, f.input_rows, row + r);
    if (f.residual != nullptr) {
      T* const sum = static_cast<T*>(f.sum) + (row + r) * f.width;
      row_add(a[r], row_of<T>(f.residual, f.residual_rows, row + r), sum, f.width);
      a[r] = sum;
    }
  }
  if constexpr (kRows == 1 && !kStream) {
    normalize_one<T, P, kCentred>(f, a[0], row);
  } else if (__builtin_expect(!(normalize<T, P, kCentred, kStream, kRows>(f, a, row)), 0)) {
    for (int r = 0; r < kRows; ++r) normalize_one<T, P, kCentred>(f, a[r], row + r);
  }
}

// Whether a tensor written to p is so large that it leaves the caches before it is read again.
template <typename T>
bool streams(const void* p, int64_t rows, int64_t width) {
  const int64_t bytes = width * static_cast<int64_t>(sizeof(T));
  return bytes % 64 == 0 && reinterpret_cast<uintptr_t>(p) % 64 == 0 && rows * bytes >= kStreamed;
}

template <typename T, typename P, bool kCentred>
void forward(const Forward& f, int64_t row_begin, int64_t row_end) {
  const int64_t bytes = f.width * static_cast<int64_t>(sizeof(T));
  int64_t row = row_begin;
  if (streams<T>(f.output, f.rows, f.width)) {
    for (; row < row_end; ++row) some_rows_forward<T, P, kCentred, true, 1>(f, row);
    return end_stream();
  }
  if (bytes <= kWide && f.rows * bytes <= kCached)
    for (; row + kTogether <= row_end; row += kTogether)
      some_rows_forward<T, P, kCentred, false, kTogether>(f, row);
  for (; row < row_end; ++row) some_rows_forward<T, P, kCentred, false, 1>(f, row);
}

// The sums of a block of rows for gain and bias; null where they are not wanted.
template <typename A>
struct BlockSums {
  A* gain;
  A* bias;
  void clear(int64_t width) const {
    for (A* sums : {gain, bias})
      if (sums != nullptr) std::memset(sums, 0, static_cast<size_t>(width) * sizeof(A));
  }
};

// As rows_backward() in row_norm.hpp; `write` says whether to grad_input too.
template <typename T, typename P, bool kCentred, int kRows>
LAYERNORM_INLINE bool some_rows_backward(const Backward& f, int64_t row,
                                         const BlockSums<Accumulate<T>>& sums, bool write,
                                         bool stream) {
  using A = Accumulate<T>;
  RowGradients<T, kRows> rows;
  for (int r = 0; r < kRows; ++r) {
    rows.grad[r] = row_of<T>(f.grad, f.grad_rows, row + r);
    rows.grad_sum[r] = row_of<T>(f.grad_sum, f.grad_sum_rows, row + r);
    rows.input[r] = row_of<T>(f.input, f.input_rows, row + r);
    rows.grad_input[r] = !write || f.grad_input == nullptr
                             ? nullptr
                             : static_cast<T*>(f.grad_input) + (row + r) * f.width;
    rows.mean[r] = kCentred ? static_cast<const A*>(f.mean)[row + r] : A{0};
    rows.rstd[r] = static_cast<const A*>(f.rstd)[row + r];
  }
  const auto* const gain = static_cast<const P*>(f.gain);
  if (sums.gain != nullptr)
    return rows_backward<T, P, kCentred, true, true, kRows>(rows, gain, sums.gain, sums.bias,
                                                            f.width, stream);
  if (gain != nullptr)
    return rows_backward<T, P, kCentred, true, false, kRows>(rows, gain, nullptr, nullptr, f.width,
                                                             stream);
  return rows_backward<T, P, kCentred, false, false, kRows>(rows, gain, nullptr, nullptr, f.width,
                                                            stream);
}

template <typename T, typename P, bool kCentred>
[[gnu::noinline]] bool row_backward(const Backward& f, int64_t row,
                                    const BlockSums<Accumulate<T>>& sums, bool write, bool stream) {
  return some_rows_backward<T, P, kCentred, 1>(f, row, sums, write, stream);
}

template <typename T, typename P, bool kCentred>
[[gnu::noinline, gnu::cold]] void extreme_row_backward(const Backward& f, int64_t row,
                                                       const BlockSums<Accumulate<T>>& sums,
                                                       bool write) {
  using A = Accumulate<T>;
  const double mean = kCentred ? static_cast<double>(static_cast<const A*>(f.mean)[row]) : 0.0;
  T* const grad_input =
      !write || f.grad_input == nullptr ? nullptr : static_cast<T*>(f.grad_input) + row * f.width;
  extreme_backward<T, P, kCentred>(
      row_of<T>(f.grad, f.grad_rows, row), row_of<T>(f.grad_sum, f.grad_sum_rows, row),
      row_of<T>(f.input, f.input_rows, row), mean,
      static_cast<double>(static_cast<const A*>(f.rstd)[row]), static_cast<const P*>(f.gain),
      grad_input, sums.gain, sums.bias, f.width);
}

// Whether a row can go by some_rows_backward() as far as its statistics say: outside of these
// bounds the products on the way could leave A's range although the result does not. And the terms
// of a row of one element cancel, which only the extreme row's order of operations does to the last
// bit.
template <typename T>
bool is_ordinary(const Backward& f, int64_t row) {
  using A = Accumulate<T>;
  constexpr A kLeast = sizeof(A) == 4 ? A(0x1p-30) : A(0x1p-300);
  constexpr A kMost = sizeof(A) == 4 ? A(0x1p30) : A(0x1p300);
  const A rstd = static_cast<const A*>(f.rstd)[row];
  return rstd > kLeast && rstd < kMost && f.width > 1;
}

// A row by itself, where one of those beside it or it itself does not keep in range.
template <typename T, typename P, bool kCentred>
[[gnu::noinline, gnu::cold]] void careful_row_backward(const Backward& f, int64_t row,
                                                       const BlockSums<Accumulate<T>>& sums,
                                                       bool write) {
  if (!is_ordinary<T>(f, row) || !row_backward<T, P, kCentred>(f, row, {}, write, false))
    extreme_row_backward<T, P, kCentred>(f, row, sums, write);
  else if (sums.gain != nullptr)
    row_backward<T, P, kCentred>(f, row, sums, false, false);
}

template <typename T, typename P, bool kCentred>
void backward(const Backward& f, int64_t block_begin, int64_t block_end) {
  using A = Accumulate<T>;
  const bool stream = f.grad_input != nullptr && streams<T>(f.grad_input, f.rows, f.width);
  for (int64_t block = block_begin; block < block_end; ++block) {
    const auto sums_of = [&](void* sums) {
      return sums == nullptr ? nullptr : static_cast<A*>(sums) + block * f.width;
    };
    const BlockSums<A> sums{sums_of(f.block_gain), sums_of(f.block_bias)};
    sums.clear(f.width);
    const int64_t begin = block * f.rows_per_block;
    const int64_t end = begin + f.rows_per_block < f.rows ? begin + f.rows_per_block : f.rows;
    bool lost = false;
    for (int64_t row = begin; row < end;) {
      int64_t last = row;
      while (last < end && last < row + kTogether && is_ordinary<T>(f, last)) ++last;
      if (last == row) {
        extreme_row_backward<T, P, kCentred>(f, row++, sums, true);
        continue;
      }
      if (last < row + kTogether) last = row + 1;
      const bool kept = last == row + 1 ? row_backward<T, P, kCentred>(f, row, sums, true, stream)
                                        : some_rows_backward<T, P, kCentred, kTogether>(
                                              f, row, sums, true, stream);
      for (lost = lost || !kept; row < last; ++row)
        if (__builtin_expect(!kept, 0)) careful_row_backward<T, P, kCentred>(f, row, {}, true);
    }
    if (!lost || sums.gain == nullptr) continue;
    sums.clear(f.width);
    for (int64_t row = begin; row < end; ++row)
      careful_row_backward<T, P, kCentred>(f, row, sums, false);
  }
  if (stream) end_stream();
}

// The columns begin and end where a pair of parts does, or at the end of the row.
template <typename T, typename P>
void reduce(const Reduce& f, int64_t column_begin, int64_t column_end) {
  using A = Accumulate<T>;
  each_part<A>(column_begin, column_end, [&](int64_t i, auto part) {
    const A* sums = static_cast<const A*>(f.block_sums) + i;
    auto total = load(sums, part);
    for (int64_t block = 1; block < f.blocks; ++block)
      total = total + load(sums + block * f.width, part);
    store_beside<T>(static_cast<P*>(f.grad) + i, total, part);
  });
}

template <typename T, typename P, bool kCentred>
constexpr NormKernels kernels() {
  return {forward<T, P, kCentred>, backward<T, P, kCentred>, reduce<T, P>};
}

}  // namespace

#define LAYERNORM_KERNELS(kCentred)                                                  \
  {                                                                                  \
      kernels<float, float, kCentred>(),       kernels<double, double, kCentred>(),  \
      kernels<bfloat16, bfloat16, kCentred>(), kernels<bfloat16, float, kCentred>(), \
      kernels<float16, float16, kCentred>(),   kernels<float16, float, kCentred>(),  \
  }
extern const NormTable norms = {LAYERNORM_KERNELS(false), LAYERNORM_KERNELS(true)};
#undef LAYERNORM_KERNELS

}  // namespace layernorm::LAYERNORM_ISA
