// The kernels of the instruction set that this translation unit is compiled for.
#pragma once

#include <type_traits>

#include "kernels.h"

namespace jfbfast {
namespace JFBFAST_ISA {

// The type of the function that a member of `Kernels` points to.
template <class Pointer>
using Function = std::remove_pointer_t<Pointer>;

Function<decltype(Kernels::blur)> blur;
Function<decltype(Kernels::gradient)> gradient;
Function<decltype(Kernels::append)> append;
Function<decltype(Kernels::mix)> mix;
Function<decltype(Kernels::anderson_step)> anderson_step;
Function<decltype(Kernels::winograd_weights)> winograd_weights;
Function<decltype(Kernels::convolution)> convolution;
Function<decltype(Kernels::weight_gradient)> weight_gradient;

// Calls body(S{}) with the storage type S of a dtype.
template <class Body>
inline void with_dtype(DType dtype, Body body) {
    switch (dtype) {
        case DType::kFloat64: return body(double{});
        case DType::kFloat32: return body(float{});
        case DType::kBFloat16: return body(bfloat16{});
        case DType::kFloat16: return body(float16{});
    }
}

}  // namespace JFBFAST_ISA
}  // namespace jfbfast
