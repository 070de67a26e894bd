// The interface of the kernels. Images are contiguous [planes, height, width]. Band tables are those of
// jfbfast/backends/reference.py, in float64 for float64 images and in float32 otherwise.
#pragma once

#include <cstdint>

namespace jfbfast {

struct bfloat16 {
    std::uint16_t bits;
};
struct float16 {
    std::uint16_t bits;
};

// The arithmetic type for images stored as S.
template <class S>
struct WideOf {
    typedef float type;
};
template <>
struct WideOf<double> {
    typedef double type;
};
template <class S>
using Wide = typename WideOf<S>::type;

enum class DType : int { kFloat64, kFloat32, kBFloat16, kFloat16 };

// One band table [n, 2 * radius + 1].
struct Band {
    const void* weights;
    int radius;
};

struct Bands {
    Band y, x;
    bool circular;
};

struct Shape {
    std::int64_t planes, height, width;
    std::int64_t pixels() const { return planes * height * width; }
};

struct Gradient {
    const void* x;
    const void* d;                        // null for zero; without the margins below, in which it is zero
    std::int64_t d_margin_y, d_margin_x;  // how many rows and columns of x lie beyond d on each side
    const void* r;                        // null for zero
    void* out;
    bool step;  // whether out is x - step_size * g; otherwise it is g
    double step_size;
    Bands bands, adjoint;
};

constexpr int kMaxMemory = 64;  // the longest history of Anderson's method

// The history of Anderson's method for `samples` of `size` elements.
struct Append {
    const void* x;
    const void* f;
    void* residuals[kMaxMemory];  // [samples, size] each; the one at `slot` is written
    int slot, filled;
    double* products;  // [samples, filled + 2]: <g, g_j> for each filled slot j, then |f - x|^2 and |f|^2
};

struct Mix {
    const void* images[kMaxMemory];  // [samples, size] each
    int count;
    const double* alpha;  // [samples, count]
    void* out;
};

// out = f - sum_j weights[j] (f_j - f_(j-1)), for a history that keeps differences of images. The
// newest, f - previous, is computed and written to differences[0]; then come the older ones in turn.
struct MixDifferences {
    const void* f;
    const void* previous;
    void* differences[kMaxMemory];  // [samples, size] each
    int count;
    const double* weights;  // [samples, count]
    void* out;
};

// A convolution that maps images [batch, height, width, in] to [batch, height, width, out].
struct ImageShape {
    std::int64_t batch, height, width, in, out;
};

constexpr int kChannelBlock = 16;  // the number of columns of Winograd's matrices is a multiple of this

// The distance in floats between Winograd's 36 matrices: one block more than a matrix needs, so that they do not all
// map to the same cache sets. (static, because each instruction set compiles its own copy.)
static inline std::int64_t winograd_plane(std::int64_t rows, std::int64_t columns) {
    return rows * ((columns + kChannelBlock - 1) / kChannelBlock * kChannelBlock) + kChannelBlock;
}

// A 3 x 3 convolution with zero padding 1, of images in float32 or bfloat16.
struct Convolution {
    const void* x;
    const float* weights;  // as winograd_weights made them: 36 planes
    const float* bias;     // [out], or null
    void* out;
    bool relu;
};

// The gradients of that convolution's weight and bias, given the gradient of its output.
struct WeightGradient {
    const void* x;
    const void* gradient;
    float* weight;  // [out, in, 3, 3]
    float* bias;    // [out], or null
};

// Computes alpha as reference.anderson_weights does; gram is [samples, m, m], valid and alpha are [samples, m].
void anderson_weights(const double* gram, const bool* valid, double regularization, double* alpha, std::int64_t samples,
                      int m);

// The kernels of one instruction set. isa.h declares the functions, with the signatures written here.
struct Kernels {
    const char* name;
    void (*blur)(DType, const void* x, void* out, Shape, const Bands&, int threads);
    void (*gradient)(DType, const Gradient&, Shape, int threads);
    void (*append)(DType, DType history, const Append&, std::int64_t samples, std::int64_t size, int threads);
    void (*mix)(DType, const Mix&, std::int64_t samples, std::int64_t size, int threads);
    void (*mix_differences)(DType, DType history, const MixDifferences&, std::int64_t samples, std::int64_t size,
                            int threads);
    // weight is [out, in, 3, 3]; or, if adjoint, [in, out, 3, 3], of which the adjoint convolution's weight is made.
    void (*winograd_weights)(const float* weight, float* out, std::int64_t in_channels, std::int64_t out_channels,
                             bool adjoint, int threads);
    void (*convolution)(DType, const Convolution&, const ImageShape&, int threads);
    void (*weight_gradient)(DType, const WeightGradient&, const ImageShape&, int threads);
};

// The widest set that this CPU supports, but no wider than the environment variable JFBFAST_ISA allows.
const Kernels& kernels();

}  // namespace jfbfast
