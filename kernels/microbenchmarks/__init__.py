"""Microbenchmarks: what one instruction, one access, one barrier, one launch costs on a GPU.

Each function launches one kernel that does the same thing n times between two readings of the clock. Start-up cancels
between runs of n and of 2n; `flashsim calibrate` does that, and makes a device file of the results. The tests hold the
machine code against what each docstring says is in the measured loop.
"""
