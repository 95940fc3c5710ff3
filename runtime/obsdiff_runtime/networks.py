"""The components of a bundle as sessions: loaded when first used, checked after every run."""

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from obsdiff_runtime.backends import Backend, Session, backend
from obsdiff_runtime.backends.trt import TensorRt
from obsdiff_runtime.bundle import Bundle
from obsdiff_runtime.errors import RunError, require_count
from obsdiff_runtime.shapes import Profile
from obsdiff_runtime.text import PromptTokenizer

Array = NDArray[np.float32]
Observer = Callable[[str, float], None]


class Networks:
    """Sessions and tokenizers of one bundle on one backend.

    Attributes:
        bundle: what they belong to.
        load_seconds: time spent loading, by component.
        observer: told component and seconds of every run.
    """

    def __init__(self, bundle: Bundle, executor: str | Backend, threads: int | None) -> None:
        if threads is not None:
            require_count("threads", threads)
        self.bundle = bundle
        self.load_seconds: dict[str, float] = {}
        self.observer: Observer | None = None
        self.backend_name = executor if isinstance(executor, str) else type(executor).__name__
        self._backend: Backend = backend(executor) if isinstance(executor, str) else executor
        self._threads = threads
        self._sessions: dict[str, Session] = {}
        self._tokenizers: dict[str, PromptTokenizer] = {}

    def has(self, component: str) -> bool:
        return component in self.bundle.manifest.components

    def profiles(self, component: str) -> list[Profile]:
        """Of the engines that this backend chooses one of; none where it runs the graph."""
        if not isinstance(self._backend, TensorRt):
            return []
        engines, package = self.bundle.component(component).engines, self._backend.package
        return [profile for engine in engines if engine.backend == package for profile in engine.profiles]

    def session(self, component: str) -> Session:
        if component not in self._sessions:
            start = time.perf_counter()
            self._sessions[component] = self._backend.open_session(self.bundle, component, threads=self._threads)
            self.load_seconds[component] = time.perf_counter() - start
        return self._sessions[component]

    def tokenizer(self, name: str) -> PromptTokenizer:
        if name not in self._tokenizers:
            self._tokenizers[name] = PromptTokenizer(self.bundle, name)
        return self._tokenizers[name]

    def run(
        self, component: str, inputs: Mapping[str, NDArray[np.generic]], outputs: Sequence[str], *, finite: bool = True
    ) -> dict[str, Array]:
        """The named outputs of a component, float32.

        Args:
            component: loaded where it is not yet.
            inputs: by name.
            outputs: that are wanted.
            finite: whether NaN and infinity are an error; if not, the caller looks for them.

        Raises:
            ConfigError: the component does not take these inputs.
            RunError: an output holds NaN or infinity.
        """
        session = self.session(component)
        start = time.perf_counter()
        results = session.run(inputs, outputs)
        seconds = time.perf_counter() - start
        if self.observer is not None:
            self.observer(component, seconds)
        for name, array in results.items() if finite else ():
            if not np.isfinite(array).all():
                raise self.not_finite(component, name, array)
        return results

    def not_finite(self, component: str, output: str, array: Array) -> RunError:
        """The error for such an output."""
        dtype = self.bundle.component(component).dtype
        return RunError(
            f"{component}: {int((~np.isfinite(array)).sum())} of {array.size} values of its output {output} are not "
            f"finite; it computes in {dtype}: export it in float32 if that is too narrow"
        )

    def hidden_layers(self, component: str) -> int:
        """L, where hidden_states.L is the last of such outputs of a text encoder."""
        prefix = "hidden_states."
        names = [entry.name for entry in self.bundle.component(component).outputs]
        return max(int(name.removeprefix(prefix)) for name in names if name.startswith(prefix))
