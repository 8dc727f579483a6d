"""Kernels paired with the schedules of `flashsim`, one file each that can be read alone. They need torch and triton.

The folder is called `kernels`, the package `flashsim_kernels`: as an import name `kernels` belongs to another project.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("flashsim")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"
