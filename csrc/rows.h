// The two passes every kernel is made of: a vertical correlation over rows, and a horizontal one
// along a row whose margins hold what lies outside the image (zeros, or the wrapped columns).
#pragma once

#include <cstdlib>
#include <new>
#include <type_traits>
#include <utility>

#include "simd.h"

namespace jfbfast {
namespace JFBFAST_ISA {

constexpr std::int64_t round_up(std::int64_t n, std::int64_t multiple) {
    return (n + multiple - 1) / multiple * multiple;
}

// i modulo n, without a division for the i near [0, n) that occur.
inline std::int64_t wrap(std::int64_t i, std::int64_t n) {
    while (i < 0) i += n;
    while (i >= n) i -= n;
    return i;
}

inline std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
inline std::int64_t larger(std::int64_t a, std::int64_t b) { return a > b ? a : b; }

// Zeroed memory, aligned to a cache line.
template <class T>
class Buffer {
public:
    explicit Buffer(std::int64_t count) : memory_(std::calloc(1, count * sizeof(T) + 64)) {
        if (!memory_) throw std::bad_alloc();
    }
    ~Buffer() { std::free(memory_); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    T* data() const {
        return reinterpret_cast<T*>((reinterpret_cast<std::uintptr_t>(memory_) + 63) & ~std::uintptr_t(63));
    }

private:
    void* memory_;
};

// How a row of n elements lies in a buffer: [margin | n | margin], each of whole vectors.
template <class T>
struct RowLayout {
    RowLayout(std::int64_t n, int radius)
        : margin(round_up(larger(1, radius), kLanes<T>)), whole(round_up(n, kLanes<T>)), stride(whole + 2 * margin) {}
    std::int64_t margin, whole, stride;
};

// A horizontal table, split into the vectors where its rows are all alike and the others.
template <class T>
class RowTable {
public:
    RowTable(const Band& band, std::int64_t n, bool circular)
        : radius(band.radius),
          slots(2 * band.radius + 1),
          n(n),
          circular(circular),
          taps_(slots),
          split_(make_split(static_cast<const T*>(band.weights))),
          edges_(slots * edge_columns()) {
        const T* weights = static_cast<const T*>(band.weights);
        for (std::int64_t c = 0; c < n; ++c) {
            if (c >= split_.begin && c < split_.end) continue;
            for (int s = 0; s < slots; ++s) edges_.data()[s * edge_columns() + edge(c)] = weights[c * slots + s];
        }
    }

    const T* taps() const { return taps_.data(); }
    std::int64_t begin() const { return split_.begin; }  // columns [begin, end) have constant taps
    std::int64_t end() const { return split_.end; }
    const T* edge_weights(std::int64_t column) const { return edges_.data() + edge(column); }
    std::int64_t edge_columns() const { return split_.begin + whole() - split_.end; }  // also the slots' stride
    std::int64_t whole() const { return round_up(n, kLanes<T>); }

    const int radius, slots;
    const std::int64_t n;
    const bool circular;

private:
    struct Split {
        std::int64_t begin, end;
    };

    std::int64_t edge(std::int64_t column) const {
        return column < split_.begin ? column : split_.begin + column - split_.end;
    }

    // The margins hold zeros, so a row counts as constant if it has the taps wherever the input exists.
    bool constant(const T* weights, std::int64_t i) const {
        for (int s = 0; s < slots; ++s) {
            const std::int64_t input = i + s - radius;
            if ((circular || (input >= 0 && input < n)) && weights[i * slots + s] != taps_.data()[s]) return false;
        }
        return true;
    }

    Split make_split(const T* weights) {
        for (int s = 0; s < slots; ++s) {  // from the row nearest the middle that has an input in this slot
            const std::int64_t first = larger(0, radius - s), last = smaller(n, n + radius - s) - 1;
            const std::int64_t row = circular ? n / 2 : larger(first, smaller(n / 2, last));
            if (circular || first <= last) taps_.data()[s] = weights[row * slots + s];
        }
        std::int64_t begin = n / 2, end = n / 2;
        while (end < n && constant(weights, end)) ++end;
        while (begin > 0 && constant(weights, begin - 1)) --begin;
        begin = smaller(round_up(begin, kLanes<T>), whole());
        end = end == n ? whole() : end / kLanes<T> * kLanes<T>;
        return {begin, larger(begin, end)};
    }

    Buffer<T> taps_;
    Split split_;
    Buffer<T> edges_;
};

// Rows that pass through each stage together: a vertical sum then loads a row once for all of them,
// and a stage does not read what the one before has only just written.
constexpr int kBatch = 4;
// Vectors summed together where the number of taps is not known to the compiler.
constexpr int kBlock = 4;

template <class T>
inline Vec<T> broadcast(T value) {
    return Vec<T>{} + value;
}

// out[c] = sum_s weights[s] * rows[s][c]
template <class T>
void column_sums(const T* const* rows, const T* weights, int slots, std::int64_t n, T* out) {
    for_each_vector<kLanes<T>>(0, n, [&](std::int64_t c, auto lanes) {
        Vec<T> sum = {};
        for (int s = 0; s < slots; ++s) sum += weights[s] * load(rows[s] + c, lanes);
        store(out + c, sum);
    });
}

// The same for kBatch rows of equal weights: output k, at out + k * stride, begins at rows[k].
template <class T, int Radius>
void column_sums_batch(const T* const* rows, const T* weights, std::int64_t n, T* out, std::int64_t stride) {
    constexpr int slots = 2 * Radius + 1;
    const T* row[slots + kBatch - 1];  // copies that stay in registers: no store below can alias them
    Vec<T> weight[slots];
    for (int s = 0; s < slots + kBatch - 1; ++s) row[s] = rows[s];
    for (int s = 0; s < slots; ++s) weight[s] = broadcast(weights[s]);
    for_each_vector<kLanes<T>>(0, n, [&](std::int64_t c, auto lanes) {
        Vec<T> sums[kBatch] = {};
#pragma GCC unroll 16
        for (int t = 0; t < slots + kBatch - 1; ++t) {
            const Vec<T> input = load(row[t] + c, lanes);
#pragma GCC unroll 4
            for (int k = 0; k < kBatch; ++k)
                if (t >= k && t - k < slots) sums[k] += weight[t - k] * input;
        }
#pragma GCC unroll 4
        for (int k = 0; k < kBatch; ++k) store(out + k * stride + c, sums[k]);
    });
}

template <class T>
void column_sums_batch_any(const T* const* rows, const T* weights, int slots, std::int64_t n, T* out,
                           std::int64_t stride) {
    for_each_vector<kLanes<T>>(0, n, [&](std::int64_t c, auto lanes) {
        Vec<T> sums[kBatch] = {};
        const auto add = [&](int t, int first, int last) {
            const Vec<T> input = load(rows[t] + c, lanes);
            for (int k = first; k < last; ++k) sums[k] += weights[t - k] * input;
        };
        for (int t = 0; t < kBatch - 1; ++t) add(t, 0, t + 1);
        for (int t = kBatch - 1; t < slots; ++t) {
            const Vec<T> input = load(rows[t] + c, lanes);
#pragma GCC unroll 4
            for (int k = 0; k < kBatch; ++k) sums[k] += weights[t - k] * input;
        }
        for (int t = slots; t < slots + kBatch - 1; ++t) add(t, t - slots + 1, kBatch);
        for (int k = 0; k < kBatch; ++k) store(out + k * stride + c, sums[k]);
    });
}

// Vertical sums for `count` rows, at most kBatch, each with its row of the table.
template <class T>
void correlate_columns(const T* const* rows, const T* const* weights, int radius, int count, std::int64_t n, T* out,
                       std::int64_t stride) {
    const int slots = 2 * radius + 1;
    bool batch = count == kBatch;
    for (int k = 1; k < count; ++k) batch = batch && !std::memcmp(weights[0], weights[k], slots * sizeof(T));
    if (!batch) {
        for (int k = 0; k < count; ++k) column_sums(rows + k, weights[k], slots, n, out + k * stride);
        return;
    }
    switch (radius) {
        case 0: return column_sums_batch<T, 0>(rows, weights[0], n, out, stride);
        case 1: return column_sums_batch<T, 1>(rows, weights[0], n, out, stride);
        case 2: return column_sums_batch<T, 2>(rows, weights[0], n, out, stride);
        case 3: return column_sums_batch<T, 3>(rows, weights[0], n, out, stride);
        case 4: return column_sums_batch<T, 4>(rows, weights[0], n, out, stride);
        default: return column_sums_batch_any(rows, weights[0], slots, n, out, stride);
    }
}

#if defined(__AVX512F__)
// The vector that begins `Shift` lanes into `low`, and ends in `high`.
template <int Shift>
inline Vec<float> shift_lanes(Vec<float> low, Vec<float> high) {
    return bits_as<Vec<float>>(_mm512_maskz_alignr_epi32(0xffff, bits_as<__m512i>(high), bits_as<__m512i>(low), Shift));
}

template <int Shift>
inline Vec<double> shift_lanes(Vec<double> low, Vec<double> high) {
    return bits_as<Vec<double>>(_mm512_maskz_alignr_epi64(0xff, bits_as<__m512i>(high), bits_as<__m512i>(low), Shift));
}
#endif

// The vector `Offset` elements after `here`, at p; from its neighbours where that beats another load.
template <int Offset, class T>
inline Vec<T> shifted([[maybe_unused]] const T* p, [[maybe_unused]] Vec<T> before, Vec<T> here,
                      [[maybe_unused]] Vec<T> after) {
    if constexpr (Offset == 0) return here;
#if defined(__AVX512F__)
    if constexpr (Offset > 0) return shift_lanes<Offset>(here, after);
    if constexpr (Offset < 0) return shift_lanes<Offset + kLanes<T>>(before, here);
#else
    return load(p + Offset);
#endif
}

// finish(c, sum_s table[c, s] * row[c + s - radius], lanes) for the columns [begin, end).
template <class T, class Finish>
void row_edge(const T* row, const RowTable<T>& table, std::int64_t begin, std::int64_t end, const Finish& finish) {
    for_each_vector<kLanes<T>>(begin, end, [&](std::int64_t c, auto lanes) {
        const T* weights = table.edge_weights(c);
        Vec<T> sum = {};
        for (int s = 0; s < table.slots; ++s)
            sum += load(weights + s * table.edge_columns()) * load(row + c + s - table.radius);
        finish(c, sum, lanes);
    });
}

// The same where the taps are constant.
template <class T, class Finish, int... Slot>
void row_sums(const T* row, const RowTable<T>& table, std::int64_t begin, std::int64_t end, const Finish& finish,
              std::integer_sequence<int, Slot...>) {
    constexpr int radius = sizeof...(Slot) / 2;
    const Vec<T> tap[] = {broadcast(table.taps()[Slot])...};
    Vec<T> before = load(row + begin - kLanes<T>), here = load(row + begin);
    for_each_vector<kLanes<T>>(begin, end, [&](std::int64_t c, auto lanes) {
        const Vec<T> after = load(row + c + kLanes<T>);
        Vec<T> sum = {};
        ((sum += tap[Slot] * shifted<Slot - radius, T>(row + c, before, here, after)), ...);
        before = here;
        here = after;
        finish(c, sum, lanes);
    });
}

template <class T, class Finish>
void row_sums_any(const T* row, const RowTable<T>& table, std::int64_t begin, std::int64_t end, const Finish& finish) {
    const T* taps = table.taps();
    std::int64_t c = begin;
    for (; c + kBlock * kLanes<T> <= end; c += kBlock * kLanes<T>) {
        Vec<T> sums[kBlock] = {};
        for (int s = 0; s < table.slots; ++s) {
            const Vec<T> tap = broadcast(taps[s]);
#pragma GCC unroll 4
            for (int k = 0; k < kBlock; ++k) sums[k] += tap * load(row + c + s - table.radius + k * kLanes<T>);
        }
        for (int k = 0; k < kBlock; ++k) finish(c + k * kLanes<T>, sums[k], Whole{});
    }
    for_each_vector<kLanes<T>>(c, end, [&](std::int64_t c, auto lanes) {
        Vec<T> sum = {};
        for (int s = 0; s < table.slots; ++s) sum += taps[s] * load(row + c + s - table.radius);
        finish(c, sum, lanes);
    });
}

// Filters a row in a buffer, whose margins are zero, or get the columns wrapped around.
template <class T, class Finish>
void correlate_row(T* row, const RowTable<T>& table, const Finish& finish) {
    const std::int64_t n = table.n, begin = smaller(table.begin(), n), end = smaller(table.end(), n);
    for (std::int64_t k = 0; table.circular && k < table.radius; ++k) {
        row[n + k] = row[wrap(k, n)];
        row[-1 - k] = row[wrap(-1 - k, n)];
    }
    row_edge(row, table, 0, begin, finish);
    const auto sums = [&](auto slots) { row_sums(row, table, begin, end, finish, slots); };
    switch (table.radius) {
        case 0: sums(std::make_integer_sequence<int, 1>{}); break;
        case 1: sums(std::make_integer_sequence<int, 3>{}); break;
        case 2: sums(std::make_integer_sequence<int, 5>{}); break;
        case 3: sums(std::make_integer_sequence<int, 7>{}); break;
        case 4: sums(std::make_integer_sequence<int, 9>{}); break;
        default: row_sums_any(row, table, begin, end, finish);
    }
    row_edge(row, table, end, n, finish);
}

// The rows last entered, as many as a batch of outputs draws on, as pointers in their order.
template <class T>
class Window {
public:
    static int rows_for(int radius) { return 2 * radius + kBatch; }

    // `memory` holds rows_for(radius) rows of `stride`; `pointers` has room for twice as many.
    Window(T* memory, std::int64_t stride, int radius, const T** pointers)
        : memory_(memory), stride_(stride), size_(rows_for(radius)), pointers_(pointers) {
        for (int k = 0; k < 2 * size_; ++k) pointers[k] = memory + k % size_ * stride;
    }
    // Where the next row is to be written.
    T* enter() {
        T* row = memory_ + next_ * stride_;
        next_ = next_ + 1 == size_ ? 0 : next_ + 1;
        return row;
    }
    // The rows that `count` outputs draw on, the newest last.
    const T* const* rows(int count) const { return pointers_ + next_ + kBatch - count; }

private:
    T* memory_;
    std::int64_t stride_;
    int size_, next_ = 0;
    const T** pointers_;
};

// The rows of a plane in arithmetic's type, zeros outside: the plane itself where it is stored so,
// else converted once each.
template <class S>
class Input {
public:
    typedef Wide<S> T;

    // `first` is the first row asked for; `zeros` is a row; `memory` and `pointers` are as for a Window.
    Input(const S* plane, std::int64_t height, std::int64_t width, int radius, bool circular, std::int64_t first,
          const T* zeros, T* memory, std::int64_t stride, const T** pointers)
        : plane_(plane), height_(height), width_(width), radius_(radius), circular_(circular), next_(first - radius),
          zeros_(zeros), pointers_(pointers), window_(memory, stride, radius, pointers) {}

    // Rows i - radius ... i + count - 1 + radius; each call begins where the last one's count ended.
    const T* const* around(std::int64_t i, int count) {
        if constexpr (std::is_same_v<S, T>) {
            for (int k = 0; k < count + 2 * radius_; ++k) {
                const S* row = stored(i - radius_ + k);
                pointers_[k] = row ? row : zeros_;
            }
            return pointers_;
        } else {
            for (; next_ < i + count + radius_; ++next_) convert_row(stored(next_), window_.enter());
            return window_.rows(count);
        }
    }
    bool exists(std::int64_t i) const { return circular_ || (i >= 0 && i < height_); }

private:
    const S* stored(std::int64_t i) const { return exists(i) ? plane_ + wrap(i, height_) * width_ : nullptr; }

    void convert_row(const S* from, T* to) {
        for_each_vector<kLanes<T>>(0, width_, [&](std::int64_t c, auto lanes) {
            store(to + c, from ? load(from + c, lanes) : Vec<T>{});
        });
    }

    const S* plane_;
    std::int64_t height_, width_;
    int radius_;
    bool circular_;
    std::int64_t next_;
    const T* zeros_;
    const T** pointers_;
    Window<T> window_;
};

// Rows [begin, end) of one plane.
struct Task {
    std::int64_t plane, begin, end;
};

// The planes cut into bands of rows, enough for every thread, with little recomputed at the cuts.
struct Tasks {
    Tasks(const Shape& shape, int radius, int threads) : height(shape.height) {
        const std::int64_t wanted = threads > 1 ? (4 * threads + shape.planes - 1) / shape.planes : 1;
        const std::int64_t most = larger(1, height / larger(16, 16 * radius));
        per_plane = smaller(wanted, most);
        count = shape.planes * per_plane;
    }
    Task operator[](std::int64_t k) const {
        const std::int64_t part = k % per_plane;
        return {k / per_plane, height * part / per_plane, height * (part + 1) / per_plane};
    }
    std::int64_t height, per_plane, count;
};

// Threads worth starting for this many elements.
inline int useful_threads(int threads, std::int64_t elements) {
    return int(larger(1, smaller(threads, elements / 8192)));
}

}  // namespace JFBFAST_ISA
}  // namespace jfbfast
