"""scripts.train, but on the first attempt rank 1 is killed at some moment after its first checkpoint."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

from scripts.train import main


def die_after_a_checkpoint(folder: Path) -> None:
    while not list(folder.glob("step-*[0-9]")):
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)


if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    out = Path(sys.argv[sys.argv.index("--out") + 1])
    threading.Thread(target=die_after_a_checkpoint, args=[out / "checkpoints"], daemon=True).start()
main()
