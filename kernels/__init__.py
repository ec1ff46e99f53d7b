"""Triton kernels of steepest.  Importing this package needs no triton; importing one of its modules does."""
