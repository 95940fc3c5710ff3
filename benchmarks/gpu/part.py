"""One part in a process of its own: `python -m gpu.part NAME ROWS OPTIONS`, options as JSON. run.py starts it."""

import importlib
import json
import sys
from pathlib import Path

from gpu.rows import Options, Sheet


def main(name: str, rows: str, options: str) -> None:
    told = Options(**json.loads(options))
    sheet = Sheet(Path(rows), name, told.seconds)
    try:
        importlib.import_module(f"gpu.{name}").run(sheet, told)
    except Exception as error:  # told in a row, as everything else is
        sheet.refused(error)
        raise


if __name__ == "__main__":
    main(*sys.argv[1:])
