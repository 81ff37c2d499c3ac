"""Import torchvision beside a CPU build of torch."""

from types import ModuleType

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library: list[torch.library.Library] = []


def import_torchvision() -> ModuleType:
    """Return torchvision.

    Its published wheels need CUDA libraries: without them its operators are absent, and it fails
    on registering shapes for two of them. Those two are declared, never run.

    Raises:
        ImportError: it is not installed.
    """
    if not _library and torch.version.cuda is None:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in _SCHEMAS:
            if not hasattr(torch.ops.torchvision, schema.partition("(")[0]):
                library.define(schema)
        _library.append(library)
    import torchvision

    return torchvision
