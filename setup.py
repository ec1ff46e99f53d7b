"""Drives CMake, which alone knows native sources and flags; maps pyext/ to steepest and kernels/ to steepest.kernels.

CMake options travel in the environment variable CMAKE_ARGS, e.g. CMAKE_ARGS=-DSTEEPEST_CUDA=OFF pip install .
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
VERSION = re.search(r'__version__ = "(.+?)"', (ROOT / "pyext/_version.py").read_text())[1]


class CMakeBuild(build_ext):
    """Configure, build and install into the package directory; an editable install uses pyext/ itself."""

    def build_extension(self, ext):
        package = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(os.environ.get("STEEPEST_BUILD_DIR", self.build_temp)).resolve()
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake",
            "-S",
            str(ROOT),
            "-B",
            str(build),
            "-DSTEEPEST_PYTHON=ON",
            f"-DPython_EXECUTABLE={sys.executable}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        subprocess.check_call(configure)
        subprocess.check_call(["cmake", "--build", str(build), "--parallel", str(os.cpu_count() or 1)])
        # An editable install takes the module alone from here to pyext/; the library beside it must be there too.
        for target in [package, ROOT / "pyext"] if self.editable_mode else [package]:
            subprocess.check_call(["cmake", "--install", str(build), "--prefix", str(target)])


packages = {"steepest": "pyext", "steepest.kernels": "kernels"}
for init in sorted((ROOT / "pyext").glob("*/**/__init__.py")):
    inner = init.parent.relative_to(ROOT / "pyext")
    packages[".".join(["steepest", *inner.parts])] = str(init.parent.relative_to(ROOT))

setup(
    version=VERSION,
    packages=list(packages),
    package_dir=packages,
    package_data={"steepest.conformance": ["*.npz"]},
    ext_modules=[Extension("steepest._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
