// The CPU kernels. Compiled once per instruction set, with FADIAG_KERNELS naming the result.
//
// Layout:        a tile of rows by columns; four rows at a time, so that four streams are open and
//                a column sum is read and written once for four elements.
// Accumulation:  accumulate.h, eight lanes per row; the column sums of a tile stay in the L1 cache.
// Determinism:   lanes, groups of rows and tiles are fixed by the shape of the layer. Neither the
//                number of threads nor the instruction set changes a bit (no contraction to FMA).
#include "kernels.h"

#include <type_traits>

#include "../accumulate.h"
#include "simd.h"

#ifndef FADIAG_KERNELS
#define FADIAG_KERNELS kGenericKernels
#define FADIAG_INSTRUCTION_SET "generic"
#endif

namespace fadiag {
namespace {

constexpr int kRowGroup = 4;

template <typename Element>
struct SumsOf {
  using type = NarrowSums;
};
template <>
struct SumsOf<double> {
  using type = WideSums;
};

// Adds kRows rows of one tensor: squares by row and, where asked, sums by column.
template <typename Element, int kRows, bool kWithColumns>
void add_rows(const Element* base, int64_t row_stride, int64_t columns, double* squares,
              double* column_sums) {
  using Sums = typename SumsOf<Element>::type;
  constexpr int kWords = Sums::kSquareWords;
  constexpr int kColumnWords = Sums::kColumnWords;
  Double8 words[kRows][kWords] = {};
  const auto add = [&](const Double8(&x)[kRows], double* sums, int64_t count) {
    for (int r = 0; r < kRows; ++r) Sums::add_square(words[r], x[r]);
    if constexpr (kWithColumns) {
      // Each row's contribution first, then pairwise: the order of a column sum is fixed.
      Double8 column[kRows][kColumnWords] = {};
      for (int r = 0; r < kRows; ++r) Sums::add_column(column[r], x[r]);
      for (int w = 0; w < kColumnWords; ++w) {
        Double8 total = column[0][w];
        if constexpr (kRows == 4) {
          total = (column[0][w] + column[1][w]) + (column[2][w] + column[3][w]);
        }
        if (count == kLanes) {
          Double8 sum = load_doubles(sums + w * columns);
          sum += total;
          std::memcpy(sums + w * columns, &sum, sizeof(sum));
        } else {
          for (int64_t j = 0; j < count; ++j) sums[w * columns + j] += total[j];
        }
      }
    }
  };
  int64_t c = 0;
  for (; c + kLanes <= columns; c += kLanes) {
    Double8 x[kRows];
    for (int r = 0; r < kRows; ++r) x[r] = load_doubles(base + r * row_stride + c);
    add(x, column_sums + c, kLanes);
  }
  if (c < columns) {
    Double8 x[kRows];
    for (int r = 0; r < kRows; ++r) {
      x[r] = load_doubles_partial(base + r * row_stride + c, columns - c);
    }
    add(x, column_sums + c, columns - c);
  }
  for (int r = 0; r < kRows; ++r) {
    for (int w = 0; w < kWords; ++w) squares[r * kWords + w] = sum_lanes(words[r][w]);
  }
}

template <typename Element>
void statistics_tile_of(const Layer& layer, const Tile& tile, double* hidden_squares,
                        double* grad_squares, double* column_sums) {
  using Sums = typename SumsOf<Element>::type;
  const int64_t columns = tile.column_end - tile.column_begin;
  const int64_t rows = tile.row_end - tile.row_begin;
  const auto* hidden = static_cast<const Element*>(layer.hidden) +
                       tile.row_begin * layer.hidden_row_stride + tile.column_begin;
  const auto* grad = static_cast<const Element*>(layer.grad) +
                     tile.row_begin * layer.grad_row_stride + tile.column_begin;
  for (int64_t i = 0; i < Sums::kColumnWords * columns; ++i) column_sums[i] = 0.0;
  int64_t r = 0;
  const auto step = [&](auto group) {
    constexpr int kRows = decltype(group)::value;
    const int64_t word = r * Sums::kSquareWords;
    add_rows<Element, kRows, false>(hidden + r * layer.hidden_row_stride, layer.hidden_row_stride,
                                    columns, hidden_squares + word, nullptr);
    add_rows<Element, kRows, true>(grad + r * layer.grad_row_stride, layer.grad_row_stride, columns,
                                   grad_squares + word, column_sums);
    r += kRows;
  };
  while (r + kRowGroup <= rows) step(std::integral_constant<int, kRowGroup>{});
  while (r < rows) step(std::integral_constant<int, 1>{});
}

template <typename Element>
double largest_magnitude_of(const void* vector, int64_t count) {
  const auto* elements = static_cast<const Element*>(vector);
  double largest = 0.0;
  bool has_nan = false;
  for (int64_t c = 0; c < count; c += kLanes) {
    const Double8 x = count - c >= kLanes ? load_doubles(elements + c)
                                          : load_doubles_partial(elements + c, count - c);
    for (int j = 0; j < kLanes; ++j) {
      const double magnitude = x[j] < 0.0 ? -x[j] : x[j];
      has_nan = has_nan || magnitude != magnitude;
      largest = magnitude > largest ? magnitude : largest;
    }
  }
  return has_nan ? __builtin_nan("") : largest;
}

// Products of vectors i and j for kCount values of j at once: vector i is loaded once for them.
template <typename Element, int kCount>
void dot_products_of_row(const Element* a, double scale_a, const Element* const* b,
                         const double* scales_b, int64_t columns, double* products) {
  Double8 sums[kCount] = {};
  const auto add = [&](int64_t c, auto&& load) {
    const Double8 x = load(a + c) * scale_a;
    for (int j = 0; j < kCount; ++j) sums[j] += x * (load(b[j] + c) * scales_b[j]);
  };
  int64_t c = 0;
  for (; c + kLanes <= columns; c += kLanes) {
    add(c, [](const Element* source) { return load_doubles(source); });
  }
  if (c < columns) {
    add(c, [&](const Element* source) { return load_doubles_partial(source, columns - c); });
  }
  for (int j = 0; j < kCount; ++j) products[j] = sum_lanes(sums[j]);
}

template <typename Element>
void dot_products_of(const void* const* vectors, const double* scales, int64_t num_vectors,
                     int64_t column_begin, int64_t column_end, double* products) {
  const int64_t columns = column_end - column_begin;
  const auto at = [&](int64_t i) { return static_cast<const Element*>(vectors[i]) + column_begin; };
  for (int64_t i = 0; i < num_vectors; ++i) {
    int64_t j = i;
    double* row = products + i * num_vectors;
    for (; j + 4 <= num_vectors; j += 4) {
      const Element* b[4] = {at(j), at(j + 1), at(j + 2), at(j + 3)};
      dot_products_of_row<Element, 4>(at(i), scales[i], b, scales + j, columns, row + j);
    }
    for (; j < num_vectors; ++j) {
      const Element* b[1] = {at(j)};
      dot_products_of_row<Element, 1>(at(i), scales[i], b, scales + j, columns, row + j);
    }
  }
}

// Calls `function` with a null pointer of the element type that `type` names.
template <typename Function>
auto with_element(int type, Function&& function) {
  switch (type) {
    case 0:
      return function(static_cast<const Half*>(nullptr));
    case 1:
      return function(static_cast<const BFloat16*>(nullptr));
    case 2:
      return function(static_cast<const float*>(nullptr));
    default:
      return function(static_cast<const double*>(nullptr));
  }
}

template <typename Pointer>
using ElementOf = std::remove_cv_t<std::remove_pointer_t<Pointer>>;

void statistics_tile(int type, const Layer& layer, const Tile& tile, double* hidden_squares,
                     double* grad_squares, double* column_sums) {
  with_element(type, [&](auto tag) {
    statistics_tile_of<ElementOf<decltype(tag)>>(layer, tile, hidden_squares, grad_squares,
                                                 column_sums);
  });
}

double largest_magnitude(int type, const void* vector, int64_t count) {
  return with_element(type, [&](auto tag) {
    return largest_magnitude_of<ElementOf<decltype(tag)>>(vector, count);
  });
}

void dot_products(int type, const void* const* vectors, const double* scales, int64_t num_vectors,
                  int64_t column_begin, int64_t column_end, double* products) {
  with_element(type, [&](auto tag) {
    dot_products_of<ElementOf<decltype(tag)>>(vectors, scales, num_vectors, column_begin,
                                              column_end, products);
  });
}

}  // namespace

const CpuKernels FADIAG_KERNELS = {statistics_tile, largest_magnitude, dot_products,
                                   FADIAG_INSTRUCTION_SET};

}  // namespace fadiag
