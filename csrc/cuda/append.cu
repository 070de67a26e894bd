// The first pass over the pixels: stores the newest residual in the history and computes its products.
#include "device.cuh"

namespace jfbfast::cuda {
namespace {

// Blocks per multiprocessor: a longer history takes more registers, but also has more loads in flight.
constexpr int blocks_for(int memory) { return memory <= 5 ? 3 : memory <= 8 ? 2 : 1; }

// Writes one partial sum per block and product; `update` adds them in a fixed order.
template <int Count>
__device__ void write_partials(const Anderson& a, const Block& block, const double (&products)[Count]) {
    JFB_SHARED(double, sums, kWarps * Count);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < Count; ++k) {
        if (k >= a.products()) break;
        const double sum = warp_sum(products[k]);
        if (lane == 0) sums[warp * Count + k] = sum;
    }
    __syncthreads();
    const int k = threadIdx.x;
    if (k < a.products()) {
        double sum = 0;
        for (int w = 0; w < kWarps; ++w) sum += sums[w * Count + k];
        a.partials[(block.sample * a.products() + k) * chunks(a.size) + block.chunk] = sum;
    }
}

// Whether this step overwrites the pair of the best iterate, which must then be saved as the value.
__device__ bool evicts_best(const Anderson& a, const Block& block) {
    const int step = a.iterations[block.sample], best = a.best[block.sample];
    return best >= 0 && best == step - a.ring();
}

template <class T, int V, int M>
__global__ void __launch_bounds__(kThreads, blocks_for(M))
    append_full(Anderson a, const T* x, const T* f, const int* rows) {
    const Block block(a, rows, V);
    if (a.status[block.sample] != kRunning) return;
    const int slot = a.iterations[block.sample] % a.memory;
    const int pairs = a.pairs[block.sample];
    const int older = pairs < a.memory ? pairs : a.memory - 1;
    const bool evicts = evicts_best(a, block);
    T* const newest = at<T>(a, a.residuals, slot, block.sample);

    double products[M + 1] = {};
    for (std::int64_t i = block.begin; i < a.size; i += block.stride) {
        const std::int64_t pixel = block.row * a.size + i;
        const Pack<T, V> image = load<V>(f + pixel);
        const Pack<T, V> residual = subtract(image, load<V>(x + pixel));
        Pack<T, V> old[M];
#pragma unroll
        for (int age = 1; age < M; ++age)
            if (age <= older) old[age] = load<V>(at<T>(a, a.residuals, slot_of(slot, age, a.memory), block.sample) + i);
        if (evicts) {
            const Pack<T, V> leaving = load<V>(at<T>(a, a.images, slot, block.sample) + i);
            store(at<T>(a, a.value, 0, block.sample) + i, subtract(leaving, load<V>(newest + i)));
        }
        store(newest + i, residual);
        products[0] += dot(image, image);
        products[1] += dot(residual, residual);
#pragma unroll
        for (int age = 1; age < M; ++age)
            if (age <= older) products[1 + age] += dot(residual, old[age]);
    }
    write_partials(a, block, products);
}

// The same for a history of differences d_a. They are rounded before they enter any product, so that the products are
// those of the stored values.
template <int V, int M>
__global__ void __launch_bounds__(kThreads, blocks_for(M))
    append_differences(Anderson a, const float* x, const float* f, const int* rows) {
    const Block block(a, rows, V);
    if (a.status[block.sample] != kRunning) return;
    const int step = a.iterations[block.sample], slots = a.memory - 1, slot = step % slots;
    const int pairs = a.pairs[block.sample];
    const int differences = pairs < slots ? pairs : slots;  // including the newest
    const bool evicts = evicts_best(a, block);
    float* const newest = at<float>(a, a.residuals, step % 2, block.sample);
    const float* const previous = at<float>(a, a.residuals, (step + 1) % 2, block.sample);

    double products[2 * M] = {};
    for (std::int64_t i = block.begin; i < a.size; i += block.stride) {
        const std::int64_t pixel = block.row * a.size + i;
        const Pack<float, V> image = load<V>(f + pixel);
        const Pack<float, V> residual = subtract(image, load<V>(x + pixel));
        Pack<bfloat16, V> difference[M - 1];
#pragma unroll
        for (int age = 1; age < M - 1; ++age)
            if (age < differences) {
                const int old = slot_of(slot, age, slots);
                difference[age] = load<V>(at<bfloat16>(a, a.residual_differences, old, block.sample) + i);
            }
        if (differences > 0) {
            const Pack<float, V> before = load<V>(previous + i);
#pragma unroll
            for (int v = 0; v < V; ++v) difference[0][v] = bfloat16(residual[v] - before[v]);
            store(at<bfloat16>(a, a.residual_differences, slot, block.sample) + i, difference[0]);
        }
        if (evicts) {
            const Pack<float, V> leaving = load<V>(at<float>(a, a.images, step % 2, block.sample) + i);
            store(at<float>(a, a.value, 0, block.sample) + i, subtract(leaving, load<V>(newest + i)));
        }
        store(newest + i, residual);
        products[0] += dot(image, image);
        products[1] += dot(residual, residual);
#pragma unroll
        for (int age = 0; age < M - 1; ++age)
            if (age < differences) {
                products[2 + 2 * age] += dot(residual, difference[age]);
                products[3 + 2 * age] += dot(difference[0], difference[age]);
            }
    }
    write_partials(a, block, products);
}

template <class T, int V, int M>
void launch_append(const Anderson& a, const void* x, const void* f, const int* rows, int batch, void* stream) {
    const std::int64_t blocks = static_cast<std::int64_t>(batch) * chunks(a.size);
    const T *iterate = static_cast<const T*>(x), *image = static_cast<const T*>(f);
    if constexpr (std::is_same_v<T, float>) {
        if (a.differences) {
            const auto kernel = append_differences<V, M>;
            JFB_LAUNCH(kernel, blocks, stream, a, iterate, image, rows);
            return;
        }
    }
    const auto kernel = append_full<T, V, M>;
    JFB_LAUNCH(kernel, blocks, stream, a, iterate, image, rows);
}

template <class T>
void dispatch_append(const Anderson& a, const void* x, const void* f, const int* rows, int batch, void* stream) {
    const int width = vector_width<T>(a, x, f, a.residuals, a.images, a.value, a.residual_differences);
    if (width == 1) return launch_append<T, 1, kMaxMemory>(a, x, f, rows, batch, stream);
    if (a.memory <= 5) return launch_append<T, 16 / sizeof(T), 5>(a, x, f, rows, batch, stream);
    if (a.memory <= 8) return launch_append<T, 16 / sizeof(T), 8>(a, x, f, rows, batch, stream);
    launch_append<T, 16 / sizeof(T), kMaxMemory>(a, x, f, rows, batch, stream);
}

}  // namespace

const char* append(const Anderson& a, const void* x, const void* f, const int* rows, int batch, void* stream) {
    if (a.dtype == DType::kFloat64) {
        dispatch_append<double>(a, x, f, rows, batch, stream);
    } else {
        dispatch_append<float>(a, x, f, rows, batch, stream);
    }
    return launch_error();
}

}  // namespace jfbfast::cuda
