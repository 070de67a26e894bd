// Anderson's method: one pass stores the newest residual and computes its inner products, another one mixes the images.
// Each sample is split into chunks of fixed size, and their sums are added in order, so a result depends neither on the
// number of threads nor on the rest of the batch.
#include "isa.h"
#include "parallel.h"
#include "rows.h"

namespace jfbfast {
namespace JFBFAST_ISA {
namespace {

struct Chunk {
    std::int64_t sample, begin, size;
};

struct Chunks {
    Chunks(std::int64_t samples, std::int64_t size)
        : size(size), per_sample(anderson_chunks(size)), count(samples * per_sample) {}
    Chunk operator[](std::int64_t k) const {
        const std::int64_t begin = k % per_sample * kAndersonChunk;
        return {k / per_sample, begin, smaller(kAndersonChunk, size - begin)};
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

// The rows of one sample in a step.
template <class S, class H>
class SampleStep {
public:
    SampleStep(const Anderson& a, std::int64_t sample, const S* x, const S* f, S* next, int threads)
        : a_(a), state_(a.states[sample]), sample_(sample), x_(x), f_(f), next_(next), threads_(threads) {}

    void run() {
        if (!a_.running[sample_]) return copy(x_, next_);
        S *const value = row<S>(a_.value, 0), *const following = row<S>(a_.following, 0);
        const bool first = a_.iterations[sample_] == 0;
        double products[kMaxMemory + 2], alpha[kMaxMemory];
        int slots[kMaxMemory];
        const int known = a_.known(state_);
        append(known, products);
        const Decision decision = decide(a_, sample_, products, slots, alpha);

        const bool best = decision.improved || first;  // the start is a sample's value until there is a better one
        if (!best && !state_.saved) copy(next_, value);
        state_.saved = !best;
        if (decision.ended && best) copy(x_, value);
        if (decision.ended && !decision.improved) {
            copy(value, next_);
        } else if (decision.grown) {
            store_image();
            damp();
        } else {
            mix(slots, alpha);
        }
        if (decision.ended) copy(next_, following);
    }

private:
    template <class T>
    T* row(void* ring, int slot) const {
        return static_cast<T*>(ring) + (slot * a_.samples + sample_) * a_.size;
    }

    void copy(const S* from, S* to) const { std::memcpy(static_cast<void*>(to), from, a_.size * sizeof(S)); }

    // Calls body(chunk) for each chunk of the sample.
    template <class Body>
    void for_chunks(const Body& body) const {
        const Chunks chunks(1, a_.size);
        parallel_for(chunks.count, useful_threads(threads_, a_.size), [&](std::int64_t k, int) { body(k, chunks[k]); });
    }

    void append(int known, double* products) const {
        const std::int64_t chunks = Chunks(1, a_.size).count;
        double* const partials = a_.partials + sample_ * chunks * (a_.memory + 2);
        for_chunks([&](std::int64_t k, const Chunk& chunk) {
            const H* older[kMaxMemory];
            for (int age = 1; age < known; ++age) older[age - 1] = row<H>(a_.residuals, a_.slot(age)) + chunk.begin;
            H* const newest = row<H>(a_.residuals, a_.slot(0)) + chunk.begin;
            double* const mine = partials + k * (known + 2);
            double squares[3];
            enter_pair(x_ + chunk.begin, f_ + chunk.begin, newest, chunk.size, squares);
            inner_products<H>(newest, older, known - 1, chunk.size, mine + 1);
            mine[0] = squares[0];
            mine[known] = squares[1];
            mine[known + 1] = squares[2];
        });
        for (int j = 0; j < known + 2; ++j) {
            products[j] = 0;
            for (std::int64_t k = 0; k < chunks; ++k) products[j] += partials[k * (known + 2) + j];
        }
    }

    void mix(const int* slots, const double* alpha) const {
        if constexpr (std::is_same_v<S, H>) {
            mix_of_images(slots, alpha);
        } else {
            double by_age[kMaxMemory];
            for (int i = 0; i < state_.pairs; ++i) by_age[a_.age(slots[i])] = alpha[i];
            mix_of_differences(by_age);
        }
    }

    // next = sum of alpha_i f_i, and the newest image enters the history.
    void mix_of_images(const int* slots, const double* alpha) const {
        typedef Wide<S> T;
        const int pairs = state_.pairs, newest = a_.slot(0);
        T weights[kMaxMemory];
        for (int i = 0; i < pairs; ++i) weights[i] = T(alpha[i]);
        for_chunks([&](std::int64_t, const Chunk& chunk) {
            S* const kept = row<S>(a_.images, newest) + chunk.begin;
            const S* const image = f_ + chunk.begin;
            const S* images[kMaxMemory];
            for (int i = 0; i < pairs; ++i)
                images[i] = slots[i] == newest ? image : row<S>(a_.images, slots[i]) + chunk.begin;
            for_each_vector<kLanes<T>>(0, chunk.size, [&](std::int64_t c, auto lanes) {
                Vec<T> sum = weights[0] * load(images[0] + c, lanes);
                for (int i = 1; i < pairs; ++i) sum += weights[i] * load(images[i] + c, lanes);
                store(kept + c, load(image + c, lanes), lanes);
                store(next_ + chunk.begin + c, sum, lanes);
            });
        });
    }

    // The same, as f - sum_j w_j (f_j - f_(j+1)) with w_j = alpha_(j+1) + ... + alpha_(pairs-1), by age.
    void mix_of_differences(const double* alpha) const {
        typedef Wide<S> T;
        constexpr int lanes_of = kLanes<T>;
        const int count = state_.pairs - 1;
        T weights[kMaxMemory];
        double left = 1;
        for (int age = 0; age < count; ++age) weights[age] = T(left -= alpha[age]);
        for_chunks([&](std::int64_t, const Chunk& chunk) {
            H* differences[kMaxMemory];
            for (int age = 0; age < count; ++age) differences[age] = row<H>(a_.differences, a_.slot(age)) + chunk.begin;
            S* const previous = row<S>(a_.images, 0) + chunk.begin;
            for_each_vector<lanes_of>(0, chunk.size, [&](std::int64_t c, auto lanes) {
                const Vec<T> image = load(f_ + chunk.begin + c, lanes);
                Vec<T> following = image;
                if (count > 0) {
                    const Vec<T> newest = image - load(previous + c, lanes);
                    store_as<T, lanes_of>(differences[0] + c, newest, lanes);
                    following -= weights[0] * newest;
                }
                for (int age = 1; age < count; ++age)
                    following -=
                        weights[age] * load_as<T, lanes_of>(static_cast<const H*>(differences[age]) + c, lanes);
                store(previous + c, image, lanes);
                store(next_ + chunk.begin + c, following, lanes);
            });
        });
    }

    // Enters the newest image in a history whose older pairs are dropped.
    void store_image() const { copy(f_, row<S>(a_.images, std::is_same_v<S, H> ? a_.slot(0) : 0)); }

    // next = x + (f - x) / 2.
    void damp() const {
        typedef Wide<S> T;
        for_chunks([&](std::int64_t, const Chunk& chunk) {
            for_each_vector<kLanes<T>>(0, chunk.size, [&](std::int64_t c, auto lanes) {
                const Vec<T> image = load(f_ + chunk.begin + c, lanes);
                const Vec<T> step = image - load(x_ + chunk.begin + c, lanes);
                store(next_ + chunk.begin + c, image - T(0.5) * step, lanes);
            });
        });
    }

    const Anderson& a_;
    AndersonSample& state_;
    const std::int64_t sample_;
    const S *const x_, *const f_;
    S* const next_;
    const int threads_;
};

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

void anderson_step(const Anderson& a, const void* x, const void* f, void* next, const std::int64_t* rows,
                   std::int64_t batch, int threads) {
    with_history(a.dtype, a.history, [&](auto s, auto h) {
        typedef decltype(s) S;
        // Whole samples in parallel, so that a sample's vectors stay in the caches; or else the chunks of each.
        const int useful = useful_threads(threads, batch * a.size), outer = batch < useful ? 1 : useful;
        parallel_for(batch, outer, [&](std::int64_t i, int) {
            const std::int64_t at = i * a.size;
            SampleStep<S, decltype(h)>(a, rows ? rows[i] : i, static_cast<const S*>(x) + at,
                                       static_cast<const S*>(f) + at, static_cast<S*>(next) + at,
                                       outer > 1 ? 1 : threads)
                .run();
        });
    });
}

}  // namespace JFBFAST_ISA
}  // namespace jfbfast
