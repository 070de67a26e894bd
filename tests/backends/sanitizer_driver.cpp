// Runs the kernels over odd shapes, each image in a heap block of exactly its size, and compares them
// with plain loops in float64. Built with the address and undefined-behaviour sanitizers.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <utility>
#include <vector>

#include "anderson.cpp"
#include "blur.cpp"
#include "decide.cpp"
#include "gradient.cpp"
#include "pool.cpp"
#include "winograd.cpp"

using namespace jfbfast;
namespace isa = jfbfast::JFBFAST_ISA;

namespace {

double noise() { return std::rand() / double(RAND_MAX) - 0.5; }

template <class S>
std::vector<S> image(std::int64_t n) {
    std::vector<S> v(n);
    for (S& value : v)
        isa::store_as<Wide<S>, isa::kLanes<Wide<S>>>(&value, isa::Vec<Wide<S>>{} + Wide<S>(noise()), isa::Part{1});
    return v;
}

template <class S>
double value(const S& s) {
    return isa::load_as<Wide<S>, isa::kLanes<Wide<S>>>(&s, isa::Part{1})[0];
}

// A table of asymmetric taps, and its transpose.
template <class T>
struct Tables {
    Tables(int n, int radius, bool circular)
        : n(n), radius(radius), band(n * (2 * radius + 1)), transposed(band.size()) {
        const int slots = 2 * radius + 1;
        std::vector<double> taps(slots);
        for (double& tap : taps) tap = noise();
        for (int i = 0; i < n; ++i)
            for (int s = 0; s < slots; ++s) {
                const int j = i + s - radius;
                if (!circular && (j < 0 || j >= n)) continue;
                band[i * slots + s] = T(taps[s]);
                transposed[((j % n + n) % n) * slots + 2 * radius - s] = T(taps[s]);
            }
    }
    int n, radius;
    std::vector<T> band, transposed;
};

template <class T>
std::vector<double> correlate(const std::vector<double>& x, int height, int width, const std::vector<T>& y_band, int ry,
                              const std::vector<T>& x_band, int rx) {
    std::vector<double> out(x.size());
    for (int i = 0; i < height; ++i)
        for (int j = 0; j < width; ++j)
            for (int s = -ry; s <= ry; ++s)
                for (int t = -rx; t <= rx; ++t) {
                    const int k = ((i + s) % height + height) % height, l = ((j + t) % width + width) % width;
                    out[i * width + j] += double(y_band[i * (2 * ry + 1) + s + ry]) *
                                          double(x_band[j * (2 * rx + 1) + t + rx]) * x[k * width + l];
                }
    return out;
}

int failures = 0;

void expect_close(double got, double wanted, double tolerance, const char* what) {
    if (std::fabs(got - wanted) <= tolerance * (1 + std::fabs(wanted))) return;
    if (failures++ < 5) std::printf("%s: got %g, want %g\n", what, got, wanted);
}

// d lacks the margins (my, mx), in which it counts as zero.
template <class S>
void check_images(DType dtype, double tolerance, int height, int width, int ry, int rx, bool circular, int my, int mx) {
    typedef Wide<S> T;
    const std::int64_t planes = 2, size = height * width, n = planes * size;
    const Tables<T> y(height, ry, circular), x_tables(width, rx, circular);
    const int d_height = height - 2 * my, d_width = width - 2 * mx;
    const auto x = image<S>(n), d = image<S>(planes * d_height * d_width), r = image<S>(n);
    std::vector<S> blurred(n), stepped(n);
    const Bands bands{{y.band.data(), ry}, {x_tables.band.data(), rx}, circular};
    const Bands adjoint{{y.transposed.data(), ry}, {x_tables.transposed.data(), rx}, circular};
    isa::blur(dtype, x.data(), blurred.data(), {planes, height, width}, bands, 1);
    isa::gradient(dtype, {x.data(), d.data(), my, mx, r.data(), stepped.data(), true, 0.5, bands, adjoint},
                  {planes, height, width}, 1);
    for (std::int64_t plane = 0; plane < planes; ++plane) {
        std::vector<double> wide(size);
        for (std::int64_t i = 0; i < size; ++i) wide[i] = value(x[plane * size + i]);
        auto u = correlate(wide, height, width, y.band, ry, x_tables.band, rx);
        for (std::int64_t i = 0; i < size; ++i) {
            expect_close(value(blurred[plane * size + i]), u[i], tolerance, "blur");
            const int row = int(i / width) - my, column = int(i % width) - mx;
            if (row >= 0 && row < d_height && column >= 0 && column < d_width)
                u[i] -= value(d[(plane * d_height + row) * d_width + column]);
        }
        const auto g = correlate(u, height, width, y.transposed, ry, x_tables.transposed, rx);
        for (std::int64_t i = 0; i < size; ++i)
            expect_close(value(stepped[plane * size + i]), wide[i] - 0.5 * (g[i] + value(r[plane * size + i])),
                         tolerance, "gradient_step");
    }
}

template <class S, class H>
void check_anderson(DType dtype, DType history, double tolerance, std::int64_t size) {
    const std::int64_t samples = 2, n = samples * size;
    const auto x = image<S>(n), f = image<S>(n);
    std::vector<std::vector<H>> residuals;
    std::vector<std::vector<S>> images;
    Append append = {};
    Mix mix = {};
    const int memory = 6;
    for (int j = 0; j < memory; ++j) {
        residuals.push_back(image<H>(n));
        images.push_back(image<S>(n));
    }
    std::vector<double> products(samples * (memory + 2)), alpha(samples * memory, 0.25);
    for (int j = 0; j < memory; ++j) {
        append.residuals[j] = residuals[j].data();
        mix.images[j] = images[j].data();
    }
    append.x = x.data();
    append.f = f.data();
    append.slot = 2;
    append.filled = memory;
    append.products = products.data();
    isa::append(dtype, history, append, samples, size, 1);
    std::vector<S> mixed(n);
    mix.count = memory;
    mix.alpha = alpha.data();
    mix.out = mixed.data();
    isa::mix(dtype, mix, samples, size, 1);
    for (std::int64_t i = 0; i < n; ++i) {
        double sum = 0;
        for (int j = 0; j < memory; ++j) sum += 0.25 * value(images[j][i]);
        expect_close(value(mixed[i]), sum, tolerance, "mix");
    }
    for (std::int64_t sample = 0; sample < samples; ++sample)
        for (int j = 0; j < memory; ++j) {
            double sum = 0;
            for (std::int64_t i = sample * size; i < (sample + 1) * size; ++i)
                sum += value(residuals[2][i]) * value(residuals[j][i]);
            expect_close(products[sample * (memory + 2) + j], sum, 1e-9, "append");
        }
}

// Solves x = c x + b, whose samples converge, spend their budget or diverge, and compares with the fixed points.
template <class S, class H>
void check_solve(DType dtype, DType history, double tol, std::int64_t size) {
    const std::int64_t samples = 5, n = samples * size;
    const int memory = 4, steps = 60;
    const bool differences = !std::is_same_v<S, H>;
    auto x = image<S>(n), next = image<S>(n), f = image<S>(n);
    const auto b = image<float>(n);
    std::vector<float> c(n);
    for (std::int64_t i = 0; i < n; ++i) c[i] = i / size == 1 ? 1e6f : float(0.2 + noise());
    std::vector<H> residuals(memory * n), changes(differences ? memory * n : 0);
    std::vector<S> images(differences ? n : memory * n), found(n), following(n);
    std::vector<double> relative(samples, NAN), gram(samples * memory * memory);
    std::vector<double> partials(samples * anderson_chunks(size) * (memory + 2));
    std::vector<std::int64_t> iterations(samples), status(samples, kMaxIter), budget(samples, steps), rows;
    const std::unique_ptr<bool[]> running(new bool[samples]);
    for (std::int64_t sample = 0; sample < samples; ++sample) running[sample] = true;
    budget[3] = 1;
    std::vector<AndersonSample> states(samples);
    Anderson a = {dtype,
                  history,
                  memory,
                  samples,
                  size,
                  tol,
                  0,
                  1e-10,
                  -1,
                  budget.data(),
                  residuals.data(),
                  images.data(),
                  changes.data(),
                  found.data(),
                  following.data(),
                  relative.data(),
                  iterations.data(),
                  status.data(),
                  running.get(),
                  states.data(),
                  gram.data(),
                  partials.data(),
                  0};
    for (std::int64_t sample = 0; sample < samples; ++sample) rows.push_back(sample);
    for (; a.steps < steps; ++a.steps) {
        if (a.steps == 2) {  // sample 2 leaves the batch
            for (std::int64_t i = 3 * size; i < n; ++i) x[i - size] = x[i];
            for (std::int64_t i = 3 * size; i < n; ++i) next[i - size] = next[i];
            rows.erase(rows.begin() + 2);
            x.resize(n - size), next.resize(n - size), f.resize(n - size);
            x.shrink_to_fit(), next.shrink_to_fit(), f.shrink_to_fit();
        }
        for (std::size_t k = 0; k < x.size(); ++k) {
            const std::int64_t i = rows[k / size] * size + k % size;
            const Wide<S> exact = Wide<S>(c[i] * value(x[k]) + b[i]);
            isa::store_as<Wide<S>, isa::kLanes<Wide<S>>>(&f[k], isa::Vec<Wide<S>>{} + exact, isa::Part{1});
        }
        isa::anderson_step(a, x.data(), f.data(), next.data(), rows.data(), rows.size(), 1);
        std::swap(x, next);
    }
    expect_close(status[0] + status[4], 2 * kConverged, 0, "status");
    expect_close(status[1], kDiverged, 0, "status of a divergent map");
    expect_close(status[3] + iterations[3], kMaxIter + 1, 0, "budget");
    for (const std::int64_t sample : {0, 4}) {
        double error = 0, norm = 0;
        for (std::int64_t i = sample * size; i < (sample + 1) * size; ++i) {
            const double exact = b[i] / (1 - c[i]);
            error += std::pow(value(found[i]) - exact, 2) + std::pow(value(following[i]) - exact, 2);
            norm += exact * exact;
        }
        expect_close(std::sqrt(error), 0, 20 * tol * std::sqrt(norm), "solve");
    }
}

template <class S>
void check_convolution(DType dtype, double tolerance, int height, int width, int in, int out, bool relu) {
    const ImageShape shape{2, height, width, in, out};
    const auto x = image<S>(2 * height * width * in);
    const auto weight = image<float>(out * in * 9), bias = image<float>(out);
    std::vector<float> transformed(36 * winograd_plane(in, out));
    std::vector<S> convolved(2 * height * width * out);
    isa::winograd_weights(weight.data(), {9 * in, 9, 1}, transformed.data(), in, out, false, 1);
    isa::convolution(dtype, {x.data(), transformed.data(), bias.data(), convolved.data(), relu}, shape, 1);
    for (int pixel = 0; pixel < 2 * height * width; ++pixel)
        for (int o = 0; o < out; ++o) {
            const int y = pixel / width % height, z = pixel % width;
            double sum = bias[o];
            for (int i = -1; i <= 1; ++i)
                for (int j = -1; j <= 1; ++j) {
                    if (y + i < 0 || y + i >= height || z + j < 0 || z + j >= width) continue;
                    const S* const from = x.data() + (pixel + i * width + j) * in;
                    for (int c = 0; c < in; ++c) sum += value(from[c]) * weight[(o * in + c) * 9 + 3 * i + j + 4];
                }
            expect_close(value(convolved[pixel * out + o]), relu && sum < 0 ? 0 : sum, tolerance, "convolution");
        }
}

template <class S>
void check_weight_gradient(DType dtype, int height, int width, int in, int out) {
    const ImageShape shape{2, height, width, in, out};
    const auto x = image<S>(2 * height * width * in), gradient = image<S>(2 * height * width * out);
    std::vector<float> weight(out * in * 9), bias(out);
    isa::weight_gradient(dtype, {x.data(), gradient.data(), weight.data(), bias.data()}, shape, 1);
    for (int o = 0; o < out; ++o) {
        double total = 0;
        std::vector<double> sums(in * 9);
        for (int pixel = 0; pixel < 2 * height * width; ++pixel) {
            const int y = pixel / width % height, z = pixel % width;
            const double g = value(gradient[pixel * out + o]);
            total += g;
            for (int i = -1; i <= 1; ++i)
                for (int j = -1; j <= 1; ++j) {
                    if (y + i < 0 || y + i >= height || z + j < 0 || z + j >= width) continue;
                    const S* const from = x.data() + (pixel + i * width + j) * in;
                    for (int c = 0; c < in; ++c) sums[c * 9 + 3 * i + j + 4] += g * value(from[c]);
                }
        }
        expect_close(bias[o], total, 1e-4, "bias gradient");
        for (int k = 0; k < in * 9; ++k) expect_close(weight[o * in * 9 + k], sums[k], 1e-4, "weight gradient");
    }
}

}  // namespace

int main() {
    const int sizes[][2] = {{1, 1}, {1, 37}, {7, 13}, {19, 33}, {16, 32}, {5, 3}};
    const int radii[][2] = {{0, 0}, {1, 2}, {2, 1}, {4, 3}, {6, 5}};
    for (const auto& size : sizes)
        for (const auto& radius : radii)
            for (const bool circular : {false, true}) {
                const int height = size[0], width = size[1], ry = radius[0], rx = radius[1];
                if (circular && (ry > height || rx > width)) continue;
                for (const bool margins : {false, true}) {
                    const int my = margins ? ry : 0, mx = margins ? rx : 0;
                    if (margins && (circular || 2 * my >= height || 2 * mx >= width)) continue;
                    check_images<double>(DType::kFloat64, 1e-12, height, width, ry, rx, circular, my, mx);
                    check_images<float>(DType::kFloat32, 1e-4, height, width, ry, rx, circular, my, mx);
                    check_images<bfloat16>(DType::kBFloat16, 2e-2, height, width, ry, rx, circular, my, mx);
                    check_images<float16>(DType::kFloat16, 4e-3, height, width, ry, rx, circular, my, mx);
                }
            }
    for (const std::int64_t size : {1, 7, 2049, 4100}) {
        check_anderson<double, double>(DType::kFloat64, DType::kFloat64, 1e-12, size);
        check_anderson<float, float>(DType::kFloat32, DType::kFloat32, 1e-5, size);
        check_anderson<float, bfloat16>(DType::kFloat32, DType::kBFloat16, 1e-2, size);
        check_anderson<float16, float16>(DType::kFloat16, DType::kFloat16, 4e-3, size);
        check_solve<double, double>(DType::kFloat64, DType::kFloat64, 1e-8, size);
        check_solve<float, float>(DType::kFloat32, DType::kFloat32, 1e-4, size);
        check_solve<float, bfloat16>(DType::kFloat32, DType::kBFloat16, 1e-3, size);
        check_solve<bfloat16, bfloat16>(DType::kBFloat16, DType::kBFloat16, 2e-2, size);
    }
    const int channels[][2] = {{1, 1}, {3, 17}, {16, 16}, {20, 80}};
    for (const auto& size : sizes)
        for (const auto& c : channels) {
            const int height = size[0], width = size[1];
            if (c[1] == 80 && height * width > 100) continue;  // a second for each, in unoptimised code
            check_convolution<float>(DType::kFloat32, 1e-4, height, width, c[0], c[1], c[0] > 3);
            check_convolution<bfloat16>(DType::kBFloat16, 1e-2, height, width, c[0], c[1], c[0] > 3);
            check_weight_gradient<float>(DType::kFloat32, height, width, c[0], c[1]);
            check_weight_gradient<bfloat16>(DType::kBFloat16, height, width, c[0], c[1]);
        }
    std::printf("%d failures\n", failures);
    return failures ? 1 : 0;
}
