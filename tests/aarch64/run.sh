#!/usr/bin/env bash
# Run tests in an aarch64 Python under qemu-user: tests/aarch64/run.sh [PYTEST ARGUMENT ...]
# The first run installs Debian's Python for arm64, and wheels, in the folder AARCH64_ROOT.
set -euo pipefail
cd "$(dirname "$0")/../.."
root=$(realpath -m "${AARCH64_ROOT:-$HOME/.cache/gptx-aarch64}")
export QEMU_CPU=${QEMU_CPU:-neoverse-n1}

if [ ! -x "$root/usr/bin/python" ]; then
    apt=$(mktemp -d)
    trap 'rm -rf "$apt"' EXIT
    mkdir -p "$root/proc" "$apt/lists/partial" "$apt/cache/archives/partial"
    options=(-q -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o Dir::State="$apt"
             -o Dir::State::status=/dev/null -o Dir::Cache="$apt/cache")
    apt-get "${options[@]}" update
    apt-get "${options[@]}" --yes --download-only --no-install-recommends install python3 libstdc++6
    for package in "$apt"/cache/archives/*.deb; do dpkg-deb -x "$package" "$root"; done

    version=$(basename "$root"/usr/bin/python3.*)
    python3 -m pip install --quiet --target "$root/usr/local/lib/$version/dist-packages" \
        --python-version "${version#python}" --only-binary=:all: \
        --platform manylinux2014_aarch64 --platform manylinux_2_28_aarch64 \
        array-api-compat array-api-strict click huggingface-hub ml_dtypes numba numpy pytest \
        pytest-xdist safetensors threadpoolctl tokenizers

    # The beginning of /proc/cpuinfo on a Graviton2, from which LLVM reads the processor.
    printf '%s\n' "processor : 0" \
        "Features : fp asimd aes pmull sha1 sha2 crc32 atomics fphp asimdhp asimdrdm asimddp" \
        "CPU implementer : 0x41" "CPU part : 0xd0c" > "$root/proc/cpuinfo"
    # Python starts itself for a compilation: as this program, not as a file for another processor.
    printf '#!/bin/sh\nexec qemu-aarch64 -L %s -0 "$0" %s "$@"\n' \
        "'$root'" "'$root/usr/bin/$version'" > "$root/usr/bin/python"
    chmod +x "$root/usr/bin/python"
fi

exec "$root/usr/bin/python" -m pytest -n 0 "$@"
