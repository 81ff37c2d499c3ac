// The schemas of every operator, in one place. Kernels register themselves in cpu/ and cuda/.
#include <torch/csrc/stable/library.h>

// layer_statistics: hiddens and grads are L tensors [B, ...] each (stacked: [C, B, ...]), of equal
// shape in pairs. Returns everything in one tensor, [W] (stacked: [C, W]), float32, or float64
// where the layers are: first the norms of the hiddens, [L, B], then those of the grads, [L, B],
// both float64 whatever the tensor's own type; then the batch means of the grads, layer after
// layer, in the tensor's type. Within a layer the mean keeps the order in which the grad's samples
// lie in memory where these are dense, else the logical order. A stack member of odd width has one
// element of padding.
//
// direction_cosines: grad_means are K batches of L layers, batch after batch. Returns the cosines
// of the K directions of each layer, [L, K, K] float64 (stacked: [C, L, K, K]).
STABLE_TORCH_LIBRARY(fadiag, m) {
  m.def(
      "layer_statistics(Tensor[] hiddens, Tensor[] grads, bool stacked=False) -> "
      "Tensor");
  m.def("direction_cosines(Tensor[] grad_means, int num_batches, bool stacked=False) -> Tensor");
}
