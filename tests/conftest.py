"""What every test gets: one thread (workers share the cores), no hub, no noise from libraries; Ctrl-C is heard."""

import os
import signal

for name, value in {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "DIFFUSERS_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
}.items():
    os.environ.setdefault(name, value)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell begins with it ignored
