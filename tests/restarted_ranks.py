"""One process of a launch by torchrun in which a process is killed after each of the first two starts."""

import json
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

from torch import distributed

from experiments.train.distributed.launch import restart_number, start_name

WAIT = timedelta(seconds=200)
KILLS, GROUPS = 2, 12


def main(folder: Path) -> None:
    store, rank, processes = next(distributed.rendezvous("env://", timeout=WAIT))
    kept = store.check([f"process {rank}"])
    store.set(f"process {rank}", "was here")
    own = distributed.PrefixStore(start_name(), store)
    distributed.init_process_group("gloo", store=own, rank=rank, world_size=processes, timeout=WAIT)
    for _ in range(GROUPS):
        distributed.barrier(group=distributed.new_group(list(range(processes))))
    (folder / f"{restart_number()} {rank}.json").write_text(json.dumps({"kept": kept}))
    distributed.barrier()
    if restart_number() < KILLS and rank == restart_number():
        os.kill(os.getpid(), signal.SIGKILL)
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
