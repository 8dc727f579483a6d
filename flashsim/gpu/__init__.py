"""What needs torch or Triton: the interpreter made right, and what is learned from compiled kernels and from a GPU.

Nothing here is imported by the rest of flashsim before it is asked for.
"""
