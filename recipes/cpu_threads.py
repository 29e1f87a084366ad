"""Measures the demo pair on 1 and more CPU threads, idle and beside other programs.

    python recipes/cpu_threads.py --threads 1 2 --beside 0 1 2 --batch 1 8

A round answers `batch` prompts at once, 48 greedy tokens each at K = 3, and gives tokens a second.
It counts only if nothing else ran on the machine but the busy loops that this script starts, as
/proc/stat tells (Linux). Each row is the median of the rounds that counted.

Waiting threads sleep in the rows "passive" (what eaglerun sets) and spin in the rows "active"
(OpenMP's default). OpenMP reads that once, so each row is a process of its own.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROUNDS, ATTEMPTS, TOKENS = 5, 60, 48
STRAY = 0.06  # cores that others may take in a round that counts
LIMIT_S = 240.0
# Ends when this script does, however that ends.
BUSY_LOOP = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: pass"


def busy_s() -> float:
    """Processor seconds that this machine has spent on anything."""
    user, nice, system, _, _, irq, softirq, steal = map(
        int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    )
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def measure(threads: int, batch: int, beside: int) -> None:
    """Print one row as JSON. Runs in a process of its own."""
    from eaglerun import LLM, SamplingParams

    llm = LLM("demo", num_draft_tokens=3, cpu_threads=threads, max_num_seqs=8, log_stats_every=0)
    prompts = [f"Tom has {n + 3} apples and buys {n + 5} more." for n in range(batch)]
    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    llm.generate(prompts, params, progress=False)
    rates: list[float] = []
    begun, attempts = time.monotonic(), 0
    while len(rates) < ROUNDS and attempts < ATTEMPTS and time.monotonic() - begun < LIMIT_S:
        attempts += 1
        before, own, start = busy_s(), sum(os.times()[:2]), time.monotonic()
        llm.generate(prompts, params, progress=False)
        wall = time.monotonic() - start
        others = (busy_s() - before - (sum(os.times()[:2]) - own)) / wall
        if others <= beside + STRAY:
            rates.append(batch * TOKENS / wall)
    median = round(statistics.median(rates), 1) if rates else None
    print(json.dumps({"rate": median, "rounds": len(rates), "of": attempts}))


def row(threads: int, policy: str, batch: int, beside: int) -> dict[str, float | None]:
    argv = [sys.executable, __file__, "--row", str(threads), str(batch), str(beside)]
    loops = [subprocess.Popen([sys.executable, "-c", BUSY_LOOP]) for _ in range(beside)]
    try:
        env = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
        env["OMP_WAIT_POLICY"] = policy
        done = subprocess.run(argv, env=env, stdout=subprocess.PIPE, text=True, check=True)
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()
    found: dict[str, float | None] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--beside", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--row", type=int, nargs=3, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.row is not None:
        measure(*flags.row)
        return
    print("| at once | busy loops beside | threads | waiting | tok/s | rounds that counted |")
    print("|--:|--:|--:|---|--:|--:|")
    for batch in flags.batch:
        for beside in flags.beside:
            for threads in flags.threads:
                for policy in ("passive",) if threads == 1 else ("passive", "active"):
                    found = row(threads, policy, batch, beside)
                    cells = [batch, beside, threads, policy, found["rate"]]
                    counted = f"{found['rounds']} of {found['of']}"
                    print("|", " | ".join(map(str, [*cells, counted])), "|", flush=True)


if __name__ == "__main__":
    main()
