// This instruction set's kernels.
#include "isa.h"

#define JFBFAST_QUOTE(name) #name
#define JFBFAST_NAME(name) JFBFAST_QUOTE(name)

namespace jfbfast {
namespace JFBFAST_ISA {

extern const Kernels table;
const Kernels table = {JFBFAST_NAME(JFBFAST_ISA), blur, gradient, append, mix, mix_differences, winograd_weights,
                       convolution, weight_gradient};

}  // namespace JFBFAST_ISA
}  // namespace jfbfast
