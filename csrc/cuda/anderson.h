// The interface of the CUDA kernels: Anderson's method for a batch of samples, all of it on the device.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define JFB_HOST_DEVICE __host__ __device__
#else
#define JFB_HOST_DEVICE
#endif

namespace jfbfast::cuda {

// The module jfbfast._cuda exposes these values, and tests/backends/test_cuda_device.py compares them with Python's.
constexpr int kMaxMemory = 16;
constexpr double kDivergedGrowth = 1e4;  // of |g| or |f|, relative to the sum of their first values
constexpr double kSafeguardGrowth = 4;   // of |g|, relative to its lowest value since the safeguard last acted
constexpr double kStallFall = 0.7;       // a sample has stalled if its lowest |g| has not fallen to this share ...
constexpr int kStallWindow = 5;          // ... in so many steps

enum class DType : int { kFloat64, kFloat32 };

enum Status : int { kRunning = -1, kConverged = 0, kMaxIter = 1, kDiverged = 2 };

// What `mix` does with a sample, as decided by `update`. A sample that ends at its newest iterate, or at an older one,
// keeps that one as its value; the former takes one more step, to its following iterate.
enum Action : int { kRest, kMix, kDamp, kKeepIterate, kKeepBest };

// The state of one solve. Each step k takes a pair (x, f = T(x)) of each running sample and computes its residual
// g = f - x. The "age" a counts pairs back from the newest: g_a is the residual of step k - a.
//
// A full history is a ring of `memory` pairs (g, f). A history of differences is a ring of two such pairs and, in
// bfloat16, rings of the last `memory` - 1 differences g_a - g_(a+1), f_a - f_(a+1). The iterate of a pair is f - g, so
// the best iterate is copied only when its pair leaves the ring.
struct Anderson {
    DType dtype;
    bool differences;
    int memory;  // pairs, at most kMaxMemory
    std::int64_t samples, size;
    double tol, atol, regularization;
    double stall_floor;          // a stalled sample ends if its relative residual is at most this
    const std::int64_t* budget;  // [samples], the most steps of each sample, or null

    void *residuals, *images;                        // [ring, samples, size]
    void *residual_differences, *image_differences;  // [memory - 1, samples, size] or null
    void* value;                                     // [samples, size], the answer
    void* following;       // [samples, size]: of a sample that has ended, the iterate after `value`, or `value`
    int *status, *action;  // [samples] each, as are the next two lines
    int *iterations, *pairs, *best;                            // best: the step of the lowest residual, or -1
    double *residual, *lowest, *first_residual, *first_image;  // residual: relative, at `value`
    double* guarded;   // [samples]: the lowest |g| since the safeguard last acted
    int* since;        // [samples]: steps since the lowest |g| fell to kStallFall of `mark`, or null if no stall counts
    double* mark;      // [samples], or null with `since`
    double* gram;      // [samples, memory, memory], by age: of g, or of its differences
    double* weights;   // [samples, memory], by age: of f_a - f_0, or of the differences of f
    double* partials;  // [samples, products, chunks]

    // Products of a step: |f|^2, then <g, g_a> for each age; or |f|^2, |g|^2, then the pairs
    // <g, d_a>, <d_0, d_a> for each difference d_a.
    JFB_HOST_DEVICE constexpr int products() const { return differences ? 2 * memory : memory + 1; }
    JFB_HOST_DEVICE constexpr int ring() const { return differences ? 2 : memory; }
};

// Blocks per sample: two 128-bit loads per thread, up to 1024 blocks, so that even one sample fills the device. The
// number depends only on the size, so a sample's sums do not depend on the batch.
JFB_HOST_DEVICE constexpr int chunks(std::int64_t size) {
    const std::int64_t blocks = (size + 2047) / 2048;
    return blocks < 1 ? 1 : blocks > 1024 ? 1024 : static_cast<int>(blocks);
}

// The three parts of a step, in the order in which they are called. Each launches on `stream` and returns the CUDA
// error, or null. x and f are [batch, size]; row i is sample rows[i], or sample i if rows is null. `mix` writes x.
const char* append(const Anderson&, const void* x, const void* f, const int* rows, int batch, void* stream);
const char* update(const Anderson&, const int* rows, int batch, void* stream);
const char* mix(const Anderson&, void* x, const void* f, const int* rows, int batch, void* stream);

// Ends every sample that still runs: `value` gets its best iterate, and its status becomes kMaxIter.
const char* finish(const Anderson&, void* stream);

// Selects the device for the calls that follow; returns the CUDA error, or null.
const char* use_device(int device);

// Why these kernels cannot run on the device, or null if they can.
const char* why_unusable(int device);

}  // namespace jfbfast::cuda
