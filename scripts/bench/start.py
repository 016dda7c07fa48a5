"""Seconds that ``import isoshard`` takes in a fresh interpreter that has torch already; the bar is 0.15.

python -m scripts.bench.start [--rounds 9]
"""

import argparse
import subprocess
import sys
from statistics import median, quantiles

BAR = 0.15
PROGRAM = """
import sys, time, torch
began = time.perf_counter()
import src
import src.distributed, src.modeling, src.training
print(time.perf_counter() - began, any(name in sys.modules for name in ("torch.distributed.tensor", "torch._dynamo")))
"""


def once() -> tuple[float, bool]:
    """Seconds, and whether DTensor or dynamo came along."""
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    seconds, heavy = run.stdout.split()
    return float(seconds), heavy == "True"


def main() -> None:
    """Print the row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="fresh interpreters (%(default)s)")
    runs = [once() for _ in range(parser.parse_args().rounds)]
    seconds = [found for found, _ in runs]
    low, _, high = quantiles(seconds, n=4)
    heavy = "; torch.distributed.tensor or dynamo came along" if any(found for _, found in runs) else ""
    print(f"import after torch: {median(seconds):.3f} s ({low:.3f} .. {high:.3f}), bar {BAR}{heavy}")


if __name__ == "__main__":
    main()
