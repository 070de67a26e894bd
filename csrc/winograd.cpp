// 3x3 convolution by Winograd's F(4x4, 3x3): a tile of 4 x 4 outputs takes 36 products a pair of channels, not 144.
//
//   Y = A^T [sum over the channels of (G g G^T) . (B^T d B)] A,   d the 6 x 6 inputs of the tile
//
// The points 0, +-5/8, +-3/2 and infinity round a quarter as much as the usual 0, +-1, +-2 do. For each of the
// 36 places the sum over the channels is a matrix product, V U = M, with a row a tile.
#include "isa.h"
#include "parallel.h"
#include "rows.h"

namespace jfbfast {
namespace JFBFAST_ISA {
namespace {

typedef Vec<float> Floats;
constexpr int kFloats = kLanes<float>;
constexpr int kTile = 4, kSpan = 6, kPlaces = kSpan * kSpan;

// Compiled once: a copy inlined into the loop of several threads may contract other products than that of one.
#if defined(__GNUC__)
#define JFBFAST_ONCE __attribute__((noinline))
#else
#define JFBFAST_ONCE
#endif

constexpr double kA = 5 / 8.0, kB = 3 / 2.0, kA2 = kA * kA, kB2 = kB * kB;
constexpr double kAtA = 1 / (2 * kA2 * (kA2 - kB2)), kAtB = 1 / (2 * kB2 * (kB2 - kA2));

template <class V>
inline void input_transform(const V* d, V* v) {  // B^T d
    const V even_a = d[4] - float(kB2) * d[2], odd_a = d[3] - float(kB2) * d[1];
    const V even_b = d[4] - float(kA2) * d[2], odd_b = d[3] - float(kA2) * d[1];
    v[0] = d[4] - float(kA2 + kB2) * d[2] + float(kA2 * kB2) * d[0];
    v[1] = even_a + float(kA) * odd_a;
    v[2] = even_a - float(kA) * odd_a;
    v[3] = even_b + float(kB) * odd_b;
    v[4] = even_b - float(kB) * odd_b;
    v[5] = d[5] - float(kA2 + kB2) * d[3] + float(kA2 * kB2) * d[1];
}

template <class V>
inline void weight_transform(const V* g, V* u) {  // G g
    const V even_a = float(kAtA) * g[0] + float(kAtA * kA2) * g[2], odd_a = float(kAtA * kA) * g[1];
    const V even_b = float(kAtB) * g[0] + float(kAtB * kB2) * g[2], odd_b = float(kAtB * kB) * g[1];
    u[0] = float(1 / (kA2 * kB2)) * g[0];
    u[1] = even_a + odd_a;
    u[2] = even_a - odd_a;
    u[3] = even_b + odd_b;
    u[4] = even_b - odd_b;
    u[5] = g[2];
}

template <class V>
inline void output_transform(const V* m, V* y) {  // A^T m
    const V sum_a = m[1] + m[2], sum_b = m[3] + m[4];
    const V difference_a = m[1] - m[2], difference_b = m[3] - m[4];
    y[0] = m[0] + sum_a + sum_b;
    y[1] = float(kA) * difference_a + float(kB) * difference_b;
    y[2] = float(kA2) * sum_a + float(kB2) * sum_b;
    y[3] = m[5] + float(kA2 * kA) * difference_a + float(kB2 * kB) * difference_b;
}

// The matrix product in registers: kRows rows by up to kPanel vectors of columns.
constexpr int kRows = 6;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kPanel = 4;
#else
constexpr int kPanel = 2;
#endif

// c[r, :] = sum over k of left[r, k] * right[k, :]
template <int Vectors>
void multiply(const float* left, std::int64_t row, const float* right, std::int64_t depth, float* c,
              std::int64_t stride) {
    Floats sums[kRows][Vectors] = {};
    for (std::int64_t k = 0; k < depth; ++k) {
        Floats factors[Vectors];
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) factors[v] = load(right + (k * Vectors + v) * kFloats);
#pragma GCC unroll 6
        for (int r = 0; r < kRows; ++r) {
            const float value = left[r * row + k];
#pragma GCC unroll 4
            for (int v = 0; v < Vectors; ++v) sums[r][v] += value * factors[v];
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) store(c + r * stride + v * kFloats, sums[r][v]);
}

// The columns of a product, `vectors` vectors of them, as panels of nearly equal width.
struct Panels {
    explicit Panels(std::int64_t columns) : vectors(columns / kFloats), count((vectors + kPanel - 1) / kPanel) {}
    std::int64_t begin(std::int64_t panel) const { return panel * vectors / count; }  // in vectors
    int width(std::int64_t panel) const { return int(begin(panel + 1) - begin(panel)); }
    std::int64_t vectors, count;
};

JFBFAST_ONCE void multiply_panel(int vectors, const float* left, std::int64_t row, const float* right, std::int64_t depth, float* c,
                    std::int64_t stride) {
    switch (vectors) {
        case 1: return multiply<1>(left, row, right, depth, c, stride);
        case 2: return multiply<2>(left, row, right, depth, c, stride);
#if defined(__AVX512F__) || defined(__aarch64__)
        case 3: return multiply<3>(left, row, right, depth, c, stride);
        case 4: return multiply<4>(left, row, right, depth, c, stride);
#endif
    }
}

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

// B^T d B of one tile, written to one row of each of the places' matrices.
JFBFAST_ONCE void transform_tile(const float* x, const Tiles& tiles, std::int64_t tile, std::int64_t channels, const float* zeros,
                    float* v, std::int64_t plane) {
    const Tiles::Place place = tiles.place(tile);
    const std::int64_t height = tiles.shape.height, width = tiles.shape.width;
    const float* at[kSpan][kSpan];
    for (int i = 0; i < kSpan; ++i)
        for (int j = 0; j < kSpan; ++j) {
            const std::int64_t y = place.top + i - 1, z = place.left + j - 1;
            const bool inside = y >= 0 && y < height && z >= 0 && z < width;
            at[i][j] = inside ? x + ((place.image * height + y) * width + z) * channels : zeros;
        }
    for_each_vector<kFloats>(0, channels, [&](std::int64_t c, auto lanes) {
        Floats half[kSpan][kSpan];  // transposed
#pragma GCC unroll 6
        for (int j = 0; j < kSpan; ++j) {
            Floats d[kSpan];
#pragma GCC unroll 6
            for (int i = 0; i < kSpan; ++i) d[i] = load(at[i][j] + c, lanes);
            input_transform(d, half[j]);
        }
#pragma GCC unroll 6
        for (int i = 0; i < kSpan; ++i) {
            Floats d[kSpan], out[kSpan];
#pragma GCC unroll 6
            for (int j = 0; j < kSpan; ++j) d[j] = half[j][i];
            input_transform(d, out);
#pragma GCC unroll 6
            for (int j = 0; j < kSpan; ++j) store(v + (i * kSpan + j) * plane + c, out[j]);
        }
    });
}

// A^T m A of one tile with the bias and the ReLU, written where the image is.
JFBFAST_ONCE void finish_tile(const Convolution& conv, const Tiles& tiles, std::int64_t tile, const float* m, std::int64_t plane) {
    const Tiles::Place place = tiles.place(tile);
    const std::int64_t height = tiles.shape.height, width = tiles.shape.width, channels = tiles.shape.out;
    const int rows = int(smaller(kTile, height - place.top)), columns = int(smaller(kTile, width - place.left));
    float* const to = conv.out + ((place.image * height + place.top) * width + place.left) * channels;
    for_each_vector<kFloats>(0, channels, [&](std::int64_t c, auto lanes) {
        Floats half[kTile][kSpan];
#pragma GCC unroll 6
        for (int j = 0; j < kSpan; ++j) {
            Floats column[kSpan], out[kTile];
#pragma GCC unroll 6
            for (int i = 0; i < kSpan; ++i) column[i] = load(m + (i * kSpan + j) * plane + c);
            output_transform(column, out);
#pragma GCC unroll 4
            for (int i = 0; i < kTile; ++i) half[i][j] = out[i];
        }
        const Floats bias = conv.bias ? load(conv.bias + c, lanes) : Floats{};
#pragma GCC unroll 4
        for (int i = 0; i < kTile; ++i) {
            Floats out[kTile];
            output_transform(half[i], out);
            if (i >= rows) continue;
#pragma GCC unroll 4
            for (int j = 0; j < kTile; ++j) {
                if (j >= columns) continue;
                Floats y = out[j] + bias;
                if (conv.relu) y = y < 0 ? Floats{} : y;  // a NaN stays one
                store(to + (i * width + j) * channels + c, y, lanes);
            }
        }
    });
}

constexpr std::int64_t kWorkspace = 256 << 10;  // bytes of V and M that stay in the second-level cache

// Tiles in a block: what the cache holds, less where there are too few for all threads.
std::int64_t block_tiles(std::int64_t tiles, std::int64_t floats, int threads) {
    const std::int64_t fit = kWorkspace / (kPlaces * floats * std::int64_t(sizeof(float)));
    const std::int64_t share = (tiles + threads - 1) / threads;
    return round_up(larger(1, smaller(fit - kRows + 1, share)), kRows);
}

}  // namespace

void winograd_weights(const float* weight, float* out, std::int64_t in_channels, std::int64_t out_channels,
                      int threads) {
    const Panels panels(padded(out_channels));
    const std::int64_t plane = in_channels * padded(out_channels);
    parallel_for(panels.vectors, threads, [&](std::int64_t vector, int) {
        std::int64_t panel = 0;
        while (panels.begin(panel + 1) <= vector) ++panel;
        const std::int64_t width = panels.width(panel) * kFloats;
        float* const to = out + panels.begin(panel) * kFloats * in_channels + (vector - panels.begin(panel)) * kFloats;
        const std::int64_t first = vector * kFloats, count = smaller(kFloats, out_channels - first);
        for (std::int64_t c = 0; c < in_channels; ++c) {
            float taps[9][kFloats] = {};
            for (std::int64_t lane = 0; lane < count; ++lane)
                for (int k = 0; k < 9; ++k) taps[k][lane] = weight[((first + lane) * in_channels + c) * 9 + k];
            Floats half[3][kSpan];  // transposed
            for (int j = 0; j < 3; ++j) {
                const Floats g[3] = {load(taps[j]), load(taps[3 + j]), load(taps[6 + j])};
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

void convolution(const Convolution& conv, const ImageShape& shape, int threads) {
    const Tiles tiles(shape);
    const Panels panels(padded(shape.out));
    const std::int64_t in = padded(shape.in), out = padded(shape.out);
    const std::int64_t block = block_tiles(tiles.count, in + out, threads);
    // A few floats more, so that the places do not all fall on the same sets of the cache.
    const std::int64_t v_plane = block * in + kChannelBlock, m_plane = block * out + kChannelBlock;
    const std::int64_t workspace = kPlaces * (v_plane + m_plane);
    const Buffer<float> memory(threads * workspace), zeros(in);

    parallel_for((tiles.count + block - 1) / block, threads, [&](std::int64_t k, int thread) {
        float* const v = memory.data() + thread * workspace;
        float* const m = v + kPlaces * v_plane;
        const std::int64_t first = k * block, count = smaller(block, tiles.count - first);
        for (std::int64_t t = 0; t < count; ++t)
            transform_tile(conv.x, tiles, first + t, shape.in, zeros.data(), v + t * in, v_plane);
        for (int place = 0; place < kPlaces; ++place)
            for (std::int64_t panel = 0; panel < panels.count; ++panel) {
                const std::int64_t column = panels.begin(panel) * kFloats;
                const float* const u = conv.weights + (place * out + column) * shape.in;
                for (std::int64_t t = 0; t < count; t += kRows)
                    multiply_panel(panels.width(panel), v + place * v_plane + t * in, in, u, shape.in,
                                   m + place * m_plane + t * out + column, out);
            }
        for (std::int64_t t = 0; t < count; ++t) finish_tile(conv, tiles, first + t, m + t * out, m_plane);
    });
}

}  // namespace JFBFAST_ISA
}  // namespace jfbfast
