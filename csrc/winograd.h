// The parts of Winograd's F(4x4, 3x3): its one-dimensional transforms, and matrix products in registers.
//
// The rounding error with the points 0, +-5/8, +-3/2 and infinity is less than half that with the usual 0, +-1, +-2.
//
// Images in bfloat16 are multiplied in float32 too. Products of bfloat16 (AVX512_BF16) take half of the time, but would
// round B^T d B and G g G^T, which are exact in neither. For 64 channels the relative error of the result is then
// 9.9e-3, where rounding it to bfloat16 makes 1.7e-3; with F(2x2, 3x3) it is 3.5e-3, for 0.9 of the time of the products
// here. The solve in low precision would end that much earlier, and return to float32.
#pragma once

#include "pool.h"
#include "rows.h"

namespace jfbfast {
namespace JFBFAST_ISA {

typedef Vec<float> Floats;
constexpr int kFloats = kLanes<float>;
constexpr int kTile = 4, kSpan = 6, kPlaces = kSpan * kSpan;

// Not inlined. Otherwise the loops for one and for several threads have copies of their own, in which the compiler may
// fuse other products and additions, so that the result depends on the number of threads.
#if defined(__GNUC__)
#define JFBFAST_ONCE __attribute__((noinline))
#else
#define JFBFAST_ONCE
#endif

constexpr double kA = 5 / 8.0, kB = 3 / 2.0, kA2 = kA * kA, kB2 = kB * kB;
constexpr double kAtA = 1 / (2 * kA2 * (kA2 - kB2)), kAtB = 1 / (2 * kB2 * (kB2 - kA2));

// The parts of B^T d: that of 0 (of d[0], d[2], d[4]) or of infinity (of d[1], d[3], d[5]), and those of +-point, given
// the square of the other point.
template <class V>
inline V input_end(V first, V middle, V last) {
    return last - float(kA2 + kB2) * middle + float(kA2 * kB2) * first;
}

template <class V>
inline void input_pair(float point, float other, V d1, V d2, V d3, V d4, V& plus, V& minus) {
    const V even = d4 - other * d2, odd = d3 - other * d1;
    plus = even + point * odd;
    minus = even - point * odd;
}

template <class V>
inline void input_transform(const V* d, V* v) {  // B^T d
    v[0] = input_end(d[0], d[2], d[4]);
    input_pair(float(kA), float(kB2), d[1], d[2], d[3], d[4], v[1], v[2]);
    input_pair(float(kB), float(kA2), d[1], d[2], d[3], d[4], v[3], v[4]);
    v[5] = input_end(d[1], d[3], d[5]);
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

template <class V>
inline void gradient_pair(double point, V y0, V y1, V y2, V y3, V& plus, V& minus) {  // the parts of A y of +-point
    const V even = y0 + float(point * point) * y2, odd = float(point) * y1 + float(point * point * point) * y3;
    plus = even + odd;
    minus = even - odd;
}

template <class V>
inline void gradient_transform(const V* y, V* m) {  // A y
    m[0] = y[0];
    gradient_pair(kA, y[0], y[1], y[2], y[3], m[1], m[2]);
    gradient_pair(kB, y[0], y[1], y[2], y[3], m[3], m[4]);
    m[5] = y[3];
}

// The `count` floats at first, first + stride, ..., and zeros in the lanes beyond.
inline Floats gather(const float* first, std::int64_t stride, int count) {
#if defined(__AVX512F__)
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i places = _mm512_mullo_epi32(lanes, _mm512_set1_epi32(int(stride)));
    return bits_as<Floats>(_mm512_mask_i32gather_ps(_mm512_setzero_ps(), mask_of(Part{count}), places, first, 4));
#else
    float found[kFloats] = {};
    for (int lane = 0; lane < count; ++lane) found[lane] = first[lane * stride];
    return load(found);
#endif
}

// The larger of the two; y if it is NaN.
inline Floats at_least(Floats least, Floats y) {
#if defined(__AVX512F__)
    return bits_as<Floats>(_mm512_maskz_max_ps(0xffff, bits_as<__m512>(least), bits_as<__m512>(y)));
#else
    return y < least ? least : y;
#endif
}

template <class V>
inline void weight_gradient_transform(const V* u, V* g) {  // G^T u
    const V sum_a = float(kAtA) * (u[1] + u[2]), sum_b = float(kAtB) * (u[3] + u[4]);
    g[0] = float(1 / (kA2 * kB2)) * u[0] + sum_a + sum_b;
    g[1] = float(kAtA * kA) * (u[1] - u[2]) + float(kAtB * kB) * (u[3] - u[4]);
    g[2] = float(kA2) * sum_a + float(kB2) * sum_b + u[5];
}

// Memory that a call works in, uninitialised, from the pool: to allocate and zero it anew takes longer than to
// convolve a small image.
template <class T>
class Workspace {
public:
    explicit Workspace(std::int64_t count) : bytes_(count * sizeof(T)), memory_(take_memory(bytes_)) {}
    ~Workspace() { give_memory(memory_, bytes_); }
    Workspace(const Workspace&) = delete;
    Workspace& operator=(const Workspace&) = delete;
    T* data() const { return static_cast<T*>(memory_); }

private:
    std::size_t bytes_;
    void* memory_;
};

inline void prefetch(const void* address) {
#if defined(__GNUC__)
    __builtin_prefetch(address, 0, 2);
    asm volatile("");  // GCC removes calls of functions that only prefetch
#endif
}

// The matrix product in registers: kRows rows by up to kPanel vectors of columns.
constexpr int kRows = 6;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kPanel = 4;
#else
constexpr int kPanel = 2;
#endif

// c = left right, or c = left^T right if Transposed; if Add, the product is added to c. A matrix is given by its address
// and the distance between its rows.
template <int Vectors, bool Transposed, bool Add>
void multiply(const float* left, std::int64_t left_row, const float* right, std::int64_t right_row, std::int64_t depth,
              float* c, std::int64_t c_row) {
    Floats sums[kRows][Vectors] = {};
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v)
            if (Add) sums[r][v] = load(c + r * c_row + v * kFloats);
    for (std::int64_t k = 0; k < depth; ++k) {
        Floats factors[Vectors];
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) factors[v] = load(right + k * right_row + v * kFloats);
#pragma GCC unroll 6
        for (int r = 0; r < kRows; ++r) {
            const float value = Transposed ? left[k * left_row + r] : left[r * left_row + k];
#pragma GCC unroll 4
            for (int v = 0; v < Vectors; ++v) sums[r][v] += value * factors[v];
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) store(c + r * c_row + v * kFloats, sums[r][v]);
}

// Splits the columns of a product (`vectors` vectors) into panels of nearly equal width.
struct Panels {
    explicit Panels(std::int64_t columns) : vectors(columns / kFloats), count((vectors + kPanel - 1) / kPanel) {}
    std::int64_t begin(std::int64_t panel) const { return panel * vectors / count; }  // in vectors
    int width(std::int64_t panel) const { return int(begin(panel + 1) - begin(panel)); }
    std::int64_t vectors, count;
};

template <bool Transposed, bool Add>
JFBFAST_ONCE void multiply_panel(int vectors, const float* left, std::int64_t left_row, const float* right,
                                 std::int64_t right_row, std::int64_t depth, float* c, std::int64_t c_row) {
    switch (vectors) {
        case 1: return multiply<1, Transposed, Add>(left, left_row, right, right_row, depth, c, c_row);
        case 2: return multiply<2, Transposed, Add>(left, left_row, right, right_row, depth, c, c_row);
#if defined(__AVX512F__) || defined(__aarch64__)
        case 3: return multiply<3, Transposed, Add>(left, left_row, right, right_row, depth, c, c_row);
        case 4: return multiply<4, Transposed, Add>(left, left_row, right, right_row, depth, c, c_row);
#endif
    }
}

}  // namespace JFBFAST_ISA
}  // namespace jfbfast
