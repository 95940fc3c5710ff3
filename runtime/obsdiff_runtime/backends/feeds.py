"""What every backend asks of the arrays that it is given."""

from collections.abc import Mapping, Sequence

import numpy as np

from obsdiff_runtime.errors import ConfigError


def check_names(what: str, names: Sequence[str], inputs: Mapping[str, np.ndarray]) -> None:
    """Raises ConfigError unless `inputs` are those of that network, `names`."""
    missing = [name for name in names if name not in inputs]
    unknown = [name for name in inputs if name not in names]
    if missing or unknown:
        raise ConfigError(
            f"{what} takes {', '.join(names)}; "
            f"missing: {', '.join(missing) or 'none'}; unknown: {', '.join(unknown) or 'none'}"
        )
