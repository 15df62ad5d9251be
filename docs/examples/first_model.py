"""Cut a model by a fifth, read the verdict and the numbers behind it, and let it write.

python docs/examples/first_model.py [MODEL [OUT]]
"""

import sys
from pathlib import Path
from typing import Any

from nirvana_deploy import prune_export
from nirvana_deploy.runtime.registry import open_runner
from nirvana_deploy.runtime.text import load_text_side, stream_text


def main(model: str = "smollm2", out: str = "first-model", **options: Any) -> None:
    """Make the folder ``out``; ``options`` are any of prune_export."""
    asked = {"sparsity": 0.2, "preset": "fast", "quantize": ("w4",), "quantize_head": True}
    done = prune_export(model, out=out, force=True, **{**asked, **options})

    if done.verdict is not None:
        print(f"{done.verdict.title}. {done.verdict.why}")
    print(f"{done.plan.budget.met_removed_share:.1%} of the linear weights went")
    quality = done.manifest["stages"]["quality"]["result"]["variants"]
    for name, found in quality.items():
        print(f"{name:12} perplexity {found['perplexity']:8.2f}")
    print(f"The whole report: {done.report}")

    folder = Path(out) / "onnx-w4"
    tokenizer, stops = load_text_side(folder)
    with open_runner(folder) as runner:
        answer = stream_text(runner, tokenizer, "The capital of France is", max_new_tokens=32, stops=stops)
    print(f"{answer.text!r}, after {answer.ttft_ms:.0f} ms")


if __name__ == "__main__":
    main(*sys.argv[1:])
