// jfbfast._native: the CPU kernels, called with addresses. The caller checks shapes and dtypes.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cmath>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "dlpack.h"
#include "kernels.h"
#include "pool.h"

namespace py = pybind11;
using namespace jfbfast;

namespace {

typedef std::uintptr_t Address;
typedef std::pair<Address, int> BandAddress;  // the table and its radius

template <class T = void>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

Band band(const BandAddress& b) { return {pointer(b.first), b.second}; }

Bands bands(const BandAddress& y, const BandAddress& x, bool circular) { return {band(y), band(x), circular}; }

Shape shape_of(const std::vector<std::int64_t>& shape) { return {shape.at(0), shape.at(1), shape.at(2)}; }

void check_memory(std::size_t count) {
    if (count > kMaxMemory) throw py::value_error("memory: got more than " + std::to_string(kMaxMemory) + " pairs");
}

int size_of(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

// A block of the pool, with the shape and strides that its tensor points to.
struct Block : dlpack::ManagedTensor {
    std::vector<std::int64_t> shape, strides;
    std::size_t bytes;
};

void release_block(dlpack::ManagedTensor* tensor) {
    Block* const block = static_cast<Block*>(tensor);
    give_memory(block->tensor.data, block->bytes);
    delete block;
}

// An uninitialised dense tensor with these strides, as a DLPack capsule. (Permuting it in torch instead would make it a
// view, and autograd forbids writing in place to a view that a custom function returns.)
py::capsule empty(const std::vector<std::int64_t>& shape, const std::vector<std::int64_t>& strides, DType dtype) {
    const int size = size_of(dtype);
    const std::uint8_t code = dtype == DType::kBFloat16 ? 4 : 2;
    Block* const block = new Block{{}, shape, strides, std::size_t(size)};
    for (std::int64_t n : shape) block->bytes *= std::size_t(n);
    block->deleter = release_block;
    dlpack::Tensor& tensor = block->tensor;
    tensor.data = take_memory(block->bytes);
    tensor.device = {1, 0};
    tensor.dimensions = int(shape.size());
    tensor.dtype = {code, std::uint8_t(8 * size), 1};
    tensor.shape = block->shape.data();
    tensor.strides = block->strides.data();
    tensor.byte_offset = 0;
    return py::capsule(static_cast<dlpack::ManagedTensor*>(block), "dltensor", [](PyObject* capsule) {
        if (PyCapsule_IsValid(capsule, "dltensor"))  // no tensor took it over
            release_block(static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor")));
    });
}

// One solve by Anderson's method. The caller owns the tensors at these addresses.
class Solve {
public:
    // numbers: tol, atol, regularization, stall_floor. tensors: residuals, images, differences, value, following,
    // residual, iterations, status, running, budget.
    Solve(DType dtype, DType history, int memory, std::int64_t samples, std::int64_t size,
          const std::array<double, 4>& numbers, const std::array<Address, 10>& tensors)
        : states_(samples), gram_(samples * memory * memory),
          partials_(samples * anderson_chunks(size) * (memory + 2)) {
        a_ = {dtype,
              history,
              memory,
              samples,
              size,
              numbers[0],
              numbers[1],
              numbers[2],
              numbers[3],
              pointer<std::int64_t>(tensors[9]),
              pointer(tensors[0]),
              pointer(tensors[1]),
              pointer(tensors[2]),
              pointer(tensors[3]),
              pointer(tensors[4]),
              pointer<double>(tensors[5]),
              pointer<std::int64_t>(tensors[6]),
              pointer<std::int64_t>(tensors[7]),
              pointer<bool>(tensors[8]),
              states_.data(),
              gram_.data(),
              partials_.data(),
              0};
    }

    void step(Address x, Address f, Address next, int threads) {
        kernels().anderson_step(a_, pointer(x), pointer(f), pointer(next), left_ ? rows_.data() : nullptr,
                                left_ ? std::int64_t(rows_.size()) : a_.samples, threads);
        ++a_.steps;
    }

    // Continues with these of the present rows; `before` holds the iterates that were evaluated last.
    void select(const std::vector<std::int64_t>& kept, Address before) {
        const std::size_t bytes = std::size_t(a_.size) * size_of(a_.dtype);
        std::vector<std::int64_t> rows;
        for (std::int64_t row : kept) {
            const std::int64_t sample = left_ ? rows_.at(row) : row;
            rows.push_back(sample);
            if (states_.at(sample).saved) continue;
            std::memcpy(static_cast<char*>(a_.value) + sample * bytes, pointer<char>(before) + row * bytes, bytes);
            states_[sample].saved = true;
        }
        rows_ = std::move(rows);
        left_ = true;
    }

private:
    Anderson a_ = {};
    std::vector<AndersonSample> states_;
    std::vector<double> gram_, partials_;
    std::vector<std::int64_t> rows_;  // the sample of each row of x, once some have left
    bool left_ = false;
};

bool has_openmp() {
#ifdef _OPENMP
    return true;
#else
    return false;
#endif
}

}  // namespace

PYBIND11_MODULE(_native, module) {
    py::enum_<DType>(module, "DType")
        .value("float64", DType::kFloat64)
        .value("float32", DType::kFloat32)
        .value("bfloat16", DType::kBFloat16)
        .value("float16", DType::kFloat16);

    module.attr("isa") = kernels().name;
    module.attr("openmp") = has_openmp();

    module.def("empty", empty);

    const auto release = py::call_guard<py::gil_scoped_release>();

    module.def(
        "blur",
        [](DType dtype, Address x, Address out, const std::vector<std::int64_t>& shape, const BandAddress& y_band,
           const BandAddress& x_band, bool circular, int threads) {
            kernels().blur(dtype, pointer(x), pointer(out), shape_of(shape), bands(y_band, x_band, circular), threads);
        },
        release);

    module.def(
        "gradient",
        [](DType dtype, Address x, Address d, Address r, Address out, const std::vector<std::int64_t>& shape,
           const std::array<std::int64_t, 2>& d_margin, const BandAddress& y_band, const BandAddress& x_band,
           const BandAddress& y_adjoint, const BandAddress& x_adjoint, bool circular, bool step, double step_size,
           int threads) {
            kernels().gradient(dtype,
                               {pointer(x), pointer(d), d_margin[0], d_margin[1], pointer(r), pointer(out), step,
                                step_size, bands(y_band, x_band, circular), bands(y_adjoint, x_adjoint, circular)},
                               shape_of(shape), threads);
        },
        release);

    module.def(
        "anderson_append",
        [](DType dtype, DType history, Address x, Address f, const std::vector<Address>& residuals, int slot,
           Address gram, Address norms, int memory, std::int64_t samples, std::int64_t size, int threads) {
            const int filled = int(residuals.size());
            check_memory(residuals.size());
            Append append = {};
            append.x = pointer(x);
            append.f = pointer(f);
            for (int j = 0; j < filled; ++j) append.residuals[j] = pointer(residuals[j]);
            append.slot = slot;
            append.filled = filled;
            std::vector<double> products(samples * (filled + 2));
            append.products = products.data();
            kernels().append(dtype, history, append, samples, size, threads);
            for (std::int64_t sample = 0; sample < samples; ++sample) {
                double* g = pointer<double>(gram) + sample * memory * memory;
                const double* row = products.data() + sample * (filled + 2);
                for (int j = 0; j < filled; ++j) g[slot * memory + j] = g[j * memory + slot] = row[j];
                for (int k = 0; k < 2; ++k) pointer<double>(norms)[2 * sample + k] = std::sqrt(row[filled + k]);
            }
        },
        release);

    module.def(
        "anderson_weights",
        [](Address gram, Address valid, double regularization, Address alpha, std::int64_t samples, int memory) {
            check_memory(memory);
            anderson_weights(pointer<double>(gram), pointer<bool>(valid), regularization, pointer<double>(alpha),
                             samples, memory);
        },
        release);

    module.def(
        "anderson_mix",
        [](DType dtype, Address alpha, const std::vector<Address>& images, Address out, std::int64_t samples,
           std::int64_t size, int threads) {
            check_memory(images.size());
            Mix mix = {};
            for (std::size_t i = 0; i < images.size(); ++i) mix.images[i] = pointer(images[i]);
            mix.count = int(images.size());
            mix.alpha = pointer<double>(alpha);
            mix.out = pointer(out);
            kernels().mix(dtype, mix, samples, size, threads);
        },
        release);

    module.attr("MAX_MEMORY") = kMaxMemory;
    module.attr("DIVERGED_GROWTH") = kDivergedGrowth;
    module.attr("SAFEGUARD_GROWTH") = kSafeguardGrowth;
    module.attr("STALL_FALL") = kStallFall;
    module.attr("STALL_WINDOW") = kStallWindow;
    py::class_<Solve>(module, "Anderson")
        .def(py::init<DType, DType, int, std::int64_t, std::int64_t, const std::array<double, 4>&,
                      const std::array<Address, 10>&>())
        .def("step", &Solve::step, release)
        .def("select", &Solve::select, release);

    module.def("winograd_size", [](std::int64_t in, std::int64_t out) { return 36 * winograd_plane(in, out); });

    module.def(
        "winograd_weights",
        [](Address weight, const std::array<std::int64_t, 3>& strides, Address out, std::int64_t in_channels,
           std::int64_t out_channels, bool adjoint, int threads) {
            kernels().winograd_weights(pointer<float>(weight), {strides[0], strides[1], strides[2]},
                                       pointer<float>(out), in_channels, out_channels, adjoint, threads);
        },
        release);

    module.def(
        "convolution",
        [](DType dtype, Address x, Address weights, Address bias, Address out, bool relu,
           const std::array<std::int64_t, 5>& shape, int threads) {
            kernels().convolution(dtype,
                                  {pointer(x), pointer<float>(weights), pointer<float>(bias), pointer(out), relu},
                                  {shape[0], shape[1], shape[2], shape[3], shape[4]}, threads);
        },
        release);

    module.def(
        "weight_gradient",
        [](DType dtype, Address x, Address gradient, Address weight, Address bias,
           const std::array<std::int64_t, 5>& shape, int threads) {
            kernels().weight_gradient(dtype,
                                      {pointer(x), pointer(gradient), pointer<float>(weight), pointer<float>(bias)},
                                      {shape[0], shape[1], shape[2], shape[3], shape[4]}, threads);
        },
        release);
}
