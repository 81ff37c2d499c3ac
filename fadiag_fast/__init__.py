"""fadiag_fast: find out whether a network's hidden states and gradients can be trusted."""

from ._common.interrupts import quiet_interrupts, runs_as_command
from ._version import __version__

# The import of torch takes seconds.
with quiet_interrupts(runs_as_command()):
    from .capture.compiled import CompiledProbe, LoadedProbe, load_probe
    from .capture.points import TapError
    from .diagnosis import diagnose
    from .ops import PreparedStatistics, direction_cosines, layer_statistics, prepare_statistics
    from .ops.reference import LayerStatistics
    from .programs.loading import load_packaged
    from .protocol import DiagnosticThresholds
    from .report import DiagnosticReport
    from .scanning import ScanResult, scan
    from .training import StepProbe, StepRecord

__all__ = [
    "CompiledProbe",
    "DiagnosticReport",
    "DiagnosticThresholds",
    "LayerStatistics",
    "LoadedProbe",
    "PreparedStatistics",
    "ScanResult",
    "StepProbe",
    "StepRecord",
    "TapError",
    "__version__",
    "diagnose",
    "direction_cosines",
    "layer_statistics",
    "load_packaged",
    "load_probe",
    "prepare_statistics",
    "scan",
]
