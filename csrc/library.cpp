// The schemas of every operator, in one place. Kernels register themselves in cpu/ and cuda/.
#include <torch/csrc/stable/library.h>

// layer_statistics: hiddens and grads are L tensors [B, ...] each (stacked: [C, B, ...]), of equal
// shape in pairs. Returns the norms of hiddens and grads, [2, L, B] float64 (stacked: [2, C, L,
// B]), and the batch means of the grads, packed: [sum of D_l] float32, or float64 for float64
// layers (stacked: [C, sum of D_l]). Within a layer the mean keeps the order in which the grad's
// samples lie in memory where these are dense, else the logical order.
//
// direction_cosines: grad_means are K batches of L layers, batch after batch. Returns the cosines
// of the K directions of each layer, [L, K, K] float64 (stacked: [C, L, K, K]).
STABLE_TORCH_LIBRARY(fadiag, m) {
  m.def(
      "layer_statistics(Tensor[] hiddens, Tensor[] grads, bool stacked=False) -> "
      "(Tensor hidden_norm, Tensor grad_norm, Tensor grad_mean)");
  m.def("direction_cosines(Tensor[] grad_means, int num_batches, bool stacked=False) -> Tensor");
}
