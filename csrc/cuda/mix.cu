// The second pass over the pixels: stores the newest image in the history and computes the next iterate.
#include "device.cuh"

namespace jfbfast::cuda {
namespace {

// value = the best iterate, unless its pair has left the ring: then `append` has saved it already.
template <class T, int V>
__device__ void keep_best(const Anderson& a, const Block& block) {
    const int best = a.best[block.sample], oldest = a.iterations[block.sample] - a.ring();
    if (best < 0 || best < oldest) return;
    const T* image = at<T>(a, a.images, best % a.ring(), block.sample);
    const T* residual = at<T>(a, a.residuals, best % a.ring(), block.sample);
    T* const value = at<T>(a, a.value, 0, block.sample);
    for (std::int64_t i = block.begin; i < a.size; i += block.stride)
        store(value + i, subtract(load<V>(image + i), load<V>(residual + i)));
}

template <class T, int V>
__device__ void follow_value(const Anderson& a, const Block& block) {
    const T* const value = at<T>(a, a.value, 0, block.sample);
    T* const following = at<T>(a, a.following, 0, block.sample);
    for (std::int64_t i = block.begin; i < a.size; i += block.stride) store(following + i, load<V>(value + i));
}

template <class T, int V>
__device__ void keep_iterate(const Anderson& a, const Block& block, const T* x) {
    T* const value = at<T>(a, a.value, 0, block.sample);
    for (std::int64_t i = block.begin; i < a.size; i += block.stride)
        store(value + i, load<V>(x + block.row * a.size + i));
}

// Half the step, x + (f - x) / 2.
template <class T, int V>
__device__ Pack<T, V> damped(const Pack<T, V>& x, const Pack<T, V>& f) {
    Pack<T, V> out;
#pragma unroll
    for (int v = 0; v < V; ++v) out[v] = x[v] + T(0.5) * (f[v] - x[v]);
    return out;
}

// Whether the sample's iterate moves on. What is to be kept is kept here, by the threads that then write over it.
template <class T, int V>
__device__ bool moves(const Anderson& a, const Block& block, const T* x) {
    const int action = a.action[block.sample];
    if (action == kKeepIterate) keep_iterate<T, V>(a, block, x);
    if (action == kKeepBest) {
        keep_best<T, V>(a, block);
        follow_value<T, V>(a, block);
    }
    return action == kMix || action == kDamp || action == kKeepIterate;
}

template <class T, int V, int M>
__global__ void __launch_bounds__(kThreads) mix_full(Anderson a, T* x, const T* f, const int* rows) {
    const Block block(a, rows, V);
    if (!moves<T, V>(a, block, x)) return;
    const bool damp = a.action[block.sample] == kDamp, ends = a.action[block.sample] == kKeepIterate;
    T* const following = at<T>(a, a.following, 0, block.sample);
    const int slot = (a.iterations[block.sample] - 1) % a.memory, pairs = a.pairs[block.sample];
    T* const newest = at<T>(a, a.images, slot, block.sample);
    T weight[M] = {};
    if (!damp) {
#pragma unroll
        for (int age = 1; age < M; ++age)
            if (age < pairs) weight[age] = static_cast<T>(a.weights[block.sample * a.memory + age]);
    }
    for (std::int64_t i = block.begin; i < a.size; i += block.stride) {
        const std::int64_t pixel = block.row * a.size + i;
        const Pack<T, V> image = load<V>(f + pixel);
        Pack<T, V> next = image;
        if (damp) next = damped(load<V>(x + pixel), image);
#pragma unroll
        for (int age = 1; age < M; ++age) {
            if (age >= pairs) break;
            const int old_slot = slot_of(slot, age, a.memory);
            const Pack<T, V> old = load<V>(at<T>(a, a.images, old_slot, block.sample) + i);
#pragma unroll
            for (int v = 0; v < V; ++v) next[v] += weight[age] * (old[v] - image[v]);
        }
        store(newest + i, image);
        store(x + pixel, next);
        if (ends) store(following + i, next);
    }
}

template <int V, int M>
__global__ void __launch_bounds__(kThreads) mix_differences(Anderson a, float* x, const float* f, const int* rows) {
    const Block block(a, rows, V);
    if (!moves<float, V>(a, block, x)) return;
    const bool damp = a.action[block.sample] == kDamp, ends = a.action[block.sample] == kKeepIterate;
    float* const following = at<float>(a, a.following, 0, block.sample);
    const int step = a.iterations[block.sample] - 1, slots = a.memory - 1, slot = step % slots;
    const int differences = a.pairs[block.sample] - 1;
    float* const newest = at<float>(a, a.images, step % 2, block.sample);
    const float* const previous = at<float>(a, a.images, (step + 1) % 2, block.sample);
    float weight[M - 1] = {};
#pragma unroll
    for (int age = 0; age < M - 1; ++age)
        if (age < differences) weight[age] = static_cast<float>(a.weights[block.sample * a.memory + age]);
    for (std::int64_t i = block.begin; i < a.size; i += block.stride) {
        const std::int64_t pixel = block.row * a.size + i;
        const Pack<float, V> image = load<V>(f + pixel);
        Pack<float, V> next = image;
        if (damp) next = damped(load<V>(x + pixel), image);
        if (differences > 0) {
            const Pack<float, V> before = load<V>(previous + i);
            Pack<bfloat16, V> difference;
#pragma unroll
            for (int v = 0; v < V; ++v) {
                difference[v] = bfloat16(image[v] - before[v]);
                next[v] += weight[0] * static_cast<float>(difference[v]);
            }
            store(at<bfloat16>(a, a.image_differences, slot, block.sample) + i, difference);
        }
#pragma unroll
        for (int age = 1; age < M - 1; ++age) {
            if (age >= differences) break;
            const int old_slot = slot_of(slot, age, slots);
            const Pack<bfloat16, V> old = load<V>(at<bfloat16>(a, a.image_differences, old_slot, block.sample) + i);
#pragma unroll
            for (int v = 0; v < V; ++v) next[v] += weight[age] * static_cast<float>(old[v]);
        }
        store(newest + i, image);
        store(x + pixel, next);
        if (ends) store(following + i, next);
    }
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads) keep_best_of_running(Anderson a) {
    const Block block(a, nullptr, V);
    if (a.status[block.sample] != kRunning) return;
    keep_best<T, V>(a, block);
    follow_value<T, V>(a, block);
}

__global__ void end_running(Anderson a) {
    const std::int64_t sample = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (sample < a.samples && a.status[sample] == kRunning) a.status[sample] = kMaxIter;
}

template <class T, int V, int M>
void launch_mix(const Anderson& a, void* x, const void* f, const int* rows, int batch, void* stream) {
    const std::int64_t blocks = static_cast<std::int64_t>(batch) * chunks(a.size);
    T* iterate = static_cast<T*>(x);
    const T* image = static_cast<const T*>(f);
    if constexpr (std::is_same_v<T, float>) {
        if (a.differences) {
            const auto kernel = mix_differences<V, M>;
            JFB_LAUNCH(kernel, blocks, stream, a, iterate, image, rows);
            return;
        }
    }
    const auto kernel = mix_full<T, V, M>;
    JFB_LAUNCH(kernel, blocks, stream, a, iterate, image, rows);
}

template <class T>
void dispatch_mix(const Anderson& a, void* x, const void* f, const int* rows, int batch, void* stream) {
    const int width = vector_width<T>(a, x, f, a.residuals, a.images, a.value, a.following, a.image_differences);
    if (width == 1) return launch_mix<T, 1, kMaxMemory>(a, x, f, rows, batch, stream);
    if (a.memory <= 5) return launch_mix<T, 16 / sizeof(T), 5>(a, x, f, rows, batch, stream);
    launch_mix<T, 16 / sizeof(T), kMaxMemory>(a, x, f, rows, batch, stream);
}

template <class T>
void dispatch_finish(const Anderson& a, void* stream) {
    const std::int64_t blocks = a.samples * chunks(a.size);
    constexpr int wide = 16 / sizeof(T);
    const bool vector = vector_width<T>(a, a.residuals, a.images, a.value, a.following) == wide;
    const auto kernel = vector ? keep_best_of_running<T, wide> : keep_best_of_running<T, 1>;
    JFB_LAUNCH(kernel, blocks, stream, a);
    JFB_LAUNCH(end_running, (a.samples + kThreads - 1) / kThreads, stream, a);
}

}  // namespace

const char* mix(const Anderson& a, void* x, const void* f, const int* rows, int batch, void* stream) {
    if (a.dtype == DType::kFloat64) {
        dispatch_mix<double>(a, x, f, rows, batch, stream);
    } else {
        dispatch_mix<float>(a, x, f, rows, batch, stream);
    }
    return launch_error();
}

const char* finish(const Anderson& a, void* stream) {
    if (a.dtype == DType::kFloat64) {
        dispatch_finish<double>(a, stream);
    } else {
        dispatch_finish<float>(a, stream);
    }
    return launch_error();
}

}  // namespace jfbfast::cuda
