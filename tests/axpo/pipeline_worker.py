"""axpo.evaluate, then axpo.collect, in one process of torchrun: `pipeline_worker.py OUT`."""

import sys
from collections.abc import Callable
from pathlib import Path

from axpo import collect, distributed, evaluate

EVALUATE = {"eval.samples": 2, "eval.repeats": 2, "eval.limit": 3, "eval.k": 1}
COLLECT = {"collect.limit": 3, "collect.batch_size": 2, "collect.samples": 4}


def run(main: Callable[[], None], options: dict[str, object]) -> None:
    sys.argv = ["axpo", *(f"--{name}={value}" for name, value in options.items())]
    main()


if __name__ == "__main__":
    out, finish = Path(sys.argv[1]), distributed.finish
    distributed.finish = lambda: None  # one process group serves both programs
    run(evaluate.main, EVALUATE | {"eval.benchmarks": "mini", "eval.out": out / "evaluated"})
    run(collect.main, COLLECT | {"collect.out": out / "collected"})
    finish()
