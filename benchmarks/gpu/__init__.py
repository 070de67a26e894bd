"""A check of the package on a GPU: on the machine with the GPU run `bash benchmarks/gpu/check.sh`."""
