"""A stand-in for the NVIDIA driver's library: a real shared library that lists the GPUs a test wants."""

from __future__ import annotations

import subprocess
from pathlib import Path

MIB = 2**20
SOURCE = Path(__file__).with_name("nvml.c")


def driver(folder: Path, *gpus: str) -> dict[str, str]:
    """The variables with which a new process finds these GPUs, each `name;uuid;bytes;major;minor`.

    Args:
        folder: Where the library is built.
        gpus: The GPUs; an instance of the one before it begins with +.

    Returns:
        Variables for the process's environment.
    """
    library = folder / "libnvidia-ml.so.1"
    if not library.exists():
        subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(SOURCE)], check=True)
    (folder / "gpus").write_text("".join(f"{gpu}\n" for gpu in gpus))
    return {"LD_LIBRARY_PATH": str(folder), "STAND_IN_GPUS": str(folder / "gpus")}


def h100s(number: int) -> list[str]:
    """As many H100 GPUs as nvidia-smi reports them."""
    return [f"NVIDIA H100 80GB HBM3;GPU-{index:08d};{81_559 * MIB};9;0" for index in range(number)]
