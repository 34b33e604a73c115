// Weight matrices as right operands of products: packed whole where that is repaid, else read where
// they lie or packed piece by piece.
#pragma once

#include "dot.hpp"
#include "narrow.hpp"

namespace layernorm::LAYERNORM_ISA {

// The share [begin, end) of count things that the member of this rank has.
struct Share {
  int64_t begin, end;
};
inline Share share_of(int64_t count, int rank, int members) {
  return {count * rank / members, count * (rank + 1) / members};
}

// Elements of working memory for a piece of a matrix that is not packed.
template <typename O>
inline constexpr int64_t kPanelMemory = O::kBlock * kPanel<typename O::Sum>;
static_assert(kPanel<float> >= kDotColumns<float> && kPanel<double> >= kDotColumns<double>);

// kTransposed: of rows [columns, numbers], along which the sums go; else [numbers, columns].
template <typename O, typename T, bool kTransposed>
class Weights {
 public:
  using E = typename O::Element;
  using A = typename O::Sum;

  // Of a matrix that so many products are made with, of so many rows.
  Weights(const void* matrix, int64_t numbers, int64_t columns, int64_t products, int64_t rows,
          WeightKind kind = WeightKind::kAsGiven)
      : kind_(kind),
        matrix_(static_cast<const T*>(matrix)),
        numbers_(numbers),
        depth_(parts_of(numbers, O::kPerElement)),
        columns_(columns),
        // Sums of a block and more are those of dot.hpp. They have to be added up, which for
        // shorter ones takes too long; but where they are few rows' they are as fast as memory.
        is_dot_(kTransposed && kind == WeightKind::kAsGiven && depth_ >= O::kBlock),
        is_packed_(products >= repaid(rows)),
        width_(is_dot_ ? kDotColumns<A> : kPanel<A>) {}

  [[nodiscard]] int64_t panels() const { return parts_of(columns_, width_); }
  [[nodiscard]] int64_t packed_panels() const { return is_packed_ ? panels() : 0; }
  [[nodiscard]] int64_t packed_elements() const {
    switch (kind_) {
      case WeightKind::kBFloat16:
        return parts_of(packed_panels() * width_ * depth_, 2);
      case WeightKind::kInt8:
        return panels() * (width_ + int8_panel() / 4);
      default:
        return packed_panels() * width_ * padded(depth_);
    }
  }
  // Elements of working memory for products of so many rows.
  [[nodiscard]] int64_t memory(int64_t rows) const {
    if (kind_ == WeightKind::kInt8) return NarrowRows::floats(rows, numbers_);
    return is_packed_ ? 0 : kPanelMemory<O>;
  }
  [[nodiscard]] E* packed() const { return packed_; }
  void pack_to(E* memory) { packed_ = memory; }
  void pack(int64_t p) const {
    if constexpr (kNarrows) {
      const int64_t begin = p * width_, end = begin + columns_of(p);
      if (kind_ == WeightKind::kBFloat16)
        return pack_bfloat16(matrix_, numbers_, begin, end, bfloat16_at(p, 0));
      if (kind_ == WeightKind::kInt8)
        return pack_int8(matrix_, numbers_, begin, end, int8_at(p), packed_ + begin);
    }
    for (int64_t k = 0; k < depth_; k += O::kBlock) {
      const int64_t count = least(O::kBlock, depth_ - k);
      E* const to = const_cast<E*>(packed_at(p, k, count));
      is_dot_ ? pack_groups(p, k, count, to) : pack_panel(p, k, count, to);
    }
  }

  // c = onto + a·b for the columns of some panels; a[i] and c[i] are where the rows begin, and
  // `memory` has memory(rows) elements.
  void multiply(int64_t rows, const E* const* a, Onto onto, const A* bias, A* const* c,
                Share panels, E* memory) const {
    if constexpr (kNarrows) {
      if (kind_ == WeightKind::kInt8) return multiply_int8(rows, a, onto, bias, c, panels, memory);
    }
    if constexpr (kTransposed) {
      if (is_dot_) return multiply_dots(rows, a, onto, bias, c, panels, memory);
    }
    for (int64_t p = panels.begin; p < panels.end; ++p) {
      for (int64_t k = 0; k == 0 || k < depth_; k += O::kBlock) {
        const Piece piece{p, k, least(O::kBlock, depth_ - k), k == 0 ? onto : Onto::kSelf};
        if (kind_ == WeightKind::kBFloat16)
          multiply_bfloat16(rows, a, piece, bias, c);
        else if (is_packed_)
          multiply_panel(rows, a, packed_at(p, k, piece.count), kPanel<A>, piece, bias, c);
        else if (rows <= most_in_place() && columns_of(p) == width_)
          multiply_in_place(rows, a, piece, bias, c);
        else
          pack_panel(p, k, piece.count, memory),
              multiply_panel(rows, a, memory, kPanel<A>, piece, bias, c);
      }
    }
  }

 private:
  // Elements of k of a panel.
  struct Piece {
    int64_t panel, k, count;
    Onto onto;
  };

  // Whether a kind other than the given can be.
  static constexpr bool kNarrows = kTransposed && std::is_same_v<T, float>;

  WeightKind kind_;
  const T* matrix_;
  E* packed_ = nullptr;
  int64_t numbers_, depth_;  // depth in elements: numbers or pairs
  int64_t columns_;
  bool is_dot_, is_packed_;
  int64_t width_;

  // Products from which on packing the whole matrix takes less time than it saves.
  [[nodiscard]] int64_t repaid(int64_t rows) const {
    if (is_dot_) return 8;
    return rows <= most_in_place() ? 4 : 2;
  }
  // Rows up to which a matrix is read where it lies rather than packed piece by piece.
  static constexpr int64_t most_in_place() {
    if constexpr (kTransposed) return 2;
    return std::is_same_v<T, E> ? kTileRows : 0;
  }
  [[nodiscard]] int64_t columns_of(int64_t p) const { return least(width_, columns_ - p * width_); }
  // Elements of a column where it is packed: whole groups.
  [[nodiscard]] int64_t padded(int64_t count) const {
    return is_dot_ ? parts_of(count, kGroup<A>) * kGroup<A> : count;
  }
  // Block after block of k, each with the panels in order: as they are read.
  [[nodiscard]] const E* packed_at(int64_t p, int64_t k, int64_t count) const {
    return packed_ + (panels() * k + p * padded(count)) * width_;
  }

  void pack_panel(int64_t p, int64_t k, int64_t count, E* to) const {
    const int64_t first = p * width_;
    if constexpr (kTransposed) {
      pack_transposed<O>(matrix_, numbers_, k, count, first, first + columns_of(p), to);
    } else {
      const auto row = [&](int64_t i) { return matrix_ + (k * O::kPerElement + i) * columns_; };
      const int64_t numbers = least(count * O::kPerElement, numbers_ - k * O::kPerElement);
      pack_rows<O, T>(numbers, row, first, columns_of(p), to);
    }
  }

  [[nodiscard]] bfloat16* bfloat16_at(int64_t p, int64_t k) const {
    return reinterpret_cast<bfloat16*>(packed_) + (p * depth_ + k) * width_;
  }
  // The scales of all columns come first.
  [[nodiscard]] int64_t int8_panel() const { return parts_of(numbers_, 2) * 2 * width_; }
  [[nodiscard]] int8_t* int8_at(int64_t p) const {
    return reinterpret_cast<int8_t*>(packed_ + panels() * width_) + p * int8_panel();
  }
  void multiply_bfloat16(int64_t rows, const E* const* a, const Piece& piece, const A* bias,
                         A* const* c) const {
    if constexpr (kNarrows)
      multiply_panel(rows, a, bfloat16_at(piece.panel, piece.k), width_, piece, bias, c);
  }
  void multiply_int8(int64_t rows, const E* const* a, Onto onto, const A* bias, A* const* c,
                     Share panels, E* memory) const {
    const NarrowRows narrow(rows, numbers_, memory);
    for (int64_t i = 0; i < rows; ++i) narrow.set(i, a[i], numbers_);
    for (int64_t p = panels.begin; p < panels.end; ++p) {
      each_tile(rows, kTileRows, [&](int64_t height, int64_t row) LAYERNORM_LAMBDA {
        of_height(height, [&](auto count) LAYERNORM_LAMBDA {
          int8_tile<count>(narrow, row, int8_at(p), packed_ + p * width_, numbers_, onto, bias, c,
                           p * width_, columns_of(p));
        });
      });
    }
  }

  template <typename B>
  void multiply_panel(int64_t rows, const E* const* a, const B* from, int64_t stride,
                      const Piece& piece, const A* bias, A* const* c) const {
    each_tile(rows, kTileRows, [&](int64_t height, int64_t row) LAYERNORM_LAMBDA {
      tile_of<O, 1>(height, a + row, piece.k, from, stride, piece.count, piece.onto, bias, c + row,
                    piece.panel * width_, columns_of(piece.panel));
    });
  }
  void multiply_in_place(int64_t rows, const E* const* a, const Piece& piece, const A* bias,
                         A* const* c) const {
    const int64_t first = piece.panel * width_;
    if constexpr (kTransposed) {
      for (int64_t column = first; column < first + width_; column += kTransposedColumns<A>) {
        if (rows == 1)
          transposing_tile<O, 1>(a, piece.k, matrix_, numbers_, piece.count, piece.onto, bias, c,
                                 column);
        else
          transposing_tile<O, 2>(a, piece.k, matrix_, numbers_, piece.count, piece.onto, bias, c,
                                 column);
      }
    } else {
      const auto* const from = reinterpret_cast<const E*>(matrix_ + piece.k * columns_ + first);
      multiply_panel(rows, a, from, columns_, piece, bias, c);
    }
  }

  // Elements [k, k + count) of panel p as dot.hpp reads what is packed.
  void pack_groups(int64_t p, int64_t k, int64_t count, E* to) const {
    const int64_t at = k * O::kPerElement;
    const RowsInPlace<O, T> rows(matrix_ + at, numbers_, numbers_ - at);
    const bool is_whole = columns_of(p) == width_;
    for (int64_t i = 0; i < count; i += kGroup<A>) {
      const bool is_last = (k + i + kGroup<A>)*O::kPerElement > numbers_;
      for (int j = 0; j < kDotVectors; ++j, to += kLanes<A>) {
        const Vec<A> v =
            is_whole && !is_last ? rows.load(p, i, j) : rows.load_some(p, i, j, columns_of(p));
        std::memcpy(to, &v, sizeof v);
      }
    }
  }

  void multiply_dots(int64_t rows, const E* const* a, Onto onto, const A* bias, A* const* c,
                     Share panels, E* memory) const {
    constexpr int64_t kAtOnce = 8;  // panels that stay in a cache while all rows meet them
    // What is read in place, where nothing beyond a row's end is read; the rest is packed first.
    int64_t whole = is_packed_ || numbers_ % O::kPerElement == 0 ? panels.end : panels.begin;
    if (!is_packed_ && whole > panels.begin && columns_of(whole - 1) < width_) --whole;
    for (int64_t p = panels.begin; p < panels.end;) {
      const int64_t end = p < whole ? least(p + kAtOnce, whole) : p + 1;
      for (int64_t k = 0; k < depth_; k += O::kBlock) {
        const int64_t count = least(O::kBlock, depth_ - k);
        const int64_t at = k * O::kPerElement;
        const auto run = [&](const auto& right) LAYERNORM_LAMBDA {
          each_tile(rows, kDotRows, [&](int64_t height, int64_t row) LAYERNORM_LAMBDA {
            dot_tile_of<O>(height, a + row, k, right, count, k == 0 ? onto : Onto::kSelf, bias,
                           c + row, p, end, columns_of(end - 1));
          });
        };
        if (is_packed_) {
          run(PackedGroups<O>{packed_at(0, k, count), padded(count) * width_});
        } else if (p < whole) {
          run(RowsInPlace<O, T>(matrix_ + at, numbers_, numbers_ - at));
        } else {
          pack_groups(p, k, count, memory);
          run(PackedGroups<O>{memory, 0});
        }
      }
      p = end;
    }
  }
};

}  // namespace layernorm::LAYERNORM_ISA
