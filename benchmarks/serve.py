"""The server under load: rate, time to the first token, memory and descriptors.

    python benchmarks/serve.py OUT [--variant V] [--clients 16] [--slots 4] [--minutes 10] [--json FILE]

OUT is an output folder or an ONNX folder. The server runs in its own process, first with one slot for a tenth
of the time, then with --slots. Clients ask without pause, every second one streamed, with prompts and lengths
of several sizes; every tenth goes away before its answer has ended.

Promises: no request is lost; over the time, memory grows by at most 5 % (the second fifth against the last)
and no descriptor stays open; when all clients are gone, all slots are free. Exits with 1 when one is broken.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import numpy as np
import psutil

from nirvana_deploy.base.artifact import write_json
from nirvana_deploy.base.machine import default_threads, measured_environment
from nirvana_deploy.measure.workloads.server import ServerProcess

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "benchmarks" / "results" / "serve.json"
GROWTH = 0.05
_WORDS = (
    "the river runs past an old mill where nobody has lived since the great flood of spring".split()  # noqa: SIM905
)
_SAMPLE_SECONDS = 2.0
_LEAVES = 10
"""One request in so many goes away early."""


def under_load(folder: Path, *, clients: int, slots: int, seconds: float, options: Sequence[str] = ()) -> Any:
    """What a server of ``folder`` did under load: counts, rates, times, memory, descriptors."""
    with ServerProcess(folder.name, folder, ("--slots", str(slots), *options)) as server:
        process = psutil.Process(server.pid)
        found = asyncio.run(_load(server.url, server.model, process, clients=clients, seconds=seconds))
        while (health := server.health())["active"] or health["waiting"]:
            time.sleep(0.1)
        found["descriptors"]["after"] = _settled(process, found["descriptors"]["begin"])
    if server.exit_code:
        raise SystemExit(f"The server ended with {server.exit_code}.")
    return {"slots": slots, "clients": clients, **found}


def _settled(process: psutil.Process, begin: int, patience_s: float = 10.0) -> int:
    """The open descriptors of ``process``, once those of the connections that just ended are closed."""
    until = time.perf_counter() + patience_s
    while (count := process.num_fds()) > begin and time.perf_counter() < until:
        time.sleep(0.1)
    return count


async def _load(url: str, model: str, process: psutil.Process, *, clients: int, seconds: float) -> Any:
    import openai  # benchmarks/readme.py, which needs the table alone, runs without it

    first_ms: list[float] = []
    counts = {"requests": 0, "left_early": 0, "failed": 0, "new_tokens": 0}
    samples: list[tuple[int, int]] = []
    began = time.perf_counter()
    until = began + seconds

    async def ask(client: Any, random: Random) -> None:
        text = " ".join(random.choices(_WORDS, k=random.choice([4, 16, 64])))
        asked = {"model": model, "prompt": text, "max_tokens": random.choice([8, 16, 48]), "temperature": 0.8}
        counts["requests"] += 1
        if random.random() < 0.5:
            answer = await client.completions.create(**asked)
            counts["new_tokens"] += answer.usage.completion_tokens
            return
        leaves, start = random.randrange(_LEAVES // 2) == 0, time.perf_counter()
        stream = await client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
        async with stream:
            heard = False
            async for part in stream:
                if part.usage:
                    counts["new_tokens"] += part.usage.completion_tokens
                elif part.choices[0].text and not heard:
                    heard = True
                    first_ms.append(1e3 * (time.perf_counter() - start))
                    if leaves:
                        counts["left_early"] += 1
                        return

    async def keep_asking(number: int) -> None:
        random = Random(number)
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=300) as client:
            while time.perf_counter() < until:
                try:
                    await ask(client, random)
                except openai.OpenAIError as error:
                    counts["failed"] += 1
                    print(f"{type(error).__name__}: {error}", file=sys.stderr)

    async def watch() -> None:
        while True:
            samples.append((process.memory_info().rss, process.num_fds()))
            await asyncio.sleep(_SAMPLE_SECONDS)

    watching = asyncio.create_task(watch())
    await asyncio.gather(*(keep_asking(number) for number in range(clients)))
    watching.cancel()
    took = time.perf_counter() - began
    memory, descriptors = zip(*samples, strict=True)
    fifth = max(1, len(samples) // 5)
    early, late = median(memory[fifth : 2 * fifth] or memory), median(memory[-fifth:])
    return {
        **counts,
        "seconds": round(took, 1),
        "requests_per_s": round(counts["requests"] / took, 2),
        "tokens_per_s": round(counts["new_tokens"] / took, 1),
        "ttft_ms": {f"p{share}": round(float(np.percentile(first_ms, share)), 1) for share in (50, 95)},
        "rss_bytes": {"begin": memory[0], "early": int(early), "late": int(late), "most": max(memory)},
        "descriptors": {"begin": descriptors[0], "most": max(descriptors)},
    }


def broken(found: dict[str, Any]) -> list[str]:
    """The promises that a run under load did not keep, as sentences."""
    memory, descriptors = found["rss_bytes"], found["descriptors"]
    grown = memory["late"] / memory["early"] - 1
    said = []
    if found["failed"]:
        said.append(f"{found['failed']} of {found['requests']} requests failed")
    if grown > GROWTH:
        said.append(f"memory grew by {grown:.1%}")
    if descriptors["after"] > descriptors["begin"]:
        said.append(f"{descriptors['after'] - descriptors['begin']} descriptors stayed open")
    return said


def section(record: dict[str, Any]) -> str:
    """The table of the record, with the machine under it."""
    lines = [
        "| Slots | Requests | a second | Tokens a second | First token, p50 | p95 | Memory | Descriptors |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for run in record["runs"]:
        memory, files = run["rss_bytes"], run["descriptors"]
        lines.append(
            f"| {run['slots']} | {run['requests']:,} | {run['requests_per_s']:.2f} "
            f"| {run['tokens_per_s']:.0f} "
            f"| {run['ttft_ms']['p50'] / 1e3:.2f} s | {run['ttft_ms']['p95'] / 1e3:.2f} s "
            f"| {memory['early'] / 1e6:.0f}, then {memory['late'] / 1e6:.0f} MB "
            f"| {files['begin']}, then {files['after']} |"
        )
    where, last = record["environment"], record["runs"][-1]
    failed = sum(run["failed"] for run in record["runs"])
    return "\n".join(
        [
            *lines,
            "",
            f"{record['model']}, {last['clients']} clients without pause, "
            f"{last['seconds'] / 60:.0f} minutes with {last['slots']} slots; "
            f"{failed} requests failed, {last['left_early']:,} went away early. "
            f"{where['threads']} threads of {where['cpu']}, onnxruntime "
            f"{where['onnxruntime']}; load of the machine before: {where['load_average_1min']:.1f}.",
        ]
    )


def main() -> None:
    """Measure, write the record, print the table, and say whether the promises hold."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--variant")
    parser.add_argument("--name", help="of the model, in the record")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--json", type=Path, default=RECORD, metavar="FILE")
    asked = parser.parse_args()
    options = ["--threads", str(asked.threads), *(["--variant", asked.variant] if asked.variant else [])]
    where = measured_environment(threads=asked.threads)
    runs = [
        under_load(asked.out, clients=asked.clients, slots=slots, seconds=seconds, options=options)
        for slots, seconds in ((1, 6 * asked.minutes), (asked.slots, 60 * asked.minutes))
    ]
    name = asked.name or f"{asked.out.resolve().name}{f'/{asked.variant}' if asked.variant else ''}"
    record = {"schema": 1, "environment": where, "model": name, "runs": runs}
    write_json(asked.json, record)
    print(section(record))
    said = [one for run in runs for one in broken(run)]
    print("\n".join(said) or "All promises are kept.")
    sys.exit(1 if said else 0)


if __name__ == "__main__":
    main()
