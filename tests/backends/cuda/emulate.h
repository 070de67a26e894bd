// Runs CUDA kernels on the CPU: one fiber a thread, one block after another, with or without
// AddressSanitizer.
//
// Blocks, and the threads of a block between two barriers, run in an order shuffled by a seed.
// Shared memory is a heap array of its exact size and holds NaN when a block begins. A barrier that
// some thread of its block or warp never reaches ends the program.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#else
inline void __sanitizer_start_switch_fiber(void**, const void*, std::size_t) {}
inline void __sanitizer_finish_switch_fiber(void*, const void**, std::size_t*) {}
#endif

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __syncthreads() emulate::sync_block()
#define JFB_LAUNCH(kernel, blocks, stream, ...) \
    emulate::launch(stream, static_cast<unsigned>(blocks), kThreads, [&] { kernel(__VA_ARGS__); })
#define JFB_SHARED(type, name, count) static type* const name = emulate::shared<type>(count)

struct Index {
    unsigned x;
};
inline Index threadIdx, blockIdx, blockDim, gridDim;

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};

template <class Word>
void __stwb(Word* address, Word value) {
    *address = value;
}

using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int*) { return cudaSuccess; }
struct cudaFuncAttributes {};
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel) {
    return cudaSuccess;
}
using std::isfinite;
using std::sqrt;

namespace emulate {

constexpr std::size_t kStack = 64 * 1024;
constexpr unsigned kWarp = 32;

inline unsigned seed = 0;

struct Array {
    std::unique_ptr<char[]> bytes;
    std::size_t size;

    void poison() { std::memset(bytes.get(), 0xff, size); }  // NaN, as float and as double
};
inline std::vector<Array> shared_arrays;

template <class T>
T* shared(std::size_t count) {
    const std::size_t size = count * sizeof(T);
    shared_arrays.push_back({std::unique_ptr<char[]>(new char[size]), size});
    shared_arrays.back().poison();
    return reinterpret_cast<T*>(shared_arrays.back().bytes.get());
}

// Threads that wait for each other; `round` counts how often they have met.
struct Barrier {
    unsigned size = 0, waiting = 0, round = 0;
};

struct Thread {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[kStack]};
    void* fake_stack = nullptr;  // AddressSanitizer's
    Barrier* barrier = nullptr;
    unsigned round = 0;
    bool finished = false;

    bool ready() const { return !finished && (!barrier || barrier->round != round); }
};

struct Warp {
    Barrier barrier;
    double posted[2][kWarp];  // by the parity of the round: a thread is at most one round ahead
};

struct Scheduler {
    ucontext_t context;
    void* fake_stack = nullptr;
    const void* stack = nullptr;
    std::size_t stack_size = 0;
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    Barrier block;
    const std::function<void()>* kernel = nullptr;
    unsigned current = 0;
};
inline Scheduler scheduler;

[[noreturn]] inline void fail(const char* why) {
    std::fprintf(stderr, "emulate: %s\n", why);
    std::abort();
}

inline void leave(Thread& thread, bool for_good) {
    void** const fake_stack = for_good ? nullptr : &thread.fake_stack;
    __sanitizer_start_switch_fiber(fake_stack, scheduler.stack, scheduler.stack_size);
    swapcontext(&thread.context, &scheduler.context);
    __sanitizer_finish_switch_fiber(thread.fake_stack, nullptr, nullptr);
}

inline void wait(Barrier& barrier) {
    Thread& thread = scheduler.threads[scheduler.current];
    thread.round = barrier.round;
    thread.barrier = &barrier;
    if (++barrier.waiting == barrier.size) {
        barrier.waiting = 0;
        ++barrier.round;
    }
    leave(thread, false);
}

inline void sync_block() { wait(scheduler.block); }

inline void run_thread() {
    __sanitizer_finish_switch_fiber(nullptr, &scheduler.stack, &scheduler.stack_size);
    (*scheduler.kernel)();
    Thread& thread = scheduler.threads[scheduler.current];
    thread.finished = true;
    leave(thread, true);
}

inline void enter(unsigned index) {
    Thread& thread = scheduler.threads[index];
    scheduler.current = index;
    threadIdx.x = index;
    __sanitizer_start_switch_fiber(&scheduler.fake_stack, thread.stack.get(), kStack);
    swapcontext(&scheduler.context, &thread.context);
    __sanitizer_finish_switch_fiber(scheduler.fake_stack, nullptr, nullptr);
}

inline void run_block(std::mt19937& random) {
    const unsigned count = blockDim.x;
    scheduler.threads.resize(count);
    scheduler.warps.assign(count / kWarp, Warp{});
    scheduler.block = {count, 0, 0};
    for (Warp& warp : scheduler.warps) warp.barrier.size = kWarp;
    for (Thread& thread : scheduler.threads) {
        thread.barrier = nullptr;
        thread.finished = false;
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = thread.stack.get();
        thread.context.uc_stack.ss_size = kStack;
        makecontext(&thread.context, run_thread, 0);
    }
    for (Array& array : shared_arrays) array.poison();

    std::vector<unsigned> order(count);
    std::iota(order.begin(), order.end(), 0u);
    for (unsigned finished = 0; finished < count;) {
        if (seed) std::shuffle(order.begin(), order.end(), random);
        bool progress = false;
        finished = 0;
        for (unsigned index : order) {
            if (scheduler.threads[index].ready()) {
                enter(index);
                progress = true;
            }
            finished += scheduler.threads[index].finished;
        }
        if (!progress) fail("a barrier that not every thread reaches");
    }
}

inline void launch(void*, unsigned blocks, unsigned threads, const std::function<void()>& kernel) {
    std::mt19937 random(seed);
    std::vector<unsigned> order(blocks);
    std::iota(order.begin(), order.end(), 0u);
    if (seed) std::shuffle(order.begin(), order.end(), random);
    scheduler.kernel = &kernel;
    gridDim.x = blocks;
    blockDim.x = threads;
    for (unsigned block : order) {
        blockIdx.x = block;
        run_block(random);
    }
}

inline double exchange(double value, unsigned from) {
    const unsigned lane = threadIdx.x % kWarp;
    Warp& warp = scheduler.warps[threadIdx.x / kWarp];
    double* posted = warp.posted[warp.barrier.round % 2];
    posted[lane] = value;
    wait(warp.barrier);
    return posted[from];
}

}  // namespace emulate

inline double __shfl_xor_sync(unsigned, double value, int mask) {
    return emulate::exchange(value, (threadIdx.x % emulate::kWarp) ^ static_cast<unsigned>(mask));
}
