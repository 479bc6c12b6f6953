"""The kernels on their own, without Python: built with the compiler's sanitizers, run on odd shapes."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

import hf_blockprune._cpu
from setup import COMMON_FLAGS, ISA_FLAGS, ISA_SOURCES, PLAIN_SOURCES

COMPILER = shutil.which("g++") or shutil.which("clang++")
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g"]
SOURCES = Path(hf_blockprune._cpu.__file__).parent
STRESS = Path(__file__).with_name("stress.cpp")


def build(folder, *extra):
    """The stress program."""
    objects = []
    for name, source, flags in [
        ("stress", STRESS, []),
        *((Path(source).stem, SOURCES / Path(source).name, []) for source in PLAIN_SOURCES),
        *(
            (f"{Path(source).stem}-{isa}", SOURCES / Path(source).name, [*flags, f"-DBLOCKPRUNE_ISA={isa}"])
            for isa, flags in ISA_FLAGS[platform.machine()].items()
            for source in ISA_SOURCES
        ),
    ]:
        objects.append(folder / f"{name}.o")
        command = [COMPILER, *COMMON_FLAGS, "-O1", f"-I{SOURCES}", *extra, *flags, "-c", source, "-o", objects[-1]]
        subprocess.run(command, check=True)
    program = folder / "stress"
    subprocess.run([COMPILER, *extra, *objects, "-ldl", "-fopenmp", "-o", program], check=True)
    return program


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.skipif(platform.machine() not in ISA_FLAGS, reason="no kernels for this processor")
def test_no_access_outside_the_arrays(tmp_path):
    done = subprocess.run([build(tmp_path, *SANITIZERS), "150"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert int(done.stdout.split()[0]) >= 150
