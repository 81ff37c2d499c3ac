// The CPU kernels. Compiled once per instruction set, with FADIAG_KERNELS naming the result.
//
// Layout:        a tile of rows by columns; four rows at a time, so that four streams are open and
//                a column sum is read and written once for four elements. The next four rows are
//                fetched into the L2 cache meanwhile.
// Accumulation:  accumulate.h, eight lanes per row; the column sums of a tile stay in the L1 cache.
// Determinism:   lanes, groups of rows and tiles are fixed by the shape of the layer. Neither the
//                number of threads nor the instruction set changes a bit (FMA only where exact).
#include "kernels.h"

#include <type_traits>

#include "../accumulate.h"
#include "../element_types.h"
#include "simd.h"

#ifndef FADIAG_KERNELS
#define FADIAG_KERNELS kGenericKernels
#define FADIAG_INSTRUCTION_SET "generic"
#endif

namespace fadiag {
namespace {

constexpr int kRowGroup = 4;
constexpr int kLineBytes = 64;
// Where no row follows, the same rows are fetched this far ahead.
constexpr int kAheadBytes = 512;

// Adds kRows rows of one tensor: squares by row and, where asked, sums by column. Meanwhile fetches
// what lies `ahead` elements further on.
template <typename Element, int kRows, bool kWithColumns>
void add_rows(const Element* base, int64_t row_stride, int64_t columns, int64_t ahead,
              double* squares, double* column_sums) {
  using Sums = typename SumsOf<Element>::type;
  constexpr int kWords = Sums::kSquareWords;
  constexpr int kColumnWords = Sums::kColumnWords;
  constexpr int64_t kLineElements = kLineBytes / sizeof(Element);
  Register words[kRows][kParts][kWords] = {};
  // Adds the elements that load(r, p) returns; sums are read and written `sums_stride` apart.
  const auto add = [&](double* sums, int64_t sums_stride, auto&& load) {
    for (int p = 0; p < kParts; ++p) {
      Register column[kColumnWords];
      double* part_sums = sums + p * kRegisterLanes;
      if constexpr (kWithColumns) {
        for (int w = 0; w < kColumnWords; ++w) {
          column[w] = load_vector<Register>(part_sums + w * sums_stride);
        }
      }
      for (int r = 0; r < kRows; ++r) {
        const Register x = load(r, p);
        if constexpr (std::is_same_v<Sums, NarrowSums>) {
          words[r][p][0] = add_exact_square(words[r][p][0], x);
        } else {
          Sums::add_square(words[r][p], x);
        }
        if constexpr (kWithColumns) Sums::add_column(column, x);
      }
      if constexpr (kWithColumns) {
        for (int w = 0; w < kColumnWords; ++w) {
          std::memcpy(part_sums + w * sums_stride, &column[w], sizeof(Register));
        }
      }
    }
  };
  int64_t c = 0;
  const auto add_at = [&](int64_t at) {
    add(column_sums + at, columns, [&](int r, int p) {
      return load_register(base + r * row_stride + at + p * kRegisterLanes);
    });
  };
  for (; c + kLineElements <= columns; c += kLineElements) {
    for (int r = 0; r < kRows; ++r) {
      __builtin_prefetch(base + r * row_stride + c + ahead, /*rw=*/0, /*locality=*/2);
    }
    for (int64_t i = 0; i < kLineElements; i += kLanes) add_at(c + i);
  }
  for (; c + kLanes <= columns; c += kLanes) add_at(c);
  if (const int64_t count = columns - c; count > 0) {
    // The last columns with zeros behind them, and their sums likewise.
    Element padded[kRows][kLanes] = {};
    double padded_sums[kColumnWords * kLanes] = {};
    for (int r = 0; r < kRows; ++r) {
      std::memcpy(padded[r], base + r * row_stride + c, count * sizeof(Element));
    }
    for (int w = 0; kWithColumns && w < kColumnWords; ++w) {
      std::memcpy(padded_sums + w * kLanes, column_sums + w * columns + c, count * sizeof(double));
    }
    add(padded_sums, kLanes,
        [&](int r, int p) { return load_register(padded[r] + p * kRegisterLanes); });
    for (int w = 0; kWithColumns && w < kColumnWords; ++w) {
      std::memcpy(column_sums + w * columns + c, padded_sums + w * kLanes, count * sizeof(double));
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int w = 0; w < kWords; ++w) {
      Double8 lanes;
      for (int p = 0; p < kParts; ++p) lanes.part[p] = words[r][p][w];
      squares[r * kWords + w] = sum_lanes(lanes);
    }
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
  const bool with_columns = column_sums != nullptr;
  for (int64_t i = 0; with_columns && i < Sums::kColumnWords * columns; ++i) column_sums[i] = 0.0;
  int64_t r = 0;
  const auto step = [&](auto group) {
    constexpr int kRows = decltype(group)::value;
    const int64_t word = r * Sums::kSquareWords;
    // Hardware follows a row, but does not see the jump to the next ones: a tile's row is short.
    const bool last = r + kRows + kRows > rows;
    const auto ahead = [&](int64_t row_stride) {
      return last ? kAheadBytes / static_cast<int64_t>(sizeof(Element)) : kRows * row_stride;
    };
    const int64_t hidden_stride = layer.hidden_row_stride;
    const int64_t grad_stride = layer.grad_row_stride;
    add_rows<Element, kRows, false>(hidden + r * hidden_stride, hidden_stride, columns,
                                    ahead(hidden_stride), hidden_squares + word, nullptr);
    if (with_columns) {
      add_rows<Element, kRows, true>(grad + r * grad_stride, grad_stride, columns,
                                     ahead(grad_stride), grad_squares + word, column_sums);
    } else {
      add_rows<Element, kRows, false>(grad + r * grad_stride, grad_stride, columns,
                                      ahead(grad_stride), grad_squares + word, nullptr);
    }
    r += kRows;
  };
  while (r + kRowGroup <= rows) step(std::integral_constant<int, kRowGroup>{});
  while (r < rows) step(std::integral_constant<int, 1>{});
}

template <typename Element>
void column_means_of(const double* sums, int64_t word_stride, int64_t columns, int64_t rows,
                     void* means) {
  using Sums = typename SumsOf<Element>::type;
  using Mean = std::conditional_t<std::is_same_v<Element, double>, double, float>;
  auto* target = static_cast<Mean*>(means);
  const Divisor count(static_cast<double>(rows));
  for (int64_t c = 0; c < columns; ++c) {
    double words[Sums::kColumnWords];
    for (int w = 0; w < Sums::kColumnWords; ++w) words[w] = sums[w * word_stride + c];
    target[c] = static_cast<Mean>(Sums::mean(words, count));
  }
}

template <typename Element>
double largest_magnitude_of(const void* vector, int64_t count) {
  const auto* elements = static_cast<const Element*>(vector);
  double largest = 0.0;
  bool has_nan = false;
  for (int64_t c = 0; c < count; c += kLanes) {
    double x[kLanes];
    store_lanes(count - c >= kLanes ? load_doubles(elements + c)
                                    : load_doubles_partial(elements + c, count - c),
                x);
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
    const Double8 x = load(a + c);
    for (int j = 0; j < kCount; ++j) {
      const Double8 y = load(b[j] + c);
      for (int p = 0; p < kParts; ++p) {
        sums[j].part[p] += (x.part[p] * scale_a) * (y.part[p] * scales_b[j]);
      }
    }
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

template <typename Pointer>
using ElementOf = std::remove_pointer_t<Pointer>;

void statistics_tile(int type, const Layer& layer, const Tile& tile, double* hidden_squares,
                     double* grad_squares, double* column_sums) {
  with_element<Half, BFloat16>(type, [&](auto tag) {
    statistics_tile_of<ElementOf<decltype(tag)>>(layer, tile, hidden_squares, grad_squares,
                                                 column_sums);
  });
}

void column_means(int type, const double* sums, int64_t word_stride, int64_t columns, int64_t rows,
                  void* means) {
  with_element<Half, BFloat16>(type, [&](auto tag) {
    column_means_of<ElementOf<decltype(tag)>>(sums, word_stride, columns, rows, means);
  });
}

double largest_magnitude(int type, const void* vector, int64_t count) {
  return with_element<Half, BFloat16>(type, [&](auto tag) {
    return largest_magnitude_of<ElementOf<decltype(tag)>>(vector, count);
  });
}

void dot_products(int type, const void* const* vectors, const double* scales, int64_t num_vectors,
                  int64_t column_begin, int64_t column_end, double* products) {
  with_element<Half, BFloat16>(type, [&](auto tag) {
    dot_products_of<ElementOf<decltype(tag)>>(vectors, scales, num_vectors, column_begin,
                                              column_end, products);
  });
}

}  // namespace

const CpuKernels FADIAG_KERNELS = {statistics_tile, column_means, largest_magnitude, dot_products,
                                   FADIAG_INSTRUCTION_SET};

}  // namespace fadiag
