"""From a model to a server: cut, quantize, and serve what the report recommends.

pip install 'nirvana-deploy[cpu,serve]'
python docs/examples/serve_model.py [MODEL [OUT]]
"""

import sys
from typing import Any

from nirvana_deploy import Serving, prune_export, serve_folder
from nirvana_deploy.serve.server import Served


def main(model: str = "smollm2", out: str = "served-model", port: int = 8000, **options: Any) -> None:
    """Make the folder ``out``, or go on where it is finished, and serve it until Ctrl-C."""
    asked = {"sparsity": 0.2, "preset": "fast", "quantize": ("w4",), "quantize_head": True}
    done = prune_export(model, out=out, resume=True, **{**asked, **options})
    if done.verdict is not None:
        print(f"{done.verdict.title}. {done.verdict.why}")

    def say(served: Served) -> None:
        print(f"{served.model} on {served.url}", flush=True)

    served = serve_folder(done.out, Serving(port=port), on_ready=say)
    print(f"Ended after {served.answered} answers.")


if __name__ == "__main__":
    main(*sys.argv[1:])
