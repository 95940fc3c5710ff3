"""What must hold where only obsdiff-runtime is installed; a script, so that it needs no pytest and no plugins.

    python tests/runtime/torch_free_smoke.py [BUNDLE]

Without a bundle: import, its time, and the samplers. With one: an image and a benchmark, too.
"""

import subprocess
import sys
import time


def imports_quickly() -> None:
    code = "import time; t = time.perf_counter(); import obsdiff_runtime; print(time.perf_counter() - t)"
    seconds = min(float(subprocess.check_output([sys.executable, "-c", code])) for _ in range(3))
    if seconds > 0.2:
        raise SystemExit(f"import obsdiff_runtime took {seconds:.2f} s; 0.2 s is the limit")
    print(f"import obsdiff_runtime: {seconds * 1000:.0f} ms")


def samples() -> None:
    import numpy as np

    from obsdiff_runtime.noise import SOURCES
    from obsdiff_runtime.schedulers import make_scheduler

    noise = SOURCES["torch"](1, 0, 1)
    scheduler = make_scheduler({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, 20, 64, noise)
    sample = noise((1, 4, 8, 8))
    for index in range(len(scheduler.timesteps)):
        sample = scheduler.step(sample, index, sample)
    if not np.isfinite(sample).all():
        raise SystemExit("the sampler did not stay finite")
    print("samplers: ok")


def draws(folder: str) -> None:
    from obsdiff_runtime import Pipeline, bench
    from obsdiff_runtime.benchmark import table

    start = time.perf_counter()
    images = Pipeline(folder)("a large red circle above a small blue square", seed=1, num_inference_steps=2)
    print(f"drew {images.arrays.shape} in {time.perf_counter() - start:.1f} s, loading included")
    print(table(bench(folder, iterations=2, warmup=1, num_inference_steps=2)))


def main() -> None:
    imports_quickly()
    samples()
    if len(sys.argv) > 1:
        draws(sys.argv[1])
    loaded = [name for name in ("torch", "diffusers", "transformers", "obsdiff") if name in sys.modules]
    if loaded:
        raise SystemExit(f"the runtime imported {', '.join(loaded)}")
    print("no torch in this process")


if __name__ == "__main__":
    main()
