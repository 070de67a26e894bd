// Whether a device can run the kernels of this module.
#include "device.cuh"

namespace jfbfast::cuda {
namespace {

__global__ void probe() {}

// The text of the error, or null. Also clears the error, which the next launch would report as its own.
const char* named(cudaError_t error) {
    if (error == cudaSuccess) return nullptr;
    cudaGetLastError();
    return cudaGetErrorString(error);
}

}  // namespace

const char* use_device(int device) { return named(cudaSetDevice(device)); }

const char* why_unusable(int device) {
    int before = device;
    cudaGetDevice(&before);
    if (const char* error = use_device(device)) return error;
    cudaFuncAttributes attributes;
    // Fails if the module holds no code for the device.
    const char* error = named(cudaFuncGetAttributes(&attributes, probe));
    if (before != device) cudaSetDevice(before);
    return error;
}

}  // namespace jfbfast::cuda
