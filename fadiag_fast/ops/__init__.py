"""Load the native library and offer its operators as thin functions.

They call ``torch.ops.fadiag.*`` where a kernel for the tensors' device is loaded, and
:mod:`fadiag_fast.ops.reference` elsewhere, after one warning with the cause.
``FADIAG_BACKEND=native|torch`` or the argument ``backend`` forces either.
"""

from __future__ import annotations

from .functions import direction_cosines, layer_statistics, step_row
from .native import LIBRARIES, Backend, NativeLibrary, backend_for, build_info, default_backend
from .packed import PackedStatistics
from .prepared import PreparedStatistics, prepare_statistics

__all__ = [
    "LIBRARIES",
    "Backend",
    "NativeLibrary",
    "PackedStatistics",
    "PreparedStatistics",
    "backend_for",
    "build_info",
    "default_backend",
    "direction_cosines",
    "layer_statistics",
    "prepare_statistics",
    "step_row",
]
