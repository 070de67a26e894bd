// Runs tasks in parallel with OpenMP, or one after another if the compiler has no OpenMP.
#pragma once

#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace jfbfast {
namespace JFBFAST_ISA {

// Calls body(task, thread) for each task. The body must not throw.
template <class Body>
inline void parallel_for(std::int64_t tasks, int threads, const Body& body) {
#ifdef _OPENMP
    if (threads > 1 && tasks > 1) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
        for (std::int64_t k = 0; k < tasks; ++k) body(k, omp_get_thread_num());
        return;
    }
#endif
    for (std::int64_t k = 0; k < tasks; ++k) body(k, 0);
}

// The number of threads worth starting for this many elements.
inline int useful_threads(int threads, std::int64_t elements) {
    const std::int64_t useful = elements / 8192;
    return useful < 1 ? 1 : useful < threads ? int(useful) : threads;
}

}  // namespace JFBFAST_ISA
}  // namespace jfbfast
