"""Templates of the report page and of the model card."""

from pathlib import Path
from typing import Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined

FOLDER: Final = Path(__file__).parent


def environment(*, escape: bool) -> Environment:
    """Where templates are looked up; an undefined name in one is an error. `escape`: what is filled in is not HTML."""
    return Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=escape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
