"""End with advice if a package is missing. The scripts import this file before all others."""

import importlib.util
import sys

for package in ("numpy", "torch", "pydantic", "safetensors", "tqdm"):
    if importlib.util.find_spec(package) is None:
        print(
            f"error: {package} is not installed: activate the environment, or "
            "pip install -r requirements.txt",
            file=sys.stderr,
        )
        sys.exit(2)
