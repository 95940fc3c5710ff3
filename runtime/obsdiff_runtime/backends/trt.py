"""TensorRT and TensorRT-RTX: runs the bundle's engines, without torch. What runs is `engine.TrtSession`."""

import functools
import importlib
import logging
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from obsdiff_runtime import cuda
from obsdiff_runtime.backends import plans
from obsdiff_runtime.backends.engine import TrtSession
from obsdiff_runtime.bundle import Bundle, TensorEntry
from obsdiff_runtime.cuda import Cuda
from obsdiff_runtime.errors import BundleError, CompatibilityError, MissingPackageError, ObsdiffError

_LAST_MESSAGES: Final = 8

log = logging.getLogger(__name__)


class TensorRt:
    """The backend of one of the two packages; see `backends.Backend`."""

    def __init__(self, package: str, extra: str) -> None:
        self.package, self.extra = package, extra

    def open_session(self, bundle: Bundle, component: str, *, threads: int | None = None) -> TrtSession:
        """`threads` is of no use here: the work is the GPU's."""
        vendor, driver = self.load()
        entry, device = bundle.component(component), driver.device()
        engine = plans.select(
            entry.engines,
            backend=self.package,
            version=str(vendor.__version__),
            device=device,
            component=component,
            bundle=bundle.root,
        )
        if engine.device not in ("", device.name):
            log.warning(
                "%s was tuned on %s and runs on %s; obsdiff build %s tunes it for this GPU",
                component, engine.device, device.name, bundle.root,
            )  # fmt: skip
        ports = {port.name: port for port in (*entry.inputs, *entry.outputs)}
        return self.open_plan(bundle.path(engine.path), name=component, ports=ports)

    def open_plan(
        self,
        path: Path,
        *,
        name: str | None = None,
        ports: Mapping[str, TensorEntry] | None = None,
        cuda_graphs: bool = True,
    ) -> TrtSession:
        """Loads a plan onto the GPU.

        Args:
            path: of the plan.
            name: what messages call it; the path if None.
            ports: the graph's by name, for the names of dynamic axes.
            cuda_graphs: record a CUDA graph of each shape that comes twice in a row.

        Raises:
            MissingPackageError: the package, or cuda-python, is not installed.
            CompatibilityError: there is no GPU, or the plan does not load: it was built for another GPU or version.
            ResourceError: it does not fit on the GPU.
            BundleError: the file cannot be read.
        """
        vendor, driver = self.load()
        label, device, messages = name or str(path), driver.device(), _messages(self.package)
        messages.clear()
        if hasattr(vendor, "init_libnvinfer_plugins"):
            vendor.init_libnvinfer_plugins(_logger(self.package), "")
        try:
            plan = path.read_bytes()
        except OSError as error:
            raise BundleError(f"{path} cannot be read: {error}; build the engine again") from error
        runtime = vendor.Runtime(_logger(self.package))
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise CompatibilityError(
                f"{self.package} {vendor.__version__} cannot load {label} ({path}) on {device.name} "
                f"({device.capability}): {'; '.join(messages) or 'it does not say why'}. "
                "Build it on this machine: obsdiff build BUNDLE"
            )
        return TrtSession(
            vendor,
            runtime,
            engine,
            driver,
            name=label,
            device=f"{device.name} ({device.capability})",
            messages=messages,
            ports=ports or {},
            cuda_graphs=cuda_graphs,
        )

    def load(self) -> tuple[Any, Cuda]:
        """The vendor's module and CUDA.

        Raises:
            MissingPackageError: one of them is not installed.
        """
        try:
            vendor = importlib.import_module(self.package)
        except ImportError as error:
            raise MissingPackageError(
                f"{self.package} cannot be imported ({error}): pip install 'obsdiff[{self.extra}]', "
                f"or without torch pip install 'obsdiff-runtime[{self.extra}]'"
            ) from error
        return vendor, cuda.load(self.extra)

    def obstacle(self) -> str:
        """Why nothing runs here, "" where it can: a package is missing, or there is no GPU."""
        try:
            self.load()[1].device()
        except ObsdiffError as error:
            return str(error)
        return ""

    def versions(self) -> dict[str, str]:
        return {self.package: str(self.load()[0].__version__)}


TENSORRT: Final = TensorRt("tensorrt", "trt")
RTX: Final = TensorRt("tensorrt_rtx", "rtx")


@functools.cache
def _messages(package: str) -> deque[str]:
    """The last complaints of a vendor's library."""
    return deque(maxlen=_LAST_MESSAGES)


@functools.cache
def _logger(package: str) -> Any:
    """The one logger of a package: it takes no second one in a process."""
    vendor, messages = importlib.import_module(package), _messages(package)

    class Logger(vendor.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            vendor.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if str(getattr(severity, "name", severity)) in ("ERROR", "INTERNAL_ERROR"):
                messages.append(str(message).strip())

    return Logger()
