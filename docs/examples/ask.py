"""Ask a server for the continuation of a prompt, and print it as it is written.

nirvana-deploy serve FOLDER
pip install openai
python docs/examples/ask.py http://127.0.0.1:8000/v1 "The capital of France is"
"""

import sys
from collections.abc import Iterator

from openai import OpenAI


def continuation(url: str, prompt: str, *, max_tokens: int = 64) -> Iterator[str]:
    """The pieces of what the model at ``url`` writes."""
    with OpenAI(base_url=url, api_key="none") as client:
        (model,) = client.models.list()
        stream = client.completions.create(model=model.id, prompt=prompt, max_tokens=max_tokens, stream=True)
        for part in stream:
            yield part.choices[0].text


if __name__ == "__main__":
    for piece in continuation(*sys.argv[1:3]):
        print(piece, end="", flush=True)
    print()
