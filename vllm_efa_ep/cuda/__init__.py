"""What a rank on a GPU needs from the host: memory, signals, affinity, and the kernels' launcher.

Nothing here is imported by a rank on CPU memory, and importing it needs neither a GPU nor a driver.
"""
