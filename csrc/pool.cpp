// The system maps and zeroes a fresh block of megabytes page by page at the first write, which takes longer than a
// kernel, and the C library returns such a block to the system as soon as it is freed. So freed blocks are kept here.
// No caller waits for the lock: if it is taken (in a forked child possibly forever), the call bypasses the pool.
#include "pool.h"

#include <cstdlib>
#include <mutex>
#include <new>
#include <unordered_map>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace jfbfast {
namespace {

constexpr std::size_t kPage = 4096, kLargePage = std::size_t(1) << 21;
constexpr std::size_t kMaxKept = std::size_t(256) << 20;  // bytes

struct Pool {
    std::mutex mutex;
    std::unordered_map<std::size_t, std::vector<void*>> blocks;
    std::size_t kept = 0;
};

Pool& pool() {
    static Pool* const instance = new Pool;  // never destroyed: tensors may outlive the module
    return *instance;
}

void* allocate(std::size_t bytes) {
    const std::size_t page = bytes >= kLargePage ? kLargePage : kPage;
    void* memory = std::aligned_alloc(page, (bytes + page - 1) / page * page);
    if (!memory) throw std::bad_alloc();
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (page == kLargePage) madvise(memory, bytes, MADV_HUGEPAGE);
#endif
    return memory;
}

}  // namespace

void* take_memory(std::size_t bytes) {
    std::unique_lock<std::mutex> lock(pool().mutex, std::try_to_lock);
    if (lock) {
        const auto found = pool().blocks.find(bytes);
        if (found != pool().blocks.end() && !found->second.empty()) {
            void* memory = found->second.back();
            found->second.pop_back();
            pool().kept -= bytes;
            return memory;
        }
    }
    return allocate(bytes);
}

void give_memory(void* memory, std::size_t bytes) {
    std::unique_lock<std::mutex> lock(pool().mutex, std::try_to_lock);
    if (!lock || bytes > kMaxKept) {
        std::free(memory);
        return;
    }
    if (pool().kept + bytes > kMaxKept) {  // start again: the sizes in use may have changed
        for (auto& [size, blocks] : pool().blocks)
            for (void* block : blocks) std::free(block);
        pool().blocks.clear();
        pool().kept = 0;
    }
    pool().blocks[bytes].push_back(memory);
    pool().kept += bytes;
}

}  // namespace jfbfast
