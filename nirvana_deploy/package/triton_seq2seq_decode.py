# mypy: ignore-errors
# (this file travels: it becomes model.py of a Triton repository)
"""Text generation for Triton's Python backend with the two engines of an encoder-decoder, decoupled.

Inputs: ``text_input``; optional ``max_tokens`` [128] and ``stream`` [false]: one response a token, else one
in all. Outputs: ``text_output`` and ``token_ids``, of new tokens only, greedy. Needs, beside Triton's own
Python, this package with the engines' runtime: ``pip install 'nirvana-deploy[rtx]'``, or ``[gpu]``.
"""

import json
from pathlib import Path

import numpy as np

from nirvana_deploy.package.triton_decode import DEFAULT_MAX_TOKENS, serve

_OPTIONS = {"max_tokens": int, "stream": bool}


class TritonPythonModel:
    """What Triton makes one of for each instance; requests of an instance are served one after the other."""

    def initialize(self, args):
        """Open the engines that the parameter ``decoder`` names, on the GPU of this instance."""
        from nirvana_deploy.runtime.tensorrt.encoder_decoder import TensorRTSeq2Seq
        from nirvana_deploy.runtime.text import load_text_side

        parameters = json.loads(args["model_config"])["parameters"]
        version = Path(args["model_repository"]) / args["model_version"]
        decoder = version / parameters["decoder"]["string_value"]
        self._tokenizer, self._stops = load_text_side(decoder.parent)
        self._runner = TensorRTSeq2Seq(decoder, device_index=int(args["model_instance_device_id"]))

    def execute(self, requests):
        """Answer each request on its own sender."""
        serve(requests, self._pieces, options=_OPTIONS)

    def finalize(self):
        """Free the GPU before the process ends."""
        self._runner.close()

    def _pieces(self, text, *, max_tokens=DEFAULT_MAX_TOKENS):
        """Yield (text, token) until a stop token, which is left out, or ``max_tokens``."""
        from nirvana_deploy.runtime.text import TextPieces

        heard = []
        words = TextPieces(self._tokenizer, heard.append)
        prompt = np.array([self._tokenizer(text)["input_ids"]], dtype=np.int64)
        logits, state = self._runner.prefill(prompt)
        for count in range(1, max_tokens + 1):
            token = int(logits[0, -1].argmax())
            if token in self._stops:
                return
            words.add(token)
            yield "".join(heard), token
            heard.clear()
            if count < max_tokens:
                logits, state = self._runner.decode(np.array([[token]], dtype=np.int64), state)
