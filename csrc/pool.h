// A pool of memory for results: a freed block is kept for the next result of the same size.
#pragma once

#include <cstddef>

namespace jfbfast {

// Uninitialised memory, aligned to a page; throws std::bad_alloc.
void* take_memory(std::size_t bytes);

// Returns a block to the pool; `bytes` is the size that take_memory was called with. Any thread may call it.
void give_memory(void* memory, std::size_t bytes);

}  // namespace jfbfast
