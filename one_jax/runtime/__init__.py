"""Runtime: devices, processes, signals, flags and files."""
