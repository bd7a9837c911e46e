"""The command that builds the C++ and CUDA extension."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Build:
    """Build the C++ and CUDA extension with the compilers of this machine: whatever can be built, or what is named."""

    cpu: bool = False
    """The operators in C++ for CPUs; needs g++ 12 or newer (or CXX)."""
    cuda: bool = False
    """The operators in CUDA for compute capability 8.0, 9.0 and 10.0; needs nvcc (CUDA_HOME, or on the path)."""
    verbose: bool = False
    """Print the compilers' commands."""

    def run(self) -> None:
        from fastvar import build

        targets = [target for target in build.TARGETS if getattr(self, target)]
        if not targets:
            reasons = build.plan("auto")
            targets = [target for target, reason in reasons.items() if not reason]
            for target, reason in reasons.items():
                if reason:
                    print(f"{target}: not built: {reason}")
            if not targets:
                raise build.BuildError("there is nothing that could be built")
        for target in targets:
            (library,) = build.build([target], verbose=self.verbose).values()
            print(f"{target}: {library}")
