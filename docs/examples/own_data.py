"""Calibrate on your own text, and find the fastest model within a budget.

python docs/examples/own_data.py MODEL TEXT [OUT]
"""

import sys
from typing import Any

from nirvana_deploy import Search, Target, search_points


def main(model: str, text: str, out: str = "own-data", **options: Any) -> None:
    """Search in the folder ``out``; ``options`` are any of prune_export."""
    found = search_points(
        model,
        out=out,
        force=True,
        recipe=Search(sparsities="0,0.1,0.2", precisions="none,w4"),
        target=Target(max_kl=0.2),
        **{"calib": text, "preset": "fast", **options},
    )
    for point in found.points:
        print(f"{point.name:10} KL {point.kl:.3f}, {(point.weights_bytes or 0) / 1e6:,.1f} MB")
    print(found.record["verdict"])
    for command in found.record["next"]:
        print(f"  {command}")


if __name__ == "__main__":
    main(*sys.argv[1:])
