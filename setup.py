"""Builds the C++ kernels of `hf_blockprune._cpu`; everything else about the package is in pyproject.toml.

They are optional: where they do not compile, or on other systems than Linux, the package installs without them.
"""

import platform
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

SOURCES = "hf_blockprune/_cpu"
PLAIN_SOURCES = [f"{SOURCES}/{name}.cpp" for name in ("driver", "half", "merge", "strips", "unpack")]
ISA_SOURCES = [f"{SOURCES}/{name}.cpp" for name in ("alike", "tile")]
COMMON_FLAGS = ["-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fvisibility=hidden", "-Wall", "-Wextra"]
# ISA_SOURCES are compiled once for each instruction set, under its name; which one runs is decided where it runs.
AVX2_FLAGS = ["-mavx2", "-mfma"]
AVX512_FLAGS = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mprefer-vector-width=512"]
ISA_FLAGS = {
    "x86_64": {
        "baseline": [],
        "avx2": AVX2_FLAGS,
        "avxvnni": [*AVX2_FLAGS, "-mavxvnni"],
        "avx512": AVX512_FLAGS,
        "avx512vnni": [*AVX512_FLAGS, "-mavx512vnni"],
        "avx512bf16": [*AVX512_FLAGS, "-mavx512vnni", "-mavx512bf16"],
    },
    "aarch64": {"baseline": []},
}
NEW_ISAS = {"avxvnni", "avx512vnni", "avx512bf16"}  # which GCC before 11 does not know; the kernels do without


class BuildKernels(build_ext):
    """A shared library with a C ABI, which ctypes loads: it belongs to no version of Python."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        objects = self.compiler.compile(
            PLAIN_SOURCES, output_dir=self.build_temp, extra_postargs=COMMON_FLAGS, depends=ext.depends
        )
        for isa, flags in ISA_FLAGS[platform.machine()].items():
            try:
                objects += self.compiler.compile(
                    ISA_SOURCES,
                    output_dir=f"{self.build_temp}/{isa}",
                    macros=[("BLOCKPRUNE_ISA", isa)],
                    extra_postargs=[*COMMON_FLAGS, *flags],
                    depends=ext.depends,
                )
            except CompileError:
                if isa not in NEW_ISAS:
                    raise
        self.compiler.link_shared_object(
            objects, self.get_ext_fullpath(ext.name), libraries=["dl"], target_lang="c++", build_temp=self.build_temp
        )


class AnyPythonWheel(bdist_wheel):
    """One wheel for all versions of Python, since nothing in it was compiled against one."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def kernels() -> list[Extension]:
    if sys.platform != "linux" or platform.machine() not in ISA_FLAGS:
        return []
    sources = [*PLAIN_SOURCES, *ISA_SOURCES]
    headers = [str(path) for path in sorted(Path(SOURCES).glob("*.h"))]
    return [Extension("hf_blockprune._cpu.libblockprune_cpu", sources, depends=headers, language="c++", optional=True)]


if __name__ == "__main__":
    setup(ext_modules=kernels(), cmdclass={"build_ext": BuildKernels, "bdist_wheel": AnyPythonWheel})
