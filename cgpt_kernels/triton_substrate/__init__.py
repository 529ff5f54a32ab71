"""What the Triton kernels of all ops share: device functions, launch configurations."""
