// The recurrent kernels of one instruction set. CMakeLists.txt compiles this file once for each,
// with the set's flags and its name as LAYERNORM_ISA.
#include "gates.hpp"
#include "sequence_sums.hpp"

namespace layernorm::LAYERNORM_ISA {
namespace {

template <typename T>
constexpr RecurrentKernels kernels() {
  return {
      [](const Recurrent& r, bool backward) { return Prepared<T>(r, backward, nullptr).bytes; },
      [](const Recurrent& r, bool backward) { return Prepared<T>(r, backward, nullptr).parts(); },
      [](const Recurrent& r, bool backward, void* prepared, int64_t begin, int64_t end) {
        Prepared<T> weights(r, backward, prepared);
        for (int64_t part = begin; part < end; ++part) weights.prepare(r, part);
      },
      [](const Recurrent& r, int64_t rows, int team_size) {
        return scratch_bytes<ForwardScratch<T>>(r, rows, team_size);
      },
      [](const Recurrent& r, const void* prepared, void* scratch, int64_t row_begin,
         int64_t row_end, Team& team,
         int rank) { Forward<T>(r, prepared, scratch, row_begin, row_end, team, rank).run(); },
      chunk_steps,
      [](const Recurrent& r, const RecurrentGradients& g) {
        return BackwardShared<T>(r, g, nullptr).bytes;
      },
      [](const Recurrent& r, int64_t rows, int team_size) {
        return scratch_bytes<BackwardScratch<T>>(r, rows, team_size);
      },
      [](const Recurrent& r, const RecurrentGradients& g, const void* prepared, void* shared,
         void* scratch, int64_t chunk, int64_t row_begin, int64_t row_end, Team& team, int rank) {
        Backward<T>(r, g, prepared, shared, scratch, chunk, row_begin, row_end, team, rank).run();
      },
      [](const Recurrent& r, const RecurrentGradients& g, void* shared, int64_t chunk, int sum) {
        return ChunkSums<T>(r, g, shared, chunk).parts(static_cast<Sum>(sum));
      },
      ChunkSums<T>::bytes,
      [](const Recurrent& r, const RecurrentGradients& g, const void* prepared, void* shared,
         void* scratch, int64_t chunk, int sum, int64_t begin, int64_t end) {
        ChunkSums<T>(r, g, shared, chunk).run(static_cast<Sum>(sum), prepared, scratch, begin, end);
      },
      finish_backward<T>,
      [](const Recurrent& r) { return Gates<T>(r, nullptr, nullptr).bytes; },
      [](const Recurrent& r, const void* prepared, void* scratch, int64_t begin, int64_t end) {
        Gates<T>(r, prepared, scratch).forward(begin, end);
      },
      [](const Recurrent& r, const RecurrentGradients& g) {
        const int64_t count = blocks_of(r) * BlockSums<Accumulate<T>>(r, g).stride;
        return static_cast<size_t>(count) * sizeof(Accumulate<T>);
      },
      [](const Recurrent& r, const RecurrentGradients& g, const void* prepared, void* sums,
         void* scratch, int64_t begin, int64_t end) {
        Gates<T>(r, prepared, scratch).backward(g, static_cast<Accumulate<T>*>(sums), begin, end);
      },
      [](const Recurrent& r, const RecurrentGradients& g, const void* sums) {
        using A = Accumulate<T>;
        finish_sums(g, BlockSums<A>(r, g), blocks_of(r), static_cast<const A*>(sums));
      },
  };
}

}  // namespace

extern const RecurrentTable recurrences = {kernels<float>(), kernels<double>(), kernels<bfloat16>(),
                                           kernels<float16>()};

}  // namespace layernorm::LAYERNORM_ISA
