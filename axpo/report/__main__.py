"""Command line of the report: `python -m axpo.report RUN_DIR [--trees N]`."""

import argparse
import sys
from pathlib import Path

from axpo.config import Log
from axpo.report import ReportError, write_report


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="axpo.report", description="Writes RUN_DIR/report.html, one file, no network."
    )
    parser.add_argument("run_dir", type=Path, help="a run directory, <run.dir>/<run.name>")
    parser.add_argument("--trees", type=int, default=Log().trees_in_report, help="question trees drawn (%(default)s)")
    arguments = parser.parse_args()
    if arguments.trees < 0:
        parser.error(f"--trees {arguments.trees}: it must be 0 or more")
    try:
        print(write_report(arguments.run_dir, arguments.trees))
    except (ReportError, OSError) as error:
        print(f"axpo.report: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
