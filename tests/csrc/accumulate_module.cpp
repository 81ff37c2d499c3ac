// Lets Python drive csrc/accumulate.h, which needs no torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "../../csrc/accumulate.h"

namespace {

using Array = pybind11::array_t<double, pybind11::array::c_style | pybind11::array::forcecast>;

// The norm of a vector whose elements are dealt to `parts` partial sums, merged word by word.
template <typename Sums>
double norm(const Array& array, int parts) {
  double total[Sums::kSquareWords] = {};
  for (int part = 0; part < parts; ++part) {
    double words[Sums::kSquareWords] = {};
    for (pybind11::ssize_t i = part; i < array.size(); i += parts) {
      Sums::add_square(words, array.data()[i]);
    }
    for (int w = 0; w < Sums::kSquareWords; ++w) total[w] += words[w];
  }
  return Sums::norm(total);
}

template <typename Sums>
double mean(const Array& array, int parts) {
  double total[Sums::kColumnWords] = {};
  for (int part = 0; part < parts; ++part) {
    double words[Sums::kColumnWords] = {};
    for (pybind11::ssize_t i = part; i < array.size(); i += parts) {
      Sums::add_column(words, array.data()[i]);
    }
    for (int w = 0; w < Sums::kColumnWords; ++w) total[w] += words[w];
  }
  return Sums::mean(total, fadiag::Divisor(static_cast<double>(array.size())));
}

}  // namespace

PYBIND11_MODULE(accumulate_module, m) {
  m.def("wide_norm", &norm<fadiag::WideSums>);
  m.def("narrow_norm", &norm<fadiag::NarrowSums>);
  m.def("wide_mean", &mean<fadiag::WideSums>);
  m.def("divide", [](double x, double count) { return fadiag::Divisor(count).divide(x); });
  m.def("cosine", &fadiag::cosine);
  m.def("self_cosine", &fadiag::self_cosine);
}
