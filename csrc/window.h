// How a kernel walks over a plane: tasks are bands of rows, and the last few rows are kept in a ring.
#pragma once

#include "rows.h"

namespace jfbfast {
namespace JFBFAST_ISA {

// A ring of the newest rows, as many as one batch of outputs needs.
template <class T>
class Window {
public:
    static int rows_for(int radius) { return 2 * radius + kBatch; }

    // `memory` holds rows_for(radius) rows of `stride`; `pointers` has room for twice as many.
    Window(T* memory, std::int64_t stride, int radius, const T** pointers)
        : memory_(memory), stride_(stride), size_(rows_for(radius)), pointers_(pointers) {
        for (int k = 0; k < 2 * size_; ++k) pointers[k] = memory + k % size_ * stride;
    }
    // Where to write the next row.
    T* enter() {
        T* row = memory_ + next_ * stride_;
        next_ = next_ + 1 == size_ ? 0 : next_ + 1;
        return row;
    }
    // Pointers to the rows that `count` outputs need, in order, the newest last.
    const T* const* rows(int count) const { return pointers_ + next_ + kBatch - count; }

private:
    T* memory_;
    std::int64_t stride_;
    int size_, next_ = 0;
    const T** pointers_;
};

// The rows of a plane in the arithmetic type T, with zeros outside. If the plane is stored as T, its rows are used in
// place; otherwise each row is converted once.
template <class S>
class Input {
public:
    typedef Wide<S> T;

    // `first` is the first row that `around` is called for, `zeros` a row of zeros; `memory` and `pointers` are as for
    // Window.
    Input(const S* plane, std::int64_t height, std::int64_t width, int radius, bool circular, std::int64_t first,
          const T* zeros, T* memory, std::int64_t stride, const T** pointers)
        : plane_(plane), height_(height), width_(width), radius_(radius), circular_(circular), next_(first - radius),
          zeros_(zeros), pointers_(pointers), window_(memory, stride, radius, pointers) {}

    // Rows i - radius ... i + count - 1 + radius. Each call continues at the row where the previous one ended.
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
        for_each_vector<kLanes<T>>(
            0, width_, [&](std::int64_t c, auto lanes) { store(to + c, from ? load(from + c, lanes) : Vec<T>{}); });
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

// The planes split into bands of rows: enough for all threads, but tall, since rows at the cuts are computed twice.
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

}  // namespace JFBFAST_ISA
}  // namespace jfbfast
