// x - eta (A^T (A x - d) + r) in one pass: the rows of u = A x - d go through a ring, from which A^T computes each
// output row. So only x, d, r and the result pass through main memory.
#include "isa.h"
#include "parallel.h"
#include "window.h"

namespace jfbfast {
namespace JFBFAST_ISA {
namespace {

// One row of u = A x - d; d may be null. It has the columns [begin, end) and is zero beyond, or all if framed is false.
template <class S>
struct Difference {
    const S* d;
    std::int64_t begin, end;
    bool framed;
    Wide<S>* u;

    template <class Lanes>
    void operator()(std::int64_t c, Vec<Wide<S>> sum, Lanes lanes) const {
        if (d) sum -= framed && (c < begin || c + kLanes<Wide<S>> > end) ? at_edge(c) : load(d + (c - begin), lanes);
        store(u + c, sum, lanes);
    }

    Vec<Wide<S>> at_edge(std::int64_t c) const {
        S part[kLanes<Wide<S>>] = {};
        for (std::int64_t i = larger(c, begin); i < smaller(c + kLanes<Wide<S>>, end); ++i) part[i - c] = d[i - begin];
        return load(part);
    }
};

// One row of x - eta (A^T u + r), or of A^T u + r; r may be null.
template <class S>
struct Step {
    typedef Wide<S> T;
    const S* x;
    const S* r;
    bool step;
    T step_size;
    S* out;

    template <class Lanes>
    void operator()(std::int64_t c, Vec<T> sum, Lanes lanes) const {
        if (r) sum += load(r + c, lanes);
        store(out + c, step ? load(x + c, lanes) - step_size * sum : sum, lanes);
    }
};

template <class S>
void gradient_planes(const Gradient& g, Shape shape, int threads) {
    typedef Wide<S> T;
    const std::int64_t height = shape.height, width = shape.width;
    const std::int64_t d_height = height - 2 * g.d_margin_y, d_width = width - 2 * g.d_margin_x;
    const bool circular = g.bands.circular;
    const int radius = g.bands.y.radius, slots = 2 * radius + 1, ring = Window<T>::rows_for(radius);
    const RowTable<T> table(g.bands.x, width, circular), adjoint_table(g.adjoint.x, width, circular);
    const RowLayout<T> layout(width, g.bands.x.radius);
    const std::int64_t stride = layout.stride;
    const T* weights = static_cast<const T*>(g.bands.y.weights);
    const T* adjoint_weights = static_cast<const T*>(g.adjoint.y.weights);

    threads = useful_threads(threads, shape.pixels());
    const Tasks tasks(shape, radius, threads);
    const std::int64_t workspace = (1 + kBatch + 2 * ring) * stride;
    const Buffer<T> memory(threads * workspace);
    const Buffer<const T*> pointers(threads * 4 * ring);

    parallel_for(tasks.count, threads, [&](std::int64_t k, int thread) {
        const Task task = tasks[k];
        const std::int64_t offset = task.plane * height * width;
        const S* const x = static_cast<const S*>(g.x) + offset;
        const S* const d = static_cast<const S*>(g.d) + (g.d ? task.plane * d_height * d_width : 0);
        const S* const r = static_cast<const S*>(g.r) + (g.r ? offset : 0);
        S* const out = static_cast<S*>(g.out) + offset;

        T* const zeros = memory.data() + thread * workspace;
        T* const columns = zeros + stride + layout.margin;
        T* const rings = zeros + (1 + kBatch) * stride;
        const T** const lists = pointers.data() + thread * 4 * ring;
        Window<T> u(rings, stride, radius, lists);
        const std::int64_t first = circular ? task.begin - radius : larger(0, task.begin - radius);
        Input<S> input(x, height, width, radius, circular, first, zeros, rings + ring * stride, stride,
                       lists + 2 * ring);

        // Computes rows j ... j + count - 1 of u into the ring.
        const auto enter = [&](std::int64_t j, int count) {
            while (count > 0 && !input.exists(j)) {
                std::memset(u.enter(), 0, width * sizeof(T));
                ++j, --count;
            }
            int inside = 0;
            const T* rows[kBatch];
            while (inside < count && input.exists(j + inside)) {
                rows[inside] = weights + wrap(j + inside, height) * slots;
                ++inside;
            }
            if (inside) correlate_columns(input.around(j, inside), rows, radius, inside, width, columns, stride);
            for (int k = 0; k < inside; ++k) {
                const std::int64_t row = wrap(j + k, height) - g.d_margin_y;
                const S* const d_row = d && row >= 0 && row < d_height ? d + row * d_width : nullptr;
                correlate_row(columns + k * stride, table,
                              Difference<S>{d_row, g.d_margin_x, width - g.d_margin_x, g.d_margin_x > 0, u.enter()});
            }
            for (int k = inside; k < count; ++k) std::memset(u.enter(), 0, width * sizeof(T));
        };

        for (std::int64_t j = task.begin - radius; j < task.begin + radius; j += kBatch)
            enter(j, int(smaller(kBatch, task.begin + radius - j)));
        for (std::int64_t i = task.begin; i < task.end; i += kBatch) {
            const int count = int(smaller(kBatch, task.end - i));
            enter(i + radius, count);
            const T* rows[kBatch];
            for (int k = 0; k < count; ++k) rows[k] = adjoint_weights + (i + k) * slots;
            correlate_columns(u.rows(count), rows, radius, count, width, columns, stride);
            for (int k = 0; k < count; ++k) {
                const std::int64_t at = (i + k) * width;
                correlate_row(columns + k * stride, adjoint_table,
                              Step<S>{x + at, r ? r + at : nullptr, g.step, T(g.step_size), out + at});
            }
        }
    });
}

}  // namespace

void gradient(DType dtype, const Gradient& g, Shape shape, int threads) {
    with_dtype(dtype, [&](auto s) { gradient_planes<decltype(s)>(g, shape, threads); });
}

}  // namespace JFBFAST_ISA
}  // namespace jfbfast
