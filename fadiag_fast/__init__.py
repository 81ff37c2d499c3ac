"""fadiag_fast: find out whether a network's hidden states and gradients can be trusted."""

__version__ = "0.1.0"

from .interrupts import quiet_interrupts, runs_as_command

# The import of torch takes seconds.
with quiet_interrupts(runs_as_command()):
    from .compiled import CompiledProbe, LoadedProbe, load_probe
    from .diagnosis import diagnose
    from .ops import PreparedStatistics, direction_cosines, layer_statistics, prepare_statistics
    from .packaged import load_packaged
    from .protocol import DiagnosticThresholds
    from .reference import LayerStatistics
    from .report import DiagnosticReport
    from .scanning import ScanResult, scan
    from .taps import TapError
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
    "diagnose",
    "direction_cosines",
    "layer_statistics",
    "load_packaged",
    "load_probe",
    "prepare_statistics",
    "scan",
]
