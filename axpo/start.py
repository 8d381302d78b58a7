"""The run directory of a job, opened by one rank for all of them."""

import socket
from collections.abc import Callable
from typing import Any

from axpo.config import Config, SftConfig
from axpo.distributed import from_rank_0, gather_objects, rank
from axpo.rundir import RunDir, RunDirError, agent, open_run_dir


def open_run(config: Config | SftConfig, fingerprint: Callable[[], dict[str, Any]]) -> RunDir:
    """`open_run_dir` on rank 0; the same directory, or the same error, on every rank.

    Raises:
        RunDirError, CheckpointError: as `open_run_dir`; or another node does not see the directory.
    """
    agents = sorted({one for one in gather_objects([agent()]) if one})
    run = from_rank_0(lambda: open_run_dir(config, fingerprint(), agents))
    blind = None if run.config.is_file() else f"rank {rank()} on {socket.gethostname()}"
    if hosts := [host for host in gather_objects([blind]) if host]:
        raise RunDirError(
            f"run directory {run.path}, made by rank 0, is not there for {', '.join(hosts)}: --run.dir must be on a "
            "file system that all nodes share"
        )
    return run
