"""The process that answers `asking.ask`: `python -m obsdiff_export.answering module:name answers question...`."""

import importlib
import json
import sys
from pathlib import Path


def main(place: str, answers: str, *questions: str) -> None:
    """Writes one line per question as soon as it is answered; a crash loses only the one in hand."""
    module, _, name = place.partition(":")
    answer = getattr(importlib.import_module(module), name)
    with Path(answers).open("w", encoding="utf-8", buffering=1) as sink:
        for question in questions:
            try:
                line = {"question": question, "value": answer(question), "failure": ""}
            except Exception as error:  # whatever a vendor's library raises is the finding
                words = " ".join(str(error).split()) or "no message"
                line = {"question": question, "value": None, "failure": f"{type(error).__name__}: {words}"[:400]}
            sink.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
