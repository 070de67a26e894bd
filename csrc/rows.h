// The two passes of every blur: a vertical correlation across rows, and a horizontal one along a row. The margins of
// a row hold what lies outside the image: zeros, or the wrapped columns.
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

// i modulo n, without a division: i is always close to [0, n).
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

// The layout of a row of n elements in a buffer: [margin | n | margin], each padded to whole vectors.
template <class T>
struct RowLayout {
    RowLayout(std::int64_t n, int radius)
        : margin(round_up(larger(1, radius), kLanes<T>)), whole(round_up(n, kLanes<T>)), stride(whole + 2 * margin) {}
    std::int64_t margin, whole, stride;
};

// A horizontal band table in two parts: a range of whole vectors, whose columns all have the same taps, and the other
// columns (the edges).
template <class T>
class RowTable {
public:
    RowTable(const Band& band, std::int64_t n, bool circular)
        : radius(band.radius), slots(2 * band.radius + 1), n(n), circular(circular), taps_(slots),
          split_(make_split(static_cast<const T*>(band.weights))), edges_(slots * edge_columns()) {
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
    std::int64_t edge_columns() const { return split_.begin + whole() - split_.end; }  // also the stride between slots
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

    // The margins hold zeros, so a row counts as constant if it equals the taps wherever the input exists.
    bool constant(const T* weights, std::int64_t i) const {
        for (int s = 0; s < slots; ++s) {
            const std::int64_t input = i + s - radius;
            if ((circular || (input >= 0 && input < n)) && weights[i * slots + s] != taps_.data()[s]) return false;
        }
        return true;
    }

    Split make_split(const T* weights) {
        for (int s = 0; s < slots; ++s) {  // from the row nearest to the middle that has an input for this slot
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

// Rows that go through each stage together. A vertical sum then loads each input row once for all of them, and a stage
// does not read what the previous stage has only just written.
constexpr int kBatch = 4;
// Vectors summed together if the number of taps is not known at compile time.
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

// The same for kBatch output rows with equal weights: the inputs of output k, at out + k * stride, begin at rows[k].
template <class T, int Radius>
void column_sums_batch(const T* const* rows, const T* weights, std::int64_t n, T* out, std::int64_t stride) {
    constexpr int slots = 2 * Radius + 1;
    const T* row[slots + kBatch - 1];  // local copies, so that no store below can alias them
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

// Vertical sums for `count` output rows, at most kBatch, each with its own row of the table.
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
// The vector that begins `Shift` lanes into `low` and ends in `high`.
template <int Shift>
inline Vec<float> shift_lanes(Vec<float> low, Vec<float> high) {
    return bits_as<Vec<float>>(_mm512_maskz_alignr_epi32(0xffff, bits_as<__m512i>(high), bits_as<__m512i>(low), Shift));
}

template <int Shift>
inline Vec<double> shift_lanes(Vec<double> low, Vec<double> high) {
    return bits_as<Vec<double>>(_mm512_maskz_alignr_epi64(0xff, bits_as<__m512i>(high), bits_as<__m512i>(low), Shift));
}
#endif

// The vector `Offset` elements after `here`, which is at p. AVX-512 builds it from the neighbours without a load.
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

// Calls finish(c, sum_s table[c, s] * row[c + s - radius], lanes) for each vector of the columns [begin, end).
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

// The same for columns with constant taps.
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

// Filters a row in a buffer. Its margins are zero, or are filled here with the wrapped columns.
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

}  // namespace JFBFAST_ISA
}  // namespace jfbfast
