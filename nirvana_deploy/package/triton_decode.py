# mypy: ignore-errors
# (this file travels: it becomes model.py of a Triton repository and imports nothing of this package)
"""Text generation for Triton's Python backend: a decode loop on onnxruntime-genai, decoupled.

Inputs, all but the first optional: ``text_input``; ``max_tokens`` [128]; ``stream`` [false]: one response a
token, else one in all; ``chat`` [false]: the text is a user's message, put through the chat template;
``temperature``, ``top_k``, ``top_p``, ``random_seed``: sampling, which is greedy unless one of the first
three is given. Outputs: ``text_output`` and ``token_ids``, of new tokens only. Needs, beside Triton's own
Python: ``pip install onnxruntime-genai``.
"""

import json
import os
from pathlib import Path

import numpy as np

DEFAULT_MAX_TOKENS = 128
_OPTIONS = {
    "max_tokens": int,
    "stream": bool,
    "chat": bool,
    "random_seed": int,
    "temperature": float,
    "top_k": int,
    "top_p": float,
}


class TritonPythonModel:
    """What Triton makes one of for each instance; requests of an instance are served one after the other."""

    def initialize(self, args):
        """Load the model that the parameter ``model_folder`` names, relative to this model's folder."""
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read while onnxruntime_genai is imported
        import onnxruntime_genai

        parameters = json.loads(args["model_config"]).get("parameters", {})
        folder = Path(args["model_repository"]) / parameters["model_folder"]["string_value"]
        if not (folder / "genai_config.json").is_file():
            raise RuntimeError(
                f"{folder} holds no genai_config.json: the parameter model_folder of config.pbtxt must name "
                "the folder with the ONNX model. Repositories in object storage are fetched model by model; "
                "there, give an absolute path."
            )
        self._genai = onnxruntime_genai
        self._model = onnxruntime_genai.Model(str(folder))
        self._tokenizer = onnxruntime_genai.Tokenizer(self._model)
        self._stops = {int(token) for token in self._tokenizer.eos_token_ids}
        config = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
        self._context_tokens = config["model"]["context_length"]

    def execute(self, requests):
        """Answer each request on its own sender."""
        serve(requests, self._pieces, options=_OPTIONS)

    def finalize(self):
        """Let go of the model before the process ends."""
        self._tokenizer = self._model = None

    def _pieces(self, text, *, chat=False, **options):
        return self._generate(self._encode(text, chat=chat), **options)

    def _encode(self, text, *, chat):
        # a chat template writes the first token itself; a plain text gets it here, or never
        self._tokenizer.update_options(add_special_tokens="false" if chat else "true")
        if chat:
            messages = json.dumps([{"role": "user", "content": text}])
            text = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        prompt = np.asarray(self._tokenizer.encode(text), dtype=np.int32)
        if not len(prompt):
            raise ValueError("text_input is empty: it must hold at least one token.")
        if len(prompt) >= self._context_tokens:
            raise ValueError(
                f"text_input has {len(prompt)} tokens, and the model reads {self._context_tokens} at most."
            )
        return prompt

    def _generate(self, prompt, *, max_tokens=DEFAULT_MAX_TOKENS, random_seed=None, **sampling):
        """Yield (text, token) until a stop token, which is left out, or ``max_tokens``."""
        parameters = self._genai.GeneratorParams(self._model)
        length = min(len(prompt) + max_tokens, self._context_tokens)
        search = {"max_length": length, "do_sample": bool(sampling), **sampling}
        if not sampling:  # greedy means the largest logit; the author's penalty belongs to his sampling
            search["repetition_penalty"] = 1.0
        if random_seed is not None:
            search["random_seed"] = random_seed
        parameters.set_search_options(**search)
        generator = self._genai.Generator(self._model, parameters)
        generator.append_tokens(prompt)
        stream = self._tokenizer.create_stream()
        while not generator.is_done():
            generator.generate_next_token()
            token = int(generator.get_next_tokens()[0])
            if token in self._stops:
                return
            yield stream.decode(token), token


def serve(requests, pieces_of, *, options):
    """Answer each request by ``pieces_of(text, **options)``, which yields (text, token) of new tokens.

    ``options`` names the inputs that a request may have, with their types; ``stream`` sends each piece by
    itself. A request that fails fails alone.
    """
    import triton_python_backend_utils as pb_utils

    for request in requests:
        sender = request.get_response_sender()
        try:
            _answer(pb_utils, request, sender, pieces_of, options)
        except Exception as error:  # whatever it is, this request must be told and the next one served
            response = pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error)))
            sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def _answer(pb_utils, request, sender, pieces_of, options):
    text, given = _read(pb_utils, request, options)
    if given.get("max_tokens", 1) < 1:
        raise ValueError(f"max_tokens must be at least 1, got {given['max_tokens']}.")
    stream = given.pop("stream", False)
    pieces, tokens = [], []
    for piece, token in pieces_of(text, **given):
        if sender.is_cancelled():
            break
        pieces.append(piece)
        tokens.append(token)
        if stream:
            sender.send(_response(pb_utils, piece, [token]))
    if stream:
        sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
    else:
        last = _response(pb_utils, "".join(pieces), tokens)
        sender.send(last, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def _read(pb_utils, request, options):
    """The text, and the options that were sent."""
    text = pb_utils.get_input_tensor_by_name(request, "text_input").as_numpy().reshape(-1)[0]
    given = {}
    for name, read in options.items():
        tensor = pb_utils.get_input_tensor_by_name(request, name)
        if tensor is not None:
            given[name] = read(tensor.as_numpy().reshape(-1)[0])
    return text.decode("utf-8") if isinstance(text, bytes) else str(text), given


def _response(pb_utils, text, tokens):
    return pb_utils.InferenceResponse(
        output_tensors=[
            pb_utils.Tensor("text_output", np.array([text.encode("utf-8")], dtype=np.object_)),
            pb_utils.Tensor("token_ids", np.array(tokens, dtype=np.int32)),
        ]
    )
