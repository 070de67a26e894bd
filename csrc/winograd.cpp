// 3x3 convolution by Winograd's F(4x4, 3x3): a tile of 4 x 4 outputs takes 36 products per pair of channels, not 144.
//
//   Y = A^T [sum over the channels of (G g G^T) . (B^T d B)] A,   d the 6 x 6 inputs of the tile
//
// and the gradient of g is G^T [sum over the tiles of (B^T d B) . (A dY A^T)] G.
//
// At each of the 36 places, the sum over the channels is a matrix product V U = M with one row per tile. Likewise
// dU = V^T dM.
#include "winograd.h"

#include "isa.h"
#include "parallel.h"

namespace jfbfast {
namespace JFBFAST_ISA {
namespace {

constexpr int kAhead = 4;  // how many tiles ahead their pixels are asked for

std::int64_t padded(std::int64_t channels) { return round_up(channels, kChannelBlock); }

// The tiles of a batch, numbered image by image, row by row.
struct Tiles {
    explicit Tiles(const ImageShape& s)
        : shape(s), rows((s.height + kTile - 1) / kTile), columns((s.width + kTile - 1) / kTile),
          count(s.batch * rows * columns) {}
    struct Place {
        std::int64_t image, top, left;
    };
    Place place(std::int64_t tile) const {
        return {tile / (rows * columns), tile / columns % rows * kTile, tile % columns * kTile};
    }
    ImageShape shape;
    std::int64_t rows, columns, count;
};

// The addresses of a tile's pixels: of the first, and the distances between rows and between columns.
template <class S>
struct Pixels {
    S* first;
    std::int64_t row, column;
};

// The Span x Span pixels around the middle of a tile. If some lie outside of the image, all are copied to `scratch`,
// with zeros there.
template <int Span, class S>
Pixels<const S> pixels_of(const S* images, const Tiles& tiles, std::int64_t tile, std::int64_t channels, S* scratch) {
    const auto [image, tile_top, tile_left] = tiles.place(tile);
    const std::int64_t height = tiles.shape.height, width = tiles.shape.width, margin = (Span - kTile) / 2;
    const std::int64_t top = tile_top - margin, left = tile_left - margin;
    if (top >= 0 && left >= 0 && top + Span <= height && left + Span <= width)
        return {images + ((image * height + top) * width + left) * channels, width * channels, channels};
    for (int i = 0; i < Span; ++i)
        for (int j = 0; j < Span; ++j) {
            const std::int64_t y = top + i, z = left + j;
            const bool inside = y >= 0 && y < height && z >= 0 && z < width;
            S* const to = scratch + (i * Span + j) * channels;
            if (inside)
                std::memcpy(to, images + ((image * height + y) * width + z) * channels, channels * sizeof(S));
            else
                std::memset(static_cast<void*>(to), 0, channels * sizeof(S));
        }
    return {scratch, Span * channels, channels};
}

// Asks for the pixels that a later tile adds to those of the tiles before it, which come from memory otherwise: in the
// order of tiles, each row is read a few pixels at a time, too few for the CPU to see where the reading goes on.
template <int Span, class S>
inline void fetch_ahead(const S* images, const Tiles& tiles, std::int64_t tile, std::int64_t channels) {
    const auto [image, tile_top, tile_left] = tiles.place(smaller(tile + kAhead, tiles.count - 1));
    const std::int64_t height = tiles.shape.height, margin = (Span - kTile) / 2, top = tile_top + margin;
    const std::int64_t bytes = smaller(kTile, tiles.shape.width - tile_left) * channels * std::int64_t(sizeof(S));
    for (std::int64_t y = top; y < smaller(top + kTile, height); ++y) {
        const S* const row = images + ((image * height + y) * tiles.shape.width + tile_left) * channels;
        for (std::int64_t at = 0; at < bytes; at += 64) prefetch(reinterpret_cast<const char*>(row) + at);
    }
}

// B^T d B of one tile, written to one row of each of the 36 matrices. Each pair of rows is computed from the pixels
// again: all 36 values in between would not fit in registers.
template <class S>
JFBFAST_ONCE void transform_tile(const S* x, const Tiles& tiles, std::int64_t tile, std::int64_t channels, S* scratch,
                                 float* v, std::int64_t plane) {
    fetch_ahead<kSpan>(x, tiles, tile, channels);
    const Pixels<const S> pixels = pixels_of<kSpan>(x, tiles, tile, channels, scratch);
    for_each_vector<kFloats>(0, channels, [&, v, plane](std::int64_t c, auto lanes) {
        const S* const first = pixels.first + c;
        const auto pixel = [&](int i, int j) { return load(first + i * pixels.row + j * pixels.column, lanes); };
        const auto finish = [=](const Floats* d, int i) {
            Floats out[kSpan];
            input_transform(d, out);
#pragma GCC unroll 6
            for (int j = 0; j < kSpan; ++j) store(v + (i * kSpan + j) * plane + c, out[j]);
        };
        Floats d[kSpan], e[kSpan];
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
#pragma GCC unroll 6
            for (int j = 0; j < kSpan; ++j) d[j] = input_end(pixel(i, j), pixel(2 + i, j), pixel(4 + i, j));
            finish(d, 5 * i);
        }
#pragma GCC unroll 2
        for (int i = 1; i < 4; i += 2) {
            const float point = float(i == 1 ? kA : kB), other = float(i == 1 ? kB2 : kA2);
#pragma GCC unroll 6
            for (int j = 0; j < kSpan; ++j)
                input_pair(point, other, pixel(1, j), pixel(2, j), pixel(3, j), pixel(4, j), d[j], e[j]);
            finish(d, i);
            finish(e, i + 1);
        }
    });
}

// A^T m A of one tile, plus the bias and with the ReLU, written to the output image.
template <class S>
JFBFAST_ONCE void finish_tile(const Convolution& conv, const Tiles& tiles, std::int64_t tile, const float* m,
                              std::int64_t plane, S* scratch) {
    const Tiles::Place place = tiles.place(tile);
    const std::int64_t height = tiles.shape.height, width = tiles.shape.width, channels = tiles.shape.out;
    const int rows = int(smaller(kTile, height - place.top)), columns = int(smaller(kTile, width - place.left));
    const bool whole = rows == kTile && columns == kTile;
    S* const to = static_cast<S*>(conv.out) + ((place.image * height + place.top) * width + place.left) * channels;
    const Pixels<S> pixels = {whole ? to : scratch, whole ? width * channels : kTile * channels, channels};
    const Floats least = Floats{} + (conv.relu ? 0.0f : -__builtin_inff());
    for_each_vector<kFloats>(0, channels, [&, m, plane](std::int64_t c, auto lanes) {
        Floats y[kTile][kTile], r[kTile], s[kTile];
        const auto row = [=](int i, Floats* out) {
            Floats places[kSpan];
#pragma GCC unroll 6
            for (int j = 0; j < kSpan; ++j) places[j] = load(m + (i * kSpan + j) * plane + c);
            output_transform(places, out);
        };
        const Floats bias = conv.bias ? load(conv.bias + c, lanes) : Floats{};
        row(0, r);
        row(5, s);
#pragma GCC unroll 4
        for (int j = 0; j < kTile; ++j) {
            y[0][j] = r[j] + bias;
            y[1][j] = y[2][j] = bias;
            y[3][j] = s[j] + bias;
        }
#pragma GCC unroll 2
        for (int i = 1; i < 4; i += 2) {
            const double point = i == 1 ? kA : kB;
            row(i, r);
            row(i + 1, s);
#pragma GCC unroll 4
            for (int j = 0; j < kTile; ++j) {
                const Floats sum = r[j] + s[j], difference = r[j] - s[j];
                y[0][j] += sum;
                y[1][j] += float(point) * difference;
                y[2][j] += float(point * point) * sum;
                y[3][j] += float(point * point * point) * difference;
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < kTile; ++i)
#pragma GCC unroll 4
            for (int j = 0; j < kTile; ++j)
                store(pixels.first + i * pixels.row + j * pixels.column + c, at_least(least, y[i][j]), lanes);
    });
    for (int i = 0; !whole && i < rows; ++i)
        std::memcpy(static_cast<void*>(to + i * width * channels), scratch + i * kTile * channels,
                    columns * channels * sizeof(S));
}

// A dY A^T of one tile, and the sum of dY added to `total`.
template <class S>
JFBFAST_ONCE void transform_gradient(const S* gradient, const Tiles& tiles, std::int64_t tile, std::int64_t channels,
                                     S* scratch, float* m, std::int64_t plane, float* total) {
    fetch_ahead<kTile>(gradient, tiles, tile, channels);
    const Pixels<const S> pixels = pixels_of<kTile>(gradient, tiles, tile, channels, scratch);
    for_each_vector<kFloats>(0, channels, [&, m, plane](std::int64_t c, auto lanes) {
        const auto finish = [=](const Floats* y, int i) {
            Floats out[kSpan];
            gradient_transform(y, out);
#pragma GCC unroll 6
            for (int j = 0; j < kSpan; ++j) store(m + (i * kSpan + j) * plane + c, out[j]);
        };
        Floats y[kTile][kTile], sum = {}, d[kTile], e[kTile];
#pragma GCC unroll 4
        for (int i = 0; i < kTile; ++i)
#pragma GCC unroll 4
            for (int j = 0; j < kTile; ++j)
                sum += y[i][j] = load(pixels.first + i * pixels.row + j * pixels.column + c, lanes);
        store(total + c, load(total + c) + sum);
        finish(y[0], 0);
        finish(y[3], 5);
#pragma GCC unroll 2
        for (int i = 1; i < 4; i += 2) {
            const double point = i == 1 ? kA : kB;
#pragma GCC unroll 4
            for (int j = 0; j < kTile; ++j) gradient_pair(point, y[0][j], y[1][j], y[2][j], y[3][j], d[j], e[j]);
            finish(d, i);
            finish(e, i + 1);
        }
    });
}

// Bytes of V and M together. They should stay in the second-level cache. For the gradient of a weight they may be as
// large as dU, because every block reads and writes all of dU anyway.
constexpr std::int64_t kWorkspace = 256 << 10, kGradientWorkspace = 896 << 10, kMaxGradientWorkspace = 8 << 20;

// Tiles in a block: as many as the workspace holds, but few enough to give every thread some, and the same in each.
std::int64_t block_tiles(std::int64_t tiles, std::int64_t floats, std::int64_t bytes, int threads) {
    const std::int64_t fit = bytes / (kPlaces * floats * std::int64_t(sizeof(float)));
    const std::int64_t most = larger(kRows, fit / kRows * kRows);
    const std::int64_t blocks = larger((tiles + most - 1) / most, threads);
    return round_up((tiles + blocks - 1) / blocks, kRows);
}

constexpr std::int64_t kParts = 16, kPartTiles = 96;  // the gradient of a weight: most parts, fewest tiles in each

// G^T dU G, [9, in, out].
JFBFAST_ONCE void finish_weight_gradient(const float* u, std::int64_t plane, std::int64_t in, std::int64_t out,
                                         float* to) {
    for (std::int64_t at = 0; at < in * out; at += kFloats) {
        Floats half[3][kSpan];
#pragma GCC unroll 6
        for (int j = 0; j < kSpan; ++j) {
            Floats column[kSpan], g[3];
#pragma GCC unroll 6
            for (int i = 0; i < kSpan; ++i) column[i] = load(u + (i * kSpan + j) * plane + at);
            weight_gradient_transform(column, g);
#pragma GCC unroll 3
            for (int i = 0; i < 3; ++i) half[i][j] = g[i];
        }
#pragma GCC unroll 3
        for (int i = 0; i < 3; ++i) {
            Floats g[3];
            weight_gradient_transform(half[i], g);
#pragma GCC unroll 3
            for (int j = 0; j < 3; ++j) store(to + (3 * i + j) * in * out + at, g[j]);
        }
    }
}

}  // namespace

void winograd_weights(const float* weight, const WeightStrides& strides, float* out, std::int64_t in_channels,
                      std::int64_t out_channels, bool adjoint, int threads) {
    const std::int64_t by_in = adjoint ? strides.outer : strides.inner;
    const std::int64_t by_out = adjoint ? strides.inner : strides.outer;
    const Panels panels(padded(out_channels));
    const std::int64_t plane = winograd_plane(in_channels, out_channels);
    threads = useful_threads(threads, plane);
    parallel_for(panels.vectors, threads, [&](std::int64_t vector, int) {
        std::int64_t panel = 0;
        while (panels.begin(panel + 1) <= vector) ++panel;
        const std::int64_t width = panels.width(panel) * kFloats;
        float* const to = out + panels.begin(panel) * kFloats * in_channels + (vector - panels.begin(panel)) * kFloats;
        const std::int64_t first = vector * kFloats;
        const int count = int(larger(0, smaller(kFloats, out_channels - first)));
        for (std::int64_t c = 0; c < in_channels; ++c) {
            const auto tap = [&](int k) {
                const float* const lane = weight + c * by_in + first * by_out + (adjoint ? 8 - k : k) * strides.tap;
                return by_out == 1 && count == kFloats ? load(lane) : gather(lane, by_out, count);
            };
            Floats half[3][kSpan];  // transposed
            for (int j = 0; j < 3; ++j) {
                const Floats g[3] = {tap(j), tap(3 + j), tap(6 + j)};
                weight_transform(g, half[j]);
            }
            for (int i = 0; i < kSpan; ++i) {
                const Floats g[3] = {half[0][i], half[1][i], half[2][i]};
                Floats u[kSpan];
                weight_transform(g, u);
                for (int j = 0; j < kSpan; ++j) store(to + (i * kSpan + j) * plane + c * width, u[j]);
            }
        }
    });
}

namespace {

template <class S>
void convolve(const Convolution& conv, const ImageShape& shape, int threads) {
    const Tiles tiles(shape);
    const Panels panels(padded(shape.out));
    const std::int64_t in = padded(shape.in), out = padded(shape.out);
    threads = useful_threads(threads, tiles.count * in * out / 4);
    const std::int64_t block = block_tiles(tiles.count, in + out, kWorkspace, threads);
    const std::int64_t v_plane = winograd_plane(block, in), m_plane = winograd_plane(block, out);
    const std::int64_t u_plane = winograd_plane(shape.in, out), workspace = kPlaces * (v_plane + m_plane);
    const std::int64_t edge = kPlaces * larger(shape.in, shape.out);
    const Workspace<float> memory(threads * workspace);
    const Workspace<S> scratch(threads * edge);

    parallel_for((tiles.count + block - 1) / block, threads, [&](std::int64_t k, int thread) {
        float* const v = memory.data() + thread * workspace;
        float* const m = v + kPlaces * v_plane;
        const std::int64_t first = k * block, count = smaller(block, tiles.count - first);
        for (std::int64_t t = 0; t < count; ++t)
            transform_tile(static_cast<const S*>(conv.x), tiles, first + t, shape.in, scratch.data() + thread * edge,
                           v + t * in, v_plane);
        for (int place = 0; place < kPlaces; ++place)
            for (std::int64_t panel = 0; panel < panels.count; ++panel) {
                const std::int64_t column = panels.begin(panel) * kFloats;
                const float* const u = conv.weights + place * u_plane + column * shape.in;
                for (std::int64_t t = 0; t < count; t += kRows)
                    multiply_panel<false, false>(panels.width(panel), v + place * v_plane + t * in, in, u,
                                                 panels.width(panel) * kFloats, shape.in,
                                                 m + place * m_plane + t * out + column, out);
            }
        for (std::int64_t t = 0; t < count; ++t)
            finish_tile(conv, tiles, first + t, m + t * out, m_plane, scratch.data() + thread * edge);
    });
}

// The sum over the tiles is split into parts that depend only on the shape, and the parts are added in order, so the
// result does not depend on the number of threads.
template <class S>
void differentiate(const WeightGradient& g, const ImageShape& shape, int threads) {
    const Tiles tiles(shape);
    const Panels panels(padded(shape.out));
    const std::int64_t in = padded(shape.in), out = padded(shape.out), rows = round_up(shape.in, kRows);
    threads = useful_threads(threads, tiles.count * in * out / 4);
    const std::int64_t u_plane = winograd_plane(rows, out), u_bytes = kPlaces * u_plane * std::int64_t(sizeof(float));
    const std::int64_t bytes = larger(kGradientWorkspace, smaller(kMaxGradientWorkspace, u_bytes));
    const std::int64_t parts = larger(1, smaller(kParts, tiles.count / kPartTiles)), part_size = 9 * shape.in * out;
    const std::int64_t block = block_tiles((tiles.count + parts - 1) / parts, in + out, bytes, 1);
    const std::int64_t v_plane = winograd_plane(block, in), m_plane = winograd_plane(block, out);
    const std::int64_t workspace = kPlaces * (v_plane + m_plane + u_plane);
    const std::int64_t edge = kPlaces * larger(shape.in, shape.out);
    const Workspace<float> memory(threads * workspace);
    const Workspace<S> scratch(threads * edge);
    const Workspace<float> sums(parts * part_size);
    const Buffer<float> totals(parts * out);

    parallel_for(parts, threads, [&](std::int64_t part, int thread) {
        float* const v = memory.data() + thread * workspace;
        float* const m = v + kPlaces * v_plane;
        float* const u = m + kPlaces * m_plane;
        const std::int64_t begin = part * tiles.count / parts, end = (part + 1) * tiles.count / parts;
        for (std::int64_t first = begin; first < end; first += block) {
            const std::int64_t count = smaller(block, end - first);
            const auto product = first == begin ? multiply_panel<true, false> : multiply_panel<true, true>;
            for (std::int64_t t = 0; t < count; ++t) {
                transform_tile(static_cast<const S*>(g.x), tiles, first + t, shape.in, scratch.data() + thread * edge,
                               v + t * in, v_plane);
                transform_gradient(static_cast<const S*>(g.gradient), tiles, first + t, shape.out,
                                   scratch.data() + thread * edge, m + t * out, m_plane, totals.data() + part * out);
            }
            for (int place = 0; place < kPlaces; ++place)
                for (std::int64_t panel = 0; panel < panels.count; ++panel) {
                    const std::int64_t column = panels.begin(panel) * kFloats;
                    for (std::int64_t row = 0; row < rows; row += kRows)
                        product(panels.width(panel), v + place * v_plane + row, in, m + place * m_plane + column, out,
                                count, u + place * u_plane + row * out + column, out);
                }
        }
        finish_weight_gradient(u, u_plane, shape.in, out, sums.data() + part * part_size);
    });

    // Adds the parts and transposes them, some input channels at a time, whose 9 sums lie in turn in the result.
    parallel_for((shape.in + kFloats - 1) / kFloats, useful_threads(threads, part_size), [&](std::int64_t k, int) {
        const std::int64_t first = k * kFloats, last = smaller(shape.in, first + kFloats);
        for (int tap = 0; tap < 9 && parts > 1; ++tap) {
            float* const sum = sums.data() + tap * shape.in * out;
            for (std::int64_t at = first * out; at < last * out; at += kFloats) {
                Floats total = load(sum + at);
                for (std::int64_t part = 1; part < parts; ++part) total += load(sum + part * part_size + at);
                store(sum + at, total);
            }
        }
        for (std::int64_t o = 0; o < shape.out; ++o)
            for (std::int64_t c = first; c < last; ++c)
                for (int tap = 0; tap < 9; ++tap)
                    g.weight[(o * shape.in + c) * 9 + tap] = sums.data()[(tap * shape.in + c) * out + o];
    });
    for (std::int64_t o = 0; g.bias && o < shape.out; ++o) {
        g.bias[o] = 0;
        for (std::int64_t part = 0; part < parts; ++part) g.bias[o] += totals.data()[part * out + o];
    }
}

}  // namespace

void convolution(DType dtype, const Convolution& conv, const ImageShape& shape, int threads) {
    return dtype == DType::kBFloat16 ? convolve<bfloat16>(conv, shape, threads) : convolve<float>(conv, shape, threads);
}

void weight_gradient(DType dtype, const WeightGradient& g, const ImageShape& shape, int threads) {
    return dtype == DType::kBFloat16 ? differentiate<bfloat16>(g, shape, threads)
                                     : differentiate<float>(g, shape, threads);
}

}  // namespace JFBFAST_ISA
}  // namespace jfbfast
