// The schemas of every operator, in one place. Kernels register themselves in cpu/ and cuda/.
#include <torch/csrc/stable/library.h>

// layer_statistics: hiddens and grads are L tensors [B, ...] each (stacked: [C, B, ...]), of equal
// shape in pairs. Returns everything in one tensor, [W] (stacked: [C, W]), float32, or float64
// where the layers are: first the norms of the hiddens, [L, B], then those of the grads, [L, B],
// both float64 whatever the tensor's own type; then the batch means of the grads, layer after
// layer, in the tensor's type. Within a layer the mean keeps the order in which the grad's samples
// lie in memory where these are dense, else the logical order. A stack member of odd width has one
// element of padding. Layers in without_mean have no mean there: it is neither computed nor
// written.
//
// direction_cosines: grad_means are K batches of L layers, batch after batch. Returns the cosines
// of the K directions of each layer, [L, K, K] float64 (stacked: [C, L, K, K]).
//
// step_row: what a training step leaves on the device, in one call. norms are [2, S, N] float64, of
// states and of gradients, the last gradient's being that of the logits. Written to row places[0]
// of rows, [R, W] float64: the median over the samples of every row of norms, NaN left out, and of
// each gradient's over the last one's, 3 S - 1 numbers; per direction, [D], its cosines with what
// is kept, [K + 1, D]: K past ones and their average; then the extras. The direction is kept at
// places[1] of the past ones, and enters the average with the weight 1 - decay unless it is zero
// or not finite. Both places count on, around the end; places[2] is the kernels' own, zero.
STABLE_TORCH_LIBRARY(fadiag, m) {
  m.def(
      "layer_statistics(Tensor[] hiddens, Tensor[] grads, bool stacked=False, "
      "int[] without_mean=[]) -> Tensor");
  m.def(
      "step_row(Tensor norms, Tensor[] directions, Tensor(a!)[] kept, Tensor(b!) rows, "
      "Tensor(c!) places, float decay, Tensor[] extras) -> ()");
  m.def("direction_cosines(Tensor[] grad_means, int num_batches, bool stacked=False) -> Tensor");
}
