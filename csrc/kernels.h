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

// Stores the newest residual f - x of a history, for `samples` of `size` elements, and computes its products.
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

// A sample is split into chunks of this many elements, whose sums are added in order.
constexpr std::int64_t kAndersonChunk = 2048;
constexpr std::int64_t anderson_chunks(std::int64_t size) { return (size + kAndersonChunk - 1) / kAndersonChunk; }

constexpr double kDivergedGrowth = 1e4;  // these four are those of jfbfast/solvers/loop.py; a test compares them
constexpr double kSafeguardGrowth = 4;
constexpr double kStallFall = 0.7;
constexpr int kStallWindow = 5;

enum Status : std::int64_t { kConverged, kMaxIter, kDiverged };  // as jfbfast.Status

constexpr double kInfinity = __builtin_huge_val();

// What a solve by Anderson's method keeps of one sample, besides its vectors.
struct AndersonSample {
    bool saved = false;  // whether `value` has the best iterate; otherwise that is the newest evaluated one
    int pairs = 0;       // in the history
    int since = 0;       // evaluations since the lowest residual fell below kStallFall of `mark`
    double lowest = kInfinity, mark = kInfinity;
    double guarded = kInfinity;  // the lowest |f - x| since the safeguard last acted
    double bound = kInfinity;    // above it a norm means divergence
};

// One solve by Anderson's method. The "age" of a pair (x, f = T(x)) counts pairs back from the newest; a ring keeps the
// pair of step k in slot k mod `memory`.
struct Anderson {
    DType dtype, history;  // of the images, and of the history: the same, or bfloat16 for float32 images
    int memory;            // pairs, at most kMaxMemory
    std::int64_t samples, size;
    double tol, atol, regularization;
    double stall_floor;          // a stalled sample ends if its relative residual is at most this
    const std::int64_t* budget;  // the most evaluations of each sample, [samples]

    void* residuals;    // f - x, [memory, samples, size]
    void* images;       // f, [memory, samples, size]; only the newest, [samples, size], if there are differences
    void* differences;  // f minus the f before it, [memory, samples, size]; null if the history is not in bfloat16
    void *value, *following;  // [samples, size], complete once a sample has ended
    double* residual;         // relative, at `value`; this and the next three are [samples]
    std::int64_t *iterations, *status;
    bool* running;
    AndersonSample* states;  // [samples]
    double* gram;            // <g_i, g_j> by slot, [samples, memory, memory]
    double* partials;        // [samples, anderson_chunks(size), memory + 2]
    std::int64_t steps;      // before this one

    int slot(int age) const { return int((steps - age + memory) % memory); }
    int age(int slot) const { return int((steps - slot) % memory + memory) % memory; }
    int known(const AndersonSample& s) const { return s.pairs < memory ? s.pairs + 1 : memory; }
};

struct Decision {
    bool ended, improved, grown;  // grown: the safeguard acts
};

// Records one evaluation of a sample and decides what follows. `products` has <g, g_age> of its `known` pairs, then
// |f - x|^2 and |f|^2. Writes the slots of the pairs that remain in the history, in order, and their weights in the next
// iterate, unless the sample does not move by these.
Decision decide(const Anderson&, std::int64_t sample, const double* products, int* slots, double* alpha);

// Computes alpha as reference.anderson_weights does; gram is [samples, m, m], valid and alpha are [samples, m].
void anderson_weights(const double* gram, const bool* valid, double regularization, double* alpha, std::int64_t samples,
                      int m);

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

// The distances in floats between the first, the second and the last indices of a weight.
struct WeightStrides {
    std::int64_t outer, inner, tap;
};

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

// The kernels of one instruction set. isa.h declares the functions, with the signatures written here.
struct Kernels {
    const char* name;
    void (*blur)(DType, const void* x, void* out, Shape, const Bands&, int threads);
    void (*gradient)(DType, const Gradient&, Shape, int threads);
    void (*append)(DType, DType history, const Append&, std::int64_t samples, std::int64_t size, int threads);
    void (*mix)(DType, const Mix&, std::int64_t samples, std::int64_t size, int threads);
    // One iteration of the rows of x: writes the next iterates. Row i is the sample rows[i], or i if rows is null. `next`
    // holds the iterates before x.
    void (*anderson_step)(const Anderson&, const void* x, const void* f, void* next, const std::int64_t* rows,
                          std::int64_t batch, int threads);
    // weight is [out, in, 9]; or, if adjoint, [in, out, 9], of which the adjoint convolution's weight is made.
    void (*winograd_weights)(const float* weight, const WeightStrides&, float* out, std::int64_t in_channels,
                             std::int64_t out_channels, bool adjoint, int threads);
    void (*convolution)(DType, const Convolution&, const ImageShape&, int threads);
    void (*weight_gradient)(DType, const WeightGradient&, const ImageShape&, int threads);
};

// The widest set that this CPU supports, but no wider than the environment variable JFBFAST_ISA allows.
const Kernels& kernels();

}  // namespace jfbfast
