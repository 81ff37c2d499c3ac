"""Draw the roofline and the sweep's heat map from the CSVs alone."""

import math
from pathlib import Path
from typing import Any

from . import rows
from .operator import OPERATOR
from .rows import number
from .tables import csvs

# Okabe and Ito's palette: told apart with any kind of colour vision.
_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise RuntimeError(
            "plots need matplotlib: pip install 'fadiag-fast[bench]' (the CSVs are complete)"
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _read_bandwidth(found: list[dict[str, str]]) -> float:
    """Return the TB/s of the fastest plain read among the rows."""
    reads = [number(row, "tb_per_s") for row in found if row["variant"].startswith("read:")]
    return max((value for value in reads if not math.isnan(value)), default=math.nan)


def roofline(path: Path) -> Path:
    """Draw bytes against bandwidth: every path of every workload under the plain read's line."""
    pyplot = _pyplot()
    found = [row for row in rows.read(path) if number(row, "tb_per_s") > 0]
    reading = _read_bandwidth(found)
    shown = [
        row
        for row in found
        if row["workload"] != "ceilings"
        and "cosines" not in row["workload"]
        and not row["variant"].startswith("read:")
    ]
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    names = sorted({row["variant"] for row in shown}, key=lambda name: (name != OPERATOR, name))
    for index, name in enumerate(names):
        for mode, filled in (("eager", True), ("graphed", False)):
            mine = [row for row in shown if row["variant"] == name and row["mode"] == mode]
            if not mine:
                continue
            colour = _COLOURS[index % len(_COLOURS)]
            axes.scatter(
                [number(row, "bytes") for row in mine],
                [number(row, "tb_per_s") for row in mine],
                s=45 if name == OPERATOR else 22,
                marker="o" if name == OPERATOR else "s",
                facecolors=colour if filled else "none",
                edgecolors=colour,
                label=f"{name}, {'whole call' if filled else 'graphed'}",
            )
    axes.axhline(reading, color="black", linewidth=1, label=f"plain read {reading:.3g} TB/s")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("bytes that must move: inputs read once, outputs written once")
    axes.set_ylabel("achieved TB/s")
    axes.set_title(f"Layer statistics on {found[0]['device']}")
    axes.grid(which="both", alpha=0.2)
    axes.legend(fontsize=7, ncols=2)
    return _save(figure, path, "roofline")


def heat_map(path: Path) -> Path:
    """Draw the sweep: N × D of achieved bandwidth for each dtype and L, the ratio in the cell."""
    pyplot = _pyplot()
    found = rows.read(path)
    dtypes = list(dict.fromkeys(row["dtype"] for row in found))
    layers = sorted({int(row["layers"]) for row in found})
    samples = sorted({int(row["samples"]) for row in found})
    widths = sorted({int(row["width"]) for row in found})
    figure, grid = pyplot.subplots(
        len(dtypes),
        len(layers),
        figsize=(4 * len(layers) + 1, 3.5 * len(dtypes)),
        squeeze=False,
        layout="constrained",
    )
    image = None
    for i, dtype in enumerate(dtypes):
        for j, count in enumerate(layers):
            axes = grid[i][j]
            values = [[math.nan] * len(widths) for _ in samples]
            for row in found:
                if row["dtype"] != dtype or int(row["layers"]) != count:
                    continue
                y, x = samples.index(int(row["samples"])), widths.index(int(row["width"]))
                values[y][x] = number(row, "share_of_read")
                # Light text on the map's dark end; red on white where a claim is missed.
                missed = row["cliff"] or number(row, "ratio") < 1
                bright = "black" if values[y][x] > 0.6 else "white"
                axes.text(
                    x,
                    y,
                    f"{number(row, 'ratio'):.2g}×" + ("\ncliff" if row["cliff"] else ""),
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="red" if missed else bright,
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 1} if missed else None,
                )
            # The upper end is the read; a cell that stays in the cache may lie above it.
            image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
            axes.set_xticks(range(len(widths)), [f"{w}" for w in widths], fontsize=7)
            axes.set_yticks(range(len(samples)), [f"{n}" for n in samples], fontsize=7)
            axes.set_title(f"{dtype}, L = {count}", fontsize=9)
            axes.set_xlabel("D", fontsize=8)
            axes.set_ylabel("N", fontsize=8)
    figure.colorbar(image, ax=grid, label="share of a plain read's bandwidth", extend="max")
    figure.suptitle(f"{found[0]['device']}: in each cell the pure path's time over the operator's")
    return _save(figure, path, "sweep")


def _save(figure: Any, path: Path, name: str) -> Path:
    target = path.with_name(f"{name}_{path.stem.split('_', 1)[1]}.png")
    # No date inside: the same rows give the same file.
    figure.savefig(target, dpi=120, metadata={"Software": None})
    _pyplot().close(figure)
    return target


def draw(results: Path, paths: list[Path] | None = None) -> list[Path]:
    """Draw what the folder's CSVs hold, or only some of them; return the pictures."""
    drawn = []
    for stem, picture in (("operator", roofline), ("cpu", roofline), ("sweep", heat_map)):
        for path in csvs(results, stem) if paths is None else paths:
            if path.stem.split("_")[0] == stem:
                drawn.append(picture(path))
    return drawn
