"""Where the figures come from."""

import datetime
import platform
import shutil
import subprocess

import torch

from gpu.rows import Options, Sheet, Value

QUERY = "name,driver_version,clocks.current.sm,clocks.max.sm,power.limit,temperature.gpu"


def run(sheet: Sheet, options: Options) -> None:
    facts: dict[str, Value] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if options.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_mib": properties.total_memory >> 20,
            "cuda": str(torch.version.cuda),
            "cusparselt": str(
                torch.backends.cusparselt.version() if torch.backends.cusparselt.is_available() else "none"
            ),
        }
        if shutil.which("nvidia-smi"):
            command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader", "--id=0"]
            facts["nvidia-smi"] = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    with sheet.case(**facts):
        pass
