// Y = B1 X B2^T: each output row is a weighted sum of rows of X, which is then filtered horizontally.
#include "isa.h"
#include "parallel.h"
#include "window.h"

namespace jfbfast {
namespace JFBFAST_ISA {
namespace {

template <class S>
void blur_planes(const S* x, S* out, Shape shape, const Bands& bands, int threads) {
    typedef Wide<S> T;
    const std::int64_t height = shape.height, width = shape.width;
    const int radius = bands.y.radius, slots = 2 * radius + 1, ring = Window<T>::rows_for(radius);
    const RowTable<T> table(bands.x, width, bands.circular);
    const RowLayout<T> layout(width, bands.x.radius);
    const T* weights = static_cast<const T*>(bands.y.weights);

    threads = useful_threads(threads, shape.pixels());
    const Tasks tasks(shape, radius, threads);
    const std::int64_t workspace = (1 + kBatch + ring) * layout.stride;
    const Buffer<T> memory(threads * workspace);
    const Buffer<const T*> pointers(threads * 2 * ring);

    parallel_for(tasks.count, threads, [&](std::int64_t k, int thread) {
        const Task task = tasks[k];
        T* const zeros = memory.data() + thread * workspace;
        T* const columns = zeros + layout.stride + layout.margin;
        Input<S> input(x + task.plane * height * width, height, width, radius, bands.circular, task.begin, zeros,
                       zeros + (1 + kBatch) * layout.stride, layout.stride, pointers.data() + thread * 2 * ring);

        for (std::int64_t i = task.begin; i < task.end; i += kBatch) {
            const int count = int(smaller(kBatch, task.end - i));
            const T* rows[kBatch];
            for (int k = 0; k < count; ++k) rows[k] = weights + (i + k) * slots;
            correlate_columns(input.around(i, count), rows, radius, count, width, columns, layout.stride);
            for (int k = 0; k < count; ++k) {
                S* const to = out + (task.plane * height + i + k) * width;
                correlate_row(columns + k * layout.stride, table,
                              [to](std::int64_t c, Vec<T> sum, auto lanes) { store(to + c, sum, lanes); });
            }
        }
    });
}

}  // namespace

void blur(DType dtype, const void* x, void* out, Shape shape, const Bands& bands, int threads) {
    with_dtype(dtype, [&](auto s) {
        typedef decltype(s) S;
        blur_planes(static_cast<const S*>(x), static_cast<S*>(out), shape, bands, threads);
    });
}

}  // namespace JFBFAST_ISA
}  // namespace jfbfast
