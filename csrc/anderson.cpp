// The history of Anderson's method: one pass stores the newest residual and computes its inner products, another one
// mixes the images. Each sample is split into chunks of fixed size, and their sums are added in order, so a result
// depends neither on the number of threads nor on the rest of the batch.
#include "isa.h"
#include "parallel.h"
#include "rows.h"

namespace jfbfast {
namespace JFBFAST_ISA {
namespace {

constexpr std::int64_t kChunk = 2048;

struct Chunk {
    std::int64_t sample, begin, size;
};

struct Chunks {
    Chunks(std::int64_t samples, std::int64_t size)
        : size(size), per_sample((size + kChunk - 1) / kChunk), count(samples * per_sample) {}
    Chunk operator[](std::int64_t k) const {
        const std::int64_t begin = k % per_sample * kChunk;
        return {k / per_sample, begin, smaller(kChunk, size - begin)};
    }
    std::int64_t size, per_sample, count;
};

// Writes g = f - x in the history's type H. `squares` gets |g|^2 as stored, |f - x|^2 before rounding, and |f|^2.
template <class S, class H>
void enter_pair(const S* x, const S* f, H* g, std::int64_t n, double* squares) {
    Doubles gg = {}, dd = {}, ff = {};
    for_each_vector<kDoubleLanes>(0, n, [&](std::int64_t i, auto lanes) {
        typedef Storage<H, Wide<H>, kDoubleLanes> History;
        const auto image = load_as<Wide<S>, kDoubleLanes>(f + i, lanes);
        const auto difference = image - load_as<Wide<S>, kDoubleLanes>(x + i, lanes);
        const auto stored = History::narrow(convert<typename History::Wide>(difference));
        std::memcpy(static_cast<void*>(g + i), &stored, lane_count(lanes, kDoubleLanes) * sizeof(H));
        const Doubles wide = to_doubles(History::widen(stored)), wide_image = to_doubles(image);
        const Doubles wide_difference = to_doubles(difference);
        gg += wide * wide;
        dd += wide_difference * wide_difference;
        ff += wide_image * wide_image;
    });
    squares[0] = sum_lanes<kDoubleLanes>(gg);
    squares[1] = sum_lanes<kDoubleLanes>(dd);
    squares[2] = sum_lanes<kDoubleLanes>(ff);
}

// sums[k] = <g, others[k]>, for `Count` others at once.
template <class H, int Count>
void inner_products(const H* g, const H* const* others, std::int64_t n, double* sums) {
    Doubles partial[Count] = {};
    for_each_vector<kDoubleLanes>(0, n, [&](std::int64_t i, auto lanes) {
        const Doubles newest = to_doubles(load_as<Wide<H>, kDoubleLanes>(g + i, lanes));
#pragma GCC unroll 4
        for (int k = 0; k < Count; ++k)
            partial[k] += newest * to_doubles(load_as<Wide<H>, kDoubleLanes>(others[k] + i, lanes));
    });
    for (int k = 0; k < Count; ++k) sums[k] = sum_lanes<kDoubleLanes>(partial[k]);
}

template <class H>
void inner_products(const H* g, const H* const* others, int count, std::int64_t n, double* sums) {
    for (; count >= 4; count -= 4, others += 4, sums += 4) inner_products<H, 4>(g, others, n, sums);
    if (count == 3) inner_products<H, 3>(g, others, n, sums);
    if (count == 2) inner_products<H, 2>(g, others, n, sums);
    if (count == 1) inner_products<H, 1>(g, others, n, sums);
}

template <class S, class H>
void append_pair(const Append& a, std::int64_t samples, std::int64_t size, int threads) {
    const Chunks chunks(samples, size);
    const int sums = a.filled + 2;  // per chunk, in the order of a.products
    const Buffer<double> partial(chunks.count * sums);
    parallel_for(chunks.count, useful_threads(threads, samples * size), [&](std::int64_t k, int) {
        const Chunk chunk = chunks[k];
        const std::int64_t at = chunk.sample * size + chunk.begin;
        double* mine = partial.data() + k * sums;
        const H* others[kMaxMemory];
        int count = 0;
        for (int j = 0; j < a.filled; ++j)
            if (j != a.slot) others[count++] = static_cast<const H*>(a.residuals[j]) + at;
        H* newest = static_cast<H*>(a.residuals[a.slot]) + at;
        double squares[3];
        enter_pair(static_cast<const S*>(a.x) + at, static_cast<const S*>(a.f) + at, newest, chunk.size, squares);
        inner_products<H>(newest, others, count, chunk.size, mine);
        for (int j = count; j > a.slot; --j) mine[j] = mine[j - 1];
        mine[a.slot] = squares[0];
        mine[a.filled] = squares[1];
        mine[a.filled + 1] = squares[2];
    });
    for (std::int64_t sample = 0; sample < samples; ++sample)
        for (int j = 0; j < sums; ++j) {
            double sum = 0;
            for (std::int64_t k = 0; k < chunks.per_sample; ++k)
                sum += partial.data()[(sample * chunks.per_sample + k) * sums + j];
            a.products[sample * sums + j] = sum;
        }
}

template <class S>
void mix_images(const Mix& m, std::int64_t samples, std::int64_t size, int threads) {
    typedef Wide<S> T;
    const Chunks chunks(samples, size);
    parallel_for(chunks.count, useful_threads(threads, samples * size), [&](std::int64_t k, int) {
        const Chunk chunk = chunks[k];
        const std::int64_t at = chunk.sample * size + chunk.begin;
        T alpha[kMaxMemory];
        for (int i = 0; i < m.count; ++i) alpha[i] = T(m.alpha[chunk.sample * m.count + i]);
        for_each_vector<kLanes<T>>(0, chunk.size, [&](std::int64_t c, auto lanes) {
            Vec<T> sum = alpha[0] * load(static_cast<const S*>(m.images[0]) + at + c, lanes);
            for (int i = 1; i < m.count; ++i)
                sum += alpha[i] * load(static_cast<const S*>(m.images[i]) + at + c, lanes);
            store(static_cast<S*>(m.out) + at + c, sum, lanes);
        });
    });
}

template <class S, class H>
void mix_from_differences(const MixDifferences& m, std::int64_t samples, std::int64_t size, int threads) {
    typedef Wide<S> T;
    constexpr int lanes_of = kLanes<T>;
    const Chunks chunks(samples, size);
    parallel_for(chunks.count, useful_threads(threads, samples * size), [&](std::int64_t k, int) {
        const Chunk chunk = chunks[k];
        const std::int64_t at = chunk.sample * size + chunk.begin;
        T weights[kMaxMemory];
        for (int j = 0; j < m.count; ++j) weights[j] = T(m.weights[chunk.sample * m.count + j]);
        const S* f = static_cast<const S*>(m.f) + at;
        const S* previous = static_cast<const S*>(m.previous) + at;
        for_each_vector<lanes_of>(0, chunk.size, [&](std::int64_t c, auto lanes) {
            const Vec<T> image = load(f + c, lanes), newest = image - load(previous + c, lanes);
            store_as<T, lanes_of>(static_cast<H*>(m.differences[0]) + at + c, newest, lanes);
            Vec<T> correction = weights[0] * newest;
            for (int j = 1; j < m.count; ++j)
                correction +=
                    weights[j] * load_as<T, lanes_of>(static_cast<const H*>(m.differences[j]) + at + c, lanes);
            store(static_cast<S*>(m.out) + at + c, image - correction, lanes);
        });
    });
}

// Calls body(S{}, H{}) with the storage types of the images, S, and of the history, H: S again, or bfloat16.
template <class Body>
void with_history(DType dtype, DType history, Body body) {
    with_dtype(dtype, [&](auto s) { history == dtype ? body(s, s) : body(s, bfloat16{}); });
}

}  // namespace

void append(DType dtype, DType history, const Append& a, std::int64_t samples, std::int64_t size, int threads) {
    with_history(dtype, history,
                 [&](auto s, auto h) { append_pair<decltype(s), decltype(h)>(a, samples, size, threads); });
}

void mix(DType dtype, const Mix& m, std::int64_t samples, std::int64_t size, int threads) {
    with_dtype(dtype, [&](auto s) { mix_images<decltype(s)>(m, samples, size, threads); });
}

void mix_differences(DType dtype, DType history, const MixDifferences& m, std::int64_t samples, std::int64_t size,
                     int threads) {
    with_history(dtype, history,
                 [&](auto s, auto h) { mix_from_differences<decltype(s), decltype(h)>(m, samples, size, threads); });
}

}  // namespace JFBFAST_ISA
}  // namespace jfbfast
