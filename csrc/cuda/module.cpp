// jfbfast._cuda: Anderson's kernels, called with addresses. The caller checks shapes, dtypes and lifetimes.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "anderson.h"

namespace py = pybind11;
using namespace jfbfast::cuda;

namespace {

using Address = std::uintptr_t;

template <class T = void>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

void check(const char* error) {
    if (error) throw std::runtime_error(std::string("CUDA: ") + error);
}

// Gives Python access to a pointer of the state, as an integer address.
template <class T>
void address(py::class_<Anderson>& anderson, const char* name, T* Anderson::* field) {
    anderson.def_property(
        name, [field](const Anderson& a) { return reinterpret_cast<Address>(a.*field); },
        [field](Anderson& a, Address value) { a.*field = pointer<T>(value); });
}

void step(const Anderson& a, int device, Address stream, Address x, Address f, Address rows, int batch) {
    check(use_device(device));
    check(append(a, pointer(x), pointer(f), pointer<int>(rows), batch, pointer(stream)));
    check(update(a, pointer<int>(rows), batch, pointer(stream)));
    check(mix(a, pointer(x), pointer(f), pointer<int>(rows), batch, pointer(stream)));
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
    module.attr("MAX_MEMORY") = kMaxMemory;
    module.attr("DIVERGED_GROWTH") = kDivergedGrowth;
    module.attr("SAFEGUARD_GROWTH") = kSafeguardGrowth;
    module.attr("STALL_FALL") = kStallFall;
    module.attr("STALL_WINDOW") = kStallWindow;
    module.attr("RUNNING") = int(kRunning);
    module.attr("CONVERGED") = int(kConverged);
    module.attr("MAX_ITER") = int(kMaxIter);
    module.attr("DIVERGED") = int(kDiverged);
    module.def("why_unusable", [](int device) {
        const char* why = why_unusable(device);
        return why ? std::optional<std::string>(why) : std::nullopt;
    });

    py::class_<Anderson> anderson(module, "Anderson");
    anderson
        .def(py::init([](bool float64, bool differences, int memory, std::int64_t samples, std::int64_t size,
                         double tol, double atol, double regularization, double stall_floor) {
                 Anderson a{};
                 a.dtype = float64 ? DType::kFloat64 : DType::kFloat32;
                 a.differences = differences;
                 a.memory = memory;
                 a.samples = samples;
                 a.size = size;
                 a.tol = tol;
                 a.atol = atol;
                 a.regularization = regularization;
                 a.stall_floor = stall_floor;
                 return a;
             }),
             py::kw_only(), py::arg("float64"), py::arg("differences"), py::arg("memory"), py::arg("samples"),
             py::arg("size"), py::arg("tol"), py::arg("atol"), py::arg("regularization"), py::arg("stall_floor"))
        .def_property_readonly("ring", &Anderson::ring)
        .def_property_readonly("products", &Anderson::products)
        .def_property_readonly("chunks", [](const Anderson& a) { return chunks(a.size); })
        .def("step", &step, py::arg("device"), py::arg("stream"), py::arg("x"), py::arg("f"), py::arg("rows"),
             py::arg("batch"), py::call_guard<py::gil_scoped_release>())
        .def(
            "finish",
            [](const Anderson& a, int device, Address stream) {
                check(use_device(device));
                check(finish(a, pointer(stream)));
            },
            py::arg("device"), py::arg("stream"), py::call_guard<py::gil_scoped_release>());
    address(anderson, "residuals", &Anderson::residuals);
    address(anderson, "images", &Anderson::images);
    address(anderson, "residual_differences", &Anderson::residual_differences);
    address(anderson, "image_differences", &Anderson::image_differences);
    address(anderson, "value", &Anderson::value);
    address(anderson, "following", &Anderson::following);
    address(anderson, "status", &Anderson::status);
    address(anderson, "action", &Anderson::action);
    address(anderson, "iterations", &Anderson::iterations);
    address(anderson, "pairs", &Anderson::pairs);
    address(anderson, "best", &Anderson::best);
    address(anderson, "residual", &Anderson::residual);
    address(anderson, "lowest", &Anderson::lowest);
    address(anderson, "guarded", &Anderson::guarded);
    address(anderson, "budget", &Anderson::budget);
    address(anderson, "since", &Anderson::since);
    address(anderson, "mark", &Anderson::mark);
    address(anderson, "first_residual", &Anderson::first_residual);
    address(anderson, "first_image", &Anderson::first_image);
    address(anderson, "gram", &Anderson::gram);
    address(anderson, "weights", &Anderson::weights);
    address(anderson, "partials", &Anderson::partials);
}
