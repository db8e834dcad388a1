"""What older versions of `kernels` load, which look for a folder of the package's name: the package above it."""

import json
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

_folder = Path(__file__).resolve().parents[1]
_name = json.loads((_folder / "metadata.json").read_text(encoding="utf-8"))["id"]
if _name not in sys.modules:
    _spec = spec_from_file_location(_name, _folder / "__init__.py")
    sys.modules[_name] = module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[_name])
sys.modules[__name__] = sys.modules[_name]
