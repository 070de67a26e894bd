// One Anderson solve with the emulated kernels, driven over a pipe: the parent applies the layer.
//
//   driver DTYPE DIFFERENCES MEMORY SAMPLES SIZE TOL ATOL REGULARIZATION SEED
//
// reads x [samples, size]; then, for each byte 's', f [rows, size], and answers the next x; for the
// byte 'r', a count and so many rows of x to go on with, once; at the byte 'e' it answers value, following,
// relative residual, status, iterations. Each array on the heap has its exact size.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <string>
#include <vector>

#include "append.cu"
#include "mix.cu"
#include "update.cu"

using namespace jfbfast::cuda;

namespace {

template <class T>
T* array(std::int64_t count, T fill) {
    T* const out = static_cast<T*>(std::malloc(count * sizeof(T)));
    for (std::int64_t i = 0; i < count; ++i) out[i] = fill;
    return out;
}

template <class T>
void receive(T* data, std::int64_t count) {
    if (std::fread(data, sizeof(T), count, stdin) != static_cast<std::size_t>(count)) std::exit(2);
}

template <class T>
void send(const T* data, std::int64_t count) {
    std::fwrite(data, sizeof(T), count, stdout);
}

template <class T>
void solve(Anderson a) {
    const T nan = std::numeric_limits<T>::quiet_NaN();
    const std::int64_t pixels = a.samples * a.size;
    a.residuals = array<T>(a.ring() * pixels, nan);
    a.images = array<T>(a.ring() * pixels, nan);
    if (a.differences) {
        a.residual_differences = array<bfloat16>((a.memory - 1) * pixels, bfloat16(NAN));
        a.image_differences = array<bfloat16>((a.memory - 1) * pixels, bfloat16(NAN));
    }
    T* const value = array<T>(pixels, nan);
    a.value = value;
    T* const following = array<T>(pixels, nan);
    a.following = following;
    a.status = array<int>(a.samples, kRunning);
    a.action = array<int>(a.samples, kRest);
    a.iterations = array<int>(a.samples, 0);
    a.pairs = array<int>(a.samples, 0);
    a.best = array<int>(a.samples, -1);
    a.residual = array<double>(a.samples, NAN);
    a.lowest = array<double>(a.samples, INFINITY);
    a.guarded = array<double>(a.samples, INFINITY);
    a.first_residual = array<double>(a.samples, NAN);
    a.first_image = array<double>(a.samples, NAN);
    a.gram = array<double>(a.samples * a.memory * a.memory, NAN);
    a.weights = array<double>(a.samples * a.memory, NAN);
    a.partials = array<double>(a.samples * a.products() * chunks(a.size), NAN);
    int batch = static_cast<int>(a.samples);
    T* x = array<T>(pixels, nan);
    T* f = array<T>(pixels, nan);
    int* rows = nullptr;

    receive(x, pixels);
    std::copy(x, x + pixels, value);
    for (int command = std::getchar(); command != 'e'; command = std::getchar()) {
        if (command == 'r') {
            receive(&batch, 1);
            int* const keep = array<int>(batch, 0);
            receive(keep, batch);
            T* const kept = array<T>(batch * a.size, nan);
            for (int i = 0; i < batch; ++i) std::copy_n(x + keep[i] * a.size, a.size, kept + i * a.size);
            rows = keep;
            x = kept;
            f = array<T>(batch * a.size, nan);
            continue;
        }
        receive(f, batch * a.size);
        append(a, x, f, rows, batch, nullptr);
        update(a, rows, batch, nullptr);
        mix(a, x, f, rows, batch, nullptr);
        send(x, batch * a.size);
        std::fflush(stdout);
    }
    finish(a, nullptr);
    send(value, pixels);
    send(following, pixels);
    send(a.residual, a.samples);
    send(a.status, a.samples);
    send(a.iterations, a.samples);
}

}  // namespace

int main(int, char** argv) {
    Anderson a{};
    a.dtype = argv[1] == std::string("float64") ? DType::kFloat64 : DType::kFloat32;
    a.differences = std::atoi(argv[2]);
    a.memory = std::atoi(argv[3]);
    a.samples = std::atoll(argv[4]);
    a.size = std::atoll(argv[5]);
    a.tol = std::atof(argv[6]);
    a.atol = std::atof(argv[7]);
    a.regularization = std::atof(argv[8]);
    emulate::seed = std::atoi(argv[9]);
    if (a.dtype == DType::kFloat64) {
        solve<double>(a);
    } else {
        solve<float>(a);
    }
}
