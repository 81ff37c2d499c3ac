"""Made-up scans for the tests: figures with everything a float can be, and tables to compare."""

import math
import struct

from hypothesis import strategies as st

from fadiag_fast.protocol import Figures
from fadiag_fast.scanning import CheckpointRecord
from fadiag_fast.scanning.schema import VOLATILE

CONFIG = {"model": "resmlp", "batches": [10, 128]}

# Any float64 an operator can return, NaN, infinities, zeros and subnormals among them.
norms = st.one_of(
    st.floats(),
    st.sampled_from([0.0, -0.0, 5e-324, 1e-30, 1.0, 1.8e308, math.inf, -math.inf, math.nan]),
)
fractions = st.one_of(st.none(), st.floats(0, 1))


@st.composite
def any_figures(draw):
    states = draw(st.integers(0, 4))

    def several(element):
        return tuple(draw(st.lists(element, min_size=states, max_size=states)))

    return Figures(
        layers=several(st.text(max_size=5)),
        residual_norms=several(norms),
        bp_grad_norms=several(norms),
        credit_gains=several(norms),
        output_grad_norm=draw(norms),
        batch_size=draw(st.integers(0, 10_000)),
        stabilities=several(norms),
        num_directions=several(st.integers(0, 12)),
        num_batches=draw(st.integers(0, 12)),
        headline_acc=draw(fractions),
        frozen_baseline_acc=draw(fractions),
        gain_reference=draw(st.text(max_size=5)),
    )


def figures(growth=1.2, grad=1e-4, stability=0.1, accuracy=None, frozen=None, directions=10):
    """Three states: the second after a step of `growth`."""
    return Figures(
        layers=("embed", "blocks.0", "blocks.1"),
        residual_norms=(10.0, 10.0 * growth, 10.0 * growth),
        bp_grad_norms=(grad, grad, grad),
        credit_gains=(grad * 4e3,) * 3,
        output_grad_norm=2.5e-4,
        batch_size=128,
        stabilities=(stability,) * 3,
        num_directions=(directions,) * 3,
        num_batches=10,
        headline_acc=accuracy,
        frozen_baseline_acc=frozen,
    )


def record(config_hash, index=0, given=None, **changes):
    """An audited checkpoint; with `error_kind` a failed one."""
    values = {
        "path": f"runs/r{index % 3}/step_{index}.pt",
        "run": f"r{index % 3}",
        "step": index,
        "config_hash": config_hash,
    }
    if "error_kind" not in changes:
        values |= {
            "content_hash": f"sha256:{index:032x}",
            "figures": given or figures(growth=1.0 + index),
        }
    return CheckpointRecord(**{**values, **changes})


def bits(given):
    """Figures as comparable values: floats by their bits, NaN like NaN and 0 unlike -0."""

    def one(value):
        return struct.pack("d", value) if isinstance(value, float) else value

    return [
        tuple(one(v) for v in value) if isinstance(value, tuple) else one(value)
        for value in vars(given).values()
    ]


def lasting(result):
    """Both tables without what differs between two scans of the same files."""
    return [
        result.to_arrow(name)
        .drop_columns([c for c in VOLATILE if c in result.to_arrow(name).column_names])
        .to_pylist()
        for name in ("checkpoints", "layers")
    ]
