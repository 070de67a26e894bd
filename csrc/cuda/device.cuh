// What the kernels share: launches, 128-bit loads, bfloat16, sums. nvcc compiles it for a GPU, and a C++ compiler
// compiles it with tests/backends/cuda/emulate.h, which runs each thread as a fiber.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "anderson.h"

#ifdef __CUDACC__
#include <cuda_runtime.h>
#define JFB_LAUNCH(kernel, blocks, stream, ...) \
    kernel<<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#define JFB_SHARED(type, name, count) __shared__ type name[count]
#else
#include "emulate.h"
#endif

namespace jfbfast::cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

inline const char* launch_error() {
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

struct bfloat16 {
    std::uint16_t bits;

    bfloat16() = default;

    // To nearest, ties to even; a NaN stays one.
    __device__ explicit bfloat16(float value) {
        std::uint32_t wide;
        memcpy(&wide, &value, sizeof wide);
        const std::uint32_t rounded = (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;
        bits = static_cast<std::uint16_t>(value == value ? rounded : 0x7fc0);
    }

    __device__ operator float() const {
        const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
        float value;
        memcpy(&value, &wide, sizeof value);
        return value;
    }
};

// V neighbouring elements, moved by one load or store.
template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
    T lane[V];

    __device__ T& operator[](int i) { return lane[i]; }
    __device__ T operator[](int i) const { return lane[i]; }
};

// The type that moves a pack of this many bytes.
template <int Bytes>
struct WordOf;
template <>
struct WordOf<16> {
    using type = uint4;
};
template <>
struct WordOf<8> {
    using type = uint2;
};
template <>
struct WordOf<4> {
    using type = unsigned int;
};
template <>
struct WordOf<2> {
    using type = unsigned short;
};

template <int V, class T>
__device__ __forceinline__ Pack<T, V> load(const T* address) {
    using Word = typename WordOf<sizeof(T) * V>::type;
    const Word word = *reinterpret_cast<const Word*>(address);
    Pack<T, V> pack;
    memcpy(&pack, &word, sizeof word);
    return pack;
}

// Uses an intrinsic, since the compiler splits most plain stores of a pack into one store per lane.
template <class T, int V>
__device__ __forceinline__ void store(T* address, const Pack<T, V>& pack) {
    using Word = typename WordOf<sizeof(T) * V>::type;
    Word word;
    memcpy(&word, &pack, sizeof word);
    __stwb(reinterpret_cast<Word*>(address), word);
}

template <class T, int V>
__device__ __forceinline__ Pack<T, V> subtract(const Pack<T, V>& a, const Pack<T, V>& b) {
    Pack<T, V> out;
#pragma unroll
    for (int i = 0; i < V; ++i) out[i] = a[i] - b[i];
    return out;
}

// Exact products of float and bfloat16, summed in double.
template <class T, class U, int V>
__device__ __forceinline__ double dot(const Pack<T, V>& a, const Pack<U, V>& b) {
    double sum = 0;
#pragma unroll
    for (int i = 0; i < V; ++i) sum += static_cast<double>(a[i]) * static_cast<double>(b[i]);
    return sum;
}

// The part of one sample that one block works on: `row` is its row in x and f, `sample` its row in the history.
struct Block {
    std::int64_t row, sample, begin, stride;
    int chunk;

    __device__ Block(const Anderson& a, const int* rows, int vector) {
        const int count = chunks(a.size);
        row = blockIdx.x / count;
        chunk = blockIdx.x % count;
        sample = rows ? rows[row] : row;
        begin = (static_cast<std::int64_t>(chunk) * kThreads + threadIdx.x) * vector;
        stride = static_cast<std::int64_t>(count) * kThreads * vector;
    }
};

// The sample's image in one slot of a ring [slots, samples, size].
template <class T>
__device__ __forceinline__ T* at(const Anderson& a, void* ring, std::int64_t slot, std::int64_t sample) {
    return static_cast<T*>(ring) + (slot * a.samples + sample) * a.size;
}

// The slot of the pair of this age (below `slots`), if the newest pair is in `slot`.
__device__ __forceinline__ int slot_of(int slot, int age, int slots) { return slot - age + (slot < age ? slots : 0); }

__device__ __forceinline__ double warp_sum(double value) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
    return value;
}

// Elements that a thread moves at once: 128 bits of them, or one if the size or an address is not aligned.
template <class T, class... Pointers>
int vector_width(const Anderson& a, Pointers... pointers) {
    constexpr int width = 16 / sizeof(T);
    const bool aligned = ((reinterpret_cast<std::uintptr_t>(pointers) % 16 == 0) && ...);
    return aligned && a.size % width == 0 ? width : 1;
}

}  // namespace jfbfast::cuda
