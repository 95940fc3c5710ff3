"""Everything a user can get wrong, or a machine can lack, and the exit code of each.

    ObsdiffError              1   failed
    ├── ConfigError           2   usage or configuration: a flag, a file, a pattern, a prompt
    │   └── ModelError        2   the model given is none, or of no known family
    ├── CalibrationError      1   statistics that cannot be used: empty, not finite, indefinite
    ├── ExportError           1   a graph that could not be made, or does not compute what torch computes
    ├── BuildError            1   an engine builder refused or crashed
    ├── BundleError           1   a bundle or checkpoint that is incomplete or altered
    ├── RunError              1   a component that ran and gave nothing usable
    ├── CancelledError        130 whoever asked for it wants it no more
    ├── QualityError          3   a quality gate was not met
    ├── ResourceError         4   not enough memory or disk
    ├── CompatibilityError    5   engine, schema or environment do not fit together
    │   └── MissingPackageError   an optional package is absent; names the extra
    └── SparsityProofError    6   sparsity was demanded and could not be shown

A message says what, where and what to do next. Anything else that is raised is a bug and shows its traceback.
"""

from typing import ClassVar


class ObsdiffError(Exception):
    exit_code: ClassVar[int] = 1


class ConfigError(ObsdiffError):
    exit_code = 2


class ModelError(ConfigError):
    pass


class CalibrationError(ObsdiffError):
    pass


class ExportError(ObsdiffError):
    pass


class BuildError(ObsdiffError):
    pass


class BundleError(ObsdiffError):
    pass


class RunError(ObsdiffError):
    pass


class CancelledError(ObsdiffError):
    exit_code = 130


class QualityError(ObsdiffError):
    exit_code = 3


class ResourceError(ObsdiffError):
    exit_code = 4


class CompatibilityError(ObsdiffError):
    exit_code = 5


class MissingPackageError(CompatibilityError):
    pass


class SparsityProofError(ObsdiffError):
    exit_code = 6
