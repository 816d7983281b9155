# SPDX-License-Identifier: Apache-2.0
"""Does a wheel's library ask for anything newer than manylinux_2_28 has? auditwheel answers for its own machine alone.

python tests/install/newest_symbols.py WHEEL
"""

from __future__ import annotations

import io
import re
import sys
import zipfile

from elftools.elf.elffile import ELFFile

# AlmaLinux 8's: glibc 2.28, and GCC 8's libstdc++ and libgcc.
NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 25), "CXXABI": (1, 3, 11), "GCC": (8, 0, 0)}
THERE = {"libtorch_cpu.so", "libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6", "libpthread.so.0"}


def main(wheel: str) -> None:
    library = ELFFile(io.BytesIO(zipfile.ZipFile(wheel).read("tidegate/kernels/tidegate_cpu.so")))
    asked: set[str] = set()
    for _, versions in library.get_section_by_name(".gnu.version_r").iter_versions():
        asked |= {version.name for version in versions}
    needed = {tag.needed for tag in library.get_section_by_name(".dynamic").iter_tags("DT_NEEDED")}
    needed = {name for name in needed if not name.startswith("ld-linux-")}
    newer = []
    for name in sorted(asked):
        family, _, version = name.partition("_")
        if tuple(map(int, re.findall(r"\d+", version))) > NEWEST[family]:
            newer.append(name)
    print(f"{wheel}: needs {', '.join(sorted(needed))}; {', '.join(sorted(asked))}")
    if newer or needed - THERE:
        sys.exit(f"not in manylinux_2_28: {', '.join([*newer, *sorted(needed - THERE)])}")


if __name__ == "__main__":
    main(sys.argv[1])
