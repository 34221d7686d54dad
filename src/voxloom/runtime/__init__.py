"""What touches the process: memory, threads, processes, random states."""
