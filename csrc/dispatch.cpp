// Picks the kernels for this CPU. The build defines JFBFAST_X86 if it compiled all three sets.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace jfbfast {

namespace baseline {
extern const Kernels table;
}

#ifdef JFBFAST_X86
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
#endif

namespace {

const Kernels& choose() {
#ifdef JFBFAST_X86
    const char* const bound = std::getenv("JFBFAST_ISA");  // jfbfast/backends/native.py has checked the name
    const auto bounded_by = [bound](const char* name) { return bound && std::strcmp(bound, name) == 0; };
    const bool avx2_allowed = !bounded_by("baseline"), avx512_allowed = avx2_allowed && !bounded_by("avx2");
    if (avx512_allowed && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return avx512::table;
    if (avx2_allowed && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2::table;
#endif
    return baseline::table;
}

}  // namespace

const Kernels& kernels() {
    static const Kernels& chosen = choose();
    return chosen;
}

}  // namespace jfbfast
