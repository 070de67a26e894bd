// Whether a device can run the kernels of this module.
#include "device.cuh"

namespace jfbfast::cuda {
namespace {

__global__ void probe() {}

}  // namespace

const char* use_device(int device) {
    const cudaError_t error = cudaSetDevice(device);
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

const char* why_unusable(int device) {
    int before = device;
    cudaGetDevice(&before);
    if (const char* error = use_device(device)) return error;
    cudaFuncAttributes attributes;
    // Fails where the module holds no code for the device.
    const cudaError_t error = cudaFuncGetAttributes(&attributes, probe);
    if (before != device) cudaSetDevice(before);
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace jfbfast::cuda
