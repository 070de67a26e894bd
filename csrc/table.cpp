// The table of this instruction set's kernels.
#include "isa.h"

#define JFBFAST_QUOTE(name) #name
#define JFBFAST_NAME(name) JFBFAST_QUOTE(name)

namespace jfbfast {
namespace JFBFAST_ISA {

extern const Kernels table;  // constexpr: no code of this instruction set may run when the module is loaded
constexpr Kernels table = [] {
    Kernels kernels = {};
    kernels.name = JFBFAST_NAME(JFBFAST_ISA);
    kernels.blur = blur;
    kernels.gradient = gradient;
    kernels.append = append;
    kernels.mix = mix;
    kernels.anderson_step = anderson_step;
    kernels.winograd_weights = winograd_weights;
    kernels.convolution = convolution;
    kernels.weight_gradient = weight_gradient;
    return kernels;
}();

}  // namespace JFBFAST_ISA
}  // namespace jfbfast
