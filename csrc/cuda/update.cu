// Between the two passes, one block per sample decides whether the sample has ended, and computes its mixing weights.
#include <cfloat>

#include "device.cuh"

namespace jfbfast::cuda {
namespace {

__device__ void sum_partials(const Anderson& a, std::int64_t sample, double* products) {
    const int count = chunks(a.size), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int k = warp; k < a.products(); k += kWarps) {
        const double* partials = a.partials + (sample * a.products() + k) * count;
        double sum = 0;
        for (int chunk = lane; chunk < count; chunk += 32) sum += partials[chunk];
        sum = warp_sum(sum);
        if (lane == 0) products[k] = sum;
    }
}

// Whether the sample has stalled, to be asked once a step.
__device__ bool stalled(const Anderson& a, std::int64_t sample) {
    if (!a.since) return false;
    const double lowest = a.lowest[sample];
    const bool fell = lowest <= kStallFall * a.mark[sample];
    if (fell) a.mark[sample] = lowest;
    a.since[sample] = fell ? 0 : a.since[sample] + 1;
    return a.since[sample] >= kStallWindow && a.residual[sample] <= a.stall_floor;
}

// Records one evaluation and decides what follows; run by one thread.
__device__ void judge(const Anderson& a, std::int64_t sample, double image, double residual) {
    const int step = a.iterations[sample]++;
    if (step == 0) {
        a.first_image[sample] = image;
        a.first_residual[sample] = residual;
    }
    const bool finite = isfinite(image) && isfinite(residual);
    const double bound = kDivergedGrowth * (a.first_residual[sample] + a.first_image[sample]);
    const bool outgrown = residual > bound || image > bound;
    const bool converged = finite && residual <= a.tol * image + a.atol;
    if (!converged && (!finite || outgrown)) {
        a.status[sample] = kDiverged;
        a.action[sample] = kKeepBest;
        return;
    }
    const bool improved = converged || residual < a.lowest[sample];
    if (improved) {
        a.lowest[sample] = residual;
        a.best[sample] = step;
        a.residual[sample] = residual / (image > DBL_MIN ? image : DBL_MIN);
    }
    const bool ended = converged || stalled(a, sample) || (a.budget && step + 1 >= a.budget[sample]);
    if (ended) a.status[sample] = converged ? kConverged : kMaxIter;
    if (ended && !improved) {
        a.action[sample] = kKeepBest;
        return;
    }
    const bool grown = residual > kSafeguardGrowth * a.guarded[sample];
    if (grown || residual < a.guarded[sample]) a.guarded[sample] = residual;
    const int pairs = a.pairs[sample];
    const bool alone = grown || residual == 0;  // a residual of zero has no weight, but its image is the fixed point
    a.pairs[sample] = alone ? 1 : pairs < a.memory ? pairs + 1 : pairs;
    a.action[sample] = ended ? kKeepIterate : grown ? kDamp : kMix;
}

// Adds the products of the newest vector to the Gram matrix [n, n], whose entries are ordered by age and so move by one.
__device__ void shift_gram(double* stored, double* gram, const double* row, int row_stride, int n) {
    const int t = threadIdx.x, i = t / n, j = t % n;
    if (i < n) gram[t] = i > 0 && j > 0 ? stored[t - n - 1] : row[(i + j) * row_stride];
    __syncthreads();
    if (i < n) stored[t] = gram[t];
}

// The matrix <g_i, g_j> from a history of differences. With v_0 = g and v_i = g_i - g_(i-1), each g_i is a running sum
// of the v. So the matrix is the Gram matrix of the v, summed up along the rows and then along the columns.
__device__ void gram_of_pairs(const double* differences, const double* products, int n, int pairs, double* gram) {
    for (int t = threadIdx.x; t < pairs * pairs; t += kThreads) {
        const int i = t / pairs, j = t % pairs;
        if (i > 0 && j > 0) {
            gram[t] = differences[(i - 1) * n + j - 1];
        } else {
            gram[t] = i + j == 0 ? products[1] : -products[2 * (i + j)];
        }
    }
    __syncthreads();
    const int t = threadIdx.x;
    for (int k = 1; k < pairs && t < pairs; ++k) gram[t * pairs + k] += gram[t * pairs + k - 1];
    __syncthreads();
    for (int k = 1; k < pairs && t < pairs; ++k) gram[k * pairs + t] += gram[(k - 1) * pairs + t];
}

// Computes `alpha` as anderson_weights in jfbfast/backends/reference.py does, but does not divide it by its sum.
// Elimination without pivoting, since the system is symmetric and positive definite; one thread per entry.
__device__ void solve(const double* gram, int pairs, double regularization, double* system, double* alpha) {
    const int columns = pairs + 1;  // the last one is the right-hand side
    const auto inverse = [&](int i) { return gram[i * pairs + i] > 0 ? 1 / sqrt(gram[i * pairs + i]) : 0; };
    for (int t = threadIdx.x; t < pairs * columns; t += kThreads) {
        const int i = t / columns, j = t % columns;
        const double scale = inverse(i);
        if (j == pairs) {
            system[t] = scale;
        } else {
            const double diagonal = scale > 0 ? regularization : 1;
            system[t] = gram[i * pairs + j] * scale * inverse(j) + (i == j ? diagonal : 0);
        }
    }
    for (int k = 0; k < pairs; ++k) {
        __syncthreads();
        const double* pivot = system + k * columns;
        for (int t = threadIdx.x; t < pairs * columns; t += kThreads) {
            const int i = t / columns, j = t % columns;
            if (i > k && j > k) system[t] -= system[i * columns + k] / pivot[k] * pivot[j];
        }
    }
    for (int k = pairs - 1; k >= 0; --k) {
        __syncthreads();
        const double* pivot = system + k * columns;
        const double y = pivot[pairs] / pivot[k];
        const int i = threadIdx.x;
        if (i < k) system[i * columns + pairs] -= system[i * columns + k] * y;
        if (i == k) alpha[k] = y * inverse(k);
    }
    __syncthreads();
}

template <bool Differences>
__global__ void __launch_bounds__(kThreads) update_samples(Anderson a, const int* rows) {
    JFB_SHARED(double, products, 2 * kMaxMemory);
    JFB_SHARED(double, newest, kMaxMemory * kMaxMemory);
    JFB_SHARED(double, between_pairs, kMaxMemory * kMaxMemory);
    JFB_SHARED(double, system, kMaxMemory * (kMaxMemory + 1));
    JFB_SHARED(double, alpha, kMaxMemory);
    const std::int64_t sample = rows ? rows[blockIdx.x] : blockIdx.x;
    if (a.status[sample] != kRunning) {
        if (threadIdx.x == 0) a.action[sample] = kRest;
        return;
    }
    sum_partials(a, sample, products);
    __syncthreads();
    if (threadIdx.x == 0) judge(a, sample, sqrt(products[0]), sqrt(products[1]));
    const int n = Differences ? a.memory - 1 : a.memory;
    double* const gram = a.gram + sample * a.memory * a.memory;
    shift_gram(gram, newest, products + (Differences ? 3 : 1), Differences ? 2 : 1, n);
    __syncthreads();
    if (a.action[sample] != kMix && a.action[sample] != kKeepIterate) return;

    const int pairs = a.pairs[sample];
    if (Differences) {
        gram_of_pairs(newest, products, n, pairs, between_pairs);
    } else {
        for (int t = threadIdx.x; t < pairs * pairs; t += kThreads)
            between_pairs[t] = newest[t / pairs * n + t % pairs];
    }
    __syncthreads();
    solve(between_pairs, pairs, a.regularization, system, alpha);

    // x = f + sum of w_i (f_i - f); in differences d_i = f_i - f_(i+1), f minus the sum of
    // (alpha_(i+1) + ... + alpha_(pairs-1)) d_i.
    const int age = threadIdx.x;
    if (age >= pairs) return;
    double total = 0, tail = 0;
    for (int i = 0; i < pairs; ++i) {
        total += alpha[i];
        if (i > age) tail += alpha[i];
    }
    a.weights[sample * a.memory + age] = (Differences ? -tail : alpha[age]) / total;
}

}  // namespace

const char* update(const Anderson& a, const int* rows, int batch, void* stream) {
    if (a.differences) {
        JFB_LAUNCH(update_samples<true>, batch, stream, a, rows);
    } else {
        JFB_LAUNCH(update_samples<false>, batch, stream, a, rows);
    }
    return launch_error();
}

}  // namespace jfbfast::cuda
