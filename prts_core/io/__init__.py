"""Read and write what lies outside a process: files, tensors, hub, YAML, msgpack, journals; locks, errors, progress."""
