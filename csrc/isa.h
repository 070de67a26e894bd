// What each instruction set's translation units hand to its table of kernels.
#pragma once

#include "kernels.h"

namespace jfbfast {
namespace JFBFAST_ISA {

void blur(DType, const void* x, void* out, Shape, const Bands&, int threads);
void gradient(DType, const Gradient&, Shape, int threads);
void append(DType, DType history, const Append&, std::int64_t samples, std::int64_t size, int threads);
void mix(DType, const Mix&, std::int64_t samples, std::int64_t size, int threads);
void mix_differences(DType, DType history, const MixDifferences&, std::int64_t samples, std::int64_t size,
                     int threads);
void winograd_weights(const float* weight, float* out, std::int64_t in_channels, std::int64_t out_channels,
                      int threads);
void convolution(const Convolution&, const ImageShape&, int threads);
void weight_gradient(const WeightGradient&, const ImageShape&, int threads);

// Calls body(S{}) with the storage type of a dtype.
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
